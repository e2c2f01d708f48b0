"""What the five trainers share: no loss, no setting of a loss, no training loop.

In the order of a run:
    parse, check_settings             a dataclass of settings, its comments as --help
    read_rows, tokenise               JSONL rows to token ids
    make_batch, completion_logps      token ids to the log-probability of every completion token
    endless, plan                     which examples a step takes, and in what pieces
    find_model, load_tokenizer        a folder that can be trained, and how it writes text
    Run                               processes, output folder, metrics, checkpoints, export
    load_policy, add_reference_logps  the model, and the log-probabilities it starts from
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import typing
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOY = Path(__file__).parent / "archangel" / "toy_world"  # model/ and data/: all runs offline
MODELS = {  # the report's seven (section 3.4), short name to hub id
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in ("1.4b", "2.8b", "6.9b", "12b")},
    **{f"llama-{size}": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b")},
}
FIELDS = {  # what a row may hold; a script names the forms that its loss can learn from
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "supervised": ("prompt", "completion"),
}
MAY_CHANGE = {"max_steps", "epochs", "save_every", "eval_every", "micro_batch_tokens", "resume"}
MAY_CHANGE |= {"out", "model", "data"}  # a folder may move; what is in it goes by its fingerprint
EVAL_ROWS = 512  # held-out rows measured, as many as the prompts that the authors judged
CHUNK = 2**24  # logits in memory at once: 64 MiB of float32


class UserError(ValueError):
    """What the user gave is wrong: one line that names the place and the mend (exit status 2)."""


class Interrupted(Exception):
    """A signal came, and everything is saved (exit status 75)."""


# ---------------------------------------------------------------------------- the command line


def check_settings(config, above_zero: tuple[str, ...] = ()) -> None:
    """Raise UserError for a number out of range: all are at least 0, some above it."""
    above_zero += ("lr", "max_grad_norm", "epochs", "batch_size", "max_prompt_length")
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        if not 0 <= value < math.inf or value == 0 and name in above_zero:
            least = "above" if name in above_zero else "at least"
            raise UserError(f"--{name} {value}: must be a finite number {least} 0")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"--max_prompt_length {config.max_prompt_length}: must be below --max_length "
            f"{config.max_length}, so that a completion has room"
        )


def parse(config_class: type, description: str):
    """The command line as a `config_class`, whose comments are the lines of --help."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))

    def fail(message: str):
        raise UserError(f"{message} (--help lists the settings)")

    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL [--SETTING VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    for field in dataclasses.fields(config_class):
        required = field.default is dataclasses.MISSING
        line = comments[field.name] + ("" if required else f" (default: {field.default})")
        kind = {"type": str if required else type(field.default)}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif choices := typing.get_args(field.type):
            kind = {"choices": choices}
        arguments = {"required": required, "default": field.default, "help": line, **kind}
        parser.add_argument(f"--{field.name}", **arguments)
    return config_class(**vars(parser.parse_args()))


@contextlib.contextmanager
def exit_status():
    """Exit with 2 and one line for what the user must mend, with 75 when interrupted."""
    status = 0
    try:
        yield
    except (UserError, OSError) as error:  # an OSError names its file: no space, no permission
        tqdm.write(f"error: {error}", file=sys.stderr)
        status = 2
    except (Interrupted, KeyboardInterrupt) as error:
        why = str(error) or "before the first step; --resume starts it again"
        tqdm.write(f"interrupted: {why}", file=sys.stderr)
        status = 75
    if dist.is_initialized():
        # At once: gloo's threads may still hold tensors, and would now and then abort Python's own
        # ending ("terminate called without an active exception"), whatever its status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


def progress(iterable, description: str):
    """A bar on process 0 for whatever takes more than a few seconds."""
    return tqdm(iterable, description, delay=2, disable=os.environ.get("RANK", "0") != "0")


# ---------------------------------------------------------------------------- rows to token ids


def read_rows(data: str, split: str, forms: Sequence[str]) -> list[dict]:
    """The rows of a split (train, test), each with the fields of the first of `forms` it has.

    data: `toy`, `archangel`, a folder with train.jsonl and test.jsonl (or .jsonl.gz), or one such
    file, all of it for training. A preference row may carry a `target`, the text that SFT and SLiC
    imitate. Raises UserError with file and row; a data set without test rows gives none.
    """
    if data == "archangel":
        from archangel.data import prepare  # the report's mixture, prepared when first asked for

        data = prepare()
    path = TOY / "data" if data == "toy" else Path(data)
    if path.is_dir():
        plain, packed = path / f"{split}.jsonl", path / f"{split}.jsonl.gz"
        path = packed if packed.exists() and not plain.exists() else plain
    elif split == "test":
        return []
    if split == "test" and not path.exists():
        return []
    rows, where = [], f"--data {path}"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, row {number}"
                if line := line.decode("utf-8-sig").strip():
                    rows.append(_check_row(json.loads(line), forms))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: {str(error) or type(error).__name__}") from None
    if not rows and split == "train":
        raise UserError(f"--data {path}: has no rows")
    return rows


def _check_row(row, forms: Sequence[str]) -> dict:
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    form = next((FIELDS[form] for form in forms if row.keys() >= set(FIELDS[form])), None)
    if form is None:
        needed = " or ".join("{" + ", ".join(FIELDS[form]) + "}" for form in forms)
        raise ValueError(f"has {sorted(row)}; this loss needs {needed}")
    row = {field: row[field] for field in (*form, "target") if field in row}
    for field, value in row.items():
        kind, name = (bool, "true or false") if field == "label" else (str, "text")
        if not isinstance(value, kind):
            raise ValueError(f"{field} must be {name}, not {value!r:.40}")
        if kind is str and field != "prompt" and not value.strip():
            raise ValueError(f"{field} is empty")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text: ValueError
    return row


def tokenise(texts: list[tuple[str, list[str]]], tokenizer, config) -> list[dict]:
    """(prompt, completions) to examples {"prompt_ids": (P,), "completions_ids": [(C,), ...]}.

    Prompt and completions are encoded apart, so that no token straddles the border; the text of a
    special token stays text. The end-of-sequence token ends every completion that is not cut. What
    is too long loses prompt first, down to --max_prompt_length, then completion.
    """
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]  # does it add one itself?
    bos, eos = [tokenizer.bos_token_id] * starts, [tokenizer.eos_token_id]
    examples = []
    for begin in progress(range(0, len(texts), 1000), "tokenise"):
        chunk = texts[begin : begin + 1000]
        prompts = encode([prompt for prompt, _ in chunk])["input_ids"]
        encoded = iter(
            encode([text for _, completions in chunk for text in completions])["input_ids"]
        )
        for (_, completions), prompt in zip(chunk, prompts):
            completions = [next(encoded) + eos for _ in completions]
            longest = max(len(ids) for ids in completions)
            keep = max(config.max_prompt_length, config.max_length - longest) - len(bos)
            first = max(0, len(prompt) - keep) if config.truncate_prompt == "start" else 0
            # Something must come before a completion's first token to predict it from.
            prompt = np.array(bos + prompt[first : first + keep] or eos, dtype=np.int32)
            room = config.max_length - len(prompt)
            ids = [np.array(ids[:room], dtype=np.int32) for ids in completions]
            examples.append({"prompt_ids": prompt, "completions_ids": ids})
    return examples


