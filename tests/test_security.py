"""Nothing that a stranger wrote is run: not what is in rows, a model's folder or a checkpoint."""

import ast
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import common
import dpo
from archangel import sample

ROOT = Path(common.__file__).parent
CODE = [*ROOT.glob("*.py"), *ROOT.glob("archangel/**/*.py"), *ROOT.glob("notebooks/**/*.ipynb")]
# Modules that load code or start it, and calls that run what they are given.
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy", "imp"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}
CALLS |= {"torch.save", "yaml.load", "yaml.unsafe_load", "np.load", "np.save"}


def source(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    return "\n".join(line.rstrip() for line in lines if not line.startswith(("%", "!")))


def dangers(text: str) -> list[str]:
    """What in the program could run code that it was given."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [name for name in modules if name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS or name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        if given.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if given.get("shell", "False") != "False":
            found.append("shell")
        if name.endswith("from_pretrained") and name.startswith("AutoModel"):
            if "use_safetensors" not in text:
                found.append(f"{name} without use_safetensors")
        # torch's default format of a checkpoint has a pickle in it.
        if name in ("dcp.save", "dcp.load") and not given.keys() & {
            "storage_writer",
            "storage_reader",
        }:
            found.append(name)
    return found


# It runs a loss's own source, to show that the loss needs nothing else.
ALLOWED = {"2_equations_to_code.ipynb": ["exec"]}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_that_could_run_what_it_is_given(path):
    assert dangers(source(path)) == ALLOWED.get(path.name, [])


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
def test_each_of_them_would_be_found(text):
    assert len(dangers(text)) == 1


# ------------------------------------------------------------------------------ a model's folder


def run(tmp_path: Path, **values) -> None:
    """A short training run in this process."""
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        data.write_text("".join((common.TOY / "data/train.jsonl").open().readlines()[:8]))
    basic = {"model": "toy", "data": str(data), "out": str(tmp_path / "run"), "batch_size": 4}
    try:
        dpo.train(dpo.Config(**basic | {"max_steps": 1} | values))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def trap(tmp_path):
    """A file that tells that code was run, and a program that writes it."""
    sprung = tmp_path / "sprung"
    return sprung, f"open({str(sprung)!r}, 'w').close()\n"


def model_with_code(folder: Path, program: str, **config) -> Path:
    """The toy with a program beside it that its settings name."""
    shutil.copytree(common.TOY / "model", folder)
    (folder / "code.py").write_text(program + "class Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    for file, more in {
        "config.json": {"auto_map": classes, **config},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Model", "code.Model"]}},
    }.items():
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | more))
    return folder


def test_a_model_that_needs_its_own_code_is_refused(tmp_path, trap):
    sprung, program = trap
    model = model_with_code(tmp_path / "model", program, model_type="not_in_the_library")
    for read in (lambda: run(tmp_path, model=str(model)), lambda: sample.load(model)):
        with pytest.raises(common.UserError, match="custom code") as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
    assert not sprung.exists() and not (tmp_path / "run").exists()


def test_code_beside_a_model_that_the_library_knows_is_left_alone(tmp_path, trap):
    sprung, program = trap
    model = model_with_code(tmp_path / "model", program)
    run(tmp_path, model=str(model))
    sample.load(model)
    assert not sprung.exists() and (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("*.py"))


class Spring:
    """Runs a program when it is unpickled."""

    def __init__(self, program: str):
        self.program = program

    def __reduce__(self):
        return exec, (self.program,)


def test_pickled_weights_are_neither_needed_nor_read(tmp_path, trap):
    sprung, program = trap
    model = tmp_path / "model"
    shutil.copytree(common.TOY / "model", model)
    torch.save({"weight": Spring(program)}, model / "pytorch_model.bin")
    run(tmp_path, model=str(model))  # beside safetensors it is left alone
    (model / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "run")
    for read in (lambda: run(tmp_path, model=str(model)), lambda: sample.load(model)):
        with pytest.raises(common.UserError, match="safetensors"):
            read()
    assert not sprung.exists()


# --------------------------------------------------------------------------------- a checkpoint


def test_a_checkpoint_is_tensors_alone_and_a_pickle_in_it_is_not_read(tmp_path, trap):
    sprung, program = trap
    run(tmp_path, max_steps=2)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (file,) = checkpoint.iterdir()
    assert file.suffix == ".safetensors"
    stream = io.BytesIO()
    torch.save(Spring(program), stream)
    for name in (".metadata", "__0.metadata"):
        (checkpoint / name).write_bytes(pickle.dumps(Spring(program)))
    (checkpoint / "__0_0.distcp").write_bytes(stream.getvalue())
    run(tmp_path, max_steps=3, resume=True)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (file,) = checkpoint.iterdir()
    for content in (pickle.dumps(Spring(program)), stream.getvalue()):
        file.write_bytes(content)
        with pytest.raises(common.UserError, match="step_00000003: cannot be read"):
            run(tmp_path, max_steps=4, resume=True)
    assert not sprung.exists()


# ----------------------------------------------------------------------------------------- rows


def test_no_path_is_taken_from_rows(tmp_path):
    """Texts that look like paths, commands and templates stay texts."""
    texts = [
        "../../escaped",
        "/etc/passwd",
        "$(touch escaped)",
        "{{ 7 * 7 }}",
        "file:///etc/passwd",
    ]
    rows = [
        {"prompt": text, "chosen": text + " yes", "rejected": text + " no", "target": text}
        | {"source": text, "out": text, "path": text}
        for text in texts
    ]
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(inside)
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}
    assert {path.name for path in inside.iterdir()} == {"rows.jsonl", "run", "reference"}
    assert all(path.stem.isalnum() for path in (inside / "reference").iterdir())
