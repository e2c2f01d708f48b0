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
# # Value functions
#
# *The [report](https://github.com/ContextualAI/HALOs/blob/main/assets/report.pdf),
# section 4: equation (6), the three value functions under it, and Figure 4. Section 5 for KTO's.*
#
# The report says that a loss which learns from human feedback implicitly assumes how people value
# an outcome. This notebook computes these value functions with the trainers' own code, and checks
# what the report says about them. (`plots.py`, beside this notebook, only draws.)

# %%
import sys

sys.path.insert(0, "..")  # the project's folder

import math

import plots
import torch
from scipy.optimize import brentq

from dpo import dpo_loss, dpo_value
from kto import kahneman_tversky_value, kto_loss, kto_value
from ppo_offline import ppo_offline_loss, rlhf_value
from sft import sft_loss
from slic import slic_loss, slic_value

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. Figure 4
#
# *Section 4, Figure 4.* The x axis is the outcome relative to the reference point. The outcome is
# an amount of money for Kahneman and Tversky, and a reward for the others. For RLHF, DPO and SLiC
# the reference point is the reward of the rejected reply. For KTO, which section 5 adds, it is the
# expected reward of the policy's replies. SLiC's margin is 1. KTO and RLHF have the same curve, the
# logistic function. They differ only in the reference point.

# %%
outcome = torch.linspace(-4, 4, 1601)
zero = torch.zeros(())
VALUES = {  # name: value of an outcome relative to the reference point
    "Kahneman-Tversky": lambda z: kahneman_tversky_value(z, 0.0),
    "RLHF": lambda z: rlhf_value(z, zero),
    "DPO": lambda z: dpo_value(z, zero),
    "SLiC": lambda z: slic_value(z, zero, beta=1.0),
    "KTO": lambda z: kto_value(z, 0.0),
}
values = {}
for name, value in VALUES.items():
    values[name] = value(outcome)
plots.value_functions(outcome, values)

# %% [markdown]
# ## 2. The three qualities
#
# *Section 4, the list under equation (6).* A human value function has a reference point, is concave
# in gains and convex in losses, and is steeper in losses. The first picture does not show the third
# quality well, because the curves have different values at the reference point. Here each curve is
# measured from its own value at the reference point, and losses are drawn with the opposite sign.
# A function is loss averse where the dashed line is above the solid one.

# %%
distance = outcome[outcome > 0]
gained = {}
lost = {}
for name, value in VALUES.items():
    gained[name] = value(distance) - value(zero)
    lost[name] = value(zero) - value(-distance)
plots.gains_and_losses(distance, gained, lost)

# %% [markdown]
# The next table has the same in numbers. Curvature is computed from second differences on the grid.
# Loss aversion is the value lost by an outcome of $-d$, divided by the value gained by one of $+d$.

# %%
TOLERANCE = 1e-10


def curvature(z, value):
    """The curvature of a function, from its second differences on an even grid."""
    second_differences = value(z).diff().diff()
    is_concave = bool((second_differences <= TOLERANCE).all())
    is_convex = bool((second_differences >= -TOLERANCE).all())
    if is_concave and is_convex:
        return "linear"
    if is_concave:
        return "concave"
    if is_convex:
        return "convex"
    return "both"


def loss_aversion(value, d):
    """Value lost by an outcome of -d, divided by the value gained by one of +d."""
    d = torch.tensor(d)
    value_lost = value(zero) - value(-d)
    value_gained = value(d) - value(zero)
    return (value_lost / value_gained).item()


print("                                          loss aversion at d =")
print("                      gains     losses       0.1     1     4")
for name, value in VALUES.items():
    gains = curvature(distance, value)
    losses = curvature(-distance, value)
    near = loss_aversion(value, 0.1)
    middle = loss_aversion(value, 1.0)
    far = loss_aversion(value, 4.0)
    print(f"{name:<22}{gains:<10}{losses:<10}{near:6.2f}{middle:6.2f}{far:6.2f}")

# %% [markdown]
# The report says that *most* are concave in gains and convex in losses, and that *most* demonstrate
# loss aversion. As measured here, only Kahneman and Tversky's function has both properties. RLHF
# (and KTO, by the report's own choice) is concave in gains and convex in losses, but weighs gains
# and losses equally. DPO and SLiC are loss averse, but not near the reference point. Neither is
# strictly convex in losses: DPO is concave there too, and SLiC is linear.

