"""Hostile or damaged model folders. Each is a small valid model with one change.

Whatever the change, loading such a folder must end in an error that a user can act on, or in a model that computes
what its files say; it must run no code of the folder, open no file outside it, and end in bounded time and memory.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE: dict[str, Callable[[Path, Path], None]] = {}
"""The changes, keyed by their name. Each receives the folder, and a path that is created if code of the folder runs."""


def hostile(change: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    HOSTILE[change.__name__] = change
    return change


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file of the folder; None removes a key."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    (folder / file).write_text(json.dumps(content))


class Payload:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def module(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nraise RuntimeError('this code must not run')\n"


# --- code ---------------------------------------------------------------------------------------------------


@hostile
def code_in_the_config(folder: Path, canary: Path) -> None:
    (folder / "configuration_evil.py").write_text(module(canary))
    edit(folder, auto_map={"AutoConfig": "configuration_evil.EvilConfig"}, model_type="evil")


@hostile
def code_next_to_a_known_type(folder: Path, canary: Path) -> None:
    (folder / "modeling_evil.py").write_text(module(canary))
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilModel"})


@hostile
def code_in_the_tokenizer(folder: Path, canary: Path) -> None:
    (folder / "tokenization_evil.py").write_text(module(canary))
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    edit(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")


@hostile
def code_of_another_repository(folder: Path, canary: Path) -> None:
    edit(folder, auto_map={"AutoModelForCausalLM": "someone/else--modeling_evil.EvilModel"})


@hostile
def a_custom_generate(folder: Path, canary: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(module(canary))


@hostile
def an_attention_kernel_from_the_hub(folder: Path, canary: Path) -> None:
    edit(folder, _attn_implementation="kernels-community/evil", attn_implementation="kernels-community/evil")


@hostile
def pickled_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))


@hostile
def pickled_weights_next_to_good_ones(folder: Path, canary: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))


@hostile
def a_pickle_named_safetensors(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))


@hostile
def a_config_that_names_a_pickle(folder: Path, canary: Path) -> None:
    (folder / "evil.bin").write_bytes(pickle.dumps(Payload(canary)))
    edit(folder, transformers_weights="evil.bin")


@hostile
def a_template_that_reaches_for_the_system(folder: Path, canary: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    (folder / "chat_template.jinja").write_text(reach.replace("CANARY", str(canary)))


# --- paths --------------------------------------------------------------------------------------------------


def index(folder: Path, file: str) -> None:
    names = list(_header(folder / "model.safetensors")[0])
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    tree = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys((n for n in names if n[:2] != "__"), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))


@hostile
def an_index_with_an_absolute_path(folder: Path, canary: Path) -> None:
    index(folder, "/etc/passwd")


@hostile
def an_index_with_a_parent_path(folder: Path, canary: Path) -> None:
    index(folder, "../other/model.safetensors")
    (folder.parent / "other").mkdir(exist_ok=True)
    shutil.copy(folder / "part.safetensors", folder.parent / "other" / "model.safetensors")


@hostile
def an_index_that_names_a_missing_file(folder: Path, canary: Path) -> None:
    index(folder, "model-00001-of-00002.safetensors")


@hostile
def an_index_that_is_a_list(folder: Path, canary: Path) -> None:
    index(folder, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text("[1, 2]")


@hostile
def an_index_without_a_map(folder: Path, canary: Path) -> None:
    index(folder, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


@hostile
def a_link_that_names_itself(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


@hostile
def a_dangling_link(folder: Path, canary: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nowhere.json")


@hostile
def a_pipe_as_config(folder: Path, canary: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@hostile
def a_pipe_as_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@hostile
def a_pipe_as_tokenizer(folder: Path, canary: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


@hostile
def a_pipe_as_template(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(folder / "chat_template.jinja")


@hostile
def an_endless_device_as_config(folder: Path, canary: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@hostile
def a_folder_as_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


# --- configurations -----------------------------------------------------------------------------------------


def text(name: str, content: str, file: str = "config.json") -> None:
    HOSTILE[name] = lambda folder, canary: (folder / file).write_text(content) and None


def value(name: str, file: str = "config.json", **changes: Any) -> None:
    HOSTILE[name] = lambda folder, canary: edit(folder, file, **changes)


for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
    text(f"{file}_is_a_list", "[]", file)
    text(f"{file}_is_null", "null", file)
    text(f"{file}_is_empty", "", file)
    text(f"{file}_is_nested_100000_deep", "[" * 100_000 + "]" * 100_000, file)
text("config_with_a_number_of_5000_digits", '{"model_type": "qwen3", "hidden_size": ' + "9" * 5000 + "}")

value("no_layers", num_hidden_layers=0)
value("minus_one_layer", num_hidden_layers=-1)
value("a_million_layers", num_hidden_layers=10**6)
value("a_trillion_layers", num_hidden_layers=10**12)
value("a_billion_layers_with_types", num_hidden_layers=10**9, layer_types=None, use_sliding_window=True)
value("layers_as_text", num_hidden_layers="two")
value("layers_as_a_fraction", num_hidden_layers=1.5)
value("a_vocabulary_of_a_trillion", vocab_size=10**12)
value("a_vocabulary_of_a_billion", vocab_size=10**9)
value("no_vocabulary", vocab_size=0)
value("a_negative_vocabulary", vocab_size=-5)
value("no_heads", num_attention_heads=0)
value("a_billion_heads", num_attention_heads=10**9)
value("no_key_value_heads", num_key_value_heads=0)
value("heads_of_no_size", head_dim=0)
value("a_hidden_size_of_nothing", hidden_size=0)
value("a_hidden_size_of_a_billion", hidden_size=10**9)
value("an_intermediate_size_of_a_trillion", intermediate_size=10**12)
value("a_context_of_a_quintillion", max_position_embeddings=10**18)
value("an_unknown_activation", hidden_act="evil")
value("an_activation_that_is_code", hidden_act="__import__('os').system('true')")
value("an_unknown_type", model_type="evil")
value("a_type_that_is_a_list", model_type=["qwen3"])
value("a_type_of_a_vision_model", model_type="vit")
value("no_type", model_type=None)
value("an_unknown_dtype", dtype="evil", torch_dtype="evil")
value("a_dtype_that_is_a_function", dtype="save", torch_dtype="save")
value("an_unknown_quantization", quantization_config={"quant_method": "evil"})
value("a_quantization_that_is_missing", quantization_config={"quant_method": "gptq", "bits": 4})
value("a_quantization_that_is_a_list", quantization_config=[1])
value("an_unknown_rope", rope_parameters={"rope_type": "evil", "rope_theta": 1.0})
value("a_rope_that_is_text", rope_parameters="evil")
value("a_rope_with_theta_0", rope_parameters={"rope_type": "default", "rope_theta": 0.0})
value("a_rope_with_theta_nan", rope_parameters={"rope_type": "default", "rope_theta": float("nan")})
value("an_epsilon_that_is_text", rms_norm_eps="evil")
value("an_epsilon_that_is_nan", rms_norm_eps=float("nan"))
value("a_pad_token_outside", pad_token_id=10**9)
value("a_negative_pad_token", pad_token_id=-(10**6))
value("a_text_config_that_is_text", text_config="evil")
value("weights_file_outside", transformers_weights="../../../etc/passwd")
value("weights_file_absolute", transformers_weights="/etc/passwd")
value("tokenizer_class_unknown", "tokenizer_config.json", tokenizer_class="EvilTokenizer")
value("tokenizer_class_a_number", "tokenizer_config.json", tokenizer_class=3)
value("eos_token_a_list", "tokenizer_config.json", eos_token=["a"])
value("eos_token_missing", "tokenizer_config.json", eos_token=None)
value("template_a_number", "tokenizer_config.json", chat_template=3)
value("added_token_with_a_huge_id", "tokenizer_config.json", added_tokens_decoder={str(10**9): {"content": "<evil>"}})
value("model_max_length_negative", "tokenizer_config.json", model_max_length=-1)
value("tokenizer_of_another_file", "tokenizer_config.json", tokenizer_file="/etc/passwd")


# --- weights ------------------------------------------------------------------------------------------------


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _rewrite(file: Path, header: Any, rest: bytes) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + rest)


def weights(change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    def apply(folder: Path, canary: Path) -> None:
        _rewrite(folder / "model.safetensors", *change(*_header(folder / "model.safetensors")))

    HOSTILE[change.__name__] = apply


@weights
def a_header_with_offsets_outside(header, rest):
    header[next(n for n in header if n[:2] != "__")]["data_offsets"] = [0, 10**15]
    return header, rest


@weights
def a_tensor_of_another_shape(header, rest):
    tensor = next(v for n, v in header.items() if n.endswith("q_proj.weight"))
    tensor["shape"] = tensor["shape"][::-1]
    return header, rest


@weights
def a_tensor_of_another_dtype(header, rest):
    tensor = next(v for n, v in header.items() if n.endswith("q_proj.weight"))
    tensor["dtype"], tensor["shape"] = "I8", [tensor["shape"][0], tensor["shape"][1] * 4]
    return header, rest


@weights
def a_missing_tensor(header, rest):
    header.pop(next(n for n in header if n.endswith("q_proj.weight")))
    return header, rest


@weights
def an_unknown_dtype_in_the_header(header, rest):
    next(v for n, v in header.items() if n[:2] != "__")["dtype"] = "EVIL"
    return header, rest


@weights
def a_header_that_is_a_list(header, rest):
    return [1], rest


@weights
def a_header_nested_deeply(header, rest):
    return b"[" * 100_000 + b"]" * 100_000, rest


@hostile
def a_header_of_exabytes(folder: Path, canary: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + data[8:])


@hostile
def weights_cut_short(folder: Path, canary: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


@hostile
def empty_weights(folder: Path, canary: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


@hostile
def weights_of_nan(folder: Path, canary: Path) -> None:
    header, rest = _header(folder / "model.safetensors")
    _rewrite(folder / "model.safetensors", header, b"\xff" * len(rest))


@hostile
def a_template_that_loops(folder: Path, canary: Path) -> None:
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)


@hostile
def a_template_that_fills_memory(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'a' * 20000000000 }}")


@hostile
def a_template_that_does_not_parse(folder: Path, canary: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
