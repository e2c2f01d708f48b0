"""What several test modules use: running a trainer here or as a command, and its results."""

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from archangel.tokenized import load_tokens
from common import Example, Examples

ROOT = Path(__file__).parent.parent
TOY = ROOT / "archangel" / "toy_world"
# What torchrun sets. A test that runs under it itself must not pass it on.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def train_here(script: str, out: Path, **settings) -> list[dict]:
    """Train in this process. Returns the metrics of every step."""
    module = importlib.import_module(script)
    try:
        module.train(module.Config(out=str(out), **settings))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return read_metrics(out)


def run_command(
    script: str, out: Path, processes: int = 0, check: bool = True, **settings
) -> subprocess.CompletedProcess:
    """Train by the command line; under torchrun if `processes` is given."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [str(ROOT / f"{script}.py"), "--out", str(out), *to_flags(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), timeout=300
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def to_flags(settings: dict) -> list[str]:
    """Settings as words of a command line."""
    flags = []
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def clean_environment() -> dict[str, str]:
    """The environment of a command: one thread, and nothing that torchrun set."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in LAUNCHER_VARIABLES:
        environment.pop(name, None)
    return environment


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def read_record(out: Path) -> dict:
    """What run.json holds."""
    return json.loads((Path(out) / "run.json").read_text())


def metric(records: list[dict], name: str) -> torch.Tensor:
    """One metric of all steps that have it, float64."""
    return torch.tensor([record[name] for record in records if name in record], dtype=torch.float64)


