"""delib_fast in other trainers: `apply` for any of them, and what HF Trainer, TRL and axolotl need beside it.

Nothing here is imported unless asked for: `hf`, `trl` and `axolotl` import the trainer of their name.
"""
