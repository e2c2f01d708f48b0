"""Records to examples, and which examples a step takes: DPO's pairs, and KTO's two classes."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_process_group, word_tokenizer, words
from hypothesis import given
from hypothesis import strategies as st

import common
import dpo
import kto
import ppo_offline
import sft
import slic
from archangel.tokenized import TokenizedRecords, tokenize

SEEDS = st.integers(0, 2**31)


def labelled_examples(num_desirable: int, num_undesirable: int) -> common.Examples:
    """Examples with different prompts, the classes mixed."""
    labels = [True] * num_desirable + [False] * num_undesirable
    np.random.default_rng(0).shuffle(labels)
    examples = common.Examples()
    for number, label in enumerate(labels):
        examples.append(common.Example([number], [[1]]), desirable=bool(label))
    return examples


def kto_config(**settings) -> kto.Config:
    return kto.Config(model="toy", data="data.jsonl", **settings)


def dpo_config(**settings) -> dpo.Config:
    return dpo.Config(model="toy", data="data.jsonl", **settings)


def split_by_label(batch: list[int], examples: common.Examples) -> tuple[list[int], list[int]]:
    """The desirable and the undesirable examples of a batch."""
    desirable = [index for index in batch if examples.desirable[index]]
    undesirable = [index for index in batch if not examples.desirable[index]]
    return desirable, undesirable


# ------------------------------------------------------------------------------- DPO's schedule


@given(
    num_examples=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=SEEDS,
)
def test_dpo_epoch_is_one_pass(num_examples, batch_size, epochs, seed):
    examples = labelled_examples(num_examples, 0)
    config = dpo_config(batch_size=batch_size, epochs=epochs, seed=seed)
    schedule = dpo.make_schedule(examples, config)
    steps_per_epoch = -(-num_examples // batch_size)
    assert len(schedule) == epochs * steps_per_epoch
    for start in range(0, len(schedule), steps_per_epoch):
        epoch = schedule[start : start + steps_per_epoch]
        assert sorted(sum(epoch, [])) == list(range(num_examples))
        for batch in epoch[:-1]:
            assert len(batch) == batch_size
        assert 1 <= len(epoch[-1]) <= batch_size


def test_dpo_last_batch_is_short():
    schedule = dpo.make_schedule(labelled_examples(70, 0), dpo_config(batch_size=32, epochs=2))
    assert [len(batch) for batch in schedule] == [32, 32, 6, 32, 32, 6]


def test_dpo_epochs_differ():
    config = dpo_config(batch_size=8, epochs=3)
    schedule = dpo.make_schedule(labelled_examples(40, 0), config)
    orders = {tuple(sum(schedule[start : start + 5], [])) for start in (0, 5, 10)}
    assert len(orders) == 3
    assert tuple(range(40)) not in orders


# ------------------------------------------------------------------------------- KTO's schedule


@given(
    num_desirable=st.integers(1, 40),
    num_undesirable=st.integers(1, 40),
    half=st.integers(1, 8),
    epochs=st.integers(1, 3),
    seed=SEEDS,
)
def test_kto_epoch_is_one_pass_of_the_larger_class(
    num_desirable, num_undesirable, half, epochs, seed
):
    examples = labelled_examples(num_desirable, num_undesirable)
    config = kto_config(batch_size=2 * half, epochs=epochs, seed=seed)
    schedule = kto.make_schedule(examples, config)
    num_larger = max(num_desirable, num_undesirable)
    steps_per_epoch = -(-num_larger // half)
    assert len(schedule) == epochs * steps_per_epoch

    for batch in schedule:
        desirable, undesirable = split_by_label(batch, examples)
        assert 1 <= len(desirable) == len(undesirable) <= half

    all_smaller = []
    for start in range(0, len(schedule), steps_per_epoch):
        epoch = schedule[start : start + steps_per_epoch]
        for batch in epoch[:-1]:
            assert len(batch) == 2 * half
        larger, smaller = split_by_label(sum(epoch, []), examples)
        if num_desirable < num_undesirable:
            larger, smaller = smaller, larger
        assert len(set(larger)) == len(larger) == num_larger
        all_smaller.extend(smaller)
    # The smaller class repeats evenly: each of its examples before any comes once more.
    num_smaller = min(num_desirable, num_undesirable)
    for start in range(0, len(all_smaller), num_smaller):
        one_pass = all_smaller[start : start + num_smaller]
        assert len(set(one_pass)) == len(one_pass)
    counts = Counter(all_smaller)
    assert len(counts) == num_smaller
    assert max(counts.values()) - min(counts.values()) <= 1


def test_kto_smaller_class_repeats_in_new_orders():
    examples = labelled_examples(100, 10)
    schedule = kto.make_schedule(examples, kto_config(batch_size=20))
    assert len(schedule) == 10
    orders = set()
    for batch in schedule:
        _, undesirable = split_by_label(batch, examples)
        assert sorted(undesirable) == split_by_label(range(110), examples)[1]
        orders.add(tuple(undesirable))
    assert len(orders) == 10


def test_kto_last_batch_is_short():
    schedule = kto.make_schedule(labelled_examples(7, 10), kto_config(batch_size=8, epochs=2))
    assert [len(batch) for batch in schedule] == [8, 8, 4, 8, 8, 4]


@pytest.mark.parametrize("label", [True, False])
def test_kto_refuses_one_class(label):
    examples = labelled_examples(3 * label, 3 * (not label))
    with pytest.raises(common.UserError, match=f"data.jsonl: every label is {label}"):
        kto.make_schedule(examples, kto_config(batch_size=4))


# ---------------------------------------------------------------------------------- both of them

MAKERS = {"dpo": (dpo.make_schedule, dpo_config), "kto": (kto.make_schedule, kto_config)}


@pytest.mark.parametrize("make_schedule, config_of", MAKERS.values(), ids=MAKERS)
@given(
    num_steps=st.integers(1, 30),
    epochs=st.integers(1, 3),
    num_desirable=st.integers(1, 20),
    seed=SEEDS,
)
def test_max_steps(make_schedule, config_of, num_steps, epochs, num_desirable, seed):
    """A schedule of so many steps, whatever --epochs, is the beginning of every longer one."""
    examples = labelled_examples(num_desirable, 9)
    config = config_of(batch_size=4, max_steps=num_steps, epochs=epochs, seed=seed)
    schedule = make_schedule(examples, config)
    assert len(schedule) == num_steps
    longer = make_schedule(examples, config_of(batch_size=4, epochs=30, seed=seed))
    assert schedule == longer[:num_steps]


@pytest.mark.parametrize("make_schedule, config_of", MAKERS.values(), ids=MAKERS)
def test_order_depends_on_the_seed_alone(make_schedule, config_of):
    examples = labelled_examples(50, 50)
    schedule = make_schedule(examples, config_of(batch_size=8, seed=1))
    np.random.seed(5)
    other_settings = {"lr": 1.0, "out": "elsewhere", "micro_batch_tokens": 100}
    assert make_schedule(examples, config_of(batch_size=8, seed=1, **other_settings)) == schedule
    assert make_schedule(examples, config_of(batch_size=8, seed=2)) != schedule


@pytest.mark.parametrize("script", [slic, sft])
@pytest.mark.parametrize("seed", [1, 2])
def test_losses_on_pairs_see_the_same_order(script, seed):
    examples = labelled_examples(50, 0)
    config = dpo_config(batch_size=8, epochs=2, seed=seed)
    assert script.make_schedule(examples, config) == dpo.make_schedule(examples, config)


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_on_labels_see_the_same_order(seed):
    examples = labelled_examples(50, 30)
    config = kto_config(batch_size=8, epochs=2, seed=seed)
    assert ppo_offline.make_schedule(examples, config) == kto.make_schedule(examples, config)


# --------------------------------------------------------------------------- records to examples

PAIRS = [
    {"prompt": words(20, 21), "chosen": words(30), "rejected": words(31, 32)},
    {"prompt": words(22), "chosen": words(33, 34, 35), "rejected": words(36)},
    {"prompt": words(20, 21), "chosen": words(37), "rejected": words(38)},
]
UNPAIRED = [
    {"prompt": words(22), "completion": words(39), "label": False},
    {"prompt": words(23), "completion": words(40), "label": True},
]


def tokenized(records: list[dict]) -> TokenizedRecords:
    """Records whose texts are of words()."""
    return tokenize(records, word_tokenizer())


def ids_of(example: common.Example) -> tuple[list[int], list[list[int]]]:
    return example.prompt_ids.tolist(), [ids.tolist() for ids in example.completions_ids]


def test_dpo_make_examples():
    examples = dpo.make_examples(tokenized(PAIRS), dpo_config())
    assert [ids_of(example) for example in examples] == [
        ([20, 21], [[30, 1], [31, 32, 1]]),
        ([22], [[33, 34, 35, 1], [36, 1]]),
        ([20, 21], [[37, 1], [38, 1]]),
    ]
    assert list(examples.record_number) == [0, 1, 2]
    assert list(examples.prompt_number) == [0, 1, 0]
    assert examples.desirable == [None] * 3
    assert examples.was_cut == [False] * 3


def test_kto_make_examples():
    """A pair makes a desirable and an undesirable example, of one record and one prompt."""
    examples = kto.make_examples(tokenized(PAIRS + UNPAIRED), kto_config())
    assert [ids_of(example) for example in examples] == [
        ([20, 21], [[30, 1]]),
        ([20, 21], [[31, 32, 1]]),
        ([22], [[33, 34, 35, 1]]),
        ([22], [[36, 1]]),
        ([20, 21], [[37, 1]]),
        ([20, 21], [[38, 1]]),
        ([22], [[39, 1]]),
        ([23], [[40, 1]]),
    ]
    assert list(examples.record_number) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert list(examples.prompt_number) == [0, 0, 1, 1, 0, 0, 1, 2]
    assert examples.desirable == [True, False, True, False, True, False, False, True]
    assert examples.was_cut == [False] * 8
    assert examples.mismatched is None


def test_ppo_make_examples():
    """As KTO's."""
    config = ppo_offline.Config(model="toy")
    ours = ppo_offline.make_examples(tokenized(PAIRS + UNPAIRED), config)
    theirs = kto.make_examples(tokenized(PAIRS + UNPAIRED), kto_config())
    assert [ids_of(example) for example in ours] == [ids_of(example) for example in theirs]
    assert ours.record_number == theirs.record_number
    assert ours.desirable == theirs.desirable


