"""The benchmark: its counts by hand, its data, its peers, and a run that reports every metric."""

import importlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXForCausalLM

import common
from archangel import benchmark, benchmark_ours, benchmark_trl, benchmark_turns, workload
from archangel.benchmark import Config, count_work, summarize
from archangel.benchmark_ours import Stage
from archangel.benchmark_turns import WARMUP_STEPS, Contender
from archangel.errors import UserError, exit_status
from archangel.run import load_tokenizer, parse_args
from archangel.tokenized import load_tokens
from archangel.workload import SHAPES, Shape, forward_flops, make_examples, useful_work

METHODS = ["sft", "dpo", "kto", "slic", "ppo_offline"]
SHAPE = Shape(layers=2, width=8, heads=2, feed_forward=32, vocabulary=100)
ROOT = Path(common.__file__).parent


def make_example(prompt_length: int, *completion_lengths: int) -> dict:
    """An example with these numbers of tokens."""
    completions_ids = [np.ones(length, dtype=int) for length in completion_lengths]
    return {"prompt_ids": np.ones(prompt_length, dtype=int), "completions_ids": completions_ids}


def run_benchmark(folder: Path, method: str, *arguments: str) -> tuple[dict, str]:
    """The report of a short run of the program, and what it prints."""
    command = [sys.executable, "-m", "archangel.benchmark", "--model", "tiny", "--method", method]
    command += ["--steps", "2", "--max_length", "64", "--out", str(folder), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
    report = json.loads((folder / f"tiny_{method}.json").read_text())
    return report, completed.stdout


# ------------------------------------------------------------------------------------ the counts


def test_useful_work_dpo():
    """A prompt of two tokens, with completions of three tokens and one, token by token."""
    weights = 2 * (4 * 8 * 8 + 2 * 8 * 32)  # two layers: four square matrices, two wide ones
    # How many tokens each one attends to: those of the prompt, then of each completion.
    prompt_flops = sum(2 * weights + 4 * 2 * 8 * attended for attended in [1, 2])
    completion_flops = sum(2 * weights + 4 * 2 * 8 * attended for attended in [3, 4, 5, 3])
    head_flops = 4 * 2 * 8 * 100  # four completion tokens
    assert forward_flops(SHAPE, 0, 2) == prompt_flops
    work = useful_work([make_example(2, 3, 1)], SHAPE, "dpo")
    assert work["step_flops"] == 3 * (prompt_flops + completion_flops + head_flops)
    assert work["reference_flops"] == prompt_flops + completion_flops + head_flops
    assert work["tokens"] == 6
    assert work["completion_tokens"] == 4


@pytest.mark.parametrize("method", ["sft", "slic"])
def test_useful_work_without_reference(method):
    assert useful_work([make_example(2, 3)], SHAPE, method)["reference_flops"] == 0


def test_useful_work_kto():
    """KTO computes a second completion after each prompt, without its gradient."""
    alone = useful_work([make_example(5, 3)], SHAPE, "sft")
    with_mismatched = useful_work([make_example(5, 3)], SHAPE, "kto")
    mismatched_flops = forward_flops(SHAPE, 5, 3) + 3 * 2 * 8 * 100
    assert with_mismatched["step_flops"] == alone["step_flops"] + mismatched_flops
    assert with_mismatched["reference_flops"] == alone["step_flops"] / 3 + mismatched_flops
    assert (
        useful_work([make_example(5, 3)], SHAPE, "kto", "zero")["step_flops"]
        == (alone["step_flops"])
    )
    assert alone["tokens"] == 5 + 3
    assert with_mismatched["tokens"] == 5 + 3 + 3


def test_forward_flops_and_parameters(tmp_path):
    """Operations against torch's own counter, and parameters, of the model that is written.

    On a CPU torch's counter leaves out attention.
    """
    shape = SHAPES["tiny"]
    workload.write_model(shape, 1, tmp_path)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert workload.num_parameters(shape) == num_parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 10, dtype=torch.long))
    num_attended = 10 * 11 // 2
    attention_flops = 4 * shape.layers * shape.width * num_attended
    head_flops = 10 * 2 * shape.width * shape.vocabulary
    expected = forward_flops(shape, 0, 10) - attention_flops + head_flops
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # rotary positions


