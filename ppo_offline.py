"""Offline, one-step PPO, the report's section 3.3.

Each token of a reply is an action. The reward, +1 or -1 as the reply was wanted or not, comes with
the last one; pi_old is never updated, it stays pi_ref; a value head on the policy's hidden states
says how much of the reward was to be expected:

    ratio  = pi(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)
    loss   = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)
    critic = 0.5 * (V(x, y_<t) - return)^2

and the mean of loss + critic_weight * critic over all completion tokens of the global batch. The
advantages A are by generalised advantage estimation (GAE).

Deviations from the report:
 1. The report prints the ratio as log(pi / pi_ref), which a clip around 1 makes no sense of; ours
    is the exponential of it, as in PPO and in the authors' code.
 2. The log-ratio is clamped to +-20, so that its exponential is finite.
 3. The report does not say where A is from: GAE over a learned critic, as in the authors' code.
 4. The critic's gradient stops at its head: it reads the policy's states and does not shape them,
    so that the policy follows the report's loss alone.
 5. Advantages are not whitened, which would make the loss depend on how a batch is cut, and there
    is no penalty on the KL divergence, which the report does not have.

    python ppo_offline.py --model toy --data toy --lr 3e-5 --warmup_steps 10 --out runs/ppo
    torchrun --nproc_per_node=8 ppo_offline.py --model pythia-1.4b
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import common_v1 as common

FORMS = ("preference", "unpaired")  # the kinds of row that hold what this loss needs


@dataclass
class Config:
    """Every setting; the comments are what --help prints. (HALOs): as in the authors' code."""

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str = "archangel"  # archangel (HH, SHP, OASST), toy, a .jsonl or a folder of train, test
    out: str = "runs/ppo_offline"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # PPO's own
    epsilon: float = 0.5  # the ratio is clipped to 1 - epsilon, 1 + epsilon (HALOs)
    gamma: float = 0.99  # discount of a reward for each token it lies ahead (HALOs)
    gae_lambda: float = 0.95  # GAE's trade of bias (0) for variance (1) (HALOs)
    critic_weight: float = 0.01  # of the critic's loss (HALOs)

    def __post_init__(self):
        common.check_settings(self, above_zero=("epsilon", "gamma"))
        for name in ("epsilon", "gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise common.UserError(f"--{name} {getattr(self, name)}: must be at most 1")
        if self.batch_size % 2:
            raise common.UserError(f"--batch_size {self.batch_size}: must be even, half each class")


# ------------------------------------------------------------------------------------- the loss


def ppo_offline_loss(
    policy_token_logps: torch.Tensor,
    reference_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float = 0.5,
) -> torch.Tensor:
    """PPO's clipped loss for each completion token, section 3.3.

    Args:
        policy_token_logps, reference_token_logps: (B, T) log-probabilities of tokens, nats.
        advantages: (B, T), taken as they are but detached.
        mask: (B, T) bool, true where there is a token.
        epsilon: the clip, in (0, 1].
    Returns:
        (B, T) losses; 0 where the mask is 0; minus the advantage where policy and reference agree.

    >>> logps, one = torch.tensor([[0.0, 2.0, 2.0]]), torch.ones(1, 3).bool()
    >>> advantages = torch.tensor([[1.0, 1.0, -1.0]])
    >>> ppo_offline_loss(logps, 0 * logps, advantages, one)  # -1, -1.5 by the clip, +exp(2)
    tensor([[-1.0000, -1.5000,  7.3891]])
    """
    # At least float32, and out of the padding, whatever it holds.
    dtype = torch.promote_types(policy_token_logps.dtype, torch.float32)
    log_ratio = policy_token_logps.to(dtype) - reference_token_logps.to(dtype)  # (B, T)
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0).clamp(-20, 20)
    ratio, advantages = log_ratio.exp(), advantages.detach().to(dtype)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return torch.where(mask.bool(), loss, 0.0)


