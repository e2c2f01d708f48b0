"""What makes a step faster and smaller for the same numbers. Read `common.py` first.

**Packed rows**, x y_w y_l x' y' ...: groups of a prompt and its completions end to end, each prompt
once and no padding. A token sees its prompt and what came before it in its own completion, nothing
of a sibling, nothing of another group. On a CPU that is torch's attention, a prompt and completion
at a time, so that no score is computed to be masked; on a GPU transformers' flex attention with
this rule as its block mask. Windows and the like are not in it: `common.self_check` finds out
whether a model needs them for the longest sequence of the data.

**Completions after prompts that the model has just seen**, KTO's partners: a prompt's keys and
values serve again, so that only the completions are computed.

**The head's cross-entropy in the memory of its logits**, of which torch's takes three times.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # flex attention's: it skips whole blocks of so many queries and keys


class Layout:
    """What a packed row is made of, for the attention of every layer.

    No dict and no dataclass: of these FSDP may give each block a copy of its own.
    """

    def __init__(self, lengths: list[list[int]], before: "Layout | None" = None):
        self.lengths = lengths  # tokens, of each group's prompt and completions
        self.before = before  # the row with the rest of these prompts, computed first
        self.kept = None  # {attention module: (key, value), (1, heads, T, d)}; None: keep none
        if before:
            before.kept = {}  # to be filled by its forward pass

    def keep(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep these for a row after this one, if one is to come.

        Activation checkpointing computes them again in the backward pass: then nothing is kept.
        """
        if self.kept is not None:
            self.kept.setdefault(module, (key.detach(), value.detach()))

    def take(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The module's keys and values of the row before, which frees them (see `keep`)."""
        taken, self.before.kept[module] = self.before.kept[module], None
        return taken

    def seen(self) -> list[slice]:
        """For each prompt, the places of its earlier tokens in the row before; none without one."""
        if not self.before:
            return [slice(0, 0) for _ in self.lengths]
        starts = np.cumsum([0, *map(sum, self.before.lengths)]).tolist()
        prompts = zip(starts, self.before.lengths, self.lengths)
        return [slice(at, at + whole[0] - here[0]) for at, whole, here in prompts]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention (1, T, heads, d) of a packed row, from query, key and value (1, heads, T, d).

    Without a layout each row is one text, attention plain causal and attention_mask None, since
    transformers makes none for a registered attention: prompts padded for `generate` would be seen.
    """
    if layout is None:
        others["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    layout.keep(module, key, value)
    before = layout.take(module) if layout.before else None
    # A prompt with its first completion is a piece, each other completion is one. Split, not
    # sliced: a slice's gradient is as large as what it was cut from.
    sizes = [n for prompt, *ns in layout.lengths for n in (prompt + sum(ns[:1]), *ns[1:])]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    outputs = []
    for seen, (prompt, *replies) in zip(layout.seen(), layout.lengths):
        keys, values = ([x[:, :, seen]] for x in before) if layout.before else ([], [])
        q, k, v = next(pieces)
        outputs.append(_causal(q, [*keys, k], [*values, v], scaling))
        keys, values = [*keys, k[:, :, :prompt]], [*values, v[:, :, :prompt]]
        for _ in replies[1:]:
            q, k, v = next(pieces)
            outputs.append(_causal(q, [*keys, k], [*values, v], scaling))
    return torch.cat(outputs, dim=1), None


def _causal(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float | None) -> Tensor:
    """Attention (1, n, heads, d) of the last n tokens of a text to all of it, given in parts."""
    if len(keys) == 1:
        (key,), (value,), mask = keys, values, None
    else:
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    how = {"is_causal": mask is None, "enable_gqa": key.shape[1] < query.shape[1]}
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, **how)
    return output.transpose(1, 2)


def packed_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | torch.nn.attention.flex_attention.BlockMask | None",
    layout: Layout | None = None,
    **others,
) -> tuple[Tensor, Tensor | None]:
    """The same on a GPU, where attention_mask is the packed row's `block_mask`."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    # Rotary positions make them float32 under autocast, which torch's own attention would undo.
    query, key = query.to(value.dtype), key.to(value.dtype)
    layout.keep(module, key, value)
    if layout.before:
        key, value = (torch.cat(x, dim=2) for x in zip(layout.take(module), (key, value)))
    return flex_attention_forward(module, query, key, value, attention_mask, **others)


AttentionInterface.register("packed_v1", packed_attention)
AttentionInterface.register("packed_flex_v1", packed_flex_attention)


def row_length(tokens: int, device: torch.device | str) -> int:
    """How many places a packed row of so many tokens has.

    On a GPU whole blocks, and two at least: flex attention is compiled once for all sizes above 1.
    """
    if torch.device(device).type == "cpu":
        return tokens
    return max(2, -(-tokens // BLOCK)) * BLOCK


def use_packed(model: PreTrainedModel, device: torch.device) -> None:
    """Let the model attend to packed rows. Raises ValueError where it takes no such attention."""
    name = "packed_v1" if device.type == "cpu" else "packed_flex_v1"
    model.set_attn_implementation(name)  # which may say no in the log alone
    if model.config._attn_implementation != name:
        raise ValueError("it takes no attention but its own")


def packed_arguments(model: PreTrainedModel, layout: Layout, input_ids: Tensor) -> dict:
    """What else a model's forward pass takes for a packed row (1, T).

    position_ids (1, T), which in a completion go on from the end of its prompt; the layout; on a
    GPU, the block mask. Raises ValueError where the model does not attend to packed rows.
    """
    if model.config._attn_implementation not in ("packed_v1", "packed_flex_v1"):
        raise ValueError(
            "a packed batch is for a model that was told so: use_packed(model, device)"
        )
    tokens, device = input_ids.shape[1], input_ids.device
    positions, groups, parts = np.zeros(tokens, int), np.full(tokens, -1), np.zeros(tokens, int)
    end, seen = 0, layout.seen()
    for number, group in enumerate(layout.lengths):
        offset = seen[number].stop - seen[number].start
        for part, length in enumerate(group):  # part 0 is the prompt
            start, end = end, end + length
            positions[start:end] = np.arange(length) + offset + (group[0] if part else 0)
            groups[start:end], parts[start:end] = number, part
    found = {"position_ids": torch.from_numpy(positions).to(device)[None], "layout": layout}
    if model.config._attn_implementation == "packed_flex_v1":
        before = np.empty(0)
        if layout.before:
            key, _ = next(iter(layout.before.kept.values()))  # as long in all layers
            before = np.full(key.shape[2], -2)
            for number, places in enumerate(seen):
                before[places] = number
        owners = (torch.from_numpy(x).to(device).long() for x in (groups, parts, before))
        found["attention_mask"] = block_mask(*owners)
    return found


def block_mask(
    groups: Tensor, parts: Tensor, before: Tensor
) -> "torch.nn.attention.flex_attention.BlockMask":
    """Flex attention's mask of a packed row. It asks the rule for all T x (K + T) places.

    Args:
        groups: (T,) the number of each token's group; -1: padding.
        parts: (T,) 0 in the prompt, k in its k-th completion.
        before: (K,) the group of each key of the row before, (0,) without one; -2: of a completion
            or of padding, which nobody here sees.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second to import

    prompt, order = torch.zeros_like(before), torch.arange(len(groups), device=groups.device)
    key_groups, key_parts = torch.cat([before, groups]), torch.cat([prompt, parts])
    key_order = torch.cat([prompt, order])  # all of the row before is earlier than any query

    # It sees tensors of at least two places, and no number: each of another kind is compiled apart.
    def sees(batch, head, query, key):
        prompt_or_own = (key_parts[key] == 0) | (key_parts[key] == parts[query])
        return (key_order[key] <= query) & (key_groups[key] == groups[query]) & prompt_or_own

    return create_block_mask(sees, None, None, len(groups), len(key_groups), device=groups.device)


class TokenLogps(torch.autograd.Function):
    """-F.cross_entropy(logits, targets, reduction="none") that destroys its logits (n, V)."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of targets (n,), and what has become of the logits."""
        wanted, highest = logits.gather(1, targets[:, None]), logits.amax(1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(1, keepdim=True)
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)  # nothing looks at the second result
        ctx.save_for_backward(logits, total, targets)
        return (wanted - highest - total.log()).squeeze(1), logits

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None]:
        """The gradient of logits: of a token 1 at its target, less the softmax."""
        exponentials, total, targets = ctx.saved_tensors
        gradient = gradient[:, None]
        exponentials.mul_(-gradient / total).scatter_add_(1, targets[:, None], gradient)
        return exponentials, None
