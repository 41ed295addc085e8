"""delib_fast in other trainers: `apply` for any of them, and what HF Trainer, TRL and axolotl additionally need.

Each module is imported only on request: `hf`, `trl` and `axolotl` import the trainer that they are named after.
"""
