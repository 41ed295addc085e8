"""A training checkpoint on disk: its format and its writer. Imports neither torch.distributed nor DeepSpeed."""
