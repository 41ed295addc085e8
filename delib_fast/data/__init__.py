"""Data, from files of rows to packed batches: `read_source` → `encode_rows` → `PackedDataLoader`.

    rows = read_source("aft", SourceConfig(path="rows.jsonl"))          # Row: text and its location
    train, held_out = split_holdout(rows, 0.1)
    examples = encode_rows(train, tokenizer, pack_capacity=2048)        # Example: ids, and the segment of each token
    loader = PackedDataLoader(examples, pack_capacity=2048, packs_per_step=4, segment_weights=(0, 1, 1, 1),
                              seed=0, epochs=1, rank=0, world_size=1)
    for micro_batch in loader.step(0): ...                              # PackedBatch: tensors

The packages in that order: `read` (files to rows), `encode` (rows to token ids), `pack` (examples to batches); none
imports a later one. The tokenizer is an argument, a fast one of Hugging Face; nothing here imports transformers.
"""

from delib_fast.data.decontamination import Overlap, find_overlap, refuse_overlap, refuse_spec_in_prompts
from delib_fast.data.encode.encoder import encode_row
from delib_fast.data.encode.stream import encode_rows, encode_stream, encoding_options, split_document
from delib_fast.data.encode.teacher import teacher_stream
from delib_fast.data.encode.template import PLAIN_TEMPLATE
from delib_fast.data.encode.tokenized_dataset import Counts, Example, TokenizedDataset
from delib_fast.data.holdout import split_holdout
from delib_fast.data.pack.batch import IGNORE_INDEX, PackedBatch, TeacherPack, empty_pack
from delib_fast.data.pack.epochs import PromptSharing
from delib_fast.data.pack.loader import PackedDataLoader, evaluation_batches
from delib_fast.data.pack.mixing import SourceShare, mix_datasets, mix_sources
from delib_fast.data.pack.packing import PackPlan, plan_packs
from delib_fast.data.pack.teacher import TeacherWeights
from delib_fast.data.pack.weights import (
    cot_under_pressure,
    loss_normalizer,
    segment_weights,
    teacher_weights,
    total_weights,
)
from delib_fast.data.read.source_cache import Source, load_source
from delib_fast.data.read.sources import SourceReader, read_source
from delib_fast.data.rows import DataError, Message, Row, Segment

__all__ = [
    "IGNORE_INDEX",
    "PLAIN_TEMPLATE",
    "Counts",
    "DataError",
    "Example",
    "Message",
    "Overlap",
    "PackPlan",
    "PackedBatch",
    "PackedDataLoader",
    "PromptSharing",
    "Row",
    "Segment",
    "Source",
    "SourceReader",
    "SourceShare",
    "TeacherPack",
    "TeacherWeights",
    "TokenizedDataset",
    "cot_under_pressure",
    "empty_pack",
    "encode_row",
    "encode_rows",
    "encode_stream",
    "encoding_options",
    "evaluation_batches",
    "find_overlap",
    "load_source",
    "loss_normalizer",
    "mix_datasets",
    "mix_sources",
    "plan_packs",
    "read_source",
    "refuse_overlap",
    "refuse_spec_in_prompts",
    "segment_weights",
    "split_document",
    "split_holdout",
    "teacher_stream",
    "teacher_weights",
    "total_weights",
]