# ---------------------------------------------------------------- token ids to log-probabilities


@dataclasses.dataclass
class Batch:
    """Examples laid out for the model: R rows of T tokens; C completions, N tokens in all."""

    indices: Tensor  # (b,) which examples of the global batch these are
    input_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T) a completion's go on from the end of its prompt
    segments: Tensor  # (R, T) 0 for the prompt and padding, k for the row's k-th completion
    predictors: Tensor  # (N,) places in the flattened (R * T) that predict the tokens below
    targets: Tensor  # (N,) completion tokens, in input order
    mask: Tensor  # (C, longest) bool, the places of `pad` that hold a token
    reference_logps: Tensor  # (N,) log pi_ref of the targets; (0,) where the examples have none

    def pad(self, values: Tensor) -> Tensor:
        """Values (N,) of the completion tokens as (C, longest), 0 where there is no token."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sum(self, values: Tensor) -> Tensor:
        """Sums (C,) over each completion of values (N,) of its tokens."""
        return self.pad(values).sum(1)


def make_batch(examples, device="cpu", pad_id=0, shared=True, indices=None) -> Batch:
    """Lay out examples {"prompt_ids", "completions_ids"}, each prompt once: x y_w y_l in one row.

    shared=False: each completion in a row of its own, after its own copy of the prompt. No
    examples: one row of padding, so that a process with nothing to do still takes part.
    """
    rows = []  # (prompt, the completions behind it)
    for example in examples:
        ids = example["completions_ids"]
        rows += [(example["prompt_ids"], group) for group in ([ids] if shared else zip(ids))]
    width = max((len(prompt) + sum(map(len, group)) for prompt, group in rows), default=1)
    input_ids = np.full((max(len(rows), 1), width), pad_id)
    position_ids, segments = np.zeros_like(input_ids), np.zeros_like(input_ids)
    none = np.empty(0, dtype=int)
    predictors, targets, lengths = [none], [none], [none]
    for r, (prompt, group) in enumerate(rows):
        end = len(prompt)
        input_ids[r, :end], position_ids[r, :end] = prompt, np.arange(end)
        for number, completion in enumerate(group, 1):
            start, end = end, end + len(completion)
            input_ids[r, start:end], segments[r, start:end] = completion, number
            position_ids[r, start:end] = len(prompt) + np.arange(len(completion))
            # A token is predicted one place before it, a completion's first by the prompt's last.
            predictors += [[r * width + len(prompt) - 1], r * width + np.arange(start, end - 1)]
            targets.append(completion)
            lengths.append([len(completion)])
    reference = [example.get("reference_logps", np.float32([])) for example in examples]
    lengths = np.concatenate(lengths)
    arrays = {
        "indices": np.array(range(len(examples)) if indices is None else indices, dtype=int),
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predictors": np.concatenate(predictors),
        "targets": np.concatenate(targets),
        "mask": np.arange(lengths.max(initial=0)) < lengths[:, None],
        "reference_logps": np.concatenate([np.float32([]), *reference]),
    }
    return Batch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def completion_logps(model, batch: Batch, return_hidden: bool = False):
    """Log-probability (N,) of every completion token, in nats, at least float32, in input order.

    The output head runs on the hidden states that predict completion tokens and on nothing else,
    in chunks. With return_hidden, also these states (N, H). To check it by a plain forward pass:

        prompt, completion = [5, 6, 7], [8, 9]
        example = {"prompt_ids": prompt, "completions_ids": [completion]}
        ours = completion_logps(model, make_batch([example]))
        logits = model(torch.tensor([prompt + completion])).logits[0, 2:4]
        plain = logits.log_softmax(-1)[[0, 1], completion]  # equal to rounding
    """
    layout = {}  # a row of one completion is plain causal text: the model's own defaults serve
    if (batch.segments > 1).any():
        seen = (batch.segments[:, None] == 0) | (
            batch.segments[:, None] == batch.segments[..., None]
        )
        # Additive, since eager attention misreads a boolean mask; finite, since padding must see
        # something; and finite in bfloat16 too. Padding comes last, where nothing looks.
        lowest = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        mask = mask.masked_fill(~seen.tril(), lowest)[:, None]  # (R, 1, T, T)
        layout = {"attention_mask": mask, "position_ids": batch.position_ids}
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **layout)
    hidden = hidden.last_hidden_state.flatten(0, 1)[batch.predictors]  # (N, H)
    size = max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    chunks = list(zip(hidden.split(size), batch.targets.split(size)))
    if len(chunks) > 1 and torch.is_grad_enabled():  # recompute logits (size, V), keep none
        logps = [checkpoint(_head_logps, model, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        logps = [_head_logps(model, *chunk) for chunk in chunks]
    return (torch.cat(logps), hidden) if return_hidden else torch.cat(logps)


def _head_logps(model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (n, H) and targets (n,) to log-probabilities (n,), by the model's own head."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # (n, V)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


class Policy(nn.Module):
    """The language model as the trainers call it, with PPO's value head where there is one."""

    def __init__(self, lm: nn.Module, value_head: nn.Module | None, bfloat16: bool):
        super().__init__()
        self.lm, self.value_head, self.bfloat16 = lm, value_head, bfloat16

    def forward(self, batch: Batch, with_values: bool = False, plain: bool = False):
        """Log-probabilities (N,) of the completion tokens; with_values, also values (N,).

        plain: from all logits of the model's own forward pass, for the self-check.
        """
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            if plain:
                logits = self.lm(batch.input_ids).logits.flatten(0, 1)[batch.predictors]
                return -F.cross_entropy(logits.float(), batch.targets, reduction="none")
            logps, hidden = completion_logps(self.lm, batch, return_hidden=True)
            if not with_values:
                return logps
            # Detached: the critic reads the policy's states, it does not shape them.
            return logps, self.value_head(hidden.detach()).squeeze(-1).to(logps.dtype)


