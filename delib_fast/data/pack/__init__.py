"""Pack examples: an order that is a pure function of lengths and seed, and tensors for each step."""
