"""archangel.gpu_check at small size, on a CPU: every fact is there, and failures are contained.

No test looks at a time, and none needs a GPU or TRL.
"""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, clean_environment
from torch.autograd import DeviceType

from archangel import gpu_check

GPU_PAGE = ROOT / "archangel" / "GPU.md"


def read_facts(text: str) -> list[dict]:
    """Lines of JSON. Unlike json.loads alone, it refuses NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What `main` sets in os.environ ends with the test."""
    for name in gpu_check.ENVIRONMENT:
        monkeypatch.setenv(name, gpu_check.ENVIRONMENT[name])


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict]:
    """The lines of all stages. They run in one process, because each start takes seconds."""
    out = tmp_path_factory.mktemp("gpu_check")
    command = [sys.executable, "-m", "archangel.gpu_check", "--small", "--here", "--out", str(out)]
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu_check.jsonl").read_text() == done.stdout
    return read_facts(done.stdout)


def find(facts: list[dict], stage: str, fact: str) -> list[dict]:
    """The lines of this fact."""
    return [line for line in facts if line["stage"] == stage and line["fact"] == fact]


def test_stages(facts):
    ends = [line["stage"] for line in facts if line["fact"] == "end"]
    assert ends == ["numerics", "toy", "speed", "trl"]
    for line in facts:
        assert "error" not in line


def test_machine(facts):
    (machine,) = find(facts, "numerics", "machine")
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    (matmul,) = find(facts, "numerics", "matmul")
    assert matmul["flops_per_second"] > 0
    assert matmul["nominal"] is None  # known for some GPUs only
    (copy,) = find(facts, "numerics", "copy")
    assert copy["bytes_per_second"] > 0


def test_numerics(facts):
    """Each number format in each layout, over changing sizes."""
    lines = find(facts, "numerics", "difference")
    for arrangement in (
        ("float32", "padded", False),
        ("bfloat16", "padded", False),
        ("bfloat16", "packed", False),
        ("bfloat16", "packed", True),
        ("float32", "packed", False),
    ):
        dtype = arrangement[0]
        group = []
        for line in lines:
            if (line["dtype"], line["layout"], line["sharded"]) == arrangement:
                group.append(line)
        assert [line["examples"] for line in group] == [2, 4, 8, 4]
        for line in group:
            assert line["seconds"] > 0
            assert line["compiled_graphs"] == 0  # nothing is compiled on a CPU
            if dtype == "float32":
                assert line["logp_mean"] <= line["logp_largest"] < 1e-5
                assert line["gradient_relative"] < 1e-5
            else:  # bfloat16 has about three digits
                assert 1e-5 < line["logp_mean"] < line["logp_largest"] < 0.1
                assert 1e-5 < line["gradient_relative"] < 0.05
    assert len(lines) == 20


def test_toy(facts):
    """On a CPU, both runs are the same, although one of them was resumed."""
    assert find(facts, "toy", "trained")[0]["steps"] == 2
    assert find(facts, "toy", "resumed")[0]["steps"] == 4
    lines = find(facts, "toy", "metrics")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["device"] == line["cpu"]
        assert 0.4 < line["cpu"]["loss"] < 0.6  # 0.5 before training
        assert 0 < line["cpu"]["grad_norm"] < 10
        assert abs(line["cpu"]["reward_margin"]) < 1
    (largest,) = find(facts, "toy", "largest_differences")
    assert (largest["loss"], largest["reward_margin"], largest["grad_norm"]) == (0, 0, 0)
    (export,) = find(facts, "toy", "export")
    assert export["finite_logits"]
    assert 0 < export["largest_weight_change"] < 0.1


def test_speed(facts):
    lines = find(facts, "speed", "steps")
    cases = [line["case"] for line in lines]
    assert cases == [
        "dpo 8192",
        "dpo 16384",
        "kto 16384 other_half",
        "kto 16384 mismatched",
        "sft 16384",
    ]
    first_losses = [math.log(2), math.log(2), 0.5, 0.5, math.log(512)]  # 512: the vocabulary
    for line, first_loss in zip(lines, first_losses):
        assert len(line["seconds"]) == len(line["losses"]) == 4  # warm-up, 2 measured, the last
        assert min(line["seconds"]) <= line["seconds_per_step"] <= max(line["seconds"])
        assert line["losses"][0] == pytest.approx(first_loss, rel=0.02)
        assert line["tokens_per_second"] > 0
        assert line["mfu_of_measured"] > 0
        assert line["mfu_of_nominal"] is None
        assert line["packed"] is True
        assert line["self_check_error"] < 1e-5
        assert "peak_memory_gib" not in line  # of a GPU
        if line["case"].startswith("sft"):  # it has no reference
            assert line["reference_seconds"] is None
            assert "log_ratio_mean" not in line
        else:
            assert line["reference_seconds"] > 0
            assert line["log_ratio_mean"] <= line["log_ratio_largest"] < 1e-5


def test_profile(facts):
    (line,) = find(facts, "speed", "profile")
    assert line["case"] == "dpo 16384"
    assert len(line["top"]) == 14
    times = [row["milliseconds"] for row in line["top"]]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    assert "aten::mm" in [row["name"] for row in line["top"]]


def test_page_names_every_fact(facts):
    """GPU.md says what each line and each value means."""
    page = GPU_PAGE.read_text()
    for line in facts:
        for name in [line["fact"], *line]:
            assert f"`{name}`" in page, name