# ------------------------------------------------------------- which examples, in what pieces


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: tuple[int, ...], number: int) -> np.ndarray:
    return np.random.default_rng((*seed, number)).permutation(n)


def endless(n: int, seed: tuple[int, ...], start: int, stop: int) -> list[int]:
    """Items start to stop of endless passes over range(n), each pass in an order of its own.

    They depend on these arguments alone: not on processes, nor on whether a run was resumed.
    """
    return [int(_permutation(n, seed, place // n)[place % n]) for place in range(start, stop)]


def completion_tokens(examples: Sequence[dict]) -> int:
    """The number of completion tokens in these examples."""
    return sum(len(ids) for example in examples for ids in example["completions_ids"])


def example_tokens(example: dict, shared: bool = True) -> int:
    """The tokens that an example takes in a batch; apart, of rows as long as its longest."""
    prompt, lengths = len(example["prompt_ids"]), [len(ids) for ids in example["completions_ids"]]
    return prompt + sum(lengths) if shared else len(lengths) * (prompt + max(lengths))


def longest_sequence(example: dict) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["completions_ids"])


def plan(sizes: Sequence[int], limit: int, processes: int) -> list[list[list[int]]]:
    """For each process its micro-batches, lists of example numbers: as many for every process.

    sizes: tokens of each example. Like lengths go together; the number of examples times the
    longest stays within limit, unless one alone exceeds it. Who has fewer gets empty ones.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    shares = []
    for process in range(processes):
        pieces = []
        for i in order[process::processes]:
            if not pieces or (len(pieces[-1]) + 1) * sizes[pieces[-1][0]] > limit:
                pieces.append([])
            pieces[-1].append(i)
        shares.append(pieces)
    most = max(map(len, shares))
    return [pieces + [[]] * (most - len(pieces)) for pieces in shares]


# ------------------------------------------------------ one run: processes, folder, checkpoints


def find_model(name: str) -> Path:
    """The folder of `toy`, a short name, a hub id (fetched when needed) or a folder.

    Raises UserError unless there are weights in safetensors.
    """
    path = TOY / "model" if name == "toy" else Path(name)
    if not path.is_dir():
        try:  # safetensors, settings and tokenizer: no pickled weights, no code
            files = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
            name_there = MODELS.get(name, name)
            path = Path(
                snapshot_download(name_there, allow_patterns=files, ignore_patterns=["*/*"])
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model {name}: is no folder here, and the hub does not give it "
                f"({type(error).__name__}); offline, use toy or a folder"
            ) from None
    if not any(path.glob("*.safetensors")):
        raise UserError(f"--model {path}: has no .safetensors; write them by save_pretrained")
    for file in path.glob("*.safetensors"):
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise UserError(f"--model {file}: {error}; fetch or write it again") from None
    return path


def load_tokenizer(path: Path):
    """The tokenizer of a causal language model's folder. Raises UserError if it is not one."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the library finds wrong with these files
        raise UserError(f"--model {path}: {' '.join(str(error).split())}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--model {path}: {config.model_type} is not a causal language model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {path}: the tokenizer has no end-of-sequence token (eos_token)")
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"--model {path}: the tokenizer has more tokens than the model")
    return tokenizer


def examples_sha256(examples: Sequence[dict], *more) -> str:
    """Hash of every prompt and completion, and of `more`; a pair's is that of its two halves."""
    digest = hashlib.sha256(repr(more).encode())
    for example in examples:
        for ids in example["completions_ids"]:
            digest.update(repr((len(example["prompt_ids"]), len(ids))).encode())
            digest.update(example["prompt_ids"].tobytes() + ids.tobytes())
    return digest.hexdigest()


class Run:
    """One training run: processes, device, output folder, metrics, checkpoints.

    Making one only looks; `start` checks and joins the processes; `resume` claims the folder.
    """

    def __init__(self, config):
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
        for name, value in {"MASTER_ADDR": "127.0.0.1", **alone}.items():
            os.environ.setdefault(name, str(value))  # torchrun has set them
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        on_gpu = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu)
        self.dtype = torch.float64 if config.dtype == "float64" else torch.float32  # of weights
        self.config, self.folder = config, Path(config.out)
        self.shared, self.stop = True, False  # prompts shared; a signal came
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(f"--out {self.folder}: cannot be written, because of {there}")
        if not config.resume and any(self.folder.glob("*")):
            raise UserError(f"--out {self.folder}: is not empty; --resume, or choose another")
        self.model_path = find_model(config.model)
        self.tokenizer = load_tokenizer(self.model_path)

    def start(self, train_set: list[dict], test_set: list[dict], steps: int) -> bool:
        """Check what is left to check, join the processes. False: the run is finished already."""
        config, everything, self.steps = self.config, train_set + test_set, steps
        partners = [example["partner"] for example in everything if "partner" in example]
        largest = max(example_tokens(example) for example in everything + partners)
        if largest > config.micro_batch_tokens:
            raise UserError(
                f"--micro_batch_tokens {config.micro_batch_tokens}: the largest example needs "
                f"{largest}; give at least that, or a smaller --max_length"
            )
        longest = max(longest_sequence(example) for example in everything + partners)
        places = AutoConfig.from_pretrained(self.model_path).get_text_config()
        places = getattr(places, "max_position_embeddings", longest)
        if longest > places:
            raise UserError(
                f"--max_length {config.max_length}: the longest example has {longest} tokens, the "
                f"model places for {places}; give a smaller --max_length"
            )
        labels = [example.get("desirable") for example in everything]
        good, bad = (labels[: len(train_set)].count(label) for label in (True, False))
        if good != bad:
            self._say(f"{good} desirable, {bad} undesirable examples: the smaller class repeats")
        self.record = {
            "script": Path(inspect.getfile(type(config))).name,
            "settings": dataclasses.asdict(config),
            "steps": steps,
            "data_sha256": examples_sha256(everything, len(train_set), labels),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
        }
        path = self.folder / "run.json"
        try:
            before = json.loads(path.read_text()) if path.exists() else {"settings": {}}
            before["settings"].items()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"--resume {path}: is damaged; choose another --out") from None
        self._refuse_changes(before)
        if before.get("finished") and before["steps"] >= steps:
            self._say(f"{self.folder}: finished already, after {before['steps']} steps")
            return False
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        weights = [None]
        if self.rank == 0:
            files = [
                *sorted(self.model_path.glob("*.safetensors")),
                self.model_path / "config.json",
            ]
            opened = (file.open("rb") for file in files)
            weights = [[hashlib.file_digest(file, "sha256").hexdigest() for file in opened]]
        dist.broadcast_object_list(weights)
        self.record["model_sha256"] = weights[0]
        self._refuse_changes(before)
        return True

    def _say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def _refuse_changes(self, before: dict) -> None:
        """Raise UserError, by name, where the folder's run had other settings, data or model."""

        def fixed(record: dict) -> dict:
            settings = record["settings"].items()
            kept = {f"--{name}": value for name, value in settings if name not in MAY_CHANGE}
            named = ("script", "data_sha256", "model_sha256")
            return kept | {name: record[name] for name in named if name in record}

        now, then = fixed(self.record), fixed(before)
        changed = [name for name in now if name in then and now[name] != then[name]]
        if changed:
            raise UserError(
                f"--resume {self.folder}: {', '.join(changed)} changed since this run began; "
                "give what it began with, or another --out"
            )

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all (process 0)."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.partial").write_text(text)
            (self.folder / f"{name}.partial").rename(self.folder / name)

    def write_record(self) -> None:
        """Write run.json: every setting, version and fingerprint."""
        self.write("run.json", json.dumps(self.record, indent=2) + "\n")

    def _check_weights(self, policy: Policy) -> None:
        for parameter in policy.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                raise FloatingPointError(
                    "a weight is not finite; nothing was saved after that step"
                )

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/step_" + "[0-9]" * 8))

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint beside, rename it when whole, remove the older ones.

        It holds no random state: all that is random here depends on the seed and the step alone.
        """
        self._check_weights(policy)
        final = self.folder / f"checkpoints/step_{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.rank == 0:  # what a killed run left half-written
            for older in final.parent.glob("*.partial"):
                shutil.rmtree(older)
        dist.barrier()
        model, optim = dcp_state.get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
        if self.rank == 0:
            partial.rename(final)
            for older in self._checkpoints()[:-1]:
                shutil.rmtree(older)
        dist.barrier()

    def resume(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Claim the folder and load its last whole checkpoint. Returns the steps done, or 0."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock = FileLock(self.folder / "run.lock")
                self.lock.acquire(timeout=0)  # until this process ends, however it ends
            except Timeout:
                raise UserError(f"--out {self.folder}: another run is writing there") from None
        saved = self._checkpoints()
        done = int(saved[-1].name.removeprefix("step_")) if saved else 0
        if done > self.steps:
            raise UserError(f"--max_steps {self.steps}: {self.folder} has {done} steps already")
        if saved:
            model, optim = dcp_state.get_state_dict(policy, optimizer)
            try:
                dcp.load({"model": model, "optimizer": optim}, checkpoint_id=saved[-1])
            except (Exception, dcp.api.CheckpointException) as error:  # a BaseException
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"--resume {saved[-1]}: cannot be read, {reason}") from None
            dcp_state.set_state_dict(
                policy, optimizer, model_state_dict=model, optim_state_dict=optim
            )
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # steps after the checkpoint will come again
            lines = [line for line in metrics.read_text().split("\n") if line.endswith("}")]
            kept = [line for line in lines if saved and json.loads(line)["step"] <= done]
            self.write("metrics.jsonl", "".join(line + "\n" for line in kept))
        self.write_record()  # with what the self-check found
        self.bar = tqdm(desc="train", initial=done, total=self.steps, disable=self.rank != 0)
        for number in (signal.SIGTERM, signal.SIGINT):  # from now on there is something to save
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        return done

    def save_if_due(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Save every --save_every steps and at the end; and when a signal came, then stop."""
        stop = torch.tensor(int(self.stop))
        dist.all_reduce(stop)  # a signal may reach the processes at different steps
        every = self.config.save_every
        if stop or every and (step % every == 0 or step == self.steps):
            self.save(step, policy, optimizer)
        if stop:
            self.bar.close()
            raise Interrupted(f"stopped and saved after step {step}; go on with --resume")

    def export(self, policy: Policy) -> None:
        """Write model, tokenizer and generation settings, for `from_pretrained(folder)`."""
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = dcp_state.get_model_state_dict(policy, options=options)
        self._check_weights(policy)
        if self.rank == 0:
            partial = self.folder / "model.partial"
            state = {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")}
            for tied in getattr(policy.lm, "all_tied_weights_keys", {}):
                state.pop(tied, None)  # written once, under the other name
            policy.lm.save_pretrained(partial, state_dict=state)
            self.tokenizer.save_pretrained(partial)
            for file in partial.iterdir():
                if (self.folder / file.name).is_dir():
                    shutil.rmtree(self.folder / file.name)
                file.rename(self.folder / file.name)
            partial.rmdir()
            self.record["finished"] = True
            self.write_record()
            self.bar.close()
            self.lock.release()
            self._say(f"the model is in {self.folder}")
        dist.barrier()

    def speed(self, batch: Sequence[dict], started: float) -> dict[str, float]:
        """Completion tokens of a step, how many a second, and the most memory so far in MiB."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        tokens, seconds = completion_tokens(batch), time.perf_counter() - started
        return {"tokens": tokens, "tokens_per_second": tokens / seconds, "max_memory_mib": memory}

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Append a step's figures to metrics.jsonl, and show them."""
        figures = {k: v if math.isfinite(v) else None for k, v in figures.items()}  # as JSON can
        if self.rank == 0 and figures:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            figures = {k: v for k, v in figures.items() if v is not None}
            held_out = [f"{k[5:]} {v:.4g}" for k, v in figures.items() if k.startswith("eval_")]
            if held_out:
                self._say(f"held out, after step {step}: {', '.join(held_out)}")
            shown = ("loss", "reward_margin", "logp_margin", "log_ratio_margin", "kl")
            shown += ("tokens_per_second",)
            shown = {k: f"{figures[k]:.4g}" for k in shown if k in figures}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)


