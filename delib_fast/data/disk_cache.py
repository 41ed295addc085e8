"""The cache folder: results that are kept between runs. The key of a result is a hash of everything it depends on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError, expand_path
from delib_fast.digests import DamagedError, default_cache_folder, read_json, write_json
from delib_fast.files import locked

CACHE_VERSION = 6
"""Increase it whenever equal inputs would give a different result or a different file format."""
_UNUSABLE = "cache_dir: {folder} cannot be used: {why}; set cache_dir or $DELIB_FAST_CACHE to a writable folder"


@contextlib.contextmanager
def cache_folder(configured: str | None, *, unusable: str = _UNUSABLE) -> Iterator[Path]:
    """Provide the cache folder to a `with` block, and report an OSError in the block as a ConfigError.

    The folder is `configured` (`cache_dir`) if set, else `$DELIB_FAST_CACHE`, else `~/.cache/delib_fast`. It is not
    created here.

    Args:
        unusable: the message of the error, with {folder} and {why}.
    Raises:
        ConfigError: the block raised OSError, so the folder cannot be used.
    """
    folder = Path(expand_path(configured or str(default_cache_folder())))
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # another folder would not help
            raise
        raise ConfigError(unusable.format(folder=folder, why=error.strerror or error)) from error


def cache_key(inputs: Mapping[str, Any]) -> str:
    """The sha256, in hexadecimal, of everything that a cached result depends on."""
    return hashlib.sha256(json.dumps({"version": CACHE_VERSION, **inputs}, sort_keys=True).encode()).hexdigest()


def cached_json(folder: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON stored under a key.

    If there is none, or it is damaged, one process computes and stores it while the others wait.
    Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    with locked(path.with_suffix(".lock")):
        try:
            result = read_json(path)
        except (OSError, DamagedError):
            result = compute()
            write_json(path, result)
        return result
