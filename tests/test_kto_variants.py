"""KTO's variants for the ablations: the plain one is kto.py, and the others are what they say."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_metrics, train_here, write_toy_folder
from hypothesis import given
from hypothesis import strategies as st

import kto
from archangel import kto_variants
from archangel.errors import UserError
from common import Example, Examples

VARIANTS = "archangel.kto_variants"
SETTINGS = {
    "model": "toy",
    "lr": 1e-4,
    "warmup_steps": 2,
    "max_steps": 4,
    "batch_size": 8,
    "dtype": "float64",
}
DESIRABLE = torch.tensor([True, True, True, True, False, False, False, False])  # as in a batch


def make_config(**settings) -> kto_variants.Config:
    return kto_variants.Config(model="toy", data="toy", **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A few records, none of them held out."""
    return write_toy_folder(tmp_path_factory.mktemp("data"), 100)


def test_without_a_variant_it_is_kto(tmp_path, data):
    expected = train_here("kto", tmp_path / "kto", data=data, **SETTINGS)
    ours = train_here(VARIANTS, tmp_path / "ours", data=data, **SETTINGS)
    assert_same_metrics(ours, expected, 1e-12)


def test_variants_train_differently(tmp_path, data):
    """They begin with the loss of a gain of 0, since all log-ratios are 0 then."""
    plain = train_here(VARIANTS, tmp_path / "plain", data=data, **SETTINGS)
    for name, first_loss, settings in (
        ("attached", 0.5, {"attached": True}),
        ("groups", 0.5, {"group_size": 4}),
        ("both", 0.5, {"attached": True, "group_size": 4}),
        ("identity", 0.0, {"value": "identity"}),
        ("log_sigmoid", math.log(2), {"value": "log_sigmoid"}),
        ("equation_6", 0.0, {"value": "equation_6"}),
        ("equation_6_shifted", 0.0, {"value": "equation_6_shifted"}),
        ("data", 0.5, {"class_balance": "data"}),
    ):
        metrics = train_here(VARIANTS, tmp_path / name, data=data, **SETTINGS, **settings)
        assert metrics[0]["loss"] == pytest.approx(first_loss, abs=1e-9)
        assert metrics[-1]["loss"] != plain[-1]["loss"]
        assert metrics[-1]["grad_norm"] > 0


def test_class_balance_of_the_data():
    """One pass after the other over all examples, for as many steps as kto.py makes."""
    examples = Examples()
    for number in range(50):
        examples.append(Example([number], [[1]]), desirable=number % 10 == 0)
    config = make_config(class_balance="data", batch_size=10, epochs=2)
    schedule = kto_variants.make_schedule(examples, config)
    assert len(schedule) == len(kto.make_schedule(examples, config)) == 18  # 45 by 5, twice
    assert all(len(batch) == 10 for batch in schedule)
    for start in range(0, 15, 5):
        assert sorted(itertools.chain(*schedule[start : start + 5])) == list(range(50))
    equal = make_config(batch_size=10)
    assert kto_variants.make_schedule(examples, equal) == kto.make_schedule(examples, equal)


def test_mismatched_reference_point(tmp_path, data):
    """With --kl mismatched and zero it is kto.py, too."""
    for kl in ("mismatched", "zero"):
        expected = train_here("kto", tmp_path / f"kto_{kl}", data=data, kl=kl, **SETTINGS)
        ours = train_here(VARIANTS, tmp_path / f"ours_{kl}", data=data, kl=kl, **SETTINGS)
        assert_same_metrics(ours, expected, 1e-12)


@given(st.floats(-20, 20), st.floats(0.01, 5))
def test_values_increase(gain, more):
    gains = torch.tensor([gain, gain + more], dtype=torch.float64)
    for name in ("sigmoid", "identity", "log_sigmoid", "equation_6", "equation_6_shifted"):
        values = kto_variants.value_of(gains, name)
        assert values[1] > values[0]


