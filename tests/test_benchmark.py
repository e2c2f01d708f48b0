"""The benchmark: its counts by hand, its rows, and a run of ours alone that says every figure."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from archangel import benchmark, command
from archangel.benchmark import Config, count, forward_flops, make_rows, useful_work
from archangel.rows import longest_sequence
from archangel.run import load_tokenizer

SHAPE = (2, 8, 2, 32, 100)  # layers, width, heads, feed-forward width, vocabulary


def row(prompt: int, *completions: int) -> dict:
    """A row of so many tokens."""
    return {"prompt_ids": np.ones(prompt), "completions_ids": [np.ones(n) for n in completions]}


def test_operations_by_hand():
    """A prompt of two tokens and completions of three and one, token by token."""
    weights = 2 * (4 * 8 * 8 + 2 * 8 * 32)  # two layers: four square projections, two wide ones
    seen = [1, 2, 3, 4, 5, 3]  # keys of each token: the prompt's, the first's, the second's
    body = sum(2 * weights + 4 * 2 * 8 * keys for keys in seen)
    head = 4 * 2 * 8 * 100  # four completion tokens
    assert forward_flops(SHAPE, 0, 2) == sum(2 * weights + 64 * keys for keys in seen[:2])
    work = useful_work([row(2, 3, 1)], SHAPE, "dpo")
    assert work["step_flops"] == 3 * (body + head)
    assert work["reference_flops"] == body + head
    assert (work["tokens"], work["completion_tokens"]) == (6, 4)
    assert useful_work([row(2, 3, 1)], SHAPE, "slic")["reference_flops"] == 0


def test_a_partner_is_run_forward_only():
    """KTO computes a second completion after each prompt, without its gradient."""
    alone = useful_work([row(5, 3)], SHAPE, "sft")
    with_partner = useful_work([row(5, 3)], SHAPE, "kto")
    reply = forward_flops(SHAPE, 5, 3) + 3 * 2 * 8 * 100
    assert with_partner["step_flops"] == alone["step_flops"] + reply
    assert with_partner["reference_flops"] == alone["step_flops"] / 3 + reply
    assert (alone["tokens"], with_partner["tokens"]) == (8, 11)


def test_operations_and_weights_of_the_real_model(tmp_path):
    """The formula against torch's own counter, but for attention, and against the weights."""
    config = Config(model="tiny")
    benchmark.write_model(config, tmp_path)
    model = benchmark.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    shape = benchmark.SHAPES["tiny"]
    assert sum(p.numel() for p in model.parameters()) == benchmark.parameters(shape)
    with benchmark.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 10, dtype=torch.long))
    without_attention = forward_flops(shape, 0, 10) - 4 * 2 * 32 * 55  # 55 pairs of 10 tokens
    expected = without_attention + 10 * 2 * 32 * 512
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # rotary positions


def test_padding_and_sharing_are_counted():
    """Two pairs, twice: what a step computes in rows of their own, and padded to the longest."""
    config = Config(model="tiny", steps=2, batch_size=2)
    counts = count(config, [row(10, 4, 6), row(2, 1, 1)] * 2)
    assert counts["useful_tokens"] == 10 + 4 + 6 + 2 + 1 + 1
    assert counts["prompt_with_each_completion_tokens"] == 14 + 16 + 3 + 3
    assert counts["padded_rows_tokens"] == 4 * 16


def test_useful_share():
    """Useful tokens over the places that were computed."""
    rows = [row(10, 4, 6), row(2, 1, 1)]
    config = Config(model="tiny", steps=2, batch_size=2)
    record = {"seconds": 2.0, "cpu_seconds": 2.0, "tokens": 40, "max_memory_mib": 1.0, "flops": 1}
    figures = benchmark.summarise(rows, [record] * (2 + benchmark.WARMUP), config, rate=1e9)
    assert figures["useful_share"] == 24 / 40
    assert figures["completion_tokens_per_second"] == 12 / (2 + 2)  # a step, and its reference
    work = useful_work(rows, benchmark.SHAPES["tiny"], "dpo")
    assert figures["mfu"] == (work["step_flops"] + work["reference_flops"]) / 4 / 1e9


