"""`delib-fast sample`: the states of a model in a run, its prompts, and what is printed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from eval_models import make_model
from helpers.tiny_run import edited_ledger, run, tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from delib_fast.cli.sample import register
from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.digests import read_json_lines
from delib_fast.evals import samples as samples_module
from delib_fast.evals.moments import find_moments
from delib_fast.evals.replies import Sample, SampledReply, SampleSet, model_figures, read_samples, write_samples
from delib_fast.evals.samples import sample_moments, sample_prompts
from delib_fast.evals.sampling import Reply, parse_reply
from delib_fast.models import build_model, export_model, load_tokenizer
from delib_fast.models.generate import Sampling, generate_ids
from delib_fast.reports.samples import print_samples, write_page
from delib_fast.terminal import PlainConsole

TOKENS = 6


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """One step of each stage, with a learning rate at which every reply changes; the base has random weights."""
    folder = tmp_path_factory.mktemp("lora")
    path = tiny(folder)
    tree = yaml.safe_load(path.read_text())
    tree["model"]["lora"] = {"r": 4}
    tree["model"]["architecture"]["num_hidden_layers"] = 1
    for stage in tree["stages"]:
        stage |= {"max_steps": 1, "optimizer": {"lr": 0.2, "warmup": 0.0}}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert run(path) == 0
    return folder / "run"


@pytest.fixture
def copied(lora_run, tmp_path) -> Path:
    shutil.copytree(lora_run, tmp_path / "run")
    return tmp_path / "run"


def sampled(path: Path, **changes) -> SampleSet:
    moments = find_moments(path)
    chats, locations, _ = sample_prompts(moments, None, 2)
    return sample_moments(moments, chats, locations, Sampling(max_new_tokens=TOKENS), **changes)


def test_each_moment_is_what_stock_libraries_load(lora_run, monkeypatch):
    """The base from the run's seed, the first stage's adapter with peft, and the merged export with transformers."""
    from peft import PeftModel

    monkeypatch.setattr(samples_module, "native_precision", lambda device: "fp32")
    found = sampled(lora_run)
    config = load_config(lora_run / "config.yaml")
    tokenizer = find_moments(lora_run).tokenizer()
    base = build_model(config.model.model_copy(update={"lora": None}), tokenizer, seed=config.seed)
    adapted = build_model(config.model.model_copy(update={"lora": None}), tokenizer, seed=config.seed)
    stock = {
        "base": base,
        "after msm": PeftModel.from_pretrained(adapted, lora_run / "stages/msm/adapter"),
        "after aft": AutoModelForCausalLM.from_pretrained(lora_run / "model"),
    }
    encoder = encoder_for(tokenizer)
    assert [f.model for f in found.figures] == list(stock)
    texts = set()
    for sample in found.samples:
        prompt = encoder.encode_prompt(sample.prompt)
        for sampled_reply, model in zip(sample.replies, stock.values(), strict=True):
            ids = greedy(model.eval(), prompt, encoder.end_ids)
            text = tokenizer.decode([i for i in ids if i not in encoder.end_ids])
            assert (sampled_reply.reply.response or sampled_reply.reply.cot or "") == parsed(text)
            assert sampled_reply.opening_log_p == pytest.approx(
                log_p(model, prompt, encoder.thought.opening_ids), abs=2e-4
            )
            texts.add(text)
    assert len(texts) >= 3, "the stages changed the replies"


def parsed(text: str) -> str:
    reply = parse_reply(text, opened=None)
    return reply.response or reply.cot or ""


def greedy(model, prompt, ends) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + TOKENS and ids[-1] not in ends:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def log_p(model, prompt, opening) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *opening]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + k - 1, token]) for k, token in enumerate(opening))


def test_the_ledger_has_the_same_log_p_of_the_opening(lora_run, monkeypatch):
    """The held-out evaluation measures it on rows with a CoT; `sample` after their prompts."""
    monkeypatch.setattr(samples_module, "native_precision", lambda device: "fp32")
    moments = find_moments(lora_run)
    chats, locations, _ = sample_prompts(moments, None, 100)
    found = sample_moments(moments, chats, locations, Sampling(max_new_tokens=1))
    evaluations = json.loads((lora_run / "ledger.json").read_text())["evaluations"]
    assert [e["opens_cot"]["rows"] for e in evaluations] == [4, 4, 4]
    recorded = [e["opens_cot"]["log_p"] for e in evaluations]
    assert [f.opening_log_p for f in found.figures] == pytest.approx(recorded, abs=1e-3)
    records, damaged = read_json_lines(lora_run / "held_out.jsonl")
    assert not damaged
    assert [r["moment"] for r in records] == ["start", "after msm", "after aft"]
    for record, evaluation in zip(records, evaluations, strict=True):
        (rows,) = record["sets"].values()
        for name, part in evaluation["segments"].items():
            sums = [sum(column) for column in zip(*rows["segments"][name], strict=True)]
            assert (sums[0] / sums[1], sums[1]) == (pytest.approx(part["nll"], abs=1e-5), part["tokens"])
        own = [-nll for nll, tokens in rows["segments"]["opens_cot"] if tokens]
        assert sum(own) / 4 == pytest.approx(evaluation["opens_cot"]["log_p"], abs=1e-5)


def test_a_run_that_has_finished_one_stage(copied):
    """Without an exported model, the tokenizer is the one that the run trains with."""
    with edited_ledger(copied) as ledger:
        ledger["stages"][1] = {"name": "aft", "status": "running"}
    moments = find_moments(copied)
    assert [m.name for m in moments.found] == ["base", "after msm"]
    assert moments.missing == {"after aft": "the stage has not finished"}
    whole = load_tokenizer(str(copied / "model"))
    assert (moments.tokenizer().get_vocab(), moments.tokenizer().chat_template) == (
        whole.get_vocab(),
        whole.chat_template,
    )
    assert len(sample_prompts(moments, None, 9)[0]) == 4


def test_what_is_missing_is_said(copied):
    shutil.rmtree(copied / "stages")
    found = sampled(copied)
    assert [f.model for f in found.figures] == ["base", "after aft"]
    assert found.missing == {"after msm": f"{copied}/stages/msm/adapter was deleted"}
    shutil.rmtree(copied / "model")
    assert [f.model for f in sampled(copied).figures] == ["base", "after aft"], "its adapter is left"
    shutil.rmtree(copied / "adapter")
    with pytest.raises(ConfigError, match=r"the run has no model yet .*after aft: .*/model was deleted"):
        find_moments(copied)


def test_a_changed_export_is_not_sampled(copied):
    config = copied / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    found = sampled(copied)
    assert [f.model for f in found.figures] == ["base", "after msm"]
    assert "config.json was changed after it was written" in found.missing["after aft"]
    tokens = copied / "model" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"<think>"', '"<other>"'))
    assert "<other>" not in find_moments(copied).tokenizer().get_vocab()


def test_a_path_without_a_model_is_refused(copied, tmp_path):
    def why(path, base=None) -> str:
        with pytest.raises(ConfigError) as error:
            find_moments(path, base)
        return str(error.value)

    give = "give a run directory, a model folder or a peft adapter folder"
    assert why(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder; {give}"
    assert why(copied.parent) == (
        f"{copied.parent}: is neither a run directory (config.yaml and ledger.json) nor a model folder (config.json); "
        "give the run_dir of a run"
    )
    with edited_ledger(copied) as ledger:
        for stage in ledger["stages"]:
            stage["status"] = "running"
    assert why(copied) == (
        f"{copied}: the run has no model yet (after msm: the stage has not finished; after aft: the stage has not "
        "finished). Wait until its first stage has finished, or start the run again: it resumes from its last "
        "checkpoint"
    )


def test_a_model_folder_needs_prompts(tokenizer, tmp_path):
    export_model(make_model(tokenizer), tokenizer, tmp_path / "model")
    moments = find_moments(tmp_path / "model", str(tmp_path / "model"))
    assert [m.name for m in moments.found] == ["base", "model"]
    with pytest.raises(ConfigError, match="a model folder has no held-out prompts; give --prompts FILE"):
        sample_prompts(moments, None, 3)


def test_prompt_files(lora_run, tmp_path):
    """Text, objects, a table; the location of each; spread over the file."""
    moments = find_moments(lora_run)
    lines = [f"prompt {k}" for k in range(9)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": line, "category": "?"}) + "\n" for line in lines))
    (tmp_path / "p.json").write_text(json.dumps([{"messages": [{"role": "user", "content": x}]} for x in lines]))
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *((k, line) for k, line in enumerate(lines))])
    for suffix in ("txt", "jsonl", "json", "csv"):
        chats, locations, available = sample_prompts(moments, tmp_path / f"p.{suffix}", 3)
        assert [chat[-1].content for chat in chats] == ["prompt 0", "prompt 3", "prompt 6"]
        assert available == 9
    assert locations == [f"{tmp_path}/p.csv:{k}" for k in (2, 5, 8)]
    for text, message in (
        ("", "contains no prompt"),
        ('{"text": "x"}', ":1: has none of 'prompt'"),
        ("plain", ":1: not valid JSON"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=message):
            sample_prompts(moments, tmp_path / "bad.jsonl", 3)
    with pytest.raises(ConfigError, match=r"none\.txt: the prompts cannot be read"):
        sample_prompts(moments, tmp_path / "none.txt", 3)


def invoke(*arguments):
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_resumes_and_writes_a_page(copied, monkeypatch):
    first = invoke(copied, "--n", 2, "--max-tokens", 4, "--html")
    assert first.exit_code == 0, first.output
    assert "base: 2 replies of random weights" in first.output
    assert (copied / "samples" / "index.html").exists()
    stored, _ = read_json_lines(copied / "samples" / "replies.jsonl")
    assert len(stored) == 6
    assert stored[0]["prompt"][-1]["role"] == "user"
    monkeypatch.setattr("delib_fast.evals.sampling.generate_ids", pytest.fail)
    again = invoke(copied, "--n", 2, "--max-tokens", 4)
    assert (again.exit_code, again.output.split("prompt 1 of 2")[1].split("samples ")[0]) == (
        0,
        first.output.split("prompt 1 of 2")[1].split("samples ")[0],
    )

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("delib_fast.evals.sampling.generate_ids", interrupt)
    stopped = invoke(copied, "--n", 2, "--max-tokens", 5)
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert "interrupted; the same command continues with the replies that it has not drawn yet" in stopped.output
    too_long = invoke(copied, "--n", 1, "--max-tokens", 100_000)
    assert str(too_long.exception).endswith("; lower max_new_tokens or shorten the prompts")
    assert isinstance(too_long.exception, ConfigError)
    greedy_twice = invoke(copied, "--samples", 2)
    assert isinstance(greedy_twice.exception, ConfigError)
    assert str(greedy_twice.exception).endswith("add --temperature 0.8")


# --- what is shown ------------------------------------------------------------------------------------------


HOSTILE = "\x1b[31mred</pre><script>alert(1)</script>\u202e [bold]x[/bold]"


def hostile_set() -> SampleSet:
    closed = Reply("I think. " * 30, HOSTILE, "closed", True, 90, 60)
    replies = [
        SampledReply("base", Reply(None, HOSTILE, "none", False, 6), opening_log_p=-30.25),
        SampledReply("after aft", closed, verdict="refuse", opening_log_p=-0.034),
    ]
    settings = {
        "max_new_tokens": 6,
        "temperature": 0.0,
        "seed": 0,
        "samples": 1,
        "precision": "fp32",
        "system_prompt": None,
        "template_opens_thought": False,
    }
    figures = tuple(model_figures(r.model, "weights", [r]) for r in replies)
    return SampleSet("run", settings, figures, (Sample((Message("user", HOSTILE),), tuple(replies), "f:1"),), {})


@pytest.mark.parametrize("width", [40, 80, 160])
def test_replies_are_marked_without_colour_and_escaped(width, capsys):
    import io

    file = io.StringIO()
    print_samples(hostile_set(), PlainConsole(file=file, width=width))
    text = file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31mred" in text
    flat = " ".join(text.split())
    for part in (
        "┊ CoT, 60 tokens, closed",
        "│ response",
        "■ stopped by its end token",
        "□ cut off at the length limit",
    ):
        assert part in flat.replace("│ response │ response", "│ response"), part
    assert "log p(opens CoT) -30.25" in flat
    if width < 80:
        return
    row = next(line for line in lines if line.strip().startswith("after aft") and " of " in line)
    assert row.split() == ["after", "aft", "-0.03", "1", "of", "1", "1", "of", "1", "1", "of", "1", "60", "90"]
    side_by_side = any("base" in line and "after aft" in line for line in lines)
    assert side_by_side


def test_the_page_escapes_and_is_read_back(tmp_path):
    found = hostile_set()
    page = write_page(found, tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "verdict: refuse" in page
    write_samples(tmp_path, found)
    assert read_samples(tmp_path) == found
    assert read_samples(tmp_path / "none") is None
    (tmp_path / "samples.json").write_text((tmp_path / "samples.json").read_text().replace("weights", "others"))
    with pytest.raises(ConfigError, match=r"samples.json is damaged .*; delete it, and run `delib-fast sample` again"):
        read_samples(tmp_path)


# --- think tags of templates --------------------------------------------------------------------------------


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
)


def test_the_opening_is_what_the_template_writes(tokenizer):
    form = encoder_for(tokenizer).thought
    assert (form.opening, form.closing) == ("<think>", "</think>")
    assert tokenizer.decode(form.opening_ids) == "<think>"


def test_a_template_may_open_the_block_itself(tokenizer):
    """Nothing is left to the model, and a reply begins inside its thought."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML.replace("%s", "<think>\n")
    form = encoder_for(own).thought
    assert (form.opening, form.closing, form.opening_ids) == ("", "</think>", ())


