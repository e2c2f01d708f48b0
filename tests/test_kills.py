"""A run that is killed at any moment, or stopped by a signal, resumes as if it had not been.

HALOS_LONG=1 python -m pytest -s tests/test_kills.py kills every script at least 20 times. It prints
how often each was killed at which moment.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    Forked,
    assert_same_weights,
    clean_environment,
    fork,
    read_metrics,
    run_forked,
    to_flags,
    write_toy_folder,
)

LONG = bool(os.environ.get("HALOS_LONG"))
SCRIPTS = ["sft", "dpo", "slic", "ppo_offline", "kto"] if LONG else ["kto"]
WITHOUT_REFERENCE = ["sft", "slic"]
KILLS = 20 if LONG else 5  # of each script, at least
NUM_STEPS = 12
SAVE_EVERY = 2
BASE = {
    "model": "toy",
    "lr": 1e-4,
    "warmup_steps": 3,
    "batch_size": 8,
    "max_steps": NUM_STEPS,
    "save_every": SAVE_EVERY,
    "resume": True,
}
# The files that change when a run has come to a moment, in the order in which it comes to them, and
# the most seconds until it is killed, drawn at random. It takes some 50 ms to write a checkpoint,
# 10 to write the model, and 30 to 100 for a step.
CHECKPOINTS = "checkpoints/step_" + "[0-9]" * 8
MOMENTS = {
    "claiming the folder": ("run.json", 0.05),
    "the reference pass": ("reference_logps_*", 0.002),
    "a step": ("metrics.jsonl", 0.4),
    "writing a checkpoint": ("checkpoints/*.partial", 0.05),
    "after a checkpoint": (CHECKPOINTS, 0.2),
    "writing the model": ("model.partial", 0.01),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_toy_folder(tmp_path_factory.mktemp("data"), train=120)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The folder of a script's run that nothing happens to."""
    runs = {}

    def run(script: str, processes: int = 0) -> Path:
        if (script, processes) not in runs:
            out = tmp_path_factory.mktemp("straight") / "run"
            run_forked(script, out, processes=processes, data=data, **BASE)
            runs[script, processes] = out
        return runs[script, processes]

    return run


def flags(data: str, out: Path) -> list[str]:
    return ["--out", str(out), *to_flags({**BASE, "data": data})]


def find(out: Path, pattern: str) -> set[tuple[Path, int]]:
    """The files of a run that have this pattern, and when they last changed."""
    found = set()
    for path in out.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
            found.add((path, path.stat().st_ctime_ns))
    return found


def wait_for(out: Path, pattern: str, is_running, before: set = frozenset()) -> None:
    """Wait for a file of the pattern that was not there `before`, or for the end of the run."""
    deadline = time.monotonic() + 120
    while is_running() and not find(out, pattern) - before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out)]


def kill(script: str, data: str, out: Path, moment: tuple, rng: random.Random) -> bool:
    """Start a run and kill it at a moment, or a little later. False if it was faster."""
    pattern, spread = moment
    before = find(out, pattern)  # a killed run may have left such a file
    run = Forked(ROOT / f"{script}.py", flags(data, out), {})
    wait_for(out, pattern, run.is_running, before)
    time.sleep(rng.uniform(0, spread))
    if run.is_running():
        run.send(signal.SIGKILL)
    status = run.wait()
    assert status in (0, -signal.SIGKILL), run.stderr
    return status == -signal.SIGKILL


def steps_to_do_again(out: Path) -> int:
    """Steps that a killed run had done, and that its last complete checkpoint does not hold."""
    done = [0]
    path = out / "metrics.jsonl"
    if path.exists():
        for line in path.read_text().split("\n"):
            if line.endswith("}"):
                done.append(json.loads(line)["step"])
    saved = [0]
    for checkpoint, _ in find(out, CHECKPOINTS):
        saved.append(int(checkpoint.name.removeprefix("step_")))
    return max(done) - max(saved)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigkill(script, data, straight, tmp_path):
    rng = random.Random(script)
    kills = Counter()
    for attempt in range(10):  # each begins anew, and is killed at every moment
        out = tmp_path / str(attempt) / "run"
        for name, moment in MOMENTS.items():
            if name == "the reference pass" and script in WITHOUT_REFERENCE:
                continue
            kills[name] += kill(script, data, out, moment, rng)
            assert steps_to_do_again(out) <= SAVE_EVERY
        run_forked(script, out, data=data, **BASE)
        assert_same_weights(straight(script), out)
        assert steps(out) == steps(straight(script)) == list(range(1, NUM_STEPS + 1))
        assert not list(out.glob("**/*.partial"))
        (checkpoint,) = (out / "checkpoints").iterdir()
        assert checkpoint.name == f"step_{NUM_STEPS:08d}"
        if kills.total() >= KILLS:
            break
    print(f"\n{script}: {kills.total()} kills: {dict(kills)}")
    assert kills.total() >= KILLS


SIGNALS = [(signal.SIGTERM, 2), (signal.SIGINT, 1)]  # and the number of processes
if LONG:
    SIGNALS += [(signal.SIGTERM, 1), (signal.SIGINT, 2)]


@pytest.mark.parametrize("number, processes", SIGNALS)
def test_signal(number, processes, data, straight, tmp_path):
    """Saves, ends with status 75, and loses no step; one of two processes gets it first."""
    out = tmp_path / "run"
    runs = fork("kto", [flags(data, out)] * processes)
    wait_for(out, "checkpoints/step_00000002", runs[0].is_running)
    runs[-1].send(number)
    statuses = [run.wait() for run in runs]
    if not any(statuses):
        pytest.skip("it was faster than the signal")
    assert statuses == [75] * processes, runs[0].stderr
    assert "--resume" in runs[0].stderr.splitlines()[-1]
    assert not (out / "model.safetensors").exists()
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{steps(out)[-1]:08d}"
    run_forked("kto", out, processes=processes, data=data, **BASE)
    assert steps(out) == list(range(1, NUM_STEPS + 1))
    assert_same_weights(straight("kto", processes), out)


def test_one_of_two_processes_is_killed(data, tmp_path):
    """torchrun ends the other one, and the run resumes."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "kto.py"), *flags(data, out)]
    launcher = subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(out, "checkpoints/step_00000002", lambda: launcher.poll() is None)
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "SIGKILL" in stderr
    for child in children:
        assert not Path(f"/proc/{child}").exists()
    run_forked("kto", out, processes=2, data=data, **BASE)
    assert steps(out) == list(range(1, NUM_STEPS + 1))
