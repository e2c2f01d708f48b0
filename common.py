"""What the five trainers share: no loss, no setting of a loss, no training loop.

In the order of a run:
    make_batch, completion_logps      token ids to the log-probability of every completion token
    plan, micro_batches, gather       a global batch in pieces, their figures together again
    load_policy, self_check           the model, sharded over the processes, and whether it is right
    add_reference_logps               the log-probabilities that training starts from
    make_optimizer, clip_gradient     the rest of a step

What is not about training lives in archangel/ and is imported here, so that a script needs this
module alone: the command line (command.py), rows to token ids and their order (rows.py), a run's
folder and checkpoints (run.py).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from archangel.command import Interrupted, UserError, check_settings, exit_status, parse, progress
from archangel.rows import (
    TOY,
    add_partners,
    completion_tokens,
    endless,
    example_tokens,
    examples_sha256,
    longest_sequence,
    read_data,
    read_rows,
    sharing_pays,
    tokenise,
)
from archangel.run import MODELS, Run, find_model, load_tokenizer, read_column, write_column

CHUNK = 2**26  # logits in memory at once: 256 MiB of float32; what needs more is computed twice
ALIKE = 0.8  # on a CPU, how long a micro-batch's shortest example is at least beside its longest


# ------------------------------------------------------------------- token ids to log-probabilities


@dataclasses.dataclass
class Batch:
    """Examples laid out for the model: R rows of T tokens; C completions, N tokens in all."""

    indices: Tensor  # (b,) which examples of the global batch these are
    input_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T) a completion's go on from the end of its prompt
    segments: Tensor  # (R, T) 0 for the prompt and padding, k for the row's k-th completion
    predictors: Tensor  # (N,) places in the flattened (R * T) that predict the tokens below
    targets: Tensor  # (N,) completion tokens, in input order
    mask: Tensor  # (C, longest) bool, the places of `pad` that hold a token
    reference_logps: Tensor  # (N,) log pi_ref of the targets; (0,) where the examples have none

    def pad(self, values: Tensor) -> Tensor:
        """Values (N,) of the completion tokens as (C, longest), 0 where there is no token."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sum(self, values: Tensor) -> Tensor:
        """Sums (C,) over each completion of values (N,) of its tokens."""
        return self.pad(values).sum(1)


