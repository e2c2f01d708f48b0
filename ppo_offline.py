"""Offline, one-step Proximal Policy Optimization (PPO): section 3.3 of the report.

Each token y_t of a completion y is an action, in the state of the prompt x and the tokens before
it. The reward is +1 for a desirable and -1 for an undesirable completion, and comes with its last
token. In PPO's ratio, the old policy is never updated: it stays pi_ref. A value head V on the
policy's hidden states, the critic, estimates the return that is to be expected.

    ratio       = pi(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)
    policy loss = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)
    critic loss = 0.5 * (V(x, y_<t) - return)^2
    loss        = policy loss + critic_weight * critic loss
                  averaged over all completion tokens of the global batch

The advantages A and the returns are computed by generalized advantage estimation (GAE). Before the
critic is trained, V is 0, and n tokens before the last one A is the reward times (gamma *
gae_lambda)^n: by default 0.3 times the reward for n = 19, and 0.05 times for n = 49. So the last
tokens of a completion are trained most.

Deviations from the report (Ethayarajh et al., Human-Centered Loss Functions, December 2023, in
github.com/ContextualAI/HALOs with the authors' code):
 1. The report prints the ratio as log(pi / pi_ref), but clips it around 1. Here it is the
    exponential of that, as in PPO and in the authors' code.
 2. The log-ratio is clamped to +-20, so that its exponential is finite.
 3. The report does not say where A comes from. Here, as in the authors' code, it is GAE with a
    learned critic; the critic is another one: a linear layer, which begins at zero and learns GAE's
    returns. (Theirs has three layers, and learns the reward that comes after a token.)
 4. The critic's gradient stops at the value head, so it does not reach the policy's weights. Policy
    and critic interact only through the clipping of the gradient's norm.
 5. Advantages are not whitened, as they are in the authors' code: the loss would depend on how the
    batch is divided.
 6. There is no penalty on the KL divergence. The report has none, the authors' code has.
 7. The report has no value for epsilon. The ratio is clipped to 1 +- 0.5; the authors' code clips
    it to [0.5, 2], between 0.5 and its inverse.
 8. Where the data has more of one class, the other class repeats, so that every batch is balanced.

    python ppo_offline.py --model toy --data toy --lr 3e-5 --warmup_steps 10 --out runs/ppo
    torchrun --nproc_per_node=8 ppo_offline.py --model pythia-1.4b
"""

