"""The programs of archangel/RECIPES.md, as far as what they need is installed."""

import importlib.util
import json
import re
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import train_here

import kto
from archangel import judge, sample
from archangel.run import load_tokenizer, parse_args
from archangel.tokenized import load_tokens

ROOT = Path(__file__).parent.parent
RECIPES = (ROOT / "archangel" / "RECIPES.md").read_text()


def marked(name: str, language: str = "python") -> str:
    """The one program under a marker."""
    (program,) = re.findall(rf"<!-- {name} -->\n```{language}\n(.*?)```", RECIPES, re.S)
    return program


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with archangel/ and an empty runs/."""
    (tmp_path / "archangel").symlink_to(ROOT / "archangel")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_chat_model(project, capsys):
    """From messages to replies; prompts have the same token ids in training and in sampling."""
    exec(marked("chat model"), {})
    for split in ("train", "test"):
        path = project / "runs" / "chat_data" / f"{split}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:12]))
    show, train, samples = marked("chat commands", "bash").splitlines()
    data_show = importlib.import_module("archangel.data")
    data_show.main(shlex.split(show.split("  #")[0])[3:])
    assert "prompt, " in capsys.readouterr().out

    words = shlex.split(train)[2:]
    settings = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    out = Path(settings.pop("out"))
    settings["lr"] = float(settings["lr"])
    settings["warmup_steps"] = int(settings["warmup_steps"])
    metrics = train_here("kto", out, batch_size=4, max_steps=2, **settings)
    assert metrics[-1]["step"] == 2

    sample.main([*shlex.split(samples)[3:], "--n", "3", "--max_new_tokens", "4"])
    assert "3 prompts" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert tokenizer.chat_template == load_tokenizer(Path("runs/toy_chat")).chat_template
    prompts = sample.read_prompts("runs/chat_data", 12)
    encoded = sample.encode_prompts(prompts, tokenizer, 1024)
    _, test_records = load_tokens("runs/chat_data", kto.FORMATS, tokenizer)
    trained = {test_records.place(number): number for number in range(12)}
    assert len(encoded) == 12  # each prompt once
    for number, tokens in enumerate(encoded):
        (place,) = [place for place in trained if place.endswith(f"line {number + 1}")]
        assert test_records.read(trained[place], "prompt").tolist() == tokens.prompt_ids
        text = tokenizer.apply_chat_template(
            prompts[number]["conversation"]["prompt"], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.prompt_ids


def write_run(folder: Path) -> None:
    """The two files of a run that the recipes for curves read."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 0.5}, {"step": 1, "loss": 0.5, "kl": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"script": "kto.py"}))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard(project):
    write_run(project / "runs" / "kto")
    exec(marked("tensorboard"), {})
    (events,) = (project / "runs" / "kto" / "tensorboard").glob("events.*")
    assert b"eval_loss" in events.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb(project, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_run(project / "runs" / "kto")
    exec(marked("wandb"), {})
    assert list((project / "wandb").glob("offline-run-*"))


def test_alpaca_eval(project):
    row = {"prompt": "a", "reply": "b", "tokens": 1, "ended": True}
    (project / "runs" / "kto.jsonl").write_text(json.dumps(row) + "\n")
    exec(marked("alpaca eval"), {})
    outputs = json.loads((project / "runs" / "kto_alpaca.json").read_text())
    assert outputs == [{"instruction": "a", "output": "b", "generator": "kto"}]


def test_slurm(monkeypatch):
    """The script's settings are understood."""
    line = marked("slurm", "bash").splitlines()[-1]
    words = shlex.split(line)
    call = words[words.index("kto.py") :]
    monkeypatch.setattr(sys, "argv", call)
    assert parse_args(kto.Config, kto.__doc__).resume


class Completions(BaseHTTPRequestHandler):
    """A server of completions, as vLLM's documentation has it."""

    def do_POST(self):
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, ask))
        choice = {"text": f" Reply {len(self.server.asked)}.", "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 4}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_sampling_from_a_server(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = marked("sampling from a server")
    program = program.replace("localhost:8000", f"127.0.0.1:{server.server_port}")
    program = program.replace('read_prompts("archangel", 512)', 'read_prompts("toy", 5)')
    program = program.replace('find_model("runs/sft_kto")', 'find_model("toy")')
    monkeypatch.chdir(tmp_path)
    try:
        exec(program, {})
    finally:
        server.shutdown()
        server.server_close()
    prompts = sample.read_prompts("toy", 5)
    encoded = sample.encode_prompts(prompts, load_tokenizer(sample.find_model("toy")), 1536)
    assert [ask["prompt"] for _, ask in server.asked] == [tokens.prompt_ids for tokens in encoded]
    assert {path for path, _ in server.asked} == {"/v1/completions"}
    assert all(ask["top_p"] == 0.95 and ask["max_tokens"] == 512 for _, ask in server.asked)
    rows = judge.read_replies(tmp_path / "replies.jsonl")
    assert [(row["reply"], row["ended"]) for row in rows] == [
        (f" Reply {i}.", True) for i in range(1, 6)
    ]
