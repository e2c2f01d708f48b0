"""Sequence-Likelihood Calibration (SLiC): section 3.2 of the report, equation (5).

Each prompt x has two completions, of which y_w (chosen) was preferred to y_l (rejected). The chosen
one should be more likely by a margin of beta. A language-modeling term keeps the policy near the
text that it should write.

    calibration = max(0, beta - log pi(y_w|x) + log pi(y_l|x))                  (5), in nats
    loss        = calibration + lambda_reg * (-log pi(y_target|x))
                  averaged over the global batch

There is no reference model, and in the report no SFT before: the language-modeling term takes the
place of both.

Deviations from the report (Ethayarajh et al., Human-Centered Loss Functions, December 2023, in
github.com/ContextualAI/HALOs):
 1. The second term of the report is over samples of pi_ref, for which it takes the SFT data. Here
    y_target is the record's `target` where it has one, else the chosen completion, as in the
    authors' code.
 2. The report prints a "preference model" for SLiC, a min(0, ...), that is never above 0. So it is
    no probability but a utility. See slic_value, which has it in the form of section 4.

    python slic.py --model toy --data toy --lr 1e-4 --warmup_steps 10 --out runs/slic
    torchrun --nproc_per_node=8 slic.py --model pythia-1.4b
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

import common

FORMATS = ("preference",)  # the records that this loss can learn from


@dataclass
class Config:
    """All settings; the comments are what --help prints.

    (HALOs) marks the defaults of the authors' code, github.com/ContextualAI/HALOs, December 2023.
    """

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str | list[str] = "archangel"  # archangel, toy, files, a folder or a hub id: see DATA.md
    out: str = "runs/slic"  # folder for the model, metrics.jsonl, run.json and checkpoints
    max_steps: int = 0  # optimizer steps; 0: as many as --epochs makes
    epochs: int = 1  # passes over the data; KTO and PPO: over the larger class (HALOs)
    batch_size: int = 32  # examples per optimizer step, over all processes (the report)
    micro_batch_tokens: int = 8192  # most tokens in a micro-batch; lower it to save memory
    lr: float = 5e-7  # learning rate after warm-up (HALOs)
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # RMSprop (HALOs) or AdamW (the KTO paper)
    warmup_steps: int = 150  # steps of linear warm-up, then constant (HALOs)
    max_grad_norm: float = 10.0  # the gradient is scaled down to this norm (HALOs)
    max_length: int = 2048  # tokens of a prompt and a completion together, at most (HALOs)
    max_prompt_length: int = 1024  # overlong examples lose prompt tokens first, but keep this many
    truncate_prompt: Literal["start", "end"] = "start"  # which end of an overlong prompt is cut off
    seed: int = 1  # of the order of the data, and of what else is drawn at random (HALOs)
    eval_every: int = 0  # steps between evaluations, besides before and after training; 0: none
    save_every: int = 500  # steps between checkpoints, and one at the end; 0: only after a signal
    resume: bool = False  # continue from the last checkpoint in --out
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 on GPUs
    activation_checkpointing: bool = False  # recompute activations in backward: slower, less memory
    # SLiC's own
    beta: float = 1.0  # the margin, in nats (HALOs)
    lambda_reg: float = 0.1  # weight of the language-modeling term (HALOs)

    def __post_init__(self):
        common.check_settings(self, positive=("beta",))


# --------------------------------------------------------------------------------------- the loss


def slic_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_target_logps: torch.Tensor,
    beta: float = 1.0,
    lambda_reg: float = 0.1,
) -> torch.Tensor:
    """SLiC's loss of each pair: equation (5), and the language-modeling term below it.

    Args:
        policy_chosen_logps, policy_rejected_logps, policy_target_logps: (B,) log-probabilities of
            whole completions, in nats, summed over tokens.
        beta: the margin in nats, above 0.
        lambda_reg: weight of the language-modeling term, at least 0.
    Returns:
        (B,) losses, at least 0.

    >>> likely, unlikely = torch.tensor([-2.0]), torch.tensor([-3.0])
    >>> slic_loss(likely, unlikely, likely)  # the margin is kept: 0 + 0.1 * 2
    tensor([0.2000])
    >>> slic_loss(unlikely, likely, unlikely)  # 1 + 3 - 2 + 0.1 * 3
    tensor([2.3000])
    """
    # At least float32: log-probabilities of completions may be near -800, where bfloat16 values
    # are 4 apart. Callers should sum over tokens in float32, too.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    margin = policy_chosen_logps.to(dtype) - policy_rejected_logps.to(dtype)  # (B,)
    calibration = torch.relu(beta - margin)  # (5)
    return calibration - lambda_reg * policy_target_logps.to(dtype)


def slic_value(
    reward_chosen: torch.Tensor, reward_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """SLiC's value of a reward compared with the rejected one's: min(0, difference - beta).

    Section 4. It is 0 from the margin on, and a line of slope 1 below it. For Figure 4; training
    uses slic_loss.
    """
    return torch.clamp(reward_chosen - reward_rejected - beta, max=0)


# --------------------------------------------------------------------------- records to examples


def make_examples(records: common.TokenizedRecords, config: Config) -> common.Examples:
    """Records to examples: a prompt with its chosen and rejected completions.

    A target that is not the chosen completion is the third one.
    """
    examples = common.Examples(records, config)
    for number in range(len(records)):
        completions = ("chosen", "rejected")
        if records.has(number, "target") and not records.are_equal(number, "target", "chosen"):
            completions = ("chosen", "rejected", "target")
        examples.add_record(number, [completions])
    return examples


def make_schedule(examples: common.Examples, config: Config) -> list[list[int]]:
    """The indices of the examples of every step. An epoch is one pass over all of them."""
    steps_per_epoch = math.ceil(len(examples) / config.batch_size)
    num_steps = config.max_steps or config.epochs * steps_per_epoch
    num_epochs = math.ceil(num_steps / steps_per_epoch)

    order = common.shuffled_passes(len(examples), num_epochs * len(examples), seed=(config.seed,))
    schedule = []
    for epoch in range(num_epochs):
        epoch_end = (epoch + 1) * len(examples)
        for start in range(epoch * len(examples), epoch_end, config.batch_size):
            # The last batch of an epoch may be smaller.
            stop = min(start + config.batch_size, epoch_end)
            schedule.append(order[start:stop])
    return schedule[:num_steps]


# ----------------------------------------------------------------------------------- the training


def locate_completions(
    examples: common.Examples, batch: list[int], micro_batch: common.MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which of the C completions of a micro-batch are chosen, rejected and target, (b,) each.

    batch: the indices of the examples of the global batch.
    """
    chosen = []
    rejected = []
    target = []
    first = 0  # position of an example's first completion among all C
    for place in micro_batch.places.tolist():
        num_completions = len(examples[batch[place]].completions_ids)
        chosen.append(first)
        rejected.append(first + 1)
        target.append(first + 2 if num_completions == 3 else first)
        first += num_completions
    device = micro_batch.places.device
    return (
        torch.tensor(chosen, dtype=torch.long, device=device),
        torch.tensor(rejected, dtype=torch.long, device=device),
        torch.tensor(target, dtype=torch.long, device=device),
    )


