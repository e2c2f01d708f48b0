"""How fast a training step is, beside TRL's on the same rows.

    python -m archangel.benchmark --model small-50k --method dpo             # ours alone
    python -m archangel.benchmark --model small-50k --method dpo --peer trl  # where TRL is there
    python -m archangel.benchmark --model small-50k --method dpo --ladder    # what each idea gains
    python -m archangel.benchmark --model small-50k --method dpo --peer DIR  # another checkout

Nothing is fetched: the model is one of the shapes below with random weights, the rows are random
tokens with lognormal lengths (prompts of 160 in the mean, completions of 64). Each contender lives
in a process of its own, so that its peak memory is its own. They take turns, a step each, so that
whatever else the machine does hits all alike; on a GPU, whose memory is too small for all, one
comes after the other. After a few steps to warm up, each passes once over the same batches. These
are of rows of like length, as suits a trainer that pads. (The ladder's are drawn at random, as our
trainers do.)

The peer has three rows, since TRL's defaults save memory, not time, and since its output head
scores every position, padding too, on a device without Triton:

    as it comes   its defaults, but with our optimizer, precision and batches
    best          precomputed reference by a model of its own, no gradient checkpointing
    compact       best, with the output head on completion tokens only, as on a GPU

On a GPU best is compact already, and the last row is left out. The last row is the one that counts.
TRL has no offline PPO; for SLiC the peer is DPO's hinge, on log-ratios, with a reference. On a CPU
all compute in float32. Memory that is freed stays with the process, for all: it is faster.

A peer can also be a folder with another checkout of this project, such as one of an earlier commit.

Useful work is what no implementation can leave out: each prompt once, each completion once (KTO's
mismatched partner is a completion), the output head on completion tokens, and for a token in each
layer the keys that it may see. Forward, in floating-point operations, with L layers, width H,
feed-forward width I and vocabulary V:

    2 L (4 H^2 + 2 H I)   a token
    4 L H                 a token and a key that it sees
    2 H V                 a completion token, for the output head

A step is three times that (KTO's partners: once), the reference pass once. MFU is useful work over
the time and over the rate of a large matrix product on this machine. On a CPU it is by CPU time, as
are the figures that say so (means over all steps, all threads together): others may hold up the
clock, not these.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import common
import common_v1
from archangel import command
from archangel import rows as records_v1

SHAPES = {  # name: layers, width, heads, feed-forward width, vocabulary
    "pythia-1.4b": (24, 2048, 16, 8192, 50304),
    "small-50k": (4, 256, 4, 1024, 50304),
    "small-4k": (8, 256, 4, 1024, 4096),
    "tiny": (2, 32, 2, 64, 512),
}
REFERENCE = ("dpo", "kto", "ppo_offline")  # the losses with a reference
WARMUP = 2  # steps that are not measured
# Freed memory stays with the process: the same for all contenders, and faster for all of them.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_THRESHOLD_": str(2**32)}


@dataclass
class Config:
    """Every setting; the comments are what --help prints."""

    model: str  # a shape: pythia-1.4b, small-50k, small-4k, tiny
    method: Literal["sft", "dpo", "kto", "slic", "ppo_offline"] = "dpo"  # the loss
    kl: Literal["mismatched", "other_half", "zero"] = "mismatched"  # KTO's reference point
    peer: str = "none"  # beside us: trl (its three rows), compact (the last), or another checkout
    ladder: bool = False  # instead of a peer, our own step without its ideas, one by one (DPO)
    steps: int = 12  # measured steps: a pass over as many batches of rows
    other_steps: int = 3  # measured steps of the rows that do not count
    batch_size: int = 8  # pairs, or completions, a step
    micro_batch_tokens: int = 8192  # ours: most tokens at once
    peer_rows_at_once: int = 0  # the peer's: pairs or completions at once; 0: the whole batch
    max_length: int = 512  # tokens of a prompt and a completion together
    lr: float = 1e-6  # learning rate
    seed: int = 1  # of rows and weights
    out: str = "runs/benchmark"  # folder for the figures, as JSON

    def __post_init__(self):
        if self.model not in SHAPES:
            raise common.UserError(f"--model {self.model}: not one of {', '.join(SHAPES)}")
        if not self.lr > 0:
            raise common.UserError(f"--lr {self.lr}: must be above 0")
        if not self.out:
            raise common.UserError("--out: needs the name of a folder")
        least = {"steps": WARMUP, "other_steps": 1, "batch_size": 1, "max_length": 64, "seed": 0}
        least["peer_rows_at_once"] = 0
        least["micro_batch_tokens"] = 2 * self.max_length  # a pair is shorter
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise common.UserError(f"--{name} {getattr(self, name)}: must be at least {limit}")
        if self.batch_size % 2 and self.method in ("kto", "ppo_offline"):
            raise common.UserError(f"--batch_size {self.batch_size}: must be even, half each class")
        if self.ladder and (self.method != "dpo" or self.peer != "none"):
            raise common.UserError("--ladder: is of --method dpo, without a peer")
        at_once = self.peer_rows_at_once
        if at_once and self.batch_size % at_once:
            raise common.UserError(f"--peer_rows_at_once {at_once}: must divide --batch_size")
        if at_once == 1 and self.method == "kto":
            raise common.UserError("--peer_rows_at_once 1: TRL's KTO needs 2, to pair replies anew")
        is_trl = self.peer in ("trl", "compact")
        if self.peer != "none" and not is_trl and not (Path(self.peer) / "kto.py").exists():
            raise common.UserError(f"--peer {self.peer}: is not trl, compact or a checkout of this")
        if is_trl and self.method == "ppo_offline":
            raise common.UserError(f"--peer {self.peer}: TRL has no offline PPO; leave it out")
        if is_trl and importlib.util.find_spec("trl") is None:
            raise common.UserError(
                f"--peer {self.peer}: TRL is not installed; pip install trl, or leave it out"
            )


# --------------------------------------------------------------------------- the rows, the model


def make_rows(config: Config) -> list[dict]:
    """Examples of random tokens: {"prompt_ids", "completions_ids"}, and a label for KTO and PPO.

    Two completions for DPO and SLiC, else one. The last token of each is the end mark, 0.
    """
    rng = np.random.default_rng(config.seed)
    vocabulary = SHAPES[config.model][-1]

    def length(mean: float, sigma: float, least: int, most: int) -> int:
        return int(np.clip(round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)), least, most))

    rows = []
    for number in range(config.steps * config.batch_size):
        prompt = rng.integers(1, vocabulary, length(160, 0.7, 4, config.max_length * 3 // 4))
        room = config.max_length - len(prompt)
        completions = [
            [*rng.integers(1, vocabulary, length(64, 0.8, 2, room) - 1), 0]
            for _ in range(2 if config.method in ("dpo", "slic") else 1)
        ]
        row = {"prompt_ids": prompt, "completions_ids": [np.array(ids) for ids in completions]}
        rows.append(row | {"label": number % 2 == 0})
    return rows


def like_lengths_together(rows: Sequence[dict], config: Config) -> list[dict]:
    """The rows in batches of like length, the batches in an order of the seed."""
    ordered = sorted(rows, key=records_v1.longest_sequence)
    size = config.batch_size
    batches = [ordered[first : first + size] for first in range(0, len(rows), size)]
    np.random.default_rng(config.seed).shuffle(batches)
    return [row for batch in batches for row in batch]


def write_rows(rows: Sequence[dict], method: str, path: Path) -> None:
    """Write rows as the text that the tokenizer of `write_model` turns into the same tokens."""

    def text(ids: Sequence[int]) -> str:
        return "".join(f" {number}" for number in ids)

    with path.open("w") as file:
        for row in rows:
            completions = [text(ids[:-1]) for ids in row["completions_ids"]]  # end marks are added
            fields = {"completion": completions[0]}
            if method in ("dpo", "slic"):
                fields = dict(zip(("chosen", "rejected"), completions))
            elif method in ("kto", "ppo_offline"):
                fields["label"] = row["label"]
            file.write(json.dumps({"prompt": text(row["prompt_ids"]), **fields}) + "\n")


def write_model(config: Config, folder: Path) -> None:
    """Write random weights of the shape, and a tokenizer with a token for each number."""
    layers, width, heads, feed_forward, vocabulary = SHAPES[config.model]
    torch.manual_seed(config.seed)
    shape = GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    words = {"<end>": 0} | {str(number): number for number in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


# ---------------------------------------------------------------------------- what is to be done


def forward_flops(shape: tuple, before: int, tokens: int) -> int:
    """Forward operations of `tokens` tokens after `before` others, without the output head."""
    layers, width, _, feed_forward, _ = shape
    weights = layers * (4 * width**2 + 2 * width * feed_forward)
    seen = tokens * before + tokens * (tokens + 1) // 2  # keys, a token's own included
    return 2 * weights * tokens + 4 * layers * width * seen


def useful_work(rows: Sequence[dict], shape: tuple, method: str) -> dict[str, int]:
    """Tokens that must be computed, and operations of their step and of their reference pass.

    KTO's partner is counted as long as the row's own completion, which over the rows it nearly is.
    """
    head = 2 * shape[1] * shape[-1]  # a completion token
    tokens = completion_tokens = trained = forward = 0
    for row in rows:
        before, lengths = len(row["prompt_ids"]), [len(ids) for ids in row["completions_ids"]]
        replies = sum(forward_flops(shape, before, n) + head * n for n in lengths)
        trained += forward_flops(shape, 0, before) + replies
        partner = method == "kto"
        forward += partner * replies
        completion_tokens += sum(lengths)
        tokens += before + sum(lengths) * (2 if partner else 1)
    reference = trained + forward if method in REFERENCE else 0
    return {
        "tokens": tokens,
        "completion_tokens": completion_tokens,
        "step_flops": 3 * trained + forward,
        "reference_flops": reference,
    }


def parameters(shape: tuple) -> int:
    """Weights and biases of a GPT-NeoX of this shape, its output head apart from its embedding."""
    layers, width, _, feed_forward, vocabulary = shape
    block = 4 * width**2 + 2 * width * feed_forward + 4 * width + feed_forward + width + 4 * width
    return 2 * vocabulary * width + layers * block + 2 * width


def count(config: Config, rows: Sequence[dict]) -> dict[str, float]:
    """Operations and bytes of a mean step, before anything is measured."""
    shape = SHAPES[config.model]
    useful = {k: v / config.steps for k, v in useful_work(rows, shape, config.method).items()}
    body = 3 * sum(
        forward_flops(shape, 0, len(row["prompt_ids"]))
        + sum(
            forward_flops(shape, len(row["prompt_ids"]), len(ids)) for ids in row["completions_ids"]
        )
        for row in rows
    )
    apart, padded = 0, 0
    for first in range(0, len(rows), config.batch_size):
        batch = rows[first : first + config.batch_size]
        sequences = [
            len(row["prompt_ids"]) + len(ids) for row in batch for ids in row["completions_ids"]
        ]
        apart, padded = apart + sum(sequences), padded + len(sequences) * max(sequences)
    size = 4 * parameters(shape)  # bytes of float32 weights
    return {
        "useful_tokens": useful["tokens"],
        "completion_tokens": useful["completion_tokens"],
        "prompt_with_each_completion_tokens": apart / config.steps,
        "padded_rows_tokens": padded / config.steps,
        "step_gflop": useful["step_flops"] / 1e9,
        "of_it_output_head_gflop": (useful["step_flops"] - body / config.steps) / 1e9,
        "reference_gflop": useful["reference_flops"] / 1e9,
        "weights_mib": size / 2**20,
        "weights_gradient_optimizer_mib": 3 * size / 2**20,
        # Clipping reads the gradient and rescales it; RMSprop reads three arrays, writes two.
        "optimizer_traffic_mib": 8 * size / 2**20,
        "logits_mib": 4 * useful["completion_tokens"] * shape[-1] / 2**20,
    }


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a large matrix product, the best of several.

    In bfloat16 on a GPU; on a CPU in float32, and in a second of CPU time, not of the clock.
    """
    n, dtype, clock = 1536, torch.float32, time.process_time
    if device.type == "cuda":
        n, dtype, clock = 8192, torch.bfloat16, time.perf_counter
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        synchronise(device)
        started = clock()
        a @ b
        synchronise(device)
        seconds.append(clock() - started)
    return 2 * n**3 / min(seconds)


