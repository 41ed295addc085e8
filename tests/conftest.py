"""What every test shares."""

from __future__ import annotations

import os

# As in delib_fast/train.py, and here before any test imports torch: tests share a small machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