def make_batch(examples: list[dict], device="cpu", pad_id=0, shared=True, indices=None) -> Batch:
    """Lay out examples {"prompt_ids", "completions_ids"}, each prompt once: x y_w y_l in one row.

    shared=False: each completion in a row of its own, after its own copy of the prompt. No
    examples: one row of padding, so that a process with nothing to do still takes part.
    """
    rows = []  # (prompt, the completions behind it)
    for example in examples:
        ids = example["completions_ids"]
        rows += [(example["prompt_ids"], group) for group in ([ids] if shared else zip(ids))]
    width = max((len(prompt) + sum(map(len, group)) for prompt, group in rows), default=1)
    input_ids = np.full((max(len(rows), 1), width), pad_id)
    position_ids, segments = np.zeros_like(input_ids), np.zeros_like(input_ids)
    none = np.empty(0, dtype=int)
    predictors, targets, lengths = [none], [none], [none]
    for r, (prompt, group) in enumerate(rows):
        end = len(prompt)
        input_ids[r, :end], position_ids[r, :end] = prompt, np.arange(end)
        for number, completion in enumerate(group, 1):
            start, end = end, end + len(completion)
            input_ids[r, start:end], segments[r, start:end] = completion, number
            position_ids[r, start:end] = len(prompt) + np.arange(len(completion))
            # A token is predicted one place before it, a completion's first by the prompt's last.
            predictors += [[r * width + len(prompt) - 1], r * width + np.arange(start, end - 1)]
            targets.append(completion)
            lengths.append([len(completion)])
    reference = [example.get("reference_logps", np.float32([])) for example in examples]
    lengths = np.concatenate(lengths)
    arrays = {
        "indices": np.array(range(len(examples)) if indices is None else indices, dtype=int),
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predictors": np.concatenate(predictors),
        "targets": np.concatenate(targets),
        "mask": np.arange(lengths.max(initial=0)) < lengths[:, None],
        "reference_logps": np.concatenate([np.float32([]), *reference]),
    }
    return Batch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def completion_logps(
    model: nn.Module, batch: Batch, return_hidden: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (N,) of every completion token, in nats, at least float32, in input order.

    The output head runs on the hidden states that predict completion tokens and on nothing else,
    in chunks. With return_hidden, also these states (N, H). To check it by a plain forward pass:

        prompt, completion = [5, 6, 7], [8, 9]
        example = {"prompt_ids": prompt, "completions_ids": [completion]}
        ours = completion_logps(model, make_batch([example]))
        logits = model(torch.tensor([prompt + completion])).logits[0, 2:4]
        plain = logits.log_softmax(-1)[[0, 1], completion]  # equal to rounding
    """
    layout = {}  # a row of one completion is plain causal text: the model's own defaults serve
    segments = batch.segments
    if (segments > 1).any():  # a token sees its prompt and what came before it in its completion
        seen = (segments[:, None] == 0) | (segments[:, None] == segments[..., None])
        # Additive, since eager attention misreads a boolean mask; finite, since padding must see
        # something; and finite in bfloat16 too. Padding comes last, where nothing looks.
        lowest = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        mask = mask.masked_fill(~seen.tril(), lowest)[:, None]  # (R, 1, T, T)
        layout = {"attention_mask": mask, "position_ids": batch.position_ids}
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **layout)
    hidden = hidden.last_hidden_state.flatten(0, 1)[batch.predictors]  # (N, H)
    size = max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    chunks = list(zip(hidden.split(size), batch.targets.split(size)))
    if len(chunks) > 1 and torch.is_grad_enabled():  # recompute logits (size, V), keep none
        logps = [checkpoint(_head_logps, model, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        logps = [_head_logps(model, *chunk) for chunk in chunks]
    return (torch.cat(logps), hidden) if return_hidden else torch.cat(logps)


def _head_logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (n, H) and targets (n,) to log-probabilities (n,), by the model's own head."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # (n, V)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


class Policy(nn.Module):
    """The language model as the trainers call it, with PPO's value head where there is one."""

    def __init__(self, lm: nn.Module, value_head: nn.Module | None, bfloat16: bool):
        super().__init__()
        self.lm, self.value_head, self.bfloat16 = lm, value_head, bfloat16

    def forward(
        self, batch: Batch, with_values=False, plain=False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities (N,) of the completion tokens; with_values, also values (N,).

        plain: from all logits of the model's own forward pass, for the self-check.
        """
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            if plain:
                logits = self.lm(batch.input_ids).logits.flatten(0, 1)[batch.predictors]
                return -F.cross_entropy(logits.float(), batch.targets, reduction="none")
            logps, hidden = completion_logps(self.lm, batch, return_hidden=True)
            if not with_values:
                return logps
            # Detached: the critic reads the policy's states, it does not shape them.
            return logps, self.value_head(hidden.detach()).squeeze(-1).to(logps.dtype)


# ------------------------------------------------------------------------- a global batch in pieces


def plan(sizes: Sequence[int], limit: int, processes: int, alike=0.0) -> list[list[list[int]]]:
    """For each process its micro-batches, lists of example numbers: as many for every process.

    sizes: tokens of each example. Like lengths go together, none below `alike` of the longest; the
    number of examples times the longest stays within limit, unless one alone exceeds it. Who has
    fewer gets empty ones.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    shares = []
    for process in range(processes):
        pieces = []
        for i in order[process::processes]:
            longest = sizes[pieces[-1][0]] if pieces else sizes[i]
            full = not pieces or (len(pieces[-1]) + 1) * longest > limit
            if full or sizes[i] < alike * longest:
                pieces.append([])
            pieces[-1].append(i)
        shares.append(pieces)
    most = max(map(len, shares))
    return [pieces + [[]] * (most - len(pieces)) for pieces in shares]


def micro_batches(examples: Sequence[dict], run: Run) -> list[Batch]:
    """This process's share of a global batch, in pieces of at most --micro_batch_tokens."""
    sizes = [example_tokens(example, run.shared) for example in examples]
    # Padding costs a CPU as much as tokens do; a GPU would rather have few and large pieces.
    alike = ALIKE if run.device.type == "cpu" else 0.0
    share = plan(sizes, run.config.micro_batch_tokens, run.world_size, alike)[run.rank]
    pad_id = run.tokenizer.eos_token_id
    return [
        make_batch([examples[i] for i in piece], run.device, pad_id, run.shared, piece)
        for piece in share
    ]


def gather(parts: Sequence[tuple[Tensor, dict]], size: int, run: Run) -> dict[str, Tensor]:
    """(indices (b,), {name: (b,)}) of all processes' micro-batches to {name: (size,)}."""
    names = list(parts[0][1])
    values = torch.stack([torch.cat([part[name].detach() for _, part in parts]) for name in names])
    table = values.new_zeros(len(names), size)
    table[:, torch.cat([indices for indices, _ in parts])] = values
    dist.all_reduce(table)
    return dict(zip(names, table))


# --------------------------------------------------------------- the model, the reference, the step


@torch.no_grad()
def load_policy(run: Run, value_head: bool = False) -> Policy:
    """The policy: weights read once, by process 0, and sharded where there are more processes.

    Weights are float32, since at 5e-7 a bfloat16 weight does not move; compute as --dtype says.
    """
    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(run.model_path)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    # sdpa ignores a cap on attention's logits; otherwise the model's own choice.
    how = {"dtype": run.dtype, "attn_implementation": "eager" if capped else None}

    def build(lm):
        """The policy around a language model, its critic, if any, at 0."""
        width, head = lm.get_output_embeddings().weight.shape[1], None
        if value_head:
            head = nn.Linear(width, 1, dtype=run.dtype)
            for parameter in head.parameters():  # nothing random
                nn.init.zeros_(parameter)
        return Policy(lm, head, run.bfloat16).eval()  # eval: no dropout

    source = None
    if run.rank == 0:
        arguments = {"use_safetensors": True, "output_loading_info": True, **how}
        lm, info = AutoModelForCausalLM.from_pretrained(run.model_path, **arguments)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError(f"--model {run.model_path}: its weights lack {missing}")
        policy = source = build(lm)
    if run.world_size > 1:
        with torch.device("meta"):
            policy = build(AutoModelForCausalLM.from_config(config, **how))
        if source:
            policy.lm.generation_config = source.lm.generation_config
    names = policy.lm._no_split_modules or ()
    blocks = [module for module in policy.modules() if type(module).__name__ in names]
    if run.config.activation_checkpointing:
        checkpoint_wrapper.apply_activation_checkpointing(policy, check_fn=blocks.__contains__)
    if run.world_size == 1:  # sharding would cost 40% of the speed for the same bits
        return policy.to(run.device)
    compute = torch.bfloat16 if run.bfloat16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=run.dtype)
    # The root too, even after a pass without gradient: optimizer and checkpoints look at it.
    for module in (*blocks, policy):
        fully_shard(module, mp_policy=precision, reshard_after_forward=True)
    policy.to_empty(device=run.device)
    originals = source.parameters() if source else itertools.repeat(None)
    # One tensor at a time, its original freed: the processes together never hold the model twice.
    for parameter, original in zip(policy.parameters(), originals):
        whole = original.data if source else torch.empty(parameter.shape, dtype=run.dtype)
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shard.to_local())
        if source:
            original.data = torch.empty(0)
    for name, buffer in policy.named_buffers():  # not all are in a state dict: rotary frequencies
        if source:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)
    return policy


