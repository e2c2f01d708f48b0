"""Direct Preference Optimization (DPO): section 3.1 of the report, equation (4).

Each prompt x has two completions, of which y_w (chosen) was preferred to y_l (rejected).

    log-ratio  r(x, y) = log pi(y|x) - log pi_ref(y|x)                  in nats
    loss               = -log sigmoid(beta * (r(x, y_w) - r(x, y_l)))                           (4)
                         averaged over the global batch

It is the negative log-likelihood of the preferences under equation (1), with the reward written by
equation (3) as beta * r(x, y) + beta * log Z(x). Z(x) is the same for both completions and cancels.

Deviations from the report (Ethayarajh et al., Human-Centered Loss Functions, December 2023, in
github.com/ContextualAI/HALOs):
 1. Equation (4) lacks a closing bracket; it is read as above.
 2. The report writes both pi_SFT and pi_ref; both are the policy as it was before training.

    python dpo.py --model toy --data toy --lr 3e-5 --warmup_steps 10 --out runs/dpo
    torchrun --nproc_per_node=8 dpo.py --model pythia-1.4b
"""

import itertools
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
    out: str = "runs/dpo"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # DPO's own
    beta: float = 0.1  # a reward is beta times the log-ratio (HALOs)

    def __post_init__(self):
        common.check_settings(self, positive=("beta",))


# --------------------------------------------------------------------------------------- the loss


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """DPO's loss of each pair, equation (4).

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
            reference_rejected_logps: (B,) log-probabilities of whole completions, in nats, summed
            over tokens.
        beta: above 0; a reward is beta times the log-ratio.
    Returns:
        (B,) losses above 0; log 2 where policy and reference agree.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero)
    tensor([0.6931])
    >>> dpo_loss(zero + 6, zero - 4, zero, zero)  # -log sigmoid(0.1 * (6 + 4))
    tensor([0.3133])
    """
    # At least float32: log-probabilities of completions may be near -800, where bfloat16 values
    # are 4 apart. Callers should sum over tokens in float32, too.
    dtype = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen_log_ratios = policy_chosen_logps.to(dtype) - reference_chosen_logps.to(dtype)
    rejected_log_ratios = policy_rejected_logps.to(dtype) - reference_rejected_logps.to(dtype)
    margin = chosen_log_ratios - rejected_log_ratios  # (B,)
    return -torch.nn.functional.logsigmoid(beta * margin)  # (4)


def dpo_value(reward_chosen: torch.Tensor, reward_rejected: torch.Tensor) -> torch.Tensor:
    """DPO's value of a reward compared with the rejected one's, section 4: log sigmoid(difference).

    Increasing and concave everywhere: it tends to 0 in gains, to a line of slope 1 in losses. For
    Figure 4; training uses dpo_loss.
    """
    return torch.nn.functional.logsigmoid(reward_chosen - reward_rejected)


# --------------------------------------------------------------------------- records to examples


def make_examples(records: common.TokenizedRecords, config: Config) -> common.Examples:
    """Records to examples: a prompt with two completions, chosen and rejected."""
    examples = common.Examples(records, config)
    for number in range(len(records)):
        examples.add_record(number, [("chosen", "rejected")])
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


@torch.no_grad()
def measure_log_ratios(
    policy: common.Policy, examples: common.Examples, batch: list[int], run: common.Run
) -> torch.Tensor:
    """The log-ratios (B, 2) of a global batch, chosen and rejected, without gradient."""
    micro_batches = common.make_micro_batches(examples, batch, run)
    log_ratios = []
    for micro_batch in micro_batches:
        policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (2b,)
        reference_logps = micro_batch.sum_completions(micro_batch.reference_logps)  # (2b,)
        log_ratios.append((policy_logps - reference_logps).view(-1, 2))  # (b, 2)
    return common.gather_batch(log_ratios, micro_batches, len(batch))


def summarize(losses: torch.Tensor, log_ratios: torch.Tensor, config: Config) -> dict[str, float]:
    """The metrics of a global batch, from losses (B,) and log-ratios (B, 2): chosen, rejected."""
    reward_chosen, reward_rejected = (config.beta * log_ratios).unbind(1)  # (B,) each
    margins = reward_chosen - reward_rejected
    is_right = torch.heaviside(margins, margins.new_tensor(0.5))  # a tie counts as one half
    return {
        "loss": losses.mean().item(),
        "reward_margin": margins.mean().item(),
        "reward_accuracy": is_right.mean().item(),
        "reward_chosen": reward_chosen.mean().item(),
        "reward_rejected": reward_rejected.mean().item(),
    }


