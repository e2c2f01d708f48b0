"""How much memory a GPU needs: the report's seven models on 1 to 16 GPUs, predicted.

    python -m archangel.memory                  # the table, with the command for each that fits
    python -m archangel.memory --gpu_gib 40 --optimizer adamw

The prediction adds up, for one of N processes:
    states        float32 weights, gradients and optimizer state, each split over the processes
    gathered      bfloat16 weights of the root (embeddings, output head) and of two blocks, and the
                  root's and a block's gradients before they are split, in bfloat16 and float32;
                  on one GPU: bfloat16 copies of all weights but the output head's
    activations   what the blocks keep for the backward pass, for every token of a micro-batch; with
                  --activation_checkpointing each block's input, and all of one block at a time
    logits        of one chunk of the output head; their gradient overwrites them. With several
                  processes, also the head's weights in float32 and their gradient
It leaves out the allocator's fragments, NCCL's buffers and the CUDA context: 10% is kept for them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

import common
from archangel.errors import exit_status
from archangel.run import parse_args

SHAPES = {  # layers, width, heads, width within a block, vocabulary; as on the hub
    "pythia-1.4b": (24, 2048, 16, 8192, 50304),
    "pythia-2.8b": (32, 2560, 32, 10240, 50304),
    "pythia-6.9b": (32, 4096, 32, 16384, 50432),
    "pythia-12b": (36, 5120, 40, 20480, 50688),
    "llama-7b": (32, 4096, 32, 11008, 32000),
    "llama-13b": (40, 5120, 40, 13824, 32000),
    "llama-30b": (60, 6656, 52, 17920, 32000),
}
# Bytes that a block keeps for the backward pass, per token and unit of width, if numbers have 4 or
# 2 bytes. Counted by autograd's hooks on saved tensors; tests/test_memory.py counts them again.
KEPT_BYTES = {"gpt_neox": {4: 72, 2: 38}, "llama": {4: 87, 2: 58}}
NUM_GPUS = (1, 2, 4, 8, 16)  # the columns of the table
GIB = 2**30


@dataclass
class Config:
    """What the table is for. The comments are the --help texts."""

    gpu_gib: float = 80.0  # memory of one GPU, GiB
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # its state: one or two numbers a weight
    micro_batch_tokens: int = 8192  # as given to the trainer


def model_config(name: str) -> PreTrainedConfig:
    """The configuration of one of the report's models, without the hub."""
    layers, width, heads, inner_width, vocab_size = SHAPES[name]
    config_class = GPTNeoXConfig if name.startswith("pythia") else LlamaConfig
    return config_class(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner_width,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


def predict(
    config: PreTrainedConfig,
    processes: int,
    tokens: int = 8192,
    optimizer: str = "rmsprop",
    checkpointing: bool = False,
    number_bytes: int = 2,
) -> dict[str, float]:
    """Bytes that one of `processes` needs, by what takes them (see the module's docstring).

    Args:
        tokens: of a micro-batch.
        checkpointing: whether --activation_checkpointing is given.
        number_bytes: 2 for bfloat16 matrix products, 4 for float32.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_layers = config.num_hidden_layers
    width = config.hidden_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    block_weights = sum(weight.numel() for weight in model.base_model.layers[0].parameters())
    root_weights = weights - num_layers * block_weights

    numbers_per_weight = 4 if optimizer == "adamw" else 3  # weight, gradient, optimizer state
    states = 4 * weights * numbers_per_weight
    if processes > 1:
        gathered_weights = number_bytes * (root_weights + 2 * block_weights)
        gathered_gradients = (number_bytes + 4) * (root_weights + block_weights)
        gathered = gathered_weights + gathered_gradients
    elif number_bytes < 4:  # autocast keeps the copies that it makes
        gathered = number_bytes * (weights - config.vocab_size * width)
    else:
        gathered = 0

    block_activations = tokens * width * KEPT_BYTES[config.model_type][number_bytes]
    block_input = 4 * tokens * width  # the residual stream is in float32
    if checkpointing:
        activations = block_activations + num_layers * block_input
    else:
        activations = num_layers * block_activations

    logits = 4 * min(4 * common.MAX_LOGITS, tokens * config.vocab_size)
    if processes > 1 and number_bytes < 4:
        logits += 2 * 4 * config.vocab_size * width
    return {
        "states": states / processes,
        "gathered": gathered,
        "activations": activations,
        "logits": logits,
    }


def total_gib(name: str, processes: int, checkpointing: bool, settings: Config) -> float:
    """The predicted GiB per GPU for one of the report's models."""
    predicted = predict(
        model_config(name),
        processes,
        settings.micro_batch_tokens,
        settings.optimizer,
        checkpointing,
    )
    return sum(predicted.values()) / GIB


def fits(gib: float, settings: Config) -> bool:
    """Whether this fits on a GPU, with a tenth of its memory to spare."""
    return gib <= 0.9 * settings.gpu_gib


def command(name: str, processes: int, settings: Config) -> str | None:
    """The trainer's command, without activation checkpointing if possible. None: it does not fit.

    Without activation checkpointing it is faster.
    """
    for checkpointing in (False, True):
        if fits(total_gib(name, processes, checkpointing, settings), settings):
            words = ["torchrun"]
            per_node = min(processes, 8)
            if processes > per_node:
                words.append(f"--nnodes={processes // per_node}")
                words += ["--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]
            words += [f"--nproc_per_node={per_node}", "kto.py", "--model", name]
            if checkpointing:
                words.append("--activation_checkpointing")
            return " ".join(words)
    return None


def fewest_gpus_command(name: str, settings: Config) -> str:
    """The command with the fewest GPUs that fits."""
    for processes in NUM_GPUS:
        found = command(name, processes, settings)
        if found is not None:
            return found
    return f"{name}: not on {NUM_GPUS[-1]}"


def main(settings: Config) -> None:
    """Print the table, in GiB per GPU, without / with activation checkpointing; bold: it fits."""
    head = ["1 GPU"] + [f"{processes} GPUs" for processes in NUM_GPUS[1:]]
    print(f"| model | {' | '.join(head)} |")
    print("| --- |" + " --- |" * len(NUM_GPUS))
    for name in SHAPES:
        cells = []
        for processes in NUM_GPUS:
            sizes = []
            for checkpointing in (False, True):
                gib = total_gib(name, processes, checkpointing, settings)
                sizes.append(f"**{gib:.0f}**" if fits(gib, settings) else f"{gib:.0f}")
            cells.append(" / ".join(sizes))
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nThe fewest GPUs of {settings.gpu_gib:g} GiB that each fits on:\n")
    for name in SHAPES:
        print(f"    {fewest_gpus_command(name, settings)}")


if __name__ == "__main__":
    with exit_status():
        main(parse_args(Config, __doc__))
