"""Fast twins of documented reference functions, in Triton; importing a module of this folder needs Triton."""