# ------------------------------------------------------------ the model and the batches of a run


def load_policy(run: Run, value_head: bool = False) -> Policy:
    """The policy: weights read once, by process 0, and sharded where there are more processes.

    Weights are float32, since at 5e-7 a bfloat16 weight does not move; compute as --dtype says.
    """
    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(run.model_path)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    # sdpa ignores a cap on attention's logits; otherwise the model's own choice.
    how = {"dtype": run.dtype, "attn_implementation": "eager" if capped else None}

    def build(lm):
        width, head = lm.get_output_embeddings().weight.shape[1], None
        if value_head:
            head = nn.Linear(width, 1, dtype=run.dtype)
            for parameter in head.parameters():  # a critic that begins at 0, nothing random
                nn.init.zeros_(parameter)
        return Policy(lm, head, run.bfloat16).eval()  # eval: no dropout

    source = None
    if run.rank == 0:
        arguments = {"use_safetensors": True, "output_loading_info": True, **how}
        lm, info = AutoModelForCausalLM.from_pretrained(run.model_path, **arguments)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError(f"--model {run.model_path}: its weights lack {missing}")
        policy = source = build(lm)
    if run.world_size > 1:
        with torch.device("meta"):
            policy = build(AutoModelForCausalLM.from_config(config, **how))
        if source:
            policy.lm.generation_config = source.lm.generation_config
    blocks = [
        m for m in policy.modules() if type(m).__name__ in (policy.lm._no_split_modules or ())
    ]
    if run.config.activation_checkpointing:
        apply_activation_checkpointing(policy, check_fn=lambda module: module in blocks)
    if run.world_size == 1:  # sharding would cost 40% of the speed for the same bits
        return policy.to(run.device)
    compute = torch.bfloat16 if run.bfloat16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=run.dtype)
    # The root too, even after a pass without gradient: optimizer and checkpoints look at it.
    for module in (*blocks, policy):
        fully_shard(module, mp_policy=precision, reshard_after_forward=True)
    policy.to_empty(device=run.device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = source.state_dict() if source else {}
    dcp_state.set_model_state_dict(policy, state, options=options)
    for name, buffer in policy.named_buffers():  # not all are in a state dict: rotary frequencies
        if source:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)
    return policy


