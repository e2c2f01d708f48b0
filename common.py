"""What the five trainers share: everything that a training step needs except the loss and the loop.

In the order of this file:

    start_run                           processes and device
    load_records, Examples              token ids, and columns that describe them
    make_micro_batches, gather_batch    a global batch to micro-batches, and back to (B,) results
    completion_logps                    micro-batch to log-probability of every completion token
    load_policy                         the language model, sharded with FSDP over the processes
    check_model_and_choose_layout       whether these are the model's own log-probabilities
    add_reference_logps                 log pi_ref, computed once before training
    make_optimizer, clip_gradient       the rest of a step

A micro-batch is shown here in the padded layout, which is the simple one. Training normally uses
the packed layout (archangel/packed.py), which is faster and gives the same numbers. It is not
needed to understand a step, nor are files and folders (archangel/run.py), data formats and tokens
(archangel/records.py, tokens.py, tokenized.py).

Shapes, in the order in which they appear in a step:

    B    examples in the global batch
    b    examples in a micro-batch
    C    completions in a micro-batch: for KTO C = b; for DPO C = 2b, chosen and rejected in turn
    N    completion tokens in a micro-batch, prompts not counted
    R, T sequences that the model is given, and tokens in each, prompts and padding included
    H, V hidden size, vocabulary size

Three kinds of integers refer to an example: the `number` of its record in the data, its `index` in
an Examples, and its `place` in a global batch (0 to B - 1).

Log-probabilities ("logps") are in nats. Weights are in run.dtype, float32 or float64. With
run.bfloat16, matrix products are in bfloat16 (autocast); with several processes, FSDP also casts
all weights to bfloat16 for the forward and the backward pass. The residual stream (the sum of what
the layers add) and the logits stay in float32 in both cases.
"""

import contextlib
import itertools
import math
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from archangel import packed
from archangel.data import prepare_mixture

# "X as X" marks what is imported for the scripts, which import nothing else of the project.
from archangel.errors import UserError as UserError
from archangel.records import progress as progress
from archangel.run import Run as Run
from archangel.run import build_without_weights, device_name, load_language_model
from archangel.run import check_settings as check_settings
from archangel.run import data_name as data_name
from archangel.run import run_script as run_script
from archangel.tokenized import MappedExample, Tally, load_tokens, prepare_tokens
from archangel.tokenized import TokenizedRecords as TokenizedRecords

# Logits (tokens x vocabulary) that are in memory at once: 512 MiB in float32 on a CPU. A GPU takes
# four times as many; a pass without gradient takes an eighth.
MAX_LOGITS = 2**27
# How long processes wait for each other. Meanwhile one of them may load a model of 30B parameters,
# or compute the token ids of millions of records.
MAX_WAIT = timedelta(hours=1)


# ---------------------------------------------------------------------------------- the processes


def start_run(config) -> Run:
    """Join the processes that torchrun started, or be the only one. Returns this process's Run.

    Raises UserError if --model or --out cannot be used.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        # Micro-batches differ in size. Without this, the memory that one of them has freed is often
        # too fragmented for the next. It is read when the GPU is first used.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if dist.is_initialized():  # by an earlier run of this process, such as in a notebook
        pass
    elif "RANK" in os.environ:  # started by torchrun
        dist.init_process_group(backend, timeout=MAX_WAIT)
    else:  # a group of one process, so that the collectives below need no special case
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    run = Run(config, device)
    run.layout = PaddedLayout()
    return run


# ----------------------------------------------------------------------------------- the examples


def load_records(run: Run, formats: Sequence[str]) -> tuple[TokenizedRecords, TokenizedRecords]:
    """The token ids of the training and of the held-out records of --data, not truncated yet.

    One process of each machine computes and caches them, unless an earlier run has; all processes
    read the cache. Raises UserError if a record has none of these formats, or if no record can be
    used.
    """
    error = None
    if run.local_rank == 0:
        try:
            prepare_mixture(run.config.data)  # the report's mixture, on its first use
            prepare_tokens(run.config.data, run.tokenizer)
        except UserError as caught:
            error = caught
    run.raise_everywhere(error)
    return load_tokens(run.config.data, formats, run.tokenizer)


@dataclass
class Example:
    """A prompt and its completions as token ids: lists, arrays or tensors."""

    prompt_ids: Sequence[int]  # at least one
    completions_ids: list[Sequence[int]]  # of one completion, or of chosen, rejected (and target)

    def lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each completion."""
        return len(self.prompt_ids), [len(ids) for ids in self.completions_ids]

    def prompt_key(self) -> bytes:
        """Something that is equal for equal prompts."""
        return np.asarray(self.prompt_ids, dtype=np.int32).tobytes()


# What a process without examples computes: one token, and nothing to predict. The process must take
# part, because FSDP communicates in every forward and backward pass.
EMPTY_EXAMPLE = Example(prompt_ids=[0], completions_ids=[])


