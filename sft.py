"""Supervised finetuning (SFT), the report's section 2: the standard loss on the wanted replies.

    loss = -log pi(y_t | x, y_<t)                                                   nats

for each completion token y_t, and its mean over all completion tokens of the global batch: of all
processes and all micro-batches, so that a token counts the same wherever it lands.

It makes the pi_ref that the other losses start from. Learned from are the chosen replies of pairs
(or their `target`, where a row names a better one), the desirable ones of labelled rows, and the
completions of rows that have nothing else.

The report prints no equation for this loss. It trains it on "a subset of the generations used to
subsequently align the model" (section 3.4): here on those above.

    python sft.py --model toy --data toy --lr 3e-4 --warmup_steps 10 --out runs/sft
    torchrun --nproc_per_node=8 sft.py --model pythia-1.4b
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import common_v1 as common

FORMS = ("preference", "unpaired", "supervised")  # the kinds of row that hold what this loss needs


@dataclass
class Config:
    """Every setting; the comments are what --help prints. (HALOs): as in the authors' code."""

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str = "archangel"  # archangel (HH, SHP, OASST), toy, a .jsonl or a folder of train, test
    out: str = "runs/sft"  # folder for the model, metrics.jsonl, run.json and checkpoints
    max_steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    epochs: int = 1  # passes over the data (HALOs)
    batch_size: int = 32  # examples an optimizer step, over all processes (the report)
    micro_batch_tokens: int = 8192  # most tokens a process runs at once; fewer need less memory
    lr: float = 5e-7  # learning rate after warm-up (HALOs)
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # RMSprop (HALOs) or the later paper's AdamW
    warmup_steps: int = 150  # steps of linear warm-up, then constant (HALOs)
    max_grad_norm: float = 10.0  # the gradient is scaled to at most this norm (HALOs)
    max_length: int = 2048  # most tokens of a prompt and a completion together (HALOs)
    max_prompt_length: int = 1024  # a too long prompt keeps at least so many tokens (HALOs)
    truncate_prompt: Literal["start", "end"] = "start"  # which side of a too long prompt goes
    seed: int = 1  # of the order of the data (HALOs)
    eval_every: int = 0  # steps between held-out figures; 0: at start and end only
    save_every: int = 500  # steps between checkpoints, with one at the end; 0: none
    resume: bool = False  # go on from the last checkpoint in --out
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on GPUs
    activation_checkpointing: bool = False  # recompute each block in backward: slower, less memory

    def __post_init__(self):
        common.check_settings(self, above_zero=())


# ------------------------------------------------------------------------------------- the loss


def sft_loss(policy_token_logps: torch.Tensor) -> torch.Tensor:
    """The standard loss for each completion token, section 2: its negative log-probability.

    Args:
        policy_token_logps: (N,) log-probabilities of completion tokens, nats.
    Returns:
        (N,) losses, at least 0.

    >>> sft_loss(torch.tensor([0.5, 0.25]).log())
    tensor([0.6931, 1.3863])
    """
    # At least float32, as all losses here.
    return -policy_token_logps.to(torch.promote_types(policy_token_logps.dtype, torch.float32))


# ------------------------------------------------------------ rows to examples, batches, losses


def make_examples(rows: list[dict], tokenizer, config: Config) -> list[dict]:
    """Rows to examples, one a wanted completion: prompt_ids, completions_ids of one.

    A text that several pairs of a prompt name as their target is learned from once.
    """
    wanted = {}  # (prompt, completion), in order
    for row in rows:
        if row.get("label", True):
            completion = row.get("target") or row.get("chosen") or row["completion"]
            once = "target" in row  # otherwise the row's number sets it apart from its repeats
            wanted[row["prompt"], completion, None if once else len(wanted)] = None
    texts = [(prompt, [completion]) for prompt, completion, _ in wanted]
    return common.tokenise(texts, tokenizer, config)


def steps_per_epoch(examples: list[dict], config: Config) -> int:
    """Steps in one pass over the examples."""
    return math.ceil(len(examples) / config.batch_size)


def global_batch(examples: list[dict], config: Config, step: int) -> list[dict]:
    """The examples of a step, counted from 0; an epoch passes once over all of them."""
    epoch, number = divmod(step, steps_per_epoch(examples, config))
    start = epoch * len(examples) + number * config.batch_size
    stop = min(start + config.batch_size, (epoch + 1) * len(examples))
    return [examples[i] for i in common.endless(len(examples), (config.seed,), start, stop)]


def micro_batch_losses(policy, batch: list[dict], config: Config, run: common.Run) -> Iterator:
    """Yield, for each micro-batch of this process, (loss, indices (b,), {figure: (b,)}).

    batch: the global batch. Summed over micro-batches and processes, loss is its mean over
    completion tokens.
    """
    tokens = common.completion_tokens(batch)
    for micro in common.micro_batches(batch, run):
        losses = sft_loss(policy(micro))  # (n,)
        yield losses.sum() / tokens, micro.indices, {"loss": micro.sum(losses)}


def summarise(figures: dict[str, torch.Tensor], batch: list[dict]) -> dict[str, float]:
    """What metrics.jsonl says of a global batch's figures, (B,) each: the mean over tokens."""
    return {"loss": figures["loss"].sum().item() / common.completion_tokens(batch)}


# ------------------------------------------------------------------------------------ the loop


@torch.no_grad()
def evaluate(policy, examples: list[dict], config: Config, run: common.Run) -> dict[str, float]:
    """The same figures on held-out examples, a batch of consecutive ones at a time."""
    parts = []
    for first in range(0, len(examples), config.batch_size):
        batch = examples[first : first + config.batch_size]
        for _, indices, figures in micro_batch_losses(policy, batch, config, run):
            parts.append((indices + first, figures))
    if not parts:
        return {}
    figures = summarise(common.gather(parts, len(examples), run), examples)
    return {f"eval_{name}": value for name, value in figures.items()}


def train(config: Config) -> None:
    """Train --model on --data into --out."""
    run = common.Run(config)
    rows, held_out = common.read_data(config.data, FORMS)
    train_set = make_examples(rows, run.tokenizer, config)
    test_set = make_examples(held_out, run.tokenizer, config)
    steps = config.max_steps or config.epochs * steps_per_epoch(train_set, config)
    if not run.start(train_set, test_set, steps):
        return
    policy = common.load_policy(run)
    common.self_check(policy, train_set + test_set, run)
    optimizer = common.make_optimizer(policy, config)
    done = run.resume(policy, optimizer)
    if done == 0:
        run.log(0, evaluate(policy, test_set, config, run))
    for step in range(done + 1, steps + 1):
        started = time.perf_counter()
        batch = global_batch(train_set, config, step - 1)
        parts = []
        for loss, indices, figures in micro_batch_losses(policy, batch, config, run):
            # The global batch's loss is a sum over processes, but FSDP averages their gradients.
            (loss * run.world_size).backward()
            parts.append((indices, figures))
        figures = common.gather(parts, len(batch), run)
        grad_norm = common.clip_gradient(policy, batch, figures, run, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        record = summarise(figures, batch) | {"lr": lr, "grad_norm": grad_norm}
        record |= run.speed(batch, started)
        if step == steps or config.eval_every and step % config.eval_every == 0:
            record |= evaluate(policy, test_set, config, run)
        run.log(step, record)
        run.save_if_due(step, policy, optimizer)
    run.export(policy)


if __name__ == "__main__":
    with common.exit_status():
        train(common.parse(Config, __doc__))
