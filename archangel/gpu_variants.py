"""Ideas that may make a training step faster on a GPU. They are not in the trainers.

    python -m archangel.gpu_check --stages variants

times a step with each of them. One that pays becomes part of common.py or archangel/packed.py, if
its lines of code are worth the time. Each is a context manager that changes the trainer for as long
as it lasts, and takes the device. On a CPU each computes the same numbers in a plain way, so that
they can be tested.

    compiled layers       each transformer layer but its attention, by torch.compile; on an H100 it
                          was still compiling after two minutes
    compiled optimizer    the step of RMSprop, by torch.compile
    fused optimizer       AdamW's fused kernel; there is none for RMSprop
    varlen attention      flash attention over segments, in place of flex attention
    bfloat16 head         the output head's product of bfloat16 matrices, with a float32 result
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import common
from archangel import packed


def compile_backend(device: torch.device) -> str:
    """Compiling for a CPU takes long. There it is only traced."""
    return "inductor" if device.type == "cuda" else "eager"


# ------------------------------------------------------------------------------- compiled layers


@contextlib.contextmanager
def compiled_layers(device: torch.device) -> Iterator[None]:
    """Fuse the elementwise operations of each layer, which are limited by memory bandwidth."""
    original = common.prepare_policy
    layers = []

    def prepare_policy(policy: common.Policy, run: common.Run) -> common.Policy:
        policy = original(policy, run)
        for layer in common.transformer_layers(policy):
            layer.compile(backend=compile_backend(device), dynamic=True)
            layers.append(layer)
        return policy

    # Flex attention is compiled separately already.
    functions = {
        "packed": packed.packed_attention,
        "packed_flex": packed.packed_flex_attention,
    }
    for name, function in functions.items():
        AttentionInterface.register(name, torch.compiler.disable(function))
    try:
        with (
            mock.patch.object(common, "prepare_policy", prepare_policy),
            # Padded without gradient, packed with gradient and without, each for changing sizes.
            torch._dynamo.config.patch(recompile_limit=64),
        ):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # the model may be used again
        for name, function in functions.items():
            AttentionInterface.register(name, function)


# ----------------------------------------------------------------------------------- the optimizer


@contextlib.contextmanager
def compiled_optimizer(device: torch.device) -> Iterator[None]:
    """Update a weight by one kernel. It is compiled for one learning rate, then for all."""
    original = common.make_optimizer

    def make_optimizer(policy: common.Policy, config: object) -> torch.optim.Optimizer:
        optimizer = original(policy, config)
        optimizer.step = torch.compile(optimizer.step, backend=compile_backend(device))
        return optimizer

    with mock.patch.object(common, "make_optimizer", make_optimizer):
        yield


@contextlib.contextmanager
def fused_optimizer(device: torch.device) -> Iterator[None]:
    """AdamW by one kernel, where torch's default on a GPU takes several."""

    def make_optimizer(policy: common.Policy, config) -> torch.optim.Optimizer:
        return torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)

    with mock.patch.object(common, "make_optimizer", make_optimizer):
        yield


# -------------------------------------------------------------------------------- varlen attention


@dataclass
class Segments:
    """The parts of a packed sequence, as varlen_attn takes them.

    A prompt with its first completion is a part; so is each further completion, whose keys are
    those of the prompt and its own.
    """

    key_places: Tensor  # the places in the sequence of all keys, one part after the other
    query_ends: Tensor  # (parts + 1,) int32: 0, then the ends of the parts' queries
    key_ends: Tensor  # (parts + 1,) int32: 0, then the ends of the parts' keys
    most_queries: int  # of a part
    most_keys: int  # of a part


def find_segments(segment_lengths: Sequence[Sequence[int]], device: torch.device) -> Segments:
    """segment_lengths: of each example, the tokens of the prompt and of each completion."""
    key_places = []
    query_ends = [0]
    key_ends = [0]
    most_queries = 0
    most_keys = 0
    prompt_start = 0
    for prompt_length, *completion_lengths in segment_lengths:
        prompt = torch.arange(prompt_start, prompt_start + prompt_length)
        start = prompt_start + prompt_length
        for number, length in enumerate(completion_lengths or [0]):
            completion = torch.arange(start, start + length)
            key_places += [prompt, completion]
            num_queries = length if number > 0 else prompt_length + length
            query_ends.append(query_ends[-1] + num_queries)
            key_ends.append(key_ends[-1] + prompt_length + length)
            most_queries = max(most_queries, num_queries)
            most_keys = max(most_keys, prompt_length + length)
            start += length
        prompt_start = start
    return Segments(
        key_places=torch.cat(key_places).to(device),
        query_ends=torch.tensor(query_ends, dtype=torch.int32, device=device),
        key_ends=torch.tensor(key_ends, dtype=torch.int32, device=device),
        most_queries=most_queries,
        most_keys=most_keys,
    )


