"""How much memory a GPU needs: the report's seven models on 1 to 16 GPUs, predicted.

    python -m archangel.memory                  # the table, with the command for each that fits
    python -m archangel.memory --gpu_gib 40 --optimizer adamw

The prediction adds up, for one of N processes:
    states        float32 weights, gradients and optimizer state, each split over the processes
    gathered      bfloat16 weights of the root (embeddings, output head) and of two blocks, and the
                  root's and a block's gradients before they are split, in bfloat16 and float32;
                  on one GPU: bfloat16 copies of all weights
    activations   what the blocks keep for the backward pass, for every token of a micro-batch; with
                  --activation_checkpointing each block's input, and all of one block at a time
    logits        of one chunk of the output head, and their gradient
It leaves out the allocator's fragments, NCCL's buffers and the CUDA context: 10% is kept for them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

import common_v1 as common

SHAPES = {  # layers, width, heads, width within a block, vocabulary; as on the hub
    "pythia-1.4b": (24, 2048, 16, 8192, 50304),
    "pythia-2.8b": (32, 2560, 32, 10240, 50304),
    "pythia-6.9b": (32, 4096, 32, 16384, 50432),
    "pythia-12b": (36, 5120, 40, 20480, 50688),
    "llama-7b": (32, 4096, 32, 11008, 32000),
    "llama-13b": (40, 5120, 40, 13824, 32000),
    "llama-30b": (60, 6656, 52, 17920, 32000),
}
# Bytes that a block keeps for the backward pass, by token and width: counted by autograd's hooks on
# saved tensors (tests/test_memory.py counts them again).
KEPT = {"gpt_neox": {4: 72, 2: 38}, "llama": {4: 87, 2: 58}}  # of 4 or 2 bytes a number
GIB = 2**30


@dataclass
class Config:
    """What the table is for; the comments are what --help prints."""

    gpu_gib: float = 80.0  # memory of one GPU, GiB
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # its state: one or two numbers a weight
    micro_batch_tokens: int = 8192  # as given to the trainer


def shape(name: str) -> PreTrainedConfig:
    """The settings of one of the report's models, without the hub."""
    layers, width, heads, inner, vocabulary = SHAPES[name]
    kind = GPTNeoXConfig if name.startswith("pythia") else LlamaConfig
    return kind(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
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
    """Bytes that one of `processes` needs, by what takes them (the module's docstring).

    tokens: of a micro-batch. number_bytes: 2 for bfloat16 compute, 4 for float32.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    layers, width = config.num_hidden_layers, config.hidden_size
    block = sum(p.numel() for p in model.base_model.layers[0].parameters())
    root = weights - layers * block
    states = 4 * weights * (4 if optimizer == "adamw" else 3)
    if processes > 1:
        gathered = number_bytes * (root + 2 * block) + (number_bytes + 4) * (root + block)
    else:  # autocast keeps the copies that it makes
        gathered = number_bytes * weights if number_bytes < 4 else 0
    kept = tokens * width * KEPT[config.model_type][number_bytes]
    inputs = tokens * width * number_bytes
    head = 4 if number_bytes == 4 else 4 + number_bytes  # float32; what the head gave, its gradient
    return {
        "states": states / processes,
        "gathered": gathered,
        "activations": kept + layers * inputs if checkpointing else kept * layers,
        "logits": head * min(common.CHUNK, tokens * config.vocab_size),
    }


def fits(gib: float, settings: Config) -> bool:
    """Whether so much fits, with a tenth to spare."""
    return gib <= 0.9 * settings.gpu_gib


def command(name: str, processes: int, settings: Config) -> str | None:
    """The trainer's command that fits, the fastest first, or None."""
    for checkpointing in (False, True):
        need = predict(
            shape(name),
            processes,
            settings.micro_batch_tokens,
            settings.optimizer,
            checkpointing,
        )
        if fits(sum(need.values()) / GIB, settings):
            per_node = min(processes, 8)
            nodes = f"--nnodes={processes // per_node} " if processes > per_node else ""
            flags = " --activation_checkpointing" if checkpointing else ""
            return f"torchrun {nodes}--nproc_per_node={per_node} kto.py --model {name}{flags}"
    return None


def main(settings: Config) -> None:
    """Print the table, in GiB a GPU, without / with activation checkpointing; bold: it fits."""
    counts = (1, 2, 4, 8, 16)
    print("| model | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in counts) + " |")
    print("| --- |" + " --- |" * len(counts))
    for name in SHAPES:
        cells = []
        for n in counts:
            tokens, optimizer = settings.micro_batch_tokens, settings.optimizer
            both = [predict(shape(name), n, tokens, optimizer, on) for on in (False, True)]
            sizes = [sum(need.values()) / GIB for need in both]
            cells.append(
                " / ".join(f"**{x:.0f}**" if fits(x, settings) else f"{x:.0f}" for x in sizes)
            )
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nThe fewest GPUs of {settings.gpu_gib:g} GiB that each fits on:\n")
    for name in SHAPES:
        commands = [line for n in counts if (line := command(name, n, settings))]
        print(f"    {commands[0]}" if commands else f"    {name}: not on 16")


if __name__ == "__main__":
    with common.exit_status():
        main(common.parse(Config, __doc__))
