"""A training run's files: the model it begins with, settings, metrics, checkpoints, the result."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from archangel.command import Interrupted, UserError
from archangel.rows import TOY, completion_tokens, example_tokens, examples_sha256, longest_sequence

MODELS = {  # the report's seven (section 3.4), short name to hub id
    **{f"pythia-{size}": f"EleutherAI/pythia-{size}" for size in ("1.4b", "2.8b", "6.9b", "12b")},
    **{f"llama-{size}": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b")},
}
MAY_CHANGE = {"max_steps", "epochs", "save_every", "eval_every", "micro_batch_tokens", "resume"}
MAY_CHANGE |= {"out", "model", "data"}  # a folder may move; what is in it goes by its fingerprint


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


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError that names `path` where it cannot be written: no space, no permission."""
    try:
        yield
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:  # a BaseException
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{path}: cannot be written, {reason}; mend it, go on by --resume"
        ) from None


def read_column(path: Path, size: int) -> Tensor | None:
    """The reference's log-probabilities (size,) kept there; None if there are none, or damaged."""
    with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError):
        column = load_file(path)["logps"]
        return column if len(column) == size else None


def write_column(path: Path, column: Tensor) -> None:
    """Keep the reference's log-probabilities (N,), whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # two runs may write the same column
        save_file({"logps": column}, partial)
        partial.rename(path)


def checkpoint_tensors(policy: nn.Module, model: dict, optimizer: dict) -> dict[str, Tensor]:
    """What a checkpoint holds of the two state dicts, by name: tensors, and nothing else.

    A tied weight goes by one name. The optimizer's settings are left out: they are the run's.
    """
    tied = {f"lm.{name}" for name in getattr(policy.lm, "all_tied_weights_keys", {})}
    tensors = {f"model.{name}": value for name, value in model.items() if name not in tied}
    for name, state in optimizer["state"].items():
        tensors |= {f"optimizer.{name}.{part}": tensor for part, tensor in state.items()}
    return tensors


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
        self.packed, self.stop = True, False  # rows end to end, see self_check; a signal came
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
        self.train_set = train_set
        if not train_set:
            raise UserError(
                f"--data {config.data}: every label is False; this loss needs True ones"
            )
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
            self.say(f"{good} desirable, {bad} undesirable examples: the smaller class repeats")
        self.record = {
            "script": Path(inspect.getfile(type(config))).name,
            "settings": dataclasses.asdict(config),
            "steps": steps,
            "data_sha256": examples_sha256(everything, len(train_set), labels),
            "machine": {
                "processes": self.world_size,
                "threads": torch.get_num_threads(),
                "device": self.device.type,
            },
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
            self.say(f"{self.folder}: finished already, after {before['steps']} steps")
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
        everyones = [None] * self.world_size
        dist.all_gather_object(everyones, self.record["data_sha256"])
        if len(set(everyones)) > 1:  # they would wait for each other, or learn from other rows
            raise UserError(f"--data {config.data}: is not the same for all processes")
        self._refuse_changes(before)
        return True

    def say(self, text: str) -> None:
        """Write a line for a person, once (process 0)."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes. Every process calls it."""
        everyones = torch.tensor(int(yes))
        if self.world_size > 1:
            dist.all_reduce(everyones, dist.ReduceOp.MIN)
        return bool(everyones)

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
            with writing(self.folder / name):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{name}.partial").write_text(text)
                (self.folder / f"{name}.partial").rename(self.folder / name)

    def write_record(self) -> None:
        """Write run.json: every setting, version and fingerprint."""
        self.write("run.json", json.dumps(self.record, indent=2) + "\n")

    def _check_weights(self, policy: nn.Module) -> None:
        for parameter in policy.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not local.isfinite().all():
                raise FloatingPointError(
                    "a weight is not finite; nothing was saved after that step"
                )

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/step_" + "[0-9]" * 8))

    def _remove_older(self) -> None:
        for older in self._checkpoints()[:-1]:
            shutil.rmtree(older)

    def save(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint beside, rename it when whole, remove the older ones.

        It holds no random state: all that is random here depends on the seed and the step alone.
        """
        self._check_weights(policy)
        final = self.folder / f"checkpoints/step_{step:08d}"
        partial = final.with_name(final.name + ".partial")
        tensors = checkpoint_tensors(policy, *dcp_state.get_state_dict(policy, optimizer))
        size, files = 0, {}
        for name, tensor in tensors.items():  # a file is put together in memory: a GiB at most
            size += tensor.numel() * tensor.element_size()
            files[name] = 1 + size // 2**30
        with writing(final):
            if self.rank == 0:  # what a killed run left half-written
                for older in final.parent.glob("*.partial"):
                    shutil.rmtree(older)
            dist.barrier()
            # safetensors, because torch's own format has a pickle in it, which can run code.
            writer = dcp.HuggingFaceStorageWriter(str(partial), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
            if self.rank == 0:
                partial.rename(final)
                self._remove_older()
        dist.barrier()

    def resume(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> int:
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
                reader = dcp.HuggingFaceStorageReader(str(saved[-1]))
                for name, tensor in reader.read_metadata().state_dict_metadata.items():
                    if sum(part.sizes.numel() for part in tensor.chunks) != tensor.size.numel():
                        raise ValueError(f"a part of {name} is missing")
                tensors = checkpoint_tensors(policy, model, optim)
                dcp.load(tensors, storage_reader=reader)
            except (Exception, dcp.api.CheckpointException) as error:  # a BaseException
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"--resume {saved[-1]}: cannot be read, {reason}") from None
            dcp_state.set_state_dict(
                policy, optimizer, model_state_dict=model, optim_state_dict=optim
            )
            if self.rank == 0:  # of a run that was killed between a checkpoint and this
                self._remove_older()
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

    def save_if_due(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save every --save_every steps and at the end; and when a signal came, then stop."""
        stop = torch.tensor(int(self.stop))
        dist.all_reduce(stop)  # a signal may reach the processes at different steps
        every = self.config.save_every
        if stop or every and (step % every == 0 or step == self.steps):
            self.save(step, policy, optimizer)
        if stop:
            self.bar.close()
            raise Interrupted(f"stopped and saved after step {step}; go on with --resume")

    def export(self, policy: nn.Module) -> None:
        """Write model, tokenizer and generation settings, for `from_pretrained(folder)`."""
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = dcp_state.get_model_state_dict(policy, options=options)
        self._check_weights(policy)
        if self.rank == 0:
            partial = self.folder / "model.partial"
            state = {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")}
            for tied in getattr(policy.lm, "all_tied_weights_keys", {}):
                state.pop(tied, None)  # written once, under the other name
            with writing(partial):
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
            self.say(f"the model is in {self.folder}")
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
            path = self.folder / "metrics.jsonl"
            with writing(path), path.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            figures = {k: v for k, v in figures.items() if v is not None}
            held_out = [f"{k[5:]} {v:.4g}" for k, v in figures.items() if k.startswith("eval_")]
            if held_out:
                self.say(f"held out, after step {step}: {', '.join(held_out)}")
            shown = ("loss", "reward_margin", "logp_margin", "log_ratio_margin", "kl")
            shown += ("tokens_per_second",)
            shown = {k: f"{figures[k]:.4g}" for k in shown if k in figures}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def refuse_step(
        self, step: int, norm: float, batch: Sequence[dict], figures: dict[str, Tensor]
    ) -> None:
        """Raise FloatingPointError for a step whose loss or gradient is not finite.

        figures: (B,) each, of the global batch. not_finite.jsonl then holds the texts and figures
        of its examples, and their place in the training data, counted from 0.
        """
        decode = self.tokenizer.decode
        examples = [
            {
                "example": next(i for i, other in enumerate(self.train_set) if other is example),
                **{name: str(values[place].item()) for name, values in figures.items()},
                "prompt": decode(example["prompt_ids"]),
                "completions": [decode(ids) for ids in example["completions_ids"]],
            }
            for place, example in enumerate(batch)
        ]
        self.write("not_finite.jsonl", "".join(json.dumps(line) + "\n" for line in examples))
        bad = [line["example"] for line in examples if not math.isfinite(float(line["loss"]))]
        raise FloatingPointError(
            f"step {step}: the loss of {len(bad)} of {len(batch)} examples is not finite "
            f"({', '.join(map(str, bad[:8])) or 'none'}), the gradient's norm is {norm}; see "
            f"{self.folder / 'not_finite.jsonl'}; the step was not taken"
        )
