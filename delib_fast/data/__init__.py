"""From files of rows to packed batches: `read_source` → `encode_rows` → `PackedDataLoader`.

    rows = read_source("aft", SourceConfig(path="rows.jsonl"))          # Row: text, and where it came from
    train, held_out = split_holdout(rows, 0.1)
    examples = encode_rows(train, tokenizer, stage)                     # Example: ids, a segment a token
    batches = PackedDataLoader(examples, pack_capacity=…, packs_per_step=…, seed=0, epochs=1, rank=0,
                            world_size=1, segment_weights=…)
    for micro_batch in batches.step(0): …                               # PackedBatch: tensors

The tokenizer is handed in (a fast Hugging Face one); nothing here imports transformers.
"""

from delib_fast.data.decontamination import Overlap, find_overlap, refuse_overlap, refuse_spec_in_prompts
from delib_fast.data.encode.chat import PLAIN_TEMPLATE
from delib_fast.data.encode.encoder import encode_row, encode_rows, encode_stream, split_document
from delib_fast.data.encode.tokenized_dataset import Counts, Example, TokenizedDataset
from delib_fast.data.pack.batch import IGNORE_INDEX, PackedBatch, empty_pack
from delib_fast.data.pack.epochs import PromptSharing
from delib_fast.data.pack.loader import PackedDataLoader, evaluation_batches
from delib_fast.data.pack.mixing import SourceShare, mix_sources
from delib_fast.data.pack.packing import PackPlan, plan_packs
from delib_fast.data.pack.weights import loss_normalizer, segment_weights
from delib_fast.data.read.sources import SourceRows, read_source
from delib_fast.data.rows import DataError, Message, Row, Segment, split_holdout

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
    "SourceRows",
    "SourceShare",
    "TokenizedDataset",
    "empty_pack",
    "encode_row",
    "encode_rows",
    "encode_stream",
    "evaluation_batches",
    "find_overlap",
    "loss_normalizer",
    "mix_sources",
    "plan_packs",
    "read_source",
    "refuse_overlap",
    "refuse_spec_in_prompts",
    "segment_weights",
    "split_document",
    "split_holdout",
]
