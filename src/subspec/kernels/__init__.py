"""Fast twins of documented reference functions, in C++; knows nothing of models, stores or plans."""
