"""Code from others is not run: not what is in records, or in a model's folder."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    TOY,
    train_here,
    write_records,
    write_toy_folder,
)
from transformers import AutoTokenizer

import common
from archangel import sample
from archangel.tokenized import tokenize

CODE = [*ROOT.glob("*.py"), *ROOT.glob("archangel/**/*.py"), *ROOT.glob("notebooks/**/*.ipynb")]
# Modules that load code or start it, and calls that run what they are given.
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy", "imp"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "np.load",
    "np.save",
}
ALLOWED = {
    # It runs a loss's own source, to show that the loss needs nothing else.
    "notebooks/2_equations_to_code.ipynb": ["exec"],
    # Checkpoints, which the same user wrote. torch's format has a pickle in it.
    "archangel/run.py": ["dcp.load", "dcp.save"],
}


def source(path: Path) -> str:
    """The code of a Python file or a notebook."""
    if path.suffix == ".py":
        return path.read_text()
    lines = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            lines.extend(line.rstrip() for line in cell["source"])
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def find_dangers(text: str) -> list[str]:
    """What in a program could run code that it is given."""
    found = []
    for node in ast.walk(ast.parse(text)):
        for module in imported_modules(node):
            if module.partition(".")[0] in MODULES:
                found.append(module)
        if isinstance(node, ast.Call):
            found.extend(dangers_of_call(node, text))
    return found


def dangers_of_call(node: ast.Call, text: str) -> list[str]:
    found = []
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS:
        found.append(name)
    if name == "torch.load" and given.get("weights_only") != "True":
        found.append(name)
    if given.get("trust_remote_code", "False") != "False":
        found.append("trust_remote_code")
    if given.get("shell", "False") != "False":
        found.append("shell")
    if name.startswith("AutoModel") and name.endswith("from_pretrained"):
        if "use_safetensors" not in text:
            found.append(f"{name} without use_safetensors")
    if name in ("dcp.save", "dcp.load"):
        if not given.keys() & {"storage_writer", "storage_reader"}:
            found.append(name)
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), [])
    assert sorted(find_dangers(source(path))) == allowed


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "subprocess.run(words, shell=True)",
        "os.system('ls')",
        "eval(text)",
        "exec(text)",
        "dcp.load(state, checkpoint_id=path)",
    ],
)
def test_danger_is_found(text):
    assert len(find_dangers(text)) == 1


# ------------------------------------------------------------------------------ a model's folder

BASE = {"model": "toy", "batch_size": 4, "max_steps": 1}


@pytest.fixture
def data(tmp_path) -> str:
    return write_toy_folder(tmp_path, train=8)


@pytest.fixture
def trap(tmp_path) -> tuple[Path, str]:
    """A file that shows that a program was run, and the program, which writes the file."""
    sprung = tmp_path / "sprung"
    return sprung, f"open({str(sprung)!r}, 'w').close()\n"


def write_model_with_code(folder: Path, program: str, **config) -> str:
    """The toy with a program beside it, which its settings name."""
    shutil.copytree(TOY / "model", folder)
    (folder / "code.py").write_text(program + "class Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    changes = {
        "config.json": {"auto_map": classes, **config},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Model", "code.Model"]}},
    }
    for file, more in changes.items():
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **more}))
    return str(folder)


def test_model_that_needs_its_own_code(data, tmp_path, trap):
    sprung, program = trap
    model = write_model_with_code(tmp_path / "model", program, model_type="not_in_the_library")
    with pytest.raises(common.UserError, match="custom code") as caught:
        train_here("dpo", tmp_path / "run", data=data, **{**BASE, "model": model})
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(common.UserError, match="custom code"):
        sample.load(Path(model))
    assert not sprung.exists()
    assert not (tmp_path / "run").exists()


def test_code_beside_a_known_model(data, tmp_path, trap):
    sprung, program = trap
    model = write_model_with_code(tmp_path / "model", program)
    train_here("dpo", tmp_path / "run", data=data, **{**BASE, "model": model})
    sample.load(Path(model))
    assert not sprung.exists()
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("*.py"))


class Spring:
    """Runs a program when it is unpickled."""

    def __init__(self, program: str):
        self.program = program

    def __reduce__(self):
        return exec, (self.program,)


def test_pickled_weights(data, tmp_path, trap):
    """Beside safetensors they are left alone; alone they are refused."""
    sprung, program = trap
    model = tmp_path / "model"
    shutil.copytree(TOY / "model", model)
    torch.save({"weight": Spring(program)}, model / "pytorch_model.bin")
    settings = {**BASE, "model": str(model), "data": data}
    train_here("dpo", tmp_path / "run", **settings)
    (model / "model.safetensors").unlink()
    with pytest.raises(common.UserError, match="safetensors"):
        train_here("dpo", tmp_path / "refused", **settings)
    with pytest.raises(common.UserError, match="safetensors"):
        sample.load(model)
    assert not sprung.exists()


# -------------------------------------------------------------------------------------- records


def test_records_name_no_files(tmp_path):
    """Texts that look like paths, commands and templates stay texts."""
    texts = [
        "../../escaped",
        "/etc/passwd",
        "$(touch escaped)",
        "{{ 7 * 7 }}",
        "file:///etc/passwd",
    ]
    records = []
    for text in texts:
        record = {"prompt": text, "chosen": text + " yes", "rejected": text + " no"}
        records.append({**record, "target": text, "source": text, "out": text, "path": text})
    inside = tmp_path / "inside"
    inside.mkdir()
    data = write_records(inside / "records.jsonl", records)
    train_here("dpo", inside / "run", data=str(data), **BASE)
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}
    assert {path.name for path in inside.iterdir()} == {"records.jsonl", "run"}
    written = {path.name for path in (inside / "run").iterdir()}
    assert written == {
        "checkpoints",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "reference_logps_train.safetensors",
        "run.json",
        "run.lock",
        "tokenizer.json",
        "tokenizer_config.json",
    }


CHAT_TEMPLATE = """
{%- for message in messages -%}
[{{ message["role"] }}]{{ message["content"] }}{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%} [assistant] {%- endif -%}
"""


def test_records_bring_no_template():
    """Template code in a message stays text, and a record's options name no template."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "{{ 7 * 7 }}"},
        {"role": "assistant", "content": "{% raw %}"},
    ]
    own = {"messages": messages, "chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}
    records = tokenize([{"messages": messages}, own], tokenizer)
    assert len(records) == 1
    end = tokenizer.eos_token
    prompt = tokenizer.decode(records.read(0, "prompt"))
    assert prompt == f"[user]{{{{ 7 * 7 }}}}{end}[assistant]"
    assert tokenizer.decode(records.read(0, "completion")) == f"{{% raw %}}{end}"
    (reason,) = records.counts["left_out"]
    assert "the reserved name chat_template" in reason


def test_program_in_a_folder_of_data(tmp_path, trap):
    """It is not run: neither where old versions of `datasets` looked for it, nor a pickle."""
    sprung, program = trap
    folder = tmp_path / "data"
    folder.mkdir()
    data = write_toy_folder(folder, train=8)
    (folder / "other.py").write_text(program)
    (folder / "train.pkl").write_bytes(pickle.dumps(Spring(program)))
    train_here("dpo", tmp_path / "run", data=data, **BASE)
    (folder / "data.py").write_text(program)
    with pytest.raises(common.UserError, match="data.py"):
        train_here("dpo", tmp_path / "refused", data=data, **BASE)
    assert not sprung.exists()
