"""From files of rows to packed batches: `read_source` → `encode_rows` → `PackedBatches`.

    rows = read_source("aft", SourceConfig(path="rows.jsonl"))          # Row: text, and where it came from
    train, held_out = split_holdout(rows, 0.1)
    examples = encode_rows(train, tokenizer, stage)                     # Example: ids, a segment a token
    batches = PackedBatches(examples, pack_capacity=…, packs_per_step=…, seed=0, epochs=1, rank=0,
                            world_size=1, segment_weights=…)
    for micro_batch in batches.step(0): …                               # PackedBatch: tensors

The tokenizer is handed in (a fast Hugging Face one); nothing here imports transformers.
"""

from delib_fast.data.batch import IGNORE_INDEX, PackedBatch, PackedBatches, empty_pack, evaluation_batches
from delib_fast.data.chat import PLAIN_TEMPLATE
from delib_fast.data.encode import encode_row, encode_rows, encode_stream, split_document
from delib_fast.data.encoded_set import Counts, EncodedSet, Example
from delib_fast.data.epochs import PromptSharing
from delib_fast.data.guards import Overlap, find_overlap, refuse_overlap, refuse_spec_in_prompts
from delib_fast.data.mixing import SourceShare, mix_sources
from delib_fast.data.packing import PackPlan, plan_packs
from delib_fast.data.rows import DataError, Message, Row, Segment, split_holdout
from delib_fast.data.sources import SourceRows, read_source

__all__ = [
    "IGNORE_INDEX",
    "PLAIN_TEMPLATE",
    "Counts",
    "DataError",
    "EncodedSet",
    "Example",
    "Message",
    "Overlap",
    "PackPlan",
    "PackedBatch",
    "PackedBatches",
    "PromptSharing",
    "Row",
    "Segment",
    "SourceRows",
    "SourceShare",
    "empty_pack",
    "encode_row",
    "encode_rows",
    "encode_stream",
    "evaluation_batches",
    "find_overlap",
    "mix_sources",
    "plan_packs",
    "read_source",
    "refuse_overlap",
    "refuse_spec_in_prompts",
    "split_document",
    "split_holdout",
]