# %% [markdown]
# ## 3. The settings
#
# *Equation (6) has $\alpha$ and $\lambda$, with medians 0.88 and 2.25 over people. The losses have
# $\beta$.* $\alpha$ sets the curvature: below 1, each further dollar counts less. $\lambda$ is how
# many times as much a loss counts as an equal gain. $\beta$ is KTO's: a reward is $\beta$ times a
# log-ratio, so $\beta$ sets how many nats of log-probability count as a large gain.

# %%
by_alpha = {}
for alpha in (0.5, 0.88, 1.0):
    curve = kahneman_tversky_value(outcome, 0.0, alpha=alpha)
    by_alpha[rf"$\alpha = {alpha}$"] = curve
by_loss_aversion = {}
for aversion in (1.5, 2.25, 3.0):
    curve = kahneman_tversky_value(outcome, 0.0, loss_aversion=aversion)
    by_loss_aversion[rf"$\lambda = {aversion}$"] = curve
nats = torch.linspace(-40, 40, 801)
by_beta = {}
for beta in (0.05, 0.1, 0.5):
    by_beta[rf"$\beta = {beta}$"] = kto_value(beta * nats, 0.0)
plots.value_settings(outcome, by_alpha, by_loss_aversion, nats, by_beta)

# %% [markdown]
# ## 4. The gamble of 100 dollars
#
# *Section 4, under equation (6).* Someone would take 60 dollars for sure instead of 100 dollars
# with probability 0.8. The report attributes this to loss aversion. What does (6) itself give? It
# depends on the reference point.
#
# - The reference point is what one has now: the gamble has no losses, so $\lambda$ does not enter.
#   The certain amount $c$ is worth as much as the gamble: $h(c) = 0.8\,h(100)$.
# - The reference point is the certain amount $c$: ending with nothing is a loss of $c$. The gamble
#   is worth as much as the certain amount if $0.8\,h(100 - c) + 0.2\,h(-c) = 0$.
#
# (Prospect theory also transforms the probabilities. That is left out here.)


# %%
def money_value(dollars, **settings):
    """The value of a gain or loss in dollars, by (6)."""
    return kahneman_tversky_value(torch.tensor(float(dollars)), 0.0, **settings).item()


def certain_minus_gamble(certain, **settings):
    """Value of the certain amount minus value of the gamble, both relative to what one has now."""
    return money_value(certain, **settings) - 0.8 * money_value(100, **settings)


def gamble_against_certain(certain, **settings):
    """Value of the gamble relative to the certain amount."""
    won = money_value(100 - certain, **settings)
    lost = money_value(-certain, **settings)
    return 0.8 * won + 0.2 * lost


expected = 0.8 * 100
certain_from_now = brentq(certain_minus_gamble, 1, 99)
certain_from_itself = brentq(gamble_against_certain, 1, 99)
alpha_for_60 = brentq(lambda alpha: certain_minus_gamble(60, alpha=alpha), 0.1, 1)
aversion_for_60 = brentq(lambda aversion: gamble_against_certain(60, loss_aversion=aversion), 1, 9)
print(f"expected value of the gamble: {expected:.1f} dollars")
print()
print("If the reference point is what one has now:")
print(f"    certain amount that is worth the gamble: {certain_from_now:.1f} dollars")
print(f"    alpha that makes it 60 dollars: {alpha_for_60:.2f} (the median is 0.88)")
print("If the reference point is the certain amount:")
print(f"    certain amount that is worth the gamble: {certain_from_itself:.1f} dollars")
print(f"    lambda that makes it 60 dollars: {aversion_for_60:.2f} (the median is 2.25)")

# %% [markdown]
# Loss aversion contributes to the report's 60 dollars only if the certain amount is the reference
# point: then a $\lambda$ of 2.80 explains it. The same outcomes lead to different choices if the
# reference point is different. This is why the reference point matters in sections 4 and 5.