def test_slic_make_examples():
    """A target is the third completion, unless it is the chosen one."""
    records = [
        PAIRS[0],
        {**PAIRS[1], "target": PAIRS[1]["chosen"]},
        {**PAIRS[2], "target": words(41, 42)},
    ]
    examples = slic.make_examples(tokenized(records), slic.Config(model="toy"))
    assert [ids_of(example) for example in examples] == [
        ([20, 21], [[30, 1], [31, 32, 1]]),
        ([22], [[33, 34, 35, 1], [36, 1]]),
        ([20, 21], [[37, 1], [38, 1], [41, 42, 1]]),
    ]


def test_slic_locate_completions():
    """With and without a target of its own, in the order of the micro-batch."""
    two = common.Example([1], [[2], [3]])
    three = common.Example([1], [[2], [3], [4]])
    examples = common.Examples()
    for example in (two, three, two):
        examples.append(example)
    batch = [2, 1, 0, 1]
    micro_batch = SimpleNamespace(places=torch.tensor([3, 0, 1]))  # the examples 1, 2 and 1
    found = slic.locate_completions(examples, batch, micro_batch)
    assert [numbers.tolist() for numbers in found] == [[0, 3, 5], [1, 4, 6], [2, 3, 7]]
    micro_batch = SimpleNamespace(places=torch.tensor([], dtype=torch.long))
    for numbers in slic.locate_completions(examples, batch, micro_batch):
        assert numbers.dtype == torch.long
        assert len(numbers) == 0


