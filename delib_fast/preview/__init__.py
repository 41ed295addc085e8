"""Previews of a run: its exact tokens, and a plan with packs, steps and memory. Needs no GPU."""
