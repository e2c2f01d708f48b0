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
# The report's claim is that a loss which learns from human feedback assumes, without saying so, how
# people value an outcome. This notebook draws those assumptions from the functions that the
# trainers' files hold, and measures what the report says of them.

# %%
import sys

sys.path.insert(0, "..")  # the project's folder

import math

import matplotlib.pyplot as plt
import torch
from scipy.optimize import brentq

from dpo import dpo_loss, dpo_value
from kto import kahneman_tversky_value, kto_loss, kto_value
from ppo_offline import ppo_offline_loss, rlhf_value
from sft import sft_loss
from slic import slic_loss, slic_value

plt.style.use("figures.mplstyle")
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## 1. Figure 4
#
# *Section 4, Figure 4.* On the x axis lies the outcome relative to the reference point: money for
# Kahneman and Tversky, a reward for the others. For RLHF, DPO and SLiC the reference point is the
# reward of the rejected reply; for KTO, which section 5 adds, it is what a reply of the policy is
# worth anyway. SLiC's margin is 1. KTO's curve is RLHF's: both are the logistic function, and they
# differ in the reference point alone.

# %%
outcome = torch.linspace(-4, 4, 1601)
zero = torch.zeros(())
VALUES = {  # name: (value of an outcome relative to the reference point, its line)
    "Kahneman-Tversky (6)": (lambda z: kahneman_tversky_value(z, 0.0), "C0-"),
    "RLHF": (lambda z: rlhf_value(z, zero), "C1-"),
    "DPO": (lambda z: dpo_value(z, zero), "C2-"),
    "SLiC": (lambda z: slic_value(z, zero, beta=1.0), "C3-"),
    "KTO": (lambda z: kto_value(z, 0.0), "k:"),
}


def axes_at_reference(axes, xlabel, ylabel, title):
    axes.axvline(0, color="0.8", lw=1, zorder=0)
    axes.axhline(0, color="0.8", lw=1, zorder=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)


figure, axes = plt.subplots(figsize=(7, 4.5))
for name, (value, line) in VALUES.items():
    axes.plot(outcome, value(outcome), line, label=name)
axes_at_reference(
    axes, "outcome relative to the reference point", "value", "Figure 4, from the code's functions"
)
axes.legend()
plt.show()

# %% [markdown]
# ## 2. The three qualities
#
# *Section 4, the list under equation (6).* A human value function has a reference point, is concave
# in gains and convex in losses, and is steeper in losses. The first picture cannot show the third,
# since the curves pass the reference point at different heights. Here each is measured from its own
# value there, losses turned over to lie on gains: loss aversion is the gap between the broken line
# and the full one.

# %%
size = outcome[outcome > 0]
figure, panels = plt.subplots(1, 4, figsize=(10, 2.8))
for axes, (name, (value, _)) in zip(panels, VALUES.items()):
    axes.plot(size, value(size) - value(zero), "C0-", label="gained by $+d$")
    axes.plot(size, value(zero) - value(-size), "C1--", label="lost by $-d$")
    axes.set(xlabel="distance $d$", title=name + (" = KTO" if name == "RLHF" else ""))
panels[0].set_ylabel("value, from the reference point")
panels[0].legend()
plt.show()

# %% [markdown]
# And in figures: curvature from second differences on the grid; loss aversion as the value lost by
# an outcome of $-d$ over the value gained by one of $+d$.

# %%
TOLERANCE = 1e-10


def curvature(z, value):
    """What the second differences of a function on an even grid say."""
    bends = value(z).diff().diff()
    return {
        (True, True): "linear",
        (True, False): "concave",
        (False, True): "convex",
        (False, False): "both",
    }[bool((bends <= TOLERANCE).all()), bool((bends >= -TOLERANCE).all())]


def loss_aversion(value, d):
    d = torch.tensor(d)
    return ((value(zero) - value(-d)) / (value(d) - value(zero))).item()


head = "loss aversion at d = 0.1     1     4"
print(f"{'':<22}{'gains':<10}{'losses':<10}{head:>40}")
for name, (value, _) in VALUES.items():
    shape = f"{curvature(size, value):<10}{curvature(-size, value):<10}"
    ratios = "".join(f"{loss_aversion(value, d):6.2f}" for d in (0.1, 1.0, 4.0))
    print(f"{name:<22}{shape}{ratios:>40}")

# %% [markdown]
# The report says that *most* are concave in gains and convex in losses, and that *most* demonstrate
# loss aversion. Measured: both at once hold for Kahneman and Tversky alone. RLHF (and KTO, by the
# report's own choice) bends the right way and weighs gains and losses alike. DPO and SLiC are
# averse to losses, but not near the reference point, and neither is strictly convex in losses: DPO
# is concave there too, SLiC a straight line.

