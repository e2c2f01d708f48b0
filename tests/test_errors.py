"""Whatever is wrong with what the user gave is said in one line, before a model is loaded."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import common

ROOT = Path(common.__file__).parent
PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " Go."}
GOOD = {"prompt": PAIR["prompt"], "completion": " Hello.", "label": True}
BAD = {**GOOD, "completion": " Go.", "label": False}
ALL = ["sft", "dpo", "slic", "ppo_offline", "kto"]
PAIRED, UNPAIRED = ["dpo", "slic"], ["ppo_offline", "kto"]


def row_case(row, *words):
    """Rows of which the second is wrong; the message names file and row, and has these words."""
    text = row if isinstance(row, str) else json.dumps(row)
    return {"rows": json.dumps(PAIR) + "\n" + text + "\n"}, ["rows.jsonl, row 2", *words]


def without(row: dict, field: str) -> dict:
    return {name: value for name, value in row.items() if name != field}


# (name, scripts, what to give, words that the line must have)
CASES = [
    ("missing file", ALL, {"data": "no/such.jsonl"}, ["no/such.jsonl"]),
    ("folder without rows", ALL, {"data": "empty"}, ["empty/train.jsonl"]),
    ("file without rows", ALL, {"rows": "\n\n"}, ["rows.jsonl", "no rows"]),
    ("not JSON", ["kto"], *row_case("{")),
    ("no object", ALL, *row_case([1, 2], "JSON object")),
    ("field missing", ALL, *row_case(without(PAIR, "prompt"), "prompt", "needs")),
    ("empty completion", ALL, *row_case({**PAIR, "chosen": ""}, "chosen is empty")),
    ("blank completion", ["kto"], *row_case({**BAD, "completion": " \n"}, "completion is empty")),
    ("text that is a number", ALL, *row_case({**PAIR, "rejected": 3}, "rejected must be text")),
    ("text that is a list", ["kto"], *row_case({**PAIR, "prompt": ["Hi"]}, "prompt must be text")),
    ("text that is none", ["sft"], *row_case({**PAIR, "target": None}, "target must be text")),
    (
        "half a character",
        ["dpo"],
        *row_case('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'),
    ),
    ("label 1", UNPAIRED, *row_case({**GOOD, "label": 1}, "label must be true or false")),
    ("label as text", UNPAIRED, *row_case({**GOOD, "label": "true"}, "label must be")),
    ("unpaired rows", PAIRED, *row_case(GOOD, "needs {prompt, chosen, rejected}")),
    ("supervised rows", UNPAIRED, *row_case(without(GOOD, "label"), "needs", "label")),
    ("only desirable", UNPAIRED, {"rows": json.dumps(GOOD)}, ["rows.jsonl", "True", "sft.py"]),
    ("only undesirable", [*UNPAIRED, "sft"], {"rows": json.dumps(BAD)}, ["rows.jsonl", "False"]),
    ("one prompt", ["kto"], {"kl": "mismatched"}, ["rows.jsonl", "two different prompts"]),
    ("unknown flag", ALL, {"betta": 1}, ["--betta"]),
    ("flag cut short", ["kto"], {"max_step": 1}, ["--max_step"]),
    ("no such choice", ["kto"], {"kl": "some"}, ["--kl", "other_half"]),
    ("not a number", ["sft"], {"lr": "fast"}, ["--lr", "fast"]),
    ("beta 0", ["kto", "dpo", "slic"], {"beta": 0}, ["--beta 0", "above 0"]),
    ("beta nan", ["kto"], {"beta": "nan"}, ["--beta nan"]),
    ("epsilon 2", ["ppo_offline"], {"epsilon": 2}, ["--epsilon 2", "at most 1"]),
    ("negative lr", ALL, {"lr": -1}, ["--lr -1"]),
    ("negative steps", ["sft"], {"max_steps": -1}, ["--max_steps -1"]),
    ("no batch", ALL, {"batch_size": 0}, ["--batch_size 0"]),
    ("odd batch", UNPAIRED, {"batch_size": 5}, ["--batch_size 5", "even"]),
    ("length 1", ALL, {"max_length": 1, "max_prompt_length": 1}, ["--max_prompt_length 1"]),
    ("prompt as long as all", ALL, {"max_prompt_length": 2048}, ["--max_prompt_length 2048"]),
    ("too few tokens at once", ALL, {"micro_batch_tokens": 9}, ["--micro_batch_tokens 9", "needs"]),
    ("folder in use", ALL, {"out": "used"}, ["--out used", "--resume"]),
    ("folder is a file", ["sft"], {"out": "file"}, ["--out file"]),
    ("no such model folder", ALL, {"model": "./none"}, ["--model ./none"]),
    ("hub id, offline", ALL, {"model": "someone/some-model"}, ["--model someone/some-model"]),
    ("short name, offline", ["kto"], {"model": "pythia-1.4b"}, ["--model pythia-1.4b"]),
    ("the default data, offline", ["kto"], {"data": "archangel"}, ["archangel"]),
    ("no safetensors", ALL, {"model": "pickled"}, ["pickled", ".safetensors"]),
    ("weights cut short", ["kto"], {"model": "torn"}, ["torn/model.safetensors"]),
    ("no end of sequence", ALL, {"model": "endless"}, ["endless", "end-of-sequence"]),
    ("no model at all", ["dpo"], {"model": None}, ["--model"]),
    ("not a language model", ["dpo"], {"model": "vision"}, ["vision", "vit"]),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to stand in, with what is wrong in it; no model may be loaded from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path.parent / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "run.json").write_text("{}")
    (tmp_path / "file").write_text("")
    model = common.TOY / "model"
    for name in ("pickled", "torn", "endless", "vision"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "vision" / "config.json").write_text('{"model_type": "vit"}')

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    return tmp_path


def flags(given: dict) -> list[str]:
    values = {"model": "toy", "data": "rows.jsonl", "out": "out"} | given
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.mark.parametrize(
    "script, given, words",
    [
        pytest.param(script, given, words, id=f"{name}-{script}")
        for name, scripts, given, words in CASES
        for script in scripts
    ],
)
def test_wrong_things_are_named_in_one_line(script, given, words, place, monkeypatch, capsys):
    given = dict(given)
    Path("rows.jsonl").write_text(given.pop("rows", json.dumps(PAIR)))
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags(given)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(place.rglob("*")) == before


def test_under_torchrun_each_worker_ends_with_the_line(place):
    Path("rows.jsonl").write_text(json.dumps(GOOD))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--log-dir=logs", "--redirects=3", str(ROOT / "kto.py"), *flags({})]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), timeout=120
    )
    assert done.returncode != 0
    said = [file.read_text().strip() for file in Path("logs").rglob("stderr.log")]
    ends = [text.splitlines()[-1] for text in said if text]  # the second may be ended before it
    assert any(end.startswith("error: --data rows.jsonl: every label is True") for end in ends), (
        ends
    )
    assert not Path("out").exists()
