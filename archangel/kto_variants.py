"""KTO with other reference points, values and batches, for the ablations. None is recommended.

kto.py measures each example against a constant, the mean log-ratio of the other half of the global
batch. The authors' code of December 2023 did two things differently:

    --attached        the gradient also flows through the reference point
    --group_size 4    the reference point is of the other half of 4 examples, 2 of each class, as on
                      a process that computes 4 of a batch's examples

The gain z of an example is beta * (log-ratio - kl), or minus that for an undesirable one. kto.py
maximizes sigmoid(z). Other functions of z take its place:

    --value identity             z
    --value log_sigmoid          log sigmoid(z)
    --value equation_6           Kahneman and Tversky's value of z, equation (6) of the report with
                                 alpha 0.88 and loss aversion 2.25, where |z|^alpha is smoothed to
                                 (z^2 + e^2)^(alpha / 2) - e^alpha. Its slope at 0 is 0; before
                                 training all gains are 0 but for rounding, which RMSprop scales up
    --value equation_6_shifted   the same, smoothed to (|z| + e)^alpha - e^alpha, whose slope at 0
                                 is alpha e^(alpha - 1) for gains, 2.25 times that for losses

with e = 0.1. Batches of kto.py are half desirable, half undesirable:

    --class_balance data         batches have the class ratio of the data, as in the KTO paper, and
                                 a run has as many steps as with kto.py's batches

It is the loop of kto.py for one process, and for a batch that fits in one micro-batch. Held-out
metrics are always those of kto.py (the sigmoid, and the reference point of a whole batch), so that
runs can be compared.

    python -m archangel.kto_variants --model toy --data toy --lr 2e-4 --warmup_steps 10 \\
        --attached --out runs/kto_attached
"""

import itertools
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common
import kto

ALPHA = 0.88  # equation (6), as Kahneman and Tversky found it
LOSS_AVERSION = 2.25  # lambda in equation (6), likewise
SMOOTHING = 0.1  # e, in units of the gain: of a reward


@dataclass
class Config(kto.Config):
    """The settings of kto.py, and which part of it is exchanged."""

    attached: bool = False  # let the gradient flow through the reference point
    group_size: int = 0  # examples that share a reference point, half of each class; 0: the batch
    value: Literal["sigmoid", "identity", "log_sigmoid", "equation_6", "equation_6_shifted"] = (
        "sigmoid"  # what is maximized, as a function of the gain
    )
    class_balance: Literal["equal", "data"] = "equal"  # of the classes in a batch

    def __post_init__(self):
        super().__post_init__()
        if self.group_size > 0 and (self.group_size % 2 or self.batch_size % self.group_size):
            raise common.UserError(
                f"--group_size {self.group_size}: must be even, and divide --batch_size "
                f"{self.batch_size}"
            )
        if self.kl != "other_half" and (self.attached or self.group_size > 0):
            raise common.UserError(
                f"--kl {self.kl}: --attached and --group_size are for other_half"
            )
        if self.class_balance == "data" and self.group_size > 0:
            raise common.UserError("--group_size: needs --class_balance equal")


# ------------------------------------------------------------------------------------- the batches


def make_schedule(examples: common.Examples, config: Config) -> list[list[int]]:
    """The indices of the examples of every step, in batches as --class_balance says."""
    equal = kto.make_schedule(examples, config)
    if config.class_balance == "equal":
        return equal
    length = len(equal) * config.batch_size
    order = common.shuffled_passes(len(examples), length, seed=(config.seed, 0))
    return [
        order[start : start + config.batch_size] for start in range(0, length, config.batch_size)
    ]


# ----------------------------------------------------------------------------- the reference point


def find_groups(desirable: torch.Tensor, group_size: int) -> torch.Tensor:
    """The group (B,) of each example, from 0. Group g has the g-th group_size / 2 of each class.

    desirable: (B,) bool. group_size: 0 for a single group.
    """
    if group_size == 0:
        return torch.zeros_like(desirable, dtype=torch.long)
    place_in_class = torch.where(desirable, desirable.cumsum(0), (~desirable).cumsum(0)) - 1
    return place_in_class // (group_size // 2)