def test_count_work():
    """Two steps of the same two pairs: tokens as useful, in separate sequences, and padded."""
    config = Config(model="tiny", steps=2, batch_size=2)
    pairs = [make_example(10, 4, 6), make_example(2, 1, 1)]
    counts = count_work([*pairs, *pairs], config)
    assert counts["useful_tokens"] == 10 + 4 + 6 + 2 + 1 + 1
    assert counts["completion_tokens"] == 4 + 6 + 1 + 1
    assert counts["prompt_with_each_completion_tokens"] == 14 + 16 + 3 + 3
    assert counts["padded_rows_tokens"] == 4 * 16
    assert counts["of_it_output_head_gflop"] == 3 * 12 * 2 * 32 * 512 / 1e9


@pytest.mark.parametrize("method", METHODS)
def test_count_work_output_head(method):
    """A step without the output head takes what it takes in a model without vocabulary."""
    config = Config(model="tiny", method=method, steps=2, batch_size=2)
    examples = make_examples(SHAPES["tiny"], method, 4, 512, seed=1)
    counts = count_work(examples, config)
    headless = Shape(layers=2, width=32, heads=2, feed_forward=64, vocabulary=0)
    body_flops = useful_work(examples, headless, method)["step_flops"] / config.steps
    expected = counts["step_gflop"] - body_flops / 1e9
    assert counts["of_it_output_head_gflop"] == pytest.approx(expected)


def test_summarize():
    """Useful tokens over the tokens that were computed, and useful operations over the time."""
    examples = [make_example(10, 4, 6), make_example(2, 1, 1)]
    config = Config(model="tiny", steps=2, batch_size=2)
    turn = {"seconds": 2.0, "cpu_seconds": 2.0, "tokens": 40, "max_memory_mib": 1.0, "flops": 1}
    num_turns = 1 + WARMUP_STEPS + 1  # the reference pass, and one measured step
    metrics = summarize(examples, [turn] * num_turns, config, matmul_rate=1e9)
    assert metrics["steps"] == 1
    assert metrics["useful_share"] == 24 / 40
    assert metrics["completion_tokens_per_second"] == 12 / (2 + 2)  # a step, and its reference
    work = useful_work(examples, SHAPES["tiny"], "dpo")
    flops = work["step_flops"] + work["reference_flops"]
    assert metrics["mfu"] == pytest.approx(flops / 1e9 / (2 + 2))


# -------------------------------------------------------------------------------------- the data


def test_examples_depend_on_seed():
    shape = SHAPES["small-4k"]
    examples = make_examples(shape, "dpo", 100, 512, seed=1)
    again = make_examples(shape, "dpo", 100, 512, seed=1)
    other = make_examples(shape, "dpo", 100, 512, seed=2)
    for example, same in zip(examples, again):
        assert np.array_equal(example["prompt_ids"], same["prompt_ids"])
        for ids, same_ids in zip(example["completions_ids"], same["completions_ids"]):
            assert np.array_equal(ids, same_ids)
    lengths = [len(example["prompt_ids"]) for example in examples]
    assert lengths != [len(example["prompt_ids"]) for example in other]


def test_examples_stream():
    """The random stream stays the same, so that results of earlier commits stay comparable."""
    first, second, _ = make_examples(SHAPES["tiny"], "dpo", 3, 512, seed=1)
    assert first["prompt_ids"][:4].tolist() == [386, 486, 18, 74]
    assert [len(first["prompt_ids"]), len(second["prompt_ids"])] == [160, 72]
    assert [len(ids) for ids in second["completions_ids"]] == [68, 18]


def test_examples_lengths():
    """On average 160 and 64 tokens, as documented, and none too long."""
    examples = make_examples(SHAPES["small-4k"], "dpo", 2000, 512, seed=1)
    prompt_lengths = []
    completion_lengths = []
    for example in examples:
        prompt_lengths.append(len(example["prompt_ids"]))
        for completion_ids in example["completions_ids"]:
            completion_lengths.append(len(completion_ids))
            assert len(example["prompt_ids"]) + len(completion_ids) <= 512
    assert np.mean(prompt_lengths) == pytest.approx(160, rel=0.1)
    assert np.mean(completion_lengths) == pytest.approx(64, rel=0.1)
    assert max(prompt_lengths) <= 384