@torch.no_grad()
def self_check(policy: Policy, examples: Sequence[dict], run: Run) -> None:
    """Compare the log-probabilities of the longest sequence with the model's own forward pass.

    Where shared prompts are wrong for the architecture, completions get rows of their own. Raises
    UserError where the output head is not what `_head_logps` takes it for.
    """
    longest = [max(examples, key=longest_sequence)]
    apart = make_batch(longest, run.device, shared=False)
    plain, ours = policy(apart, plain=True), policy(apart)
    error = (ours - plain).abs().mean()  # nats a token
    if not error < (3e-2 if run.bfloat16 else 1e-4):
        raise UserError(
            f"--model {run.model_path}: its log-probabilities differ by {error:.2g} nats a token "
            "from its own forward pass: a scaling of its logits that is not known here"
        )
    try:
        # The worst four tokens in a row: a completion may wrongly see its sibling in its first few,
        # or pass an attention window in its last, and over all its tokens either would drown.
        shared = policy(make_batch(longest, run.device))
        errors = F.pad(apart.pad((shared - plain).abs()), (0, 3))  # (C, T + 3)
        worst = F.avg_pool1d(errors, kernel_size=4, stride=1).max()
        run.shared = bool(worst < (0.2 if run.bfloat16 else 1e-3))
    except (RuntimeError, TypeError, ValueError):  # takes no such mask, or no positions
        run.shared = False
    run.record["shared_prompts"] = run.shared


