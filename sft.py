"""Supervised finetuning (SFT): section 2 of the report.

    loss = -log pi(y_t | x, y_<t)          in nats, for each completion token y_t
           averaged over all completion tokens of the global batch

The average is over the completion tokens of all processes and all micro-batches, so that each token
has the same weight. Prompt tokens are not trained on.

SFT usually makes the model that DPO, KTO and PPO start from, their pi_ref.

Choices where the report (Ethayarajh et al., Human-Centered Loss Functions, December 2023, in
github.com/ContextualAI/HALOs with the authors' code) is silent:
 1. The report prints no equation for this loss. It is the mean over tokens, as above. (The authors'
    code sums over the tokens of a completion, and takes the mean over completions.)
 2. The report trains on "a subset of the generations used to subsequently align the model" (section
    3.4). Here these are the chosen completions of pairs (or their `target`, where a record has
    one), the desirable ones of labelled records, and all records with a prompt and a completion
    only.

    python sft.py --model toy --data toy --lr 3e-4 --warmup_steps 10 --out runs/sft
    torchrun --nproc_per_node=8 sft.py --model pythia-1.4b
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

import common

FORMATS = ("preference", "unpaired", "supervised")  # the records that this loss can learn from


@dataclass
class Config:
    """All settings; the comments are what --help prints.

    (HALOs) marks the defaults of the authors' code, github.com/ContextualAI/HALOs, December 2023.
    """

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str | list[str] = "archangel"  # archangel, toy, files, a folder or a hub id: see DATA.md
    out: str = "runs/sft"  # folder for the model, metrics.jsonl, run.json and checkpoints
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

    def __post_init__(self):
        common.check_settings(self)


# --------------------------------------------------------------------------------------- the loss


def sft_loss(policy_token_logps: torch.Tensor) -> torch.Tensor:
    """SFT's loss of each completion token, section 2: its negative log-probability.

    Args:
        policy_token_logps: (N,) log-probabilities of completion tokens, in nats.
    Returns:
        (N,) losses, at least 0.

    >>> sft_loss(torch.tensor([0.5, 0.25]).log())
    tensor([0.6931, 1.3863])
    """
    # In at least float32: a sum of many losses in bfloat16 would lose most of its digits.
    dtype = torch.promote_types(policy_token_logps.dtype, torch.float32)
    return -policy_token_logps.to(dtype)


# --------------------------------------------------------------------------- records to examples


def make_examples(records: common.TokenizedRecords, config: Config) -> common.Examples:
    """Records to examples: a prompt and the completion to learn. Undesirable ones are left out.

    The pairs of one prompt often name the same target. It becomes one example. (Chosen completions
    that are equal are not merged.)
    """
    examples = common.Examples(records, config)
    targets = set()  # (prompt, target) that are among the examples already
    for number, label in enumerate(records.label):
        if records.has(number, "target"):
            target = (records.prompt_key(number), records.read(number, "target").tobytes())
            if target in targets:
                examples.leave_out(number, "the same target of the same prompt again")
            else:
                targets.add(target)
                examples.add_record(number, [("target",)])
        elif records.has(number, "chosen"):
            examples.add_record(number, [("chosen",)])
        elif label is False:
            examples.leave_out(number, "undesirable")
        else:
            examples.add_record(number, [("completion",)])
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


def summarize(losses: torch.Tensor, num_completion_tokens: int) -> dict[str, float]:
    """The metrics of a global batch, from losses (B,) that are sums over completion tokens."""
    return {"loss": losses.sum().item() / num_completion_tokens}


@torch.no_grad()
def evaluate(
    policy: common.Policy, examples: common.Examples, config: Config, run: common.Run
) -> dict[str, float]:
    """The metrics on held-out examples, a batch of consecutive ones at a time."""
    losses = []
    for start in common.progress(range(0, len(examples), config.batch_size), "evaluate"):
        batch = list(range(start, min(start + config.batch_size, len(examples))))
        micro_batches = common.make_micro_batches(examples, batch, run)
        batch_losses = []
        for micro_batch in micro_batches:
            token_losses = sft_loss(policy(micro_batch))  # (N,)
            batch_losses.append(micro_batch.sum_completions(token_losses))  # (b,)
        losses.append(common.gather_batch(batch_losses, micro_batches, len(batch)))
    if not losses:
        return {}
    metrics = summarize(torch.cat(losses), examples.num_completion_tokens(range(len(examples))))
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
        batch = schedule[step - 1]  # the global batch, B examples
        num_completion_tokens = train_set.num_completion_tokens(batch)
        micro_batches = common.make_micro_batches(train_set, batch, run)
        losses = []
        for micro_batch in micro_batches:
            token_losses = sft_loss(policy(micro_batch))  # (N,)
            # The gradient of the mean over the global batch is a sum over micro-batches and
            # processes. FSDP takes the mean over processes, hence world_size (which is 1 without
            # FSDP, in one process).
            (token_losses.sum() / num_completion_tokens * run.world_size).backward()
            losses.append(micro_batch.sum_completions(token_losses.detach()))  # (b,)

        losses = common.gather_batch(losses, micro_batches, len(batch))  # (B,) sums over tokens
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = summarize(losses, num_completion_tokens)
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
