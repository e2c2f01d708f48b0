"""The losses and value functions, as pure functions: values, gradients, shapes, padding, dtypes."""

import doctest
import inspect
import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytest import approx
from sixth_loss import ipo
from sixth_loss.ipo import ipo_loss

import dpo
import kto
import ppo_offline
import sft
import slic
from dpo import dpo_loss, dpo_value
from kto import kahneman_tversky_value, kl_from_other_half, kto_loss, kto_value
from ppo_offline import gae, ppo_offline_loss, rlhf_value
from sft import sft_loss
from slic import slic_loss, slic_value

MODULES = [sft, dpo, slic, ppo_offline, kto, ipo]
LOSSES = [sft_loss, dpo_loss, slic_loss, ppo_offline_loss, kto_loss, ipo_loss]
VALUES = [dpo_value, slic_value, rlhf_value, kto_value, kahneman_tversky_value]
OTHERS = [gae, kl_from_other_half]
B = 6
T = 5
# Not the defaults, and no float32 numbers: a step taken in float32 shows in float64.
SETTINGS = {
    dpo_loss: {"beta": 0.3},
    ipo_loss: {"beta": 0.3},
    slic_loss: {"beta": 1.3, "lambda_reg": 0.17},
    ppo_offline_loss: {"epsilon": 0.3},
    kto_loss: {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.7},
}

nats = st.floats(-300, 300)
betas = st.floats(0.01, 2)
weights = st.floats(0.1, 5)
distances = st.floats(0.5, 10)
seeds = st.integers(0, 10**6)