def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by generalised advantage estimation (arXiv 1506.02438).

    Args:
        values: (B, T) the critic's, of the state before each token; detached here.
        rewards: (B,) on each completion's last token. Nothing comes after it.
        mask: (B, T) bool, true where there is a token; a completion's tokens come first.
    Returns:
        advantages and returns, (B, T) each; 0 where the mask is 0.

    >>> gae(torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2).bool(), gamma=0.5, gae_lambda=1.0)
    (tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
    """
    dtype, mask = torch.promote_types(values.dtype, torch.float32), mask.bool()
    values, rewards = torch.where(mask, values.detach(), 0.0).to(dtype), rewards.to(dtype)
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    # The step's own reward is part of it: a perfect critic then leaves advantages of 0 everywhere.
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors = torch.where(last, rewards[:, None], 0.0) + gamma * next_values - values  # (B, T)
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):
        advantages[:, t] = ahead = errors[:, t] + gamma * gae_lambda * ahead
    return advantages, advantages + values


def rlhf_value(reward_chosen: torch.Tensor, reward_rejected: torch.Tensor) -> torch.Tensor:
    """RLHF's value of a reward against the rejected one's, section 4: sigmoid(difference).

    It is also the probability of a preference, equation (1).
    """
    return torch.sigmoid(reward_chosen - reward_rejected)  # (1)


# ------------------------------------------------------------ rows to examples, batches, losses


def make_examples(rows: list[dict], tokenizer, config: Config) -> list[dict]:
    """Rows to examples, one a completion: prompt_ids, completions_ids of one, desirable.

    A pair makes two.
    """
    fields = ("chosen", "rejected", "completion")
    texts = [(row["prompt"], [row[field] for field in fields if field in row]) for row in rows]
    labels = [[row["label"]] if "label" in row else [True, False] for row in rows]
    return [
        {"prompt_ids": tokens["prompt_ids"], "completions_ids": [ids], "desirable": desirable}
        for tokens, row_labels in zip(common.tokenise(texts, tokenizer, config), labels)
        for ids, desirable in zip(tokens["completions_ids"], row_labels)
    ]


def classes(examples: list[dict], config: Config) -> tuple[list[dict], list[dict]]:
    """The examples of the larger and the smaller class. Raises UserError if there is only one."""
    both = [[], []]  # undesirable, desirable
    for example in examples:
        both[example["desirable"]].append(example)
    smaller, larger = sorted(both, key=len)
    if not smaller:
        raise common.UserError(
            f"--data {config.data}: every label is {larger[0]['desirable']}; this loss learns from "
            "desirable and undesirable completions: add rows of the other kind, or use sft.py"
        )
    return larger, smaller


def steps_per_epoch(examples: list[dict], config: Config) -> int:
    """Steps in one pass over the larger class, at half a batch a step."""
    return math.ceil(len(classes(examples, config)[0]) / (config.batch_size // 2))


def global_batch(examples: list[dict], config: Config, step: int) -> list[dict]:
    """The examples of a step, counted from 0: equally many of each class (section 5).

    An epoch passes once over the larger class; the smaller one repeats, reshuffled each time.
    """
    larger, smaller = classes(examples, config)
    epoch, number = divmod(step, math.ceil(len(larger) / (config.batch_size // 2)))
    start = epoch * len(larger) + number * (config.batch_size // 2)
    stop = min(start + config.batch_size // 2, (epoch + 1) * len(larger))
    return [larger[i] for i in common.endless(len(larger), (config.seed, 0), start, stop)] + [
        smaller[i] for i in common.endless(len(smaller), (config.seed, 1), start, stop)
    ]


def micro_batch_losses(policy, batch: list[dict], config: Config, run: common.Run) -> Iterator:
    """Yield, for each micro-batch of this process, (loss, indices (b,), {figure: (b,)}).

    batch: the global batch. Summed over micro-batches and processes, loss is its mean over
    completion tokens.
    """
    tokens = common.completion_tokens(batch)
    rewards = torch.tensor([1.0 if example["desirable"] else -1.0 for example in batch])
    rewards = rewards.to(run.device, run.dtype)  # (B,)
    for micro in common.micro_batches(batch, run):
        logps, values = policy(micro, with_values=True)  # (n,) each
        policy_logps, reference_logps = micro.pad(logps), micro.pad(micro.reference_logps)  # (b, T)
        values = micro.pad(values)
        advantages, returns = gae(
            values, rewards[micro.indices], micro.mask, config.gamma, config.gae_lambda
        )
        losses = ppo_offline_loss(
            policy_logps, reference_logps, advantages, micro.mask, config.epsilon
        )  # (b, T)
        critic = 0.5 * (values - returns) ** 2  # (b, T), 0 in the padding
        both = (losses + config.critic_weight * critic).sum(1)  # (b,)
        log_ratios = (policy_logps - reference_logps).detach()
        outside = (log_ratios.clamp(-20, 20).exp() - 1).abs() > config.epsilon
        figures = {
            "loss": both,
            "critic_loss": critic.sum(1),
            "clipped": outside.to(both).sum(1),
            "log_ratio": log_ratios.sum(1),
        }
        yield both.sum() / tokens, micro.indices, figures


def summarise(figures: dict[str, torch.Tensor], batch: list[dict]) -> dict[str, float]:
    """What metrics.jsonl says of a global batch's figures, (B,) each: means over tokens, mostly."""
    tokens = common.completion_tokens(batch)
    desirable = torch.tensor([example["desirable"] for example in batch])
    log_ratio = figures.pop("log_ratio").cpu()
    margin = log_ratio[desirable].mean() - log_ratio[~desirable].mean()
    means = {name: values.sum().item() / tokens for name, values in figures.items()}
    return means | {"log_ratio_margin": margin.item()}


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
    policy = common.load_policy(run, value_head=True)
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
