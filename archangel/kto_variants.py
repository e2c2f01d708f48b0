"""KTO with other reference points, for the ablations. They are not recommended.

kto.py measures each example against a constant, the mean log-ratio of the other half of the global
batch. The authors' code of December 2023 did two things differently, and this file has both:

    --attached        the gradient also flows through the reference point
    --group_size 4    the reference point is of the other half of 4 examples, 2 of each class, as on
                      a process that computes 4 of a batch's examples

It is the loop of kto.py for one process, and for a batch that fits in one micro-batch. Held-out
metrics are those of kto.py, with the reference point of a whole batch.

    python -m archangel.kto_variants --model toy --data toy --lr 2e-4 --warmup_steps 10 \\
        --attached --out runs/kto_attached
"""

import itertools
import time
from dataclasses import dataclass

import torch

import common
import kto


@dataclass
class Config(kto.Config):
    """The settings of kto.py, and which part of it is exchanged."""

    attached: bool = False  # let the gradient flow through the reference point
    group_size: int = 0  # examples that share a reference point, half of each class; 0: the batch

    def __post_init__(self):
        super().__post_init__()
        if self.group_size > 0 and (self.group_size % 2 or self.batch_size % self.group_size):
            raise common.UserError(
                f"--group_size {self.group_size}: must be even, and divide --batch_size "
                f"{self.batch_size}"
            )
        if self.kl != "other_half":
            raise common.UserError(f"--kl {self.kl}: only other_half has variants here")


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


def attached_kto_loss(
    log_ratios: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, config: Config
) -> torch.Tensor:
    """kto.kto_loss (B,), with the gradient of the reference point kl (B,).

    kto_loss depends on log_ratios - kl alone, and detaches its argument kl. So kl is given in the
    place of the reference model's log-probabilities, which it does not detach.
    """
    weights = (config.desirable_weight, config.undesirable_weight)
    return kto.kto_loss(log_ratios, kl, desirable, 0.0, config.beta, *weights)


def train(config: Config) -> None:
    """Train --model on --data into --out. See train of kto.py, which this follows."""
    run = common.start_run(config)
    if run.world_size > 1:
        raise common.UserError("kto_variants: is for one process")
    records, test_records = common.load_records(run, kto.FORMATS)
    train_set = kto.make_examples(records, config)
    test_set = kto.make_examples(test_records, config)
    run.check_examples(train_set, test_set)
    schedule = kto.make_schedule(train_set, config)
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

        kl = reference_points(log_ratios, desirable, find_groups(desirable, config.group_size))
        if not config.attached:
            kl = kl.detach()
        losses = attached_kto_loss(log_ratios, desirable, kl, config)  # (B,)
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