def evaluate(
    policy: common.Policy | None, examples: common.Examples, config: Config, run: common.Run
) -> dict[str, float]:
    """The metrics on held-out examples, a batch of consecutive ones at a time.

    policy: None stands for the reference model. Its log-ratios are 0, so nothing is computed.
    """
    losses = []
    log_ratios = []
    for start in common.progress(range(0, len(examples), config.batch_size), "evaluate"):
        batch = list(range(start, min(start + config.batch_size, len(examples))))
        batch_log_ratios = torch.zeros(len(batch), 2, dtype=run.dtype, device=run.device)
        if policy is not None:
            batch_log_ratios = measure_log_ratios(policy, examples, batch, run)
        chosen_log_ratios, rejected_log_ratios = batch_log_ratios.unbind(1)  # (B,) each
        batch_losses = dpo_loss(
            chosen_log_ratios,  # the loss depends on differences of policy and reference alone
            rejected_log_ratios,
            torch.zeros_like(chosen_log_ratios),
            torch.zeros_like(rejected_log_ratios),
            config.beta,
        )
        losses.append(batch_losses)
        log_ratios.append(batch_log_ratios)
    if not losses:
        return {}
    metrics = summarize(torch.cat(losses), torch.cat(log_ratios), config)
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
    used = sorted(set(itertools.chain.from_iterable(schedule)))
    common.add_reference_logps(policy, train_set, used, "train", run)
    common.add_reference_logps(policy, test_set, range(len(test_set)), "test", run)
    optimizer = common.make_optimizer(policy, config)

    # Until here the policy is the reference model, also when a run is resumed.
    steps_done = run.load_checkpoint(policy, optimizer)
    if steps_done == 0:
        run.log(0, evaluate(None, test_set, config, run))
    run.save_on_signals()
    for step in range(steps_done + 1, len(schedule) + 1):
        start_time = time.perf_counter()
        batch = schedule[step - 1]  # the global batch, B pairs
        num_completion_tokens = train_set.num_completion_tokens(batch)
        micro_batches = common.make_micro_batches(train_set, batch, run)
        losses = []
        log_ratios = []
        for micro_batch in micro_batches:
            # The completions of a micro-batch are chosen, rejected, chosen, rejected, ...
            policy_logps = micro_batch.sum_completions(policy(micro_batch)).view(-1, 2)  # (b, 2)
            reference_logps = micro_batch.sum_completions(micro_batch.reference_logps).view(-1, 2)
            policy_chosen_logps, policy_rejected_logps = policy_logps.unbind(1)  # (b,) each
            reference_chosen_logps, reference_rejected_logps = reference_logps.unbind(1)
            log_ratios.append((policy_logps - reference_logps).detach())
            micro_losses = dpo_loss(
                policy_chosen_logps,
                policy_rejected_logps,
                reference_chosen_logps,
                reference_rejected_logps,
                config.beta,
            )  # (b,)
            # The gradient of the mean over the global batch is a sum over micro-batches and
            # processes. FSDP takes the mean over processes, hence world_size (which is 1 without
            # FSDP, in one process).
            (micro_losses.sum() / len(batch) * run.world_size).backward()
            losses.append(micro_losses.detach())

        losses = common.gather_batch(losses, micro_batches, len(batch))  # (B,)
        log_ratios = common.gather_batch(log_ratios, micro_batches, len(batch))  # (B, 2)
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = summarize(losses, log_ratios, config)
        metrics["lr"] = lr
        metrics["grad_norm"] = grad_norm
        metrics.update(run.speed_metrics(num_completion_tokens, start_time))
        if step == 1:
            common.check_first_step(log_ratios, num_completion_tokens, run)
        if step == len(schedule) or (config.eval_every and step % config.eval_every == 0):
            metrics.update(evaluate(policy, test_set, config, run))
        run.log(step, metrics)
        run.save_if_due(step, policy, optimizer)
    run.export(policy)


if __name__ == "__main__":
    common.run_script(train, Config, __doc__)