def test_profile_of_a_gpu(tmp_path, capsys):
    """Operators are sorted by their kernels' time; kernels are summed, annotations are not."""
    rows = [
        ("aten::add", 2, DeviceType.CPU, 1_000, False),
        ("aten::mm", 3, DeviceType.CPU, 5_000, False),
        ("cudaLaunchKernel", 5, DeviceType.CPU, 0, False),
        ("cuLaunchKernelEx", 1, DeviceType.CPU, 0, False),
        ("gemm", 3, DeviceType.CUDA, 5_000, False),
        ("elementwise", 2, DeviceType.CUDA, 1_000, False),
        ("Optimizer.step", 1, DeviceType.CUDA, 6_000, True),
    ]
    averages = []
    for key, count, device_type, microseconds, is_user_annotation in rows:
        averages.append(
            SimpleNamespace(
                key=key,
                count=count,
                device_type=device_type,
                self_device_time_total=microseconds,
                is_user_annotation=is_user_annotation,
            )
        )
    check = gpu_check.Check("speed", True, tmp_path)
    check.device = torch.device("cuda", 0)
    case = gpu_check.SpeedCase("dpo", 8192)
    traces = []
    profiler = SimpleNamespace(key_averages=lambda: averages, export_chrome_trace=traces.append)
    gpu_check.report_profile(check, profiler, case, seconds=0.01)
    assert traces == [str(tmp_path / "dpo_8192.json.gz")]
    (line,) = read_facts(capsys.readouterr().out)
    assert line["kernel_seconds"] == 0.006
    assert line["kernel_launches"] == 6
    assert line["top"][:2] == [
        {"name": "aten::mm", "calls": 3, "milliseconds": 5.0},
        {"name": "aten::add", "calls": 2, "milliseconds": 1.0},
    ]


@pytest.mark.parametrize("wrong", ["logp_mean", "gradient_relative"])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_wrong_numbers_fail(wrong, value, tmp_path):
    differences = {"logp_mean": 0.0, "gradient_relative": 0.0}
    check = gpu_check.Check("numerics", True, tmp_path)
    gpu_check.check_differences(check, differences, "bfloat16", "packed")
    assert not check.failed
    gpu_check.check_differences(check, {**differences, wrong: value}, "bfloat16", "packed")
    assert check.failed


def test_later_stages_run_after_a_failure(tmp_path, monkeypatch, capfd):
    def broken(check: gpu_check.Check) -> None:
        check.report("before", value=float("inf"))
        raise ZeroDivisionError("this stage is broken")

    def sound(check: gpu_check.Check) -> None:
        check.report("after", value=torch.ones(()).item())

    monkeypatch.setattr(gpu_check, "STAGES", {"toy": broken, "speed": sound})
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--here", "--out", str(tmp_path), "--stages", "toy,speed"])
    assert ended.value.code == 1
    lines = read_facts(capfd.readouterr().out)
    assert [line["fact"] for line in lines] == ["before", "stage", "end", "after", "end"]
    assert lines[0]["value"] == "inf"
    assert "this stage is broken" in lines[1]["error"]


def test_stages_apart(tmp_path, monkeypatch, capfd):
    """The first of two processes fails, because this package is no TRL. The second one runs."""
    package = tmp_path / "site" / "trl"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--small", "--stages", "trl,numerics", "--out", str(tmp_path)])
    assert ended.value.code == 1
    lines = read_facts(capfd.readouterr().out)
    errors = [line for line in lines if "error" in line]
    assert {line["stage"] for line in errors} == {"trl"}
    assert "PackageNotFoundError" in errors[0]["error"]
    assert len(find(lines, "numerics", "difference")) == 20
    assert (tmp_path / "numerics.log").exists()


@pytest.mark.parametrize(
    "body, expected",
    [
        ("pass", None),
        ("import sys; sys.exit('wrong')", "exit status 1; stage.log ends with: wrong\n"),
        ("import os; os._exit(3)", "exit status 3; stage.log ends with: "),
    ],
)
def test_run_apart(body, expected, tmp_path):
    command = [sys.executable, "-c", body]
    assert gpu_check.run_apart(command, tmp_path / "stage.log", time_limit=60) == expected


@pytest.mark.parametrize(
    "body, time_limit, reason",
    [
        ("import os; os.abort()", 60, "exit status -6"),
        ("import time; time.sleep(60)", 1.5, "not done after 2 seconds"),
    ],
)
def test_run_apart_crash(body, time_limit, reason, tmp_path):
    """The file says where it crashed, or what it was doing at its limit."""
    path = tmp_path / "stage.log"
    error = gpu_check.run_apart([sys.executable, "-c", body], path, time_limit)
    assert error.startswith(reason)
    assert 'File "<string>", line 1 in <module>' in path.read_text()


def test_no_time_left(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--seconds", "0", "--out", str(tmp_path)])
    assert ended.value.code == 1
    lines = read_facts(capsys.readouterr().out)
    assert [line["stage"] for line in lines] == ["numerics", "toy", "speed", "trl"]
    for line in lines:
        assert "no time left" in line["error"]


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--stages", "numerics,lunch"])
    assert ended.value.code == 2
    assert "'lunch' is not one of numerics, toy, speed, trl, variants" in capsys.readouterr().err