def test_sft_make_examples():
    """Chosen and desirable completions; a target takes their place, once for each prompt."""
    records = [
        *PAIRS,
        {**PAIRS[0], "target": words(41)},
        {**PAIRS[2], "target": words(41)},
        {**PAIRS[1], "target": words(41)},
        *UNPAIRED,
        {"prompt": words(24), "completion": words(43)},
        {"prompt": words(24), "completion": words(43)},
    ]
    examples = sft.make_examples(tokenized(records), sft.Config(model="toy"))
    assert [ids_of(example) for example in examples] == [
        ([20, 21], [[30, 1]]),
        ([22], [[33, 34, 35, 1]]),
        ([20, 21], [[37, 1]]),
        ([20, 21], [[41, 1]]),
        ([22], [[41, 1]]),
        ([23], [[40, 1]]),
        ([24], [[43, 1]]),
        ([24], [[43, 1]]),
    ]
    assert list(examples.record_number) == [0, 1, 2, 3, 5, 7, 8, 9]
    assert examples.left_out == {
        "the same target of the same prompt again": {"records": 1, "first": "record 5"},
        "undesirable": {"records": 1, "first": "record 7"},
    }


@pytest.mark.parametrize("script", [dpo, kto, ppo_offline, slic])
def test_make_examples_says_what_was_cut(script):
    """With their longest completions, the pairs have 5, 5 and 4 tokens, of which 4 may stay."""
    config = script.Config(model="toy", max_length=4, max_prompt_length=2)
    examples = script.make_examples(tokenized(PAIRS), config)
    was_cut = dict(zip(examples.record_number, examples.was_cut))
    assert was_cut == {0: True, 1: True, 2: False}
    assert len(set(zip(examples.record_number, examples.was_cut))) == 3
    assert max(examples.length) == 4


