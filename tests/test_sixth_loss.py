"""The README's example of a loss of one's own, IPO: how little of dpo.py it changes, and its loss.

What comes for free stands where the five scripts' tests are: test_alike.py and test_losses.py.
"""

import ast
import importlib
import re

import pytest
import test_train
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from sixth_loss.ipo import ipo_loss
from test_alike import difference, source
from test_losses import exactly, gradients

IPO = "tests/sixth_loss/ipo"
nats = st.floats(-300, 300)
betas = st.floats(0.01, 2)


def code(script: str) -> list[str]:
    """A script's code without docstrings and comments."""
    tree = ast.parse(source(script))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return [line for line in ast.unparse(tree).splitlines() if line]


def test_ipo_is_dpo_with_four_other_lines_of_code_and_one_function_less():
    """All within what the README names: out, the loss, its value function, its call."""
    found = difference(code("dpo"), code(IPO))
    changed = [line for line in found if not line.startswith(("-def", "+def"))]
    assert changed == [
        "-    out: str = 'runs/dpo'",
        "+    out: str = 'runs/ipo'",
        "-    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))",
        "-    return torch.nn.functional.logsigmoid(reward_chosen - reward_rejected)",
        "+    return (chosen - rejected - 1 / (2 * beta)) ** 2",
        "-        losses = dpo_loss(*policy_logps.unbind(1), *reference_logps.unbind(1), "
        "beta=config.beta)",
        "+        losses = ipo_loss(*policy_logps.unbind(1), *reference_logps.unbind(1), "
        "beta=config.beta)",
    ]
    defined = [re.match(r"(.def \w+)\(", line).group(1) for line in found if line not in changed]
    assert defined == ["-def dpo_loss", "+def ipo_loss", "-def dpo_value"]


def section() -> str:
    readme = (test_train.ROOT / "README.md").read_text()
    return re.search(r"^## Your own loss\n(.*?)^## ", readme, re.S | re.M).group(1)


def test_readme_names_the_lists_that_the_tests_read():
    assert len(section().strip().splitlines()) <= 15
    named = [
        (names, file)
        for names, file in re.findall(r"((?:`[A-Z]+`(?: and )?)+) in `tests/(\w+)\.py`", section())
    ]
    assert len(named) == 3
    for names, file in named:
        for name in re.findall(r"\w+", names.replace(" and ", " ")):
            assert hasattr(importlib.import_module(file), name), name
    for name in re.findall(r"`(tests/[\w/.]+)`", section()):
        assert (test_train.ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "loss", "slope"),
    [
        (0.0, 0.0, 0.1, 25.0, -10.0),  # policy and reference agree: 1 / (2 * beta) from the target
        (2.0, -1.0, 0.25, 1.0, 2.0),  # 3 apart where 2 is wanted
        (1.5, 0.5, 0.25, 1.0, -2.0),  # 1 apart where 2 is wanted
        (-1.0, -3.0, 0.25, 0.0, 0.0),  # at the target
    ],
)
def test_ipo_by_hand(chosen, rejected, beta, loss, slope):
    # Log-ratios over references of -7 and -9.
    found = gradients(ipo_loss, chosen - 7, rejected - 9, -7.0, -9.0, beta=beta)
    assert found == (exactly(loss), [slope, -slope, -slope, slope])


@given(nats, nats, nats, nats, betas)
def test_ipo_gradient(chosen, rejected, reference_chosen, reference_rejected, beta):
    policy, reference = (chosen, rejected), (reference_chosen, reference_rejected)
    loss, slopes = gradients(ipo_loss, *policy, *reference, beta=beta)
    apart = (chosen - reference_chosen) - (rejected - reference_rejected)
    missing = 1 / (2 * beta) - apart
    assert loss == approx(missing**2, rel=1e-9, abs=1e-9)
    size = 2 * missing
    assert slopes == approx([-size, size, size, -size], rel=1e-9, abs=1e-9)
    if abs(missing) > 1e-9:  # short of the target the chosen one goes up, beyond it down
        assert (slopes[0] < 0 < slopes[1]) == (missing > 0) != (slopes[1] < 0 < slopes[0])


data, one_thread = test_train.data, test_train.one_thread  # fixtures


def test_ipo_trains_and_its_margin_grows(data, tmp_path):
    values = test_train.settings(data, tmp_path / "ipo", lr=5e-5)
    records = test_train.run_here("sixth_loss.ipo", **values)
    # Policy and reference agree before the first step, and beta is 0.1: 1 / (2 * 0.1), squared.
    assert records[0]["eval_loss"] == approx(25, rel=1e-5)
    assert records[0]["eval_reward_margin"] == approx(0, abs=1e-5)
    assert records[-1]["eval_loss"] < 25 and records[-1]["eval_reward_margin"] > 0.02


def test_ipo_resumes_to_the_same_bits(data, tmp_path):
    """The trainers' own test, as it stands."""
    test_train.test_resumed_run_ends_in_the_same_bits("sixth_loss.ipo", "rmsprop", data, tmp_path)
