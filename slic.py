"""Sequence-Likelihood Calibration (SLiC), the report's section 3.2, equation (5).

Of a pair of replies the preferred one should be likelier by a margin beta; a language-modelling
term keeps the policy near the text it should write:

    calibration = max(0, beta - log pi(y_w|x) + log pi(y_l|x))                      (5)  nats
    loss        = calibration + lambda_reg * (-log pi(y_target|x))

and its mean over the global batch. There is no reference model.

Deviations from the report:
 1. The report's second term is over samples of pi_ref, which it takes to be the SFT data. Here
    y_target is a row's `target` where it has one, else the chosen reply.
 2. The report prints a "preference model" for SLiC that is never above 0, so it is no probability,
    and drops a logarithm in it. It is a utility: `slic_value`, in the form of section 4.

    python slic.py --model toy --data toy --lr 1e-4 --warmup_steps 10 --out runs/slic
    torchrun --nproc_per_node=8 slic.py --model pythia-1.4b
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import common_v1 as common

FORMS = ("preference",)  # the kinds of row that hold what this loss needs


@dataclass
class Config:
    """Every setting; the comments are what --help prints. (HALOs): as in the authors' code."""

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str = "archangel"  # archangel (HH, SHP, OASST), toy, a .jsonl or a folder of train, test
    out: str = "runs/slic"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # SLiC's own
    beta: float = 1.0  # the margin, nats (HALOs)
    lambda_reg: float = 0.1  # weight of the language-modelling term (HALOs)

    def __post_init__(self):
        common.check_settings(self, above_zero=("beta",))


# ------------------------------------------------------------------------------------- the loss


def slic_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_target_logps: torch.Tensor,
    beta: float = 1.0,
    lambda_reg: float = 0.1,
) -> torch.Tensor:
    """SLiC's loss for each pair, equation (5) and the one under it.

    Args:
        policy_*: (B,) log-probabilities of whole completions, nats, summed over tokens.
        beta: the margin, nats, above 0. lambda_reg: weight of the language-modelling term, from 0.
    Returns:
        (B,) losses, at least 0.

    >>> two, three = torch.tensor([-2.0]), torch.tensor([-3.0])
    >>> slic_loss(two, three, two)  # the margin is kept: 0 + 0.1 * 2
    tensor([0.2000])
    >>> slic_loss(three, two, three)  # 1 + 3 - 2 + 0.1 * 3
    tensor([2.3000])
    """
    # At least float32: near -800 nats bfloat16 cannot tell 4 nats apart.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen, rejected = policy_chosen_logps.to(dtype), policy_rejected_logps.to(dtype)
    calibration = torch.relu(beta - chosen + rejected)  # (5)
    return calibration - lambda_reg * policy_target_logps.to(dtype)


def slic_value(
    reward_chosen: torch.Tensor, reward_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """SLiC's value of a reward against the rejected one's, section 4: min(0, difference - beta).

    0 past the margin, a line of slope 1 below it.
    """
    return torch.clamp(reward_chosen - reward_rejected - beta, max=0)


# ------------------------------------------------------------ rows to examples, batches, losses


def make_examples(rows: list[dict], tokenizer, config: Config) -> list[dict]:
    """Rows to examples, one a pair: prompt_ids, completions_ids of chosen, rejected and target."""
    texts = []
    for row in rows:
        own_target = [row["target"]] if row.get("target", row["chosen"]) != row["chosen"] else []
        texts.append((row["prompt"], [row["chosen"], row["rejected"], *own_target]))
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

    batch: the global batch. Summed over micro-batches and processes, loss is its mean loss.
    """
    for micro in common.micro_batches(batch, run):
        logps = micro.sum(policy(micro))  # (C,): two or three completions a pair
        counts = torch.tensor([len(batch[i]["completions_ids"]) for i in micro.indices]).long()
        first = counts.cumsum(0) - counts  # (b,)
        chosen, rejected = logps[first], logps[first + 1]
        target = logps[torch.where(counts == 3, first + 2, first)]
        losses = slic_loss(chosen, rejected, target, config.beta, config.lambda_reg)  # (b,)
        margin = (chosen - rejected).detach()
        figures = {
            "loss": losses,
            "logp_margin": margin,
            "logp_accuracy": (margin > 0).to(margin),
            "clear_of_margin": (margin > config.beta).to(margin),
        }
        yield losses.sum() / len(batch), micro.indices, figures


def summarise(figures: dict[str, torch.Tensor], batch: list[dict]) -> dict[str, float]:
    """What metrics.jsonl says of a global batch's figures, (B,) each: their means."""
    return {name: values.mean().item() for name, values in figures.items()}


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
