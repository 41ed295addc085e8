"""Pack examples: which examples share a pack, the order of the packs, and the tensors of each step."""
