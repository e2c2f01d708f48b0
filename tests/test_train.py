"""The trainers as programs: metrics, memory limits, the reference pass, the export."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import golden_cases
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    ROOT,
    TOY,
    assert_same_metrics,
    change_json,
    command_here,
    copy_toy_model,
    error_line,
    load_examples,
    metric,
    plain_logps,
    read_metrics,
    read_record,
    run_forked,
    train_here,
    write_records,
    write_toy_folder,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import kto
import ppo_offline
import sft
from archangel import packed

SCRIPTS = golden_cases.SCRIPTS
WITH_REFERENCE = ["dpo", "ppo_offline", "kto"]
BASE = {"model": "toy", "lr": 3e-4, "warmup_steps": 3, "max_steps": 6, "batch_size": 12}
DOUBLE = {**BASE, "dtype": "float64"}


def double(script: str) -> dict:
    """Settings of a float64 run, with a learning rate at which this loss falls."""
    return {**DOUBLE, "lr": golden_cases.LEARNING_RATES[script]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("data"), train=100, test=12)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("small_data"), train=20, test=4)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The folder of each script's float64 run by its command line, without torchrun."""
    runs = {}

    def run(script: str) -> Path:
        if script not in runs:
            out = tmp_path_factory.mktemp("alone") / script
            run_forked(script, out, data=data, **double(script))
            runs[script] = out
        return runs[script]

    return run


def plain_log_ratios(model, examples: common.Examples) -> torch.Tensor:
    """log pi - log pi_ref (B,) by plain transformers; the reference model is the toy."""
    reference = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=model.dtype)
    log_ratios = []
    for example in examples:
        token_log_ratios = plain_logps(model, [example]) - plain_logps(reference, [example])
        log_ratios.append(token_log_ratios.sum())
    return torch.stack(log_ratios)


# ------------------------------------------------------------------------------------ one process


def check_exported(out: Path) -> None:
    """Plain transformers loads the model, which is the toy with other weights, and samples."""
    before = load_file(TOY / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name].float()) for name in before)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("\n\nHuman: How much is the brass pot?\n\nAssistant:", return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=8)
    assert reply.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line(script, alone):
    out = alone(script)
    records = read_metrics(out)
    assert [record["step"] for record in records] == list(range(7))
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]
    assert (metric(records, "seconds").diff() > 0).all()
    record = read_record(out)
    assert record["finished"]
    assert record["packed_rows"]
    assert record["script"] == f"{script}.py"
    check_exported(out)


def test_kto_metrics(alone, data):
    """The log-ratios, held out, are those of plain transformers; the rest follows from them."""
    records = read_metrics(alone("kto"))
    for record in records[1:]:
        for label in ("desirable", "undesirable"):
            reward = 0.1 * record[f"log_ratio_{label}"]
            assert record[f"reward_{label}"] == pytest.approx(reward, abs=1e-12)
    model = AutoModelForCausalLM.from_pretrained(alone("kto"), dtype=torch.float64)
    _, examples = load_examples("kto", data=data)
    with torch.no_grad():
        desirable, undesirable = plain_log_ratios(model, examples).view(-1, 2).unbind(1)
    last = records[-1]
    assert last["eval_log_ratio_desirable"] == pytest.approx(desirable.mean().item(), abs=1e-9)
    assert last["eval_log_ratio_undesirable"] == pytest.approx(undesirable.mean().item(), abs=1e-9)
    accuracy = (desirable > undesirable).double().mean().item()
    assert 0 < accuracy < 1
    assert last["eval_reward_accuracy"] == accuracy


def test_accuracy_needs_pairs(tmp_path):
    """Held-out unpaired records have a loss, and no accuracy."""
    records = golden_cases.unpaired_41_9()
    write_records(tmp_path / "train.jsonl", records)
    write_records(tmp_path / "test.jsonl", records[:8])
    settings = {**BASE, "max_steps": 1}
    records = train_here("kto", tmp_path / "run", data=str(tmp_path), **settings)
    for record in records:
        assert "eval_loss" in record
        assert "eval_reward_accuracy" not in record


@pytest.mark.parametrize("script", SCRIPTS)
def test_layout_and_limit(script, alone, data, tmp_path, monkeypatch):
    """Neither several micro-batches nor the padded layout change a metric."""
    expected = read_metrics(alone(script))
    small = {**double(script), "micro_batch_tokens": 200}
    assert_same_metrics(expected, train_here(script, tmp_path / "small", data=data, **small), 1e-12)

    def refuse(*_):
        raise ValueError("not for this model")

    monkeypatch.setattr(packed, "use_packed_attention", refuse)
    padded = train_here(script, tmp_path / "padded", data=data, **double(script))
    assert not read_record(tmp_path / "padded")["packed_rows"]
    assert_same_metrics(expected, padded, 1e-12)