def arguments(function, size=B, dtype=torch.float64, spread=30.0, seed=0) -> dict:
    """Random arguments for whatever a function asks of a batch, and SETTINGS' for the rest."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            continue
        shape = (size, T) if function in (ppo_offline_loss, gae) and name != "rewards" else (size,)
        if name == "beta":
            made[name] = 0.3
        elif name == "desirable":
            made[name] = torch.rand(shape, generator=random) < 0.5
        elif name == "mask":  # lengths from 0 to T
            made[name] = torch.arange(T) < torch.randint(T + 1, (size, 1), generator=random)
        else:
            made[name] = (spread * torch.randn(shape, generator=random)).to(dtype)
    return made | SETTINGS.get(function, {})


def map_tensors(change, made: dict) -> dict:
    return {
        name: change(value) if torch.is_tensor(value) else value for name, value in made.items()
    }


def gradients(function, *values: float, **others) -> tuple[float, list[float]]:
    """The value of a function of numbers, and its slope by each."""
    inputs = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]
    result = function(*inputs, **others)
    slopes = torch.autograd.grad(result.sum(), inputs, materialize_grads=True)
    return result.item(), [slope.item() for slope in slopes]


def number(function, *values: float, **others) -> float:
    return gradients(function, *values, **others)[0]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def exactly(value):
    return approx(value, rel=1e-12, abs=1e-14)


# ---------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_doctests(module):
    failures, attempted = doctest.testmod(module)
    assert attempted > 0 and failures == 0


@pytest.mark.parametrize(("logp", "loss"), [(math.log(0.5), math.log(2)), (-1e4, 1e4), (0.0, 0)])
def test_sft_by_hand(logp, loss):
    assert gradients(sft_loss, logp) == (exactly(loss), [-1])


def test_dpo_by_hand():
    assert number(dpo_loss, -7.0, -9.0, -7.0, -9.0) == exactly(math.log(2))
    # Log-ratios of 2 and -1.
    expected = math.log(1 + math.exp(-0.3 * 3))
    assert number(dpo_loss, -10.0, -8.0, -12.0, -7.0, beta=0.3) == exactly(expected)


def test_slic_by_hand():
    assert number(slic_loss, -3.0, -2.5, -4.0, lambda_reg=0.17) == exactly(1.5 + 0.17 * 4)
    assert number(slic_loss, -2.0, -9.0, -4.0, lambda_reg=0.17) == exactly(0.17 * 4)


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_by_hand(desirable):
    desirable = torch.tensor([desirable])
    assert number(kto_loss, -7.0, -7.0, desirable=desirable, kl=0.0) == 0.5
    # Log-ratio 2, so z = 0.3 * (2 - 0.5); a weight that float32 would round.
    expected = 1.33 * (1 - sigmoid(0.45)) if desirable else 0.7 * (1 - sigmoid(-0.45))
    loss = number(kto_loss, -7.0, -9.0, desirable=desirable, kl=0.5, **SETTINGS[kto_loss])
    assert loss == exactly(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1, 2.0, -2), (1, -2.0, 2), (1.2, 2.0, -2.4), (1.4, 2.0, -2.6), (0.5, 2.0, -1)]
    + [(0.8, -2.0, 1.6), (0.5, -2.0, 1.4), (1.4, -2.0, 2.8)],
)
def test_ppo_by_hand(ratio, advantage, loss):
    advantages = torch.tensor([advantage])
    mask = torch.tensor([True])
    fixed = {"advantages": advantages, "mask": mask, "epsilon": 0.3}
    assert number(ppo_offline_loss, math.log(ratio) - 3, -3.0, **fixed) == exactly(loss)


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    made = arguments(loss, spread=1.0)  # none at a kink
    names = [name for name in made if name.endswith("logps")]

    def of_logps(*logps):
        return loss(**made | dict(zip(names, logps)))

    logps = [made[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(of_logps, logps)


@given(nats, nats, nats, nats, betas)
def test_dpo_gradient(chosen, rejected, reference_chosen, reference_rejected, beta):
    values = (chosen, rejected, reference_chosen, reference_rejected)
    _, slopes = gradients(dpo_loss, *values, beta=beta)
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    size = beta * sigmoid(-margin)
    assert slopes == exactly([-size, size, size, -size])
    assert slopes[0] < 0 < slopes[1] or margin > 600


@given(nats, nats, nats, betas, st.floats(0, 1))
def test_slic_gradient(chosen, rejected, target, beta, lambda_reg):
    assume(abs(beta - chosen + rejected) > 1e-6)
    fixed = dict(beta=beta, lambda_reg=lambda_reg)
    loss, slopes = gradients(slic_loss, chosen, rejected, target, **fixed)
    inside = chosen - rejected < beta
    assert loss == approx(max(0, beta - chosen + rejected) - lambda_reg * target, abs=1e-9)
    assert slopes == [-1 if inside else 0, 1 if inside else 0, exactly(-lambda_reg)]


@given(nats, nats, st.floats(0, 50), betas, weights, weights, st.booleans())
def test_kto_gradient(policy, reference, kl, beta, desirable_weight, undesirable_weight, desirable):
    fixed = dict(kl=kl, beta=beta, desirable=torch.tensor([desirable]))
    fixed |= dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    weight = desirable_weight if desirable else undesirable_weight
    loss, (slope, reference_slope) = gradients(kto_loss, policy, reference, **fixed)
    z = beta * (policy - reference - kl)
    size = weight * beta * sigmoid(z) * sigmoid(-z)
    assert loss == exactly(weight * sigmoid(-z if desirable else z))
    assert slope == exactly(-size if desirable else size)
    assert reference_slope == -slope
    assert abs(slope) <= weight * beta / 4 * (1 + 1e-12)
    if abs(z) < 30:
        assert slope < 0 if desirable else slope > 0


@given(nats, st.floats(0, 50), betas, weights, st.booleans())
def test_kto_gradient_is_largest_at_the_reference_point(reference, kl, beta, weight, desirable):
    fixed = dict(kl=kl, beta=beta, desirable=torch.tensor([desirable]))
    fixed |= dict(desirable_weight=weight, undesirable_weight=weight)
    for z, share in [(0, 0.25), (1, 0.1966119332), (-1, 0.1966119332), (50, 0), (-50, 0)]:
        _, (slope, _) = gradients(kto_loss, reference + kl + z / beta, reference, **fixed)
        assert abs(slope) == approx(weight * beta * share, rel=1e-9, abs=1e-18)


def test_kto_reference_point_has_no_gradient():
    policy, reference = torch.linspace(-9, -1, 2 * B).view(2, B).requires_grad_()
    desirable = torch.arange(B) < 2
    estimate = kl_from_other_half(policy - reference, desirable)
    assert not estimate.requires_grad
    for kl in (torch.ones(B), torch.ones(())):
        kl.requires_grad_()
        kto_loss(policy, reference, desirable, kl).sum().backward(inputs=[policy, kl])
        assert kl.grad is None or not kl.grad.any()


@given(st.floats(-3, 3), st.floats(0.1, 5), st.booleans(), st.floats(0.05, 1))
def test_ppo_gradient(log_ratio, size, wanted, epsilon):
    ratio = math.exp(log_ratio)
    advantage = size if wanted else -size
    assume(min(abs(ratio - 1 - epsilon), abs(ratio - 1 + epsilon)) > 1e-6)
    fixed = dict(mask=torch.tensor([True]), epsilon=epsilon)
    _, slopes = gradients(ppo_offline_loss, log_ratio, 0.0, advantage, **fixed)
    clipped = ratio > 1 + epsilon if wanted else ratio < 1 - epsilon
    slope = 0 if clipped else -ratio * advantage
    assert slopes == [exactly(slope), exactly(-slope), 0]  # 0: the advantage has no gradient


@pytest.mark.parametrize(("log_ratio", "clamped"), [(25.0, 20), (1e4, 20), (-25.0, -20)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_ppo_far_from_the_reference(log_ratio, clamped, advantage):
    mask = torch.tensor([True])
    loss, slopes = gradients(ppo_offline_loss, log_ratio, 0.0, advantage, mask=mask)
    bounds = (0, 1.5) if advantage > 0 else (0.5, math.inf)
    assert loss == exactly(-advantage * min(max(math.exp(clamped), bounds[0]), bounds[1]))
    assert slopes == [0, 0, 0]


# --------------------------------------------------------------------------- all losses alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_far_apart_is_finite(loss, dtype):
    made = arguments(loss, dtype=dtype)
    names = [name for name, value in made.items() if torch.is_tensor(value) and name != "mask"]
    corners = itertools.product(*[(0, 1) if n == "desirable" else (-1e4, 0, 1e4) for n in names])
    made |= {name: torch.tensor(c, dtype=dtype) for name, c in zip(names, zip(*corners))}
    inputs = [made[name].requires_grad_() for name in names if name.endswith("logps")]
    if "mask" in made:
        made["mask"] = torch.ones_like(inputs[0]).bool()
    if "desirable" in made:
        made["desirable"] = made["desirable"].bool()
    losses = loss(**made)
    assert losses.isfinite().all()
    for slope in torch.autograd.grad(losses.sum(), inputs):
        assert slope.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("centre", "spread"), [(-800, 300.0), (-3, 2.0)])  # completions, tokens
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_upcast(loss, centre, spread, half):
    made = arguments(loss, size=200, spread=spread)
    made = map_tensors(lambda t: t if t.dtype == torch.bool else (t + centre).to(half), made)
    losses = loss(**made)
    upcast = map_tensors(lambda t: t if t.dtype == torch.bool else t.float(), made)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, loss(**upcast))


@pytest.mark.parametrize("function", LOSSES + VALUES + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_inputs_are_left_alone(function, dtype):
    made = arguments(function, dtype=dtype)
    before = map_tensors(torch.clone, made)
    results = function(**made)
    for result in results if isinstance(results, tuple) else [results]:
        assert result.dtype == dtype
    assert all(torch.equal(made[n], t) for n, t in before.items() if torch.is_tensor(t))


@pytest.mark.parametrize("loss", LOSSES)
@given(order=st.permutations(range(B)), seed=seeds)
def test_order_of_the_batch_changes_nothing_else(loss, order, seed):
    made = arguments(loss, seed=seed)
    shuffled = map_tensors(lambda t: t[list(order)], made)
    assert torch.equal(loss(**shuffled), loss(**made)[list(order)])


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_of_one(loss):
    made = arguments(loss)
    alone = [loss(**map_tensors(lambda t, i=i: t[i : i + 1], made)) for i in range(B)]
    torch.testing.assert_close(torch.cat(alone), loss(**made), rtol=1e-12, atol=0)


@given(seeds, nats, nats)
def test_dpo_does_not_see_what_both_completions_share(seed, policy_shift, reference_shift):
    made = arguments(dpo_loss, seed=seed)
    shifts = {"policy": policy_shift, "reference": reference_shift}
    shifted = map_tensors(torch.clone, made)
    for name in shifted:
        shifted[name] += shifts.get(name.split("_")[0], 0)
    torch.testing.assert_close(dpo_loss(**shifted), dpo_loss(**made), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", LOSSES + VALUES + OTHERS)
def test_pasted_elsewhere_it_needs_torch_alone(function):
    namespace = {"torch": torch}
    exec(inspect.getsource(function), namespace)
    made = arguments(function)
    pasted = namespace[function.__name__](**made)
    own = function(**made)
    torch.testing.assert_close(pasted, own, rtol=0, atol=0)


# ------------------------------------------------------------------------ KTO's reference point


def test_kto_kl_is_a_number_or_one_for_each():
    made = arguments(kto_loss)
    expected = kto_loss(**made | {"kl": torch.full((B,), 1.5)})
    for kl in (1.5, torch.tensor(1.5)):
        assert torch.equal(kto_loss(**made | {"kl": kl}), expected)
    kl = torch.tensor(-1.5)  # taken as it is: the clamp is kl_from_other_half's
    assert not torch.equal(kto_loss(**made | {"kl": kl}), kto_loss(**made | {"kl": 0.0}))


@pytest.mark.parametrize(
    ("log_ratios", "desirable", "expected"),
    [
        ([1.0, 2.0, 6.0, 4.0], [1, 1, 1, 0], [4, 4, 4, 3]),  # three and one
        ([4.0, 1.0, 2.0, 6.0], [0, 1, 1, 1], [3, 4, 4, 4]),
        ([1.0, 3.0, 5.0], [1, 0, 1], [3, 3, 3]),
        ([1.0, -2.0, 9.0, -4.0], [1, 0, 1, 0], [0, 5, 0, 5]),  # clamped
        ([-1.0, 2.0], [1, 0], [2, 0]),
        ([3.0, 4.0], [1, 1], [0, 0]),  # one class
        ([3.0, 4.0], [0, 0], [0, 0]),
        ([3.0], [1], [0]),
        ([3.0], [0], [0]),
    ],
)
def test_kl_from_other_half_by_hand(log_ratios, desirable, expected):
    kl = kl_from_other_half(torch.tensor(log_ratios), torch.tensor(desirable).bool())
    assert kl.tolist() == expected


@given(st.lists(st.tuples(nats, st.booleans()), min_size=1, max_size=9))
def test_kl_from_other_half_is_the_clamped_mean_of_the_other(examples):
    log_ratios, desirable = zip(*examples)
    kl = kl_from_other_half(torch.tensor(log_ratios, dtype=torch.float64), torch.tensor(desirable))
    for own_kl, label in zip(kl.tolist(), desirable):
        others = [r for r, other in examples if other != label]
        assert own_kl == approx(max(0, sum(others) / max(1, len(others))), abs=1e-10)


@pytest.mark.parametrize(("wanted", "unwanted"), [(10, 1), (1, 10), (3, 1), (3, 0), (0, 3), (1, 0)])
def test_kto_with_unequal_classes(wanted, unwanted):
    desirable = torch.tensor([True] * wanted + [False] * unwanted)
    policy = torch.linspace(-40, -20, len(desirable), dtype=torch.float64)
    log_ratios = policy + 30
    for_wanted = max(0, log_ratios[wanted:].mean().item()) if unwanted else 0
    for_unwanted = max(0, log_ratios[:wanted].mean().item()) if wanted else 0
    kl = kl_from_other_half(log_ratios, desirable)
    losses = kto_loss(policy, torch.full_like(policy, -30), desirable, kl, beta=0.1)
    expected = [1 - sigmoid(0.1 * (r - for_wanted)) for r in log_ratios[:wanted].tolist()]
    expected += [1 - sigmoid(0.1 * (for_unwanted - r)) for r in log_ratios[wanted:].tolist()]
    assert losses.tolist() == exactly(expected)


# ------------------------------------------------------------------------------ PPO's advantages


def lengths_mask(lengths):
    return torch.arange(8) < torch.tensor(lengths)[:, None]


any_lengths = st.lists(st.integers(0, 8), min_size=1, max_size=4)
discounts = st.floats(0.1, 1)


@given(any_lengths, discounts, discounts, seeds)
def test_gae(lengths, gamma, gae_lambda, seed):
    """Against the definition: the sum of the errors ahead, each discounted by gamma * lambda."""
    torch.manual_seed(seed)
    values = torch.randn(len(lengths), 8, dtype=torch.float64)
    rewards = torch.randn(len(lengths), dtype=torch.float64)
    result = gae(values, rewards, lengths_mask(lengths), gamma, gae_lambda)
    expected = torch.zeros(2, len(lengths), 8, dtype=torch.float64)
    for i, length in enumerate(lengths):
        ahead = values[i, 1:length].tolist() + [0.0]  # nothing comes after the last token
        now = [0.0] * (length - 1) + [rewards[i].item()]
        errors = [now[t] + gamma * ahead[t] - values[i, t].item() for t in range(length)]
        for t in range(length):
            discounted = [(gamma * gae_lambda) ** k * e for k, e in enumerate(errors[t:])]
            expected[:, i, t] = sum(discounted) + torch.stack([values[i, t] * 0, values[i, t]])
    torch.testing.assert_close(torch.stack(result), expected, rtol=1e-9, atol=1e-12)


def test_gae_of_long_completions():
    """In float32, against the usual loop from the last token to the first, in float64."""
    torch.manual_seed(0)
    values = torch.randn(4, 2048).clamp(-1, 1)
    rewards = torch.tensor([1.0, -1.0, 1.0, -1.0])
    advantages, _ = gae(values, rewards, torch.ones(4, 2048).bool())
    expected = torch.zeros(4, 2048, dtype=torch.float64)
    later_advantage = torch.zeros(4, dtype=torch.float64)
    next_value = torch.zeros(4, dtype=torch.float64)
    reward = rewards.double()  # of the last token
    for t in reversed(range(2048)):
        error = reward + 0.99 * next_value - values[:, t]
        later_advantage = error + 0.99 * 0.95 * later_advantage
        expected[:, t] = later_advantage
        next_value = values[:, t].double()
        reward = torch.zeros(4, dtype=torch.float64)
    assert (advantages - expected).abs().max() < 1e-6 * expected.abs().max()


@given(any_lengths, discounts, discounts, seeds)
def test_gae_of_a_perfect_critic_is_zero(lengths, gamma, gae_lambda, seed):
    torch.manual_seed(seed)
    rewards = torch.randn(len(lengths), dtype=torch.float64)
    to_go = torch.tensor(lengths)[:, None] - 1 - torch.arange(8).double()
    perfect = gamma**to_go * rewards[:, None]  # (B, T)
    mask = lengths_mask(lengths)
    advantages, returns = gae(perfect, rewards, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, perfect * mask, rtol=0, atol=1e-12)


def test_gae_by_hand():
    values, rewards = torch.tensor([[0.5, 0.25, 1.0]]).double(), torch.tensor([-1.0]).double()
    mask = torch.tensor([[True, True, True]])
    zero_critic, _ = gae(torch.zeros_like(values), rewards, mask, 0.9, 1.0)
    assert zero_critic[0].tolist() == exactly([-0.81, -0.9, -1])
    one_step, _ = gae(values, rewards, mask, 0.9, 0.0)
    assert one_step[0].tolist() == exactly([0.9 * 0.25 - 0.5, 0.9 - 0.25, -1 - 1])
    whole, returns = gae(values, rewards, mask, 1.0, 1.0)
    assert whole[0].tolist() == exactly([-1.5, -1.25, -2])
    assert returns[0].tolist() == exactly([-1, -1, -1])


@pytest.mark.parametrize("garbage", [7.0, 1e30, math.inf, -math.inf, math.nan])
def test_gae_padding_changes_nothing(garbage):
    made = arguments(gae)
    padding = ~made["mask"]
    assert 0 < padding.sum() < padding.numel()
    clean, dirty = (made["values"].masked_fill(padding, filler) for filler in (0.0, garbage))
    dirty.requires_grad_()
    for one, other in zip(gae(**made | {"values": clean}), gae(**made | {"values": dirty})):
        assert torch.equal(one, other) and not other[padding].any() and not other.requires_grad


@pytest.mark.parametrize("garbage", [7.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dirty", ["policy", "reference", "advantages", "policy reference", "all"])
def test_ppo_padding_changes_nothing(garbage, dirty):
    made = arguments(ppo_offline_loss)
    padding = ~made["mask"]
    results = []
    for filler in (0.0, garbage):
        for name in ("policy_token_logps", "reference_token_logps", "advantages"):
            fill = filler if dirty == "all" or name.split("_")[0] in dirty else 0.0
            made[name] = made[name].detach().masked_fill(padding, fill).requires_grad_()
        losses = ppo_offline_loss(**made)
        logps = made["policy_token_logps"], made["reference_token_logps"]
        results.append(torch.stack([losses, *torch.autograd.grad(losses.sum(), logps)]))
    assert torch.equal(*results) and not results[0][:, padding].any()
    alone = ppo_offline_loss(**made | {"mask": torch.ones_like(padding)})
    assert torch.equal(losses[~padding], alone[~padding])


# ----------------------------------------------------------------------------- value functions
# Each as a function of the distance from the reference point, for random reference points.


@pytest.mark.parametrize("value", [kto_value, rlhf_value])
@given(reference=st.floats(-50, 50), one=distances, more=distances)
def test_sigmoid_values(value, reference, one, more):
    def h(distance):
        return number(value, reference + distance, reference)

    assert h(0) == 0.5
    assert h(one) < h(one + more) and h(-one) > h(-one - more)
    assert h(one) + h(-one) == exactly(1)  # as steep in losses as in gains
    assert h(one + more / 2) > (h(one) + h(one + more)) / 2  # concave in gains
    assert h(-one - more / 2) < (h(-one) + h(-one - more)) / 2  # convex in losses
    assert h(one) == exactly(sigmoid(one))
    assert h(1e4) == 1 and h(-1e4) == 0
    _, slopes = gradients(value, reference, reference)
    assert slopes == [0.25, -0.25]


@given(st.floats(-50, 50), st.floats(-10, 10), distances)
def test_dpo_value(reference, one, more):
    def h(distance):
        return number(dpo_value, reference + distance, reference)

    assert h(0) == exactly(-math.log(2))
    assert h(one) < h(one + more)
    assert h(one + more / 2) > (h(one) + h(one + more)) / 2  # concave everywhere
    assert h(1e4) == 0 and h(-1e4) == exactly(-1e4)
    assert gradients(dpo_value, reference + 1e3, reference)[1][0] == exactly(0)
    assert gradients(dpo_value, reference - 1e3, reference)[1][0] == exactly(1)


@given(st.floats(-50, 50), st.floats(-100, 100), betas)
def test_slic_value(reference, distance, beta):
    assume(abs(distance - beta) > 1e-6)
    value, slopes = gradients(slic_value, reference + distance, reference, beta=beta)
    assert value == approx(min(0, distance - beta), abs=1e-12)
    assert slopes == ([0, 0] if distance > beta else [1, -1])


@given(st.floats(-50, 50), st.floats(0.2, 0.95), st.floats(1.1, 4), distances, distances)
def test_kahneman_tversky_value(reference, alpha, loss_aversion, one, more):
    fixed = dict(alpha=alpha, loss_aversion=loss_aversion)

    def h(distance):
        return number(kahneman_tversky_value, reference + distance, reference, **fixed)

    def slope(distance):
        return gradients(kahneman_tversky_value, distance, 0.0, **fixed)[1][0]

    assert h(0) == 0
    assert h(one) == approx(one**alpha) and h(-one) == approx(-loss_aversion * h(one))
    assert h(one) < h(one + more) and h(-one) > h(-one - more)
    assert h(one + more / 2) > (h(one) + h(one + more)) / 2  # concave in gains
    assert h(-one - more / 2) < (h(-one) + h(-one - more)) / 2  # convex in losses
    assert slope(-one) == exactly(loss_aversion * slope(one))  # steeper in losses
    assert slope(1e-30) > 10 * slope(1e-9) > 0 < slope(-1e-9) * 10 < slope(-1e-30)  # no bound


def test_kahneman_tversky_defaults():
    assert number(kahneman_tversky_value, 3.0, 1.0) == exactly(2**0.88)
    assert number(kahneman_tversky_value, -1.0, 1.0) == exactly(-2.25 * 2**0.88)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("z_ref", [0.0, 3.0, -1e-30])
def test_kahneman_tversky_value_at_its_infinite_slope(z_ref, dtype):
    z_ref = torch.tensor(z_ref, dtype=dtype, requires_grad=True)
    z = torch.stack([z_ref.detach(), z_ref.detach() + 1]).requires_grad_()
    value = kahneman_tversky_value(z, z_ref)
    value.sum().backward()
    assert value.tolist() == [0, 1]
    assert z.grad.tolist() == [0, approx(0.88)]
    assert z_ref.grad.item() == approx(-0.88)
