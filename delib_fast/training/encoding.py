"""The examples of a run's sources, encoded once for each way in which its stages encode them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from delib_fast.config import AFTConfig, Config, StageConfig
from delib_fast.data import Source, TokenizedDataset, encode_stream, encoding_options, teacher_stream
from delib_fast.data.disk_cache import cache_folder, cache_key
from delib_fast.data.encode.cache import cached_dataset
from delib_fast.data.progress import log_progress
from delib_fast.training.distillation import read_spec
from delib_fast.training.sources import reraise_as_data_error


class EncodedSources:
    """Encodes sources on first use, or reads them from the encoding cache, and keeps them.

    Args:
        config: the run's configuration.
        logs: whether this process logs its progress.
    """

    def __init__(self, config: Config, *, logs: bool) -> None:
        self._config, self._logs = config, logs
        self._known: dict[str, TokenizedDataset] = {}

    def of(
        self,
        stage: StageConfig,
        source: Source,
        name: str,
        tokenizer: Any,
        fingerprint: str,
        teacher_positions: Callable[[], int | None],
    ) -> TokenizedDataset:
        """The examples of a source as a stage encodes them, with those of its teacher.

        Args:
            name: the source's name under `data:`.
            fingerprint: `tokenizer_fingerprint` of the tokenizer.
            teacher_positions: returns how many tokens the stage's teacher can read; None for any number.
        """
        options = encoding_options(stage)
        settings = self._config.data[name].identity(exclude=frozenset({"repeat", "max_tokens"}))
        inputs = {"source": name, "settings": settings, "sha256": source.sha256, **options}
        student = self._cached(
            stage, source, name, inputs, fingerprint, lambda rows: encode_stream(rows, tokenizer, **options)
        )
        if not isinstance(stage, AFTConfig) or stage.teacher is None:
            return student
        spec, positions = read_spec(stage), teacher_positions()
        read_by_teacher = {"teacher_spec": hashlib.sha256(spec.encode()).hexdigest(), "teacher_positions": positions}
        taught = TokenizedDataset.join([student])  # another object: a stage without a teacher may use the same source
        taught.teacher = self._cached(
            stage,
            source,
            name,
            {**inputs, **read_by_teacher},
            fingerprint,
            lambda rows: teacher_stream(rows, tokenizer, spec=spec, positions=positions, **options),
        )
        assert len(taught.teacher) == len(taught)
        return taught

    def _cached(
        self, stage: StageConfig, source: Source, name: str, inputs: dict[str, Any], fingerprint: str, encode: Any
    ) -> TokenizedDataset:
        key = cache_key({**inputs, "tokenizer": fingerprint})
        if key not in self._known:
            rows = source.train_rows()
            if self._logs:
                what = f"{name} for the teacher" if "teacher_spec" in inputs else name
                rows = log_progress(rows, source.num_train, f"encoding {what}")
            with reraise_as_data_error(f"stage {stage.name!r}"), cache_folder(self._config.cache_dir) as folder:
                self._known[key] = cached_dataset(folder, key, encode(rows), description=inputs)
        return self._known[key]
