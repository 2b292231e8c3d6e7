"""The ARITHMETIC: what goes where for a memory budget, in numbers, before anything is built."""