def test_sort_into_batches():
    """The same examples, and together less padding than in their random order."""
    config = Config(model="small-4k", steps=20)
    examples = make_examples(SHAPES["small-4k"], "dpo", 160, 512, seed=1)
    batched = workload.sort_into_batches(examples, 8, seed=1)
    assert sorted(map(id, batched)) == sorted(map(id, examples))
    longest = [workload.longest_sequence(example) for example in batched]
    assert longest != sorted(longest)
    num_padded = count_work(batched, config)["padded_rows_tokens"]
    assert num_padded < 0.7 * count_work(examples, config)["padded_rows_tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_records_give_same_tokens(method, tmp_path):
    """What a trainer reads from the file are the tokens and labels of the examples."""
    script = importlib.import_module(method)
    expected = make_examples(SHAPES["tiny"], method, 16, 512, seed=1)
    workload.write_model(SHAPES["tiny"], 1, tmp_path)
    workload.write_records(expected, method, tmp_path / "records.jsonl")
    tokenizer = load_tokenizer(tmp_path)
    records, _ = load_tokens(str(tmp_path / "records.jsonl"), script.FORMATS, tokenizer)
    config = script.Config(model="toy", max_length=512, max_prompt_length=384)
    examples = script.make_examples(records, config)
    assert len(examples) == len(expected)
    for index, expected_example in enumerate(expected):
        example = examples[index]
        assert example.prompt_ids.tolist() == expected_example["prompt_ids"].tolist()
        assert len(example.completions_ids) == len(expected_example["completions_ids"])
        for ids, expected_ids in zip(example.completions_ids, expected_example["completions_ids"]):
            assert ids.tolist() == expected_ids.tolist()
        if method in ("kto", "ppo_offline"):
            assert examples.desirable[index] == expected_example["label"]


# --------------------------------------------------------------------------------- the contenders


class Connection:
    """A contender's end of a pipe, whose other end asks for a number of turns."""

    def __init__(self, num_turns: int):
        self.orders = ["go"] * num_turns
        self.orders[1] = "count"
        self.orders.append("leave")
        self.replies = []

    def recv(self) -> str:
        return self.orders.pop(0)

    def send(self, reply: dict) -> None:
        self.replies.append(reply)


def take_turns_here(contender: Contender, config: Config, folder: Path) -> list[dict]:
    """Run one of our contenders in this process. Returns the metrics of its turns."""
    shape = SHAPES[config.model]
    num_examples = config.steps * config.batch_size
    examples = make_examples(shape, config.method, num_examples, config.max_length, config.seed)
    workload.write_model(shape, config.seed, folder / "model")
    records_path = folder / "records.jsonl"
    workload.write_records(examples, config.method, records_path)
    connection = Connection(1 + WARMUP_STEPS + config.steps)
    script = importlib.import_module(config.method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "save_on_signals", lambda run: None)
        # What the contender itself replaces is restored at the end.
        patch.setattr(common.Run, "log", common.Run.log)
        patch.setattr(script, "make_schedule", script.make_schedule)
        for name in (
            "check_model_and_choose_layout",
            "add_reference_logps",
            "MAX_LOGITS",
            "TokenLogps",
        ):
            patch.setattr(common, name, getattr(common, name))
        with pytest.raises(SystemExit):
            contender.run(
                connection, config, folder, records_path, contender.name, contender.options
            )
    assert connection.orders == []
    assert not dist.is_initialized()
    return connection.replies


@pytest.mark.parametrize("method", METHODS)
def test_ours(method, tmp_path):
    """The script's own training: the first batches come again, with other weights.

    Operations are counted in the first step only.
    """
    config = Config(model="tiny", method=method, steps=3, batch_size=4, max_length=64, lr=1e-3)
    (contender,) = benchmark.contenders(config)
    reference, *steps = take_turns_here(contender, config, tmp_path)
    assert len(steps) == WARMUP_STEPS + 3
    num_completions = config.steps * config.batch_size
    if method in ("dpo", "slic"):
        num_completions *= 2
    logps = list(reference["texts"].values())
    assert len(logps) == num_completions
    if method in ("dpo", "kto", "ppo_offline"):
        assert max(logps) < 0
        assert reference["tokens"] > 0
        assert reference["log_ratio_max"] < 1e-4  # nats per token: policy and reference are equal
    else:
        assert np.isnan(logps).all()
        assert reference["tokens"] == 0
    num_tokens = [step["tokens"] for step in steps]
    assert num_tokens[:WARMUP_STEPS] == num_tokens[WARMUP_STEPS : 2 * WARMUP_STEPS]
    losses = [step["loss"] for step in steps]
    assert losses[1] != losses[1 + WARMUP_STEPS]
    assert [("flops" in step) for step in steps] == [True, False, False, False, False]
    for step in steps:
        assert step["seconds"] > 0
        assert step["cpu_seconds"] > 0
        assert step["max_memory_mib"] > 0


def test_ladder(tmp_path):
    """All stages compute the same losses and log-probabilities, with fewer operations each."""
    config = Config(model="tiny", steps=2, batch_size=4, ladder=True)
    contenders = benchmark.contenders(config)
    turns = {}
    for contender in contenders:
        turns[contender.name] = take_turns_here(contender, config, tmp_path)
    for differences in benchmark.find_differences(turns).values():
        assert max(differences["first_losses"]) < 1e-5
        assert differences["completion_logps"] < 1e-3
    flops = [turns[contender.name][1]["flops"] for contender in contenders]
    assert flops[0] > flops[1] > flops[2] > flops[3] == flops[4]


def test_plain_head(monkeypatch):
    """The stage without TokenLogps uses torch's cross-entropy, which gives the same numbers."""
    monkeypatch.setattr(common, "MAX_LOGITS", common.MAX_LOGITS)  # restored after the test
    monkeypatch.setattr(common, "TokenLogps", common.TokenLogps)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    expected, _ = common.TokenLogps.apply(logits.clone(), targets)
    benchmark_ours.leave_out_ideas(policy=None, run=None, stage=Stage(plain_head=True))
    assert common.TokenLogps is benchmark_ours.PlainHead
    logps, _ = common.TokenLogps.apply(logits, targets)
    torch.testing.assert_close(logps, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype, tmp_path):
    """--dtype reaches the settings of our scripts, and of TRL."""
    config = Config(model="tiny", dtype=dtype)
    records_path = tmp_path / "records.jsonl"
    settings = benchmark_ours.make_script_config(
        importlib.import_module("dpo"), config, tmp_path, records_path, "ours", Stage()
    )
    assert settings.dtype == dtype
    settings = benchmark_trl.make_settings(config, benchmark_trl.Options(), tmp_path)
    assert settings["bf16"] == (dtype == "bfloat16")


OTHER_SCRIPT = """
def Config(**settings):
    print(settings)
"""
OTHER_BENCHMARK = """
import dataclasses
import types

import kto

@dataclasses.dataclass
class Config:
    lr: float
    peer: str

def contenders(config):
    return [types.SimpleNamespace(run=run, options=config.peer)]

def run(connection, config, folder, records_path, name, options):
    assert (connection, folder, records_path, name, options) == (1, 2, 3, 4, "none")
    kto.Config(lr=config.lr, kl="mismatched")
"""


def test_other_checkout_settings(tmp_path):
    """Its script gets our --kl and --dtype, although its benchmark does not know them."""
    (tmp_path / "archangel").mkdir()
    (tmp_path / "archangel" / "__init__.py").write_text("")
    (tmp_path / "archangel" / "benchmark.py").write_text(OTHER_BENCHMARK)
    (tmp_path / "kto.py").write_text(OTHER_SCRIPT)
    program = (
        "import sys; from archangel import benchmark, benchmark_ours; folder = sys.argv[1]; "
        "config = benchmark.Config(model='tiny', method='kto', peer=folder, lr=0.5, "
        "kl='other_half', dtype='bfloat16'); "
        "benchmark_ours.other_checkout(1, config, 2, 3, 4, folder)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "{'lr': 0.5, 'kl': 'other_half', 'dtype': 'bfloat16'}\n"


SOME_CONTENDERS = """
import signal

def wait(connection, *args):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        connection.recv()
        connection.send({})

def fail(connection, *args):
    raise RuntimeError
"""


def test_contender_fails(tmp_path, monkeypatch):
    """One line says who it was, and no process is left."""
    (tmp_path / "some_contenders.py").write_text(SOME_CONTENDERS)
    monkeypatch.syspath_prepend(tmp_path)
    some_contenders = importlib.import_module("some_contenders")
    contenders = [
        Contender("first", some_contenders.wait, None, 1),
        Contender("second", some_contenders.fail, None, 1),
    ]
    with pytest.raises(UserError, match="second: ended early"):
        benchmark_turns.take_turns(contenders, Config(model="tiny"), tmp_path, tmp_path)
    assert multiprocessing.active_children() == []


def test_contender_hangs():
    connection, _its_end = multiprocessing.Pipe()
    with pytest.raises(UserError, match="ours: not done after 0.1 seconds.*--turn_seconds"):
        benchmark_turns.ask(connection, "go", "ours", time_limit=0.1)


def test_metrics_reported(tmp_path):
    """KTO with this checkout as its own peer: equal numbers, and every metric is reported."""
    report, printed = run_benchmark(tmp_path, "kto", "--batch_size", "2", "--peer", str(ROOT))
    (differences,) = report["differ_from_first"].values()
    assert differences == {"first_losses": [0.0, 0.0, 0.0], "completion_logps": 0.0}
    metrics = report["figures"]["ours"]
    assert metrics["steps"] == len(metrics["seconds"]) == 2
    for name in (
        "seconds_per_step",
        "reference_seconds_per_step",
        "seconds_per_step_with_reference",
        "cpu_seconds_per_step_with_reference",
        "completion_tokens_per_second",
        "max_memory_mib",
        "mfu",
        "first_step_gflop",
    ):
        assert metrics[name] > 0
        assert name in printed
    assert 0 < metrics["useful_share"] <= 1
    assert metrics["first_step_gflop"] > metrics["first_step_useful_gflop"]
    assert metrics["log_ratio_max"] < 1e-4  # nats per token: policy and reference are equal
    assert report["matmul_rate"] > 0
    assert len(report["load"]) == 2


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_trl_computes_same_loss(method, tmp_path):
    """TRL's three variants, two rows at once: the first loss, and the reference's numbers."""
    pytest.importorskip("trl")
    report, _ = run_benchmark(
        tmp_path, method, "--batch_size", "4", "--peer", "trl", "--peer_rows_at_once", "2"
    )
    assert len(report["differ_from_first"]) == 3
    assert "trl" in report["versions"]
    for name, differences in report["differ_from_first"].items():
        assert differences["first_losses"][0] < 1e-5
        if method != "sft" and name != "trl, as it comes":
            assert differences["completion_logps"] < 1e-3


def test_different_tokens():
    """Contenders that have not seen the same tokens are not compared."""
    reference = {"texts": {"a": -1.0, "b": -2.0}}
    step = {"loss": 0.5}
    turns = {"ours": [reference, step], "other": [{"texts": {"a": -1.0}}, step]}
    with pytest.raises(UserError, match="do not see the same tokens"):
        benchmark.find_differences(turns)


# ---------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "no-such-shape"],
        ["--model", "tiny", "--steps", "1"],
        ["--model", "tiny", "--seed", "-1"],
        ["--model", "tiny", "--lr", "0"],
        ["--model", "tiny", "--out", ""],
        ["--model", "tiny", "--dtype", "float16"],
        ["--model", "tiny", "--micro_batch_tokens", "100"],
        ["--model", "tiny", "--peer_rows_at_once", "-2"],
        ["--model", "tiny", "--peer_rows_at_once", "3"],
        ["--model", "tiny", "--method", "kto", "--peer_rows_at_once", "1"],
        ["--model", "tiny", "--method", "sft", "--ladder"],
        ["--model", "tiny", "--ladder", "--peer", "trl"],
        ["--model", "tiny", "--peer", "no/such/checkout"],
        ["--model", "tiny", "--method", "kto", "--batch_size", "3"],
        ["--model", "tiny", "--method", "ppo_offline", "--peer", "trl"],
    ],
)
def test_wrong_setting(arguments, monkeypatch, capsys):
    """Status 2 and one line that names the setting, before anything is written."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended, exit_status():
        parse_args(Config, benchmark.__doc__)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert "--" in error