# %% [markdown]
# ## 5. Which of the five losses is a HALO?
#
# *The report says what a HALO is in words only (section 4). The KTO paper (arXiv 2402.01306)
# defines it.* With the implied reward
# $r_\theta(x,y) = l \cdot \log \frac{\pi_\theta(y|x)}{\pi_{\text{ref}}(y|x)}$, $l > 0$, a loss is a
# HALO if it can be written as
#
# $$\mathbb{E}\big[a_{x,y}\; v\big(r_\theta(x,y) - \mathbb{E}_{y' \sim Q}[r_\theta(x,y')]\big)\big]
# + C$$
#
# with $a_{x,y}$ either $+1$ or $-1$, a distribution $Q$ that gives the reference point, a constant
# $C$ of the data, and a value function $v$ that never decreases and is concave in gains, on
# $(0, \infty)$. In losses $v$ need not be convex, so DPO may pass. What each would have to be:
#
# | loss | $a$ | $v(z)$ | reference point |
# | --- | --- | --- | --- |
# | DPO | $-1$ | $\log\sigma(z)$ | the rejected reply's reward |
# | KTO | $-1$ desirable, $+1$ undesirable | $\sigma(z)$ | the KL divergence times $\beta$ |
# | PPO, a token | $-1$ | $\min(z, (1 \pm \epsilon)A)$, $z$ = ratio times $A$ | in $A$ |
# | SLiC, (5) alone, uniform $\pi_{\text{ref}}$ | $-1$ | $\min(0, z - \beta)$ | as DPO's |
# | SLiC, SFT | | no such $v$ | |
#
# (PPO: the sign in $\pm$ is that of the advantage $A$, which is already relative to the expected
# return of the policy.)
#
# The first check is of the forms, on random log-probabilities: is the loss in the trainer's file
# equal to $a\,v(z) + C$?

# %%
generator = torch.Generator().manual_seed(1)


def random_logps():
    return -20 * torch.rand(1000, generator=generator)


policy_w = random_logps()
policy_l = random_logps()
reference_w = random_logps()
reference_l = random_logps()
desirable = torch.rand(1000, generator=generator) < 0.5
advantages = 2 * torch.rand(1000, generator=generator) - 1
beta = 0.1
kl = 1.5
epsilon = 0.5


def ppo(policy, reference):
    """PPO's loss of 1000 replies of one token each."""
    mask = torch.ones(1000, 1)
    losses = ppo_offline_loss(
        policy[:, None], reference[:, None], advantages[:, None], mask, epsilon
    )
    return losses.squeeze(1)


def ppo_value(z, advantage):
    """PPO's v in the table, of z = ratio times advantage."""
    return torch.minimum(z, (1 + epsilon * advantage.sign()) * advantage)


# PPO's reference: half of the log-ratios are within its clip or near it, the others anywhere.
is_near = torch.arange(1000) % 2 == 0
reference_ppo = torch.where(is_near, policy_w + reference_w / 20, reference_w)
reward_w = beta * (policy_w - reference_w)
reward_l = beta * (policy_l - reference_l)
sign = torch.where(desirable, -1.0, 1.0)
constant = torch.where(desirable, 1.0, 0.0)
ratio = (policy_w - reference_ppo).clamp(-20, 20).exp()
differences = {  # the loss minus (a v(z) + C)
    "DPO": dpo_loss(policy_w, policy_l, reference_w, reference_l, beta)
    + dpo_value(reward_w, reward_l),
    "KTO": kto_loss(policy_w, reference_w, desirable, kl, beta)
    - sign * kto_value(reward_w, beta * kl)
    - constant,
    "PPO": ppo(policy_w, reference_ppo) + ppo_value(ratio * advantages, advantages),
    "SLiC, (5) alone": slic_loss(policy_w, policy_l, policy_w, 1.0, lambda_reg=0.0)
    + slic_value(policy_w, policy_l, 1.0),
}
for name, difference in differences.items():
    is_equal = bool(difference.abs().max() < 1e-12)
    print(f"{name:<18}equal to 1e-12: {is_equal}")

# %% [markdown]
# The second check is of the shapes. The third is of a property that every HALO must have: it
# depends on policy and reference through rewards only. Here the log-probabilities of policy and
# reference are shifted together, by a random amount for each reply. The rewards do not change, so a
# HALO's loss must not change.

