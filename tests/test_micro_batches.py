"""A global batch in micro-batches: the examples, their division among processes, and gathering."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_process_group
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import common
from archangel.packed import PackedLayout

LAYOUTS = {"padded": common.PaddedLayout(), "packed": PackedLayout()}


def example_of(prompt_length: int, *completion_lengths: int) -> common.Example:
    """An example of these lengths."""
    return common.Example([1] * prompt_length, [[1] * length for length in completion_lengths])


def examples_of(*lengths: tuple[int, ...]) -> list[common.Example]:
    return [example_of(*each) for each in lengths]


# The lengths of a prompt and of one to three completions, for each example of a batch.
LENGTHS = st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4), max_size=40)


# -------------------------------------------------------------------------------------- examples


def test_examples_columns():
    examples = common.Examples()
    prompt = np.array([5, 6, 7], dtype=np.int32)
    examples.append(common.Example(prompt, [[1, 2], [3]]), was_cut=True)
    examples.append(common.Example(prompt[:2], [[4]]), desirable=True)
    examples.append(common.Example(prompt.copy(), [[1, 2, 3, 4]]), record_number=7, desirable=False)
    assert len(examples) == 3
    assert list(examples.length) == [5, 3, 7]
    assert list(examples.num_tokens) == [6, 3, 7]
    assert list(examples.prompt_number) == [0, 1, 0]
    assert list(examples.record_number) == [0, 1, 7]
    assert examples.was_cut == [True, False, False]
    assert examples.desirable == [None, True, False]
    assert list(examples.offsets) == [0, 3, 4, 8]
    assert examples.reference_logps is None
    assert examples.mismatched is None
    assert examples[1].completions_ids == [[4]]
    assert [len(example.prompt_ids) for example in examples] == [3, 2, 3]


def test_prompt_number_of_equal_prompts():
    prompts = [[1, 2], [1], [2, 1], [1, 2], [1, 2, 0], [1]]
    examples = common.Examples()
    for prompt in prompts:
        examples.append(common.Example(np.array(prompt, dtype=np.int32), [[3]]))
    assert list(examples.prompt_number) == [0, 1, 2, 0, 3, 1]


def test_empty_examples():
    examples = common.Examples()
    assert len(examples) == 0
    assert not examples
    assert examples.num_completion_tokens([]) == 0
    with pytest.raises(IndexError):
        examples[0]


@given(LENGTHS, st.data())
def test_num_completion_tokens(lengths, data):
    examples = common.Examples()
    for each in lengths:
        examples.append(example_of(*each))
    assume(lengths)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    expected = 0
    for index in indices:
        expected += sum(lengths[index][1:])
    assert examples.num_completion_tokens(indices) == expected
    assert examples.offsets[-1] == examples.num_completion_tokens(range(len(examples)))


def test_get_reference_logps():
    """It is a view: what is written into it is written into the flat array."""
    examples = common.Examples()
    for lengths in ((3, 2, 1), (2, 1), (1, 4)):
        examples.append(example_of(*lengths))
    examples.reference_logps = np.arange(8.0)
    assert examples.get_reference_logps(0).tolist() == [0, 1, 2]
    assert examples.get_reference_logps(1).tolist() == [3]
    assert examples.get_reference_logps(2).tolist() == [4, 5, 6, 7]
    examples.get_reference_logps(1)[:] = -1
    assert examples.reference_logps[3] == -1


# ------------------------------------------------------------------------------- shuffled_passes


@given(
    num_items=st.integers(1, 12),
    seed=st.tuples(st.integers(0, 5)),
    length=st.integers(0, 48),
)
def test_shuffled_passes_are_permutations(num_items, seed, length):
    whole = common.shuffled_passes(num_items, 4 * num_items, seed)
    assert all(type(item) is int for item in whole)
    for start in range(0, 4 * num_items, num_items):
        assert sorted(whole[start : start + num_items]) == list(range(num_items))
    part = common.shuffled_passes(num_items, length, seed)
    assert len(part) == length
    shorter = min(length, 4 * num_items)
    assert part[:shorter] == whole[:shorter]


def test_shuffled_passes_differ():
    whole = common.shuffled_passes(50, 200, seed=(1, 0))
    passes = {tuple(whole[start : start + 50]) for start in range(0, 200, 50)}
    assert len(passes) == 4
    assert tuple(range(50)) not in passes


def test_shuffled_passes_depend_on_all_of_the_seed():
    orders = set()
    for seed in ((1, 0), (2, 0), (1, 1), (0, 1), (0,), (2, 1)):
        orders.add(tuple(common.shuffled_passes(50, 50, seed)))
    assert len(orders) == 6


def test_shuffled_passes_depend_on_nothing_else():
    order = common.shuffled_passes(50, 100, seed=(1, 0))
    np.random.seed(5)
    torch.manual_seed(5)
    assert common.shuffled_passes(50, 100, seed=(1, 0)) == order


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(lengths=LENGTHS)
def test_num_tokens(layout, lengths):
    """It is the size of the sequences that the layout makes."""
    assume(lengths)
    examples = examples_of(*lengths)
    inputs, _ = layout.collate(examples, "cpu")
    assert layout.num_tokens(examples) == inputs["input_ids"].numel()


def test_num_tokens_by_hand():
    examples = examples_of((2, 8, 8), (10, 9))
    assert LAYOUTS["padded"].num_tokens(examples) == 3 * 19
    assert LAYOUTS["packed"].num_tokens(examples) == 2 + 8 + 8 + 10 + 9
    for layout in LAYOUTS.values():
        assert layout.num_tokens([]) == 0


# ----------------------------------------------------------------------------------------- divide


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=300)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 200), num_processes=st.integers(1, 5))
def test_divide(layout, lengths, max_tokens, num_processes):
    examples = examples_of(*lengths)
    micro_batches = common.divide(examples, layout, max_tokens, num_processes)

    def num_tokens(places: list[int]) -> int:
        return layout.num_tokens([examples[place] for place in places])

    # Every example once; the same number of micro-batches on every process, at least one.
    assert len(micro_batches) >= 1
    divided = []
    for shares in micro_batches:
        assert len(shares) == num_processes
        for places in shares:
            divided.extend(places)
    assert sorted(divided) == list(range(len(examples)))

    # The limit is kept, except by an example that alone exceeds it.
    for shares in micro_batches:
        for places in shares:
            assert len(places) <= 1 or num_tokens(places) <= max_tokens

    # No more micro-batches than needed: as many as if each took all that it can.
    in_order = []  # for each process, its examples, the largest first
    for process in range(num_processes):
        in_order.append([place for shares in micro_batches for place in shares[process]])
    num_needed = 1
    start = 0
    for stop in range(1, len(in_order[0]) + 1):
        if stop - start > 1 and any(num_tokens(own[start:stop]) > max_tokens for own in in_order):
            num_needed += 1
            start = stop - 1
    assert len(micro_batches) == num_needed

    # Balance: in every micro-batch, and in all of them, loads differ by one example at most.
    total_loads = [0] * num_processes
    largest = max([num_tokens([place]) for place in range(len(examples))], default=0)
    for shares in micro_batches:
        loads = []
        sizes = [0]
        for places in shares:
            sizes_of_share = [num_tokens([place]) for place in places]
            loads.append(sum(sizes_of_share))
            sizes.extend(sizes_of_share)
        assert max(loads) - min(loads) <= max(sizes)
        for process, load in enumerate(loads):
            total_loads[process] += load
    assert max(total_loads) - min(total_loads) <= largest

    # Only the last micro-batch can have processes without examples.
    for shares in micro_batches[:-1]:
        assert all(shares)


def divide_lengths(
    lengths: list[tuple[int, ...]], max_tokens: int, num_processes: int, layout: str = "packed"
) -> list[list[list[int]]]:
    return common.divide(examples_of(*lengths), LAYOUTS[layout], max_tokens, num_processes)


def test_divide_equal_examples():
    assert divide_lengths([(7, 3)] * 8, 40, 2) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert divide_lengths([(7, 3)] * 9, 40, 2) == [[[0, 2, 4], [1, 3, 5]], [[6, 8], [7]]]
    assert divide_lengths([(7, 3)] * 3, 39, 1) == [[[0, 1, 2]]]
    assert divide_lengths([(7, 3)] * 3, 29, 1) == [[[0, 1]], [[2]]]


def test_divide_by_size():
    """The largest come first. Each round gives one example to each process."""
    lengths = [(10, 10), (80, 10), (20, 10), (30, 10)]  # 20, 90, 30 and 40 tokens
    assert divide_lengths(lengths, 200, 2) == [[[1, 2], [3, 0]]]
    assert divide_lengths(lengths, 110, 2) == [[[1], [3]], [[2], [0]]]
    assert divide_lengths(lengths, 200, 1) == [[[1, 3, 2, 0]]]
    assert divide_lengths(lengths, 179, 1) == [[[1]], [[3, 2, 0]]]


def test_divide_evenly():
    """Filled to the limit one by one, they would have 8,160 and 1,120 tokens."""
    micro_batches = divide_lengths([(160, 80, 80)] * 29, 8192, 1)
    assert [320 * len(places) for [places] in micro_batches] == [4800, 4480]
    # In five, the smallest has more than a third of the largest; filled one by one, a ninth.
    lengths = [(length, 10) for length in range(10, 200)]
    micro_batches = divide_lengths(lengths, 5100, 1)
    loads = [sum(20 + place for place in places) for [places] in micro_batches]
    assert len(loads) == 5
    assert min(loads) > max(loads) / 3


def test_divide_an_example_above_the_limit():
    assert divide_lengths([(3, 4), (90, 10), (3, 4)], 20, 1) == [[[1]], [[0, 2]]]
    assert divide_lengths([(90, 10)], 20, 2) == [[[0], []]]


def test_divide_counts_padding():
    lengths = [(8, 1), (1, 1), (1, 3)]
    assert divide_lengths(lengths, 15, 1, "packed") == [[[0, 2, 1]]]
    assert divide_lengths(lengths, 15, 1, "padded") == [[[0]], [[2, 1]]]
    # Padded, two sequences of 10 and one of 19 tokens are three of 19: 57 tokens.
    lengths = [(2, 8, 8), (10, 9)]
    assert divide_lengths(lengths, 56, 1, "padded") == [[[0]], [[1]]]
    assert divide_lengths(lengths, 57, 1, "padded") == [[[0, 1]]]
    assert divide_lengths(lengths, 37, 1, "packed") == [[[1, 0]]]


def test_divide_fewer_examples_than_processes():
    assert divide_lengths([(4, 1)], 10, 3) == [[[0], [], []]]
    assert divide_lengths([], 10, 3) == [[[], [], []]]
    assert divide_lengths([(4, 1)] * 3, 5, 2) == [[[0], [1]], [[2], []]]


# ----------------------------------------------------------------- make_micro_batches and gather


def fake_run(rank: int, world_size: int, max_tokens: int, layout: str) -> SimpleNamespace:
    """What make_micro_batches reads of a run."""
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        layout=LAYOUTS[layout],
        device="cpu",
        config=SimpleNamespace(micro_batch_tokens=max_tokens),
    )


def distinct_examples(lengths: list[list[int]]) -> common.Examples:
    """Examples of these lengths, in which every completion token is another one.

    The reference log-probability of token n is -n.
    """
    examples = common.Examples()
    token = 0
    for prompt_length, *completion_lengths in lengths:
        completions_ids = []
        for length in completion_lengths:
            completions_ids.append(list(range(token, token + length)))
            token += length
        examples.append(common.Example([0] * prompt_length, completions_ids))
    examples.reference_logps = -np.arange(float(token))
    return examples


@given(
    lengths=LENGTHS.filter(bool),
    draws=st.lists(st.integers(0, 1000), min_size=1, max_size=20),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(1, 200),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_make_micro_batches(lengths, draws, world_size, max_tokens, layout):
    """The processes' micro-batches hold the batch once, each example with its own values.

    A batch may have an example twice, as KTO's has if one class is smaller than half a batch.
    """
    examples = distinct_examples(lengths)
    batch = [draw % len(lengths) for draw in draws]
    found = {}  # place in the batch -> completion tokens
    num_micro_batches = set()
    for rank in range(world_size):
        run = fake_run(rank, world_size, max_tokens, layout)
        micro_batches = common.make_micro_batches(examples, batch, run)
        num_micro_batches.add(len(micro_batches))
        for micro_batch in micro_batches:
            assert torch.equal(micro_batch.reference_logps, -micro_batch.targets.double())
            targets = micro_batch.targets.tolist()
            for place in micro_batch.places.tolist():
                assert place not in found
                num_tokens = examples.num_completion_tokens([batch[place]])
                found[place] = targets[:num_tokens]
                targets = targets[num_tokens:]
            assert targets == []
    assert len(num_micro_batches) == 1
    expected = {}
    for place, index in enumerate(batch):
        expected[place] = list(range(examples.offsets[index], examples.offsets[index + 1]))
    assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_make_micro_batches_without_examples(layout):
    """A process without examples has a micro-batch that predicts nothing, for FSDP."""
    examples = distinct_examples([[2, 3]])
    (micro_batch,) = common.make_micro_batches(examples, [0], fake_run(1, 2, 100, layout))
    assert micro_batch.places.tolist() == []
    assert micro_batch.targets.tolist() == []
    assert micro_batch.reference_logps.tolist() == []
    assert micro_batch.inputs["input_ids"].numel() == 1
    assert micro_batch.sum_completions(torch.zeros(0)).shape == (0,)


def test_make_micro_batches_without_a_reference():
    examples = distinct_examples([[2, 3], [1, 1]])
    examples.reference_logps = None
    (micro_batch,) = common.make_micro_batches(examples, [1, 0], fake_run(0, 1, 100, "padded"))
    assert micro_batch.reference_logps is None
    assert micro_batch.places.tolist() == [1, 0]
    assert micro_batch.targets.tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def process_group():
    with one_process_group():
        yield


@pytest.mark.parametrize("shape", [(), (2,)], ids=["B", "B, 2"])
def test_gather_batch(process_group, shape):
    """The values come in the order of the batch, from several micro-batches of unequal size."""
    batch = [2, 0, 1, 3, 0]
    examples = distinct_examples([[4, 1], [9, 1], [2, 1], [7, 1]])
    torch.manual_seed(0)
    expected = torch.randn(len(batch), *shape, dtype=torch.float64)
    micro_batches = common.make_micro_batches(examples, batch, fake_run(0, 1, 12, "packed"))
    assert len(micro_batches) == 4  # the two examples of 5 tokens are in one
    values = []
    for micro_batch in micro_batches:
        values.append(expected[micro_batch.places].requires_grad_())
    gathered = common.gather_batch(values, micro_batches, len(batch))
    assert torch.equal(gathered, expected)
    assert gathered.dtype == torch.float64
    assert not gathered.requires_grad
    assert all(value.requires_grad for value in values)


@pytest.mark.parametrize("world_size", [2, 7])
def test_gather_of_several_processes(process_group, world_size):
    """Places of other processes' examples are 0, so that the sum over processes is the batch."""
    batch = [2, 0, 1, 3, 0]
    examples = distinct_examples([[4, 1], [9, 1], [2, 1], [7, 1]])
    expected = torch.arange(1.0, 6.0)
    total = torch.zeros(len(batch))
    for rank in range(world_size):
        run = fake_run(rank, world_size, 12, "padded")
        micro_batches = common.make_micro_batches(examples, batch, run)
        values = [expected[micro_batch.places] for micro_batch in micro_batches]
        total += common.gather_batch(values, micro_batches, len(batch))
    assert torch.equal(total, expected)
