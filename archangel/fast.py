"""What makes a step faster and smaller for the same numbers. Read `common.py` first.

**Rows packed end to end**, x y_w y_l x' y' ..., each prompt once and no padding: a token sees its
prompt and what came before it in its own completion, nothing of a sibling, nothing of another row.
On a CPU that is torch's attention, a prompt and completion at a time, so that no score is computed
to be masked; on a GPU transformers' flex attention with this rule as its block mask. Neither knows
attention windows, caps or sinks: `common.self_check` finds out whether a model needs them for the
longest sequence of the data.

**Completions behind prompts that the model has just seen**, KTO's partners: a prompt's keys and
values serve again, so that only the completions are computed.

**The head's cross-entropy in the memory of its logits**, of which torch's takes three times.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # flex attention's: on a GPU, a packed row is padded to a multiple of it


@dataclasses.dataclass
class Layout:
    """What a packed row is made of, for the attention of every layer.

    An object and no dict: FSDP copies the containers among the arguments of a module.
    """

    lengths: list[list[int]]  # of each prompt and the completions behind it (none: an empty batch)
    behind: "Layout | None" = None  # the row, computed before, whose prompts are gone on from here
    kept: dict | None = None  # attention module: its (key, value); None: nothing comes behind

    def keep(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep these for a row behind, if one comes; once, though a block be computed again."""
        if self.kept is not None:
            self.kept.setdefault(module, (key.detach(), value.detach()))

    def take(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """What the row before has kept of this module, and keeps no longer."""
        taken, self.behind.kept[module] = self.behind.kept[module], None
        return taken

    def seen(self) -> list[slice]:
        """For each prompt here, where the rest of it lies in the row that this one is behind."""
        if not self.behind:
            return [slice(0, 0) for _ in self.lengths]
        starts = np.cumsum([0, *map(sum, self.behind.lengths)]).tolist()
        rows = zip(starts, self.behind.lengths, self.lengths)
        return [slice(start, start + whole[0] - end[0]) for start, whole, end in rows]


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

    Without a layout rows are apart and attention is plain causal: a padded prompt, as `generate`
    has, is not masked.
    """
    if layout is None:
        others["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    layout.keep(module, key, value)
    before = layout.take(module) if layout.behind else None
    # Split, not sliced: a slice's gradient is as large as what it was cut from.
    sizes = [n for prompt, *ns in layout.lengths for n in (prompt + sum(ns[:1]), *ns[1:])]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    outputs = []
    for seen, (prompt, *replies) in zip(layout.seen(), layout.lengths):
        keys, values = ([x[:, :, seen]] for x in before) if layout.behind else ([], [])
        q, k, v = next(pieces)  # of the prompt and its first completion
        outputs.append(_causal(q, [*keys, k], [*values, v], scaling))
        keys, values = [*keys, k[:, :, :prompt]], [*values, v[:, :, :prompt]]
        for _ in replies[1:]:
            q, k, v = next(pieces)
            outputs.append(_causal(q, [*keys, k], [*values, v], scaling))
    return torch.cat(outputs, dim=1), None


def _causal(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
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
    """The same on a GPU; for a packed row, attention_mask is its block mask."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    layout.keep(module, key, value)
    if layout.behind:
        key, value = (torch.cat(x, dim=2) for x in zip(layout.take(module), (key, value)))
    return flex_attention_forward(module, query, key, value, attention_mask, **others)


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("packed_flex", packed_flex_attention)


def use_packed(model: PreTrainedModel, device: torch.device) -> None:
    """Let the model attend to packed rows. Raises ValueError where it takes no such attention."""
    model.set_attn_implementation("packed" if device.type == "cpu" else "packed_flex")


def packed_layout(model: PreTrainedModel, layout: Layout, input_ids: Tensor) -> dict:
    """What the forward pass is to be told of a packed row (1, T): position_ids, who sees whom.

    A completion's positions go on from the end of its prompt. Raises ValueError where the model
    does not attend to packed rows.
    """
    if model.config._attn_implementation not in ("packed", "packed_flex"):
        raise ValueError(
            "a packed batch is for a model that was told so: use_packed(model, device)"
        )
    tokens, device = input_ids.shape[1], input_ids.device
    positions, rows, parts = np.zeros(tokens, int), np.full(tokens, -1), np.zeros(tokens, int)
    end, seen = 0, layout.seen()
    for number, row in enumerate(layout.lengths):
        before = seen[number].stop - seen[number].start
        for part, length in enumerate(row):  # part 0 is the prompt
            start, end = end, end + length
            positions[start:end] = np.arange(length) + before + (row[0] if part else 0)
            rows[start:end], parts[start:end] = number, part
    told = {"position_ids": torch.from_numpy(positions).to(device)[None], "layout": layout}
    if model.config._attn_implementation == "packed_flex":
        before = []
        if layout.behind:
            before = np.full(next(iter(layout.behind.kept.values()))[0].shape[2], -2)
            for number, places in enumerate(seen):
                before[places] = number
        owners = (torch.tensor(x, dtype=torch.long, device=device) for x in (rows, parts, before))
        told["attention_mask"] = block_mask(*owners)
    return told


def block_mask(
    rows: Tensor, parts: Tensor, before: Tensor
) -> "torch.nn.attention.flex_attention.BlockMask":
    """The rule for flex attention, from the row (T,) and the part of it (T,) that a token is in.

    before: (K,) the row of each key that lies before these tokens, of a prompt or of nobody. The
    rule is evaluated for all T x (K + T), once a forward pass, and kept by blocks.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second to import

    key_rows, key_parts = torch.cat([before, rows]), torch.cat([torch.zeros_like(before), parts])

    def sees(batch, head, query, key):
        own = (key_parts[key] == 0) | (key_parts[key] == parts[query])
        return (key - len(before) <= query) & (key_rows[key] == rows[query]) & own

    return create_block_mask(sees, None, None, len(rows), len(key_rows), device=rows.device)


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