# ------------------------------------------------------------------------------- taking turns


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Turns:
    """A contender's side of the pipe: it works only between `wait` and `tell`."""

    def __init__(self, connection):
        self.connection, self.tokens, self.counter = connection, 0, None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def count_tokens(self, model: torch.nn.Module) -> None:
        """From now on count the places that the model computes, padding and all."""

        def add(_, args, kwargs):
            self.tokens += (args[0] if args else kwargs["input_ids"]).numel()

        model.base_model.register_forward_pre_hook(add, with_kwargs=True)

    def wait(self) -> None:
        """Until it is our turn; then the clock starts."""
        order = self.connection.recv()
        if order == "leave":
            raise SystemExit
        self.tokens, self.counter = 0, None
        if order == "count" and self.device.type == "cpu":  # torch compiles nothing while it counts
            attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            formulas = {
                attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
            }
            self.counter = FlopCounterMode(display=False, custom_mapping=formulas)
            self.counter.__enter__()
        synchronise(self.device)
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The clock stops."""
        synchronise(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        self.figures = {"seconds": wall - self.started[0], "cpu_seconds": cpu - self.started[1]}
        self.figures["tokens"] = self.tokens
        if self.counter:
            self.counter.__exit__(None, None, None)
            self.figures["flops"] = self.counter.get_total_flops()
        self.figures["max_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if self.device.type == "cuda":
            self.figures["max_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20

    def tell(self, **figures) -> None:
        """End the turn with what it took, and what else there is to say."""
        self.connection.send(self.figures | figures)


def fingerprint(prompt_ids, completion_ids) -> str:
    """A name for the tokens of a prompt and its completion."""
    ids = [np.asarray(ids, dtype=np.int64).tobytes() for ids in (prompt_ids, completion_ids)]
    return hashlib.sha256(b"|".join(ids)).hexdigest()[:16]


@dataclass(frozen=True)
class Stage:
    """Our step without some of its ideas."""

    packed: bool = True  # each prompt once, no padding
    micro_batch_tokens: int = 0  # as the settings say
    plain_head: bool = False  # torch's cross-entropy, of all completion tokens at once
    all_logits: bool = False  # by the model's own forward pass, of padding too


class PlainHead:
    """Takes the place of `common.TokenLogps`."""

    @staticmethod
    def apply(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Log-probabilities (n,) of targets (n,)."""
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none"), None