# ---------------------------------------------------------------------------- mismatched examples


@st.composite
def prompts_and_lengths(draw) -> list[tuple[int, int, int]]:
    """For each example: its prompt's number, the length of that prompt, and of the completion."""
    prompt_lengths = draw(st.lists(st.integers(1, 11), min_size=2, max_size=5))
    numbers = st.integers(0, len(prompt_lengths) - 1)
    others = draw(st.lists(st.tuples(numbers, st.integers(1, 10)), max_size=20))
    drawn = [(0, 3), (1, 3), *others]  # at least two different prompts
    return [(number, prompt_lengths[number], length) for number, length in drawn]


def examples_with_prompts(drawn: list[tuple[int, int, int]]) -> common.Examples:
    """Examples whose completions begin with 10 + their own index, and end with token 1."""
    records = []
    for index, (number, prompt_length, completion_length) in enumerate(drawn):
        prompt = words(*[10 + number] * prompt_length)
        completion = words(*[10 + index] * completion_length)
        records.append({"prompt": prompt, "completion": completion, "label": True})
    return kto.make_examples(tokenized(records), kto_config(max_length=12, max_prompt_length=11))


@given(drawn=prompts_and_lengths(), seed=SEEDS)
def test_draw_mismatched(drawn, seed):
    config = kto_config(max_length=12, max_prompt_length=11, seed=seed)
    examples = examples_with_prompts(drawn)
    mismatched = kto.draw_mismatched(examples, config)
    assert len(mismatched) == len(examples)
    assert mismatched.record_number == examples.record_number
    for index, example in enumerate(mismatched):
        prompt_ids = examples[index].prompt_ids.tolist()
        assert example.prompt_ids.tolist() == prompt_ids
        (completion_ids,) = example.completions_ids
        other = completion_ids[0] - 10
        assert examples.prompt_number[other] != examples.prompt_number[index]
        _, _, other_length = drawn[other]
        whole = [10 + other] * other_length + [1]
        assert completion_ids.tolist() == whole[: 12 - len(prompt_ids)]
        assert mismatched.length[index] == len(prompt_ids) + len(completion_ids)


