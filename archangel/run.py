"""A training run's command line, output folder and files. A reader of a step may skip this file.

In the order of this file:

    parse_args, run_script        the command line, and how a script ends
    find_model, load_tokenizer,
    load_language_model           what --model names
    Run                           this process's part in a run; run.json, metrics.jsonl, checkpoints
                                  and the exported model
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterator
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
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from archangel import records
from archangel.errors import Interrupted, UserError, exit_status
from archangel.records import TOY

ConfigType = typing.TypeVar("ConfigType")

MODELS = {  # the report's seven models (section 3.4): short name to hub id
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "pythia-12b": "EleutherAI/pythia-12b",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
}
# The files of a model that are fetched: no pickled weights, and no code.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
RUN_FORMAT = 3  # of the files in --out; those of other numbers cannot be resumed
# Settings that may differ when a run is resumed. Model and data may have moved: what they contain
# is compared by its fingerprint.
MAY_CHANGE = {
    "data",
    "epochs",
    "eval_every",
    "max_steps",
    "micro_batch_tokens",
    "model",
    "out",
    "resume",
    "save_every",
}


# ------------------------------------------------------------------------------- the command line


def parse_args(config_class: type[ConfigType], description: str) -> ConfigType:
    """The command line as a `config_class`. The comments behind its fields are the --help texts."""
    comments = {}
    for base in config_class.__mro__:
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(base)
            comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))

    takes_data = any(field.type == str | list[str] for field in dataclasses.fields(config_class))
    data_help = records.__doc__.partition("\n\n")[2]

    usage = "%(prog)s"
    for field in dataclasses.fields(config_class):
        if field.default is dataclasses.MISSING:
            usage += f" --{field.name} {field.name.upper()}"
    parser = argparse.ArgumentParser(
        usage=usage + " [--SETTING VALUE ...]",
        description=description,
        epilog=data_help if takes_data else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def raise_error(message: str) -> None:
        raise UserError(f"{message} (--help lists the settings)")

    parser.error = raise_error
    for field in dataclasses.fields(config_class):
        options = {"help": comments.get(field.name, "")}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            options["help"] += f" (default: {field.default})"
        if field.type == str | list[str]:  # several values behind it, or the flag repeated
            options.update(action="extend", nargs="+", default=None)
        elif field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(field.type) is typing.Literal:
            options["choices"] = typing.get_args(field.type)
        else:
            options["type"] = field.type
        parser.add_argument(f"--{field.name}", **options)
    settings = vars(parser.parse_args())
    for field in dataclasses.fields(config_class):
        if field.type == str | list[str]:
            values = settings[field.name] or [field.default]
            settings[field.name] = values[0] if len(values) == 1 else values
    return config_class(**settings)


def check_settings(config, positive: tuple[str, ...] = ()) -> None:
    """Raise UserError for a number that is out of range.

    All numbers must be finite and at least 0; those of the shared settings below, and those that
    `positive` names, above 0.
    """
    positive += ("lr", "max_grad_norm", "epochs", "batch_size", "max_prompt_length")
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in positive:
            in_range = 0 < value < math.inf
            allowed = "above 0"
        else:
            in_range = 0 <= value < math.inf
            allowed = "at least 0"
        if not in_range:
            raise UserError(f"--{name} {value}: must be a finite number {allowed}")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"--max_prompt_length {config.max_prompt_length}: must be below --max_length "
            f"{config.max_length}, so that a completion has room"
        )


def run_script(train: Callable, config_class: type, description: str) -> None:
    """Call train(config) with the command line, and end the process with its exit status."""
    with exit_status():
        train(parse_args(config_class, description))


# ---------------------------------------------------------------------------------------- --model


def find_model(name: str) -> Path:
    """The folder of `toy`, of a short name, of a hub id (fetched if needed) or of a folder.

    Raises UserError unless it holds whole weights in safetensors.
    """
    path = TOY / "model" if name == "toy" else Path(name)
    if not path.is_dir():
        hub_id = MODELS.get(name, name)
        try:
            path = Path(
                snapshot_download(hub_id, allow_patterns=MODEL_FILES, ignore_patterns=["*/*"])
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model {name}: is no folder here, and the hub does not give it "
                f"({type(error).__name__}); offline, use toy or a folder"
            ) from None
    weight_files = list(path.glob("*.safetensors"))
    if not weight_files:
        raise UserError(f"--model {path}: has no .safetensors; write them by save_pretrained")
    for file in weight_files:
        if file.name.startswith("adapter_model"):
            raise UserError(
                f"--model {file}: is an adapter, which would be ignored; merge it into the weights "
                "(merge_and_unload of the peft library), or remove it"
            )
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise UserError(f"--model {file}: {error}; fetch or write it again") from None
    return path


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises UserError if the model is not fit for training."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the library finds wrong with these files
        reason = " ".join(str(error).split())
        raise UserError(f"--model {path}: {reason}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--model {path}: {config.model_type} is not a causal language model")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "unknown method")
        raise UserError(
            f"--model {path}: its weights are quantized ({method}), and cannot be trained; use the "
            "checkpoint that they were quantized from"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {path}: the tokenizer has no end-of-sequence token (eos_token)")
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"--model {path}: the tokenizer has more tokens than the model")
    return tokenizer


def load_language_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights, in the CPU's memory. Raises UserError if it cannot be trained."""
    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(path)
    # The default attention ignores a cap on attention scores (Gemma 2), the eager one does not.
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"
    without_weights = build_without_weights(config, dtype)
    head = without_weights.get_output_embeddings()
    if without_weights.base_model is without_weights or not isinstance(head, nn.Linear):
        raise UserError(
            f"--model {path}: {config.model_type} does not end in a transformer and one linear "
            "layer for the logits (base_model, get_output_embeddings), which this trainer needs"
        )
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {path}: {reason}") from None
    if loading_info["missing_keys"]:
        missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
        raise UserError(f"--model {path}: its weights lack {missing}")
    if loading_info["unexpected_keys"]:
        unexpected = ", ".join(sorted(loading_info["unexpected_keys"])[:3])
        tqdm.write(
            f"warning: --model {path}: not part of the model, left out: {unexpected}",
            file=sys.stderr,
        )
    # Some checkpoints hold a separate output head although their configuration says that it is
    # tied to the embedding. The weights are right, so correct the configuration: the other
    # processes build the model from it.
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    model.config.get_text_config().tie_word_embeddings = head.weight is embedding.weight
    return model


