"""What goes wrong on real machines: a full disk, numbers that are not finite, uneven processes.

HALOS_LONG=1 python -m pytest -s tests/test_hard.py tries all five scripts, every moment at which a
file is written, and 1, 2 and 4 processes on one node and on two.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import common

ROOT = Path(common.__file__).parent
LONG = bool(os.environ.get("HALOS_LONG"))
ALL = ["sft", "dpo", "slic", "ppo_offline", "kto"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (common.TOY / "data" / "train.jsonl").read_text().splitlines()[:16]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(data: Path, out: Path, **more) -> dict:
    basic = {"model": "toy", "data": str(data), "out": str(out), "lr": 1e-4, "warmup_steps": 3}
    return basic | {"batch_size": 8, "max_steps": 4, "save_every": 2} | more


def flags(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run_here(script: str, **values) -> int:
    """Train in this process as the command does. Returns its exit status."""
    module, status = importlib.import_module(script), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        try:
            with common.exit_status():
                module.train(module.Config(**values))
        except SystemExit as ended:
            status = ended.code
    if dist.is_initialized():
        dist.destroy_process_group()
    for number, handler in handlers.items():  # the run's own hold the run, and it its lock
        signal.signal(number, handler)
    gc.collect()
    return status


def error_line(capsys) -> str:
    """The one line that the run ended with; a progress bar may stand before it."""
    written = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert "Traceback" not in "".join(written)
    assert sum(line.startswith("error: ") for line in written) == 1
    return next(line for line in written if line.startswith("error: "))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = (load_file(out / "model.safetensors") for out in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Each script's run that nothing happens to."""
    runs = {}

    def run(script: str) -> Path:
        if script not in runs:
            out = tmp_path_factory.mktemp("straight") / script
            assert run_here(script, **settings(data, out)) == 0
            runs[script] = out
        return runs[script]

    return run


# ------------------------------------------------------------------------- what cannot be written


@contextlib.contextmanager
def full_disk(folder: Path):
    """No file grows beyond 500 bytes, metrics.jsonl beyond a part of its next line."""
    written = folder / "run" / "metrics.jsonl"
    size = written.stat().st_size + 50 if written.exists() else 500
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only(folder: Path):
    """Nothing in the folder can be written; not by root either, which may write anywhere."""
    paths = [folder, *folder.rglob("*")]
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), None
    if os.geteuid() == 0:  # put down for a while: CAP_DAC_OVERRIDE, capability 1
        sets = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        effective, sets[0] = sets[0], sets[0] & ~2
        assert libc.capset(header, sets) == 0
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            if path.exists():
                path.chmod(0o755 if path.is_dir() else 0o644)
        if sets:
            sets[0] = effective
            assert libc.capset(header, sets) == 0


# What writes it, the call from which on it cannot be written, the file that the line names, and the
# steps in the last whole checkpoint.
WRITTEN = {
    "reference column": (common, "add_reference_logps", 1, "reference/", 0),
    "run.json": (common.Run, "write_record", 1, "run/run.json", 0),
    "metrics": (common.Run, "log", 4, "run/metrics.jsonl", 2),
    "checkpoint": (common.Run, "save", 2, "run/checkpoints/step_00000004", 2),
    "model": (common.Run, "export", 1, "run/model.partial", 4),
}
CASES = [("dpo", trouble, what) for trouble in (full_disk, read_only) for what in WRITTEN]
if LONG:
    CASES = [(script, *case[1:]) for script in ALL for case in CASES]
else:  # what is left out differs from what is there by the error's number alone
    CASES = [case for case in CASES if case[1] is full_disk or case[2] in ("metrics", "checkpoint")]