def logps_from_all_logits(policy: common.Policy, micro_batch: common.MicroBatch) -> torch.Tensor:
    """Log-probabilities (N,) from the logits of every position, as in the plainest trainer."""
    device_type = micro_batch.targets.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=policy.bfloat16):
        logps = policy.lm(**micro_batch.inputs).logits.float().log_softmax(-1)  # (R, T, V)
    return logps.flatten(0, 1)[micro_batch.predictors, micro_batch.targets]


def script_settings(
    script, config: Config, folder: Path, rows: Path, name: str, stage: Stage
) -> object:
    """What our script is told: a `Config` of its own."""
    more = {}
    if config.method == "kto":
        more["kl"] = config.kl
    return script.Config(
        model=str(folder / "model"),
        data=str(rows),
        out=str(folder / name / "run"),
        batch_size=config.batch_size,
        micro_batch_tokens=stage.micro_batch_tokens or config.micro_batch_tokens,
        lr=config.lr,
        warmup_steps=0,
        save_every=0,
        max_length=config.max_length,
        max_prompt_length=config.max_length * 3 // 4,
        **more,
    )


def ours(connection, config: Config, folder: Path, rows: Path, name: str, stage: Stage) -> None:
    """Our script's own `train`, which waits for its turn before the reference pass and each step.

    The functions that it calls there are replaced by ones that also take turns.
    """
    turns = Turns(connection)
    script = importlib.import_module(config.method)
    settings = script_settings(script, config, folder, rows, name, stage)
    its_examples = []

    def make_schedule(examples: common.Examples, _) -> list[list[int]]:
        """The batches in the order of the rows; the first ones also before, to warm up."""
        its_examples.append(examples)
        batches = []
        for first in range(0, len(examples), config.batch_size):
            batches.append(list(range(first, min(first + config.batch_size, len(examples)))))
        return batches[:WARMUP] + batches

    def check(policy: common.Policy, example_sets, run: common.Run) -> None:
        """The check at the start; then what this stage does without."""
        original_check(policy, example_sets, run)
        if not stage.packed:
            run.layout = common.PaddedLayout()
        if stage.plain_head:
            common.MAX_LOGITS = sys.maxsize
            common.TokenLogps = PlainHead
        if stage.all_logits:
            policy.forward = functools.partial(logps_from_all_logits, policy)
        if run.device.type == "cuda":  # flex attention is compiled for one size, then for all
            with torch.no_grad():
                for few in (1, 2, 4):
                    sample = [example_sets[0][index] for index in range(few)]
                    policy(common.make_micro_batch(sample, range(few), run.layout, run.device))
        turns.count_tokens(policy.lm)

    def add_reference(policy, examples, indices, split: str, run: common.Run) -> None:
        """The reference pass over the training examples is the first turn."""
        if split == "train":
            turns.wait()
            original_add_reference(policy, examples, indices, split, run)
            turns.stop()
            turns.tell(**checks(examples, config, policy, run))
            turns.wait()

    def log(run: common.Run, step: int, metrics: dict[str, float]) -> None:
        """The end of a step is the end of a turn."""
        if step > 0:
            turns.stop()
            turns.tell(loss=metrics["loss"])
            turns.wait()

    original_check = common.check_model_and_choose_layout
    original_add_reference = common.add_reference_logps
    script.make_schedule = make_schedule
    common.check_model_and_choose_layout = check
    common.add_reference_logps = add_reference
    common.Run.log = log
    script.train(settings)