class Examples(Sequence):
    """A sequence of examples, with columns of what schedules and checks need to know of them.

    Token ids are read when an example is asked for: they stay in the file of the records.

    Columns, with one value for each example:
        length: tokens of the prompt and the longest completion.
        num_tokens: tokens of the prompt and all completions.
        prompt_number: equal for examples whose prompts are equal before they are cut.
        record_number: which record of the data the example was made from. Examples of one record
            have the same prompt.
        was_cut: whether tokens were cut off, to keep within --max_length.
        desirable: the label, for losses on labelled completions; else None.
    """

    def __init__(self, records: TokenizedRecords | None = None, config=None):
        self.records = records
        self.left_out = Tally()  # records that give no example, by reason
        self._config = config
        self._examples: list[Example | MappedExample] = []
        self._prompt_numbers: dict[bytes | int, int] = {}
        # Arrays take a quarter of the memory of lists.
        self.length = array("q")
        self.num_tokens = array("q")
        self.prompt_number = array("q")
        self.record_number = array("q")
        self.was_cut: list[bool] = []
        self.desirable: list[bool | None] = []
        # The reference model's log-probabilities of all completion tokens, one example after the
        # other; those of example i are reference_logps[offsets[i] : offsets[i + 1]].
        self.offsets = array("q", [0])
        self.reference_logps: np.ndarray | None = None
        # For KTO's --kl mismatched, else None: example i is the prompt of example i here, with the
        # completion of an example of another prompt.
        self.mismatched: Examples | None = None

    def add_record(
        self,
        number: int,
        completion_names: Sequence[tuple[str, ...]],
        labels: Sequence[bool | None] = (None,),
    ) -> None:
        """Add the examples of a record, which share its prompt.

        Args:
            number: of the record.
            completion_names: one tuple for each example, of the names of its completions. DPO
                adds one example, [("chosen", "rejected")]; KTO two, [("chosen",), ("rejected",)].
            labels: of each example: whether it is desirable.
        """
        names = list(itertools.chain.from_iterable(completion_names))
        cut = self.records.cut(number, names, self._config)
        if cut is None:
            self.leave_out(number, f"longer than --max_length {self._config.max_length}")
            return
        prompt_length, was_cut = cut
        for names_of_example, desirable in zip(completion_names, labels, strict=True):
            example = MappedExample(
                self.records,
                self._config,
                number=number,
                prompt_length=prompt_length,
                names=names_of_example,
                completion_number=number,
            )
            self.append(example, number, was_cut, desirable)

    def leave_out(self, number: int, reason: str) -> None:
        """Count a record that gives no example."""
        self.left_out.add(reason, self.records.place(number))

    def append(
        self,
        example: Example | MappedExample,
        record_number: int | None = None,
        was_cut: bool = False,
        desirable: bool | None = None,
    ) -> None:
        """Add an example. Without a record_number, it is made from a record of its own."""
        if record_number is None:
            record_number = len(self)
        prompt_length, lengths = example.lengths()
        self.length.append(prompt_length + max(lengths))
        self.num_tokens.append(prompt_length + sum(lengths))
        self.prompt_number.append(
            self._prompt_numbers.setdefault(example.prompt_key(), len(self._prompt_numbers))
        )
        self.record_number.append(record_number)
        self.was_cut.append(was_cut)
        self.desirable.append(desirable)
        self.offsets.append(self.offsets[-1] + sum(lengths))
        self._examples.append(example)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        return Example(example.prompt_ids, example.completions_ids)

    def with_completions_of(self, index: int, other: int) -> MappedExample:
        """The prompt of one example with the completions of another."""
        return self._examples[index].with_completions_of(self._examples[other])

    def num_completion_tokens(self, indices: Sequence[int]) -> int:
        """Completion tokens of the examples with these indices."""
        return sum(self.offsets[index + 1] - self.offsets[index] for index in indices)

    def get_reference_logps(self, index: int) -> np.ndarray:
        """log pi_ref of the completion tokens of an example, (n,)."""
        return self.reference_logps[self.offsets[index] : self.offsets[index + 1]]

    def set_reference_logps(self, index: int, values: np.ndarray) -> None:
        """Set log pi_ref of the completion tokens of an example, (n,)."""
        self.reference_logps[self.offsets[index] : self.offsets[index + 1]] = values

    def with_mismatched(self) -> "list[Examples]":
        """These examples, and the mismatched ones if there are any."""
        if self.mismatched is None:
            return [self]
        return [self, self.mismatched]


def shuffled_passes(num_items: int, length: int, seed: tuple[int, ...]) -> list[int]:
    """The first `length` numbers of repeated passes over range(num_items), each pass reshuffled."""
    order = []
    pass_number = 0
    while len(order) < length:
        rng = np.random.default_rng((*seed, pass_number))
        order.extend(rng.permutation(num_items).tolist())
        pass_number += 1
    return order[:length]


# --------------------------------------------------------------- a global batch in micro-batches


@dataclass
class MicroBatch:
    """Some examples of a global batch, arranged for the model."""

    places: Tensor  # (b,) places of these examples in the global batch, 0 to B - 1
    inputs: dict[str, Any]  # keyword arguments of the model, such as input_ids (R, T)
    predictors: Tensor  # (N,) positions in the flattened (R * T) that predict the targets
    targets: Tensor  # (N,) completion tokens, one completion after the other
    completion_mask: Tensor  # (C, longest) bool: which entries of a padded row hold a token
    reference_logps: Tensor | None  # (N,) log pi_ref of the targets; None if not computed

    def pad_completions(self, values: Tensor) -> Tensor:
        """Values (N,) of the targets as (C, longest), with 0 after the end of each completion."""
        padded = values.new_zeros(self.completion_mask.shape)
        return padded.masked_scatter(self.completion_mask, values)

    def sum_completions(self, values: Tensor) -> Tensor:
        """The sum (C,) over each completion of values (N,) of its tokens."""
        return self.pad_completions(values).sum(dim=1)


