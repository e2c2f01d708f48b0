"""Commands of the README and of the pages run or, where they need GPUs or the hub, are parsed."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from archangel import benchmark, kto_variants, real_model, suite
from archangel.run import MODELS, parse_args

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in sorted((ROOT / "archangel").glob("*.md"))}
PAGES[ROOT / "README.md"] = README
TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}


def commands(text: str) -> list[str]:
    """The lines of all blocks of shell commands."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            lines.append(line.split("  #")[0].strip())
    return lines


COMMANDS = [line for text in PAGES.values() for line in commands(text)]


def marked(name: str) -> str:
    """The one command under a marker."""
    return re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", README).group(1)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project, to run in."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def run(command: str, folder: Path) -> str:
    """Run a command by this Python."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_first_command_trains_and_shows_replies(checkout):
    steps = marked("first command").split(" && ")
    assert steps[:3] == marked("test command").split(" && ")[:3]  # one virtual environment for both
    assert "pip install -r requirements.txt" in steps
    training, sampling = steps[-2:]
    shown = run(training + " --max_steps 3", checkout)  # the whole of it is a minute's work
    assert "the model is in runs/kto" in shown and "held out, after step 3" in shown
    shown = run(sampling + " --n 4", checkout)
    assert "before" in shown and "after" in shown and "win rate" in shown


def test_sampling_and_judging(checkout):
    """Of the shipped model alone, and fewer prompts."""
    for line in COMMANDS:
        if "archangel.sample toy" in line or "archangel.judge runs/kto.jsonl" in line:
            shown = run(line.replace("--n 500", "--n 4").replace("runs/kto.jsonl ", ""), checkout)
    assert "95% interval" in shown


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.count("\neval ") == 1
    only_print = re.sub(r"\n(eval|ruff) .*", "\n", script).replace('$(dirname "$0")/..', str(ROOT))
    done = subprocess.run(["bash", "-c", only_print], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == marked("test command")
    assert marked("test command").endswith("python -m pytest -n 2 --dist loadfile")


def test_copying_a_loss_needs_torch_alone(checkout):
    command = re.search(r'`(python -c "import inspect, kto; .*?")`', README)[1]
    namespace = {}
    exec("import torch", namespace)
    exec(run(command, checkout), namespace)
    zero = namespace["torch"].zeros(2)
    labels = namespace["torch"].tensor([True, False])
    assert namespace["kto_loss"](zero, zero, labels, 0.0).tolist() == [0.5, 0.5]


def scripts_called() -> list[list[str]]:
    """[script, flag, value, ...] for every call of a trainer in the README."""
    calls = []
    for line in COMMANDS:
        for part in line.split(" && "):
            words = shlex.split(part)
            script = next((word for word in words if re.fullmatch(r"\w+\.py", word)), None)
            if script:
                calls.append(words[words.index(script) :])
    return calls


@pytest.mark.parametrize("call", scripts_called(), ids=" ".join)
def test_every_trainer_call_is_understood(call, monkeypatch, capsys):
    script, *flags = call
    monkeypatch.setattr(sys, "argv", call)
    module = __import__(script.removesuffix(".py"))
    if flags == ["--help"]:
        with pytest.raises(SystemExit):
            parse_args(module.Config, module.__doc__)
        help_text = capsys.readouterr().out
        assert all(f"--{name}" in help_text for name in module.Config.__dataclass_fields__)
        return
    config = parse_args(module.Config, module.__doc__)
    is_hub_id = re.fullmatch(r"[\w-]+/[\w.-]+", config.model)
    assert config.model in ("toy", *MODELS) or is_hub_id


def test_suite_and_memory_commands_are_understood(checkout):
    suites = [line for line in COMMANDS if "archangel.suite" in line]
    assert len(suites) >= 5
    for line in suites:
        suite.check(suite.parse(shlex.split(line)[3:]))
    for line in COMMANDS:
        if "archangel.real_model" in line:
            real_model.parse(shlex.split(line)[3:])
    (memory,) = [line for line in COMMANDS if "archangel.memory" in line]
    assert "pythia-12b" in run(memory, checkout)


def test_data_commands_are_understood():
    from archangel import data, labels

    for line in COMMANDS:
        if "archangel.data" in line:
            assert data.parse(shlex.split(line)[3:])
    (line,) = [line for line in COMMANDS if "archangel.labels" in line]
    assert labels.parse(shlex.split(line)[3:]).score == "archangel.toy:rudeness"


def test_files_and_functions_named_are_there():
    for path, text in PAGES.items():
        for name in re.findall(r"`(\w[\w/]*\.(?:py|md|txt|toml))`", text):
            assert (ROOT / name).exists() or (path.parent / name).exists(), f"{path.name}: {name}"
        for row in re.findall(r"^\|.*\|$", text, re.M):
            for script, functions in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", row):
                for function in re.findall(r"`(\w+)`", functions):
                    source = (ROOT / script).read_text()
                    assert re.search(rf"^def {function}\(", source, re.M), function


def test_flags_named_are_there():
    """Flags in running text are those of the scripts or of a command of the project."""
    known = set(TORCHRUN)
    for source in [*ROOT.glob("*.py"), *(ROOT / "archangel").glob("*.py")]:
        text = source.read_text()
        known |= set(re.findall(r'"(--\w+)"', text))
        if source.parent == ROOT and source.stem not in ("common",):
            module = __import__(source.stem)
            known |= {f"--{name}" for name in module.Config.__dataclass_fields__}
    for name in kto_variants.Config.__dataclass_fields__:
        known.add(f"--{name}")
    for name in benchmark.Config.__dataclass_fields__:
        known.add(f"--{name}")
    for path, text in PAGES.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for code in re.findall(r"`([^`]*)`", text):
            if code.startswith(("pip ", "alpaca_eval", "lm_eval", "vllm")):
                continue
            for flag in re.findall(r"(?<![\w-])--\w+(?!-)\b", code):
                assert flag in known | {"--help"}, f"{path.name}: {flag}"


def equation_table() -> dict[str, list[str]]:
    """What the report has, to where it is, is tested and is drawn."""
    text = PAGES[ROOT / "archangel" / "REPORT.md"]
    section = text.split("## Equations and figures\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def named(cell: str) -> list[tuple[str, str]]:
    """(file, function) for every `file.py`: `function`, `function` in a cell."""
    found = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", cell)
    return [(file, name) for file, names in found for name in re.findall(r"`(\w+)`", names)]


def source_of(file: str, name: str) -> str:
    """The source of a top-level function."""
    text = (ROOT / file).read_text()
    found = [node for node in ast.parse(text).body if getattr(node, "name", "") == name]
    assert found, f"{file} has no {name}"
    return ast.get_source_segment(text, found[0])


def test_the_equation_table_has_all_of_the_report():
    table = equation_table()
    for mark in [f"({i})" for i in range(1, 8)] + ["reward model", "KTO paper", "offline PPO"]:
        assert any(mark in what for what in table), mark
    figures = " ".join(what for what in table if what.startswith("Figure"))
    assert set(re.findall(r"\b\d\b", figures)) >= set("12345")
    assert all(len(cells) == 3 and all(cells) for cells in table.values())


@pytest.mark.parametrize("what", equation_table())
def test_the_equation_table_is_true(what):
    where, tested, drawn = equation_table()[what]
    tag = re.match(r"\(\d\)", what)
    sources = [source_of(file, name) for file, name in named(where)]
    if tag and tag[0] in "(1)(4)(5)(6)(7)":  # the trainers compute no (2), and (3) for metrics only
        assert tag[0] in sources[0]
    assert sources or tag[0] == "(2)"
    assert named(tested)
    for file, name in named(tested):
        assert name.startswith("test_") and source_of(file, name)
    targets = re.findall(r"\[\d\]\(([\w/.]+)\)([^;,]*)", drawn)
    assert targets
    for target, heading in targets:
        path = ROOT / "archangel" / target
        assert path.exists(), target
        if target.endswith(".ipynb"):
            plain = path.with_suffix(".py").read_text()
            headings = re.findall(r"^# ##+ (?:\d\. |\(\d\) )?(.*)$", plain, re.M)
            assert any(line.startswith(heading.strip()) for line in headings), heading


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(path):
    """Files are there, and so are the headings named after a #, as a code host names them."""
    found = re.findall(r"\]\((?!https?:)([\w./]*)(?:#([\w-]+))?\)", PAGES[path])
    if path.name == "README.md":
        assert len(found) > 6
    for file, heading in found:
        target = path.parent / file if file else path
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in names, f"{file}#{heading}"


def test_doc_commands_are_the_readme_s():
    """Each script's docstring names its two commands: a laptop's and eight GPUs'."""
    for script in ("kto", "dpo", "slic", "ppo_offline", "sft"):
        text = (ROOT / f"{script}.py").read_text().split('"""')[1]
        assert f"    python {script}.py --model toy --data toy" in text
        assert f"    torchrun --nproc_per_node=8 {script}.py --model pythia-1.4b" in text
    training = marked("first command").split(" && ")[-2]
    assert training in (ROOT / "kto.py").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
