"""What makes a step faster and smaller for the same numbers. Read `common.py` first.

**Rows packed end to end**, x y_w y_l x' y' ..., each prompt once and no padding: a token sees its
prompt and what came before it in its own completion, nothing of a sibling, nothing of another row.
On a CPU that is torch's attention, a prompt and completion at a time, so that no score is computed
to be masked; on a GPU transformers' flex attention with this rule as its block mask. Neither knows
attention windows, caps or sinks: `common.self_check` finds out whether a model needs them for the
longest sequence of the data.

**The head's cross-entropy in the memory of its logits**, of which torch's takes three times.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # flex attention's: on a GPU, a packed row is padded to a multiple of it


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lengths: list[list[int]] | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention (1, T, heads, d) of a packed row, from query, key and value (1, heads, T, d).

    lengths: of each prompt and the completions behind it (none in an empty batch). Without them
    rows are apart and attention is plain causal: a padded prompt, as `generate` has, is not masked.
    """
    if lengths is None:
        others["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    how = {"scale": scaling, "enable_gqa": key.shape[1] < query.shape[1]}
    # Split, not sliced: a slice's gradient is as large as what it was cut from.
    sizes = [n for prompt, *replies in lengths for n in (prompt + sum(replies[:1]), *replies[1:])]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)))
    outputs = []
    for prompt, *replies in lengths:
        q, k, v = next(pieces)  # of the prompt and its first completion: plain causal text
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **how))
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for n in replies[1:]:
            q, k, v = next(pieces)
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            seen = torch.ones(n, prompt + n, dtype=torch.bool, device=q.device).tril(prompt)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **how))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def use_packed(model: PreTrainedModel, device: torch.device) -> None:
    """Let the model attend to packed rows. Raises ValueError where it takes no such attention."""
    model.set_attn_implementation("packed" if device.type == "cpu" else "flex_attention")


def packed_layout(model: PreTrainedModel, lengths: list[list[int]], input_ids: Tensor) -> dict:
    """What the forward pass is to be told of a packed row (1, T): position_ids, who sees whom.

    A completion's positions go on from the end of its prompt. Raises ValueError where the model
    does not attend to packed rows.
    """
    if model.config._attn_implementation not in ("packed", "flex_attention"):
        raise ValueError(
            "a packed batch is for a model that was told so: use_packed(model, device)"
        )
    tokens, device = input_ids.shape[1], input_ids.device
    positions, rows, parts = np.zeros(tokens, int), np.full(tokens, -1), np.zeros(tokens, int)
    end = 0
    for number, row in enumerate(lengths):
        for part, length in enumerate(row):  # part 0 is the prompt
            start, end = end, end + length
            positions[start:end] = np.arange(length) + (row[0] if part else 0)
            rows[start:end], parts[start:end] = number, part
    positions, rows, parts = (torch.from_numpy(x).to(device) for x in (positions, rows, parts))
    if model.config._attn_implementation == "packed":
        return {"position_ids": positions[None], "lengths": lengths}
    return {"position_ids": positions[None], "attention_mask": block_mask(rows, parts)}


def block_mask(rows: Tensor, parts: Tensor) -> "torch.nn.attention.flex_attention.BlockMask":
    """The rule for flex attention, from the row (T,) and the part of it (T,) that a token is in.

    It is evaluated for all T x T, once a forward pass, and kept by blocks.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second to import

    def sees(batch, head, query, key):
        own = (parts[key] == 0) | (parts[key] == parts[query])
        return (key <= query) & (rows[key] == rows[query]) & own

    return create_block_mask(sees, None, None, len(rows), len(rows), device=rows.device)


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
