"""How much memory a GPU needs, predicted for 1 to 16 GPUs: the report's models, or any other.

    python -m archangel.memory                  # the table, with the command for each that fits
    python -m archangel.memory --gpu_gib 40 --optimizer adamw
    python -m archangel.memory --model Qwen/Qwen3-8B      # a hub id or a folder; reads config.json

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
On an H100, DPO on Pythia-1.4B's shape, with 9,200 tokens in a micro-batch on average, took 31 GiB,
where this adds up to 36: not all of it is needed at the same time.

What a block keeps is counted by autograd, on a block of the real size on the CPU. For the report's
models it was counted before.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

import common
from archangel import packed
from archangel.errors import UserError, exit_status
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
# Bytes that a block of the report's models keeps for the backward pass, per token and unit of
# width, if numbers have 4 or 2 bytes. Counted by count_kept_bytes, as tests/test_memory.py does.
KEPT_BYTES = {"gpt_neox": {4: 72, 2: 38}, "llama": {4: 87, 2: 58}}
NUM_GPUS = (1, 2, 4, 8, 16)  # the columns of the table
NUM_COUNTED_TOKENS = 64  # by count_kept_bytes
GIB = 2**30


@dataclass
class Config:
    """What the table is for. The comments are the --help texts."""

    model: str = ""  # a hub id, or a folder with a config.json; empty: the report's seven models
    gpu_gib: float = 80.0  # memory of one GPU, GiB
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"  # its state: one or two numbers a weight
    micro_batch_tokens: int = 8192  # as given to the trainer


@functools.cache
def model_config(name: str) -> PreTrainedConfig:
    """The configuration of one of the report's models, without the hub, or of another model.

    Raises UserError if there is none.
    """
    if name not in SHAPES:
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--model {name}: no configuration, {reason}") from None
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


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks. Raises UserError if transformers does not name them."""
    blocks = common.transformer_layers(common.Policy(model, bfloat16=False))
    if not blocks:
        raise UserError(f"--model: {model.config.model_type} does not name its transformer blocks")
    return blocks


def count_kept_bytes(config: PreTrainedConfig, number_bytes: int) -> float:
    """Bytes that one block of this model keeps for the backward pass, per token.

    number_bytes: 2 for bfloat16 matrix products, 4 for float32.
    """
    counts = []
    for num_layers in (1, 2):
        small = copy.deepcopy(config)
        small.num_hidden_layers = num_layers
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:num_layers]
        small.vocab_size = 128  # embeddings and head are not counted here
        small.pad_token_id = None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        counts.append(count_saved(model.to_empty(device="cpu"), number_bytes))
    return (counts[1] - counts[0]) / NUM_COUNTED_TOKENS


def count_saved(model: nn.Module, number_bytes: int) -> int:
    """Bytes that autograd keeps for a packed micro-batch of one example, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    bytes_of_storages = {}
    saved = []  # all of them stay alive, so that no two have the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            bytes_of_storages[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return tensor

    policy = common.Policy(model.eval(), bfloat16=number_bytes == 2)
    if number_bytes == 2:
        common.keep_residual_stream_in_float32(model, torch.device("cpu"))
    packed.use_packed_attention(model, torch.device("cpu"))
    half = NUM_COUNTED_TOKENS // 2
    example = common.Example(list(range(half)), [list(range(half))])
    micro_batch = common.make_micro_batch([example], [0], packed.PackedLayout(), "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(micro_batch)
    kept = sum(bytes_of_storages.values())
    if number_bytes == 2:  # autocast also keeps a copy of each matrix, which `gathered` counts
        for block in blocks_of(model):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    kept -= 2 * parameter.numel()
    return kept


@functools.cache
def kept_bytes(name: str, number_bytes: int) -> float:
    """count_kept_bytes of a model; of the report's models it is known."""
    config = model_config(name)
    if name in SHAPES:
        return config.hidden_size * KEPT_BYTES[config.model_type][number_bytes]
    try:
        return count_kept_bytes(config, number_bytes)
    except ValueError as error:  # no causal language model, or one that cannot be packed
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model {name}: {reason}") from None


def predict(
    config: PreTrainedConfig,
    processes: int,
    tokens: int = 8192,
    optimizer: str = "rmsprop",
    checkpointing: bool = False,
    number_bytes: int = 2,
    *,
    kept_per_token: float,
) -> dict[str, float]:
    """Bytes that one of `processes` needs, by what takes them (see the module's docstring).

    Args:
        kept_per_token: see count_kept_bytes.
        tokens: of a micro-batch.
        checkpointing: whether --activation_checkpointing is given.
        number_bytes: 2 for bfloat16 matrix products, 4 for float32.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_layers = config.num_hidden_layers
    width = config.hidden_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    block_weights = sum(weight.numel() for weight in blocks_of(model)[0].parameters())
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

    block_activations = tokens * kept_per_token
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
    """The predicted GiB per GPU for a model."""
    predicted = predict(
        model_config(name),
        processes,
        settings.micro_batch_tokens,
        settings.optimizer,
        checkpointing,
        kept_per_token=kept_bytes(name, 2),
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
    most = NUM_GPUS[-1]
    gib = total_gib(name, most, True, settings)
    return (
        f"{name}: needs {gib:.0f} GiB on each of {most} GPUs, with --activation_checkpointing; "
        "lower --micro_batch_tokens, or take larger GPUs"
    )


def main(settings: Config) -> None:
    """Print the table, in GiB per GPU, without / with activation checkpointing; bold: it fits."""
    names = [settings.model] if settings.model else list(SHAPES)
    head = ["1 GPU"] + [f"{processes} GPUs" for processes in NUM_GPUS[1:]]
    print(f"| model | {' | '.join(head)} |")
    print("| --- |" + " --- |" * len(NUM_GPUS))
    for name in names:
        cells = []
        for processes in NUM_GPUS:
            sizes = []
            for checkpointing in (False, True):
                gib = total_gib(name, processes, checkpointing, settings)
                sizes.append(f"**{gib:.0f}**" if fits(gib, settings) else f"{gib:.0f}")
            cells.append(" / ".join(sizes))
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nThe fewest GPUs of {settings.gpu_gib:g} GiB that each fits on:\n")
    for name in names:
        print(f"    {fewest_gpus_command(name, settings)}")


if __name__ == "__main__":
    with exit_status():
        main(parse_args(Config, __doc__))