def test_rows_are_reproducible_and_of_the_stated_lengths():
    """The same seed gives the same rows; the means are about 160 and 64, nothing exceeds 512."""
    config = Config(model="small-4k", steps=250)
    rows, again = make_rows(config), make_rows(config)
    assert all((a["prompt_ids"] == b["prompt_ids"]).all() for a, b in zip(rows, again))
    other = make_rows(Config(model="small-4k", steps=250, seed=2))
    assert any(len(a["prompt_ids"]) != len(b["prompt_ids"]) for a, b in zip(rows, other))
    assert np.mean([len(r["prompt_ids"]) for r in rows]) == pytest.approx(160, rel=0.1)
    replies = [len(ids) for r in rows for ids in r["completions_ids"]]
    assert np.mean(replies) == pytest.approx(64, rel=0.1)
    assert max(map(longest_sequence, rows)) <= 512
    together = benchmark.like_lengths_together(rows, config)
    assert sorted(map(id, together)) == sorted(map(id, rows))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_text_turns_into_the_same_tokens(method, tmp_path):
    """What the trainers read from the file are the rows' own tokens, end marks included."""
    script = __import__(method)
    config = Config(model="tiny", method=method, steps=2)
    rows = make_rows(config)
    benchmark.write_model(config, tmp_path)
    benchmark.write_rows(rows, method, tmp_path / "rows.jsonl")
    records, _ = common.load_records(str(tmp_path / "rows.jsonl"), script.FORMATS)
    settings = script.Config(model="toy", max_length=512, max_prompt_length=384)
    examples = script.make_examples(records, load_tokenizer(tmp_path), settings)
    assert len(examples) == len(rows)
    for example, expected in zip(examples, rows):
        assert example.prompt_ids.tolist() == expected["prompt_ids"].tolist()
        assert len(example.completions_ids) == len(expected["completions_ids"])
        for ids, expected_ids in zip(example.completions_ids, expected["completions_ids"]):
            assert ids.tolist() == expected_ids.tolist()


def test_every_figure_is_reported(tmp_path):
    """KTO beside this checkout as its own peer: the same tokens, reference and losses for both.

    Every figure is in the table and in the JSON.
    """
    command = [sys.executable, "-m", "archangel.benchmark", "--model", "tiny", "--method", "kto"]
    command += ["--steps", "2", "--batch_size", "2", "--max_length", "64"]
    command += ["--peer", str(Path(common.__file__).parent), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tiny_kto.json").read_text())
    (differ,) = report["differ_from_first"].values()
    assert differ == {"first_losses": [0.0, 0.0, 0.0], "completion_logps": 0.0}
    figures = report["figures"]["ours"]
    assert figures["steps"] == len(figures["seconds"]) == 2
    for key in (
        "seconds_per_step",
        "reference_seconds_per_step",
        "seconds_per_step_with_reference",
        "cpu_seconds_per_step_with_reference",
        "completion_tokens_per_second",
        "max_memory_mib",
        "mfu",
        "first_step_gflop",
    ):
        assert figures[key] > 0 and key in done.stdout
    assert 0 < figures["useful_share"] <= 1
    assert figures["first_step_gflop"] > figures["first_step_useful_gflop"]
    assert figures["log_ratio_max"] < 1e-4  # nats per token: reference and policy are the same
    assert report["matmul_rate"] > 0 and len(report["load"]) == 2


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_the_peer_computes_the_same_loss(method, tmp_path):
    """TRL's three rows, two rows at once: the first step's loss, and every reference log-prob."""
    pytest.importorskip("trl")
    command = [sys.executable, "-m", "archangel.benchmark", "--model", "tiny", "--method", method]
    command += ["--peer", "trl", "--steps", "2", "--batch_size", "4", "--peer_rows_at_once", "2"]
    command += ["--max_length", "64", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / f"tiny_{method}.json").read_text())
    assert len(report["differ_from_first"]) == 3 and "trl" in report["versions"]
    for name, differ in report["differ_from_first"].items():
        assert differ["first_losses"][0] < 1e-5
        assert (method == "sft" or name == "trl, as it comes") or differ["completion_logps"] < 1e-3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "no-such-shape"],
        ["--model", "tiny", "--steps", "1"],
        ["--model", "tiny", "--seed", "-1"],
        ["--model", "tiny", "--out", ""],
        ["--model", "tiny", "--micro_batch_tokens", "100"],
        ["--model", "tiny", "--peer_rows_at_once", "-2"],
        ["--model", "tiny", "--method", "kto", "--peer_rows_at_once", "1"],
        ["--model", "tiny", "--method", "sft", "--ladder"],
        ["--model", "tiny", "--peer", "no/such/checkout"],
        ["--model", "tiny", "--method", "kto", "--batch_size", "3"],
        ["--model", "tiny", "--method", "ppo_offline", "--peer", "trl"],
    ],
)
def test_what_is_wrong_is_one_line(arguments, monkeypatch, capsys):
    """Status 2 and one line that names the setting, before anything is made."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended, command.exit_status():
        command.parse(Config, benchmark.__doc__)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "--" in error
