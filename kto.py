"""Kahneman-Tversky Optimization (KTO): section 5 of the report, equation (7).

Each completion y of a prompt x is labelled desirable or undesirable. No pairs are needed.

    log-ratio  r(x, y) = log pi(y|x) - log pi_ref(y|x)               in nats
    utility    h(x, y) = sigmoid(beta * (r(x, y) - kl))              if y is desirable       (7)
                         sigmoid(beta * (kl - r(x, y)))              if y is undesirable
    loss               = weight of y's class (1 by default) * (1 - h(x, y))
                         averaged over the global batch

The reference point kl (z_ref in equation (6)) stands for KL(pi || pi_ref), the mean log-ratio of
completions sampled from the policy pi. Sampling is slow, so it is estimated with completions of the
data set:

    --kl other_half  (the report)      max(0, mean log-ratio of the examples with the other label)
    --kl mismatched  (the KTO paper)   max(0, mean log-ratio r(x, y')), y' from another prompt
    --kl zero                          0, for comparison

Deviations from the report (Ethayarajh et al., Human-Centered Loss Functions, December 2023, in
github.com/ContextualAI/HALOs with the authors' code; the KTO paper is arXiv 2402.01306):
 1. Equation (7) is a utility, to be maximized. The loss is one minus it, as in the authors' code.
 2. The reference point is clamped at 0, as in the authors' code: a KL divergence is never negative,
    but its estimate can be.
 3. The reference point is a constant of the loss, like z_ref in equation (6): no gradient flows
    through it. With gradient, the pushes on all log-ratios would sum to zero: training would change
    only the difference between the classes, as a preference loss does, instead of comparing each
    completion with a fixed expectation. The report does not say. In the authors' code of the time,
    gradient flowed through it; in the KTO paper it does not.
 4. The reference point is estimated over the global batch, of all processes and all micro-batches.
    The report has the other half of a minibatch, the authors' code that of one process.
 5. The two class weights and --kl mismatched are from the KTO paper. The paper mismatches neighbors
    in a minibatch; here the pairing is drawn once for the whole data set.
 6. Where the data has more of one class, the other class repeats, so that every batch is half
    desirable, half undesirable. The paper's rule for the class weights, with n_D desirable and n_U
    undesirable examples, is 1 <= (desirable_weight * n_D) / (undesirable_weight * n_U) <= 4/3 (3/2
    in its ICML version). Here n_D = n_U in every batch, whatever the balance of the data.

    python kto.py --model toy --data toy --lr 2e-4 --warmup_steps 10 --out runs/kto
    torchrun --nproc_per_node=8 kto.py --model pythia-1.4b
"""

import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import common

FORMATS = ("preference", "unpaired")  # the records that this loss can learn from


@dataclass
class Config:
    """All settings; the comments are what --help prints.

    (HALOs) marks the defaults of the authors' code, github.com/ContextualAI/HALOs, December 2023.
    """

    model: str  # toy, pythia-1.4b (2.8b, 6.9b, 12b), llama-7b (13b, 30b), a hub id or a folder
    data: str | list[str] = "archangel"  # archangel, toy, files, a folder or a hub id: see DATA.md
    out: str = "runs/kto"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # KTO's own
    beta: float = 0.1  # a reward is beta times the log-ratio (HALOs)
    desirable_weight: float = 1.0  # of desirable examples' losses; see 6 above for its range
    undesirable_weight: float = 1.0  # of undesirable examples' losses
    kl: Literal["other_half", "mismatched", "zero"] = "other_half"  # the reference point, see above

    def __post_init__(self):
        common.check_settings(self, positive=("beta", "desirable_weight", "undesirable_weight"))
        if self.batch_size % 2:
            raise common.UserError(
                f"--batch_size {self.batch_size}: must be even, half of it for each class"
            )


# --------------------------------------------------------------------------------------- the loss


