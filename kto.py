"""Kahneman-Tversky Optimization (KTO): the report's own loss, section 5, equation (7).

A person judges one reply at a time, as desirable or not, against what they expected:

    r(x, y)  = log pi(y|x) - log pi_ref(y|x)       the log-ratio, nats; a reward is beta times it
    utility  = sigmoid(beta * (r(x, y) - kl))    if y is desirable                  (7)
               sigmoid(beta * (kl - r(x, y)))    if y is undesirable
    loss     = weight * (1 - utility), its mean over the global batch

`kl`, the reference point, stands for KL(pi || pi_ref), the mean of r over replies of the policy;
it is measured, as in the report, on the replies of the data instead. By --kl other_half (the
report's) each class is measured against the mean of r over the other class; mismatched (the later
paper's) measures all against the mean of r over partners, prompts with replies to other prompts;
zero does without. A negative mean counts as 0.

Deviations from the report:
 1. The report prints the utility to be maximised; the loss is one minus it, to be minimised.
 2. The reference point is clamped at 0: a KL divergence is never negative, its estimate can be.
 3. The reference point is detached. With a gradient, desirable replies would also push the log-
    probabilities of the undesirable down, and those the others' up: a contrast of two halves, not
    each reply against a fixed expectation.
 4. The two class weights and `--kl mismatched` are the later paper's (arXiv 2402.01306), which
    pairs neighbours of a minibatch; here partners are drawn once for the whole data set.
 5. The reference point is taken over the global batch: all processes, all micro-batches.

    python kto.py --model toy --data toy --lr 2e-4 --warmup_steps 10 --out runs/kto
    torchrun --nproc_per_node=8 kto.py --model pythia-1.4b
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import common

FORMS = ("preference", "unpaired")  # the kinds of row that hold what this loss needs


@dataclass
class Config:
    """Every setting; the comments are what --help prints. (HALOs): as in the authors' code."""

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str = "archangel"  # archangel (HH, SHP, OASST), toy, a .jsonl or a folder of train, test
    out: str = "runs/kto"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # KTO's own
    beta: float = 0.1  # a reward is beta times the log-ratio (HALOs)
    desirable_weight: float = 1.0  # of the desirable examples' losses
    undesirable_weight: float = 1.0  # of the undesirable examples' losses
    kl: Literal["other_half", "mismatched", "zero"] = "other_half"  # the reference point, as above

    def __post_init__(self):
        common.check_settings(self, above_zero=("beta", "desirable_weight", "undesirable_weight"))
        if self.batch_size % 2:
            raise common.UserError(f"--batch_size {self.batch_size}: must be even, half each class")


# ------------------------------------------------------------------------------------- the loss


