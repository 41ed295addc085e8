"""Looking before training: the exact tokens that a model will see, and what a run will take. Needs no GPU."""
