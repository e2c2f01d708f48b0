"""What the scripts share is the same text in all of them.

The scripts repeat each other on purpose, so that each reads alone. This test keeps the copies
equal. `python tests/test_alike.py` prints every difference, the allowed ones too.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["kto", "dpo", "slic", "ppo_offline", "sft"]
# A script made from another one: what its parent shares with other scripts, it shares with its
# parent.
COPIES = {"tests/sixth_loss/ipo": "dpo"}

# The blocks of text that scripts share, by the names that block() gives them. The first script of
# a list is what the others are compared with. What is not named here is a script's own.
SHARED = {
    "Config": [SCRIPTS],
    "make_examples": [["kto", "ppo_offline"]],
    "make_schedule": [["kto", "ppo_offline"], ["dpo", "slic", "sft"]],
    "labels_of": [["kto", "ppo_offline"]],
    "train, to the loop": [SCRIPTS],
    "train, after the gradient": [SCRIPTS],
    "summarize": [["dpo"]],
    "evaluate": [["dpo"]],
}

# Without a reference model there are no reference log-probabilities, and no check of the first
# step. The evaluation before training cannot take the policy for the reference model.
NO_REFERENCE_BEFORE = [
    "-    used = sorted(set(itertools.chain.from_iterable(schedule)))",
    '-    common.add_reference_logps(policy, train_set, used, "train", run)',
    '-    common.add_reference_logps(policy, test_set, range(len(test_set)), "test", run)',
    "-    # Until here the policy is the reference model, also when a run is resumed.",
    "-        run.log(0, evaluate(None, test_set, config, run))",
    "+        run.log(0, evaluate(policy, test_set, config, run))",
]
NO_REFERENCE_AFTER = [
    "-        if step == 1:",
    "-            common.check_first_step(log_ratios, num_completion_tokens, run)",
]


def other_summary(arguments: str) -> list[str]:
    """Each loss has its own metrics."""
    return [
        "-        metrics = summarize(losses, log_ratios, kl, desirable, config)",
        f"+        metrics = summarize({arguments})",
    ]


# (block, script): the lines in which a script may differ from the first one; - for a line of the
# first script, + for one of its own. All of them must be found.
ALLOWED = {
    ("make_examples", "ppo_offline"): [
        '-    if config.kl == "mismatched":',
        "-        examples.mismatched = draw_mismatched(examples, config)",
    ],
    ("train, to the loop", "slic"): NO_REFERENCE_BEFORE,
    ("train, to the loop", "sft"): NO_REFERENCE_BEFORE,
    ("train, to the loop", "ppo_offline"): [  # it has a value head
        "-    policy = common.load_policy(run)",
        "+    policy = common.load_policy(run, PolicyWithValues)",
        "+    policy.reset_value_head()",
        "-        run.log(0, evaluate(None, test_set, config, run))",
        "+        run.log(0, evaluate(policy, test_set, config, run))",
    ],
    ("train, after the gradient", "dpo"): other_summary("losses, log_ratios, config"),
    ("train, after the gradient", "slic"): (
        other_summary("losses, margins, config") + NO_REFERENCE_AFTER
    ),
    ("train, after the gradient", "ppo_offline"): other_summary(
        "sums, desirable, num_completion_tokens"
    ),
    ("train, after the gradient", "sft"): (
        other_summary("losses, num_completion_tokens") + NO_REFERENCE_AFTER
    ),
    ("evaluate", "tests/sixth_loss/ipo"): [
        "-        batch_losses = dpo_loss(",
        "+        batch_losses = ipo_loss(",
    ],
}

# What a script has, in this order.
ORDER = [
    '"""',
    "import common",
    "FORMATS",
    "class Config:",
    "def NAME_loss(",
    "def make_examples(",
    "def make_schedule(",
    "def summarize(",
    "def evaluate(",
    "def train(",
    'if __name__ == "__main__":',
]
MAIN = "    common.run_script(train, Config, __doc__)\n"


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def block(script: str, name: str) -> list[str]:
    """The lines of a block of text that scripts share."""
    if name == "Config":
        return shared_settings(script)
    if name == "train, to the loop":
        lines = function(script, "train")
        return lines[: find_line(lines, "    for step in ") + 1]
    if name == "train, after the gradient":
        lines = function(script, "train")
        return lines[find_line(lines, "        grad_norm = ") :]
    return function(script, name)


