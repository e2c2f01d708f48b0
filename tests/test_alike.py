"""What the scripts share is the same text in all of them.

The scripts repeat each other on purpose, so that each reads alone. This test keeps the copies
equal. `python tests/test_alike.py` prints every difference, the allowed ones too.

A script that moves to the new core moves from OLD_SCRIPTS to SCRIPTS, and gets its lines in
ALLOWED.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["kto", "dpo"]  # on common.py
OLD_SCRIPTS = ["slic", "ppo_offline", "sft"]  # still on common_v1.py
# A script made from another one: what its parent shares with other scripts, it shares with its
# parent.
COPIES = {"tests/sixth_loss/ipo": "slic"}

# The blocks of text that scripts share, by the names that block() gives them. The first script of
# a list is what the others are compared with. What is not named here is a script's own.
SHARED = {
    "Config": [SCRIPTS, OLD_SCRIPTS],
    "train, to the loop": [SCRIPTS],
    "train, after the gradient": [SCRIPTS],
    "train": [OLD_SCRIPTS],
    "evaluate": [OLD_SCRIPTS],
    "steps_per_epoch": [["slic", "sft"]],
    "global_batch": [["slic", "sft"]],
    "summarise": [["slic"]],
}

# (block, script): the lines in which a script may differ from the first one; - for a line of the
# first script, + for one of its own. All of them must be found.
ALLOWED = {
    ("train, after the gradient", "dpo"): [  # its metrics have no reference point
        "-        metrics = summarize(losses, log_ratios, kl, desirable, config)",
        "+        metrics = summarize(losses, log_ratios, config)",
    ],
    ("train", "ppo_offline"): [  # it has a value head and a reference model
        "-    policy = common.load_policy(run)",
        "+    policy = common.load_policy(run, value_head=True)",
        "+    for examples in (train_set, test_set):",
        "+        common.add_reference_logps(policy, examples, run)",
    ],
    ("train", "tests/sixth_loss/ipo"): [  # it has a reference model
        "+    for examples in (train_set, test_set):",
        "+        common.add_reference_logps(policy, examples, run)",
    ],
}

# What a script has, in this order.
ORDER = [
    '"""',
    "import common",
    "class Config:",
    "def NAME_loss(",
    "def make_examples(",
    "def make_schedule(",
    "def evaluate(",
    "def train(",
    'if __name__ == "__main__":',
]
OLD_ORDER = [
    '"""',
    "import common_v1 as common",
    "class Config:",
    "def NAME_loss(",
    "def make_examples(",
    "def global_batch(",
    "def micro_batch_losses(",
    "def summarise(",
    "def evaluate(",
    "def train(",
    'if __name__ == "__main__":',
]
MAIN = "    common.run_script(train, Config, __doc__)\n"
OLD_MAIN = "    with common.exit_status():\n        train(common.parse(Config, __doc__))\n"


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


def all_scripts() -> list[tuple[str, bool]]:
    """Every script, and whether it is on the new core."""
    found = []
    for script in [*SCRIPTS, *OLD_SCRIPTS, *COPIES]:
        root = COPIES.get(script, script)
        found.append((script, root in SCRIPTS))
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


@pytest.mark.parametrize("name", ["kto", "dpo"])
def test_shared_text_is_all_there(name):
    """A block that ends too early would compare nothing."""
    assert block(name, "Config")[-1].startswith("    activation_checkpointing:")
    assert block(name, "train, to the loop")[0].startswith("def train(")
    assert len(block(name, "train, to the loop")) > 20
    assert block(name, "train, after the gradient")[-1] == "    run.export(policy)"


@pytest.mark.parametrize("script, is_new", all_scripts())
def test_order(script, is_new):
    text = source(script)
    lines = text.splitlines()
    places = []
    for landmark in ORDER if is_new else OLD_ORDER:
        landmark = landmark.replace("NAME", script.rpartition("/")[2])
        found = [number for number, line in enumerate(lines) if line.startswith(landmark)]
        assert found, f"no {landmark}"
        places.append(found[0])
    assert places[0] == 0
    assert places == sorted(places)
    assert text.endswith(MAIN if is_new else OLD_MAIN)


if __name__ == "__main__":
    for name, first, script in comparisons():
        print(f"\n{name}: {first}.py and {script}.py")
        print("\n".join(difference(block(first, name), block(script, name))) or "the same")
