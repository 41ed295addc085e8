"""Encode rows: text becomes token ids with one segment per token."""
