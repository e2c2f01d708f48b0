"""The trainers as programs: processes, memory limits, resuming, the reference pass, the export."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import golden_cases
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock
from helpers import (
    ROOT,
    TOY,
    assert_same_metrics,
    assert_same_weights,
    change_json,
    command_here,
    copy_toy_model,
    error_line,
    fork,
    metric,
    plain_logps,
    read_metrics,
    run_forked,
    tiny_model,
    to_flags,
    train_here,
    write_records,
    write_toy_folder,
)
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
import kto
import ppo_offline
import sft
from archangel import packed

LONG = bool(os.environ.get("HALOS_LONG"))
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


def stop_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run in this process get SIGTERM in the step with this number."""
    log = common.Run.log

    def log_and_stop(run, number, metrics):
        log(run, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(common.Run, "log", log_and_stop)


def read_record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def plain_log_ratios(model, examples: common.Examples) -> torch.Tensor:
    """log pi - log pi_ref (B,) by plain transformers; the reference model is the toy."""
    reference = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=model.dtype)
    log_ratios = []
    for example in examples:
        ids = common.Example(example.prompt_ids.tolist(), [example.completions_ids[0].tolist()])
        token_log_ratios = plain_logps(model, [ids]) - plain_logps(reference, [ids])
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
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    _, test_records = common.load_records(data, kto.FORMATS)
    examples = kto.make_examples(test_records, tokenizer, kto.Config(model="toy"))
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
    config = sft.Config(**settings)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    records, _ = common.load_records(data, sft.FORMATS)
    examples = sft.make_examples(records, tokenizer, config)
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    logps = []
    for index in sft.make_schedule(examples, config)[0]:
        completions_ids = [ids.tolist() for ids in examples[index].completions_ids]
        example = common.Example(examples[index].prompt_ids.tolist(), completions_ids)
        with torch.no_grad():
            logps.append(plain_logps(model, [example]))
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


def test_values_before_training(small_data, tmp_path):
    """They are 0 on one process and on two: every error of the critic is the return itself."""
    settings = {**double("ppo_offline"), "max_steps": 1, "data": small_data}
    settings |= {"gamma": 1.0, "gae_lambda": 1.0}  # each return is the reward, +1 or -1
    for processes in (0, 2):
        out = tmp_path / f"run{processes}"
        run_forked("ppo_offline", out, processes=processes, **settings)
        records = read_metrics(out)
        assert records[0]["eval_critic_loss"] == pytest.approx(0.5, abs=1e-12)
        assert records[1]["critic_loss"] == pytest.approx(0.5, abs=1e-12)


# ------------------------------------------------------------------------------ several processes


# Learns the phrase within a few steps, so that the reference point is positive.
PHRASE = {**DOUBLE, "lr": 1e-4, "max_steps": 5, "batch_size": 10}
PROCESS_CASES = [(script, None) for script in SCRIPTS if script != "kto"]
PROCESS_CASES += [("kto", kl) for kl in ("other_half", "mismatched", "zero")]


@pytest.mark.parametrize("script, kl", PROCESS_CASES)
def test_processes(script, kl, tmp_path):
    """One, two and four processes give the same metrics, with a positive reference point."""
    settings = {**PHRASE, "data": golden_cases.write_data("phrase", tmp_path)}
    if kl is not None:
        settings["kl"] = kl
    run_forked(script, tmp_path / "one", **settings)
    # So few tokens at a time make several micro-batches.
    run_forked(script, tmp_path / "two", processes=2, micro_batch_tokens=160, **settings)
    more = {"activation_checkpointing": True}
    run_forked(script, tmp_path / "four", processes=4, **settings, **more)
    expected = read_metrics(tmp_path / "one")
    for name in ("two", "four"):
        assert_same_metrics(expected, read_metrics(tmp_path / name), 1e-12)
    if kl is not None:
        assert (metric(expected, "kl").max() > 1) == (kl != "zero")