class Layout(Protocol):
    """How examples are arranged as a micro-batch: PaddedLayout here, or archangel/packed.py's."""

    def num_tokens(self, examples: Sequence[Example]) -> int:
        """Tokens of a micro-batch with these examples, padding included."""

    def collate(
        self, examples: Sequence[Example], device: torch.device | str
    ) -> tuple[dict[str, Any], Tensor]:
        """Arrange examples; returns the `inputs` and `predictors` of a MicroBatch for this device.

        Plain tensors are on the CPU; make_micro_batch copies them. Objects such as a block mask are
        on the device already.
        """


class PaddedLayout:
    """The plain layout: one sequence for each completion, after its prompt, padded at its end."""

    def num_tokens(self, examples: Sequence[Example]) -> int:
        """Tokens of a micro-batch with these examples, padding included."""
        num_sequences = 0
        longest = 0
        for example in examples:
            for completion_ids in example.completions_ids:
                num_sequences += 1
                longest = max(longest, len(example.prompt_ids) + len(completion_ids))
        return num_sequences * longest

    def collate(
        self, examples: Sequence[Example], device: torch.device | str
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Arrange examples as R sequences, padded to the length T of the longest.

        Returns:
            inputs: keyword arguments of the model, {"input_ids": (R, T)}. Padding comes last,
                where no earlier token attends to it, so no attention mask is needed.
            predictors: (N,) positions in the flattened (R * T) whose hidden states predict the
                completion tokens: each is one place before the token that it predicts.
        """
        sequences = []
        is_completion = []
        for example in examples:
            prompt_ids = torch.as_tensor(example.prompt_ids, dtype=torch.long)
            for completion_ids in example.completions_ids or [[]]:  # [[]]: of EMPTY_EXAMPLE
                completion_ids = torch.as_tensor(completion_ids, dtype=torch.long)
                sequences.append(torch.cat([prompt_ids, completion_ids]))
                in_prompt = torch.zeros(len(prompt_ids), dtype=torch.bool)
                in_completion = torch.ones(len(completion_ids), dtype=torch.bool)
                is_completion.append(torch.cat([in_prompt, in_completion]))
        input_ids = pad_sequence(sequences, batch_first=True)  # (R, T)
        is_completion = pad_sequence(is_completion, batch_first=True)  # (R, T)
        # The hidden state at t predicts token t + 1. A prompt has at least one token, so the place
        # before a completion token is never in another sequence.
        predictors = is_completion.flatten().nonzero().squeeze(1) - 1  # (N,)
        return {"input_ids": input_ids}, predictors


def make_batch(
    examples: Sequence[Example | Mapping], device: torch.device | str = "cpu"
) -> MicroBatch:
    """All examples as one padded micro-batch, for a model on this device.

    examples: Example objects, or mappings with the same two fields. For use outside of training;
    see `completion_logps`.
    """
    plain_examples = []
    for example in examples:
        if isinstance(example, Mapping):
            example = Example(example["prompt_ids"], example["completions_ids"])
        plain_examples.append(example)
    return make_micro_batch(plain_examples, range(len(examples)), PaddedLayout(), device)


def make_micro_batch(
    examples: Sequence[Example],
    places: Sequence[int],
    layout: Layout,
    device: torch.device | str,
    reference_logps: Tensor | None = None,
) -> MicroBatch:
    """Arrange examples as a micro-batch.

    places: where they are in the global batch. reference_logps: (N,) of their completion tokens.
    """
    device = torch.device(device)
    inputs, predictors = layout.collate(examples or [EMPTY_EXAMPLE], device)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = copy_to(value, device)
    targets = [torch.empty(0, dtype=torch.long)]  # torch.cat needs one tensor at least
    lengths = []
    for example in examples:
        for completion_ids in example.completions_ids:
            targets.append(torch.as_tensor(completion_ids, dtype=torch.long))
            lengths.append(len(completion_ids))
    longest = max(lengths, default=0)
    lengths = torch.tensor(lengths, dtype=torch.long)  # (C,)
    completion_mask = torch.arange(longest) < lengths[:, None]  # (C, longest)
    return MicroBatch(
        places=copy_to(torch.tensor(list(places), dtype=torch.long), device),
        inputs=inputs,
        predictors=copy_to(predictors, device),
        targets=copy_to(torch.cat(targets), device),
        completion_mask=copy_to(completion_mask, device),
        reference_logps=None if reference_logps is None else copy_to(reference_logps, device),
    )


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on this device. From pinned memory the copy is asynchronous."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def make_micro_batches(examples: Examples, batch: Sequence[int], run: Run) -> list[MicroBatch]:
    """This process's share of a global batch, in micro-batches.

    batch: the indices of its examples. A micro-batch has at most --micro_batch_tokens tokens, or a
    single example. Every process gets the same number of micro-batches, because FSDP communicates
    in each of them; some may have no examples.
    """
    places_of_all = divide(
        [examples[index] for index in batch],
        run.layout,
        run.config.micro_batch_tokens,
        run.world_size,
    )
    micro_batches = []
    for places_by_rank in places_of_all:
        places = places_by_rank[run.rank]
        own_examples = [examples[batch[place]] for place in places]
        reference_logps = None
        if examples.reference_logps is not None:
            parts = [torch.from_numpy(examples.reference_logps[:0])]  # of no example
            for place in places:
                parts.append(torch.from_numpy(examples.get_reference_logps(batch[place])))
            reference_logps = torch.cat(parts)
        micro_batches.append(
            make_micro_batch(own_examples, places, run.layout, run.device, reference_logps)
        )
    return micro_batches


def divide(
    examples: Sequence[Example], layout: Layout, max_tokens: int, num_processes: int
) -> list[list[list[int]]]:
    """Divide examples among processes and micro-batches.

    The examples are sorted by size and dealt out in rounds, one to each process, so that all
    processes have about as much work. There are as few micro-batches as max_tokens allows, of about
    the same size. An example that alone exceeds max_tokens has a micro-batch of its own.

    Returns:
        places[m][r]: the places in `examples` of what process r computes in its micro-batch m.
    """
    sizes = [layout.num_tokens([example]) for example in examples]
    order = sorted(range(len(examples)), key=lambda place: sizes[place], reverse=True)
    rounds = []
    for start in range(0, len(order), num_processes):
        rounds.append(order[start : start + num_processes])  # the last one may be shorter
    places = fill_micro_batches(rounds, examples, layout, max_tokens, num_processes)
    # The last micro-batch may be small now, and a GPU takes nearly as long for it. So search by
    # bisection for the lowest limit that needs no more micro-batches, to within 5% of max_tokens.
    highest = max_tokens
    lowest = sum(sizes) // (num_processes * len(places))  # a lower one needs more of them
    while len(places) > 1 and highest - lowest > max(1, max_tokens // 20):
        limit = (lowest + highest) // 2
        more_even = fill_micro_batches(rounds, examples, layout, limit, num_processes)
        if len(more_even) == len(places):
            places = more_even
            highest = limit
        else:
            lowest = limit
    return places


def fill_micro_batches(
    rounds: Sequence[Sequence[int]],
    examples: Sequence[Example],
    layout: Layout,
    max_tokens: int,
    num_processes: int,
) -> list[list[list[int]]]:
    """Put rounds of examples, one for each process, into micro-batches; see `divide`.

    A new micro-batch begins, for all processes, when one of them would exceed max_tokens.
    """
    places = [[[] for _ in range(num_processes)]]
    for dealt in rounds:
        fits = True
        for share, place in zip(places[-1], dealt):
            candidate = [examples[other] for other in share] + [examples[place]]
            if share and layout.num_tokens(candidate) > max_tokens:
                fits = False
        if not fits:
            places.append([[] for _ in range(num_processes)])
        for share, place in zip(places[-1], dealt):
            share.append(place)
    return places


def gather_batch(
    values: Sequence[Tensor], micro_batches: Sequence[MicroBatch], num_examples: int
) -> Tensor:
    """The values of all examples of a global batch, on every process, without gradient.

    A collective: all processes call it, each with the results of its own micro-batches.

    Args:
        values: (b, ...) of each micro-batch.
        num_examples: B.
    Returns:
        (B, ...), in the order of the global batch.
    """
    places = torch.cat([micro_batch.places for micro_batch in micro_batches])
    values = torch.cat([part.detach() for part in values])
    result = values.new_zeros(num_examples, *values.shape[1:])
    result[places] = values
    dist.all_reduce(result)  # each place is set by one process and 0 in the others
    return result


# ------------------------------------------------------------------------------ log-probabilities


def completion_logps(
    model: nn.Module, micro_batch: MicroBatch, return_hidden: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability (N,) of every completion token, in nats, in at least float32.

    model: a causal language model of transformers. With return_hidden, also the hidden states
    (N, H) that predict these tokens. To compare it with a plain forward pass:

        prompt, completion = [5, 6, 7], [8, 9]
        micro_batch = make_batch([Example(prompt, [completion])])
        ours = completion_logps(model, micro_batch)
        logits = model(torch.tensor([prompt + completion])).logits[0, 2:4]
        plain = logits.log_softmax(-1)[[0, 1], completion]  # equal up to rounding

    The output head needs the most memory, for (N, V) logits. So it sees only hidden states that
    predict completion tokens, a chunk at a time; the backward pass computes each chunk again.
    """
    outputs = model.base_model(**micro_batch.inputs, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1)[micro_batch.predictors]  # (N, H)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    with_gradient = torch.is_grad_enabled()
    # In a forward pass without gradient, smaller chunks cost no recomputation and save memory.
    max_logits = MAX_LOGITS if with_gradient else MAX_LOGITS // 8
    if hidden.is_cuda:
        max_logits *= 4  # most micro-batches are one chunk then, which is not computed again
    chunk_size = max(1, max_logits // vocab_size)
    hidden_chunks = hidden.split(chunk_size)
    target_chunks = micro_batch.targets.split(chunk_size)
    recompute = with_gradient and len(hidden_chunks) > 1
    logps = []
    for chunk, targets in zip(hidden_chunks, target_chunks):
        if recompute:
            logps.append(checkpoint(head_logps, model, chunk, targets, use_reentrant=False))
        else:
            logps.append(head_logps(model, chunk, targets))
    if return_hidden:
        return torch.cat(logps), hidden
    return torch.cat(logps)


def head_logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (n, H) and targets (n,) to log-probabilities (n,), by the output head."""
    logits = head_logits(model.get_output_embeddings(), hidden)  # (n, V)
    # Some architectures scale or cap their logits. check_model_and_choose_layout refuses a model
    # that does so in a way that is not known here.
    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):  # Gemma
        cap = config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    logps, _ = TokenLogps.apply(logits, targets)
    return logps


def head_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Hidden states (n, H) to logits (n, V) by the output head, in at least float32.

    Autocast would round them to bfloat16, whose values between 16 and 32 are 0.125 apart.
    """
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type):
        logits = F.linear(hidden, head.weight, head.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(device_type, enabled=False):
        logits = CoarseProduct.apply(hidden.float(), head.weight.float())
        return logits if head.bias is None else logits + head.bias.float()


class CoarseProduct(torch.autograd.Function):
    """a @ b.T of float32 matrices with rounded inputs, about as fast as a bfloat16 product.

    Before they are multiplied, the inputs are rounded: to TF32 on a GPU, to bfloat16 on a CPU that
    multiplies bfloat16 faster. The result is not rounded. The precision is set for these products
    alone, because others, such as those that compute rotary positions, need full precision. It is a
    Function because the products of the backward pass run outside of the forward pass's "with".
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        """a (n, H) and b (V, H) to (n, V)."""
        ctx.save_for_backward(a, b)
        with matmul_precision("medium"):
            return a @ b.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a and b."""
        a, b = ctx.saved_tensors
        with matmul_precision("medium"):
            return grad @ b, grad.T @ a


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices with this precision; see torch.set_float32_matmul_precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TokenLogps(torch.autograd.Function):
    """-F.cross_entropy(logits, targets, reduction="none"), computed in place.

    It overwrites the logits (n, V), in forward and in backward. F.cross_entropy would need two more
    tensors of their size. The backward pass can therefore run only once. The overwritten logits are
    also returned, because autograd requires that of an input that was changed in place; nothing
    uses them.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) of targets (n,), and the overwritten logits (n, V)."""
        target_logits = logits.gather(1, targets[:, None])  # (n, 1)
        largest = logits.amax(1, keepdim=True)  # (n, 1)
        exponentials = logits.sub_(largest).exp_()  # (n, V), in place
        total = exponentials.sum(1, keepdim=True)  # (n, 1)
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)  # the second result has no gradient
        ctx.save_for_backward(exponentials, total, targets)
        logps = target_logits - largest - total.log()
        return logps.squeeze(1), logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor, _) -> tuple[Tensor, None]:
        """The gradient of a logit: 1 if it is the target's, minus its probability."""
        exponentials, total, targets = ctx.saved_tensors
        grad_logps = grad_logps[:, None]  # (n, 1)
        grad_logits = exponentials.mul_(-grad_logps / total)  # (n, V), in place
        grad_logits.scatter_add_(1, targets[:, None], grad_logps)
        return grad_logits, None


