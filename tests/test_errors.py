"""What is wrong with what the user gave is said in one line, before a model is loaded."""

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import golden_cases
import pytest
import transformers
from helpers import change_json, command_here, copy_toy_model, error_line, fork, to_flags
from transformers.models.llama4 import Llama4TextConfig

import kto
from archangel import run

PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " Go."}
DESIRABLE = {"prompt": PAIR["prompt"], "completion": " Hello.", "label": True}
UNDESIRABLE = {"prompt": PAIR["prompt"], "completion": " Go.", "label": False}
SCRIPTS = ["kto", "sft"]
if os.environ.get("HALOS_LONG"):
    SCRIPTS = golden_cases.SCRIPTS


def without(record: dict, column: str) -> dict:
    return {name: value for name, value in record.items() if name != column}


def record_case(record, *words) -> tuple[dict, list[str]]:
    """A file whose second record is wrong. The line names it, and has these words."""
    text = record if isinstance(record, str) else json.dumps(record)
    given = {"records": json.dumps(PAIR) + "\n" + text + "\n"}
    return given, ["records.jsonl, line 2", *words]


# (name, scripts, what is given, words that the line must have)
CASES = [
    ("missing file", SCRIPTS, {"data": "no/such.jsonl"}, ["no/such.jsonl"]),
    ("folder without records", SCRIPTS, {"data": "empty"}, ["--data empty", "no data files"]),
    ("file without records", SCRIPTS, {"records": "\n\n"}, ["records.jsonl", "no records"]),
    ("not JSON", ["kto"], *record_case("{")),
    ("no object", SCRIPTS, *record_case([1, 2], "JSON object")),
    ("column missing", SCRIPTS, *record_case(without(PAIR, "prompt"), "prompt", "needs")),
    ("number as text", SCRIPTS, *record_case({**PAIR, "rejected": 3}, "rejected must be text")),
    ("list as text", ["kto"], *record_case({**PAIR, "prompt": ["Hi"]}, "prompt must be text")),
    ("null as text", ["sft"], *record_case({**PAIR, "prompt": None}, "needs", "prompt")),
    ("null as label", ["kto"], *record_case({**DESIRABLE, "label": None}, "label is null")),
    ("label 2", ["kto", "ppo_offline"], *record_case({**DESIRABLE, "label": 2}, "true or false")),
    ("label as text", ["kto"], *record_case({**DESIRABLE, "label": "fine"}, "true or false")),
    ("system prompt", ["dpo"], *record_case({**PAIR, "system": "Hi"}, "system", "the prompt")),
    ("unpaired records", ["dpo", "slic"], *record_case(DESIRABLE, "{prompt, chosen, rejected}")),
    ("supervised records", ["kto"], *record_case(without(DESIRABLE, "label"), "needs", "label")),
    ("only desirable", ["kto"], {"records": json.dumps(DESIRABLE)}, ["True", "sft.py"]),
    ("only undesirable", ["kto"], {"records": json.dumps(UNDESIRABLE)}, ["False"]),
    (
        "nothing to imitate",
        ["sft"],
        {"records": json.dumps(UNDESIRABLE)},
        ["records.jsonl", "no record is left"],
    ),
    (
        "only empty completions",
        SCRIPTS,
        {"records": json.dumps({**PAIR, "chosen": " \n"})},
        ["records.jsonl", "no record can be used", "an empty completion (1 record"],
    ),
    ("one prompt", ["kto"], {"kl": "mismatched"}, ["records.jsonl", "two different prompts"]),
    ("unknown flag", SCRIPTS, {"betta": 1}, ["--betta"]),
    ("flag cut short", ["kto"], {"max_step": 1}, ["--max_step"]),
    ("no such choice", ["kto"], {"kl": "some"}, ["--kl", "other_half"]),
    ("not a number", SCRIPTS, {"lr": "fast"}, ["--lr", "fast"]),
    ("beta 0", ["dpo", "kto", "slic"], {"beta": 0}, ["--beta 0", "above 0"]),
    ("beta nan", ["kto"], {"beta": "nan"}, ["--beta nan"]),
    ("weight 0", ["kto"], {"desirable_weight": 0}, ["--desirable_weight 0", "above 0"]),
    ("epsilon 2", ["ppo_offline"], {"epsilon": 2}, ["--epsilon 2", "at most 1"]),
    ("negative lr", SCRIPTS, {"lr": -1}, ["--lr -1"]),
    ("negative steps", SCRIPTS, {"max_steps": -1}, ["--max_steps -1"]),
    ("no batch", SCRIPTS, {"batch_size": 0}, ["--batch_size 0"]),
    ("odd batch", ["kto", "ppo_offline"], {"batch_size": 5}, ["--batch_size 5", "even"]),
    ("length 1", SCRIPTS, {"max_length": 1, "max_prompt_length": 1}, ["--max_prompt_length 1"]),
    ("long prompt", SCRIPTS, {"max_prompt_length": 2048}, ["--max_prompt_length 2048"]),
    ("few tokens", SCRIPTS, {"micro_batch_tokens": 9}, ["--micro_batch_tokens 9", "needs"]),
    ("few positions", SCRIPTS, {"model": "short"}, ["--max_length", "the model takes 4"]),
    ("folder in use", SCRIPTS, {"out": "used"}, ["--out used", "--resume"]),
    ("folder is a file", SCRIPTS, {"out": "file"}, ["--out file"]),
    ("no such model folder", SCRIPTS, {"model": "./none"}, ["--model ./none"]),
    ("hub id, offline", SCRIPTS, {"model": "someone/some-model"}, ["--model someone/some-model"]),
    ("short name, offline", ["kto"], {"model": "pythia-1.4b"}, ["--model pythia-1.4b"]),
    ("default data, offline", ["kto"], {"data": "archangel"}, ["archangel"]),
    ("no safetensors", SCRIPTS, {"model": "pickled"}, ["pickled", ".safetensors"]),
    ("weights cut short", SCRIPTS, {"model": "torn"}, ["torn/model.safetensors"]),
    ("adapter", SCRIPTS, {"model": "adapted"}, ["adapted/adapter_model.safetensors", "adapter"]),
    ("bitsandbytes", SCRIPTS, {"model": "bitsandbytes"}, ["quantized (bitsandbytes)"]),
    ("gptq", SCRIPTS, {"model": "gptq"}, ["quantized (gptq)"]),
    ("no end of sequence", SCRIPTS, {"model": "endless"}, ["endless", "end-of-sequence"]),
    ("no model at all", SCRIPTS, {"model": None}, ["--model"]),
    ("not a language model", SCRIPTS, {"model": "vision"}, ["vision", "vit"]),
]
CASE_LIST = []
for name, scripts, given, words in CASES:
    for script in scripts:
        CASE_LIST.append(pytest.param(script, given, words, id=f"{name}-{script}"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with what is wrong in it. No model may be loaded from there."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("used").mkdir()
    Path("used/run.json").write_text("{}")
    Path("file").write_text("")

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    return tmp_path


def make_model(name: str) -> None:
    """Make the folder of a model with which something is wrong."""
    folder = Path(name)
    copy_toy_model(folder)
    weights = folder / "model.safetensors"
    if name == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    if name == "torn":
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
    if name == "adapted":
        shutil.copy(weights, folder / "adapter_model.safetensors")
    if name == "bitsandbytes":
        quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        change_json(folder / "config.json", quantization_config=quantization)
    if name == "gptq":
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        change_json(folder / "config.json", quantization_config=quantization)
    if name == "endless":
        change_json(folder / "tokenizer_config.json", eos_token=None)
    if name == "vision":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    if name == "short":
        change_json(folder / "config.json", max_position_embeddings=4)
    if name == "llama4":
        config = Llama4TextConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            intermediate_size_mlp=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            architectures=["Llama4ForCausalLM"],
        )
        config.save_pretrained(folder)


MODELS = ["pickled", "torn", "adapted", "bitsandbytes", "gptq", "endless", "vision", "short"]


def write_given(given: dict) -> dict:
    """Write the files that a case needs. Returns the settings that it is called with."""
    settings = {"model": "toy", "data": "records.jsonl", **given}
    records = settings.pop("records", json.dumps(PAIR))
    Path("records.jsonl").write_text(records)
    if settings["model"] in MODELS:
        make_model(settings["model"])
    return {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize("script, given, words", CASE_LIST)
def test_one_line(script, given, words, place, capsys):
    settings = write_given(given)
    before = sorted(place.rglob("*"))
    assert command_here(script, settings.pop("out", "out"), **settings) == 2
    *notes, line = capsys.readouterr().err.strip().splitlines()
    assert all(note.startswith("data: left out: ") for note in notes), notes
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_base_model_is_the_model_itself(script, place, capsys):
    """Llama 4's text model is refused before its weights are read. The data was summarized then."""
    make_model("llama4")
    settings = write_given({"model": "llama4"})
    assert command_here(script, "out", **settings) == 2
    line = error_line(capsys.readouterr().err)
    assert "--model llama4" in line
    assert "llama4_text" in line
    assert "base_model" in line
    assert not Path("out").exists()


def test_several_processes(place):
    """Each of them ends with the line."""
    settings = write_given({"records": json.dumps(DESIRABLE)})
    for process in fork("kto", [["--out", "out", *to_flags(settings)]] * 2):
        assert process.wait() == 2
        (line,) = process.stderr.splitlines()
        assert line.startswith("error: --data records.jsonl: every label is True")
    assert not Path("out").exists()


@dataclass
class PlainConfig:
    """Settings, some without the comment that --help prints."""

    model: str
    beta: float = 0.5
    epochs: int = 1  # passes over the data
    resume: bool = False


@pytest.mark.parametrize("script", golden_cases.SCRIPTS)
def test_every_setting_is_explained(script, monkeypatch):
    """In --help, which a comment that is not on the line of its setting would not reach."""
    helps = {}
    add_argument = argparse.ArgumentParser.add_argument

    def watch(parser, *flags, **options):
        helps[flags[-1]] = options["help"]
        return add_argument(parser, *flags, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", watch)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "toy"])
    config_class = importlib.import_module(script).Config
    run.parse_args(config_class, "")
    for field in dataclasses.fields(config_class):
        explanation, _, _ = helps[f"--{field.name}"].partition("(default:")
        assert explanation.strip(), field.name


def test_settings_without_a_comment(monkeypatch, capsys):
    command = ["script.py", "--model", "toy", "--beta", "2", "--resume"]
    monkeypatch.setattr(sys, "argv", command)
    assert run.parse_args(PlainConfig, "") == PlainConfig("toy", 2.0, 1, True)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        run.parse_args(PlainConfig, "")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "(default: 0.5)" in printed
    assert "passes over the data (default: 1)" in printed


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ([], "archangel"),
        (["--data", "a.jsonl"], "a.jsonl"),
        (["--data", "a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["--data", "a.jsonl", "--lr", "1", "--data", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_several_data_files(words, data, monkeypatch):
    """Behind one flag, as a shell writes a glob, or behind several."""
    monkeypatch.setattr(sys, "argv", ["kto.py", "--model", "toy", *words])
    config = run.parse_args(kto.Config, "")
    assert config.data == data
    assert run.data_name(config) == " ".join([data] if isinstance(data, str) else data)
