"""A run that is killed at any moment goes on as if it had not been.

The short form kills each script a few times; HALOS_LONG=1 python -m pytest tests/test_kills.py
kills each at least 20 times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common

ROOT = Path(common.__file__).parent
LONG = bool(os.environ.get("HALOS_LONG"))
SCRIPTS = ["sft", "dpo", "slic", "ppo_offline", "kto"] if LONG else ["kto"]
# What is there, beside the run's folder or in it, when a run has come so far; in the order in which
# it comes. The long form kills up to half a second later.
MOMENTS = {
    "writing the reference column": "reference/*",
    "claiming the folder": "run/run.json",
    "training": "run/metrics.jsonl",
    "writing a checkpoint": "run/checkpoints/*.partial",
    "after a checkpoint": "run/checkpoints/step_00000004",
    "writing the model": "run/model.partial",
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (common.TOY / "data" / "train.jsonl").read_text().splitlines()[:120]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(script: str, data: Path, out: Path, processes: int = 0) -> list[str]:
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    settings = {"model": "toy", "data": data, "out": out, "lr": 1e-4, "warmup_steps": 3}
    settings |= {"batch_size": 8, "max_steps": 12, "save_every": 2}
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [*launcher, str(ROOT / f"{script}.py"), *flags, "--resume"]


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(out: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until a file of the pattern is there, beside `out` or in it, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(out.parent.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(words: list[str]) -> None:
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_runs_end_in_the_weights_of_one_that_was_not(script, data, tmp_path):
    straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    finish(command(script, data, straight))
    rng = random.Random(script)
    kills = 0
    for moment, pattern in list(MOMENTS.items()) * (5 if LONG else 1):
        process = start(command(script, data, killed))
        wait_for(killed, pattern, process)
        time.sleep(rng.uniform(0, 0.5) if LONG else 0.01)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if LONG and moment == "writing the model":  # begin again, to be killed at every moment
            finish(command(script, data, killed))
            killed = tmp_path / f"killed{kills}" / "run"
    print(f"{script}: {kills} kills")
    assert kills >= (20 if LONG else 4)
    finish(command(script, data, killed))
    ours, theirs = (load_file(out / "model.safetensors") for out in (straight, killed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert steps(killed) == steps(straight) == list(range(1, 13))
    assert not list(killed.glob("**/*.partial"))
    assert [p.name for p in (killed / "checkpoints").iterdir()] == ["step_00000012"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_loses_no_step(number, data, tmp_path):
    out = tmp_path / "run"
    process = start(command("dpo", data, out))
    wait_for(out, "run/checkpoints/step_00000002", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was faster than the signal")
    assert process.returncode == 75
    assert "go on with --resume" in errors.splitlines()[-1]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{steps(out)[-1]:08d}"
    finish(command("dpo", data, out))
    assert steps(out)[-1] == 12 and len(set(steps(out))) == len(steps(out))


def test_one_of_two_processes_killed_ends_the_other(data, tmp_path):
    out = tmp_path / "run"
    process = start(command("kto", data, out, processes=2))
    wait_for(out, "run/checkpoints/step_00000002", process)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in errors
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()
    finish(command("kto", data, out, processes=2))
    assert steps(out)[-1] == 12