# -------------------------------------------------------------------------------------- the model


class Policy(nn.Module):
    """A causal language model whose forward pass gives log-probabilities of completion tokens.

    It is a module because FSDP gathers sharded weights when a module's forward method is called.
    """

    def __init__(self, lm: nn.Module, bfloat16: bool):
        super().__init__()
        self.lm = lm
        self.bfloat16 = bfloat16

    def forward(self, micro_batch: MicroBatch, from_logits: bool = False) -> Tensor:
        """Log-probability (N,) of every completion token.

        from_logits: take them from all logits of the model's own forward pass. That needs more
        memory, and only check_model_and_choose_layout does it.
        """
        device_type = micro_batch.targets.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bfloat16):
            if not from_logits:
                return completion_logps(self.lm, micro_batch)
            # The model's own head would round its logits to bfloat16.
            head_hook = self.lm.get_output_embeddings().register_forward_hook(
                lambda head, inputs, output: head_logits(head, *inputs)
            )
            try:
                logits = self.lm(**micro_batch.inputs).logits.flatten(0, 1)  # (R * T, V)
            finally:
                head_hook.remove()
            logits = logits[micro_batch.predictors]  # (N, V)
            return -F.cross_entropy(logits, micro_batch.targets, reduction="none")


def load_policy(run: Run, policy_class: type[Policy] = Policy) -> Policy:
    """The policy on its device; with several processes, sharded over them by FSDP.

    Only process 0 reads the weights. The others build the model without memory for its weights, and
    receive their shards. Weights that a policy_class adds to the language model's are left to the
    caller. Raises UserError if the model cannot be trained.
    """
    lm = None
    error = None
    if run.rank == 0:
        try:
            lm = load_language_model(run.model_path, run.dtype)
        except UserError as caught:
            error = caught
    run.raise_everywhere(error)
    if run.world_size == 1:  # sharding would make it 40% slower, for the same float32 numbers
        policy = prepare_policy(policy_class(lm, run.bfloat16), run)
        return policy.to(run.device)

    whole_model = lm
    configs = [None if whole_model is None else whole_model.config]
    dist.broadcast_object_list(configs)
    lm = build_without_weights(configs[0], run.dtype)
    if whole_model is not None:
        lm.generation_config = whole_model.generation_config
    policy = prepare_policy(policy_class(lm, run.bfloat16), run)
    shard(policy, whole_model, run)
    return policy


