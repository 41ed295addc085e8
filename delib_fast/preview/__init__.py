"""What a run will do, before it runs: the exact tokens, and a dry run with packs, steps and memory. Needs no GPU."""