# %% [markdown]
# ## 3. The knobs
#
# *Equation (6) has $\alpha$ and $\lambda$, with medians 0.88 and 2.25 over people; the losses have
# $\beta$.* $\alpha$ is how soon more of the same counts less. $\lambda$ is how much more a loss
# counts; 1.5 to 3.0 is the range that a later review of the method asks to see. $\beta$ is KTO's: a
# reward is $\beta$ times a log-ratio, so it sets how many nats of log-probability a person takes
# for a large gain.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3.2))
for alpha, line in ((0.5, "C1--"), (0.88, "C0-"), (1.0, "C2:")):
    curve = kahneman_tversky_value(outcome, 0.0, alpha=alpha)
    panels[0].plot(outcome, curve, line, label=rf"$\alpha = {alpha}$")
for aversion, line in ((1.5, "C1--"), (2.25, "C0-"), (3.0, "C2:")):
    curve = kahneman_tversky_value(outcome, 0.0, loss_aversion=aversion)
    panels[1].plot(outcome, curve, line, label=rf"$\lambda = {aversion}$")
nats = torch.linspace(-40, 40, 801)
for beta, line in ((0.05, "C1--"), (0.1, "C0-"), (0.5, "C2:")):
    panels[2].plot(nats, kto_value(beta * nats, 0.0), line, label=rf"$\beta = {beta}$")
axes_at_reference(panels[0], "outcome", "value", r"(6), $\lambda = 2.25$")
axes_at_reference(panels[1], "outcome", "value", r"(6), $\alpha = 0.88$")
axes_at_reference(panels[2], "log-ratio past the reference point, nats", "value", "KTO")
for axes in panels:
    axes.legend()
plt.show()

# %% [markdown]
# ## 4. The gamble of 100 dollars
#
# *Section 4, under equation (6).* Someone would take 60 dollars for sure instead of 100 dollars
# with probability 0.8, and the report puts this down to loss aversion. What does (6) itself give?
# It hangs on the reference point.
#
# - What one has now: the gamble has no losses, so $\lambda$ does not enter. The certain amount $c$
#   is worth as much as the gamble: $h(c) = 0.8\,h(100)$.
# - What one is guaranteed: against a sure $c$, ending with nothing is a loss of $c$:
#   $0.8\,h(100 - c) + 0.2\,h(-c) = 0$.
#
# (The gamble's probabilities count here as they are. Prospect theory also bends those.)


# %%
def money(z, **settings):
    return kahneman_tversky_value(torch.tensor(float(z)), 0.0, **settings).item()


def against_now(c, **settings):
    return money(c, **settings) - 0.8 * money(100, **settings)


def against_the_sure_amount(c, **settings):
    return 0.8 * money(100 - c, **settings) + 0.2 * money(-c, **settings)


print(f"expected value                                       {0.8 * 100:6.1f} dollars")
print(f"certain amount, against what one has now             {brentq(against_now, 1, 99):6.1f}")
sure = brentq(against_the_sure_amount, 1, 99)
print(f"certain amount, against what one is guaranteed       {sure:6.1f}")
alpha = brentq(lambda alpha: against_now(60, alpha=alpha), 0.1, 1)
print(f"for 60 dollars against now, alpha must be            {alpha:6.2f}  (0.88)")
aversion = brentq(lambda a: against_the_sure_amount(60, loss_aversion=a), 1, 9)
print(f"for 60 against the sure amount, lambda must be       {aversion:6.2f}  (2.25)")

# %% [markdown]
# Loss aversion explains the report's 60 dollars only if the sure amount is the reference point. The
# same outcome, another reference point, another choice: this is why sections 4 and 5 care about
# what a reply is measured against.

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
# (PPO: the sign in $\pm$ is that of the advantage $A$, which is already a surplus over what was to
# be expected of the policy.)
#
# First the forms, on random log-probabilities: is the loss of the trainer's file $a\,v(z) + C$?

# %%
generator = torch.Generator().manual_seed(1)


def random_logps():
    return -20 * torch.rand(1000, generator=generator)


policy_w, policy_l, reference_w, reference_l = (random_logps() for _ in range(4))
desirable = torch.rand(1000, generator=generator) < 0.5
advantages = 2 * torch.rand(1000, generator=generator) - 1
beta = 0.1
kl = 1.5
epsilon = 0.5


def ppo(policy, reference):
    """PPO's loss, each log-probability a reply of one token with a given advantage."""
    tokens = policy[:, None], reference[:, None], advantages[:, None]
    return ppo_offline_loss(*tokens, torch.ones(1000, 1), epsilon).squeeze(1)