@torch.no_grad()
def checks(examples: common.Examples, config: Config, policy, run) -> dict:
    """The log-probability of each completion; how far they are from what they should be, in nats.

    The log-ratio at step 0 should be 0. On a GPU, also the error of a token's log-probability
    against float32 on the CPU, of a few examples.
    """
    texts = {}
    for index in range(len(examples)):
        example = examples[index]
        logps = examples.get_reference_logps(index)
        ends = np.cumsum([len(ids) for ids in example.completions_ids])[:-1]
        for ids, part in zip(example.completions_ids, np.split(logps, ends)):
            texts[fingerprint(example.prompt_ids, ids)] = float(part.sum())
    first = range(min(config.batch_size, len(examples)))
    ratios = []
    for micro_batch in common.make_micro_batches(examples, first, run):
        ratios.append((policy(micro_batch) - micro_batch.reference_logps).abs())
    ratios = torch.cat(ratios)
    figures = {
        "texts": texts,
        "log_ratio_mean": ratios.mean().item(),
        "log_ratio_max": ratios.max().item(),
    }
    if run.device.type == "cuda":
        sample = [examples[index] for index in first[:4]]
        ours = policy(common.make_micro_batch(sample, range(len(sample)), run.layout, run.device))
        exact = GPTNeoXForCausalLM.from_pretrained(run.model_path, dtype=torch.float32).eval()
        plain = common.completion_logps(exact, common.make_batch(sample))
        error = (ours.cpu() - plain).abs()
        figures["token_error_mean"] = error.mean().item()
        figures["token_error_max"] = error.max().item()
    return figures