@pytest.mark.parametrize("script", ["kto", "ppo_offline"])
def test_unequal_classes(script, tmp_path):
    """30 desirable and 3 undesirable: an epoch is 5 steps of 6 and 6."""
    records = []
    for number, pair in enumerate(golden_cases.toy_records(33)):
        desirable = number % 11 != 0
        completion = pair["chosen"] if desirable else pair["rejected"]
        records.append({"prompt": pair["prompt"], "completion": completion, "label": desirable})
    path = write_records(tmp_path / "records.jsonl", records)
    stderr = run_forked(script, tmp_path / "run", data=path, **{**BASE, "max_steps": 0})
    assert "30 desirable, 3 undesirable" in stderr
    records = read_metrics(tmp_path / "run")
    assert len(records) == 5
    assert "eval_loss" not in records[-1]  # a single file: nothing is held out


def test_records_that_are_left_out(tmp_path, capsys):
    """They are counted, in lines and in run.json. The others are trained on."""
    pairs = golden_cases.toy_records(11)
    pairs[3]["chosen"] = " \n"
    pairs[4]["prompt"] = "\ud800"
    pairs[5]["rejected"] = ""
    train = write_records(tmp_path / "train.jsonl", pairs)
    test = write_records(tmp_path / "test.jsonl", pairs[4:8])
    settings = {**BASE, "max_steps": 1, "batch_size": 4, "data": str(tmp_path)}
    train_here("dpo", tmp_path / "run", **settings)
    printed = capsys.readouterr().err
    surrogate = "text with an unpaired surrogate, which is not Unicode"
    for line in (
        f"data: left out: an empty completion (2 records, the first is {train}, line 4)",
        f"data: left out: {surrogate} (1 record, the first is {train}, line 5)",
        f"held-out data: left out: {surrogate} (1 record, the first is {test}, line 1)",
        f"data: {tmp_path}, 11 records, 3 left out; 8 examples; 2 held out",
    ):
        assert line in printed.splitlines()
    found = read_record(tmp_path / "run")["data"]
    assert found["train"]["left_out"] == {
        "an empty completion": {"records": 2, "first": f"{train}, line 4"},
        surrogate: {"records": 1, "first": f"{train}, line 5"},
    }
    numbers = [found["train"][name] for name in ("read", "used", "examples")]
    assert numbers == [11, 8, 8]
    numbers = [found["test"][name] for name in ("read", "used", "examples")]
    assert numbers == [4, 2, 2]


def test_warmup_longer_than_the_run(small_data, tmp_path, capsys):
    for warmup_steps in (2, 3):
        settings = {**BASE, "max_steps": 2, "warmup_steps": warmup_steps}
        train_here("dpo", tmp_path / f"run{warmup_steps}", data=small_data, **settings)
        warned = "warning: 2 steps, 3 of warm-up" in capsys.readouterr().err
        assert warned == (warmup_steps == 3)


