"""The ARITHMETIC: what goes where for a memory budget, in numbers that are printed before anything is built."""
