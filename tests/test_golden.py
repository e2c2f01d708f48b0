"""The numbers of commit 068ab23, kept in tests/data/golden: the same indices, tokens and losses.

The runs stand in tests/golden_cases.py.
"""

import importlib
import json
import os

import golden_cases
import pytest
import torch
from helpers import metric, read_metrics, run_forked, train_here
from transformers import AutoTokenizer

import dpo
from archangel import tokenized

LONG = bool(os.environ.get("HALOS_LONG"))
GOLDEN = json.loads((golden_cases.FOLDER / "runs.json").read_text())
CASES = golden_cases.CASES
DOUBLE = {name: case for name, case in CASES.items() if case["settings"]["dtype"] == "float64"}


def make_schedule(script: str, data: str, settings: dict) -> list[list[int]]:
    module = importlib.import_module(script)
    config = module.Config(data=data, **settings)
    tokenizer = AutoTokenizer.from_pretrained(golden_cases.ROOT / "archangel/toy_world/model")
    records, _ = tokenized.load_tokens(data, module.FORMATS, tokenizer)
    return module.make_schedule(module.make_examples(records, config), config)


def run_case(case: dict, folder, **changes) -> list[dict]:
    data = golden_cases.write_data(case["data"], folder)
    settings = {"data": data, **case["settings"], **changes}
    if case["processes"] > 1:
        run_forked(case["script"], folder / "run", processes=case["processes"], **settings)
        return read_metrics(folder / "run")
    return train_here(case["script"], folder / "run", **settings)


@pytest.mark.parametrize("name", CASES)
def test_schedule_is_the_golden_one(name, tmp_path):
    case = CASES[name]
    data = golden_cases.write_data(case["data"], tmp_path)
    assert make_schedule(case["script"], data, case["settings"]) == GOLDEN[name]["indices"]


# The short form leaves out the toy's records where the same script has them in small micro-batches.
SHORT = [name for name in DOUBLE if name not in ("sft toy", "slic toy", "ppo_offline toy")]


@pytest.mark.parametrize("name", DOUBLE if LONG else SHORT)
def test_float64_losses_are_the_golden_ones(name, tmp_path, monkeypatch):
    """To 1e-12 over the first 8 steps, to 1e-10 over 60: RMSprop amplifies rounding.

    The short form has at most 9 steps, and held-out records in one case only.
    """
    changes = {}
    whole = LONG or name == "kto toy, small micro-batches"
    if not whole:
        monkeypatch.setattr(tokenized, "MAX_TEST_RECORDS", 0)
        if DOUBLE[name]["settings"].get("max_steps", 0) > 9:
            changes = {"max_steps": 9}
    records = run_case(DOUBLE[name], tmp_path, **changes)
    for metric_name, golden in GOLDEN[name]["metrics"].items():
        if metric_name.startswith("eval_") and not whole:
            continue
        ours = metric(records, metric_name)
        golden = torch.tensor(golden, dtype=torch.float64)
        assert len(ours) >= min(9, len(golden))
        golden = golden[: len(ours)]
        assert ours.shape == golden.shape
        # Margins and the reference point pass through 0.
        scale = golden.abs().clamp(min=1.0) if "loss" not in metric_name else golden.abs()
        errors = (ours - golden).abs() / scale
        assert errors[:9].max() < 1e-12, metric_name
        assert errors.max() < 1e-10, metric_name


@pytest.mark.parametrize("script", golden_cases.SCRIPTS if LONG else ["kto"])
def test_float32_losses_stay_near_the_golden_ones(script, tmp_path, monkeypatch):
    """As near as commit 068ab23 with one limit of micro-batch tokens is to itself with another.

    The short form has 20 of the 60 steps, of one script.
    """
    monkeypatch.setattr(tokenized, "MAX_TEST_RECORDS", 0)
    num_steps = 60 if LONG else 20
    name = f"{script} toy, float32"
    ours = metric(run_case(CASES[f"{name}, 8192"], tmp_path, max_steps=num_steps), "loss")
    golden = []
    for limit in (8192, 1200):
        losses = GOLDEN[f"{name}, {limit}"]["metrics"]["loss"][:num_steps]
        golden.append(torch.tensor(losses, dtype=torch.float64))
    errors = (ours - golden[0]).abs() / golden[0]
    own_errors = (golden[1] - golden[0]).abs() / golden[0]
    assert errors[:20].max() < 1e-5
    assert errors.max() <= max(3 * own_errors.max(), 1e-5)


def test_token_ids_are_the_golden_ones():
    golden = json.loads((golden_cases.FOLDER / "token_ids.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(golden_cases.ROOT / "archangel/toy_world/model")
    hh = [json.loads(line) for line in (golden_cases.FOLDER / "hh.jsonl").open()]
    for name, records in {"toy": golden_cases.toy_records(50), "hh": hh}.items():
        token_ids = tokenized.tokenize(records, tokenizer)
        examples = dpo.make_examples(token_ids, dpo.Config(model="toy"))
        found = []
        for example in examples:
            ids = [example.prompt_ids, *example.completions_ids]
            found.append([each.tolist() for each in ids])
        assert found == golden[name]


def test_reference_point_of_the_phrase_data_is_positive():
    """Otherwise the comparison of the --kl modes would compare zeros."""
    for kl in ("other_half", "mismatched"):
        assert max(GOLDEN[f"kto phrase, {kl}, 8192"]["metrics"]["kl"]) > 1
