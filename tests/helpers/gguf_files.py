"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_llama() -> tuple[Any, Any]:
    """A Llama model of two layers with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from delib_fast.models import train_tokenizer

    tokenizer = train_tokenizer(["In the year 2024, she paid 17 or 18 coins; he paid 3."] * 3, 280)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def write_gguf(
    path: Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    pre: str = "gpt-2",
    drop: str = "",
    rope: str = "",
    layers: int = 2,
) -> Path:
    """Write `small_llama`, or another Llama model, to a GGUF file, with its matrices in the type Q8_0.

    Args:
        pre: the name of the rules by which the tokenizer splits text.
        drop: leave out the tensors whose name contains this.
        layers: how many layers the file says that the model has.
        rope: a kind of scaling of the rotary frequencies.
    """
    import gguf

    if model is None:
        model, tokenizer = small_llama()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope:
        writer.add_string("llama.rope.scaling.type", rope)
    _add_tokenizer(writer, tokenizer, pre)
    for name, weight in model.state_dict().items():
        gguf_name = _gguf_name(name)
        if gguf_name is None or (drop and drop in gguf_name):
            continue
        array = weight.numpy()
        if "attn_q" in gguf_name or "attn_k" in gguf_name:
            heads = config.num_attention_heads if "attn_q" in gguf_name else config.num_key_value_heads
            rows, columns = array.shape  # llama.cpp rotates neighbouring dimensions, transformers the two halves
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str | None:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    parts = name.split(".")
    if parts[1] != "layers":
        return None  # the head, which is tied to the embeddings
    return f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:-1])]}.weight"


def _add_tokenizer(writer: Any, tokenizer: Any, pre: str) -> None:
    import gguf

    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in stored["added_tokens"]}
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    merges = stored["model"]["merges"]
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