import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal

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
    out: str = "runs/ppo_offline"  # folder for the model, metrics.jsonl, run.json and checkpoints
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
    # PPO's own
    epsilon: float = 0.5  # the ratio is clipped to 1 +- epsilon; the report has no value
    gamma: float = 0.99  # discount of the reward per token (HALOs)
    gae_lambda: float = 0.95  # GAE: 0 has the least variance, 1 the least bias (HALOs)
    critic_weight: float = 0.01  # weight of the critic's loss (HALOs)

    def __post_init__(self):
        common.check_settings(self, positive=("epsilon", "gamma"))
        for name in ("epsilon", "gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise common.UserError(f"--{name} {getattr(self, name)}: must be at most 1")
        if self.batch_size % 2:
            raise common.UserError(
                f"--batch_size {self.batch_size}: must be even, half of it for each class"
            )


# --------------------------------------------------------------------------------------- the loss


def ppo_offline_loss(
    policy_token_logps: torch.Tensor,
    reference_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float = 0.5,
) -> torch.Tensor:
    """PPO's clipped loss of each completion token, section 3.3.

    Args:
        policy_token_logps, reference_token_logps: (B, T) log-probabilities of tokens, in nats.
        advantages: (B, T). They are detached here, and not whitened.
        mask: (B, T) bool, True for a token, False for padding.
        epsilon: the ratio is clipped to 1 - epsilon, 1 + epsilon; in (0, 1].
    Returns:
        (B, T) losses, 0 in the padding; minus the advantage where policy and reference agree.

    >>> logps, mask = torch.tensor([[0.0, 2.0, 2.0]]), torch.ones(1, 3).bool()
    >>> advantages = torch.tensor([[1.0, 1.0, -1.0]])
    >>> ppo_offline_loss(logps, 0 * logps, advantages, mask)  # -1, -1.5 by the clip, +exp(2)
    tensor([[-1.0000, -1.5000,  7.3891]])
    """
    mask = mask.bool()
    dtype = torch.promote_types(policy_token_logps.dtype, torch.float32)  # at least float32
    log_ratio = policy_token_logps.to(dtype) - reference_token_logps.to(dtype)  # (B, T)
    # The padding is set to 0 first, whatever it holds: 0 * nan would be nan in the backward pass.
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    advantages = advantages.detach().to(dtype)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    return torch.where(mask, loss, 0.0)


def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by generalized advantage estimation (arXiv 1506.02438).

    Args:
        values: (B, T) the critic's values of the state before each token. They are detached here.
        rewards: (B,) of whole completions. They come with the last token.
        mask: (B, T) bool, True for a token; padding comes after all tokens of a completion.
    Returns:
        advantages and returns, (B, T) each, 0 in the padding.

    >>> gae(torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2).bool(), gamma=0.5, gae_lambda=1.0)
    (tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
    """
    mask = mask.bool()
    dtype = torch.promote_types(values.dtype, torch.float32)  # at least float32
    values = torch.where(mask, values.detach(), 0.0).to(dtype)  # (B, T)
    after_last = torch.zeros_like(mask[:, :1])  # (B, 1): no token, and so a value of 0
    is_last = mask & ~torch.cat([mask[:, 1:], after_last], dim=1)  # (B, T)
    next_values = torch.cat([values[:, 1:], after_last.to(dtype)], dim=1)  # (B, T)
    token_rewards = torch.where(is_last, rewards.to(dtype)[:, None], 0.0)  # (B, T)
    # The temporal-difference errors, 0 for a perfect critic.
    td_errors = token_rewards + gamma * next_values - values  # (B, T)

    # A_t = sum over s >= t of (gamma * gae_lambda)^(s - t) * td_errors_s. This is a product with a
    # triangular matrix.
    tokens = torch.arange(values.shape[1], device=values.device)
    distance = tokens[:, None] - tokens  # (T, T): s - t
    decay = (gamma * gae_lambda) ** distance.clamp(min=0).to(dtype)  # (T, T)
    advantages = td_errors @ decay.tril()  # tril: 0 where s < t
    return advantages, advantages + values


def rlhf_value(reward_chosen: torch.Tensor, reward_rejected: torch.Tensor) -> torch.Tensor:
    """RLHF's value of a reward compared with the rejected one's, section 4: sigmoid(difference).

    It is also the probability of a preference, equation (1). For Figure 4; training does not use
    it.
    """
    return torch.sigmoid(reward_chosen - reward_rejected)  # (1)


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
    return examples


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


class PolicyWithValues(common.Policy):
    """The policy with a value head: a linear layer on the hidden states that predict tokens.

    Checkpoints include the value head, the exported model does not.
    """

    def __init__(self, lm: torch.nn.Module, bfloat16: bool):
        super().__init__(lm, bfloat16)
        hidden_size = lm.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(hidden_size, 1, dtype=lm.dtype, device=lm.device)

    def reset_value_head(self) -> None:
        """Set its weights to 0, so that all values are 0 before training.

        To be called after common.load_policy, since sharding discards earlier values.
        """
        for parameter in self.value_head.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(
        self, micro_batch: common.MicroBatch, from_logits: bool = False, with_values: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (N,) of every completion token; with_values, also V (N,) before it."""
        if not with_values:
            return super().forward(micro_batch, from_logits)
        device_type = micro_batch.targets.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bfloat16):
            logps, hidden = common.completion_logps(self.lm, micro_batch, return_hidden=True)
            # Detached: the critic's gradient stops here, and does not reach the policy.
            values = self.value_head(hidden.detach()).squeeze(1)
        return logps, values.to(logps.dtype)


def labels_of(examples: common.Examples, batch: list[int], run: common.Run) -> torch.Tensor:
    """Whether each example of a global batch is desirable, (B,) bool."""
    return torch.tensor([examples.desirable[index] for index in batch], device=run.device)


def compute_losses(
    policy_token_logps: torch.Tensor,
    values: torch.Tensor,
    micro_batch: common.MicroBatch,
    desirable: torch.Tensor,
    config: Config,
) -> dict[str, torch.Tensor]:
    """The losses of a micro-batch, and what its metrics need.

    T is the number of tokens of the longest completion.

    Args:
        policy_token_logps, values: (N,) of all completion tokens.
        desirable: (b,) bool.
    Returns:
        (b,) sums over the tokens of each completion. "loss" is for the backward pass; without
        gradient: "critic_loss", "log_ratio", and "num_clipped", the number of tokens whose ratio is
        outside of the clipping interval.
    """
    mask = micro_batch.completion_mask  # (b, T)
    policy_logps = micro_batch.pad_completions(policy_token_logps)  # (b, T)
    reference_logps = micro_batch.pad_completions(micro_batch.reference_logps)  # (b, T)
    values = micro_batch.pad_completions(values)  # (b, T)
    rewards = torch.where(desirable, 1.0, -1.0)  # (b,)
    advantages, returns = gae(values, rewards, mask, config.gamma, config.gae_lambda)  # (b, T)
    policy_loss = ppo_offline_loss(policy_logps, reference_logps, advantages, mask, config.epsilon)
    critic_loss = 0.5 * (values - returns) ** 2  # (b, T), 0 in the padding
    loss = policy_loss + config.critic_weight * critic_loss  # (b, T)

    log_ratio = (policy_logps - reference_logps).detach()  # (b, T), 0 in the padding
    is_clipped = (log_ratio.clamp(-20, 20).exp() - 1).abs() > config.epsilon  # (b, T)
    return {
        "loss": loss.sum(dim=1),
        "critic_loss": critic_loss.detach().sum(dim=1),
        "log_ratio": log_ratio.sum(dim=1),
        "num_clipped": is_clipped.sum(dim=1).to(log_ratio.dtype),
    }