class VarlenLayout(packed.PackedLayout):
    """The packed layout with segments in the place of a block mask, and without padding."""

    def collate(
        self, examples: Sequence[common.Example], device: torch.device | str
    ) -> tuple[dict, Tensor]:
        """As PackedLayout does it."""
        inputs, predictors = super().collate(examples, "cpu")
        inputs["segments"] = find_segments(inputs.pop("segment_lengths"), torch.device(device))
        return inputs, predictors


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The same as packed.packed_attention."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    q = query[0].transpose(0, 1).to(value.dtype)  # (T, heads, head size)
    # index_select, since the gradient of indexing sorts the indices first.
    k = key[0].transpose(0, 1).to(value.dtype).index_select(0, segments.key_places)
    v = value[0].transpose(0, 1).index_select(0, segments.key_places)  # (keys, heads, head size)
    attend = varlen_attn if q.is_cuda else plain_varlen_attention
    options = {}
    if k.shape[1] < q.shape[1]:
        options["enable_gqa"] = True  # torch 2.11 does not know it
    output = attend(
        q,
        k,
        v,
        segments.query_ends,
        segments.key_ends,
        segments.most_queries,
        segments.most_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal: the last query of a part attends to all of its keys
        **options,
    )
    return output[None], None


def plain_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """varlen_attn for a causal window, in plain torch."""
    assert window_size == (-1, 0)
    outputs = []
    for part in range(len(query_ends) - 1):
        queries = slice(query_ends[part], query_ends[part + 1])
        keys = slice(key_ends[part], key_ends[part + 1])
        q = query[queries].transpose(0, 1)[None]  # (1, heads, queries, head size)
        k = key[keys].transpose(0, 1)[None]
        v = value[keys].transpose(0, 1)[None]
        num_queries = q.shape[2]
        num_keys = k.shape[2]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


AttentionInterface.register("packed_varlen", varlen_attention)


@contextlib.contextmanager
def varlen(device: torch.device) -> Iterator[None]:
    """Compute packed attention by varlen_attn, which needs no compilation and no block mask."""

    def use_packed_attention(model: PreTrainedModel, device: torch.device) -> None:
        model.set_attn_implementation("packed_varlen")

    with (
        mock.patch.object(packed, "PackedLayout", VarlenLayout),
        mock.patch.object(packed, "use_packed_attention", use_packed_attention),
    ):
        yield


# ----------------------------------------------------------------------------------- bfloat16 head


class ProductInFloat32(torch.autograd.Function):
    """a @ b.T of bfloat16 matrices, with the result in float32."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        """a (n, H), b (V, H) to (n, V) in float32."""
        ctx.save_for_backward(a, b)
        if a.is_cuda:
            return torch.mm(a, b.T, out_dtype=torch.float32)
        return a.float() @ b.float().T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in bfloat16."""
        a, b = ctx.saved_tensors
        grad = grad.bfloat16()
        return grad @ b, grad.T @ a


@contextlib.contextmanager
def bfloat16_head(device: torch.device) -> Iterator[None]:
    """Multiply bfloat16 matrices in the head; common.CoarseProduct takes TF32, at half the rate."""

    def head_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = ProductInFloat32.apply(hidden.bfloat16(), head.weight.bfloat16())
            return logits if head.bias is None else logits + head.bias

    with mock.patch.object(common, "head_logits", head_logits):
        yield


@contextlib.contextmanager
def as_it_is(device: torch.device) -> Iterator[None]:
    """The trainer without a change."""
    yield


VARIANTS: dict[str, Callable[[torch.device], contextlib.AbstractContextManager]] = {
    "": as_it_is,
    "compiled layers": compiled_layers,
    "compiled optimizer": compiled_optimizer,
    "fused optimizer": fused_optimizer,
    "varlen attention": varlen,
    "bfloat16 head": bfloat16_head,
}