@pytest.mark.parametrize("script, trouble, what", CASES)
def test_what_cannot_be_written_ends_the_run_in_one_line(
    script, trouble, what, data, straight, tmp_path, monkeypatch, capsys
):
    owner, name, number, file, steps = WRITTEN[what]
    if script in ("sft", "slic") and what == "reference column":
        pytest.skip("it has no reference")
    out, write, calls = tmp_path / "run", getattr(owner, name), []

    def in_trouble(*args, **kwargs):
        calls.append(name)
        with trouble(tmp_path) if len(calls) == number else contextlib.nullcontext():
            return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, in_trouble)
        assert run_here(script, **settings(data, out)) == 2
    line = error_line(capsys)
    assert f"error: {tmp_path}/{file}" in line and "cannot be written" in line
    assert ("large" if trouble is full_disk else "ermission denied") in line
    assert len(line) < 400
    saved = [path.name for path in out.glob("checkpoints/step_" + "[0-9]" * 8)]
    assert saved == ([f"step_{steps:08d}"] if steps else [])
    assert not (out / "model.safetensors").exists()

    assert run_here(script, **settings(data, out), resume=True) == 0
    assert_same_weights(straight(script), out)
    assert [record["step"] for record in metrics(out)] == [1, 2, 3, 4]
    assert not list(out.glob("**/*.partial"))


@pytest.mark.skipif(not LONG, reason="the other test of a full disk is shorter")
@pytest.mark.parametrize("script", ALL)
def test_a_disk_that_is_really_full(script, data, straight, tmp_path):
    """9 MiB, in which one checkpoint of 5.6 finds room and a second does not."""
    values = settings(data, tmp_path / "disk" / "run")
    words = shlex.join([sys.executable, str(ROOT / f"{script}.py"), *flags(values), "--resume"])
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=9m tmpfs {disk}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mounted]).returncode:
        pytest.skip("no file system can be mounted here")
    commands = f"{mounted}; {words}; echo status $?; ls {disk}/run/checkpoints; "
    commands += f"mount -o remount,size=99m {disk}; {words}; echo status $?; cp -r {disk}/run "
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", commands + str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    first, _, rest = done.stdout.partition("status 2")
    assert first == "" and rest.split() == ["step_00000002", "step_00000004.partial", "status", "0"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "No space left" in lines[0] and "step_00000004" in lines[0]
    assert "Traceback" not in done.stderr
    assert_same_weights(straight(script), tmp_path / "kept")


def test_a_checkpoint_that_lacks_a_part_is_refused(data, tmp_path, capsys):
    """As when not all of its files were copied to another machine."""
    out = tmp_path / "run"
    assert run_here("sft", **settings(data, out, max_steps=2)) == 0
    (file,) = (out / "checkpoints" / "step_00000002").iterdir()
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-1]):
        file.write_bytes(damaged)
        assert run_here("sft", **settings(data, out), resume=True) == 2
        assert "step_00000002: cannot be read" in error_line(capsys)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    name = "model.lm.gpt_neox.embed_in.weight"
    rows, width = header[name]["shape"]
    sharding[name]["saved_offsets"] = [rows, 0]  # the second of two halves, without the first
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert run_here("sft", **settings(data, out), resume=True) == 2
    assert f"a part of {name} is missing" in error_line(capsys)