@torch.no_grad()
def add_reference_logps(policy: Policy, examples: list[dict], run: Run) -> None:
    """Give each example reference_logps: log pi_ref of its completion tokens, end to end.

    The reference is the policy before training and never changes, so this is a column, computed
    once and kept in `reference/` beside the run, for every run with the same weights and tokens.
    """
    key = examples_sha256(examples, run.record["model_sha256"], str(run.dtype), run.bfloat16)
    path = run.folder.parent / "reference" / f"{key[:32]}.safetensors"
    counts = [completion_tokens([example]) for example in examples]
    starts = np.cumsum([0, *counts])
    column = torch.zeros(int(starts[-1]), dtype=run.dtype)
    found = torch.tensor(0)
    if run.rank == 0 and path.exists():
        with contextlib.suppress(SafetensorError, KeyError):  # damaged: computed again
            kept = load_file(path)["logps"]
            found += len(kept) == len(column)
            column = kept if found else column
    dist.broadcast(found, 0)
    for first in progress(range(0, 0 if found else len(examples), 1024), "reference"):
        for micro in micro_batches(examples[first : first + 1024], run):
            spans = [range(starts[i], starts[i + 1]) for i in (micro.indices + first).tolist()]
            places = torch.tensor([place for span in spans for place in span], dtype=torch.long)
            column[places] = policy(micro).to(column)
    if not found:
        dist.all_reduce(column)
        if run.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"logps": column}, partial)
            partial.rename(path)
    dist.broadcast(column, 0)
    for example, start, count in zip(examples, starts, counts):
        example["reference_logps"] = column[start : start + count].numpy()


