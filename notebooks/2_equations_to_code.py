# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From equations to code
#
# *The [report](https://github.com/ContextualAI/HALOs/blob/main/assets/report.pdf),
# sections 2, 3 and 5: equations (1) to (7), and the reward model's loss. The
# [KTO paper](https://arxiv.org/abs/2402.01306) came after it.*
#
# Each section has an equation, the code that implements it, a number worked by hand, and an exact
# answer to compare with where one exists. The code is read from the trainers' files when the
# notebook runs, so it is the code that trains. An arrow marks the line with the equation's number.
# (`plots.py`, beside this notebook, only draws.)

# %%
import sys

sys.path.insert(0, "..")  # the project's folder

import ast
import inspect
import itertools
import math
import re
from pathlib import Path

import plots
import torch
from scipy.optimize import minimize, minimize_scalar

import dpo
import kto
import ppo_offline
import sft
import slic

torch.set_default_dtype(torch.float64)


def show(*functions):
    """Print functions as they are in their files, without docstrings."""
    for function in functions:
        lines = inspect.getsource(function).splitlines()
        docstring = ast.parse("\n".join(lines)).body[0].body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
        print(Path(inspect.getfile(function)).name)
        for line in lines:
            has_equation_number = re.search(r"# \(\d\)", line)
            mark = "->" if has_equation_number else "  "
            print(f"{mark}  {line}")
        print()