# %%
shift_w = random_logps()
shift_l = random_logps()
moved_w = policy_w + shift_w
moved_l = policy_l + shift_l
changes = {
    "DPO": dpo_loss(moved_w, moved_l, reference_w + shift_w, reference_l + shift_l, beta)
    - dpo_loss(policy_w, policy_l, reference_w, reference_l, beta),
    "KTO": kto_loss(moved_w, reference_w + shift_w, desirable, kl, beta)
    - kto_loss(policy_w, reference_w, desirable, kl, beta),
    "PPO": ppo(moved_w, reference_ppo + shift_w) - ppo(policy_w, reference_ppo),
    "SLiC": slic_loss(moved_w, moved_l, moved_w) - slic_loss(policy_w, policy_l, policy_w),
    "SFT": sft_loss(moved_w) - sft_loss(policy_w),
}
wide = torch.linspace(-8, 8, 1601)
shapes = {
    "DPO": lambda z: dpo_value(z, zero),
    "KTO": lambda z: kto_value(z, 0.0),
    "PPO, A = +1": lambda z: ppo_value(z, torch.tensor(1.0)),
    "PPO, A = -1": lambda z: ppo_value(z, torch.tensor(-1.0)),
    "SLiC, (5) alone": lambda z: slic_value(z, zero, 1.0),
}
print(f"{'v':<18}never decreases   in gains")
for name, value in shapes.items():
    never_decreases = bool((value(wide).diff() >= -TOLERANCE).all())
    in_gains = curvature(wide[wide > 0], value)
    print(f"{name:<18}{never_decreases!s:<18}{in_gains}")
print()
print("largest change of the loss while every reward stays the same")
for name, change in changes.items():
    largest = change.abs().max().item()
    print(f"{name:<18}{largest:.1f}")

# %% [markdown]
# SLiC and SFT change: they have no reference model, so no $v$ of rewards describes them. (5) alone
# is a HALO with a uniform $\pi_{\text{ref}}$, and the paper's first version counts it as one. With
# the language-modelling term it is not: at the same difference between the two replies, and so at
# the same $z$, the loss still depends on their log-probabilities.

# %%
for name, lambda_reg in (("(5) alone", 0.0), ("with the language-modelling term", 0.1)):
    before = slic_loss(policy_w, policy_l, policy_w, 1.0, lambda_reg)
    after = slic_loss(policy_w - 5, policy_l - 5, policy_w - 5, 1.0, lambda_reg)
    change = (after - before).abs().max()
    print(f"{name:<34}changes by {change:.1f} when both replies lose 5 nats")

# %% [markdown]
# **DPO, KTO and clipped PPO are HALOs; SLiC and SFT are not**, as the paper says. Two remarks on
# what was measured:
#
# - KTO's reference point is clamped at 0 and estimated from a batch. While it is clamped, it is not
#   an expectation over any $Q$ that the definition names. With two unequal class weights KTO needs
#   a $v$ for each class.
# - PPO passes with $z$ the ratio times the advantage, token by token, each with its own cap. As a
#   function of the log-ratio, which the definition calls the reward, its curve is *not* concave in
#   gains: for $A > 0$ the exponential is convex up to the clip. (For $A < 0$ the curve decreases.
#   With $a = +1$ its sign changes. It then increases, and is convex in all gains.)

# %%
narrow = torch.linspace(-2, 2, 1601)
log_ratio = torch.linspace(-1.5, 1.5, 601)
by_outcome = {}
by_log_ratio = {}
for advantage in (torch.tensor(1.0), torch.tensor(-1.0)):
    label = f"A = {advantage:+.0f}"
    by_outcome[label] = ppo_value(narrow, advantage)
    by_log_ratio[label] = ppo_value(log_ratio.exp() * advantage, advantage)
clip = math.log(1 + epsilon)
plots.ppo_values(narrow, by_outcome, log_ratio, by_log_ratio, clip)

gains = torch.linspace(1e-3, clip - 1e-3, 200)
bend = curvature(gains, lambda log_ratio: ppo_value(log_ratio.exp(), torch.tensor(1.0)))
print(f"A = +1, log-ratio from 0 to log(1 + epsilon) = {clip:.3f}: {bend}")