@pytest.mark.parametrize("name", ["equation_6", "equation_6_shifted"])
def test_equation_6(name):
    """Far from 0 it is equation (6), less a constant; and its slope at 0 is what is said."""
    gains = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    expected = kto.kahneman_tversky_value(gains, 0.0)
    constant = kto_variants.SMOOTHING**kto_variants.ALPHA
    expected += torch.tensor([2.25, -1.0], dtype=torch.float64) * constant
    torch.testing.assert_close(kto_variants.value_of(gains, name), expected, atol=0.15, rtol=0)
    gain = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = kto_variants.value_of(gain, name)
    (slope,) = torch.autograd.grad(value, gain)
    assert value.item() == pytest.approx(0, abs=1e-12)
    expected_slope = 0.0 if name == "equation_6" else 0.88 * 0.1**-0.12
    assert slope.item() == pytest.approx(expected_slope)


def test_find_groups():
    """A group has the first examples of both classes, and so on."""
    groups = kto_variants.find_groups(DESIRABLE, 4)
    assert groups.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert kto_variants.find_groups(DESIRABLE, 0).tolist() == [0] * 8
    mixed = torch.tensor([True, False, False, True, True])
    assert kto_variants.find_groups(mixed, 2).tolist() == [0, 0, 1, 1, 2]


@given(st.lists(st.floats(-50, 50), min_size=8, max_size=8))
def test_reference_points(values):
    """Of one group they are kto.py's; of several, those of each group by itself."""
    log_ratios = torch.tensor(values, dtype=torch.float64)
    one_group = torch.zeros(8, dtype=torch.long)
    points = kto_variants.reference_points(log_ratios, DESIRABLE, one_group)
    assert torch.equal(points, kto.kl_from_other_half(log_ratios, DESIRABLE))
    groups = kto_variants.find_groups(DESIRABLE, 4)
    points = kto_variants.reference_points(log_ratios, DESIRABLE, groups)
    for group in (0, 1):
        own = groups == group
        expected = kto.kl_from_other_half(log_ratios[own], DESIRABLE[own])
        torch.testing.assert_close(points[own], expected)


def test_reference_point_of_a_group_without_the_other_class():
    log_ratios = torch.tensor([3.0, 5.0])
    desirable = torch.tensor([True, True])
    points = kto_variants.reference_points(log_ratios, desirable, torch.tensor([0, 0]))
    assert points.tolist() == [0, 0]


@given(st.lists(st.floats(-50, 50), min_size=8, max_size=8), st.floats(0.1, 3))
def test_loss_with_a_constant_is_kto_loss(values, weight):
    log_ratios = torch.tensor(values, dtype=torch.float64)
    kl = kto.kl_from_other_half(log_ratios, DESIRABLE)
    config = make_config(undesirable_weight=weight)
    losses = kto_variants.variant_loss(log_ratios, DESIRABLE, kl, config)
    zeros = torch.zeros_like(log_ratios)
    expected = kto.kto_loss(log_ratios, zeros, DESIRABLE, kl, undesirable_weight=weight)
    torch.testing.assert_close(losses, expected)


@given(st.lists(st.floats(1, 50), min_size=8, max_size=8))
def test_attached_gradient_is_of_a_contrast(values):
    """Where no mean is clamped, raising all log-ratios alike changes nothing."""
    log_ratios = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    groups = kto_variants.find_groups(DESIRABLE, 4)
    kl = kto_variants.reference_points(log_ratios, DESIRABLE, groups)
    losses = kto_variants.variant_loss(log_ratios, DESIRABLE, kl, make_config())
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    for group in (0, 1):
        assert gradient[groups == group].sum().abs() < 1e-12
    detached = kto_variants.variant_loss(log_ratios, DESIRABLE, kl.detach(), make_config())
    (gradient,) = torch.autograd.grad(detached.sum(), log_ratios)
    assert (gradient[DESIRABLE] < 0).all()
    assert (gradient[~DESIRABLE] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 3}, "--group_size 3"),
        ({"group_size": 12}, "--group_size 12"),
        ({"kl": "zero", "attached": True}, "--kl zero"),
        ({"kl": "mismatched", "group_size": 4}, "--kl mismatched"),
        ({"class_balance": "data", "group_size": 4}, "--group_size"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        make_config(**settings)


def test_a_batch_must_fit(tmp_path, data):
    with pytest.raises(UserError, match="--micro_batch_tokens 300"):
        train_here(VARIANTS, tmp_path / "out", data=data, **SETTINGS, micro_batch_tokens=300)