def build_without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of this configuration on the meta device, which takes no memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=config._attn_implementation
        )


# ---------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError that names `path` if it cannot be written: a full disk, no permission."""
    try:
        yield
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        existing = path
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free // 2**20  # torch's own message does not say it
        raise UserError(
            f"{path}: cannot be written ({free:,} MiB free on its disk), {reason}; fix it, and "
            "continue with --resume"
        ) from None


class Run:
    """This process's part in a training run: device, number format, output folder and its files.

    A new Run only looks at the folder. Files are written after `claim_folder`.

    Attributes that a step needs:
        device: where this process computes.
        dtype: of the weights, float32 or float64.
        bfloat16: whether matrix products are computed in bfloat16.
        layout: how examples are arranged in a micro-batch; set by common.
        info: what run.json will hold.
    """

    def __init__(self, config, device: torch.device):
        self.config = config
        self.folder = Path(config.out)
        self.device = device
        self.rank = dist.get_rank()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))  # among the processes of a machine
        self.world_size = dist.get_world_size()
        self.info = {}  # becomes run.json
        self.layout = None
        self.num_steps = 0
        self.bar = None  # the progress bar of training
        self.received_signal = False
        self.seconds_before = 0.0  # of training, before this process resumed it
        self.start_time = time.perf_counter()

        # Weights are float32: at a learning rate of 5e-7 a bfloat16 weight would never move.
        self.dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self.bfloat16 = config.dtype == "bfloat16"
        if config.dtype == "auto" and device.type == "cuda":
            self.bfloat16 = torch.cuda.is_bf16_supported()

        self._check_folder()
        self.model_path = find_model(config.model)
        self.tokenizer = load_tokenizer(self.model_path)

    def print(self, text: str) -> None:
        """Write a line to stderr, from process 0 only."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def raise_everywhere(self, error: UserError | None) -> None:
        """Raise the error of the first process that has one on all processes.

        A collective. Without it, the others would wait for that process, and end with a traceback.
        """
        messages = [None] * self.world_size
        dist.all_gather_object(messages, None if error is None else str(error))
        for message in messages:
            if message is not None:
                raise UserError(message)

    def _check_folder(self) -> None:
        existing = self.folder
        while not existing.exists():
            existing = existing.parent
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UserError(f"--out {self.folder}: cannot be written, because of {existing}")
        if not self.config.resume and any(self.folder.glob("*")):
            raise UserError(f"--out {self.folder}: is not empty; --resume, or choose another")

    def check_examples(self, train_set, test_set) -> None:
        """Say what was left out, and check the examples' lengths. Raises UserError."""
        for name, examples in (("data", train_set), ("held-out data", test_set)):
            for line in examples.records.describe() + examples.left_out.describe():
                self.print(f"{name}: {line}")
        if not train_set:
            raise UserError(f"--data {data_name(self.config)}: no record is left to train on")
        self._check_lengths(train_set, test_set)

    def check_run(self, train_set, test_set, schedule: list[list[int]]) -> None:
        """Check the data and the settings against the run that is resumed. Raises UserError.

        schedule: the example indices of every step. Prints a summary of the data.
        """
        self.num_steps = len(schedule)
        self.info = {
            "format": RUN_FORMAT,
            "script": Path(inspect.getfile(type(self.config))).name,
            "settings": dataclasses.asdict(self.config),
            "steps": self.num_steps,
            "data_sha256": examples_sha256(train_set, test_set),
            "data": {"train": describe_data(train_set), "test": describe_data(test_set)},
            "model_sha256": self._model_sha256(),
            "machine": {
                "processes": self.world_size,
                "threads": torch.get_num_threads(),
                "device": device_name(self.device),
            },
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
            },
        }
        data_sha256 = [None] * self.world_size
        dist.all_gather_object(data_sha256, self.info["data_sha256"])
        if len(set(data_sha256)) > 1:
            raise UserError(f"--data {data_name(self.config)}: is not the same for all processes")
        previous = self._read_previous_record()
        self._refuse_changes(previous)
        for name in ("reference_seconds", "first_log_ratio_per_token"):
            if name in previous:  # measured once, before the run was resumed
                self.info[name] = previous[name]
        self._print_data_summary(train_set, test_set, schedule)

    def is_finished(self) -> bool:
        """Whether the run in --out has done all steps already. Then it says so."""
        previous = self._read_previous_record()
        finished = previous.get("finished", False) and previous["steps"] >= self.num_steps
        if finished:
            self.print(f"{self.folder}: finished already, after {previous['steps']} steps")
        return finished

    def _check_lengths(self, train_set, test_set) -> None:
        longest = 0
        most_tokens = 0
        for examples in [*train_set.with_mismatched(), *test_set.with_mismatched()]:
            if examples:
                longest = max(longest, max(examples.length))
                most_tokens = max(most_tokens, max(examples.num_tokens))
        if most_tokens > self.config.micro_batch_tokens:
            raise UserError(
                f"--micro_batch_tokens {self.config.micro_batch_tokens}: the largest example needs "
                f"{most_tokens}; give at least that, or a smaller --max_length"
            )
        config = AutoConfig.from_pretrained(self.model_path).get_text_config()
        num_positions = getattr(config, "max_position_embeddings", None)
        if num_positions is not None and longest > num_positions:
            raise UserError(
                f"--max_length {self.config.max_length}: the longest example has {longest} tokens, "
                f"the model takes {num_positions}; give a smaller --max_length"
            )

    def _print_data_summary(self, train_set, test_set, schedule) -> None:
        config = self.config
        examples = f"{len(train_set):,} examples"
        if None not in train_set.desirable:
            num_desirable = sum(train_set.desirable)
            num_undesirable = len(train_set) - num_desirable
            examples += f" ({num_desirable:,} desirable, {num_undesirable:,} undesirable"
            if num_desirable != num_undesirable:
                examples += ": the smaller class repeats"
            examples += ")"
        num_records = train_set.records.counts["read"]
        num_left_out = num_records - len(set(train_set.record_number))
        self.print(
            f"data: {data_name(config)}, {num_records:,} records, {num_left_out:,} left out; "
            f"{examples}; {len(test_set):,} held out"
        )
        self.print(
            f"tokens of an example: median {statistics.median(train_set.length):.0f}, longest "
            f"{max(train_set.length)}; {sum(train_set.was_cut):,} cut to --max_length "
            f"{config.max_length}"
        )
        self.print(
            f"training: {self.num_steps:,} steps of {len(schedule[0])} examples, learning rate "
            f"{config.lr:g} after {config.warmup_steps} steps of warm-up"
        )
        if config.warmup_steps > self.num_steps:
            last_lr = config.lr * self.num_steps / config.warmup_steps
            self.print(
                f"warning: {self.num_steps} steps, {config.warmup_steps} of warm-up: the learning "
                f"rate ends at {last_lr:.2g}; a smaller --warmup_steps reaches {config.lr:g}"
            )

    def print_model_summary(self) -> None:
        """Say what is trained and how, once the model is loaded and checked."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.bfloat16:
            dtype = f"bfloat16 over {dtype} weights"
        layout = "packed" if self.info["packed_rows"] else "padded"
        self.print(
            f"model: {self.config.model}, {self.info['parameters']:,} parameters, {dtype}, "
            f"{layout} layout; {self.world_size} process(es) on {self.device.type}"
        )

    def _model_sha256(self) -> list[str]:
        """Fingerprints of the weights and the configuration, computed by process 0."""
        fingerprints = []
        if self.rank == 0:
            for path in [
                *sorted(self.model_path.glob("*.safetensors")),
                self.model_path / "config.json",
            ]:
                with path.open("rb") as file:
                    fingerprints.append(hashlib.file_digest(file, "sha256").hexdigest())
        everyones = [fingerprints]
        dist.broadcast_object_list(everyones)
        return everyones[0]

    def _read_previous_record(self) -> dict:
        """The run.json in the folder; empty if there is none. Raises UserError if it is damaged."""
        path = self.folder / "run.json"
        if not path.exists():
            return {}
        try:
            previous = json.loads(path.read_text())
            has_settings = isinstance(previous["settings"], dict)
        except (ValueError, TypeError, KeyError):
            has_settings = False
        if not has_settings:
            raise UserError(f"--resume {path}: is damaged; choose another --out")
        if previous.get("format") != RUN_FORMAT:
            raise UserError(
                f"--resume {self.folder}: was written by an earlier version, whose checkpoints "
                "cannot be read; choose another --out"
            )
        return previous

    def _refuse_changes(self, previous: dict) -> None:
        """Raise UserError, by name, if the run that is resumed had other settings or data."""
        if not previous:
            return
        changed = []
        for name, value in self.info["settings"].items():
            if name not in MAY_CHANGE and previous["settings"].get(name, value) != value:
                changed.append(f"--{name}")
        for name in ("script", "data_sha256", "model_sha256"):
            if previous[name] != self.info[name]:
                changed.append(name)
        if changed:
            raise UserError(
                f"--resume {self.folder}: {', '.join(changed)} changed since this run began; "
                "give what it began with, or another --out"
            )

    # ------------------------------------------------------------------------------ the folder

    def claim_folder(self) -> None:
        """Make the folder and lock it until this process ends. Raises UserError if it is locked."""
        error = None
        if self.rank == 0:
            try:
                with writing(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = FileLock(self.folder / "run.lock")
                self.lock.acquire(timeout=0)
            except UserError as caught:
                error = caught
            except Timeout:
                error = UserError(f"--out {self.folder}: another run is writing there")
        self.raise_everywhere(error)
        self.write_record()

    def write_record(self, **more) -> None:
        """Write run.json: every setting, version and fingerprint, and `more`."""
        self.info.update(more)
        if self.rank == 0:
            path = self.folder / "run.json"
            partial = path.with_suffix(".json.partial")
            with writing(path):
                partial.write_text(json.dumps(self.info, indent=2) + "\n")
                partial.rename(path)

    def read_tensors(self, name: str, arithmetic: str) -> dict[str, Tensor]:
        """The tensors that write_tensors wrote, with the same `arithmetic`.

        Empty if there are none, if they were computed in another way or if the file is damaged.
        """
        try:
            with safe_open(self.folder / name, "pt") as file:
                if file.metadata() != {"arithmetic": arithmetic}:
                    return {}
                return {key: file.get_tensor(key) for key in file.keys()}
        except (FileNotFoundError, SafetensorError):
            return {}

    def write_tensors(self, name: str, tensors: dict[str, Tensor], arithmetic: str) -> None:
        """Write tensors into the folder, the whole file or nothing.

        arithmetic: how they were computed; see common.arithmetic.
        """
        path = self.folder / name
        partial = path.with_name(name + ".partial")
        with writing(path):
            save_file(tensors, partial, metadata={"arithmetic": arithmetic})
            partial.rename(path)

    # ------------------------------------------------------------------------------ the metrics

    def speed_metrics(self, num_tokens: int, start_time: float) -> dict[str, float]:
        """Completion tokens of a step, how many per second, and this process's peak memory."""
        if self.device.type == "cuda":
            max_memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            max_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "tokens": num_tokens,
            "tokens_per_second": num_tokens / (time.perf_counter() - start_time),
            "max_memory_mib": max_memory,
        }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a step's metrics to metrics.jsonl, and show some of them."""
        if self.rank != 0 or not metrics:
            return
        metrics["seconds"] = self.seconds_before + time.perf_counter() - self.start_time
        line = {"step": step}
        for name, value in metrics.items():
            line[name] = value if math.isfinite(value) else None  # JSON has no nan
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")

        held_out = []
        for name, value in metrics.items():
            if name.startswith("eval_"):
                held_out.append(f"{name.removeprefix('eval_')} {value:.4g}")
        if held_out:
            self.print(f"held out, after step {step}: {', '.join(held_out)}")
        if self.bar is None:
            self.bar = tqdm(desc="train", initial=max(0, step - 1), total=self.num_steps)
        shown = {}
        for name in ("loss", "reward_margin", "kl", "tokens_per_second"):
            if name in metrics:
                shown[name] = f"{metrics[name]:.4g}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    # -------------------------------------------------------------------------- the checkpoints

    def save_on_signals(self) -> None:
        """From now on SIGTERM and Ctrl-C end the run after the present step, with a checkpoint."""

        def remember(signal_number, frame) -> None:
            self.received_signal = True

        signal.signal(signal.SIGTERM, remember)
        signal.signal(signal.SIGINT, remember)

    def save_if_due(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save every --save_every steps and at the end; and after a signal, then also stop."""
        stop = torch.tensor(int(self.received_signal))
        dist.all_reduce(stop)  # a signal may reach the processes during different steps
        save_every = self.config.save_every
        if stop or (save_every and (step % save_every == 0 or step == self.num_steps)):
            self.save_checkpoint(step, policy, optimizer)
        if stop:
            if self.bar is not None:
                self.bar.close()
            raise Interrupted(f"stopped and saved after step {step}; continue with --resume")

    def save_checkpoint(self, step: int, policy: nn.Module, optimizer) -> None:
        """Save the state of policy and optimizer after this step. Only the newest one is kept.

        There is no random state in it: the order of the data is all that is random here, and it
        depends on the seed alone. A checkpoint is written to step_N.partial, and renamed when it is
        complete. So one that is half written is never read.
        """
        raise_if_not_finite(policy)
        path = self.folder / "checkpoints" / f"step_{step:08d}"
        partial = path.with_suffix(".partial")
        model_state, optimizer_state = dcp_state.get_state_dict(policy, optimizer)
        with writing(path):
            if self.rank == 0:
                for unfinished in path.parent.glob("*.partial"):  # of a run that was killed
                    shutil.rmtree(unfinished)
            dist.barrier()
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
            if self.rank == 0:
                partial.rename(path)  # only a complete checkpoint has the final name
                self._remove_older_checkpoints()
        dist.barrier()

    def _find_checkpoints(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        return sorted(self.folder.glob("checkpoints/step_" + "[0-9]" * 8))

    def _remove_older_checkpoints(self) -> None:
        for older in self._find_checkpoints()[:-1]:
            shutil.rmtree(older)

    def load_checkpoint(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint, if there is one. Returns the number of steps done.

        Removes the metrics of later steps, since these are done again.
        """
        checkpoints = self._find_checkpoints()
        steps_done = 0
        if checkpoints:
            path = checkpoints[-1]
            steps_done = int(path.name.removeprefix("step_"))
            if steps_done > self.num_steps:
                raise UserError(
                    f"--max_steps {self.num_steps}: {self.folder} has {steps_done} steps already"
                )
            model_state, optimizer_state = dcp_state.get_state_dict(policy, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            try:
                # Without its metadata torch would log two tracebacks before it raises an error.
                dcp.FileSystemReader(path).read_metadata()
                dcp.load(state, checkpoint_id=path)
            except (Exception, dcp.api.CheckpointException) as error:  # which is a BaseException
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise UserError(f"--resume {path}: cannot be read, {reason}") from None
            dcp_state.set_state_dict(
                policy,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            if self.rank == 0:  # of a run that was killed before it removed them
                self._remove_older_checkpoints()
        if self.rank == 0:
            self._drop_later_metrics(steps_done, has_checkpoint=bool(checkpoints))
        return steps_done

    def _drop_later_metrics(self, steps_done: int, has_checkpoint: bool) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().split("\n"):
            is_whole = line.endswith("}")  # a killed process may have left half a line
            if is_whole and has_checkpoint and json.loads(line)["step"] <= steps_done:
                kept.append(line + "\n")
        if kept:
            self.seconds_before = json.loads(kept[-1])["seconds"]
        partial = path.with_suffix(".jsonl.partial")
        with writing(path):
            partial.write_text("".join(kept))
            partial.rename(path)

    # ------------------------------------------------------------------------------- the result

    def export(self, policy: nn.Module) -> None:
        """Write model and tokenizer into the folder, for from_pretrained(folder)."""
        raise_if_not_finite(policy)
        language_model = policy.lm
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = dcp_state.get_model_state_dict(language_model, options=options)
        if self.rank == 0:
            tied = getattr(language_model, "all_tied_weights_keys", {})
            for name, source in tied.items():
                if language_model.get_parameter(name) is language_model.get_parameter(source):
                    state.pop(name, None)  # one copy, under the other name, is enough
            partial = self.folder / "model.partial"
            self._set_end_tokens(language_model)
            with writing(partial):
                language_model.save_pretrained(partial, state_dict=state)
                self.tokenizer.save_pretrained(partial)
                for path in partial.iterdir():
                    final = self.folder / path.name
                    if final.is_dir():  # a folder cannot be renamed onto another one
                        shutil.rmtree(final)
                    path.replace(final)
                partial.rmdir()
            self.write_record(finished=True)
            if self.bar is not None:
                self.bar.close()
            self.lock.release()
        self.print(f"the model is in {self.folder}")
        dist.barrier()

    def _set_end_tokens(self, language_model: PreTrainedModel) -> None:
        """Let `generate` stop where the completions of the training data end."""
        generation_config = language_model.generation_config
        end_ids = generation_config.eos_token_id
        if end_ids is None:
            end_ids = []
        elif isinstance(end_ids, int):
            end_ids = [end_ids]
        for end_id in self.info["data"]["train"]["end_ids"]:
            if end_id not in end_ids:
                end_ids = [*end_ids, end_id]
        generation_config.eos_token_id = end_ids[0] if len(end_ids) == 1 else end_ids


def data_name(config) -> str:
    """The name or names behind --data."""
    return config.data if isinstance(config.data, str) else " ".join(config.data)


def device_name(device: torch.device) -> str:
    """The name of the GPU that this process uses, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def examples_sha256(train_set, test_set) -> str:
    """A fingerprint of all tokens and labels."""
    digest = hashlib.sha256()
    for examples in (train_set, test_set):
        digest.update(examples.records.counts["sha256"].encode())
        for column in (examples.num_tokens, examples.record_number):
            digest.update(column.tobytes())
        digest.update(repr(examples.desirable).encode())
    return digest.hexdigest()


def describe_data(examples) -> dict:
    """What was read, used and left out of a split, for run.json."""
    counts = examples.records.counts
    return {
        **counts,
        "left_out": {**counts["left_out"], **examples.left_out},
        "used": len(set(examples.record_number)),
        "examples": len(examples),
    }


def raise_if_not_finite(policy: nn.Module) -> None:
    """Raise FloatingPointError if a weight is not a finite number."""
    for name, parameter in policy.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not local.isfinite().all():
            raise FloatingPointError(f"a weight of {name} is not finite; it is not saved")