def kto_loss(
    policy_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO's loss for each example, equation (7): weight * (1 - utility).

    Args:
        policy_logps, reference_logps: (B,) log-probabilities of whole completions, nats, summed
            over tokens.
        desirable: (B,) bool.
        kl: the reference point in nats, a scalar or (B,); detached here, not clamped.
        beta: above 0, a reward for a nat. Weights: above 0, of the losses of each class.
    Returns:
        (B,) losses between 0 and the weight: half of it where policy and reference agree and kl is
        0. The gradient by a log-ratio r is at most weight * beta / 4, at r = kl.

    >>> zero = torch.zeros(2)
    >>> kto_loss(zero, zero, torch.tensor([True, False]), 0.0)
    tensor([0.5000, 0.5000])
    >>> kto_loss(zero + 10, zero, torch.tensor([True, False]), 0.0)  # 1 - sigmoid(+-1)
    tensor([0.2689, 0.7311])
    """
    # At least float32: near -800 nats bfloat16 cannot tell 4 nats apart.
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    log_ratios = policy_logps.to(dtype) - reference_logps.to(dtype)  # (B,)
    # Detached: the reference point is what an example is measured against, not a thing to train.
    kl = torch.as_tensor(kl, dtype=dtype, device=log_ratios.device).detach()
    gain = torch.where(desirable, log_ratios - kl, kl - log_ratios)
    loss = torch.sigmoid(-beta * gain)  # (7): 1 - sigmoid(z) = sigmoid(-z)
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def kl_from_other_half(log_ratios: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """The report's reference point (B,), section 5: the other class's mean log-ratio, at least 0.

    Args:
        log_ratios: (B,) policy minus reference, nats, of the whole global batch.
        desirable: (B,) bool.
    Returns:
        (B,), detached; 0 where the batch has no example of the other class.

    >>> kl_from_other_half(torch.tensor([1.0, 3.0, -4.0]), torch.tensor([True, True, False]))
    tensor([0., 0., 2.])
    """
    log_ratios = log_ratios.detach().to(torch.promote_types(log_ratios.dtype, torch.float32))
    others = log_ratios[~desirable], log_ratios[desirable]  # of a desirable, of an undesirable one
    means = [r.mean().clamp(min=0) if len(r) else r.new_zeros(()) for r in others]
    return torch.where(desirable, *means)


def kahneman_tversky_value(
    z: torch.Tensor, z_ref: torch.Tensor | float, alpha: float = 0.88, loss_aversion: float = 2.25
) -> torch.Tensor:
    """Kahneman and Tversky's value of an outcome z against z_ref, equation (6), in money.

    (z - z_ref)^alpha in gains, -loss_aversion * (z_ref - z)^alpha in losses: concave in gains,
    convex in losses, steeper in losses. (6) leaves z = z_ref undefined: here it is 0, with gradient
    0 where the slope is infinite.

    >>> kahneman_tversky_value(torch.tensor([-1.0, 0.0, 1.0]), 0.0)
    tensor([-2.2500,  0.0000,  1.0000])
    """
    gain = torch.as_tensor(z) - z_ref
    # Where the gain is 0 the power sees a 1, so that no infinite slope meets a zero factor.
    size = torch.where(gain == 0, 1.0, gain.abs()) ** alpha
    return torch.where(gain == 0, 0.0, torch.where(gain > 0, size, -loss_aversion * size))  # (6)


def kto_value(z: torch.Tensor, z_ref: torch.Tensor | float) -> torch.Tensor:
    """KTO's value of a reward z, section 5: sigmoid(z - z_ref); as steep in losses as in gains."""
    return torch.sigmoid(z - z_ref)


# ------------------------------------------------------------ rows to examples, batches, losses


def make_examples(rows: list[dict], tokenizer, config: Config) -> list[dict]:
    """Rows to examples, one a completion: prompt_ids, completions_ids of one, desirable.

    A pair makes two. With --kl mismatched an example also has a partner: its prompt with a
    completion of another.
    """
    fields = ("chosen", "rejected", "completion")
    texts = [(row["prompt"], [row[field] for field in fields if field in row]) for row in rows]
    labels = [[row["label"]] if "label" in row else [True, False] for row in rows]
    examples = [
        {"prompt_ids": tokens["prompt_ids"], "completions_ids": [ids], "desirable": desirable}
        for tokens, row_labels in zip(common.tokenise(texts, tokenizer, config), labels)
        for ids, desirable in zip(tokens["completions_ids"], row_labels)
    ]
    if config.kl == "mismatched":
        common.add_partners(examples, config)
    return examples


def with_partners(examples: list[dict]) -> list[dict]:
    """The examples, each followed by its partner, if any: neighbours with one prompt."""
    return [each for example in examples for each in (example, example.get("partner")) if each]


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


@torch.no_grad()
def detached_log_ratios(policy, micro: common.Batch) -> torch.Tensor:
    """Log-ratios (b,) of a micro-batch's completions, nats, by a pass without gradient."""
    return micro.sum(policy(micro) - micro.reference_logps)


def reference_point(parts, desirable, config: Config, run: common.Run) -> torch.Tensor:
    """The reference point (B,) of the global batch: --kl other_half's or mismatched's.

    parts: [(indices (b,), {"r": log-ratios (b,)}), ...] of this process's examples, or partners.
    Every process calls it, with its own.
    """
    r = common.gather(parts, len(desirable), run)["r"]  # (B,)
    if config.kl == "mismatched":
        return r.mean().clamp(min=0).expand_as(r)
    return kl_from_other_half(r, desirable)


def micro_batch_losses(policy, batch: list[dict], config: Config, run: common.Run) -> Iterator:
    """Yield, for each micro-batch of this process, (loss, indices (b,), {figure: (b,)}).

    batch: the global batch. Summed over micro-batches and processes, loss is its mean loss.
    """
    desirable = torch.tensor([example["desirable"] for example in batch], device=run.device)  # (B,)
    mismatched, partners = config.kl == "mismatched", [e.get("partner") for e in batch]
    first, *others = common.micro_batches(batch, run)
    settings = config.beta, config.desirable_weight, config.undesirable_weight
    kl = torch.zeros(len(batch), device=run.device)  # (B,) the reference point of each example
    # The first loss needs it. So what it is measured on, examples or partners, goes through the
    # policy here, ahead and without gradient: but for the first micro-batch, whose own forward pass
    # below is in time, and leaves the prompts' keys and values for its partners.
    parts, ahead = [], others if config.kl != "zero" else []
    for micro in ahead:
        i = micro.indices
        measured = common.micro_batch(partners, i.tolist(), run) if mismatched else micro
        parts.append((i, {"r": detached_log_ratios(policy, measured)}))
    if mismatched:
        its_partners = common.micro_batch(partners, first.indices.tolist(), run, after=first)
    for micro in (first, *others):
        i = micro.indices
        policy_logps = micro.sum(policy(micro))  # (b,)
        reference_logps = micro.sum(micro.reference_logps)  # (b,)
        r = (policy_logps - reference_logps).detach()
        if micro is first and config.kl != "zero":
            measured = detached_log_ratios(policy, its_partners) if mismatched else r
            kl = reference_point([(i, {"r": measured}), *parts], desirable, config, run)
        losses = kto_loss(policy_logps, reference_logps, desirable[i], kl[i], *settings)  # (b,)
        figures = {"loss": losses, "reward": config.beta * r, "kl": kl[i]}
        yield losses.sum() / len(batch), i, figures


def summarise(figures: dict[str, torch.Tensor], batch: list[dict]) -> dict[str, float]:
    """What metrics.jsonl says of a global batch's figures, (B,) each; kl is in nats."""
    desirable = torch.tensor([example["desirable"] for example in batch])
    reward = figures["reward"].cpu()
    wanted, unwanted = reward[desirable].mean().item(), reward[~desirable].mean().item()
    return {
        "loss": figures["loss"].mean().item(),
        "reward_margin": wanted - unwanted,
        "reward_desirable": wanted,
        "reward_undesirable": unwanted,
        "kl": figures["kl"].mean().item(),
    }


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
    common.self_check(policy, with_partners(train_set + test_set), run)
    for examples in (with_partners(train_set), with_partners(test_set)):
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