def reference_points(
    log_ratios: torch.Tensor, desirable: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """kto.kl_from_other_half (B,) of each group by itself, and with gradient."""
    num_groups = int(groups.max()) + 1
    points = torch.zeros_like(log_ratios)
    for group in range(num_groups):
        for label in (True, False):
            own = (groups == group) & (desirable == label)
            other = (groups == group) & (desirable != label)
            if other.any():
                points = torch.where(own, log_ratios[other].mean().clamp(min=0), points)
    return points


# --------------------------------------------------------------------------------------- the value


def value_of(gains: torch.Tensor, name: str) -> torch.Tensor:
    """What is maximized, of the same shape as gains. name: of a --value; see the module."""
    if name == "sigmoid":
        return torch.sigmoid(gains) - 1  # as in kto.kto_loss, which is 0 for the largest value
    if name == "identity":
        return gains
    if name == "log_sigmoid":
        return F.logsigmoid(gains)
    if name == "equation_6":
        power = (gains**2 + SMOOTHING**2) ** (ALPHA / 2) - SMOOTHING**ALPHA
    else:
        magnitude = torch.where(gains >= 0, gains, -gains)  # torch's gradient of abs() is 0 at 0
        power = (magnitude + SMOOTHING) ** ALPHA - SMOOTHING**ALPHA
    return torch.where(gains >= 0, power, -LOSS_AVERSION * power)


def variant_loss(
    log_ratios: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, config: Config
) -> torch.Tensor:
    """Minus the weighted value of each example, (B,). For sigmoid it is kto.kto_loss.

    But it does not detach kl (B,).
    """
    gains = config.beta * torch.where(desirable, log_ratios - kl, kl - log_ratios)
    weights = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return -weights * value_of(gains, config.value)


def train(config: Config) -> None:
    """Train --model on --data into --out. See train of kto.py, which this follows."""
    run = common.start_run(config)
    if run.world_size > 1:
        raise common.UserError("kto_variants: is for one process")
    records, test_records = common.load_records(run, kto.FORMATS)
    train_set = kto.make_examples(records, config)
    test_set = kto.make_examples(test_records, config)
    run.check_examples(train_set, test_set)
    schedule = make_schedule(train_set, config)
    run.check_run(train_set, test_set, schedule)
    if run.is_finished():
        return

    policy = common.load_policy(run)
    common.check_model_and_choose_layout(policy, [train_set, test_set], run)
    run.claim_folder()
    used = sorted(set(itertools.chain.from_iterable(schedule)))
    common.add_reference_logps(policy, train_set, used, "train", run)
    common.add_reference_logps(policy, test_set, range(len(test_set)), "test", run)
    optimizer = common.make_optimizer(policy, config)

    steps_done = run.load_checkpoint(policy, optimizer)
    if steps_done == 0:
        run.log(0, kto.evaluate(None, test_set, config, run))
    run.save_on_signals()
    for step in range(steps_done + 1, len(schedule) + 1):
        start_time = time.perf_counter()
        batch = schedule[step - 1]
        num_completion_tokens = train_set.num_completion_tokens(batch)
        micro_batches = common.make_micro_batches(train_set, batch, run)
        if len(micro_batches) > 1:
            raise common.UserError(
                f"--micro_batch_tokens {config.micro_batch_tokens}: is too small for a batch; the "
                "gradient of the reference point needs all of its examples at once"
            )
        (micro_batch,) = micro_batches
        policy_logps = micro_batch.sum_completions(policy(micro_batch))  # (B,)
        reference_logps = micro_batch.sum_completions(micro_batch.reference_logps)  # (B,)
        # Back to the order of the batch, which is not that of the micro-batch.
        order = micro_batch.places.argsort()
        log_ratios = (policy_logps - reference_logps)[order]  # (B,)
        desirable = kto.labels_of(train_set, batch, run)  # (B,)

        if config.kl == "other_half":
            groups = find_groups(desirable, config.group_size)
            kl = reference_points(log_ratios, desirable, groups)  # (B,)
        else:
            kl = kto.estimate_kl(policy, train_set, batch, config, run)  # (B,)
        if not config.attached:
            kl = kl.detach()
        losses = variant_loss(log_ratios, desirable, kl, config)  # (B,)
        losses.mean().backward()

        losses = losses.detach()
        log_ratios = log_ratios.detach()
        kl = kl.detach()
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = kto.summarize(losses, log_ratios, kl, desirable, config)
        metrics["lr"] = lr
        metrics["grad_norm"] = grad_norm
        metrics.update(run.speed_metrics(num_completion_tokens, start_time))
        if step == 1:
            common.check_first_step(log_ratios, num_completion_tokens, run)
        if step == len(schedule) or (config.eval_every and step % config.eval_every == 0):
            metrics.update(kto.evaluate(policy, test_set, config, run))
        run.log(step, metrics)
        run.save_if_due(step, policy, optimizer)
    run.export(policy)


if __name__ == "__main__":
    common.run_script(train, Config, __doc__)