def checkout(connection, config: Config, folder: Path, rows: Path, name: str, path: str) -> None:
    """The same of another checkout of this project, by its own benchmark."""
    for module in list(sys.modules):
        if module.partition(".")[0] in ("archangel", "common", "common_v1", config.method):
            del sys.modules[module]
    sys.path.insert(0, str(Path(path).resolve()))
    theirs = importlib.import_module("archangel.benchmark")
    known = {field.name for field in dataclasses.fields(theirs.Config)}
    values = {name: value for name, value in vars(config).items() if name in known}
    its_config = theirs.Config(**values | {"peer": "none"})
    theirs.ours(connection, its_config, folder, rows, name, theirs.Stage())


def ours_v1(connection, config: Config, folder: Path, rows: Path, name: str, stage: Stage) -> None:
    """The step of a script that is still on the old core, in turns."""
    turns = Turns(connection)
    script = importlib.import_module(config.method)
    settings = script_settings(script, config, folder, rows, name, stage)
    run = common_v1.Run(settings)
    texts = common_v1.read_rows(settings.data, "train", script.FORMS)
    examples = script.make_examples(texts, run.tokenizer, settings)
    run.start(examples, [], config.steps)
    policy = common_v1.load_policy(
        run, **({"value_head": True} if config.method == "ppo_offline" else {})
    )
    common_v1.self_check(policy, examples, run)
    turns.count_tokens(policy.lm)

    turns.wait()
    if config.method in REFERENCE:
        common_v1.add_reference_logps(policy, examples, run)
    turns.stop()
    texts = {}
    for example in examples:
        none = np.full(common_v1.completion_tokens([example]), np.nan)
        logps = example.get("reference_logps", none)
        ends = np.cumsum([len(ids) for ids in example["completions_ids"]])[:-1]
        for ids, part in zip(example["completions_ids"], np.split(logps, ends)):
            texts[fingerprint(example["prompt_ids"], ids)] = float(part.sum())
    turns.tell(texts=texts)

    optimizer = common_v1.make_optimizer(policy, settings)
    batches = [
        examples[i : i + config.batch_size] for i in range(0, len(examples), config.batch_size)
    ]
    for step, batch in enumerate(batches[:WARMUP] + batches, 1):
        turns.wait()
        parts = []
        for loss, indices, figures in script.micro_batch_losses(policy, batch, settings, run):
            loss.backward()
            parts.append((indices, figures))
        figures = common_v1.gather(parts, len(batch), run)
        common_v1.clip_gradient(policy, batch, figures, run, step)
        optimizer.step()
        optimizer.zero_grad()
        turns.stop()
        turns.tell(loss=script.summarise(figures, batch)["loss"])
    turns.wait()


