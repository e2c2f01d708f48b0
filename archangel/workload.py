"""What the speed measurements train: models of random weights, examples of random tokens.

This file also counts the least work that the examples need, in tokens and floating-point
operations, and measures how fast this machine multiplies matrices. Nothing is downloaded.

In the order of this file:

    SHAPES, make_model_config, write_model             the models
    make_examples, sort_into_batches, write_records    the data
    useful_work, num_parameters                        what must be computed and stored
    matmul_rate                                        the speed of the machine
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

PAIRED_METHODS = ("dpo", "slic")  # two completions per prompt, chosen and rejected
LABELED_METHODS = ("kto", "ppo_offline")  # one completion, labeled desirable or undesirable
METHODS_WITH_REFERENCE = ("dpo", "kto", "ppo_offline")  # their losses need log pi_ref


# -------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Shape:
    """The size of a GPT-NeoX model, the architecture of Pythia."""

    layers: int
    width: int  # H, the hidden size
    heads: int
    feed_forward: int  # I, the hidden size of the feed-forward network
    vocabulary: int  # V


SHAPES = {
    "pythia-1.4b": Shape(layers=24, width=2048, heads=16, feed_forward=8192, vocabulary=50304),
    "small-50k": Shape(layers=4, width=256, heads=4, feed_forward=1024, vocabulary=50304),
    "small-4k": Shape(layers=8, width=256, heads=4, feed_forward=1024, vocabulary=4096),
    "tiny": Shape(layers=2, width=32, heads=2, feed_forward=64, vocabulary=512),
}


def make_model_config(shape: Shape) -> GPTNeoXConfig:
    """The configuration of a model of this shape, with Pythia's rotary positions."""
    return GPTNeoXConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )


def write_model(shape: Shape, seed: int, folder: Path) -> None:
    """Write a model of random weights, and a tokenizer, for from_pretrained(folder).

    The tokenizer splits at spaces. The text of token i is the number i, except for token 0, which
    is the end-of-sequence token.
    """
    torch.manual_seed(seed)
    # A CPU draws a billion random weights in half a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GPTNeoXForCausalLM(make_model_config(shape))
    model.save_pretrained(folder)
    token_ids = {"<end>": 0}
    for number in range(1, shape.vocabulary):
        token_ids[str(number)] = number
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


# ---------------------------------------------------------------------------------------- the data


def make_examples(
    shape: Shape, method: str, num_examples: int, max_length: int, seed: int
) -> list[dict]:
    """Examples of random tokens, the same ones for the same arguments.

    Lengths are lognormal: prompts have 160 tokens on average, completions 64. A prompt has at most
    3/4 of max_length, a prompt and a completion together at most max_length.

    Returns:
        Dictionaries of
        prompt_ids: (P,) token ids.
        completions_ids: two arrays of token ids for DPO and SLiC (chosen, rejected), one for the
            other methods. Each ends with the end-of-sequence token, 0.
        label: whether the completion is desirable, for KTO and offline PPO. True and False
            alternate.
    """
    rng = np.random.default_rng(seed)

    def draw_length(mean: float, sigma: float, shortest: int, longest: int) -> int:
        length = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)
        return int(np.clip(round(length), shortest, longest))

    num_completions = 2 if method in PAIRED_METHODS else 1
    examples = []
    for number in range(num_examples):
        prompt_length = draw_length(160, 0.7, 4, max_length * 3 // 4)
        prompt_ids = rng.integers(1, shape.vocabulary, prompt_length)
        completions_ids = []
        for _ in range(num_completions):
            length = draw_length(64, 0.8, 2, max_length - prompt_length)
            ids = rng.integers(1, shape.vocabulary, length - 1)
            completions_ids.append(np.append(ids, 0))
        examples.append(
            {
                "prompt_ids": prompt_ids,
                "completions_ids": completions_ids,
                "label": number % 2 == 0,
            }
        )
    return examples


def longest_sequence(example: dict) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["completions_ids"])


def sort_into_batches(examples: Sequence[dict], batch_size: int, seed: int) -> list[dict]:
    """The examples in an order in which each batch of consecutive ones has similar lengths.

    The batches are in a random order, which depends on the seed.
    """
    by_length = sorted(examples, key=longest_sequence)
    batches = []
    for start in range(0, len(by_length), batch_size):
        batches.append(by_length[start : start + batch_size])
    np.random.default_rng(seed).shuffle(batches)
    ordered = []
    for batch in batches:
        ordered.extend(batch)
    return ordered