def mismatched_completions(examples: common.Examples, seed: int) -> list[int]:
    """The first token of each mismatched completion, which says of which example it is."""
    mismatched = kto.draw_mismatched(examples, kto_config(seed=seed))
    return [example.completions_ids[0][0] for example in mismatched]


def test_draw_mismatched_is_seeded():
    examples = examples_with_prompts([(number % 7, 3, 2) for number in range(50)])
    others = mismatched_completions(examples, seed=1)
    np.random.seed(5)
    assert mismatched_completions(examples, seed=1) == others
    assert mismatched_completions(examples, seed=2) != others
    assert len(set(others)) > 20


def test_draw_mismatched_refuses_one_prompt():
    """Equal prompts are one prompt, also if they are of several records. No examples are fine."""
    examples = examples_with_prompts([(4, 3, 1), (4, 3, 2), (4, 3, 5)])
    with pytest.raises(common.UserError, match="data.jsonl: .* two different prompts"):
        kto.draw_mismatched(examples, kto_config())
    assert len(kto.draw_mismatched(common.Examples(), kto_config())) == 0


def test_make_examples_draws_mismatched():
    """Once, and only for --kl mismatched. Both examples of a pair keep their pair and prompt."""
    config = kto_config(kl="mismatched")
    examples = kto.make_examples(tokenized(PAIRS + UNPAIRED), config)
    mismatched = examples.mismatched
    assert mismatched.record_number == examples.record_number
    for index, example in enumerate(mismatched):
        assert example.prompt_ids.tolist() == examples[index].prompt_ids.tolist()
    expected = kto.draw_mismatched(examples, config)
    assert [ids_of(each) for each in mismatched] == [ids_of(each) for each in expected]
    for kl in ("other_half", "zero"):
        examples = kto.make_examples(tokenized(PAIRS), kto_config(kl=kl))
        assert examples.mismatched is None


# ---------------------------------------------------------------------------- the reference point

RUN = SimpleNamespace(dtype=torch.float64, device="cpu")


def reference_point(
    monkeypatch, log_ratios: list[float], desirable: list[bool], kl: str
) -> list[float]:
    """The reference point if these log-ratios are measured, of the examples that --kl means."""
    asked = []

    def measure_log_ratios(policy, examples, batch, run):
        asked.append((examples, batch))
        return torch.tensor(log_ratios)

    monkeypatch.setattr(kto, "measure_log_ratios", measure_log_ratios)
    examples = labelled_examples(4, 4)
    examples.mismatched = labelled_examples(4, 4)
    for index, label in zip([3, 0, 5], desirable):
        examples.desirable[index] = label
    found = kto.estimate_kl(None, examples, [3, 0, 5], kto_config(kl=kl), RUN)
    assert found.shape == (3,)
    if asked:
        ((its_examples, batch),) = asked
        assert its_examples is (examples.mismatched if kl == "mismatched" else examples)
        assert batch == [3, 0, 5]
    return found.tolist()


def test_reference_point_of_the_other_half(monkeypatch):
    labels = [True, True, False]
    # Desirable examples are compared with the mean of the undesirable ones, and the reverse.
    assert reference_point(monkeypatch, [1.0, 3.0, 5.0], labels, "other_half") == [5, 5, 2]
    assert reference_point(monkeypatch, [-1.0, -4.0, 2.0], labels, "other_half") == [2, 2, 0]
    assert reference_point(monkeypatch, [1.0, -2.0, -5.0], labels, "other_half") == [0, 0, 0]