def prepare_policy(policy: Policy, run: Run) -> Policy:
    """Prepare a policy before it is moved to its device."""
    # No dropout, even in training, so that policy and reference agree before the first step.
    policy.eval()
    if run.bfloat16:
        keep_residual_stream_in_float32(policy.lm, run.device)
    run.info["parameters"] = sum(parameter.numel() for parameter in policy.parameters())
    if run.config.activation_checkpointing:
        layers = transformer_layers(policy)
        apply_activation_checkpointing(policy, check_fn=lambda module: module in layers)
    return policy


def keep_residual_stream_in_float32(lm: nn.Module, device: torch.device) -> None:
    """Cast the embedding's output to float32, so that the residual stream is in float32.

    The layers add to the output of the embedding, so the sum stays in its dtype. In one process
    that is float32, the dtype of the weights. With several it would be bfloat16, because FSDP casts
    the weights. In SmolLM2-135M on a CPU that made the mean error of log-probabilities 0.029 nats
    per token instead of 0.018.
    """
    lm.get_input_embeddings().register_forward_hook(
        lambda embedding, inputs, output: output.to(torch.float32)
    )
    # On a CPU autocast leaves layer_norm alone, which needs input and weight of one dtype.
    if device.type == "cpu":
        for module in lm.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(
                    lambda norm, inputs: inputs[0].to(norm.weight.dtype)
                )


