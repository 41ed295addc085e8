"""`delib-fast`: one module per group of commands."""
