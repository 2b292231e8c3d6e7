"""The low-bit copies of weights: how codes are chosen, how they lie in memory, and products with them."""
