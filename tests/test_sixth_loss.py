"""A loss of one's own, as the README describes it: IPO, made from dpo.py by changing a few lines.

That it shares its loop and its settings with the other scripts stands in test_alike.py; what holds
for every loss, in test_losses.py.
"""

import ast
import difflib

import pytest
from helpers import ROOT, assert_same_metrics, read_metrics, run_forked, write_toy_folder
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from sixth_loss.ipo import ipo_loss
from test_losses import exactly, gradients

IPO = "tests/sixth_loss/ipo"
nats = st.floats(-300, 300)
betas = st.floats(0.01, 2)


def code(script: str) -> list[str]:
    """The lines of a script's code, without docstrings and comments."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_docstring and ast.get_docstring(node):
            del node.body[0]
    return [line for line in ast.unparse(tree).splitlines() if line]


def test_ipo_is_dpo_with_another_loss():
    """Apart from its name, only the loss differs, and it has no value function."""
    dpo = [line.replace("dpo", "ipo") for line in code("dpo")]
    lines = difflib.unified_diff(dpo, code(IPO), lineterm="", n=0)
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    assert changed == [
        "-    return -torch.nn.functional.logsigmoid(beta * margin)",
        "-def ipo_value(reward_chosen: torch.Tensor, reward_rejected: torch.Tensor) "
        "-> torch.Tensor:",
        "-    return torch.nn.functional.logsigmoid(reward_chosen - reward_rejected)",
        "+    return (margin - 1 / (2 * beta)) ** 2",
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "loss", "slope"),
    [
        (0.0, 0.0, 0.1, 25.0, -10.0),  # policy and reference agree: 1 / (2 * beta) from the target
        (2.0, -1.0, 0.25, 1.0, 2.0),  # 3 apart, where the target is 2
        (1.5, 0.5, 0.25, 1.0, -2.0),  # 1 apart, where the target is 2
        (-1.0, -3.0, 0.25, 0.0, 0.0),  # at the target
    ],
)
def test_ipo_by_hand(chosen, rejected, beta, loss, slope):
    # Log-ratios over references of -7 and -9.
    found = gradients(ipo_loss, chosen - 7, rejected - 9, -7.0, -9.0, beta=beta)
    assert found == (exactly(loss), [slope, -slope, -slope, slope])


@given(nats, nats, nats, nats, betas)
def test_ipo_gradient(chosen, rejected, reference_chosen, reference_rejected, beta):
    values = (chosen, rejected, reference_chosen, reference_rejected)
    loss, slopes = gradients(ipo_loss, *values, beta=beta)
    difference = (chosen - reference_chosen) - (rejected - reference_rejected)
    missing = 1 / (2 * beta) - difference
    assert loss == approx(missing**2, rel=1e-9, abs=1e-9)
    size = 2 * missing
    assert slopes == approx([-size, size, size, -size], rel=1e-9, abs=1e-9)
    if missing > 1e-9:  # short of the target, the chosen one becomes more likely
        assert slopes[0] < 0 < slopes[1]
    if missing < -1e-9:  # beyond the target, less
        assert slopes[1] < 0 < slopes[0]


def test_ipo_trains_and_resumes(tmp_path):
    data = write_toy_folder(tmp_path, train=72, test=24)
    settings = {"model": "toy", "data": data, "lr": 5e-5, "warmup_steps": 3, "dtype": "float64"}
    settings |= {"max_steps": 6, "batch_size": 12, "eval_every": 3}
    run_forked(IPO, tmp_path / "straight", **settings)
    straight = read_metrics(tmp_path / "straight")
    # Policy and reference agree before the first step, and beta is 0.1: 1 / (2 * 0.1), squared.
    assert straight[0]["eval_loss"] == approx(25, rel=1e-5)
    assert straight[0]["eval_reward_margin"] == approx(0, abs=1e-5)
    assert straight[-1]["eval_loss"] < 25
    assert straight[-1]["eval_reward_margin"] > 0.02

    run_forked(IPO, tmp_path / "resumed", **{**settings, "max_steps": 3})
    run_forked(IPO, tmp_path / "resumed", processes=2, resume=True, **settings)
    assert_same_metrics(straight, read_metrics(tmp_path / "resumed"), 1e-12)
