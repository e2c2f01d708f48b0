"""Which examples a step takes: the same on any machine, each once an epoch, classes balanced."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
import dpo
import kto
import ppo_offline
import sft


def examples(desirable: int, undesirable: int) -> list[dict]:
    """Examples that can be told apart, the classes mixed."""
    labels = [True] * desirable + [False] * undesirable
    np.random.default_rng(0).shuffle(labels)
    return [{"name": i, "desirable": bool(label)} for i, label in enumerate(labels)]


def settings(batch_size: int, seed: int = 1) -> SimpleNamespace:
    return SimpleNamespace(batch_size=batch_size, seed=seed, data="rows", max_length=30)


def names(batch: list[dict]) -> list[int]:
    return [example["name"] for example in batch]


@given(st.integers(1, 60), st.integers(1, 20))
def test_an_epoch_of_pairs_passes_once_over_all(n, batch_size):
    rows, config = examples(n, 0), settings(batch_size)
    steps = dpo.steps_per_epoch(rows, config)
    first, second = (
        [names(dpo.global_batch(rows, config, epoch * steps + k)) for k in range(steps)]
        for epoch in (0, 1)
    )
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(n))
    assert all(len(batch) == batch_size for batch in first[:-1])
    assert n < 20 or first != second


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_unpaired_batches_are_balanced_and_pass_once_over_the_larger_class(good, bad, half):
    rows, config = examples(good, bad), settings(2 * half)
    steps = kto.steps_per_epoch(rows, config)
    batches = [kto.global_batch(rows, config, step) for step in range(steps)]
    for batch in batches:
        assert sum(example["desirable"] for example in batch) * 2 == len(batch) <= 2 * half
    larger = good >= bad
    seen = [e["name"] for batch in batches for e in batch if e["desirable"] == larger]
    assert sorted(seen) == [e["name"] for e in rows if e["desirable"] == larger]
    smaller = [e["name"] for batch in batches for e in batch if e["desirable"] != larger]
    counts = np.bincount(smaller, minlength=len(rows))[[e["desirable"] != larger for e in rows]]
    assert counts.max() - counts.min() <= 1  # the smaller repeats, evenly


def test_ten_to_one_repeats_the_smaller_class_in_new_orders():
    rows, config = examples(100, 10), settings(20)
    assert kto.steps_per_epoch(rows, config) == 10
    passes = [
        [e["name"] for e in kto.global_batch(rows, config, step) if not e["desirable"]]
        for step in range(10)
    ]
    assert len({tuple(order) for order in passes}) == 10
    assert all(sorted(order) == sorted(passes[0]) for order in passes)


def test_losses_of_a_kind_see_the_same_rows_in_the_same_order_and_seeds_differ():
    rows, config = examples(50, 50), settings(8)
    for step in (0, 7, 40):
        assert names(kto.global_batch(rows, config, step)) == names(
            ppo_offline.global_batch(rows, config, step)
        )
        assert names(dpo.global_batch(rows, config, step)) == names(
            sft.global_batch(rows, config, step)
        )
        assert names(dpo.global_batch(rows, config, step)) != names(
            dpo.global_batch(rows, settings(8, seed=2), step)
        )


def test_partners_are_of_another_prompt_drawn_once_and_fit():
    rng = np.random.default_rng(3)
    rows = [
        {
            "prompt_ids": np.full(rng.integers(1, 20), i % 7, dtype=np.int32),
            "completions_ids": [np.full(rng.integers(1, 10), i, dtype=np.int32)],
        }
        for i in range(50)
    ]
    common.add_partners(rows, settings(8))
    partners = [row["partner"] for row in rows]
    for row, partner in zip(rows, partners):
        assert partner["prompt_ids"] is row["prompt_ids"]
        (ids,) = partner["completions_ids"]
        whole = rows[ids[0]]["completions_ids"][0]
        assert rows[ids[0]]["prompt_ids"].tobytes() != row["prompt_ids"].tobytes()
        assert 1 <= len(ids) <= len(whole) and len(row["prompt_ids"]) + len(ids) <= 30
    again = [dict(row) for row in rows]
    common.add_partners(again, settings(8))
    assert [r["partner"]["completions_ids"][0].tolist() for r in again] == [
        partner["completions_ids"][0].tolist() for partner in partners
    ]
    common.add_partners(again, settings(8, seed=2))
    assert any(
        not np.array_equal(r["partner"]["completions_ids"][0], partner["completions_ids"][0])
        for r, partner in zip(again, partners)
    )


def test_one_class_or_one_prompt_is_refused():
    with pytest.raises(common.UserError, match="every label is False"):
        kto.classes(examples(0, 3), settings(4))
    same = [{"prompt_ids": np.ones(3), "completions_ids": [np.ones(1)]} for _ in range(3)]
    with pytest.raises(common.UserError, match="two different prompts"):
        common.add_partners(same, settings(4))


@pytest.mark.parametrize("kl", ["mismatched", "other_half"])
def test_reference_point_of_negative_log_ratios_is_clamped(kl, monkeypatch):
    monkeypatch.setattr(common, "gather", lambda parts, size, run: parts)
    desirable = torch.tensor([True, True, False])
    config = SimpleNamespace(kl=kl)
    for r, means in (([-1.0, -4.0, 2.0], [2.0, 2.0, 0.0]), ([1.0, 3.0, 5.0], [5.0, 5.0, 2.0])):
        found = kto.reference_point({"r": torch.tensor(r)}, desirable, config, None)
        mean = max(0.0, sum(r) / 3)
        assert found.tolist() == (means if kl == "other_half" else [mean] * 3)


def test_log_ratios_of_the_reference_point_have_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    micro = SimpleNamespace(sum=lambda values: values, reference_logps=torch.zeros(2))
    assert not kto.detached_log_ratios(lambda _: weight * 2, micro).requires_grad
