"""What the five scripts share is the same text in all of them.

The copies are on purpose: each script reads alone. This test keeps them from drifting apart.
`python tests/test_alike.py` shows every difference, the allowed ones too.
"""

import ast
import difflib
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["kto", "dpo", "slic", "ppo_offline", "sft"]

# Which scripts share a function to the letter. The first of each line is what the others are
# compared with. What is not named here is the script's own: its loss, its value functions, what
# makes a micro-batch a loss, what it says of a step.
SHARED = {
    "evaluate": SCRIPTS,
    "train": SCRIPTS,
    "steps_per_epoch": ["dpo", "slic", "sft"],  # passes over the rows ...
    "global_batch": ["dpo", "slic", "sft"],
    "classes": ["kto", "ppo_offline"],  # ... or over two classes, half a batch each
    "steps_per_epoch ": ["kto", "ppo_offline"],
    "global_batch ": ["kto", "ppo_offline"],
    "summarise": ["dpo", "slic"],
}
# A script made from another: what its parent shares with anyone, it shares with its parent.
COPIES = {"tests/sixth_loss/ipo": "dpo"}
CHECK = "    common.self_check(policy, {}, run)"
PARTNERED = f"-{CHECK.format('with_partners(train_set + test_set)')}"
PLAIN = f"+{CHECK.format('train_set + test_set')}"
LOOP = "-    for examples in (with_partners(train_set), with_partners(test_set)):"
# What the mismatched reference point is taken over is checked, and has a reference, as well.
PARTNERS = [PARTNERED, LOOP, PLAIN, "+    for examples in (train_set, test_set):"]
REFERENCE = [
    PARTNERED,
    LOOP,
    "-        common.add_reference_logps(policy, examples, run)",
    PLAIN,
]
ALLOWED = {  # (function, script): the lines in which it may differ, and why
    ("train", "dpo"): PARTNERS,
    ("train", "slic"): REFERENCE,  # a loss without a reference model
    ("train", "sft"): REFERENCE,
    ("train", "ppo_offline"): [  # its policy has a value head
        "-    policy = common.load_policy(run)",
        *PARTNERS[:2],
        "+    policy = common.load_policy(run, value_head=True)",
        *PARTNERS[2:],
    ],
}

SIZES = {"kto": 195, "dpo": 130, "slic": 130, "ppo_offline": 190, "sft": 110, "common": 260}
SIZES |= {copy: SIZES[parent] for copy, parent in COPIES.items()}


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def function(script: str, name: str) -> list[str]:
    """The lines of a top-level function, decorators and docstring included."""
    text = source(script)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return text.splitlines()[first - 1 : node.end_lineno]
    raise AssertionError(f"{script}.py has no function {name}")


def shared_settings(script: str) -> list[str]:
    """The lines of Config up to the comment that opens the script's own settings, or its checks."""
    lines = source(script).splitlines()
    start = lines.index("class Config:")
    stop = next(
        i
        for i in range(start, len(lines))
        if re.search("# .*'s own$", lines[i]) or "def __post_init__" in lines[i]
    )
    block = [line for line in lines[start:stop] if line]
    return [re.sub(r'"runs/\w+"', '"runs/..."', line) for line in block]


def difference(theirs: list[str], ours: list[str]) -> list[str]:
    """The lines that differ, with - for what the first has and + for what the second has."""
    lines = list(difflib.unified_diff(theirs, ours, lineterm="", n=0))[2:]
    return [line for line in lines if not line.startswith("@@")]


PAIRS = [
    (name.strip(), scripts[0], script) for name, scripts in SHARED.items() for script in scripts[1:]
]
PAIRS += [
    (name.strip(), parent, copy)
    for copy, parent in COPIES.items()
    for name, scripts in SHARED.items()
    if parent in scripts
]


@pytest.mark.parametrize("name, first, script", PAIRS)
def test_shared_function_is_the_same_text(name, first, script):
    found = difference(function(first, name), function(script, name))
    assert found == ALLOWED.get((name, script), []), (
        f"{name} of {script}.py differs from {first}.py's (python tests/test_alike.py):\n"
        + "\n".join(found)
    )


@pytest.mark.parametrize("script", [*SCRIPTS[1:], *COPIES])
def test_shared_settings_are_the_same_text(script):
    found = difference(shared_settings(SCRIPTS[0]), shared_settings(script))
    assert not found, "settings differ (python tests/test_alike.py):\n" + "\n".join(found)


@pytest.mark.parametrize("script", [*SCRIPTS, *COPIES])
def test_a_script_reads_in_the_one_order(script):
    text = source(script)
    landmarks = [
        '"""',
        "import common",
        "class Config:",
        f"def {Path(script).name}_loss(",
        "def make_examples(",
    ]
    landmarks += ["def global_batch(", "def micro_batch_losses(", "def summarise(", "def evaluate("]
    landmarks += ["def train(", 'if __name__ == "__main__":']
    places = [text.index(landmark) for landmark in landmarks]
    assert places == sorted(places)
    tail = "    with common.exit_status():\n        train(common.parse(Config, __doc__))\n"
    assert text.endswith(tail)
    # Alone but for common: nothing else of the project is imported.
    imported = re.findall(r"^(?:from|import) (\w+)", text, re.M)
    assert not {"archangel", *SCRIPTS} & set(imported)


def code_lines(script: str) -> int:
    """Lines that hold code: no docstring, no comment, no blank."""
    text, lines = source(script), set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("script, most", SIZES.items())
def test_a_file_still_fits_in_a_head(script, most):
    assert code_lines(script) <= most, "look for what should not be there"


if __name__ == "__main__":
    for name, first, script in PAIRS:
        print(f"\n{name}: {first}.py and {script}.py")
        print("\n".join(difference(function(first, name), function(script, name))) or "the same")
    for script in SIZES:
        print(f"{script}.py: {code_lines(script)} lines of code")
    for script in [*SCRIPTS[1:], *COPIES]:
        print(f"\nConfig: {SCRIPTS[0]}.py and {script}.py")
        print("\n".join(difference(shared_settings("kto"), shared_settings(script))) or "the same")