# ------------------------------------------------------------------------------ who takes part


@dataclass(frozen=True)
class Contender:
    """Who takes part: a function that runs in a process of its own."""

    name: str
    run: Callable
    options: object
    steps: int  # measured


def contenders(config: Config) -> list[Contender]:
    """Us; then the peer's rows, or our own step without its ideas, the one that counts last."""
    if config.ladder:
        stages = {  # each keeps what came before
            "padded rows, all logits": Stage(False, sys.maxsize, True, all_logits=True),
            "completion tokens only": Stage(False, sys.maxsize, True),
            "rows of like length": Stage(False, 1024, True),
            "packed, each prompt once": Stage(plain_head=True),
            "head in place": Stage(),
        }
        return [Contender(name, ours, stages[name], config.steps) for name in stages]
    trainer = ours if config.method in ("dpo", "kto") else ours_v1
    found = [Contender("ours", trainer, Stage(), config.steps)]
    if config.peer not in ("none", "trl", "compact"):
        found.append(Contender("other checkout", checkout, config.peer, config.steps))
    elif config.peer != "none":
        from archangel import benchmark_trl

        for name, options in benchmark_trl.ROWS.items():
            found.append(Contender(name, benchmark_trl.peer, options, config.other_steps))
        if torch.cuda.is_available():  # its head is compact there already
            found.pop()
        found[-1] = dataclasses.replace(found[-1], steps=config.steps)
        if config.peer == "compact":
            del found[1:-1]
    return found


