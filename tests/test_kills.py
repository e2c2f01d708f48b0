"""A run that is killed at any moment goes on as if it had not been.

The short form kills one script a few times; HALOS_LONG=1 python -m pytest -s tests/test_kills.py
kills each at least 20 times and prints how often it was killed at which moment.
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
import torch
from safetensors.torch import load_file

import common

ROOT = Path(common.__file__).parent
LONG = bool(os.environ.get("HALOS_LONG"))
SCRIPTS = ["sft", "dpo", "slic", "ppo_offline", "kto"] if LONG else ["kto"]
KILLS = 20 if LONG else 4  # at least, of each script
SAVE_EVERY = 2
# What changes, beside the run's folder or in it, when a run has come so far, in the order in which
# it comes; and the most seconds until the kill, drawn at random. A checkpoint takes some 50 ms to
# write, the model 10, a step 30 to 100.
MOMENTS = {
    "the reference pass, the column": ("reference/*", 0.002),
    "claiming the folder": ("run/run.json", 0.05),
    "a step": ("run/metrics.jsonl", 0.4),
    "writing a checkpoint": ("run/checkpoints/*.partial", 0.05),
    "after a checkpoint": ("run/checkpoints/step_" + "[0-9]" * 8, 0.2),
    "writing the model": ("run/model.partial", 0.01),
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
    settings |= {"batch_size": 8, "max_steps": 12, "save_every": SAVE_EVERY}
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


def there(out: Path, pattern: str) -> set[tuple[Path, int]]:
    """Files of the pattern beside `out` or in it, with when they last changed."""
    found = set()
    for path in out.parent.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path, path.stat().st_ctime_ns))
    return found


def wait_for(out: Path, pattern: str, process: subprocess.Popen, before=frozenset()) -> None:
    """Until a file of the pattern is there that was not `before`, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not there(out, pattern) - before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finish(words: list[str]) -> None:
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def kill(words: list[str], out: Path, moment: str, rng: random.Random) -> bool:
    """Start a run and kill it at this moment, or a little later. False: it was faster."""
    pattern, spread = MOMENTS[moment]
    before = there(out, pattern)  # a killed run may have left such a file
    process = start(words)
    wait_for(out, pattern, process, before)
    time.sleep(rng.uniform(0, spread))
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return killed


def steps_to_do_again(out: Path) -> int:
    """Steps that a killed run had done and that its last whole checkpoint does not hold."""
    lines = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    done = [json.loads(line)["step"] for line in lines.split("\n") if line.endswith("}")]
    saved = [int(path.name[5:]) for path, _ in there(out, "run/checkpoints/step_" + "[0-9]" * 8)]
    return max(done, default=0) - max(saved, default=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_runs_end_in_the_weights_of_one_that_was_not(script, data, tmp_path):
    straight = tmp_path / "straight" / "run"
    finish(command(script, data, straight))
    ours = load_file(straight / "model.safetensors")
    rng = random.Random(script)
    moments = [moment for moment in MOMENTS if script not in ("sft", "slic") or "ref" not in moment]
    kills = Counter()
    for attempt in range(10):  # each begins anew, to be killed at every moment
        killed = tmp_path / f"killed{attempt}" / "run"
        words = command(script, data, killed)
        for moment in moments:
            kills[moment] += kill(words, killed, moment, rng)
            assert steps_to_do_again(killed) <= SAVE_EVERY
        finish(words)
        theirs = load_file(killed / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert steps(killed) == steps(straight) == list(range(1, 13))
        assert not list(killed.glob("**/*.partial"))
        assert [p.name for p in (killed / "checkpoints").iterdir()] == ["step_00000012"]
        if kills.total() >= KILLS:
            break
    print(f"\n{script}: {kills.total()} kills: {dict(kills)}")
    assert kills.total() >= KILLS


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