@pytest.mark.parametrize("script", SCRIPTS if LONG else ["kto"])
def test_forty_steps_in_float32(script, data, tmp_path):
    """Two processes with little memory stay together with one.

    With the default warm-up: the first steps of RMSprop are the signs of the gradient, whatever its
    size. With a short warm-up they turn rounding into steps, and two runs drift apart.
    """
    settings = {**BASE, "max_steps": 40, "warmup_steps": 150, "batch_size": 6, "data": data}
    run_forked(script, tmp_path / "one", **settings)
    run_forked(script, tmp_path / "two", processes=2, micro_batch_tokens=300, **settings)
    one = metric(read_metrics(tmp_path / "one"), "loss")
    two = metric(read_metrics(tmp_path / "two"), "loss")
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


def save_llama(folder: Path, head: str) -> str:
    """A small Llama with the toy's tokenizer and generation settings of its own.

    head: tied, or separate under a configuration that says tied, as some published models have it.
    """
    name = "llama_tied" if head == "tied" else "llama"
    model = tiny_model(name, vocab_size=512, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    model.generation_config.update(do_sample=True, top_p=0.5, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (head == "separate")
    return str(folder)


@pytest.mark.parametrize("head", ["tied", "separate"])
def test_processes_with_llama(head, small_data, tmp_path):
    """Two processes export what one does. Rotary frequencies are in no file: they are sent."""
    model = save_llama(tmp_path / "model", head)
    settings = {**DOUBLE, "max_steps": 3, "model": model, "data": small_data}
    outs = {"one": tmp_path / "one", "two": tmp_path / "two"}
    run_forked("kto", outs["one"], **settings)
    run_forked("kto", outs["two"], processes=2, **settings)
    assert_same_metrics(read_metrics(outs["one"]), read_metrics(outs["two"]), 1e-12)
    logps = {}
    weights = {}
    loaded = {}
    for name, out in outs.items():
        logps[name] = load_file(out / "reference_logps_train.safetensors")["logps"]
        weights[name] = load_file(out / "model.safetensors")
        loaded[name] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    torch.testing.assert_close(logps["one"], logps["two"], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert weights["one"].keys() == weights["two"].keys()
    assert ("lm_head.weight" in weights["two"]) == (head == "separate")
    torch.testing.assert_close(weights["one"], weights["two"], rtol=1e-9, atol=1e-12)
    for file in ("generation_config.json", "config.json", "tokenizer.json"):
        assert (outs["one"] / file).read_text() == (outs["two"] / file).read_text()

    input_ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        hidden = loaded["two"].base_model(input_ids).last_hidden_state
        logits = {name: model(input_ids).logits for name, model in loaded.items()}
    head_name = "lm_head.weight" if head == "separate" else "model.embed_tokens.weight"
    expected = hidden @ weights["two"][head_name].double().T
    torch.testing.assert_close(logits["two"], expected)
    torch.testing.assert_close(logits["one"], logits["two"], rtol=1e-9, atol=1e-9)
    before = load_file(f"{model}/model.safetensors")
    assert not torch.equal(weights["two"][head_name], before[head_name])


def test_start_of_a_separate_head(small_data, tmp_path):
    """Its log-probabilities are those of the model before its configuration was changed."""
    model = save_llama(tmp_path / "model", "separate")
    settings = {**DOUBLE, "max_steps": 1, "model": model, "data": small_data}
    train_here("dpo", tmp_path / "run", **settings)
    logps = load_file(tmp_path / "run" / "reference_logps_test.safetensors")["logps"]
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    saved = tiny_model("llama", torch.float64, vocab_size=512, max_position_embeddings=2048)
    _, test_records = common.load_records(small_data, dpo.FORMATS)
    examples = dpo.make_examples(test_records, tokenizer, dpo.Config(model="toy"))
    plain_examples = []
    for example in examples:
        completions_ids = [ids.tolist() for ids in example.completions_ids]
        plain_examples.append(common.Example(example.prompt_ids.tolist(), completions_ids))
    with torch.no_grad():
        torch.testing.assert_close(logps, plain_logps(saved, plain_examples), rtol=0, atol=1e-9)


def test_activation_checkpointing_with_buffers(small_data, tmp_path):
    """GPT-Neo has buffers in its layers, which are wrapped then."""
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    model = tiny_model("gpt_neo", vocab_size=512, max_position_embeddings=2048, **layers)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "model")
    settings = {**DOUBLE, "max_steps": 2, "model": tmp_path / "model", "data": small_data}
    settings["activation_checkpointing"] = True
    run_forked("dpo", tmp_path / "one", **settings)
    run_forked("dpo", tmp_path / "two", processes=2, **settings)
    assert_same_metrics(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), 1e-12)


# --------------------------------------------------------------------------------------- resuming

RESUME_CASES = [(script, "rmsprop") for script in SCRIPTS] + [("dpo", "adamw"), ("kto", "adamw")]


@pytest.mark.parametrize("script, optimizer", RESUME_CASES)
def test_resume_to_the_same_bits(script, optimizer, small_data, tmp_path, monkeypatch):
    settings = {**BASE, "optimizer": optimizer, "eval_every": 2, "data": small_data}
    straight = train_here(script, tmp_path / "straight", **settings)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert command_here(script, tmp_path / "resumed", **settings) == 75
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    first = read_metrics(tmp_path / "resumed")
    for record in first:
        record["seconds"] += 1000  # as if it had taken so long
    write_records(tmp_path / "resumed" / "metrics.jsonl", first)
    assert command_here(script, tmp_path / "resumed", resume=True, **settings) == 0
    resumed = read_metrics(tmp_path / "resumed")
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert_same_metrics(straight, resumed, 0)
    assert (metric(resumed, "seconds").diff() > 0).all()


@pytest.mark.parametrize("first, second", [(2, 0), (0, 2)])
def test_resume_on_other_processes(first, second, alone, data, tmp_path):
    """A checkpoint of two processes is continued by one, and the other way round."""
    settings = {**double("kto"), "data": data}
    run_forked("kto", tmp_path / "run", processes=first, **{**settings, "max_steps": 3})
    run_forked("kto", tmp_path / "run", processes=second, resume=True, **settings)
    expected = read_metrics(alone("kto"))
    assert_same_metrics(expected[4:], read_metrics(tmp_path / "run")[4:], 1e-12)


def test_resume_refuses_changes(small_data, tmp_path, capsys):
    out = tmp_path / "run"
    model = copy_toy_model(tmp_path / "model")
    settings = {**BASE, "max_steps": 2, "data": small_data, "model": model}
    assert command_here("dpo", out, resume=True, **settings) == 0  # there is nothing yet: it starts
    assert command_here("dpo", out, **settings) == 2
    assert "not empty" in error_line(capsys.readouterr().err)
    other_data = write_records(tmp_path / "other.jsonl", golden_cases.toy_records(21))
    for name, change in {"--lr": {"lr": 1e-3}, "data_sha256": {"data": other_data}}.items():
        assert command_here("dpo", out, resume=True, **{**settings, **change}) == 2
        assert f"{name} changed" in error_line(capsys.readouterr().err)
    assert command_here("kto", out, resume=True, **settings) == 2
    assert "script" in error_line(capsys.readouterr().err)

    before = (out / "model.safetensors").stat().st_mtime_ns
    assert command_here("dpo", out, resume=True, **settings) == 0
    assert "finished already" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == before

    # The same weights with another configuration are another model.
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    change_json(tmp_path / "model" / "config.json", rope_parameters=rope)
    assert command_here("dpo", out, resume=True, **settings) == 2
    assert "model_sha256 changed" in error_line(capsys.readouterr().err)


def test_resume_of_what_is_damaged(small_data, tmp_path, capsys):
    out = tmp_path / "run"
    settings = {**BASE, "max_steps": 4, "save_every": 2, "data": small_data}

    def refused(**changes) -> str:
        assert command_here("dpo", out, resume=True, **{**settings, **changes}) == 2
        return error_line(capsys.readouterr().err)

    train_here("dpo", out, **settings)
    whole = (out / "run.json").read_text()
    for damaged in ("", "[]", "{}", whole[:50], '{"settings": 3}'):
        (out / "run.json").write_text(damaged)
        assert "run.json: is damaged" in refused()
    old = json.loads(whole)
    del old["format"]  # as version 1 wrote it
    (out / "run.json").write_text(json.dumps(old))
    assert "earlier version" in refused()

    (out / "run.json").write_text(whole)
    change_json(out / "run.json", finished=False)
    assert "has 4 steps already" in refused(max_steps=3)
    with FileLock(out / "run.lock"):
        assert "another run is writing there" in refused(max_steps=6)
    for path in (out / "checkpoints" / "step_00000004").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "step_00000004: cannot be read" in refused(max_steps=6)


def test_export_over_an_export(small_data, tmp_path):
    """A tokenizer with several chat templates has a folder of them, which is replaced."""
    model = copy_toy_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    settings = {**BASE, "max_steps": 1, "model": model, "data": small_data}
    run_forked("dpo", tmp_path / "run", **settings)
    assert (tmp_path / "run" / "additional_chat_templates").is_dir()
    run_forked("dpo", tmp_path / "run", resume=True, **{**settings, "max_steps": 2})


def test_record_after_resume(small_data, tmp_path, monkeypatch):
    """What the first part of a run has found out stays in run.json."""
    settings = {**BASE, "max_steps": 3, "data": small_data}
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        assert command_here("dpo", tmp_path / "run", **settings) == 75
    seconds = read_record(tmp_path / "run")["reference_seconds"]
    assert command_here("dpo", tmp_path / "run", resume=True, **settings) == 0
    record = read_record(tmp_path / "run")
    assert record.get("reference_seconds") == seconds
    assert "first_log_ratio_per_token" in record


def test_not_finite_weights(small_data, tmp_path, capsys):
    out = tmp_path / "run"
    settings = {**BASE, "lr": 1e38, "warmup_steps": 0, "save_every": 1, "data": small_data}
    assert command_here("dpo", out, **settings) == 2
    assert "not finite" in error_line(capsys.readouterr().err)
    assert not (out / "model.safetensors").exists()
    assert not list(out.glob("checkpoints/step_*"))


# ----------------------------------------------------------------------------- the reference model


def load_examples(data: str, config: kto.Config) -> tuple[common.Examples, common.Examples]:
    """KTO's training and held-out examples."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    examples = []
    for records in common.load_records(data, kto.FORMATS):
        examples.append(kto.make_examples(records, tokenizer, config))
    return examples


def check_reference(out: Path, config: kto.Config) -> int:
    """The kept log-probabilities are those of the examples in the schedule, and nan elsewhere.

    Returns the number of examples that have them.
    """
    train_set, test_set = load_examples(config.data, config)
    used = set(itertools.chain(*kto.make_schedule(train_set, config)))
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
    few = check_reference(tmp_path / "resumed", kto.Config(**first))
    assert read_record(tmp_path / "resumed")["reference_seconds"] > 0
    resumed = train_here("kto", tmp_path / "resumed", resume=True, **settings)
    many = check_reference(tmp_path / "resumed", kto.Config(**settings))
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
    """A damaged file is computed again. One of another model gives a warning in the first step."""
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

    for checkpoint in (out / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / "no_checkpoint")
    change_json(out / "run.json", finished=False)
    logps = load_file(path)["logps"]
    save_file({"logps": logps - 0.01}, path)
    train_here("dpo", out, resume=True, **settings)
    assert "warning: in the first step, policy and reference differ" in capsys.readouterr().err


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


def test_error_of_one_process(small_data, tmp_path):
    """Both of two processes end with the line of the first one, which alone reads the weights."""
    model = copy_toy_model(tmp_path / "model")
    weights = load_file(f"{model}/model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, f"{model}/model.safetensors", metadata={"format": "pt"})
    settings = {**BASE, "model": model, "data": small_data}
    flags = ["--out", str(tmp_path / "run"), *to_flags(settings)]
    for process in fork("dpo", [flags, flags]):
        assert process.wait() == 2
        assert "its weights lack gpt_neox.layers.1" in error_line(process.stderr)
        assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
