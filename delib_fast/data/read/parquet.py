"""Rows of a Parquet file, streamed batch by batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from delib_fast.data.read.jsonl import Item, without_nulls
from delib_fast.data.rows import DataError

_BATCH_ROWS = 1024


def read_parquet_items(path: Path) -> Iterator[Item]:
    """Yield one item for each row. `line` is the row's number, from 1; a null counts as an absent field."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(
                    f"has two columns {twice!r}: which of them counts is ambiguous; keep one",
                    reason="duplicate_key",
                    location=path,
                )
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Item(number, without_nulls(row), raw=json.dumps(row, default=str).encode())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot be read as Parquet: {first_line}", reason="foreign_file", location=path) from None
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(
            f"contains text that is not UTF-8, or a damaged column ({type(error).__name__})",
            reason="invalid_utf8",
            location=path,
        ) from None