def summarize(losses: torch.Tensor, margins: torch.Tensor, config: Config) -> dict[str, float]:
    """The metrics of a global batch, from its losses and margins of log-probability, (B,) each."""
    is_right = torch.heaviside(margins, margins.new_tensor(0.5))  # a tie counts as one half
    return {
        "loss": losses.mean().item(),
        "logp_margin": margins.mean().item(),
        "logp_accuracy": is_right.mean().item(),
        "clear_of_margin": (margins > config.beta).to(margins).mean().item(),
    }


@torch.no_grad()
def evaluate(
    policy: common.Policy, examples: common.Examples, config: Config, run: common.Run
) -> dict[str, float]:
    """The metrics on held-out examples, a batch of consecutive ones at a time."""
    losses = []
    margins = []
    for start in common.progress(range(0, len(examples), config.batch_size), "evaluate"):
        batch = list(range(start, min(start + config.batch_size, len(examples))))
        micro_batches = common.make_micro_batches(examples, batch, run)
        batch_losses = []
        batch_margins = []
        for micro_batch in micro_batches:
            chosen, rejected, target = locate_completions(examples, batch, micro_batch)
            policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (C,)
            micro_losses = slic_loss(
                policy_logps[chosen],
                policy_logps[rejected],
                policy_logps[target],
                config.beta,
                config.lambda_reg,
            )  # (b,)
            batch_losses.append(micro_losses)
            batch_margins.append(policy_logps[chosen] - policy_logps[rejected])
        losses.append(common.gather_batch(batch_losses, micro_batches, len(batch)))
        margins.append(common.gather_batch(batch_margins, micro_batches, len(batch)))
    if not losses:
        return {}
    metrics = summarize(torch.cat(losses), torch.cat(margins), config)
    return {f"eval_{name}": value for name, value in metrics.items()}