@torch.no_grad()
def self_check(policy: Policy, examples: Sequence[dict], run: Run) -> None:
    """Compare the log-probabilities of the longest sequence with the model's own forward pass.

    Where shared prompts are wrong for the architecture or do not pay, completions get rows of their
    own. Raises UserError where the output head is not what `_head_logps` takes it for.
    """
    longest = [max(examples, key=longest_sequence)]
    apart = make_batch(longest, run.device, shared=False)
    plain, ours = policy(apart, plain=True), policy(apart)
    error = (ours - plain).abs().mean()  # nats a token
    if not error < (3e-2 if run.bfloat16 else 1e-4):
        raise UserError(
            f"--model {run.model_path}: its log-probabilities differ by {error:.2g} nats a token "
            "from its own forward pass: a scaling of its logits that is not known here"
        )
    try:
        # The worst four tokens in a row: a completion may wrongly see its sibling in its first few,
        # or pass an attention window in its last, and over all its tokens either would drown.
        shared = policy(make_batch(longest, run.device))
        errors = F.pad(apart.pad((shared - plain).abs()), (0, 3))  # (C, T + 3)
        worst = F.avg_pool1d(errors, kernel_size=4, stride=1).max()
        hidden_size = policy.lm.config.get_text_config().hidden_size
        right = bool(worst < (0.2 if run.bfloat16 else 1e-3))
        run.shared = right and sharing_pays(examples, hidden_size)
    except (RuntimeError, TypeError, ValueError):  # takes no such mask, or no positions
        run.shared = False
    run.record["shared_prompts"] = run.shared