def take_turns(
    config: Config, rows: Sequence[dict], everyone: Sequence[Contender], folder: Path
) -> dict[str, list]:
    """Name to the records of its turns: the reference pass, then the steps."""
    spawn = multiprocessing.get_context("spawn")  # no memory of this process in theirs
    maker = spawn.Process(target=write_model, args=(config, folder / "model"))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise common.UserError(f"--model {config.model}: could not be written to {folder}")
    path = folder / "rows.jsonl"
    write_rows(rows, config.method, path)
    records = {contender.name: [] for contender in everyone}
    # A GPU is ours alone, and its memory too small for all: there one comes after the other.
    groups = [[contender] for contender in everyone] if torch.cuda.is_available() else [everyone]
    for group in groups:
        pipes, processes = {}, []
        for contender in group:
            pipes[contender.name], theirs = spawn.Pipe()
            arguments = (theirs, config, folder, path, contender.name, contender.options)
            processes.append(spawn.Process(target=contender.run, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        for turn in command.progress(range(1 + WARMUP + config.steps), "turns"):
            for contender in group:
                if turn < 1 + WARMUP + contender.steps:
                    pipe = pipes[contender.name]
                    try:
                        pipe.send("count" if turn == 1 else "go")  # what step 0 computes
                        records[contender.name].append(pipe.recv())
                    except (EOFError, OSError):
                        raise common.UserError(
                            f"{contender.name}: ended early; its error stands above"
                        ) from None
        for contender, process in zip(group, processes):
            pipes[contender.name].send("leave")
            process.join()
    return records


# ------------------------------------------------------------------------------ what came of it


def same_work(everyone: Sequence[Contender], records: dict[str, list]) -> dict[str, dict]:
    """How far each differs from the first in completions' log-probabilities and in first losses.

    Raises UserError where the tokens differ. Completions are left out without a reference column.
    """
    first, *others = everyone
    mine, found = records[first.name], {}
    for other in others:
        theirs = records[other.name]
        logps = [reference["texts"] for reference in (mine[0], theirs[0])]
        if logps[0].keys() != logps[1].keys():
            raise common.UserError(f"{other.name} and {first.name} do not see the same tokens")
        losses = [abs(b["loss"] - a["loss"]) for a, b in zip(mine[1:], theirs[1:])]
        found[other.name] = {"first_losses": losses[:3]}
        differ = max(abs(logps[1][key] - logps[0][key]) for key in logps[0])
        if not np.isnan(differ):
            found[other.name]["completion_logps"] = differ
    return found


def summarise(rows: Sequence[dict], records: list, config: Config, rate: float) -> dict:
    """The figures of one contender, which went over these rows."""
    shape, size = SHAPES[config.model], config.batch_size
    reference, warm, steps = records[0], records[1 : 1 + WARMUP], records[1 + WARMUP :]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    work = [useful_work(batch, shape, config.method) for batch in batches[: len(steps)]]
    useful = {key: sum(w[key] for w in work) for key in work[0]}
    seconds = np.array([record["seconds"] for record in steps])
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    a_reference = reference["seconds"] / len(batches)  # of one step's rows
    cpu = np.mean([record["cpu_seconds"] for record in steps])
    total = seconds.sum() + a_reference * len(steps)
    cpu_with_reference = cpu + reference["cpu_seconds"] / len(batches)
    on_gpu = torch.cuda.is_available()
    flops = useful["step_flops"] + useful["reference_flops"]
    first = useful_work(batches[0], shape, config.method)
    extra = {k: v for k, v in reference.items() if k.startswith(("log_ratio", "token_error"))}
    return {
        "steps": len(steps),
        "seconds_per_step": middle,
        "seconds_per_step_quartiles": [low, high],
        "reference_seconds_per_step": a_reference,
        "seconds_per_step_with_reference": middle + a_reference,
        "cpu_seconds_per_step": cpu,
        "cpu_seconds_per_step_with_reference": cpu_with_reference,
        "completion_tokens_per_second": useful["completion_tokens"] / total,
        "max_memory_mib": max(record["max_memory_mib"] for record in records),
        "useful_share": useful["tokens"] / sum(record["tokens"] for record in steps),
        "mfu": flops / rate / (total if on_gpu else cpu_with_reference * len(steps)),
        "first_step_gflop": None if on_gpu else warm[0]["flops"] / 1e9,
        "first_step_useful_gflop": first["step_flops"] / 1e9,
        "seconds": seconds.tolist(),
        **extra,
    }


def ratios(figures: dict[str, dict]) -> dict[str, dict]:
    """How many times the first one's figure each of the others has."""
    (_, mine), *others = figures.items()
    keys = [key for key in mine if key.startswith(("seconds_per", "cpu_seconds_per"))]
    keys = [key for key in keys if not isinstance(mine[key], list)] + ["max_memory_mib"]
    keys.append("completion_tokens_per_second")
    return {name: {key: theirs[key] / mine[key] for key in keys} for name, theirs in others}


def table(report: dict) -> str:
    """The report as a person reads it."""
    lines = [f"{key:<40}{value:>14,.1f}" for key, value in report["counts"].items()]
    lines += [f"{'matrix product, Gflop/s':<40}{report['matmul_rate'] / 1e9:>14,.1f}", ""]
    figures = report["figures"]
    width = max(14, *(len(name) + 2 for name in figures))
    lines.append(" " * 36 + "".join(f"{name:>{width}}" for name in figures))
    for key in next(iter(figures.values())):
        if key == "seconds":
            continue
        cells = []
        for theirs in figures.values():
            value = theirs.get(key)
            if isinstance(value, list):
                cells.append("-".join(f"{v:.3g}" for v in value))
            else:
                cells.append("" if value is None else f"{value:,.4g}")
        lines.append(f"{key:<36}" + "".join(f"{cell:>{width}}" for cell in cells))
    for name, values in report["ratios"].items():
        shown = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
        lines.append(f"{name} to {next(iter(figures))}: {shown}")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """The ladder as a picture: seconds a step, bar by bar, with quartiles."""
    from matplotlib.figure import Figure  # only for pictures

    figures = report["figures"]
    middle = np.array([theirs["seconds_per_step"] for theirs in figures.values()])
    quartiles = np.array([theirs["seconds_per_step_quartiles"] for theirs in figures.values()]).T
    picture = Figure(figsize=(7, 0.5 * len(figures) + 1.2), layout="constrained")
    axes = picture.add_subplot()
    axes.barh(list(figures), middle, xerr=abs(quartiles - middle), color="0.7", ecolor="0.3")
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a step ({report['settings']['model']}, DPO, median and quartiles)")
    picture.savefig(path, dpi=150)


def main(config: Config) -> None:
    """Measure, print, and write `out`/MODEL_METHOD.json (and the ladder's picture)."""
    os.environ |= ALLOCATOR  # read when a process starts
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, TRL would use all
    os.environ["TQDM_DISABLE"] = "1"  # the bars of the others
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(config) if config.ladder else like_lengths_together(make_rows(config), config)
    everyone = contenders(config)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        records = take_turns(config, rows, everyone, Path(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device)
    figures = {c.name: summarise(rows, records[c.name], config, rate) for c in everyone}
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    if config.peer in ("trl", "compact"):
        versions["trl"] = importlib.metadata.version("trl")
    report = {
        "settings": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": [load, os.getloadavg()],
        "versions": versions,
        "counts": count(config, rows),
        "matmul_rate": rate,
        "figures": figures,
        "differ_from_first": same_work(everyone, records),
        "ratios": ratios(figures),
    }
    name = f"{config.model}_{'ladder' if config.ladder else config.method}"
    partial = out / f"{name}.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(out / f"{name}.json")
    print(table(report))
    for key, value in report["differ_from_first"].items():
        print(f"{key} differs from {everyone[0].name}: {value}")
        # KTO's partners are not TRL's, SLiC's hinge is another.
        if config.method in ("sft", "dpo") and not max(value["first_losses"]) < 0.05:
            raise common.UserError(f"{key}: its losses are not those of {everyone[0].name}")
    if config.ladder:
        draw(report, out / f"{name}.png")


if __name__ == "__main__":
    with command.exit_status():
        main(command.parse(Config, __doc__))