def test_reference_point_of_mismatched(monkeypatch):
    labels = [True, True, False]
    assert reference_point(monkeypatch, [1.0, 3.0, 5.0], labels, "mismatched") == [3, 3, 3]
    assert reference_point(monkeypatch, [-1.0, -4.0, 2.0], labels, "mismatched") == [0, 0, 0]


def test_reference_point_zero_measures_nothing():
    """Without a policy, it could not."""
    config = kto_config(kl="zero")
    found = kto.estimate_kl(None, None, [3, 0, 5], config, RUN)
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kl", ["other_half", "mismatched"])
def test_reference_point_has_no_gradient(kl):
    """Neither is there a graph while it is measured, which would take memory."""
    weight = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)

    def policy(micro_batch):
        assert not torch.is_grad_enabled()
        return weight * micro_batch.targets

    run = SimpleNamespace(
        dtype=torch.float64,
        device="cpu",
        rank=0,
        world_size=1,
        layout=common.PaddedLayout(),
        config=SimpleNamespace(micro_batch_tokens=5),
    )
    config = kto_config(kl=kl)
    examples = kto.make_examples(tokenized(PAIRS), kto_config(kl="mismatched"))
    for its_examples in (examples, examples.mismatched):
        its_examples.reference_logps = np.ones(its_examples.offsets[-1])
    assert [examples.desirable[index] for index in (3, 0, 4)] == [False, True, True]
    with one_process_group():
        found = kto.estimate_kl(policy, examples, [3, 0, 4], config, run)
    assert not found.requires_grad
    # The log-ratio of a completion is the sum of 2 * id - 1 over its tokens. Those of examples 3, 0
    # and 4 are of tokens 36, 30 and 37, with an end-of-sequence token 1 each.
    if kl == "other_half":
        assert found.tolist() == [(60 + 74) / 2, 72, 72]
    else:
        log_ratios = []
        for index in (3, 0, 4):
            completion_ids = examples.mismatched[index].completions_ids[0]
            log_ratios.append(sum(2 * completion_ids - 1))
        assert found.tolist() == pytest.approx([sum(log_ratios) / 3] * 3)


# ------------------------------------------------------------------------- evaluation at the start


def test_evaluation_of_the_reference_model():
    """Without a policy there is no forward pass: all log-ratios are 0."""
    examples = kto.make_examples(tokenized(PAIRS), kto_config())
    metrics = kto.evaluate(None, examples, kto_config(kl="mismatched"), RUN)
    assert metrics["eval_loss"] == 0.5
    assert metrics["eval_kl"] == metrics["eval_reward_margin"] == 0
    assert metrics["eval_reward_accuracy"] == 0.5
    examples = dpo.make_examples(tokenized(PAIRS[:2]), dpo_config())
    metrics = dpo.evaluate(None, examples, dpo_config(), RUN)
    assert metrics["eval_loss"] == pytest.approx(math.log(2))
    assert metrics["eval_reward_margin"] == 0
    assert metrics["eval_reward_accuracy"] == 0.5
    assert kto.evaluate(None, common.Examples(), kto_config(), RUN) == {}


def test_pair_accuracy():
    """The share of pairs whose desirable completion has the higher log-ratio; a tie is a half."""
    examples = common.Examples()
    pairs = [(0, True), (0, False), (1, False), (1, True), (2, True), (2, False), (3, True)]
    for record_number, desirable in pairs:
        example = common.Example([1], [[1]])
        examples.append(example, record_number=record_number, desirable=desirable)
    log_ratios = torch.tensor([2.0, 1.0, 3.0, -1.0, 0.5, 0.5, 9.0])
    assert kto.pair_accuracy(log_ratios, examples) == {"reward_accuracy": 0.5}
    log_ratios[2] = -2.0
    assert kto.pair_accuracy(log_ratios, examples) == {"reward_accuracy": pytest.approx(2.5 / 3)}
