"""What the five trainers share: no loss, no setting of a loss, no training loop.

In the order of this file:
    make_batch, completion_logps      token ids to the log-probability of every completion token
    micro_batches, gather             a global batch in pieces, their figures together again
    load_policy, self_check           the model, sharded over the processes, and whether it is right
    add_reference_logps               the log-probabilities that training starts from
    make_optimizer, clip_gradient     the rest of a step

What is not about training, or only makes it faster, lives in archangel/ and is imported here, so
that a script needs this module alone: the command line (command.py), rows to token ids and their
order (rows.py), a run's folder and checkpoints (run.py), packed rows and the head (fast.py).
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
from archangel.fast import Layout, TokenLogps, packed_arguments, row_length, use_packed
from archangel.rows import (
    TOY,
    add_partners,
    completion_tokens,
    endless,
    examples_sha256,
    longest_sequence,
    plan,
    read_data,
    read_rows,
    tokenise,
)
from archangel.run_v1 import MODELS, Run, find_model, load_tokenizer, read_column, write_column

CHUNK = 2**27  # logits at once: 512 MiB of float32; with gradient, what needs more is made twice


# ------------------------------------------------------------------- token ids to log-probabilities


@dataclasses.dataclass
class Batch:
    """Examples laid out for the model: R rows of T tokens; C completions, N tokens in all."""

    indices: Tensor  # (b,) which examples of the global batch these are
    input_ids: Tensor  # (R, T)
    predictors: Tensor  # (N,) places in the flattened (R * T) that predict the tokens below
    targets: Tensor  # (N,) completion tokens, in input order
    mask: Tensor  # (C, longest) bool, the places of `pad` that hold a token
    reference_logps: Tensor  # (N,) log pi_ref of the targets; (0,) where the examples have none
    layout: Layout | None  # packed: of what the one row is made

    def pad(self, values: Tensor) -> Tensor:
        """Values (N,) of the completion tokens as (C, longest), 0 where there is no token."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sum(self, values: Tensor) -> Tensor:
        """Sums (C,) over each completion of values (N,) of its tokens."""
        return self.pad(values).sum(1)