def train(config: Config) -> None:
    """Train --model on --data into --out."""
    run = common.start_run(config)
    records, test_records = common.load_records(run, FORMATS)
    train_set = make_examples(records, config)
    test_set = make_examples(test_records, config)
    run.check_examples(train_set, test_set)  # says what was left out or truncated
    schedule = make_schedule(train_set, config)  # the example indices of every step
    run.check_run(train_set, test_set, schedule)  # refuses to resume with other data or settings
    if run.is_finished():
        return

    policy = common.load_policy(run)
    common.check_model_and_choose_layout(policy, [train_set, test_set], run)
    run.claim_folder()  # nothing is written to --out before this line
    optimizer = common.make_optimizer(policy, config)

    steps_done = run.load_checkpoint(policy, optimizer)
    if steps_done == 0:
        run.log(0, evaluate(policy, test_set, config, run))
    run.save_on_signals()
    for step in range(steps_done + 1, len(schedule) + 1):
        start_time = time.perf_counter()
        batch = schedule[step - 1]  # the global batch, B pairs
        num_completion_tokens = train_set.num_completion_tokens(batch)
        micro_batches = common.make_micro_batches(train_set, batch, run)
        losses = []
        margins = []
        for micro_batch in micro_batches:
            chosen, rejected, target = locate_completions(train_set, batch, micro_batch)
            policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (C,)
            margins.append((policy_logps[chosen] - policy_logps[rejected]).detach())
            micro_losses = slic_loss(
                policy_logps[chosen],
                policy_logps[rejected],
                policy_logps[target],
                config.beta,
                config.lambda_reg,
            )  # (b,)
            # The gradient of the mean over the global batch is a sum over micro-batches and
            # processes. FSDP takes the mean over processes, hence world_size (which is 1 without
            # FSDP, in one process).
            (micro_losses.sum() / len(batch) * run.world_size).backward()
            losses.append(micro_losses.detach())

        losses = common.gather_batch(losses, micro_batches, len(batch))  # (B,)
        margins = common.gather_batch(margins, micro_batches, len(batch))  # (B,)
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = summarize(losses, margins, config)
        metrics["lr"] = lr
        metrics["grad_norm"] = grad_norm
        metrics.update(run.speed_metrics(num_completion_tokens, start_time))
        if step == len(schedule) or (config.eval_every and step % config.eval_every == 0):
            metrics.update(evaluate(policy, test_set, config, run))
        run.log(step, metrics)
        run.save_if_due(step, policy, optimizer)
    run.export(policy)


if __name__ == "__main__":
    common.run_script(train, Config, __doc__)
