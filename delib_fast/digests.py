"""Digests: JSON that is checked when it is read back, and hashes of files, each computed once.

They detect damage, not forgery: nothing is signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delib_fast.files import AppendFile, hash_file, open_regular, write_atomic

# --- JSON with a digest -------------------------------------------------------------------------------------


class DamagedError(ValueError):
    """A file that this project wrote was changed afterwards: it does not match its digest."""


def seal(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Convert a mapping to JSON, with a digest of its content under the additional key `digest`.

    The digest covers the values, not the white space: 64-bit blake2b of the JSON with sorted keys. It detects damage,
    not forgery, since anyone can compute it.
    """
    assert "digest" not in content, "the key is reserved"
    # As it will be read: string keys, lists instead of tuples, and no lone surrogates, which UTF-8 cannot encode.
    plain = json.loads(json.dumps(content, ensure_ascii=False).encode(errors="replace"))
    return json.dumps({**plain, "digest": _digest(plain)}, indent=indent, ensure_ascii=False)


def unseal(text: str | bytes) -> dict[str, Any]:
    """The content of a text that `seal` returned, without the digest. Raises DamagedError if it was changed."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is not valid JSON: {error}") from None
    if not isinstance(content, dict) or "digest" not in content:
        raise DamagedError("it has no digest")
    digest = content.pop("digest")
    if digest != _digest(content):
        raise DamagedError("it does not match its digest")
    return content


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as sealed JSON, atomically; see `seal` and `write_atomic`."""
    write_atomic(path, seal(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises DamagedError if it was changed, and OSError if it cannot be read."""
    with open_regular(path) as file:
        return unseal(file.read())


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a file of sealed JSON lines, such as `AppendFile` writes.

    Returns:
        The intact records, and the numbers (from 1) of the lines that were damaged, or cut off by a crash.
    Raises:
        OSError: the file cannot be read.
    """
    records, damaged = [], []
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(unseal(line))
            except DamagedError:
                damaged.append(number)
    return records, damaged


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a file of sealed JSON lines."""
    file = AppendFile(path)
    try:
        file.write_line(seal(record))
    finally:
        file.close()


# --- hashes -------------------------------------------------------------------------------------------------

_REMEMBERED_BYTES = 1 << 20  # a smaller file is hashed faster than its record is read
_SETTLED_NS = 2_000_000_000  # coarser than the time stamps of any file system in use


def hash_file_once(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. A large file that has not changed since it was last hashed is not read.

    The hash is remembered in the cache folder ($DELIB_FAST_CACHE, or ~/.cache/delib_fast), with the file's device,
    inode, size, mtime and ctime. The kernel sets the ctime at every change of a file, and no program can set it back.
    A file that changed within the last two seconds is not remembered: another change might keep the same time stamps.
    Damage below the file system leaves the time stamps as they are: for a remembered file it is not detected.
    """
    before = _identity(path)
    if before["size"] < _REMEMBERED_BYTES:
        return hash_file(path)
    name = hashlib.blake2b(os.path.realpath(path).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    record = default_cache_folder() / "hashes" / f"{name}.json"
    with contextlib.suppress(OSError, DamagedError, KeyError):
        known = read_json(record)
        if known["file"] == before:
            return str(known["sha256"])
    sha256 = hash_file(path)
    if _identity(path) == before and time.time_ns() - before["ctime_ns"] > _SETTLED_NS:
        with contextlib.suppress(OSError):  # without a writable cache folder, every hash is computed again
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"path": os.path.realpath(path), "file": before, "sha256": sha256})
    return sha256


def default_cache_folder() -> Path:
    """The folder of results that are kept between runs: $DELIB_FAST_CACHE if it is set, else ~/.cache/delib_fast."""
    folder = os.environ.get("DELIB_FAST_CACHE")
    if not folder:
        return Path.home() / ".cache" / "delib_fast"
    return Path(os.path.expanduser(os.path.expandvars(folder)))


def _identity(path: Path) -> dict[str, int]:
    s = path.stat()
    return {
        "device": s.st_dev,
        "inode": s.st_ino,
        "size": s.st_size,
        "mtime_ns": s.st_mtime_ns,
        "ctime_ns": s.st_ctime_ns,
    }


def hash_files(folder: Path) -> dict[str, str]:
    """The sha256 of each file directly inside a model folder, keyed by file name; see `hash_file_once`.

    Hidden files are excluded.
    """
    return {
        path.name: hash_file_once(path)
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def hash_weights(files: Mapping[str, str]) -> str:
    """The hash of a model's weights: one sha256 over the names and hashes of its safetensors files.

    The ledger, evaluations and studies all identify a model by this hash.

    Args:
        files: the sha256 of each file, keyed by file name, as `hash_files` returns them.
    """
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        if name.endswith(".safetensors"):
            digest.update(f"{name} {sha256}\n".encode())
    return digest.hexdigest()


def hash_tree(path: str) -> str:
    """Hash a file, or all files below a folder in the order of their paths: 128-bit blake2b, in hexadecimal.

    Names are not hashed, so a moved or renamed file keeps its hash. If nothing exists at `path` (a hub name, for
    example), the string itself is hashed. Each file is hashed once; see `hash_file_once`.
    """
    found = Path(path)
    files = [found] if found.is_file() else sorted(found.rglob("*")) if found.is_dir() else []
    digest = hashlib.blake2b(b"" if files else path.encode(), digest_size=16)
    for file in (f for f in files if f.is_file()):
        digest.update(bytes.fromhex(hash_file_once(file)))
    return digest.hexdigest()