def kto_loss(
    policy_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO's loss of each example, equation (7): weight * (1 - utility).

    Args:
        policy_logps, reference_logps: (B,) log-probabilities of whole completions, in nats, summed
            over tokens.
        desirable: (B,) bool.
        kl: the reference point in nats, a scalar or (B,). It is detached here, and not clamped.
        beta: above 0; a reward is beta times the log-ratio.
        desirable_weight, undesirable_weight: above 0, of the losses of each class.
    Returns:
        (B,) losses between 0 and the weight; half the weight where the log-ratio equals kl. There
        the gradient with respect to the log-ratio is largest in size: weight * beta / 4.

    >>> zero = torch.zeros(2)
    >>> kto_loss(zero, zero, torch.tensor([True, False]), 0.0)
    tensor([0.5000, 0.5000])
    >>> kto_loss(zero + 10, zero, torch.tensor([True, False]), 0.0)  # 1 - sigmoid(+-1)
    tensor([0.2689, 0.7311])
    """
    # At least float32: log-probabilities of completions may be near -800, where bfloat16 values
    # are 4 apart. Callers should sum over tokens in float32, too.
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    log_ratios = policy_logps.to(dtype) - reference_logps.to(dtype)  # (B,)
    # Detached: the reference point is what an example is compared with, and is not trained.
    kl = torch.as_tensor(kl, dtype=dtype, device=log_ratios.device).detach()
    gain = torch.where(desirable, log_ratios - kl, kl - log_ratios)  # (B,)
    loss = torch.sigmoid(-beta * gain)  # (7): 1 - sigmoid(z) = sigmoid(-z)
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def kl_from_other_half(log_ratios: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """The report's reference point, section 5: the mean log-ratio of the other class, at least 0.

    Args:
        log_ratios: (B,) of the whole global batch, in nats.
        desirable: (B,) bool.
    Returns:
        (B,) for each example the reference point that it is measured against, detached. It is 0
        where the batch has no example of the other class.

    >>> kl_from_other_half(torch.tensor([1.0, 3.0, -4.0]), torch.tensor([True, True, False]))
    tensor([0., 0., 2.])
    """
    log_ratios = log_ratios.detach().to(torch.promote_types(log_ratios.dtype, torch.float32))
    kl = torch.zeros_like(log_ratios)
    if desirable.any() and not desirable.all():
        kl[desirable] = log_ratios[~desirable].mean().clamp(min=0)
        kl[~desirable] = log_ratios[desirable].mean().clamp(min=0)
    return kl


def kahneman_tversky_value(
    z: torch.Tensor, z_ref: torch.Tensor | float, alpha: float = 0.88, loss_aversion: float = 2.25
) -> torch.Tensor:
    """Kahneman and Tversky's value of an outcome z against z_ref, equation (6).

    (z - z_ref)^alpha for gains, -loss_aversion * (z_ref - z)^alpha for losses: concave in gains,
    convex in losses, steeper in losses. Equation (6) leaves z = z_ref undefined; here it is 0, with
    gradient 0 where the slope is infinite. For Figure 4; training does not use it.

    >>> kahneman_tversky_value(torch.tensor([-1.0, 0.0, 1.0]), 0.0)
    tensor([-2.2500,  0.0000,  1.0000])
    """
    gain = torch.as_tensor(z) - z_ref
    # Where the gain is 0, take the power of 1 instead: avoids inf * 0 = nan in the backward pass.
    power = torch.where(gain == 0, 1.0, gain.abs()) ** alpha
    return torch.where(gain == 0, 0.0, torch.where(gain > 0, power, -loss_aversion * power))  # (6)


def kto_value(z: torch.Tensor, z_ref: torch.Tensor | float) -> torch.Tensor:
    """KTO's value of a reward z, section 5: sigmoid(z - z_ref), as steep in losses as in gains.

    For Figure 4; training uses kto_loss.
    """
    return torch.sigmoid(z - z_ref)


# --------------------------------------------------------------------------- records to examples


def make_examples(records: common.TokenizedRecords, config: Config) -> common.Examples:
    """Records to examples of one completion each. A preference pair makes two examples.

    These have the same prompt and record number, so that the reference pass computes them together.
    In training they are independent.
    """
    examples = common.Examples(records, config)
    for number, label in enumerate(records.label):
        if label is None:  # a pair
            examples.add_record(number, [("chosen",), ("rejected",)], labels=[True, False])
        else:
            examples.add_record(number, [("completion",)], labels=[label])
    if config.kl == "mismatched":
        examples.mismatched = draw_mismatched(examples, config)
    return examples


def draw_mismatched(examples: common.Examples, config: Config) -> common.Examples:
    """Each example's prompt with a completion drawn from the examples of other prompts.

    The completion is truncated to fit after this prompt, even one of a conversation.
    """
    if len(examples) > 0 and len(set(examples.prompt_number)) < 2:
        raise common.UserError(
            f"--data {common.data_name(config)}: --kl mismatched needs two different prompts to "
            "train on; the held-out records, if any, need two as well"
        )
    mismatched = common.Examples()
    rng = np.random.default_rng(config.seed)
    for index in range(len(examples)):
        other = rng.integers(len(examples))
        while examples.prompt_number[other] == examples.prompt_number[index]:
            other = rng.integers(len(examples))
        mismatched.append(
            examples.with_completions_of(index, other),  # truncated to fit after this prompt
            record_number=examples.record_number[index],
        )
    return mismatched


def make_schedule(examples: common.Examples, config: Config) -> list[list[int]]:
    """The indices of the examples of every step: half of them desirable, half undesirable.

    Section 5 of the report found balanced batches to work best for KTO. An epoch is one pass over
    the larger class. The smaller class repeats, in a new order each time; with few examples also
    within a batch: with examples 0, 1, 2 (desirable) and 3, an epoch is the one batch
    [0, 1, 2, 3, 3, 3], if it fits.
    """
    desirable_indices = [i for i in range(len(examples)) if examples.desirable[i]]
    undesirable_indices = [i for i in range(len(examples)) if not examples.desirable[i]]
    if not desirable_indices or not undesirable_indices:
        only_label = len(desirable_indices) > 0
        raise common.UserError(
            f"--data {common.data_name(config)}: every label is {only_label}; this loss needs "
            "desirable and undesirable completions: add records of the other kind, or use sft.py"
        )
    larger = desirable_indices
    smaller = undesirable_indices
    if len(larger) < len(smaller):
        larger = undesirable_indices
        smaller = desirable_indices
    half = config.batch_size // 2
    steps_per_epoch = math.ceil(len(larger) / half)
    num_steps = config.max_steps or config.epochs * steps_per_epoch
    num_epochs = math.ceil(num_steps / steps_per_epoch)

    # Both orders have the same length: the smaller class makes more passes.
    length = num_epochs * len(larger)
    larger_order = common.shuffled_passes(len(larger), length, seed=(config.seed, 0))
    smaller_order = common.shuffled_passes(len(smaller), length, seed=(config.seed, 1))
    schedule = []
    for epoch in range(num_epochs):
        epoch_end = (epoch + 1) * len(larger)
        for start in range(epoch * len(larger), epoch_end, half):
            # The last batch of an epoch may be smaller.
            stop = min(start + half, epoch_end)
            batch = [larger[i] for i in larger_order[start:stop]]
            batch += [smaller[i] for i in smaller_order[start:stop]]
            schedule.append(batch)
    return schedule[:num_steps]


# ----------------------------------------------------------------------------------- the training


def labels_of(examples: common.Examples, batch: list[int], run: common.Run) -> torch.Tensor:
    """Whether each example of a global batch is desirable, (B,) bool."""
    return torch.tensor([examples.desirable[index] for index in batch], device=run.device)


@torch.no_grad()
def measure_log_ratios(
    policy: common.Policy, examples: common.Examples, batch: list[int], run: common.Run
) -> torch.Tensor:
    """The log-ratios (B,) of a global batch, by a forward pass without gradient."""
    micro_batches = common.make_micro_batches(examples, batch, run)
    log_ratios = []
    for micro_batch in micro_batches:
        policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (b,)
        reference_logps = micro_batch.sum_completions(micro_batch.reference_logps)  # (b,)
        log_ratios.append(policy_logps - reference_logps)
    return common.gather_batch(log_ratios, micro_batches, len(batch))


def estimate_kl(
    policy: common.Policy,
    examples: common.Examples,
    batch: list[int],
    config: Config,
    run: common.Run,
    log_ratios: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference point (B,) for each example of a global batch.

    log_ratios: (B,) of the batch, if they are known already. If not, and --kl other_half needs
    them, they are measured here.
    """
    if config.kl == "zero":
        return torch.zeros(len(batch), dtype=run.dtype, device=run.device)
    if config.kl == "mismatched":
        mismatched_log_ratios = measure_log_ratios(policy, examples.mismatched, batch, run)
        return mismatched_log_ratios.mean().clamp(min=0).expand(len(batch))
    if log_ratios is None:
        log_ratios = measure_log_ratios(policy, examples, batch, run)
    return kl_from_other_half(log_ratios, labels_of(examples, batch, run))


def summarize(
    losses: torch.Tensor,
    log_ratios: torch.Tensor,
    kl: torch.Tensor,
    desirable: torch.Tensor,
    config: Config,
) -> dict[str, float]:
    """The metrics of a global batch, from (B,) values of its examples.

    log_ratio_desirable and log_ratio_undesirable are the means that --kl other_half clamps at 0.
    They are nan for a class without examples, which held-out data may have.
    """
    log_ratio_desirable = log_ratios[desirable].mean().item()
    log_ratio_undesirable = log_ratios[~desirable].mean().item()
    return {
        "loss": losses.mean().item(),
        "reward_margin": config.beta * (log_ratio_desirable - log_ratio_undesirable),
        "reward_desirable": config.beta * log_ratio_desirable,
        "reward_undesirable": config.beta * log_ratio_undesirable,
        "kl": kl.mean().item(),
        "log_ratio_desirable": log_ratio_desirable,
        "log_ratio_undesirable": log_ratio_undesirable,
    }


def evaluate(
    policy: common.Policy | None, examples: common.Examples, config: Config, run: common.Run
) -> dict[str, float]:
    """The metrics on held-out examples, a batch of consecutive ones at a time.

    A batch need not be balanced; with --kl other_half, the reference point of one with a single
    class is 0. So eval_loss and eval_kl depend on --batch_size and on the order of the records.

    policy: None stands for the reference model. Its log-ratios are 0, so nothing is computed.
    """
    losses = []
    log_ratios = []
    kls = []
    for start in common.progress(range(0, len(examples), config.batch_size), "evaluate"):
        batch = list(range(start, min(start + config.batch_size, len(examples))))
        batch_log_ratios = torch.zeros(len(batch), dtype=run.dtype, device=run.device)
        kl = torch.zeros_like(batch_log_ratios)
        if policy is not None:
            batch_log_ratios = measure_log_ratios(policy, examples, batch, run)
            kl = estimate_kl(policy, examples, batch, config, run, batch_log_ratios)
        batch_losses = kto_loss(
            batch_log_ratios,  # the loss depends on the difference of policy and reference alone
            torch.zeros_like(batch_log_ratios),
            labels_of(examples, batch, run),
            kl,
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
        )
        losses.append(batch_losses)
        log_ratios.append(batch_log_ratios)
        kls.append(kl)
    if not losses:
        return {}
    log_ratios = torch.cat(log_ratios)  # of all held-out examples
    desirable = labels_of(examples, list(range(len(examples))), run)
    metrics = summarize(torch.cat(losses), log_ratios, torch.cat(kls), desirable, config)
    metrics.update(pair_accuracy(log_ratios, examples))
    return {f"eval_{name}": value for name, value in metrics.items()}


def pair_accuracy(log_ratios: torch.Tensor, examples: common.Examples) -> dict[str, float]:
    """The share of pairs whose desirable completion has the higher reward; {} without pairs.

    log_ratios: (n,) of all examples. A tie counts as one half.
    """
    by_record = {}  # record number -> label -> log-ratio
    for index, log_ratio in enumerate(log_ratios.tolist()):
        by_label = by_record.setdefault(examples.record_number[index], {})
        by_label[examples.desirable[index]] = log_ratio
    scores = []
    for by_label in by_record.values():
        if len(by_label) == 2:
            margin = by_label[True] - by_label[False]
            scores.append(0.5 if margin == 0 else float(margin > 0))
    if not scores:
        return {}
    return {"reward_accuracy": sum(scores) / len(scores)}


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
        batch = schedule[step - 1]  # the global batch, B examples
        num_completion_tokens = train_set.num_completion_tokens(batch)
        desirable = labels_of(train_set, batch, run)  # (B,)
        micro_batches = common.make_micro_batches(train_set, batch, run)

        # The loss of the first micro-batch needs the reference point of the whole global batch.
        # Keeping every micro-batch's graph until that is known would cost the memory that
        # micro-batches save. So an extra forward pass without gradient measures it first. With
        # --kl other_half and a single micro-batch it is not needed, because the training pass has
        # all log-ratios before the loss. (All processes have the same number of micro-batches.)
        kl_from_training_pass = config.kl == "other_half" and len(micro_batches) == 1
        if not kl_from_training_pass:
            kl = estimate_kl(policy, train_set, batch, config, run)  # (B,)

        losses = []
        log_ratios = []
        for micro_batch in micro_batches:
            policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (b,)
            reference_logps = micro_batch.sum_completions(micro_batch.reference_logps)  # (b,)
            log_ratios.append((policy_logps - reference_logps).detach())
            if kl_from_training_pass:  # this is the only micro-batch
                all_log_ratios = common.gather_batch(log_ratios, micro_batches, len(batch))
                kl = estimate_kl(policy, train_set, batch, config, run, all_log_ratios)  # (B,)
            micro_losses = kto_loss(
                policy_logps,
                reference_logps,
                desirable[micro_batch.places],
                kl[micro_batch.places],
                config.beta,
                config.desirable_weight,
                config.undesirable_weight,
            )  # (b,)
            # The gradient of the mean over the global batch is a sum over micro-batches and
            # processes. FSDP takes the mean over processes, hence world_size (which is 1 without
            # FSDP, in one process).
            (micro_losses.sum() / len(batch) * run.world_size).backward()
            losses.append(micro_losses.detach())

        losses = common.gather_batch(losses, micro_batches, len(batch))  # (B,)
        log_ratios = common.gather_batch(log_ratios, micro_batches, len(batch))  # (B,)
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = summarize(losses, log_ratios, kl, desirable, config)
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