def write_records(path: Path, records: list[dict]) -> Path:
    """Write records as JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """A process group with this process alone, for what calls torch.distributed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def word_tokenizer(add_bos: bool = False, pad_token: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words: "w0" is token 10, "w1" is 11, up to "w99".

    `<s>` is 0, and begins every text with `add_bos`. `</s>`, the end-of-sequence token, is 1; it
    doubles as padding, as in the report's models.
    """
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
    for number in range(100):
        vocabulary[f"w{number}"] = 10 + number
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad_token,
    )


def words(*ids: int) -> str:
    """The text that word_tokenizer encodes as these ids, of 10 and above."""
    return " ".join(f"w{token_id - 10}" for token_id in ids)


# ----------------------------------------------------------------------- small random models

VOCAB_SIZE = 97
HIDDEN_SIZE = 32
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES = {  # GPT-2 has other names for them
    "vocab_size": VOCAB_SIZE,
    "n_embd": HIDDEN_SIZE,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {  # name: (model_type, settings); scales and caps are strong enough to matter
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_eager": ("gpt_neox", {"attn_implementation": "eager"}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {
            "attn_implementation": "eager",
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "mistral": ("mistral", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
    "phi": ("phi", {}),  # its head has a bias
}
# Gemma 2 caps attention scores, which packed attention does not.
PACKABLE = [name for name in ARCHITECTURES if name != "gemma2"]


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random model of one of the ARCHITECTURES, or of another model_type.

    Its weights are so large that log-probabilities differ by nats. changes: of the configuration.
    """
    model_type, settings = ARCHITECTURES.get(name, (name, {}))
    settings = {**settings, **changes}
    attention = settings.pop("attn_implementation", None)
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval().to(dtype)


def random_examples(shapes: list[tuple[int, list[int]]], seed: int = 0) -> list[Example]:
    """Examples of random token ids. shapes: the lengths of each prompt and of its completions."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for prompt_length, completion_lengths in shapes:
        ids = []
        for length in [prompt_length, *completion_lengths]:
            ids.append(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        examples.append(Example(ids[0], ids[1:]))
    return examples


def plain_logps(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """Log-probabilities (N,) by plain transformers: one sequence at a time, a full log-softmax."""
    logps = []
    for example in examples:
        prompt_length = len(example.prompt_ids)
        for completion_ids in example.completions_ids:
            input_ids = torch.tensor([[*example.prompt_ids, *completion_ids]])
            all_logps = model(input_ids=input_ids).logits[0].log_softmax(-1)  # (T, V)
            for place, token in enumerate(completion_ids):
                logps.append(all_logps[prompt_length + place - 1, token])
    return torch.stack(logps)


# --------------------------------------------------------------- the toy's data and model, changed


def write_toy_folder(folder: Path, train: int, test: int = 0) -> str:
    """Write the toy's first records as train.jsonl and test.jsonl. Returns what --data takes."""
    for split, number in {"train": train, "test": test}.items():
        if number:
            with (TOY / "data" / f"{split}.jsonl").open() as file:
                records = [json.loads(next(file)) for _ in range(number)]
            write_records(folder / f"{split}.jsonl", records)
    return str(folder)


def load_examples(script: str, **settings) -> tuple[Examples, Examples]:
    """A script's training and held-out examples, by the toy's tokenizer. settings: with `data`."""
    module = importlib.import_module(script)
    config = module.Config(**{"model": "toy", **settings})
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    records, test_records = load_tokens(config.data, module.FORMATS, tokenizer)
    return module.make_examples(records, config), module.make_examples(test_records, config)


def copy_toy_model(folder: Path, **changes) -> str:
    """Copy the toy's model, with changes of its config.json. Returns what --model takes."""
    shutil.copytree(TOY / "model", folder)
    return change_json(folder / "config.json", **changes)


def change_json(path: Path, **changes) -> str:
    """Change values of a JSON file. Returns its folder."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))
    return str(path.parent)


# ----------------------------------------------------------------------------- comparing two runs


def assert_same_metrics(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """All metrics of all steps are equal, except for speed and memory."""
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for our, their in zip(ours, theirs):
        assert our.keys() == their.keys()
        names = our.keys() - {"tokens_per_second", "max_memory_mib", "seconds"}
        if our["step"] <= 1:  # all rewards are 0 then, and their signs are rounding
            names -= {"reward_accuracy", "eval_reward_accuracy"}
        for name in names:
            # A reward margin passes through 0: within the tolerance of rewards, not of itself.
            scale = max(abs(our[name]), 1.0)
            error = abs(our[name] - their[name]) / scale
            assert error <= tolerance, f"step {our['step']}: {name} {our[name]}, {their[name]}"


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """The exported models of two runs are equal, bit for bit."""
    our_weights = load_file(ours / "model.safetensors")
    their_weights = load_file(theirs / "model.safetensors")
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        assert torch.equal(weight, their_weights[name]), name


# ------------------------------------------------------------------ commands, without a new Python


def command_here(script: str, out: Path, **settings) -> int:
    """Run a script's command line in this process. Returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setattr(sys, "argv", [f"{script}.py", "--out", str(out), *to_flags(settings)])
        patch.setattr(os, "_exit", sys.exit)
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    # The run's own signal handlers would keep it, and its lock on the folder.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.collect()
    return status


def error_line(stderr: str) -> str:
    """The error line of what a run has written to stderr: it has one, and no traceback."""
    assert "Traceback" not in stderr
    lines = stderr.replace("\r", "\n").splitlines()  # \r ends a state of a progress bar
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


@functools.cache
def fork_context() -> multiprocessing.context.ForkServerContext:
    """Processes of this context are forked from one that has imported torch and the scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helpers", "dpo", "kto", "sft", "transformers.models.gpt_neox.modeling_gpt_neox"]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


class Forked:
    """A script's command in a process of its own, which begins without waiting for imports.

    It runs as it does by its command line: it reads its flags and its environment, and ends with
    its exit status.
    """

    def __init__(self, path: Path, flags: list[str], environment: dict[str, str]):
        self._stderr = tempfile.NamedTemporaryFile("r")
        arguments = (str(path), flags, environment, self._stderr.name)
        self.process = fork_context().Process(target=_run_script, args=arguments, daemon=True)
        self.process.start()

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for its end. Returns its exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"is still running after {timeout} seconds: {self.stderr}")
        return self.process.exitcode

    @property
    def stderr(self) -> str:
        """What it has written to stdout and stderr."""
        return Path(self._stderr.name).read_text()


def _run_script(path: str, flags: list[str], environment: dict[str, str], stderr: str) -> None:
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and left behind by os._exit
    os.environ.update(environment)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def fork(
    script: str | Path, flags_of_each: list[list[str]], one_machine: bool = True
) -> list[Forked]:
    """Start a script as torchrun does, with as many processes as there are lists of flags.

    Otherwise than on one machine, each process is alone on a machine of its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = []
    for rank, flags in enumerate(flags_of_each):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank) if one_machine else "0",
            "WORLD_SIZE": str(len(flags_of_each)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        forked.append(Forked(ROOT / f"{script}.py", flags, environment))
    return forked


def run_forked(script: str, out: Path, processes: int = 0, **settings) -> str:
    """Train by a script's command; as under torchrun if `processes` is given.

    Returns what process 0 has written to stderr.
    """
    flags = ["--out", str(out), *to_flags(settings)]
    if processes:
        forked = fork(script, [flags] * processes)
    else:
        forked = [Forked(ROOT / f"{script}.py", flags, {})]
    statuses = [process.wait(300) for process in forked]
    assert not any(statuses), "\n".join(process.stderr for process in forked)[-3000:]
    return forked[0].stderr