@pytest.mark.parametrize(
    ("tags", "text", "cot", "response", "state"),
    [
        (("[THINK]", "[/THINK]"), "[THINK]a[/THINK]b", "a", "b", "closed"),
        (("[THINK]", "[/THINK]"), "<think>a</think>b", None, "<think>a</think>b", "none"),
        (("<|channel|>analysis<|message|>", "<|end|>"), "<|channel|>analysis<|message|>a<|end|>b", "a", "b", "closed"),
    ],
)
def test_other_tags(tags, text, cot, response, state):
    reply = parse_reply(text, opened=None, tags=tags)
    assert (reply.cot, reply.response, reply.tags) == (cot, response, state)


def test_only_our_settings_apply(tokenizer):
    """transformers would merge a repetition penalty of the model's own into every call."""
    model = make_model(tokenizer, seed=3)
    prompt = encoder_for(tokenizer).encode_prompt([Message("user", "How are you?")])
    plain = generate_ids(model, [prompt], Sampling(max_new_tokens=8), end_ids=[0], pad_id=0)
    model.model.generation_config.repetition_penalty = 50.0
    assert generate_ids(model, [prompt], Sampling(max_new_tokens=8), end_ids=[0], pad_id=0) == plain
    assert model.model.generation_config.repetition_penalty == 50.0