def micro_batches(examples: Sequence[dict], run: Run) -> list[Batch]:
    """This process's share of a global batch, in pieces of at most --micro_batch_tokens."""
    sizes = [example_tokens(example, run.shared) for example in examples]
    share = plan(sizes, run.config.micro_batch_tokens, run.world_size)[run.rank]
    pad_id = run.tokenizer.eos_token_id
    return [
        make_batch([examples[i] for i in piece], run.device, pad_id, run.shared, piece)
        for piece in share
    ]


def gather(parts: Sequence[tuple[Tensor, dict]], size: int, run: Run) -> dict[str, Tensor]:
    """(indices (b,), {name: (b,)}) of all processes' micro-batches to {name: (size,)}."""
    names = list(parts[0][1])
    values = torch.stack([torch.cat([part[name].detach() for _, part in parts]) for name in names])
    table = values.new_zeros(len(names), size)
    table[:, torch.cat([indices for indices, _ in parts])] = values
    dist.all_reduce(table)
    return dict(zip(names, table))


def make_optimizer(policy: Policy, config) -> torch.optim.Optimizer:
    """RMSprop, as the authors used, or AdamW, as the later paper recommends; no weight decay."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    return torch.optim.RMSprop(policy.parameters(), lr=config.lr)


def clip_gradient(policy: Policy, losses: Tensor, config, step: int) -> float:
    """Scale the gradient to at most --max_grad_norm. Returns its norm before, as a number.

    losses: (B,) of the global batch. Raises FloatingPointError if one of them, or the norm, is not
    finite, before a step is taken.
    """
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not (math.isfinite(norm) and losses.isfinite().all()):
        where = (~losses.isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"step {step}: gradient norm {norm}, losses not finite at places {where} of the batch"
        )
    return norm
