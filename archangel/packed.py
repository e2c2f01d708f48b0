"""The packed layout of a micro-batch: the same numbers as common.PaddedLayout, faster.

Training works without this file. A packed sequence holds all examples of a micro-batch end to end,
each prompt once and without padding:

    x  y_w  y_l  x'  y_w'  y_l'  ...

A token attends to the prompt of its example and to the earlier tokens of its own completion. It
attends to no other completion and to no other example. Positions in a completion continue from the
end of its prompt. So chosen and rejected share a prompt in DPO and SLiC, where they are one
example; in KTO and PPO they are two, and share it in the reference pass only. That the numbers are
the same is tested in tests/test_logps.py, and checked at the start of every run.

On a CPU the attention is computed for one completion after the other, so that no score is computed
only to be masked. On a GPU it is computed by flex attention, with this rule as its block mask.

A model for which this is wrong, for example one with windowed attention, is found by
common.check_model_and_choose_layout, which then falls back to the padded layout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK_SIZE = 128  # flex attention computes or skips whole blocks of 128 queries and 128 keys


class PackedLayout:
    """One sequence for a whole micro-batch. It takes the place of common.PaddedLayout."""

    def num_tokens(self, examples: Sequence) -> int:
        """Tokens of a micro-batch with these examples. A GPU pads it to whole blocks."""
        return sum(sum(segment_lengths(example)) for example in examples)

    def collate(self, examples: Sequence, device: torch.device | str) -> tuple[dict, Tensor]:
        """Arrange examples as one sequence of T tokens.

        Returns:
            inputs: keyword arguments of the model: input_ids and position_ids, (1, T) each, still
                on the CPU; and what the attention functions below need on this device.
            predictors: (N,) positions whose hidden states predict the completion tokens.
        """
        input_ids = []
        position_ids = []
        predictors = [torch.empty(0, dtype=torch.long)]
        end = 0  # of the sequence so far
        for example in examples:
            prompt_length = len(example.prompt_ids)
            input_ids.append(torch.as_tensor(example.prompt_ids, dtype=torch.long))
            position_ids.append(torch.arange(prompt_length))
            end += prompt_length
            last_of_prompt = torch.tensor([end - 1])
            for completion_ids in example.completions_ids:
                length = len(completion_ids)
                input_ids.append(torch.as_tensor(completion_ids, dtype=torch.long))
                position_ids.append(torch.arange(prompt_length, prompt_length + length))
                # The last token of the prompt predicts the first token of the completion; after
                # that, each token predicts the next one.
                predictors.append(last_of_prompt)
                predictors.append(torch.arange(end, end + length - 1))
                end += length

        lengths = [segment_lengths(example) for example in examples]
        padding = padded_length(end, device) - end
        input_ids.append(torch.zeros(padding, dtype=torch.long))
        position_ids.append(torch.zeros(padding, dtype=torch.long))
        inputs = {
            "input_ids": torch.cat(input_ids)[None],
            "position_ids": torch.cat(position_ids)[None],
        }
        if torch.device(device).type == "cpu":
            inputs["segment_lengths"] = lengths
        else:
            inputs["attention_mask"] = make_block_mask(lengths, padding, device)
            inputs["packed"] = True
        return inputs, torch.cat(predictors)


def segment_lengths(example) -> list[int]:
    """Tokens of the prompt, then of each completion."""
    return [len(example.prompt_ids), *map(len, example.completions_ids)]


def padded_length(num_tokens: int, device: torch.device | str) -> int:
    """The length of a packed sequence with this number of tokens.

    On a CPU it has no padding. On a GPU it has whole blocks, at least two: torch would compile a
    kernel of its own for a single block.
    """
    if torch.device(device).type == "cpu":
        return num_tokens
    num_blocks = max(2, -(-num_tokens // BLOCK_SIZE))
    return num_blocks * BLOCK_SIZE


def use_packed_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Let the model compute the attention of packed sequences, and of padded ones as before.

    Raises ValueError if it cannot.
    """
    name = "packed" if device.type == "cpu" else "packed_flex"
    if name == "packed_flex" and not model._supports_flex_attn:
        raise ValueError("the model does not support flex attention")
    if name == "packed_flex":
        # Else torch falls back to dense attention when it has compiled for too many sizes.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # transformers only logs that it refused
        raise ValueError("the model supports no attention but its own")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segment_lengths: list[list[int]] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention in a packed sequence, on a CPU. transformers calls it in every layer.

    Args:
        query, key, value: (1, heads, T, head size); key and value may have fewer heads.
        segment_lengths: from PackedLayout.collate; T in all. None in a padded micro-batch.
    Returns:
        (1, T, heads, head size), and None for the attention weights, which are not computed.
    """
    if segment_lengths is None:
        # transformers makes no mask for a registered attention function, and the padding of a
        # padded micro-batch comes last: so attention_mask is None, and attention plain causal.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    # One part for a prompt with its first completion, and one for each further completion. The
    # tensors are split, not sliced: the gradient of a slice is as large as the whole tensor.
    part_lengths = []
    for prompt_length, *completion_lengths in segment_lengths:
        part_lengths.append(prompt_length + sum(completion_lengths[:1]))
        part_lengths.extend(completion_lengths[1:])
    queries = query.split(part_lengths, dim=2)
    keys = key.split(part_lengths, dim=2)
    values = value.split(part_lengths, dim=2)
    sdpa_options = {"scale": scaling, "enable_gqa": key.shape[1] < query.shape[1]}
    outputs = []
    part = 0
    for prompt_length, *completion_lengths in segment_lengths:
        k = keys[part]
        v = values[part]
        prompt_k = k[:, :, :prompt_length]
        prompt_v = v[:, :, :prompt_length]
        output = F.scaled_dot_product_attention(queries[part], k, v, is_causal=True, **sdpa_options)
        outputs.append(output.transpose(1, 2))
        part += 1
        for length in completion_lengths[1:]:
            k = torch.cat([prompt_k, keys[part]], dim=2)
            v = torch.cat([prompt_v, values[part]], dim=2)
            # Query i attends to the whole prompt, and to the completion up to token i.
            mask = torch.ones(length, prompt_length + length, dtype=torch.bool).tril(prompt_length)
            output = F.scaled_dot_product_attention(
                queries[part], k, v, attn_mask=mask, **sdpa_options
            )
            outputs.append(output.transpose(1, 2))
            part += 1
    return torch.cat(outputs, dim=1), None


def packed_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | torch.nn.attention.flex_attention.BlockMask | None",
    packed: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """packed_attention by flex attention, on a GPU. attention_mask: a block mask."""
    if not packed:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Under autocast, rotary embeddings leave query and key in float32. Flex attention wants one
    # dtype, and is slow in float32.
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("packed_flex", packed_flex_attention)


def make_block_mask(
    lengths: list[list[int]], padding: int, device: torch.device | str
) -> "torch.nn.attention.flex_attention.BlockMask":
    """Which keys each query of a packed sequence attends to, as flex attention takes it.

    It evaluates the rule for all T x T pairs of a query and a key.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second to import

    example_numbers = []  # of each token's example; -1 for padding
    segment_numbers = []  # 0 in the prompt, k in its k-th completion
    for example_number, segments in enumerate(lengths):
        for segment_number, length in enumerate(segments):
            example_numbers += [example_number] * length
            segment_numbers += [segment_number] * length
    example_numbers += [-1] * padding
    segment_numbers += [0] * padding
    example_of = torch.tensor(example_numbers, device=device)  # (T,)
    segment_of = torch.tensor(segment_numbers, device=device)  # (T,)

    # The rule uses tensors only. A Python number in it would be compiled in, once for each value.
    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_example = example_of[key] == example_of[query]
        prompt_or_own = (segment_of[key] == 0) | (segment_of[key] == segment_of[query])
        return (key <= query) & same_example & prompt_or_own

    num_tokens = len(example_numbers)
    return create_block_mask(may_attend, None, None, num_tokens, num_tokens, device=device)