def transformer_layers(policy: Policy) -> list[nn.Module]:
    """The units that FSDP gathers, and that activation checkpointing recomputes, one at a time."""
    layer_names = policy.lm._no_split_modules or ()  # class names, as transformers knows them
    return [module for module in policy.modules() if type(module).__name__ in layer_names]


def shard(policy: Policy, whole_model: nn.Module | None, run: Run) -> None:
    """Shard a policy without weights over the processes, and load its weights and buffers.

    whole_model: the model with weights on process 0, None on the others.
    """
    mp_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if run.bfloat16 else None,
        reduce_dtype=run.dtype,
        # Autocast casts what needs it. FSDP would rebuild every container among a layer's inputs,
        # and the packed layout passes some.
        cast_forward_inputs=False,
    )
    # By default, FSDP keeps the root module's weights gathered after a forward pass. After one
    # without a backward pass they would stay so, and the optimizer and checkpoints would see them.
    for module in [*transformer_layers(policy), policy]:
        fully_shard(module, mp_policy=mp_policy, reshard_after_forward=True)
    policy.to_empty(device=run.device)  # unlike on a plain module, tied weights stay tied
    dcp_state.set_model_state_dict(
        policy.lm,
        {} if whole_model is None else whole_model.state_dict(),
        options=dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    # Buffers are not sharded, and some, such as rotary frequencies, are in no state dict.
    for name, buffer in policy.lm.named_buffers():
        if whole_model is not None:
            original_name = name.replace("_checkpoint_wrapped_module.", "")
            buffer.copy_(whole_model.get_buffer(original_name))
        dist.broadcast(buffer, src=0)


# ----------------------------------------------------------------------------- the check at start

# A reader of a training step may skip this section.

# Three differences of log-probabilities are checked, in nats per token:
# 1. Ours from the model's own forward pass, over the same sequences: the mean. Only sums differ, by
#    8e-6 in bfloat16 in SmolLM2-135M. A scaling of the logits that is not known here changes them
#    by far more, and the model is refused.
MAX_ERROR = {"bfloat16": 1e-3, "float32": 1e-4}
# 2. One sequence at a time from a padded micro-batch of them: the mean. In bfloat16 they round
#    differently, by 0.015 in SmolLM2-135M. Above the limit, the model is refused.
MAX_NOISE = {"bfloat16": 0.2, "float32": 1e-4}
# 3. The packed layout from one sequence at a time: the largest mean of four tokens in a row. Above
#    the limit, and above four times the same of the second difference, padding is used.
MAX_PACKED_ERROR = {"bfloat16": 0.2, "float32": 1e-3}


def check_model_and_choose_layout(
    policy: Policy, example_sets: Sequence[Examples], run: Run
) -> None:
    """Compare our log-probabilities with the model's own, and choose the layout.

    Raises UserError if `completion_logps` differs from the model's own forward pass. Otherwise,
    sets run.layout to the packed one if that gives the same numbers too. If it does not, as for a
    model with windowed attention, it says so and keeps the padded layout.
    """
    sample = examples_to_check(example_sets)
    padded = make_micro_batch(sample, range(len(sample)), PaddedLayout(), run.device)
    expected = []
    ours = []
    with torch.no_grad():
        # One sequence at a time: all logits of several could fill the memory.
        for example in sample:
            for completion_ids in example.completions_ids:
                single = make_batch([Example(example.prompt_ids, [completion_ids])], run.device)
                expected.append(policy(single, from_logits=True))
                ours.append(policy(single))
        expected = torch.cat(expected)  # (N,)
        ours = torch.cat(ours)  # (N,)
        # Another arrangement of the same sequences gives the same numbers, up to rounding.
        noise = policy(padded) - ours  # (N,)
    error = (ours - expected).abs().mean().item()  # nats per token
    mean_noise = noise.abs().mean().item()
    fault = None
    precision = "bfloat16" if run.bfloat16 else "float32"
    if not error < MAX_ERROR[precision]:  # "not <" is also true for nan
        fault = UserError(
            f"--model {run.model_path}: its log-probabilities differ by {error:.2g} nats per token "
            "from its own forward pass: a scaling of its logits that is not known here"
        )
    elif not mean_noise < MAX_NOISE[precision]:
        fault = UserError(
            f"--model {run.model_path}: its log-probabilities change by {mean_noise:.2g} nats per "
            "token with the other sequences in a batch, which this trainer cannot work with"
        )
    run.raise_everywhere(fault)

    own_attention = policy.lm.config._attn_implementation
    reason = try_packed_layout(policy, sample, padded, ours, noise, run)
    if reason is None:
        run.layout = packed.PackedLayout()
    else:
        policy.lm.set_attn_implementation(own_attention)
        run.print(f"padded layout, which is slower; the packed one is not used: {reason}")
    policy.zero_grad()
    run.info["packed_rows"] = reason is None
    run.info["self_check_error"] = error
    run.info["rounding_noise"] = mean_noise
    run.print_model_summary()


def examples_to_check(example_sets: Sequence[Examples]) -> list[Example]:
    """A sample in which a wrong attention mask changes the numbers.

    The longest example gets one more, short completion, which must not attend to the others. A
    short example comes after it, and must not attend to it.
    """
    longest = example_sets[0][0]
    max_length = 0
    for examples in example_sets:
        for examples_or_mismatched in examples.with_mismatched():
            for index, length in enumerate(examples_or_mismatched.length):
                if length > max_length:
                    longest = examples_or_mismatched[index]
                    max_length = length
    other = example_sets[0][0]
    more = longest.completions_ids[-1][-16:]
    return [
        Example(longest.prompt_ids, [*longest.completions_ids, more]),
        Example(other.prompt_ids[:16], [ids[:16] for ids in other.completions_ids]),
    ]


def try_packed_layout(
    policy: Policy,
    sample: list[Example],
    padded: MicroBatch,
    expected: Tensor,
    noise: Tensor,
    run: Run,
) -> str | None:
    """Prepare the model for the packed layout. Returns None, or the reason why it does not work.

    All processes get the same answer.

    Args:
        padded: the sample as a padded micro-batch.
        expected: (N,) log-probabilities of its targets.
        noise: (N,) their rounding errors.
    """
    reason = None
    try:
        packed.use_packed_attention(policy.lm, run.device)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
    reason = first_reason(reason, run)  # before FSDP communicates in a forward pass
    if reason is not None:
        return reason
    try:
        if run.device.type == "cuda":
            compile_packed_attention(policy, sample, run)
        micro_batch = make_micro_batch(
            sample, range(len(sample)), packed.PackedLayout(), run.device
        )
        logps = policy(micro_batch)  # (N,)
        logps.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models refuse unknown arguments in many ways
        reason = str(error).strip().partition("\n")[0] or repr(error)
        if run.world_size > 1:  # FSDP does not recover from an unfinished forward pass
            raise UserError(
                f"--model {run.model_path}: packed sequences fail ({reason}); train in one process"
            ) from None
        return reason
    error = largest_mean_of_four(logps.detach() - expected, padded)
    allowed = MAX_PACKED_ERROR["bfloat16" if run.bfloat16 else "float32"]
    allowed = max(allowed, 4 * largest_mean_of_four(noise, padded))
    if not error < allowed:
        reason = f"the model gives different numbers when packed (by {error:.2g} nats per token)"
    return first_reason(reason, run)


def compile_packed_attention(policy: Policy, sample: list[Example], run: Run) -> None:
    """Let torch compile a GPU's attention here, where a failure has a way out.

    It compiles for the first size that it sees; then, at another one, for all sizes. The passes
    with gradient and without have kernels of their own.
    """
    layout = packed.PackedLayout()
    short_example = sample[-1]
    # Two blocks more, at least: fewer may not change the size to which a GPU pads.
    num_copies = 1 + 2 * packed.BLOCK_SIZE // layout.num_tokens([short_example])
    for examples in (sample, sample + [short_example] * num_copies):
        micro_batch = make_micro_batch(examples, range(len(examples)), layout, run.device)
        with torch.no_grad():
            policy(micro_batch)
        policy(micro_batch).sum().backward()


def largest_mean_of_four(errors: Tensor, micro_batch: MicroBatch) -> float:
    """The largest mean of absolute errors (N,) over four tokens in a row.

    A completion that wrongly attends to another one is wrong in its first tokens, one that exceeds
    an attention window in its last. The mean over all tokens would hide either. A single token may
    be off by rounding.
    """
    errors = micro_batch.pad_completions(errors.abs())  # (C, longest)
    # Padding with zeros gives a completion of fewer than four tokens a window, too.
    windows = F.pad(errors, (3, 3)).unfold(1, 4, 1)  # (C, number of windows, 4)
    return windows.mean(dim=2).max().item()


def first_reason(reason: str | None, run: Run) -> str | None:
    """The reason of the first process that has one. A collective: all processes call it."""
    reasons = [None] * run.world_size
    dist.all_gather_object(reasons, reason)
    for each in reasons:
        if each is not None:
            return each
    return None


# ------------------------------------------------------------------------------ the reference model


@torch.no_grad()
def add_reference_logps(
    policy: Policy, examples: Examples, indices: Sequence[int], name: str, run: Run
) -> None:
    """Set examples.reference_logps: log pi_ref of every completion token, of these examples.

    The reference model is the policy before training, and never changes. So this is done once, and
    kept in the run's folder, in reference_logps_{name}.safetensors. After --resume they are read if
    they were computed with the same `arithmetic`, and else computed again. Log-probabilities of
    examples that are not asked for are nan. The mismatched examples, if any, are included.
    """
    if not indices:
        return
    example_sets = examples.with_mismatched()
    for each in example_sets:
        nans = torch.full((each.offsets[-1],), torch.nan, dtype=run.dtype)
        each.reference_logps = nans.numpy()
    file_name = f"reference_logps_{name}.safetensors"
    if read_reference_logps(example_sets, indices, file_name, run):
        return
    start_time = time.perf_counter()
    compute_reference_logps(policy, example_sets, indices, run)
    seconds = run.info.get("reference_seconds", 0.0) + time.perf_counter() - start_time
    run.write_record(reference_seconds=seconds)
    if run.rank == 0:
        tensors = {"logps": torch.from_numpy(examples.reference_logps)}
        if examples.mismatched is not None:
            tensors["mismatched_logps"] = torch.from_numpy(examples.mismatched.reference_logps)
        run.write_tensors(file_name, tensors, arithmetic(run))


def compute_reference_logps(
    policy: Policy, example_sets: list[Examples], indices: Sequence[int], run: Run
) -> None:
    """Compute the reference_logps of the examples with these indices, in each of the sets.

    Examples of one record have the same prompt. They are merged to one example with all their
    completions: the packed layout then computes the prompt once.
    """
    groups = {}  # record number -> list of (examples, index)
    for index in indices:
        for examples in example_sets:
            groups.setdefault(examples.record_number[index], []).append((examples, index))
    groups = list(groups.values())
    merged = Examples()  # one example for each group
    for group in groups:
        prompt_ids = None
        completions_ids = []
        for examples, index in group:
            example = examples[index]
            if prompt_ids is None:
                prompt_ids = example.prompt_ids
            assert np.array_equal(example.prompt_ids, prompt_ids), "a record has one prompt"
            completions_ids.extend(example.completions_ids)
        merged.append(Example(prompt_ids, completions_ids))

    logps = torch.zeros(merged.offsets[-1], dtype=run.dtype)  # of all merged examples
    bar = tqdm(total=len(logps), unit="tok", desc="reference", delay=2, disable=run.rank != 0)
    # `make_micro_batches` sorts examples by length, so that those of a micro-batch are alike. It
    # gets a window of them at a time, so that the progress bar moves evenly.
    window = 1024
    for start in range(0, len(merged), window):
        batch = range(start, min(start + window, len(merged)))
        for micro_batch in make_micro_batches(merged, batch, run):
            token_logps = policy(micro_batch).to(logps)  # (N,)
            merged_indices = [batch[place] for place in micro_batch.places.tolist()]
            lengths = [merged.num_completion_tokens([index]) for index in merged_indices]
            for index, part in zip(merged_indices, token_logps.split(lengths)):
                logps[merged.offsets[index] : merged.offsets[index + 1]] = part
            bar.update(len(token_logps) * run.world_size)
    bar.close()
    dist.all_reduce(logps)  # each token's is set by one process and 0 in the others

    for number, group in enumerate(groups):
        group_logps = logps[merged.offsets[number] : merged.offsets[number + 1]]
        lengths = [examples.num_completion_tokens([index]) for examples, index in group]
        for (examples, index), part in zip(group, group_logps.split(lengths)):
            examples.set_reference_logps(index, part.numpy())


def read_reference_logps(
    example_sets: list[Examples], indices: Sequence[int], file_name: str, run: Run
) -> bool:
    """Read what was written before the run was resumed. Returns whether it has all examples."""
    tensors = {}
    if run.rank == 0:
        tensors = run.read_tensors(file_name, arithmetic(run))
    for name, examples in zip(("logps", "mismatched_logps"), example_sets):
        logps = torch.from_numpy(examples.reference_logps)  # shares its memory
        stored = tensors.get(name)
        if stored is not None and stored.shape == logps.shape:
            logps.copy_(stored)
        dist.broadcast(logps, src=0)
        for index in indices:
            if np.isnan(examples.get_reference_logps(index)).any():
                return False
    return True


def arithmetic(run: Run) -> str:
    """What the rounding of log-probabilities depends on, in words.

    A reference that was computed in another way would add rounding to every log-ratio.
    """
    dtype = "bfloat16" if run.bfloat16 else str(run.dtype)
    sharding = "sharded" if run.world_size > 1 else "one process"
    return f"{device_name(run.device)}, {dtype}, {sharding}, {type(run.layout).__name__}"


def check_first_step(log_ratios: Tensor, num_tokens: int, run: Run) -> None:
    """Warn if policy and reference differ in the first step, before the policy was changed.

    In bfloat16 they differ by rounding, by 0.005 nats per token where it was measured: the packed
    layout of the reference pass has other neighbors.

    log_ratios: (B, ...) of the completions of the first global batch. num_tokens: of all of them.
    """
    per_token = log_ratios.abs().sum().item() / num_tokens
    run.write_record(first_log_ratio_per_token=per_token)
    if per_token > (0.03 if run.bfloat16 else 1e-4):
        run.print(
            f"warning: in the first step, policy and reference differ by {per_token:.2g} nats per "
            "token, although they are the same model; the reference log-probabilities are stale, "
            "or the number format is too coarse"
        )


# ----------------------------------------------------------------------------- the rest of a step


def make_optimizer(policy: Policy, config) -> torch.optim.Optimizer:
    """RMSprop, as in the authors' code, or AdamW, as in the KTO paper; without weight decay.

    All other settings are torch's defaults.
    """
    # Update all weights at once on a GPU. That is torch's own default, but not for FSDP's shards.
    foreach = next(policy.parameters()).is_cuda
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            policy.parameters(), lr=config.lr, weight_decay=0.0, foreach=foreach
        )
    return torch.optim.RMSprop(policy.parameters(), lr=config.lr, foreach=foreach)


def clip_gradient(policy: Policy, max_norm: float) -> float:
    """Scale the gradient down to this norm, over all processes. Returns its norm before that."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    if hasattr(norm, "full_tensor"):  # of sharded parameters
        norm = norm.full_tensor()
    return norm.item()


def check_finite(losses: Tensor, grad_norm: float, batch: Sequence[int], step: int) -> None:
    """Raise FloatingPointError, before the optimizer takes the step, if it would spoil the weights.

    losses: (B,) of the global batch. batch: the indices of its examples.
    """
    bad = [index for index, loss in zip(batch, losses.tolist()) if not math.isfinite(loss)]
    if bad or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"step {step} was not taken: the loss of {len(bad)} of {len(batch)} examples is not "
            f"finite (training examples {', '.join(map(str, bad[:8])) or 'none'}, counted from 0), "
            f"and the gradient norm is {grad_norm}"
        )