@pytest.fixture(scope="module")
def hh(tmp_path_factory) -> str:
    """Records of Anthropic HH, prepared by the project's own command."""
    out = tmp_path_factory.mktemp("hh") / "data"
    (raw,) = (ROOT / "tests" / "data").glob("hh*")
    command = [sys.executable, "-m", "archangel.data", "hh", "--input", str(raw), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_real_records(script, hh, tmp_path):
    settings = {**BASE, "max_steps": 2, "batch_size": 4}
    run_forked(script, tmp_path / "run", data=hh, **settings)
    assert len(read_metrics(tmp_path / "run")) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("script", WITH_REFERENCE)
def test_after_sft(script, alone, data, tmp_path):
    """Alignment starts from the model of SFT, which is then policy and reference."""
    settings = {**BASE, "max_steps": 1, "model": str(alone("sft"))}
    records = train_here(script, tmp_path / "run", data=data, **settings)
    margin = "log_ratio_margin" if script == "ppo_offline" else "reward_margin"
    assert abs(records[0][f"eval_{margin}"]) < 1e-4
    assert abs(records[1][margin]) < 1e-4
    assert read_record(tmp_path / "run")["first_log_ratio_per_token"] < 1e-5


def test_sft_loss(data, tmp_path):
    """SFT's loss is the mean over all completion tokens of the global batch."""
    settings = {**BASE, "max_steps": 1, "micro_batch_tokens": 200, "data": data}
    record = train_here("sft", tmp_path / "run", **settings)[1]
    examples, _ = load_examples("sft", **settings)
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    logps = []
    for index in sft.make_schedule(examples, sft.Config(**settings))[0]:
        with torch.no_grad():
            logps.append(plain_logps(model, [examples[index]]))
    logps = torch.cat(logps)
    assert record["tokens"] == len(logps)
    assert record["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)


def read_checkpoint(out: Path) -> dict[str, torch.Tensor]:
    """All tensors in the only checkpoint of a run."""
    (checkpoint,) = (out / "checkpoints").iterdir()
    tensors = {}
    for name, metadata in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
        if isinstance(metadata, TensorStorageMetadata):
            tensors[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def test_value_head(alone):
    """It starts at 0, is trained, and is in the checkpoints; the exported model is without it."""
    out = alone("ppo_offline")
    checkpoint = read_checkpoint(out)
    assert checkpoint["model.value_head.weight"].abs().max() > 0
    assert checkpoint["optimizer.state.value_head.weight.square_avg"].abs().max() > 0
    assert not any("value_head" in name for name in load_file(out / "model.safetensors"))
    assert not any("value_head" in name for name in read_checkpoint(alone("kto")))


def test_value_head_does_not_change_the_policy(data, tmp_path, monkeypatch):
    """Its gradient stops at its input: with the critic's loss alone, the policy stays as it is."""
    ppo_offline_loss = ppo_offline.ppo_offline_loss
    monkeypatch.setattr(
        ppo_offline, "ppo_offline_loss", lambda *arguments: 0 * ppo_offline_loss(*arguments)
    )
    settings = {**DOUBLE, "critic_weight": 1.0, "data": data}
    train_here("ppo_offline", tmp_path / "run", **settings)
    assert read_checkpoint(tmp_path / "run")["model.value_head.weight"].abs().max() > 0
    before = load_file(TOY / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name, weight in before.items():
        assert torch.equal(weight.double(), after[name]), name


def test_not_finite_weights(small_data, tmp_path, capsys):
    out = tmp_path / "run"
    settings = {**BASE, "lr": 1e38, "warmup_steps": 0, "save_every": 1, "data": small_data}
    assert command_here("dpo", out, **settings) == 2
    assert "not finite" in error_line(capsys.readouterr().err)
    assert not (out / "model.safetensors").exists()
    assert not list(out.glob("checkpoints/step_*"))


# ----------------------------------------------------------------------------- the reference model


def check_reference(out: Path, settings: dict) -> int:
    """The kept log-probabilities are those of the examples in the schedule, and nan elsewhere.

    Returns the number of examples that have them.
    """
    train_set, test_set = load_examples("kto", **settings)
    used = set(itertools.chain(*kto.make_schedule(train_set, kto.Config(**settings))))
    assert len(used) < len(train_set)
    kept = load_file(out / "reference_logps_train.safetensors")
    sets = {"logps": train_set, "mismatched_logps": train_set.mismatched}
    assert kept.keys() == sets.keys()
    for name, examples in sets.items():
        assert len(kept[name]) == examples.offsets[-1]
        for index in range(len(examples)):
            logps = kept[name][examples.offsets[index] : examples.offsets[index + 1]]
            expected = 0 if index in used else len(logps)
            assert logps.isnan().sum() == expected, (name, index)
    kept = load_file(out / "reference_logps_test.safetensors")
    sets = {"logps": test_set, "mismatched_logps": test_set.mismatched}
    assert kept.keys() == sets.keys()
    for name, examples in sets.items():
        assert len(kept[name]) == examples.offsets[-1]
        assert kept[name].isfinite().all()
    return len(used)


def test_reference_pass(small_data, tmp_path):
    """It computes what the schedule needs; a longer run that resumes computes what is missing."""
    settings = {**DOUBLE, "batch_size": 4, "kl": "mismatched", "data": small_data}
    straight = train_here("kto", tmp_path / "straight", **settings)
    first = {**settings, "max_steps": 2}
    train_here("kto", tmp_path / "resumed", **first)
    few = check_reference(tmp_path / "resumed", first)
    assert read_record(tmp_path / "resumed")["reference_seconds"] > 0
    resumed = train_here("kto", tmp_path / "resumed", resume=True, **settings)
    many = check_reference(tmp_path / "resumed", settings)
    assert few < many
    assert read_record(tmp_path / "resumed")["reference_seconds"] > 0
    for record in (straight[2], resumed[2]):  # the first run ended there, and was evaluated
        for name in [name for name in record if name.startswith("eval_")]:
            del record[name]
    assert_same_metrics(straight, resumed, 1e-12)


@pytest.mark.parametrize("kl, completions", [("zero", 2), ("mismatched", 4)])
def test_reference_pass_shares_prompts(kl, completions, small_data, tmp_path, monkeypatch):
    """Both completions of a pair, and their mismatched ones, are computed after one prompt."""
    num_completions = []
    make_micro_batches = common.make_micro_batches
    compute = common.compute_reference_logps

    def watch(examples, batch, run):
        num_completions.append([len(examples[index].completions_ids) for index in batch])
        return make_micro_batches(examples, batch, run)

    def compute_watched(policy, example_sets, indices, run):
        with monkeypatch.context() as patch:
            patch.setattr(common, "make_micro_batches", watch)
            compute(policy, example_sets, indices, run)
        # What comes out is each completion's own.
        for examples in example_sets:
            for index in range(len(examples)):
                with torch.no_grad():
                    alone = policy(common.make_batch([examples[index]]))
                np.testing.assert_allclose(examples.get_reference_logps(index), alone, atol=1e-9)

    monkeypatch.setattr(common, "compute_reference_logps", compute_watched)
    settings = {**DOUBLE, "max_steps": 0, "kl": kl, "data": small_data}
    train_here("kto", tmp_path / "run", **settings)
    assert num_completions == [[completions] * 20, [completions] * 4]


def test_reference_that_is_damaged_or_stale(small_data, tmp_path, monkeypatch, capsys):
    """A damaged file is computed again, and one that was computed in another way.

    One of another model gives a warning in the first step.
    """
    settings = {**BASE, "max_steps": 2, "warmup_steps": 1, "data": small_data}
    straight = train_here("dpo", tmp_path / "straight", **settings)
    out = tmp_path / "run"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "make_optimizer", interrupt)  # after the reference pass
        assert command_here("dpo", out, **settings) == 75
    path = out / "reference_logps_train.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    resumed = train_here("dpo", out, resume=True, **settings)
    assert path.read_bytes() == whole
    assert_same_metrics(straight, resumed, 0)
    assert "warning" not in capsys.readouterr().err

    with safe_open(path, "pt") as file:
        assert file.metadata() == {"arithmetic": "cpu, torch.float32, one process, PackedLayout"}
    logps = load_file(path)["logps"]
    for arithmetic in (
        "NVIDIA H100 80GB HBM3, torch.float32, one process, PackedLayout",
        "cpu, bfloat16, one process, PackedLayout",
        "cpu, torch.float32, sharded, PackedLayout",
        "cpu, torch.float32, one process, PaddedLayout",
        "cpu, torch.float32, one process, PackedLayout",
    ):
        for checkpoint in (out / "checkpoints").iterdir():
            shutil.rmtree(checkpoint)
        change_json(out / "run.json", finished=False)
        save_file({"logps": logps - 0.01}, path, {"arithmetic": arithmetic})
        train_here("dpo", out, resume=True, **settings)
        is_the_same = arithmetic == "cpu, torch.float32, one process, PackedLayout"
        warning = "warning: in the first step, policy and reference differ"
        assert (warning in capsys.readouterr().err) is is_the_same
        assert (path.read_bytes() == whole) is not is_the_same


# ------------------------------------------------------------------------------- a model's weights


def test_weights_that_do_not_fit(small_data, tmp_path, capsys):
    """Missing ones are refused; unexpected ones give a warning."""
    model = copy_toy_model(tmp_path / "model")
    weights = load_file(f"{model}/model.safetensors")
    settings = {**BASE, "max_steps": 1, "model": model, "data": small_data}

    more = {**weights, "vision_tower.weight": torch.ones(2)}
    save_file(more, f"{model}/model.safetensors", metadata={"format": "pt"})
    train_here("dpo", tmp_path / "more", **settings)
    written = capsys.readouterr().err
    assert any(
        line.startswith("warning: ") and "vision_tower.weight" in line
        for line in written.splitlines()
    )
    assert "vision_tower.weight" not in load_file(tmp_path / "more" / "model.safetensors")

    fewer = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(fewer, f"{model}/model.safetensors", metadata={"format": "pt"})
    assert command_here("dpo", tmp_path / "fewer", **settings) == 2
    assert "its weights lack gpt_neox.layers.1" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "fewer").exists()

    model = copy_toy_model(tmp_path / "small_vocabulary", vocab_size=100)
    assert command_here("dpo", tmp_path / "small", **{**settings, "model": model}) == 2
    assert "more tokens than the model" in error_line(capsys.readouterr().err)