@torch.no_grad()
def add_reference_logps(policy: Policy, examples: list[dict], run: Run) -> None:
    """Give each example reference_logps: log pi_ref of its completion tokens, end to end.

    The reference is the policy before training and never changes, so this is a column, computed
    once and kept in `reference/` beside the run, for every run with the same weights and tokens.
    """
    key = examples_sha256(examples, run.record["model_sha256"], str(run.dtype), run.bfloat16)
    path = run.folder.parent / "reference" / f"{key[:32]}.safetensors"
    counts = [completion_tokens([example]) for example in examples]
    starts = np.cumsum([0, *counts])
    column = torch.zeros(int(starts[-1]), dtype=run.dtype)
    kept = read_column(path, len(column)) if run.rank == 0 else None
    column = column if kept is None else kept
    found = torch.tensor(int(kept is not None))
    dist.broadcast(found, 0)
    for first in progress(range(0, 0 if found else len(examples), 1024), "reference"):
        for micro in micro_batches(examples[first : first + 1024], run):
            spans = [range(starts[i], starts[i + 1]) for i in (micro.indices + first).tolist()]
            places = torch.tensor([place for span in spans for place in span], dtype=torch.long)
            column[places] = policy(micro).to(column)
    if not found:
        dist.all_reduce(column)
        if run.rank == 0:
            write_column(path, column)
    dist.broadcast(column, 0)
    for example, start, count in zip(examples, starts, counts):
        example["reference_logps"] = column[start : start + count].numpy()


def make_optimizer(policy: Policy, config) -> torch.optim.Optimizer:
    """RMSprop, as the authors used, or AdamW, as the later paper recommends; no weight decay."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    return torch.optim.RMSprop(policy.parameters(), lr=config.lr)


def clip_gradient(
    policy: Policy, batch: Sequence[dict], figures: dict[str, Tensor], run: Run, step: int
) -> float:
    """Scale the gradient to at most --max_grad_norm. Returns its norm before, as a number.

    figures: (B,) each, of the global batch. Raises FloatingPointError if a loss, or the norm, is
    not finite, before a step is taken.
    """
    norm = nn.utils.clip_grad_norm_(policy.parameters(), run.config.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not (math.isfinite(norm) and figures["loss"].isfinite().all()):
        run.refuse_step(step, norm, batch, figures)
    return norm
