"""One-bit flips: which files a flip is made in, and what came of it.

detected   an error names the file, or a message says what is lost
healed     a message, and the result of an undamaged run
harmless   no message, and the result of an undamaged run
silent     no message, and another result: there must be none
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder that is not empty."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size)


def flipped(file: Path, flips: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Flip one random bit of the file at a time, and put the old content back; yields (byte, bit)."""
    whole, generator = file.read_bytes(), random.Random(f"{seed} {file.name}")
    bits = len(whole) * 8
    for position in generator.sample(range(bits), min(flips, bits)):
        byte, bit = divmod(position, 8)
        file.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        yield byte, bit
    file.write_bytes(whole)


def classify(
    observe: Callable[[], Any], expected: Any, messages: list[str], errors: tuple[type[Exception], ...]
) -> str:
    """What came of a flip: `observe` returns what the files say; readable errors and messages count as detected."""
    messages.clear()
    try:
        found = observe()
    except errors:
        return "detected"
    if same(found, expected):
        return "healed" if messages else "harmless"
    return "detected" if messages else "silent"


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, with NaN equal to NaN."""
    return json.dumps(a, sort_keys=True, default=repr) == json.dumps(b, sort_keys=True, default=repr)