def ppo_value(z, advantage):
    return torch.minimum(z, (1 + epsilon * advantage.sign()) * advantage)


# Half of the log-ratios within PPO's clip, the others anywhere.
near = torch.where(torch.arange(1000) % 2 == 0, policy_w + reference_w / 20, reference_w)
reward_w = beta * (policy_w - reference_w)
reward_l = beta * (policy_l - reference_l)
sign = torch.where(desirable, -1.0, 1.0)
constant = torch.where(desirable, 1.0, 0.0)
margin = policy_w - policy_l
scale = torch.zeros(1000)
differences = {
    "DPO": dpo_loss(policy_w, policy_l, reference_w, reference_l, beta)
    + dpo_value(reward_w, reward_l),
    "KTO": kto_loss(policy_w, reference_w, desirable, kl, beta)
    - sign * kto_value(reward_w, beta * kl)
    - constant,
    "PPO": ppo(policy_w, near)
    + ppo_value((policy_w - near).clamp(-20, 20).exp() * advantages, advantages),
    "SLiC, (5) alone": slic_loss(policy_w, policy_l, policy_w, 1.0, lambda_reg=0.0)
    + slic_value(policy_w, policy_l, 1.0),
}
for name, difference in differences.items():
    print(f"{name:<18}below 1e-12: {bool(difference.abs().max() < 1e-12)}")

# %% [markdown]
# Then the shapes, and one thing that every HALO must do: see policy and reference through rewards
# alone. So the log-probabilities of policy and reference move together, reply by reply, by random
# amounts; rewards stay as they were, and so must the loss.

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
    "PPO": ppo(moved_w, near + shift_w) - ppo(policy_w, near),
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
    rises = bool((value(wide).diff() >= -TOLERANCE).all())
    print(f"{name:<18}{rises!s:<18}{curvature(wide[wide > 0], value)}")
print("\nmost that the loss changes while every reward stays")
for name, change in changes.items():
    most = change.abs().max().item()
    print(f"{name:<18}{0.0 if most < 1e-12 else most:.1f}")

# %% [markdown]
# SLiC and SFT move: they have no reference model, and no $v$ of rewards can say what they do. For
# (5) alone a uniform $\pi_{\text{ref}}$ would serve (the paper's first version counts it as a
# HALO). The language-modelling term takes that away again: with the same difference of the two
# replies, so the same $z$, the loss still depends on how likely they are.

# %%
for name, lambda_reg in (("(5) alone", 0.0), ("with the language-modelling term", 0.1)):
    before = slic_loss(policy_w, policy_l, policy_w, 1.0, lambda_reg)
    after = slic_loss(policy_w - 5, policy_l - 5, policy_w - 5, 1.0, lambda_reg)
    print(f"{name:<34}changes by {(after - before).abs().max():.1f} when both replies lose 5 nats")

# %% [markdown]
# **DPO, KTO and clipped PPO are HALOs; SLiC and SFT are not**, as the paper says. Two remarks on
# what was measured:
#
# - KTO's reference point is clamped at 0 and estimated from a batch. Where the clamp holds it is no
#   expectation over any $Q$ that the definition names. With two unequal class weights it takes a
#   $v$ for each class.
# - PPO passes with $z$ the ratio times the advantage, token by token, each with its own cap. As a
#   function of the log-ratio, which the definition calls the reward, its curve is *not* concave in
#   gains: for $A > 0$ the exponential bends up, until the clip. (For $A < 0$ it falls; turned over
#   by $a = +1$ it rises, and is convex in all gains.)

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2))
log_ratio = torch.linspace(-1.5, 1.5, 601)
for advantage, line in ((1.0, "C0-"), (-1.0, "C1--")):
    a = torch.tensor(advantage)
    label = f"A = {advantage:+.0f}"
    panels[0].plot(wide / 4, ppo_value(wide / 4, a), line, label=label)
    panels[1].plot(log_ratio, ppo_value(log_ratio.exp() * a, a), line, label=label)
axes_at_reference(panels[0], "ratio times advantage", "value", "PPO as a HALO")
axes_at_reference(panels[1], "log-ratio, nats", "value", "the same, against the log-ratio")
edge = math.log(1 + epsilon)
panels[1].axvspan(0, edge, color="0.92", zorder=0)
panels[1].text(edge / 2, -3.6, "convex\nin gains", ha="center", color="0.3")
for axes in panels:
    axes.legend(loc="upper left")
plt.show()
gains = torch.linspace(1e-3, edge - 1e-3, 200)
bend = curvature(gains, lambda z: ppo_value(z.exp(), torch.tensor(1.0)))
print(f"A = +1, log-ratio from 0 to log(1 + epsilon) = {edge:.3f}: {bend}")
