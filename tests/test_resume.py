"""A run that is resumed ends as if it had not been stopped, and nothing else is resumed.

tests/test_kills.py kills runs at any moment.
"""

import json
import os
import signal

import golden_cases
import pytest
from filelock import FileLock
from helpers import (
    assert_same_metrics,
    assert_same_weights,
    change_json,
    command_here,
    copy_toy_model,
    error_line,
    metric,
    read_metrics,
    read_record,
    run_forked,
    train_here,
    write_records,
    write_toy_folder,
)
from transformers import AutoTokenizer

import common

SCRIPTS = golden_cases.SCRIPTS
BASE = {"model": "toy", "lr": 3e-4, "warmup_steps": 3, "max_steps": 6, "batch_size": 12}
DOUBLE = {**BASE, "lr": golden_cases.LEARNING_RATES["kto"], "dtype": "float64"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("data"), train=100, test=12)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("small_data"), train=20, test=4)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> list[dict]:
    """The metrics of a float64 run of KTO, in one process, that nothing stops."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return train_here("kto", out, data=data, **DOUBLE)


def stop_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run in this process get SIGTERM in the step with this number."""
    log = common.Run.log

    def log_and_stop(run, number, metrics):
        log(run, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(common.Run, "log", log_and_stop)


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
def test_resume_on_other_processes(first, second, straight, data, tmp_path):
    """A checkpoint of two processes is continued by one, and the other way round."""
    settings = {**DOUBLE, "data": data}
    run_forked("kto", tmp_path / "run", processes=first, **{**settings, "max_steps": 3})
    run_forked("kto", tmp_path / "run", processes=second, resume=True, **settings)
    assert_same_metrics(straight[4:], read_metrics(tmp_path / "run")[4:], 1e-12)


def test_resume_with_moved_data(tmp_path, monkeypatch):
    """The same records in other files of another folder are the same data."""
    records = golden_cases.toy_records(20)
    path = write_records(tmp_path / "records.jsonl", records)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 1)
        assert command_here("dpo", tmp_path / "run", data=path, **BASE) == 75
    path.unlink()
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(records, indent=1))
    assert command_here("dpo", tmp_path / "run", resume=True, data=folder, **BASE) == 0


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
