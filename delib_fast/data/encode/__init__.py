"""Encode rows: text becomes token ids, with one segment for each token."""