def gather_sums(
    micro_sums: list[dict[str, torch.Tensor]],
    micro_batches: list[common.MicroBatch],
    num_examples: int,
) -> dict[str, torch.Tensor]:
    """The sums (B,) of a global batch, from those (b,) of this process's micro-batches."""
    sums = {}
    for name in micro_sums[0]:
        values = [sums_of_one[name] for sums_of_one in micro_sums]
        sums[name] = common.gather_batch(values, micro_batches, num_examples)
    return sums


def summarize(
    sums: dict[str, torch.Tensor], desirable: torch.Tensor, num_completion_tokens: int
) -> dict[str, float]:
    """The metrics of a global batch, from the sums (B,) of compute_losses: means over its tokens.

    log_ratio_margin is one of completions: the mean log-ratio of the desirable ones, minus that of
    the undesirable ones. It is nan for data without one of these classes.
    """
    log_ratio = sums["log_ratio"]
    log_ratio_margin = log_ratio[desirable].mean() - log_ratio[~desirable].mean()
    return {
        "loss": sums["loss"].sum().item() / num_completion_tokens,
        "critic_loss": sums["critic_loss"].sum().item() / num_completion_tokens,
        "clipped": sums["num_clipped"].sum().item() / num_completion_tokens,
        "log_ratio_margin": log_ratio_margin.item(),
    }


@torch.no_grad()
def evaluate(
    policy: PolicyWithValues, examples: common.Examples, config: Config, run: common.Run
) -> dict[str, float]:
    """The metrics on held-out examples, a batch of consecutive ones at a time."""
    sums_of_batches = []
    for start in common.progress(range(0, len(examples), config.batch_size), "evaluate"):
        batch = list(range(start, min(start + config.batch_size, len(examples))))
        desirable = labels_of(examples, batch, run)  # (B,)
        micro_batches = common.make_micro_batches(examples, batch, run)
        micro_sums = []
        for micro_batch in micro_batches:
            token_logps, values = policy(micro_batch, with_values=True)  # (N,) each
            micro_desirable = desirable[micro_batch.places]  # (b,)
            micro_sums.append(
                compute_losses(token_logps, values, micro_batch, micro_desirable, config)
            )
        sums_of_batches.append(gather_sums(micro_sums, micro_batches, len(batch)))
    if not sums_of_batches:
        return {}
    sums = {}  # of all held-out examples
    for name in sums_of_batches[0]:
        sums[name] = torch.cat([sums_of_one[name] for sums_of_one in sums_of_batches])
    all_indices = list(range(len(examples)))
    desirable = labels_of(examples, all_indices, run)
    metrics = summarize(sums, desirable, examples.num_completion_tokens(all_indices))
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

    policy = common.load_policy(run, PolicyWithValues)
    policy.reset_value_head()
    common.check_model_and_choose_layout(policy, [train_set, test_set], run)
    run.claim_folder()  # nothing is written to --out before this line
    used = sorted(set(itertools.chain.from_iterable(schedule)))
    common.add_reference_logps(policy, train_set, used, "train", run)
    common.add_reference_logps(policy, test_set, range(len(test_set)), "test", run)
    optimizer = common.make_optimizer(policy, config)

    # Until here the policy is the reference model, also when a run is resumed.
    steps_done = run.load_checkpoint(policy, optimizer)
    if steps_done == 0:
        run.log(0, evaluate(policy, test_set, config, run))
    run.save_on_signals()
    for step in range(steps_done + 1, len(schedule) + 1):
        start_time = time.perf_counter()
        batch = schedule[step - 1]  # the global batch, B examples
        num_completion_tokens = train_set.num_completion_tokens(batch)
        desirable = labels_of(train_set, batch, run)  # (B,)
        micro_batches = common.make_micro_batches(train_set, batch, run)
        micro_sums = []
        for micro_batch in micro_batches:
            token_logps, values = policy(micro_batch, with_values=True)  # (N,) each
            micro_desirable = desirable[micro_batch.places]  # (b,)
            sums = compute_losses(token_logps, values, micro_batch, micro_desirable, config)
            # The gradient of the mean over the global batch is a sum over micro-batches and
            # processes. FSDP takes the mean over processes, hence world_size (which is 1 without
            # FSDP, in one process).
            (sums["loss"].sum() / num_completion_tokens * run.world_size).backward()
            sums["loss"] = sums["loss"].detach()  # frees the memory of the backward pass
            micro_sums.append(sums)

        sums = gather_sums(micro_sums, micro_batches, len(batch))  # (B,) each
        losses = sums["loss"]
        log_ratios = sums["log_ratio"]
        grad_norm = common.clip_gradient(policy, config.max_grad_norm)
        common.check_finite(losses, grad_norm, batch, step)
        lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        metrics = summarize(sums, desirable, num_completion_tokens)
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
