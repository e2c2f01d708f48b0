"""Direct Preference Optimization (DPO), the report's section 3.1, equation (4).

The reward of equation (3) put into the preference model of equation (1) leaves a loss on the policy
alone, for a pair of replies of which y_w was preferred to y_l:

    r(x, y) = log pi(y|x) - log pi_ref(y|x)                                         nats
    loss    = -log sigmoid(beta * (r(x, y_w) - r(x, y_l)))                          (4)

and its mean over the global batch. The partition function Z(x) of (3) is the same for both replies
and drops out.

Deviations from the report:
 1. (4) lacks a closing bracket; it is read as above.
 2. The report's pi_SFT and pi_ref are one model: the policy as it was before the first step.

    python dpo.py --model toy --data toy --lr 3e-5 --warmup_steps 10 --out runs/dpo
    torchrun --nproc_per_node=8 dpo.py --model pythia-1.4b
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import common

FORMS = ("preference",)  # the kinds of row that hold what this loss needs


@dataclass
class Config:
    """Every setting; the comments are what --help prints. (HALOs): as in the authors' code."""

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str = "archangel"  # archangel (HH, SHP, OASST), toy, a .jsonl or a folder of train, test
    out: str = "runs/dpo"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # DPO's own
    beta: float = 0.1  # a reward is beta times the log-ratio (HALOs)

    def __post_init__(self):
        common.check_settings(self, above_zero=("beta",))


# ------------------------------------------------------------------------------------- the loss


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """DPO's loss for each pair, equation (4).

    Args:
        policy_*, reference_*: (B,) log-probabilities of whole completions, nats, summed over
            tokens.
        beta: above 0.
    Returns:
        (B,) losses, above 0; log 2 where policy and reference agree.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero)
    tensor([0.6931])
    >>> dpo_loss(zero + 6, zero - 4, zero, zero)  # -log sigmoid(0.1 * (6 + 4))
    tensor([0.3133])
    """
    # At least float32: near -800 nats bfloat16 cannot tell 4 nats apart.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen = policy_chosen_logps.to(dtype) - reference_chosen_logps.to(dtype)  # (B,) log-ratios
    rejected = policy_rejected_logps.to(dtype) - reference_rejected_logps.to(dtype)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))  # (4)


def dpo_value(reward_chosen: torch.Tensor, reward_rejected: torch.Tensor) -> torch.Tensor:
    """DPO's value of a reward against the rejected one's, section 4: log sigmoid(difference).

    Increasing and concave everywhere: it tends to 0 in gains, to a line of slope 1 in losses.
    """
    return torch.nn.functional.logsigmoid(reward_chosen - reward_rejected)


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
        losses = dpo_loss(
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