# ------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("script", ALL if LONG else ["kto"])
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_examples(
    script, what, data, tmp_path, monkeypatch, capsys
):
    """Of one example the loss is not a number, or its gradient alone."""
    module, out, places = importlib.import_module(script), tmp_path / "run", []
    losses = module.micro_batch_losses

    def micro_batch_losses(policy, batch, config, run):
        bad = module.global_batch(run.train_set, config, 2)[1]  # comes in the third step
        places[:] = [i for i, example in enumerate(run.train_set) if example is bad]
        for loss, indices, figures in losses(policy, batch, config, run):
            here = torch.tensor([batch[i] is bad for i in indices])
            if what == "loss":
                values = figures["loss"].detach().masked_fill(here, torch.nan)
                figures = figures | {"loss": values}
            yield loss * (torch.nan if here.any() else 1.0), indices, figures

    with monkeypatch.context() as patch:
        patch.setattr(module, "micro_batch_losses", micro_batch_losses)
        assert run_here(script, **settings(data, out, save_every=1, batch_size=4)) == 2
    line, (bad,) = error_line(capsys), places
    assert "step 3: " in line and str(out / "not_finite.jsonl") in line
    rows = [json.loads(line) for line in (out / "not_finite.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    if what == "loss":
        assert f"the loss of 1 of 4 examples is not finite ({bad})" in line
        (row,) = (row for row in rows if row["loss"] == "nan")
        assert row["example"] == bad
    else:
        assert "0 of 4 examples" in line and "norm is nan" in line
        (row,) = (row for row in rows if row["example"] == bad)
    texts = [json.loads(line) for line in data.read_text().splitlines()]
    (text,) = (text for text in texts if text["prompt"] == row["prompt"])
    completions = [text[field] for field in ("chosen", "rejected", "target") if field in text]
    assert all(ids.removesuffix("<|endoftext|>") in completions for ids in row["completions"])
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]
    assert [record["step"] for record in metrics(out)] == [1, 2]
    assert not (out / "model.safetensors").exists()


# Some three times what was measured: how far apart losses are on average, of how far they move.
APART = {"sft": 0.005, "kto": 0.01, "slic": 0.015, "ppo_offline": 0.015, "dpo": 0.03}


@pytest.mark.parametrize("script", ALL if LONG else ["kto"])
def test_bfloat16_and_float32_stay_together_for_50_steps(script, tmp_path):
    """Losses differ by at most the share above of how far they move, one step's by five times that.

    bfloat16 keeps 8 bits, so a logit near 8 is off by up to 0.03, a log-probability by some 1e-2
    nats a token, of either sign: an error that hardly grows, since the weights are float32 in both
    runs. Measured on one machine, on average and in the worst step: SFT 0.1% and 0.6%, KTO 0.3% and
    1.9%, SLiC 0.5% and 1.4%, PPO 0.6% and 2.3%, DPO 0.3% and 1.2% (1.0% and 7% with a reference
    that KTO had computed, in other batches). Three times the larger leaves room for other
    processors. With weights in bfloat16 too, KTO's losses were 2.0% apart, and 7%.
    """
    path, runs = tmp_path / "rows.jsonl", []
    lines = (common.TOY / "data" / "train.jsonl").read_text().splitlines()[:200]
    path.write_text("\n".join(lines) + "\n")
    for dtype in ("float32", "bfloat16"):
        values = settings(path, tmp_path / dtype, dtype=dtype, max_steps=50, save_every=0)
        assert run_here(script, **values | {"warmup_steps": 10}) == 0
        runs.append(torch.tensor([record["loss"] for record in metrics(tmp_path / dtype)]))
    moved = (runs[0] - runs[0][0]).abs().max()
    apart = (runs[0] - runs[1]).abs() / moved
    print(f"\n{script}: moved {moved:.3g}, apart {apart.mean():.2%} on average, {apart.max():.2%}")
    assert 0 < apart.mean() < APART[script] and apart.max() < 5 * APART[script]


# ---------------------------------------------------------------------------------- the processes


def torchrun(*words: str, nodes: int = 1, processes: int = 2) -> list[subprocess.CompletedProcess]:
    """The command under one agent, or under two that stand for two nodes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if nodes == 1:
        launcher += ["--standalone"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += [f"--nnodes={nodes}", "--rdzv_backend=c10d"]
        launcher += [f"--rdzv_endpoint=127.0.0.1:{port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    agents = [
        subprocess.Popen(
            [*launcher, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for _ in range(nodes)
    ]
    done = []
    for agent in agents:
        errors = agent.communicate(timeout=240)[1].decode()
        done.append(subprocess.CompletedProcess(agent.args, agent.returncode, stderr=errors))
    return done


GRIDS = [(2, 2)] if not LONG else [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]  # nodes, processes each


@pytest.mark.parametrize("nodes, processes", GRIDS)
@pytest.mark.parametrize("script", ALL if LONG else ["dpo"])
def test_uneven_data_on_any_number_of_processes(script, nodes, processes, tmp_path):
    """10 pairs in batches of 4: the last has fewer examples than there are processes.

    One text is as long as 20 others, so that its process is busy with it alone.
    """
    rows = [json.loads(line) for line in (common.TOY / "data/train.jsonl").open()][:10]
    rows[3]["chosen"] *= 20
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = settings(data, tmp_path / "several", dtype="float64", batch_size=4, max_steps=6)
    several |= {"save_every": 0, "micro_batch_tokens": 800}
    for agent in torchrun(
        str(ROOT / f"{script}.py"), *flags(several), nodes=nodes, processes=processes
    ):
        assert agent.returncode == 0, agent.stderr[-3000:]
    alone = several | {"out": str(tmp_path / "alone"), "micro_batch_tokens": 8192}
    assert run_here(script, **alone) == 0
    ours, theirs = (metrics(tmp_path / name) for name in ("several", "alone"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for name in ("loss", "grad_norm"):
        a, b = (torch.tensor([record[name] for record in run]).double() for run in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bfloat16_on_two_processes_packs_rows_and_moves_every_weight(tmp_path):
    """FSDP handles what a module is given where it computes in bfloat16, and only there."""
    values = settings("toy", tmp_path / "run", dtype="bfloat16", kl="mismatched", max_steps=2)
    values |= {"save_every": 0, "warmup_steps": 0, "lr": 1e-3}
    (agent,) = torchrun(str(ROOT / "kto.py"), *flags(values))
    assert agent.returncode == 0, agent.stderr[-3000:]
    assert json.loads((tmp_path / "run/run.json").read_text())["packed_rows"] is True
    before = load_file(common.TOY / "model/model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    assert not [name for name in before if torch.equal(after[name].float(), before[name].float())]


GATHERS = """
import json, sys
sys.path.insert(0, ROOT)
import common, dpo, torch

config = common.parse(dpo.Config, "")
run = common.Run(config)
rows = common.read_rows(config.data, "train", dpo.FORMS)
examples = dpo.make_examples(rows, run.tokenizer, config)
run.start(examples, [], 1)
run.packed, policy, found = False, common.load_policy(run), []
(micro,) = common.micro_batches(examples[:4], run)
for common.CHUNK in (2**27, 2**12):
    with torch.profiler.profile() as profile:
        policy(micro).sum().backward()
    gathers = sum("allgather" in event.name for event in profile.events())
    found.append([len(micro.targets) * len(run.tokenizer) / common.CHUNK, gathers])
if run.rank == 0:
    with open(config.out + ".json", "w") as file:
        json.dump(found, file)
"""


def test_the_head_is_gathered_once_a_pass_and_not_once_a_chunk(tmp_path):
    """Two processes, four examples: all-gathers with one chunk of the head and with many."""
    program = tmp_path / "gathers.py"
    program.write_text(f"ROOT = {str(ROOT)!r}\n{GATHERS}")
    (agent,) = torchrun(str(program), *flags(settings("toy", tmp_path / "run")))
    assert agent.returncode == 0, agent.stderr[-3000:]
    (few, whole), (many, in_chunks) = json.loads((tmp_path / "run.json").read_text())
    assert few < 1 and many > 8  # chunks
    assert in_chunks == whole > 0


BAD_DATA = {  # what process 1 finds in its file, and what is said
    "a bad row": ('{"prompt": "Q:"}', "rows1.jsonl, row 17: has ['prompt']"),
    "another row": (
        '{"prompt": "Q:", "chosen": " yes", "rejected": " no"}',
        "rows0.jsonl: is not the same for all processes",
    ),
}


@pytest.mark.parametrize("what", BAD_DATA if LONG else ["another row"])
def test_data_that_differ_between_processes_end_all_of_them(what, data, tmp_path):
    """As on two nodes of which one has another copy of the file, or a damaged one."""
    row, said = BAD_DATA[what]
    for rank, more in enumerate(("", row)):
        (tmp_path / f"rows{rank}.jsonl").write_text(data.read_text() + more)
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import common, kto\n"
        "sys.argv = [word.replace('RANK', os.environ['RANK']) for word in sys.argv]\n"
        "with common.exit_status():\n"
        "    kto.train(common.parse(kto.Config, ''))\n"
    )
    values = settings(tmp_path / "rowsRANK.jsonl", tmp_path / "run")
    (agent,) = torchrun(str(wrapper), *flags(values))
    assert agent.returncode != 0
    assert "error: " in agent.stderr and said in agent.stderr, agent.stderr[-3000:]
    assert not (tmp_path / "run").exists()