def make_batch(examples, device="cpu", pad_id=0, packed=False, indices=None, after=None) -> Batch:
    """Lay out examples {"prompt_ids", "completions_ids"}, each completion behind its prompt.

    Each in a row of its own; or packed, all in one row without padding and each prompt once,
    x y_w y_l x' y' ..., for a model that is told so by `use_packed`. No examples: one row of
    padding, so that a process with nothing to do still takes part.

    indices: the examples' places in the global batch, else 0, 1, ... after (packed only): a batch
    of the same prompts, which the model is to see between now and this one. It will keep their keys
    and values, so that here only a prompt's last token, which predicts, is computed once more.
    """
    rows = []  # (prompt, the completions behind it)
    for example in examples:
        prompt, ids = example["prompt_ids"], example["completions_ids"]
        if packed and after:
            prompt = prompt[-1:]
        rows += [(prompt, group) for group in ([ids] if packed else zip(ids))]
    rows = rows or [([pad_id], [])]
    lengths = [[len(prompt), *map(len, group)] for prompt, group in rows]
    sizes = [sum(row) for row in lengths]
    shape, starts = (len(rows), max(sizes)), np.arange(len(rows)) * max(sizes)
    if packed:
        shape, starts = (1, row_length(sum(sizes), device)), np.cumsum([0, *sizes[:-1]])
    input_ids = np.full(shape, pad_id).ravel()  # (R * T)
    predictors, targets = [np.empty(0, dtype=int)], [np.empty(0, dtype=int)]
    for start, (prompt, group) in zip(starts, rows):
        first = end = start + len(prompt)
        input_ids[start:end] = prompt
        for completion in group:
            start, end = end, end + len(completion)
            input_ids[start:end] = completion
            # A token is predicted one place before it, a completion's first by the prompt's last.
            predictors += [[first - 1], np.arange(start, end - 1)]
            targets.append(completion)
    completions = np.array([n for _, *ns in lengths for n in ns], dtype=int)
    reference = [example.get("reference_logps", np.float32([])) for example in examples]
    arrays = {
        "indices": np.array(range(len(examples)) if indices is None else indices, dtype=int),
        "input_ids": input_ids.reshape(shape),
        "predictors": np.concatenate(predictors),
        "targets": np.concatenate(targets),
        "mask": np.arange(completions.max(initial=0)) < completions[:, None],
        "reference_logps": np.concatenate([np.float32([]), *reference]),
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return Batch(**tensors, layout=Layout(lengths, after and after.layout) if packed else None)


def completion_logps(model: nn.Module, batch: Batch, return_hidden=False) -> Tensor | tuple:
    """Log-probability (N,) of every completion token, in nats, at least float32, in input order.

    The output head runs on the hidden states that predict completion tokens and on nothing else,
    in chunks. With return_hidden, also these states (N, H). To check it by a plain forward pass:

        prompt, completion = [5, 6, 7], [8, 9]
        example = {"prompt_ids": prompt, "completions_ids": [completion]}
        ours = completion_logps(model, make_batch([example]))
        logits = model(torch.tensor([prompt + completion])).logits[0, 2:4]
        plain = logits.log_softmax(-1)[[0, 1], completion]  # equal to rounding
    """
    # A row of its own is plain causal text: the model's defaults serve. Padding comes last, where
    # nothing looks.
    ids = batch.input_ids
    others = packed_arguments(model, batch.layout, ids) if batch.layout else {}
    hidden = model.base_model(input_ids=ids, use_cache=False, **others)
    hidden = hidden.last_hidden_state.flatten(0, 1)[batch.predictors]  # (N, H)
    gradient = torch.is_grad_enabled()
    # Without gradient nothing is computed again, so that small chunks are as fast.
    size = (CHUNK if gradient else CHUNK // 8) // model.get_output_embeddings().weight.shape[0]
    chunks = list(zip(*(values.split(max(1, size)) for values in (hidden, batch.targets))))
    if len(chunks) > 1 and gradient:  # recompute logits (size, V), keep none
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
    return TokenLogps.apply(logits, targets)[0]  # as -F.cross_entropy


class Policy(nn.Module):
    """The language model as the trainers call it, with PPO's value head where there is one."""

    def __init__(self, lm: nn.Module, value_head: nn.Module | None, bfloat16: bool):
        super().__init__()
        self.lm, self.value_head, self.bfloat16 = lm, value_head, bfloat16

    def forward(self, batch: Batch, with_values=False, plain=False) -> Tensor | tuple:
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


def micro_batch(examples: Sequence[dict], indices: list[int], run: Run, after=None) -> Batch:
    """The examples of a global batch that have these indices; after: as in `make_batch`."""
    chosen, pad_id = [examples[i] for i in indices], run.tokenizer.eos_token_id
    return make_batch(chosen, run.device, pad_id, run.packed, indices, after)


def micro_batches(examples: Sequence[dict], run: Run) -> list[Batch]:
    """This process's share of a global batch, in pieces of at most --micro_batch_tokens."""
    share = plan(examples, run.config.micro_batch_tokens, run.world_size, run.packed)[run.rank]
    return [micro_batch(examples, piece, run) for piece in share]


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
    # Autocast casts what needs it; FSDP's cast would rebuild containers among a block's inputs.
    precision = MixedPrecisionPolicy(compute, run.dtype, cast_forward_inputs=False)
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


def self_check(policy: Policy, examples: Sequence[dict], run: Run) -> None:
    """Compare the log-probabilities of the longest sequence with the model's own forward pass.

    Sets run.packed: where packed rows are wrong for the architecture, rows stay apart. Raises
    UserError where the output head is not what `_head_logps` takes it for, and where on several
    processes a pass over packed rows breaks off.
    """
    longest, other = max(examples, key=longest_sequence), examples[0]
    replies, short = longest["completions_ids"], [ids[:16] for ids in other["completions_ids"]]
    two = [  # a short sibling and a short other example show whether anybody sees what they may not
        {"prompt_ids": longest["prompt_ids"], "completions_ids": [*replies, replies[-1][-16:]]},
        {"prompt_ids": other["prompt_ids"][:16], "completions_ids": short},
    ]
    alone = [row | {"completions_ids": [ids]} for row in two for ids in row["completions_ids"]]
    apart = make_batch(two, run.device)
    with torch.no_grad():
        # One sequence at a time: all logits of several could fill the memory.
        plain = torch.cat([policy(make_batch([row], run.device), plain=True) for row in alone])
        ours = policy(apart)
    error = (ours - plain).abs().mean()  # nats a token
    if not error < (3e-2 if run.bfloat16 else 1e-4):
        raise UserError(
            f"--model {run.model_path}: its log-probabilities differ by {error:.2g} nats a token "
            "from its own forward pass: a scaling of its logits that is not known here"
        )
    own_attention, reason = policy.lm.config._attn_implementation, "its numbers differ"
    try:
        use_packed(policy.lm, run.device)
        packed = make_batch(two, run.device, packed=True)
        after = make_batch(two, run.device, packed=True, after=packed)
        ours = policy(packed)
        ours.sum().backward()  # on a GPU compiled by itself: that, too, could fail
        with torch.no_grad():  # after the same prompts, these completions are as likely
            errors = torch.maximum((ours - plain).abs(), (policy(after) - plain).abs())
        # The worst four tokens in a row: a completion may wrongly see its sibling in its first few,
        # or pass an attention window in its last, and over all its tokens either would drown.
        worst = F.avg_pool1d(apart.pad(errors), kernel_size=4, stride=1, padding=2).max()
        run.packed = bool(worst < (0.2 if run.bfloat16 else 1e-3))
    except torch.OutOfMemoryError:
        raise
    except Exception as refusal:  # it takes no such attention, or no positions, in its own words
        run.packed, reason = False, str(refusal).strip().partition("\n")[0] or repr(refusal)
        # FSDP does not recover from a pass that broke off, if it came to one.
        if run.world_size > 1 and policy.lm.config._attn_implementation != own_attention:
            raise UserError(f"--model: packed rows fail ({reason}); train in one process") from None
    run.packed = run.all_agree(run.packed)  # processes go through equally many micro-batches
    if not run.packed:
        run.say(f"each completion has a row of its own, which is slower: packed, {reason}")
        policy.lm.set_attn_implementation(own_attention)
    policy.zero_grad()
    run.record |= {"packed_rows": run.packed, "self_check_error": error.item()}  # nats a token


@torch.no_grad()
def add_reference_logps(policy: Policy, examples: list[dict], run: Run) -> None:
    """Give each example reference_logps: log pi_ref of its completion tokens, end to end.

    The reference is the policy before training and never changes, so this is a column, computed
    once and kept in `reference/` beside the run, for every run with the same weights and tokens.
    Neighbours that have their prompt in common, one array, are computed as one example.
    """
    key = examples_sha256(examples, run.record["model_sha256"], str(run.dtype), run.bfloat16)
    path = run.folder.parent / "reference" / f"{key[:32]}.safetensors"
    rows = []
    for example in examples:
        if not rows or rows[-1]["prompt_ids"] is not example["prompt_ids"]:
            rows.append({"prompt_ids": example["prompt_ids"], "completions_ids": []})
        rows[-1]["completions_ids"] += example["completions_ids"]
    starts = np.cumsum([0, *(completion_tokens([row]) for row in rows)])
    column = torch.zeros(int(starts[-1]), dtype=run.dtype)
    kept = read_column(path, len(column)) if run.rank == 0 else None
    column = column if kept is None else kept
    found = torch.tensor(int(kept is not None))
    dist.broadcast(found, 0)
    for first in progress(range(0, 0 if found else len(rows), 1024), "reference"):
        for micro in micro_batches(rows[first : first + 1024], run):
            spans = [range(starts[i], starts[i + 1]) for i in (micro.indices + first).tolist()]
            places = torch.tensor([place for span in spans for place in span], dtype=torch.long)
            column[places] = policy(micro).to(column)
    if not found:
        dist.all_reduce(column)
        if run.rank == 0:
            write_column(path, column)
    dist.broadcast(column, 0)
    ends = np.cumsum([completion_tokens([example]) for example in examples])
    for example, logps in zip(examples, np.split(column.numpy(), ends[:-1])):
        example["reference_logps"] = logps


def make_optimizer(policy: Policy, config) -> torch.optim.Optimizer:
    """RMSprop, as the authors used, or AdamW, as the later paper recommends; no weight decay."""
    # All weights at once, on a GPU: torch's own default there, but not for the shards of FSDP.
    how = {"lr": config.lr, "foreach": next(policy.parameters()).is_cuda}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(policy.parameters(), weight_decay=0.0, **how)
    return torch.optim.RMSprop(policy.parameters(), **how)


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
