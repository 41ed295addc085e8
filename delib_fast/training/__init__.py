"""Everything around a training step: the loop, its callbacks, and the run directory."""