def write_records(examples: Sequence[dict], method: str, path: Path) -> None:
    """Write examples as JSONL. The tokenizer of `write_model` gives the same tokens back."""

    def to_text(ids: Sequence[int]) -> str:
        return "".join(f" {number}" for number in ids)

    with path.open("w") as file:
        for example in examples:
            # A trainer adds the end-of-sequence token itself.
            completions = [to_text(ids[:-1]) for ids in example["completions_ids"]]
            record = {"prompt": to_text(example["prompt_ids"])}
            if method in PAIRED_METHODS:
                record["chosen"] = completions[0]
                record["rejected"] = completions[1]
            else:
                record["completion"] = completions[0]
            if method in LABELED_METHODS:
                record["label"] = example["label"]
            file.write(json.dumps(record) + "\n")


# -------------------------------------------------------------------------------- the least work


def forward_flops(shape: Shape, num_earlier: int, num_tokens: int) -> int:
    """Operations of a forward pass over num_tokens tokens, without the output head.

    num_earlier: tokens before them that they attend to, and that are computed already.
    """
    weights = shape.layers * (4 * shape.width**2 + 2 * shape.width * shape.feed_forward)
    # A token attends to the earlier ones, to those of its own segment before it, and to itself.
    num_attended = num_tokens * num_earlier + num_tokens * (num_tokens + 1) // 2
    return 2 * weights * num_tokens + 4 * shape.layers * shape.width * num_attended


def useful_work(
    examples: Sequence[dict], shape: Shape, method: str, kl: str = "mismatched"
) -> dict[str, int]:
    """The work that no implementation can leave out.

    Each prompt and each completion is computed once, and the output head on completion tokens only.
    A training step costs three forward passes. KTO with --kl mismatched also needs the
    log-probability of a mismatched completion after each prompt, without gradient: one forward pass
    over a completion. It is counted as long as the example's own one, which is nearly true on
    average.

    kl: KTO's setting of that name.

    Returns:
        tokens: of prompts and completions, KTO's mismatched ones included.
        completion_tokens: of the examples' own completions.
        step_flops: floating-point operations of the training steps.
        reference_flops: of the reference pass; 0 for a loss without a reference.
    """
    head_flops = 2 * shape.width * shape.vocabulary  # per completion token
    num_tokens = 0
    num_completion_tokens = 0
    with_gradient = 0  # operations of a forward pass over what is trained on
    without_gradient = 0  # operations of a forward pass over KTO's mismatched completions
    for example in examples:
        prompt_length = len(example["prompt_ids"])
        completions_length = 0
        completions_flops = 0
        for ids in example["completions_ids"]:
            completions_length += len(ids)
            completions_flops += forward_flops(shape, prompt_length, len(ids))
            completions_flops += head_flops * len(ids)
        num_tokens += prompt_length + completions_length
        num_completion_tokens += completions_length
        with_gradient += forward_flops(shape, 0, prompt_length) + completions_flops
        if method == "kto" and kl == "mismatched":
            num_tokens += completions_length
            without_gradient += completions_flops
    reference_flops = 0
    if method in METHODS_WITH_REFERENCE:
        reference_flops = with_gradient + without_gradient
    return {
        "tokens": num_tokens,
        "completion_tokens": num_completion_tokens,
        "step_flops": 3 * with_gradient + without_gradient,
        "reference_flops": reference_flops,
    }


def num_parameters(shape: Shape) -> int:
    """Weights and biases of a model of this shape, whose output head is not tied."""
    width = shape.width
    attention = 4 * width**2 + 4 * width  # weights and biases
    feed_forward = 2 * width * shape.feed_forward + shape.feed_forward + width
    layer_norm = 2 * width
    block = attention + feed_forward + 2 * layer_norm
    return 2 * shape.vocabulary * width + shape.layers * block + layer_norm


# ------------------------------------------------------------------------------------- the machine


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: str = "auto") -> float:
    """Floating-point operations per second of a large matrix product, the best of ten.

    On a CPU, per second of CPU time, because other processes may delay the wall clock.

    dtype: float32 or bfloat16; auto is float32 on a CPU and bfloat16 on a GPU.
    """
    size = 1536
    clock = time.process_time
    bfloat16 = dtype == "bfloat16"
    if device.type == "cuda":
        size = 8192
        clock = time.perf_counter
        bfloat16 = dtype in ("auto", "bfloat16")
    torch_dtype = torch.bfloat16 if bfloat16 else torch.float32
    a = torch.randn(size, size, device=device, dtype=torch_dtype)
    b = torch.randn(size, size, device=device, dtype=torch_dtype)
    fastest = math.inf
    for _ in range(10):
        synchronize(device)
        start_time = clock()
        torch.matmul(a, b)
        synchronize(device)
        fastest = min(fastest, clock() - start_time)
    return 2 * size**3 / fastest