def find_line(lines: list[str], start: str) -> int:
    """The only line that starts like this."""
    found = [number for number, line in enumerate(lines) if line.startswith(start)]
    assert len(found) == 1, f"{len(found)} lines start with {start!r}"
    return found[0]


def function(script: str, name: str) -> list[str]:
    """The lines of a top-level function, with decorators and docstring."""
    text = source(script)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            start = node.lineno
            for decorator in node.decorator_list:
                start = min(start, decorator.lineno)
            return text.splitlines()[start - 1 : node.end_lineno]
    raise AssertionError(f"{script}.py has no function {name}")


def shared_settings(script: str) -> list[str]:
    """The lines of Config before the comment "NAME's own", or before its checks if it has none.

    The default of `out`, which names the script, is left out.
    """
    lines = source(script).splitlines()
    start = lines.index("class Config:")
    settings = []
    for line in lines[start:]:
        if re.fullmatch(r"    # .*'s own", line) or "def __post_init__" in line:
            break
        settings.append(re.sub(r'"runs/\w+"', '"runs/..."', line))
    while settings[-1] == "":
        settings.pop()
    return settings


def difference(theirs: list[str], ours: list[str]) -> list[str]:
    """The lines that differ, with - for those of the first and + for those of the second."""
    lines = list(difflib.unified_diff(theirs, ours, lineterm="", n=0))[2:]
    return [line for line in lines if not line.startswith("@@")]


def comparisons() -> list[tuple[str, str, str]]:
    """A block, the script that it is compared with, and the script: all that must be alike."""
    found = []
    for name, groups in SHARED.items():
        for group in groups:
            for script in group[1:]:
                found.append((name, group[0], script))
            for copy, parent in COPIES.items():
                if parent in group:
                    found.append((name, parent, copy))
    return found


@pytest.mark.parametrize("name, first, script", comparisons())
def test_shared_text(name, first, script):
    found = difference(block(first, name), block(script, name))
    assert found == ALLOWED.get((name, script), []), (
        f"{name}: {script}.py differs from {first}.py (python tests/test_alike.py):\n"
        + "\n".join(found)
    )


def test_allowed_is_used():
    """A mistyped name in ALLOWED would allow nothing, and not be noticed."""
    compared = {(name, script) for name, _, script in comparisons()}
    assert ALLOWED.keys() <= compared


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_text_is_all_there(name):
    """A block that ends too early would compare nothing."""
    assert block(name, "Config")[-1].startswith("    activation_checkpointing:")
    assert block(name, "train, to the loop")[0].startswith("def train(")
    assert len(block(name, "train, to the loop")) > 20
    assert block(name, "train, after the gradient")[-1] == "    run.export(policy)"


@pytest.mark.parametrize("script", [*SCRIPTS, *COPIES])
def test_order(script):
    text = source(script)
    lines = text.splitlines()
    places = []
    for landmark in ORDER:
        landmark = landmark.replace("NAME", script.rpartition("/")[2])
        found = [number for number, line in enumerate(lines) if line.startswith(landmark)]
        assert found, f"no {landmark}"
        places.append(found[0])
    assert places[0] == 0
    assert places == sorted(places)
    assert text.endswith(MAIN)


if __name__ == "__main__":
    for name, first, script in comparisons():
        print(f"\n{name}: {first}.py and {script}.py")
        print("\n".join(difference(block(first, name), block(script, name))) or "the same")