def show_assignment(function, target):
    """Print the statement of a function that assigns to a target."""
    source = inspect.getsource(function)
    print(f"{Path(inspect.getfile(function)).name}, in {function.__name__}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == target:
            print(f"    {ast.get_source_segment(source, node)}")
    print()


def compare(name, by_hand, computed):
    """Print a number worked by hand and the project's result, and check that they agree."""
    computed = float(computed)
    print(f"{name:<48}by hand {by_hand:8.4f}   computed {computed:8.4f}")
    assert math.isclose(by_hand, computed, abs_tol=5e-5)


def print_row(name, values, decimals):
    """Print a name and several numbers in one line."""
    numbers = [f"{value:10.{decimals}f}" for value in values]
    print(f"{name:<30}" + "".join(numbers))


# %% [markdown]
# ## Five replies
#
# Sections 2 and 3 are about the best policy over *all* replies. A language model has too many
# replies to enumerate. So here a prompt has only five, each with a true reward $r^*$ and a
# probability under $\pi_{\text{ref}}$.

# %%
REPLIES = ["right, brief", "right, long", "vague", "wrong", "rude"]
reward = torch.tensor([2.0, 1.5, 0.5, -1.0, -2.0])
reference = torch.tensor([0.10, 0.25, 0.30, 0.20, 0.15])
for reply, r, p in zip(REPLIES, reward, reference):
    print(f"{reply:<14} r* = {r:5.1f}   pi_ref = {p:.2f}")

# %% [markdown]
# ## (1) Who is preferred
#
# *Section 2:* $p^*(y_w \succ y_l|x) = \sigma(r^*(x, y_w) - r^*(x, y_l))$, the Bradley-Terry model.

# %%
show(ppo_offline.rlhf_value)
compare(
    "'right, brief' over 'vague': 1 / (1 + e^-1.5)",
    1 / (1 + math.exp(-1.5)),
    ppo_offline.rlhf_value(reward[0], reward[2]),
)

# %% [markdown]
# ## The reward model's loss
#
# *Section 2, under (1):*
# $\mathcal{L}_R = \mathbb{E}[-\log\sigma(r_\phi(x, y_w) - r_\phi(x, y_l))]$.
#
# No trainer here fits a reward model, because the losses of section 3 do without one. But this loss
# is minus the logarithm of (1), and `dpo_value` is that logarithm.

# %%
show(dpo.dpo_value)
compare("-log of the above", math.log(1 + math.exp(-1.5)), -dpo.dpo_value(reward[0], reward[2]))

# %% [markdown]
# Take all pairs of the five replies, each preferred as often as (1) says. The loss then has its
# minimum at the true reward, up to a constant, because (1) depends on differences only. (scipy
# minimizes, and autograd computes the gradient. No language model is trained in this notebook.)

# %%
ordered_pairs = list(itertools.permutations(range(5), 2))
first, second = torch.tensor(ordered_pairs).T
preference = ppo_offline.rlhf_value(reward[first], reward[second])  # of the first over the second
frequency = preference / 10  # each of the 10 pairs is as frequent as the others


def minimizer(loss):
    """The five numbers at which a loss has its minimum, found numerically."""

    def value_and_gradient(x):
        x = torch.tensor(x, requires_grad=True)
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.numpy()

    options = {"gtol": 1e-10, "maxiter": 1000}
    result = minimize(value_and_gradient, [0.0] * 5, jac=True, options=options)
    return torch.tensor(result.x)


def reward_model_loss(r):
    return -(frequency * dpo.dpo_value(r[first], r[second])).sum()


fitted = minimizer(reward_model_loss)
print_row("true reward, minus its mean", reward - reward.mean(), decimals=2)
print_row("fitted reward, minus its mean", fitted - fitted.mean(), decimals=2)

# %% [markdown]
# ## (2) What RLHF maximizes
#
# *Section 2:* $\mathbb{E}_{y\sim\pi}[r(x, y)] - \beta D_{\text{KL}}(\pi \Vert \pi_{\text{ref}})$.
# *Section 3.1 gives the best policy:*
# $\pi^*(y|x) = \frac{1}{Z(x)} \pi_{\text{ref}}(y|x) \exp(r^*(x,y)/\beta)$.
#
# The trainers compute neither: DPO and KTO replace them. With five replies, both can be computed
# exactly. Two checks show that $\pi^*$ maximizes (2): a numerical maximum, and a comparison with
# 20,000 random policies.


# %%
def objective(policy, beta):
    """(2), of policies over the five replies, (..., 5)."""
    log_ratio = (policy / reference).log()
    return (policy * (reward - beta * log_ratio)).sum(-1)


def optimum(beta):
    """pi* and log Z, in closed form."""
    weights = reference.log() + reward / beta
    return weights.softmax(0), weights.logsumexp(0)


def numerical_optimum(beta):
    """The policy that maximizes (2), found numerically."""
    logits = minimizer(lambda x: -objective(x.softmax(0), beta))
    return logits.softmax(0)


generator = torch.Generator().manual_seed(1)
noise = torch.randn(20_000, 5, generator=generator)
for beta in (0.5, 1.0, 3.0):
    best, log_z = optimum(beta)
    found = numerical_optimum(beta)
    assert (found - best).abs().max() < 1e-6
    assert torch.isclose(objective(best, beta), beta * log_z)
    near = (best.log() + 0.1 * noise[:10_000]).softmax(-1)  # small changes of pi*
    far = (2 * noise[10_000:]).softmax(-1)  # unrelated to pi*
    is_worse = objective(torch.cat([near, far]), beta) < objective(best, beta)
    print(f"beta = {beta}")
    print_row("    pi*, closed form", best, decimals=3)
    print_row("    pi*, numerical", found, decimals=3)
    print(f"    random policies with a lower value: {is_worse.sum()} of {len(is_worse)}")

# %% [markdown]
# At $\pi^*$, the value of (2) is exactly $\beta\log Z(x)$ (the second `assert` checks it). The
# picture shows how $\pi^*$ depends on $\beta$:

# %%
betas = torch.logspace(-1.3, 1.7, 200)
best_by_beta = torch.stack([optimum(beta)[0] for beta in betas])  # (200, 5)
plots.best_policies(betas, dict(zip(REPLIES, best_by_beta.T)), reference)

# %% [markdown]
# ## (3) The reward that a policy is best for
#
# *Section 3.1:* $r^*(x, y) = \beta\log\frac{\pi^*(y|x)}{\pi_{\text{ref}}(y|x)} + \beta\log Z(x)$.
#
# The trainers compute its first term, as a metric. The second term is the same for all replies to a
# prompt. It cancels in DPO's difference, and in section 5 when the expectation is subtracted.

# %%
show_assignment(dpo.summarize, "(reward_chosen, reward_rejected)")
beta = 0.5
best, log_z = optimum(beta)
log_ratio = (best / reference).log()
recovered = beta * log_ratio + beta * log_z
print_row("true reward r*", reward, decimals=2)
print_row("from pi* by (3)", recovered, decimals=2)

# %% [markdown]
# *Section 5, above (7)*, writes a reply's value in two ways:
# $\sigma(r^* - \mathbb{E}_{\pi^*}[r^*])$ and $\sigma(\beta u - \beta\,\mathbb{E}_{\pi^*}[u])$. Here
# $u = \log(\pi^*/\pi_{\text{ref}})$ is the log-ratio, and its mean is the KL divergence. By (3) the
# two are equal, because $\log Z$ cancels:

# %%
mean_reward = (best * reward).sum()
kl = (best * log_ratio).sum()
print_row("value from rewards", kto.kto_value(reward, mean_reward), decimals=3)
print_row("value from log-ratios", kto.kto_value(beta * log_ratio, beta * kl), decimals=3)

# %% [markdown]
# ## (4) DPO
#
# *Section 3.1:* (3) is put into (1), and the loss is the negative log-likelihood. This section and
# the next use one worked example. The chosen reply has log-probability $-10$ under the policy and
# $-12$ under $\pi_{\text{ref}}$, so its log-ratio is $+2$. The rejected one has $-15$ and $-14$, so
# its log-ratio is $-1$.

# %%
show(dpo.dpo_loss)
policy_w = torch.tensor([-10.0])
reference_w = torch.tensor([-12.0])
policy_l = torch.tensor([-15.0])
reference_l = torch.tensor([-14.0])
compare(
    "log(1 + e^(-0.1 * (2 + 1)))",
    math.log(1 + math.exp(-0.3)),
    dpo.dpo_loss(policy_w, policy_l, reference_w, reference_l),
)

# %% [markdown]
# The report says that DPO optimizes RLHF's objective in one stage. On the five replies, the policy
# with the smallest expected DPO loss is indeed $\pi^*$:


# %%
def expected_dpo_loss(logits):
    """DPO's loss of a policy over the five replies, averaged over all preferences."""
    policy_logps = logits.log_softmax(0)
    reference_logps = reference.log()
    losses = dpo.dpo_loss(
        policy_logps[first],
        policy_logps[second],
        reference_logps[first],
        reference_logps[second],
        beta,
    )
    return (frequency * losses).sum()


found = minimizer(expected_dpo_loss).softmax(0)
print_row("pi* of (2)", best, decimals=4)
print_row("minimum of DPO's loss (4)", found, decimals=4)

# %% [markdown]
# ## (5) SLiC, and its regularizer
#
# *Section 3.2:* $\max(0, \beta - \log\pi(y_w|x) + \log\pi(y_l|x))$ plus $\lambda_{\text{reg}}$
# times a language-modelling loss. There is no reference model. In the worked example the chosen
# reply is ahead by 5 nats. That is more than the margin of 1, so only the regularizer is left. Then
# the two replies are exchanged.

# %%
show(slic.slic_loss)
compare("0 + 0.1 * 10", 1.0, slic.slic_loss(policy_w, policy_l, policy_w))
compare("exchanged: (1 + 15 - 10) + 0.1 * 15", 7.5, slic.slic_loss(policy_l, policy_w, policy_l))

# %% [markdown]
# ## The standard loss
#
# *Section 2, stages 1 and 2,* without a number: $-\log\pi(y_t|x, y_{<t})$ of each token.

# %%
show(sft.sft_loss)
compare("-log(1/4)", math.log(4), sft.sft_loss(torch.tensor([0.25]).log()))

# %% [markdown]
# ## Offline PPO
#
# *Section 3.3:* $-\min(r_\theta A,\ \text{clip}(r_\theta, 1-\epsilon, 1+\epsilon) A)$ for each
# token. The report prints $r_\theta = \log(\pi_\theta/\pi_{\text{ref}})$. Before training this is
# 0, which is outside the clipping range $[0.5, 1.5]$. The code uses the ratio
# $\pi_\theta/\pi_{\text{ref}}$ itself, which is then 1.

# %%
show(ppo_offline.ppo_offline_loss, ppo_offline.gae)
token_logp = torch.tensor([[-0.2]])  # (1, 1): one reply of one token
token_reference_logp = torch.tensor([[-1.0]])  # so the log-ratio is 0.8
one = torch.ones(1, 1)
compare(
    "A = +1: clipped at 1.5",
    -1.5,
    ppo_offline.ppo_offline_loss(token_logp, token_reference_logp, one, one),
)
compare(
    "A = -1: e^0.8, not clipped",
    math.exp(0.8),
    ppo_offline.ppo_offline_loss(token_logp, token_reference_logp, -one, one),
)
critic_values = torch.tensor([[0.4, 0.6]])  # of a reply of two tokens, with reward 1
both_tokens = torch.ones(1, 2).bool()
advantages, returns = ppo_offline.gae(critic_values, torch.ones(1), both_tokens)
compare("last token's advantage: 1 - 0.6", 0.4, advantages[0, 1])
by_hand = 0.99 * 0.6 - 0.4 + 0.99 * 0.95 * 0.4
compare("the one before: 0.99*0.6 - 0.4 + 0.99*0.95*0.4", by_hand, advantages[0, 0])

# %%
log_ratio = torch.linspace(-1.5, 1.5, 601)[:, None]  # (601, 1): replies of one token
zeros = torch.zeros_like(log_ratio)
ones = torch.ones_like(log_ratio)
with_ratio = {}
as_printed = {}
for advantage in (1, -1):
    label = f"A = {advantage:+d}"
    with_ratio[label] = ppo_offline.ppo_offline_loss(log_ratio, zeros, advantage * ones, ones)
    clipped = log_ratio.clamp(0.5, 1.5)  # the report's r is the log-ratio
    as_printed[label] = -torch.minimum(advantage * log_ratio, advantage * clipped)
plots.ppo_losses(log_ratio, with_ratio, as_printed)

# %% [markdown]
# On the left, the loss is flat once the token has been learned: for $A = +1$ where the ratio is
# above 1.5, and for $A = -1$ where it is below 0.5. On the right, with the log-ratio as printed in
# the report, the loss for $A = -1$ is flat up to a log-ratio of 0.5. Such a token would have no
# gradient until its probability *rises* by this much.

# %% [markdown]
# ## (6) Kahneman and Tversky's value
#
# *Section 4.* Notebook 1 is about it.

# %%
show(kto.kahneman_tversky_value)
compare("a gain of 2: 2^0.88", 2**0.88, kto.kahneman_tversky_value(torch.tensor(2.0), 0.0))
compare(
    "a loss of 2: -2.25 * 2^0.88",
    -2.25 * 2**0.88,
    kto.kahneman_tversky_value(torch.tensor(-2.0), 0.0),
)

# %% [markdown]
# ## (7) KTO
#
# *Section 5:* the utility of a desirable reply is
# $\sigma(\beta r - \beta\,\text{KL}(\pi_\theta \Vert \pi_{\text{ref}}))$ with the log-ratio
# $r = \log\frac{\pi_\theta(y|x)}{\pi_{\text{ref}}(y|x)}$. For an undesirable reply the sign of the
# argument is reversed. The loss is one minus the utility. *The KL term of one class is estimated
# from the other half of the batch.*
#
# The worked example has the same two replies, as two examples. The desirable one ($+2$) is compared
# with the other's $-1$, clamped to 0. The undesirable one ($-1$) is compared with $+2$.

# %%
show(kto.kto_loss, kto.kl_from_other_half)
log_ratios = torch.tensor([2.0, -1.0])
desirable = torch.tensor([True, False])
reference_points = kto.kl_from_other_half(log_ratios, desirable)
losses = kto.kto_loss(log_ratios, torch.zeros(2), desirable, reference_points)
compare("desirable: 1 / (1 + e^(0.1 * 2))", 1 / (1 + math.exp(0.2)), losses[0])
compare("undesirable: 1 / (1 + e^(0.1 * (2 + 1)))", 1 / (1 + math.exp(0.3)), losses[1])

# %% [markdown]
# ## The gradient of each loss
#
# *Sections 3 and 5; the KTO paper describes KTO's gradient.* Each panel has a chosen and a rejected
# reply, here of a single token so that PPO can be drawn too. Arrows show the direction of minus the
# gradient. The shade is its norm, relative to the maximum in the panel. SLiC and SFT have no
# reference; their reference log-probabilities are set to 0.


# %%
def sft_pair(chosen, rejected):
    return sft.sft_loss(chosen)


def slic_pair(chosen, rejected):
    return slic.slic_loss(chosen, rejected, chosen)


def dpo_pair(chosen, rejected):
    zeros = torch.zeros_like(chosen)
    return dpo.dpo_loss(chosen, rejected, zeros, zeros)


def ppo_pair(chosen, rejected):
    zeros = torch.zeros_like(chosen)
    ones = torch.ones_like(chosen)
    loss_chosen = ppo_offline.ppo_offline_loss(chosen, zeros, ones, ones)
    loss_rejected = ppo_offline.ppo_offline_loss(rejected, zeros, -ones, ones)
    return loss_chosen + loss_rejected


def kto_pair(chosen, rejected):
    zeros = torch.zeros_like(chosen)
    is_desirable = torch.ones_like(chosen).bool()
    loss_chosen = kto.kto_loss(chosen, zeros, is_desirable, kl=10.0)
    loss_rejected = kto.kto_loss(rejected, zeros, ~is_desirable, kl=10.0)
    return loss_chosen + loss_rejected


def gradient_field(pair_loss, largest):
    """Minus the gradient of a pair's loss on a grid of log-ratios, up to `largest` nats."""
    side = torch.linspace(-largest, largest, 121)
    rejected, chosen = torch.meshgrid(side, side, indexing="ij")
    chosen = chosen.clone().requires_grad_()
    rejected = rejected.clone().requires_grad_()
    gradients = torch.autograd.grad(
        pair_loss(chosen, rejected).sum(), (chosen, rejected), materialize_grads=True
    )
    return side, -gradients[0], -gradients[1]


plots.gradient_fields(
    {
        "SFT": gradient_field(sft_pair, 60),
        "SLiC": gradient_field(slic_pair, 60),
        "DPO": gradient_field(dpo_pair, 60),
        "PPO (smaller range)": gradient_field(ppo_pair, 1.5),
        "KTO, reference point 10": gradient_field(kto_pair, 60),
    }
)

# %% [markdown]
# - SFT uses the chosen reply only.
# - SLiC separates the two replies until their difference reaches the margin. After that, only its
#   language-modelling term has a gradient.
# - DPO separates them wherever the rejected reply has the larger log-ratio. Its gradient vanishes
#   as the chosen one gets ahead.
# - PPO has no gradient beyond its clips.
# - KTO changes each reply independently of the other. Its gradient is largest near the reference
#   point and vanishes far from it.

# %% [markdown]
# ### Saturation
#
# *The KTO paper: as a reward goes to plus or minus infinity, KTO's gradient goes to zero.* DPO's
# gradient vanishes on one side only. A pair that the policy orders wrongly by many nats keeps the
# full gradient, even if its label is wrong.

# %%
distance = torch.linspace(-80, 80, 801).requires_grad_()
zeros = torch.zeros(801)
is_desirable = torch.ones(801).bool()
dpo_losses = dpo.dpo_loss(distance, zeros, zeros, zeros)
kto_losses = kto.kto_loss(distance, zeros, is_desirable, 0.0)
(dpo_gradient,) = torch.autograd.grad(dpo_losses.sum(), distance)
(kto_gradient,) = torch.autograd.grad(kto_losses.sum(), distance)
magnitudes = {
    "DPO: chosen minus rejected log-ratio": dpo_gradient.abs(),
    "KTO: log-ratio minus reference point": kto_gradient.abs(),
}
distance = distance.detach()
plots.saturation(distance, magnitudes)
for place in (0, 400, 800):
    dpo_magnitude = dpo_gradient[place].abs()
    kto_magnitude = kto_gradient[place].abs()
    nats = round(distance[place].item())
    print(f"{nats:4d} nats: DPO {dpo_magnitude:.5f}   KTO {kto_magnitude:.5f}")

# %% [markdown]
# ## Why the reference point is detached
#
# *Section 5 does not say whether gradients flow through the KL term. In the authors' code of
# December 2023 they do, and the term is that of the examples on one GPU. In the KTO paper they do
# not.* This section shows what happens if they do. The functions without `detach` are made from the
# source of the project's functions, by deleting that word. The batch has four examples, two of each
# class, as on one of eight GPUs that share a batch of 32. The bars are minus the gradient of the
# batch's mean loss with respect to each reply's log-probability.


# %%
def without(function, word):
    """The function that its source defines if a word is deleted from it."""
    source = inspect.getsource(function)
    assert word in source
    namespace = {"torch": torch}
    exec(source.replace(word, ""), namespace)
    return namespace[function.__name__]


attached_loss = without(kto.kto_loss, ".detach()")
attached_kl = without(kto.kl_from_other_half, ".detach()")
log_ratios = torch.tensor([50.0, 2.0, 12.0, 8.0])
desirable = torch.tensor([True, True, False, False])


def minus_gradient(loss_function, kl_function):
    """Minus the gradient of the batch's mean loss, in each of the four log-ratios."""
    trained = log_ratios.clone().requires_grad_()
    kl = kl_function(trained, desirable)
    losses = loss_function(trained, torch.zeros(4), desirable, kl)
    (gradient,) = torch.autograd.grad(losses.mean(), trained)
    return -gradient


gradients = {
    "detached": minus_gradient(kto.kto_loss, kto.kl_from_other_half),
    "not detached": minus_gradient(attached_loss, attached_kl),
}
plots.detached_gradients(
    ["desirable\n+50 nats", "desirable\n+2 nats", "undesirable\n+12 nats", "undesirable\n+8 nats"],
    gradients,
)
print_row("log-ratio, nats", log_ratios, decimals=0)
for name, gradient in gradients.items():
    print_row(name, gradient, decimals=5)
for name, gradient in gradients.items():
    sums_to_zero = bool(gradient.sum().abs() < 1e-12)
    print(f"{name}: the sum is 0 to 1e-12: {sums_to_zero}")

# %% [markdown]
# The log-ratio of the first reply is far above its reference point. With the detach its gradient is
# nearly zero, because the value function is flat there. Without the detach its gradient is nine
# times as large, because this reply raises the mean that the undesirable replies are compared with.
#
# The gradients then also sum to zero. So the loss depends only on the differences between
# log-ratios: it does not change if all of them rise by the same amount, as the next cell shows. The
# two classes are contrasted, as in a preference loss. With the detach, each reply is compared with
# a fixed expectation. (This holds where the mean log-ratios are above 0. No gradient flows through
# a mean that is clamped.)

# %%
losses = []
for shift in (0, 30):
    shifted = log_ratios + shift
    kl = attached_kl(shifted, desirable)
    losses.append(attached_loss(shifted, torch.zeros(4), desirable, kl))
change = (losses[1] - losses[0]).abs().max()
print(f"largest change of a loss if all log-ratios rise by 30 nats: {change:.1f}")

# %% [markdown]
# ## Why it is clamped
#
# *Section 5 calls the reference point a KL divergence, which is never negative.* Its estimate from
# a few replies can be negative, even if they are sampled from the policy itself. An example is
# $\pi^*$ of the five replies at $\beta = 3$, with batches of 16:

# %%
best, _ = optimum(3.0)
log_ratio = (best / reference).log()
exact_kl = (best * log_ratio).sum()
draws = torch.multinomial(best, 16 * 10_000, replacement=True, generator=generator)
estimates = log_ratio[draws].view(10_000, 16).mean(1)
share_negative = (estimates < 0).double().mean()
print(f"exact KL divergence: {exact_kl:.3f} nats")
print(f"estimates from 16 samples that are negative: {share_negative:.0%}")

# %% [markdown]
# Moreover, the other half of a batch is not sampled from the policy. In the next picture, both
# classes lose probability together, and the desirable reply stays 10 nats ahead. Without the clamp
# both losses are constant: a desirable reply that has become $e^{40}$ times less likely still has a
# low loss, because it is ahead of the undesirable one. With the clamp, the loss of the desirable
# reply rises as it loses probability.

# %%
unclamped_kl = without(kto.kl_from_other_half, ".clamp(min=0)")
mean_log_ratio = torch.linspace(-60, 30, 181)


def losses_by_class(kl_function):
    """The losses of a pair, 10 nats apart, at each mean log-ratio."""
    is_desirable = torch.tensor([True, False])
    losses = []
    for mean in mean_log_ratio:
        log_ratios = mean + torch.tensor([5.0, -5.0])
        kl = kl_function(log_ratios, is_desirable)
        losses.append(kto.kto_loss(log_ratios, torch.zeros(2), is_desirable, kl))
    losses = torch.stack(losses)
    return {"desirable": losses[:, 0], "undesirable": losses[:, 1]}


plots.clamped_losses(
    mean_log_ratio, losses_by_class(unclamped_kl), losses_by_class(kto.kl_from_other_half)
)

# %% [markdown]
# ## Rewards that differ by a function of the prompt
#
# *A theorem of the KTO paper.* Two rewards $r$ and $r + h(x)$ have the same best policy and the
# same preferences, for any function $h$ of the prompt alone. But people may value their outcomes
# differently. Preferences, and a loss on preferences, cannot distinguish such rewards. A value
# function can.
#
# Suppose that two prompts have the five replies from above, with the same rewards. Then add 1.5 to
# all rewards of the first prompt and subtract 1.5 from those of the second. The reference point is
# one number for both prompts, as KTO's is for a batch. Here it is the mean reward.

# %%
beta = 0.5
prompt_term = torch.tensor([[1.5], [-1.5]])  # h(x) of the two prompts
rewards_by_name = {
    "r": reward.expand(2, 5),
    "r + h": reward + prompt_term,
}  # (2 prompts, 5 replies)
policies = []
preferences = []
values = {}
for name, rewards in rewards_by_name.items():
    policy = (reference.log() + rewards / beta).softmax(-1)
    mean_reward = (policy * rewards).sum(-1).mean()
    policies.append(policy)
    preferences.append(ppo_offline.rlhf_value(rewards[:, first], rewards[:, second]))
    values[name] = kto.kahneman_tversky_value(rewards, mean_reward)
same_policies = torch.allclose(policies[0], policies[1], atol=1e-12)
same_preferences = torch.allclose(preferences[0], preferences[1], atol=1e-12)
print(f"best policies equal to 1e-12: {same_policies}")
print(f"preferences equal to 1e-12:   {same_preferences}")
print()
print(f"{'Kahneman-Tversky values':<26}" + "".join(f"{reply:>14}" for reply in REPLIES))
for name, values_of_prompts in values.items():
    for number, values_of_prompt in enumerate(values_of_prompts, 1):
        numbers = "".join(f"{value:14.2f}" for value in values_of_prompt)
        print(f"    {name:<6} prompt {number}       {numbers}")

# %% [markdown]
# With $r + h$, even the best reply to the second prompt is a loss, and even a vague reply to the
# first prompt is a gain. A loss on labelled single replies can express this, and a loss on pairs
# cannot. (If each prompt had its own mean as the reference point, $h$ would cancel.)

# %% [markdown]
# ## Contradictory preferences
#
# *A theorem of the KTO paper.* A share $p > 1/2$ of people prefers $y_a$ to $y_b$, and the others
# prefer $y_b$ to $y_a$. If
# $p^{1/\beta}\,\pi_{\text{ref}}(y_a) < (1-p)^{1/\beta}\,\pi_{\text{ref}}(y_b)$, the best DPO policy
# is more likely to give the minority's $y_b$. The best KTO policy gives $y_a$.
#
# In the smallest case there are two replies, so a policy is one number $q = \pi(y_a)$. DPO's best
# policy has a closed form: $\sigma(\beta(r_a - r_b)) = p$, so its odds $\frac{q}{1-q}$ are
# $\big(\frac{p}{1-p}\big)^{1/\beta}$ times those of $\pi_{\text{ref}}$. For KTO each preference is
# two examples, as in the trainer.

# %%
p = 0.6
beta = 0.1
reference_a = 0.01


def log_ratios_of(q):
    """The log-ratios of y_a and y_b."""
    return (q / reference_a).log(), ((1 - q) / (1 - reference_a)).log()


def expected_dpo_loss_of(q):
    """DPO's loss of a policy, averaged over people."""
    r_a, r_b = log_ratios_of(q)
    zeros = torch.zeros_like(q)
    loss_if_a_chosen = dpo.dpo_loss(r_a, r_b, zeros, zeros, beta)
    loss_if_b_chosen = dpo.dpo_loss(r_b, r_a, zeros, zeros, beta)
    return p * loss_if_a_chosen + (1 - p) * loss_if_b_chosen


def expected_kto_loss_of_reply(log_ratio, share_desirable, kl):
    """KTO's loss of a reply that a share of people calls desirable, the others undesirable."""
    zeros = torch.zeros_like(log_ratio)
    is_desirable = torch.ones_like(log_ratio).bool()
    loss_if_desirable = kto.kto_loss(log_ratio, zeros, is_desirable, kl, beta)
    loss_if_undesirable = kto.kto_loss(log_ratio, zeros, ~is_desirable, kl, beta)
    return share_desirable * loss_if_desirable + (1 - share_desirable) * loss_if_undesirable


def expected_kto_loss_of(q, kl):
    """KTO's loss of a policy, averaged over people and the two examples of each."""
    r_a, r_b = log_ratios_of(q)
    loss_a = expected_kto_loss_of_reply(r_a, p, kl)
    loss_b = expected_kto_loss_of_reply(r_b, 1 - p, kl)
    return (loss_a + loss_b) / 2


left = p ** (1 / beta) * reference_a
right = (1 - p) ** (1 / beta) * (1 - reference_a)
print(f"p = {p}, beta = {beta}, pi_ref(y_a) = {reference_a}")
print(f"the condition, {left:.1e} < {right:.1e}, holds: {left < right}")
best_odds = (p / (1 - p)) ** (1 / beta) * reference_a / (1 - reference_a)
q_best = best_odds / (1 + best_odds)
found = minimize_scalar(
    lambda q: expected_dpo_loss_of(torch.tensor(q)).item(), bounds=(1e-9, 1 - 1e-9)
)
compare("pi(y_a) of the best DPO policy", q_best, found.x)

q = torch.linspace(-12, 12, 401).sigmoid().requires_grad_()
r_a, r_b = log_ratios_of(q)
exact_kl = q * r_a + (1 - q) * r_b
always_falls = True
for reference_point in (0.0, 1.0, 10.0, exact_kl):
    expected_loss = expected_kto_loss_of(q, reference_point)  # kto_loss detaches it
    (slope,) = torch.autograd.grad(expected_loss.sum(), q)
    always_falls = always_falls and bool((slope < 0).all())
print(f"KTO's loss falls as pi(y_a) rises, at every policy tried: {always_falls}")

# %% [markdown]
# Let a share $s$ of people call a reply desirable. Its expected KTO loss is
# $s(1 - \sigma(z)) + (1 - s)\sigma(z) = s + (1 - 2s)\sigma(z)$. For $y_a$, with $s = p > 1/2$, this
# falls as its reward rises. For $y_b$, with $s = 1 - p$, it rises. So $q \to 1$ is best, whatever
# the reference point is.

# %%
q = q.detach()
losses = {"DPO": expected_dpo_loss_of(q), "KTO": expected_kto_loss_of(q, 0.0)}
best_loss = expected_dpo_loss_of(torch.tensor(q_best))
betas = torch.linspace(0.05, 1, 400)
best_odds_by_beta = (p / (1 - p)) ** (1 / betas) * reference_a / (1 - reference_a)
best_by_beta = {
    "DPO": best_odds_by_beta / (1 + best_odds_by_beta),
    "KTO": torch.ones_like(betas),
}
plots.contradictory_preferences(
    q.logit(), losses, (math.log(best_odds), best_loss), betas, best_by_beta, reference_a
)
largest_beta = math.log(p / (1 - p)) / math.log((1 - reference_a) / reference_a)
print(f"DPO's best policy prefers the majority's reply if beta is below {largest_beta:.3f}")

# %% [markdown]
# DPO's best policy prefers the majority's reply only if $\beta$ is small, because
# $\pi_{\text{ref}}$ gives $y_a$ so little probability. KTO's best policy gives $y_a$ at every
# $\beta$. (A run need not reach the best policy: far from the reference point KTO's gradient
# vanishes, as the section on saturation shows. And where the minority is right, KTO ignores it in
# the same way.)
