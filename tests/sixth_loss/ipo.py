"""Identity Preference Optimization (IPO): Azar et al. 2023, arXiv 2310.12036, equation (17).

An example of a loss of one's own: dpo.py, copied, with other lines only where IPO differs. DPO
pushes a pair's log-ratios apart without end; IPO pulls their difference to a target:

    r(x, y) = log pi(y|x) - log pi_ref(y|x)                                         nats
    loss    = (r(x, y_w) - r(x, y_l) - 1 / (2 * beta))^2                            (17)

and its mean over the global batch. `beta` is the paper's tau.

Deviations from the paper: none. (Other implementations divide each r by the length of its
completion; in the paper and here it is a sum.)

    python ipo.py --model toy --data toy --lr 3e-5 --warmup_steps 10 --out runs/ipo
    torchrun --nproc_per_node=8 ipo.py --model pythia-1.4b
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
    out: str = "runs/ipo"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # IPO's own
    beta: float = 0.1  # log-ratios are pulled 1 / (2 * beta) nats apart; rewards are times it

    def __post_init__(self):
        common.check_settings(self, above_zero=("beta",))


# ------------------------------------------------------------------------------------- the loss


def ipo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """IPO's loss for each pair, equation (17) of arXiv 2310.12036.

    Args:
        policy_*, reference_*: (B,) log-probabilities of whole completions, nats, summed over
            tokens.
        beta: above 0.
    Returns:
        (B,) losses in nats squared, from 0; 1 / (2 * beta)^2 where policy and reference agree.

    >>> zero = torch.zeros(1)
    >>> ipo_loss(zero, zero, zero, zero)
    tensor([25.])
    >>> ipo_loss(zero + 6, zero - 4, zero, zero)  # (6 + 4 - 5)^2: too far apart is a loss too
    tensor([25.])
    """
    # At least float32: near -800 nats bfloat16 cannot tell 4 nats apart.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen = policy_chosen_logps.to(dtype) - reference_chosen_logps.to(dtype)  # (B,) log-ratios
    rejected = policy_rejected_logps.to(dtype) - reference_rejected_logps.to(dtype)
    return (chosen - rejected - 1 / (2 * beta)) ** 2  # (17)


# ------------------------------------------------------------ rows to examples, batches, losses


def make_examples(rows: list[dict], tokenizer, config: Config) -> list[dict]:
    """Rows to examples, one a pair: prompt_ids, completions_ids of chosen and rejected."""
    texts = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
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
        policy_logps = micro.sum(policy(micro)).view(-1, 2)  # (b, 2): chosen, rejected
        reference_logps = micro.sum(micro.reference_logps).view(-1, 2)  # (b, 2)
        losses = ipo_loss(
            *policy_logps.unbind(1), *reference_logps.unbind(1), beta=config.beta
        )  # (b,)
        rewards = config.beta * (policy_logps - reference_logps).detach()
        chosen, rejected = rewards.unbind(1)
        figures = {
            "loss": losses,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).to(chosen),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
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
    for examples in (train_set, test_set):
        common.add_reference_logps(policy, examples, run)
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
