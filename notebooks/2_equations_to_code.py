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
# Each section has the equation, the lines that implement it (read from the trainers' files as this
# runs, so they are what trains), a number worked by hand, and where there is one an exact answer to
# compare with. An arrow marks the line that carries the equation's tag.

# %%
import sys

sys.path.insert(0, "..")  # the project's folder

import ast
import inspect
import itertools
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from scipy.optimize import minimize, minimize_scalar

import dpo
import kto
import ppo_offline
import sft
import slic

plt.style.use("figures.mplstyle")
torch.set_default_dtype(torch.float64)


def code(function):
    """A function's lines, without its docstring."""
    lines = inspect.getsource(function).splitlines()
    docstring = ast.parse("\n".join(lines)).body[0].body[0]
    return lines[: docstring.lineno - 1] + lines[docstring.end_lineno :]


def show(*functions):
    """Print functions as they stand in their files."""
    for function in functions:
        print(f"{Path(inspect.getfile(function)).name}")
        for line in code(function):
            print(("->" if re.search(r"# \(\d\)", line) else "  ") + f"  {line}")
        print()


def show_assignment(function, name):
    """Print the one statement of a function that sets a name."""
    text = inspect.getsource(function)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
    (node,) = [node for node in nodes if ast.unparse(node.targets[0]) == name]
    print(f"{Path(inspect.getfile(function)).name}, in {function.__name__}")
    print(f"    {ast.get_source_segment(text, node)}\n")


def compare(name, by_hand, computed):
    """Print a number worked by hand beside the project's."""
    print(f"{name:<48}by hand {by_hand:8.4f}   computed {float(computed):8.4f}")
    assert math.isclose(by_hand, float(computed), abs_tol=5e-5)


# %% [markdown]
# ## Five replies
#
# Sections 2 and 3 are about what is best over *all* replies, which nobody can list for a language
# model. So here a prompt has five, each with a true reward $r^*$ and a probability under
# $\pi_{\text{ref}}$.

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
# No trainer here fits a reward model: section 3 is about doing without. But the loss is minus the
# logarithm of (1), and that is what `dpo_value` holds.

# %%
show(dpo.dpo_value)
compare("-log of the above", math.log(1 + math.exp(-1.5)), -dpo.dpo_value(reward[0], reward[2]))

# %% [markdown]
# With every pair of the five, preferred as often as (1) says, the loss is least at the true reward,
# up to a constant: (1) has differences only. (scipy minimises; its gradient comes from autograd.
# This is the one place with a minimiser, and nothing here is a language model.)

# %%
first, second = torch.tensor(list(itertools.permutations(range(5), 2))).T
frequency = ppo_offline.rlhf_value(reward[first], reward[second]) / len(first)  # of i over j


def least(loss):
    """The five numbers that make a loss least."""

    def value_and_slope(x):
        x = torch.tensor(x, requires_grad=True)
        value = loss(x)
        (slope,) = torch.autograd.grad(value, x)
        return value.item(), slope.numpy()

    options = {"gtol": 1e-10, "maxiter": 1000}
    return torch.tensor(minimize(value_and_slope, [0.0] * 5, jac=True, options=options).x)


def reward_model_loss(r):
    return -(frequency * dpo.dpo_value(r[first], r[second])).sum()


fitted = least(reward_model_loss)
print("true reward, less its mean  ", *(f"{r:6.2f}" for r in reward - reward.mean()))
print("fitted reward, less its mean", *(f"{r:6.2f}" for r in fitted - fitted.mean()))

# %% [markdown]
# ## (2) What RLHF maximises
#
# *Section 2:* $\mathbb{E}_{y\sim\pi}[r(x, y)] - \beta D_{\text{KL}}(\pi \Vert \pi_{\text{ref}})$.
# *Section 3.1 gives the best policy:*
# $\pi^*(y|x) = \frac{1}{Z(x)} \pi_{\text{ref}}(y|x) \exp(r^*(x,y)/\beta)$.
#
# The trainers compute neither: DPO and KTO are there to replace them. With five replies both are a
# line, and the second can be tried against the first: by maximising, and by drawing rivals.


# %%
def objective(policy, beta):
    """(2), of a policy over the five replies."""
    return (policy * (reward - beta * (policy / reference).log())).sum(-1)


def optimum(beta):
    """pi* and log Z, in closed form."""
    weights = reference.log() + reward / beta
    return weights.softmax(0), weights.logsumexp(0)


generator = torch.Generator().manual_seed(1)
noise = torch.randn(20_000, 5, generator=generator)
print("beta     pi* (exact)                          found, at most off by   beats how many rivals")
for beta in (0.5, 1.0, 3.0):
    best, log_z = optimum(beta)
    found = least(lambda x, beta=beta: -objective(x.softmax(0), beta)).softmax(0)
    near = (best.log() + 0.1 * noise[:10_000]).softmax(-1)  # small changes of pi*
    far = (2 * noise[10_000:]).softmax(-1)  # anything
    beaten = (objective(torch.cat([near, far]), beta) < objective(best, beta)).sum().item()
    numbers = "  ".join(f"{p:.3f}" for p in best)
    off = (found - best).abs().max()
    assert off < 1e-6 and torch.isclose(objective(best, beta), beta * log_z)
    print(f"{beta:<8} {numbers}    below 1e-6              {beaten} of {len(noise)}")

# %% [markdown]
# And at its best (2) is worth exactly $\beta\log Z(x)$ (the `assert` checks it). What $\beta$ does:

# %%
betas = torch.logspace(-1.3, 1.7, 200)
policies = torch.stack([optimum(beta)[0] for beta in betas])
figure, axes = plt.subplots(figsize=(7, 3.5))
for i, (reply, line) in enumerate(zip(REPLIES, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))))):
    axes.semilogx(betas, policies[:, i], linestyle=line, label=reply)
    axes.plot(betas[-1] * 1.15, reference[i], "<", color=f"C{i}", clip_on=False)
axes.set(
    xlabel=r"$\beta$",
    ylabel=r"$\pi^*(y|x)$",
    title=r"from the best reply to $\pi_{ref}$ (triangles)",
)
axes.legend(loc="upper center", bbox_to_anchor=(0.6, 1.0))
plt.show()

# %% [markdown]
# ## (3) The reward that a policy is best for
#
# *Section 3.1:* $r^*(x, y) = \beta\log\frac{\pi^*(y|x)}{\pi_{\text{ref}}(y|x)} + \beta\log Z(x)$.
#
# The trainers have its first term, for metrics. The second is the same for all replies to a prompt:
# it drops out of DPO's difference, and section 5 subtracts it with the expectation.

# %%
show_assignment(dpo.summarize, "(reward_chosen, reward_rejected)")
beta = 0.5
best, log_z = optimum(beta)
recovered = beta * (best / reference).log() + beta * log_z
print("r* of the five ", *(f"{r:6.2f}" for r in reward))
print("from pi* by (3)", *(f"{r:6.2f}" for r in recovered))

# %% [markdown]
# *Section 5, above (7)*, writes a reply's value in two ways,
# $\sigma(r^* - \mathbb{E}_{\pi^*}[r^*])$ and $\sigma(\beta u - \beta\,\mathbb{E}_{\pi^*}[u])$ with
# the log-ratio $u = \log(\pi^*/\pi_{\text{ref}})$, whose mean is the KL divergence. With (3) they
# are the same, and $\log Z$ is gone:

# %%
log_ratio = (best / reference).log()
kl = (best * log_ratio).sum()
print("from rewards   ", *(f"{v:6.3f}" for v in kto.kto_value(reward, (best * reward).sum())))
print("from log-ratios", *(f"{v:6.3f}" for v in kto.kto_value(beta * log_ratio, beta * kl)))

# %% [markdown]
# ## (4) DPO
#
# *Section 3.1:* (3) put into (1), and its negative log-likelihood. The hand's pair for this and the
# next: the chosen reply has log-probability $-10$ now and $-12$ under $\pi_{\text{ref}}$, so its
# log-ratio is $+2$; the rejected one $-15$ and $-14$, so $-1$.

# %%
show(dpo.dpo_loss)
policy_w, policy_l, reference_w, reference_l = torch.tensor([[-10.0], [-15.0], [-12.0], [-14.0]])
compare(
    "log(1 + e^(-0.1 * (2 + 1)))",
    math.log(1 + math.exp(-0.3)),
    dpo.dpo_loss(policy_w, policy_l, reference_w, reference_l),
)

# %% [markdown]
# The report's claim is that DPO does what RLHF does, in one stage. On the five replies: the policy
# with the least DPO loss over all pairs is $\pi^*$.


# %%
def expected_dpo_loss(x):
    policy = x.log_softmax(0)
    of_pairs = policy[first], policy[second], reference[first].log(), reference[second].log()
    return (frequency * dpo.dpo_loss(*of_pairs, beta=beta)).sum()


found = least(expected_dpo_loss).softmax(0)
print("pi* of (2)          ", *(f"{p:.4f}" for p in best))
print("least DPO loss (4)  ", *(f"{p:.4f}" for p in found))

# %% [markdown]
# ## (5) SLiC, and its regulariser
#
# *Section 3.2:* $\max(0, \beta - \log\pi(y_w|x) + \log\pi(y_l|x))$ plus $\lambda_{\text{reg}}$
# times a language-modelling loss. No reference model. By hand the margin is kept (5 nats of 1), so
# the regulariser is all that is left; then the pair turned round.

# %%
show(slic.slic_loss)
compare("0 + 0.1 * 10", 1.0, slic.slic_loss(policy_w, policy_l, policy_w))
compare("(1 + 15 - 10) + 0.1 * 15", 7.5, slic.slic_loss(policy_l, policy_w, policy_l))

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
# token. The report prints $r_\theta = \log(\pi_\theta/\pi_{\text{ref}})$. Where nothing has been
# learned that is 0, far outside a clip of $[0.5, 1.5]$; the code has the ratio itself, which is 1
# there.

# %%
show(ppo_offline.ppo_offline_loss, ppo_offline.gae)
token = torch.tensor([[-0.2]])
token_reference = torch.tensor([[-1.0]])  # so the log-ratio is 0.8
one = torch.ones(1, 1)
compare(
    "A = +1: clipped at 1.5",
    -1.5,
    ppo_offline.ppo_offline_loss(token, token_reference, one, one),
)
compare(
    "A = -1: e^0.8, not clipped",
    math.exp(0.8),
    ppo_offline.ppo_offline_loss(token, token_reference, -one, one),
)
values = torch.tensor([[0.4, 0.6]])
two = torch.ones(1, 2).bool()
advantages, returns = ppo_offline.gae(values, torch.ones(1), two)
compare("last token's advantage: 1 - 0.6", 0.4, advantages[0, 1])
by_hand = 0.99 * 0.6 - 0.4 + 0.99 * 0.95 * 0.4
compare("the one before: 0.99*0.6 - 0.4 + 0.99*0.95*0.4", by_hand, advantages[0, 0])

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
log_ratio = torch.linspace(-1.5, 1.5, 601)[:, None]
full = torch.ones_like(log_ratio)
for sign, line in ((1, "C0-"), (-1, "C1--")):
    loss = ppo_offline.ppo_offline_loss(log_ratio, 0 * full, sign * full, full)
    panels[0].plot(log_ratio, loss, line, label=f"A = {sign:+d}")
    clipped = log_ratio.clamp(0.5, 1.5)  # the report's r is the log-ratio itself
    printed = -torch.minimum(sign * log_ratio, sign * clipped)
    panels[1].plot(log_ratio, printed, line)
panels[0].set(ylabel="loss of a token", title=r"the code: $r = \pi/\pi_{ref}$")
panels[1].set(title=r"as printed: $r = \log(\pi/\pi_{ref})$")
for axes in panels:
    axes.set(xlabel="log-ratio, nats", xlim=(-1.5, 1.5))
    axes.axvline(0, color="0.8", lw=1, zorder=0)
panels[0].legend()
plt.show()

# %% [markdown]
# On the left the loss of a good token stops falling once the ratio passes 1.5, and that of a bad
# one once it is below 0.5. On the right, by the letter of the report, a bad token would not be
# learned from until its log-ratio *rose* past 0.5.

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
# *Section 5:* a desirable reply's utility is
# $\sigma(\beta r - \beta\,\text{KL}(\pi_\theta \Vert \pi_{\text{ref}}))$ with the log-ratio
# $r = \log\frac{\pi_\theta(y|x)}{\pi_{\text{ref}}(y|x)}$, an undesirable one's has the sign turned;
# the loss is one minus it. *The KL of one class is estimated from the other half of the batch.* By
# hand, the same two replies as two examples: the desirable one ($+2$) is measured against the
# other's $-1$, which counts as 0; the undesirable one against $+2$.

# %%
show(kto.kto_loss, kto.kl_from_other_half)
log_ratios = torch.tensor([2.0, -1.0])
desirable = torch.tensor([True, False])
reference_points = kto.kl_from_other_half(log_ratios, desirable)
losses = kto.kto_loss(log_ratios, torch.zeros(2), desirable, reference_points)
compare("desirable: 1 / (1 + e^(0.1 * 2))", 1 / (1 + math.exp(0.2)), losses[0])
compare("undesirable: 1 / (1 + e^(0.1 * (2 + 1)))", 1 / (1 + math.exp(0.3)), losses[1])

# %% [markdown]
# ## Where each loss pushes
#
# *Sections 3 and 5; the KTO paper describes its gradient.* A chosen and a rejected reply, each
# a single token here so that PPO can be drawn too. Arrows follow minus the gradient; shade is its
# length, against the largest in the panel. SLiC and SFT have no reference: theirs is put at 0.


# %%
def ppo_pair(won, lost):
    ones = torch.ones_like(won)
    chosen = ppo_offline.ppo_offline_loss(won, 0 * won, ones, ones)
    return chosen + ppo_offline.ppo_offline_loss(lost, 0 * lost, -ones, ones)


def kto_pair(won, lost):
    yes = torch.ones_like(won).bool()
    return kto.kto_loss(won, 0 * won, yes, kl=10.0) + kto.kto_loss(lost, 0 * lost, ~yes, kl=10.0)


PAIR_LOSSES = {  # name: (loss of a pair's log-ratios, nats drawn to each side)
    "SFT": (lambda won, lost: sft.sft_loss(won), 60),
    "SLiC": (lambda won, lost: slic.slic_loss(won, lost, won), 60),
    "DPO": (lambda won, lost: dpo.dpo_loss(won, lost, 0 * won, 0 * lost), 60),
    "PPO (close up)": (ppo_pair, 1.5),
    "KTO, reference point 10": (kto_pair, 60),
}
figure, panels = plt.subplots(1, 5, figsize=(13, 3))
every = slice(6, None, 12)
blues = ListedColormap(plt.get_cmap("Blues")(torch.linspace(0.1, 0.65, 256)))  # arrows show on it
for axes, (name, (loss, reach)) in zip(panels, PAIR_LOSSES.items()):
    side = torch.linspace(-reach, reach, 121)
    won, lost = (
        grid.clone().requires_grad_() for grid in torch.meshgrid(side, side, indexing="xy")
    )
    slopes = torch.autograd.grad(loss(won, lost).sum(), (won, lost), allow_unused=True)
    down_won, down_lost = (torch.zeros_like(won) if slope is None else -slope for slope in slopes)
    length = (down_won**2 + down_lost**2).sqrt()
    shade = axes.pcolormesh(side, side, length / length.max(), cmap=blues, vmin=0, vmax=1)
    seen = torch.where(length > 0.02 * length.max(), length, torch.inf)[every, every]
    arrows = down_won[every, every] / seen, down_lost[every, every] / seen
    axes.quiver(side[every], side[every], *arrows, pivot="mid", scale=12, width=0.008)
    axes.set(title=name, xlabel="chosen's log-ratio, nats", aspect="equal")
panels[0].set_ylabel("rejected's log-ratio, nats")
figure.colorbar(shade, ax=panels, label="gradient's length")
plt.show()

# %% [markdown]
# SFT knows one reply, SLiC stops pulling them apart at the margin, DPO pushes along the diagonal
# wherever the pair is in the wrong order, PPO stops at its clips. KTO pushes each reply on its own,
# near the reference point and nowhere else.

# %% [markdown]
# ### Saturation, side by side
#
# *The KTO paper: as a reward goes to plus or minus infinity, KTO's gradient goes to zero.* DPO's
# does so on one side only: a pair that the policy has badly wrong pulls with full force, be it the
# label that is wrong.

# %%
distance = torch.linspace(-80, 80, 801).requires_grad_()
still = torch.zeros(801)
(of_dpo,) = torch.autograd.grad(dpo.dpo_loss(distance, still, still, still).sum(), distance)
good = torch.ones(801).bool()
(of_kto,) = torch.autograd.grad(kto.kto_loss(distance, still, good, 0.0).sum(), distance)
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(distance.detach(), of_dpo.abs(), "C0-", label="DPO: chosen minus rejected log-ratio")
axes.plot(distance.detach(), of_kto.abs(), "C1--", label="KTO: log-ratio minus reference point")
axes.axvline(0, color="0.8", lw=1, zorder=0)
axes.set(xlabel="distance, nats", ylabel="size of the gradient", title=r"$\beta = 0.1$")
axes.legend()
plt.show()
for at in (-80, 0, 80):
    i = 5 * (at + 80)
    print(f"{at:4d} nats: DPO {of_dpo[i].abs():.5f}   KTO {of_kto[i].abs():.5f}")

# %% [markdown]
# ## Why the reference point is detached
#
# *Section 5 does not say whether gradients pass through the KL term. In the authors' code of
# December 2023 they do, and the term is that of the examples on one GPU; in the KTO paper they do
# not.* Here is what happens if they do. The function without its `detach` is made from the file's
# own text, by deleting that word. Four examples, two of a class, as on one of eight GPUs that share
# a batch of 32; the bars are how hard the loss pushes each reply's log-probability up.


# %%
def without(function, *words):
    """The function that its source would make if these words were deleted."""
    text = inspect.getsource(function)
    for word in words:
        assert word in text
        text = text.replace(word, "")
    namespace = {"torch": torch}
    exec(text, namespace)
    return namespace[function.__name__]


attached_loss = without(kto.kto_loss, ".detach()")
attached_kl = without(kto.kl_from_other_half, ".detach()")
log_ratios = torch.tensor([50.0, 2.0, 12.0, 8.0], requires_grad=True)
desirable = torch.tensor([True, True, False, False])
pushes = {}
for name, loss, reference_point in (
    ("detached", kto.kto_loss, kto.kl_from_other_half),
    ("not detached", attached_loss, attached_kl),
):
    kl = reference_point(log_ratios, desirable)
    mean = loss(log_ratios, torch.zeros(4), desirable, kl).mean()
    (slope,) = torch.autograd.grad(mean, log_ratios)
    pushes[name] = -slope
figure, axes = plt.subplots(figsize=(7, 3))
place = torch.arange(4)
axes.bar(place - 0.2, pushes["detached"], 0.4, label="detached (the code)")
axes.bar(place + 0.2, pushes["not detached"], 0.4, label="not detached", hatch="//", ec="white")
axes.axhline(0, color="0.5", lw=1)
labels = [
    f"{'desirable' if good else 'undesirable'}\n{r:+.0f} nats"
    for r, good in zip(log_ratios.tolist(), desirable)
]
axes.set(xticks=place, xticklabels=labels, ylabel="push", title="one batch of four")
axes.legend()
plt.show()
for name, push in pushes.items():
    print(f"{name:<14} sum of the pushes {push.sum():+.6f}".replace("-0.000000", "+0.000000"))

# %% [markdown]
# The first reply is far above what was expected. Detached, it is left nearly alone, as a value
# function that flattens has it. Attached, it is pushed on, because it raises the mean that the
# others are measured against. And the pushes sum to zero: what an example gains, the reference
# point of the others takes back from the other class. The loss then sees only the difference
# between the halves, and raising all replies alike changes nothing: the halves are a contrast, as
# in a preference loss. Detached, each reply is measured against a fixed expectation. (All of this
# is so where the means are above 0. Where a mean is clamped, nothing flows through it.)

# %%
for name, push in pushes.items():
    print(f"{name:<14}", *(f"{p:+.5f}" for p in push))
moved = log_ratios.detach() + 30
kl = attached_kl(moved, desirable)
before = attached_loss(moved - 30, torch.zeros(4), desirable, kl - 30)
after = attached_loss(moved, torch.zeros(4), desirable, kl)
change = (after - before).abs().max()
print(f"all four 30 nats up, reference point with them: losses change by {change:.1f}")

# %% [markdown]
# ## Why it is clamped
#
# *Section 5 calls it a KL divergence, which is never negative.* Its estimate from a few replies can
# be, even when they are drawn from the policy itself. For $\pi^*$ of the five replies at
# $\beta = 3$, batches of 16:

# %%
best, _ = optimum(3.0)
log_ratio = (best / reference).log()
draws = torch.multinomial(best, 16 * 10_000, replacement=True, generator=generator)
estimates = log_ratio[draws].view(10_000, 16).mean(1)
below = (estimates < 0).double().mean()
print(f"exact KL {(best * log_ratio).sum():.3f} nats; estimates below 0: {below:.0%}")

# %% [markdown]
# And the other half of a batch is not drawn from the policy at all. Take a run in which both
# classes lose probability together, the desirable replies always 10 nats ahead. The clamp deleted,
# both losses stay where they are: a desirable reply that has become $e^{40}$ times less likely is
# praised for being ahead of the others. With it, the loss of the desirable replies says that they
# are lost.

# %%
unclamped_kl = without(kto.kl_from_other_half, ".clamp(min=0)")
drift = torch.linspace(-60, 30, 181)
figure, panels = plt.subplots(1, 2, figsize=(8.5, 3), sharey=True)
pair = torch.tensor([True, False])
for axes, title, reference_point in (
    (panels[0], "not clamped", unclamped_kl),
    (panels[1], "clamped at 0 (the code)", kto.kl_from_other_half),
):
    both = []
    for shift in drift:
        r = shift + torch.tensor([5.0, -5.0])
        both.append(kto.kto_loss(r, torch.zeros(2), pair, reference_point(r, pair)))
    both = torch.stack(both)
    axes.plot(drift, both[:, 0], "C0-", label="desirable")
    axes.plot(drift, both[:, 1], "C1--", label="undesirable")
    axes.axvline(0, color="0.8", lw=1, zorder=0)
    axes.set(title=title, xlabel="mean log-ratio of the batch, nats")
panels[0].set(ylabel="loss")
panels[0].legend()
plt.show()

# %% [markdown]
# ## Rewards that differ by a function of the prompt
#
# *A theorem of the KTO paper.* Two rewards $r$ and $r + h(x)$ have the same best policy and the
# same preferences, for any function $h$ of the prompt alone. But people may value their outcomes
# differently. Preferences, and a loss on them, cannot tell such rewards apart; a value can.
#
# Let two prompts have the five replies from above, with the same rewards. Then add 1.5 to all
# rewards of the first prompt and subtract 1.5 from those of the second. The reference point of a
# value is one number for both prompts, as KTO's is for a batch: here the mean reward.

# %%
shift = torch.tensor([[1.5], [-1.5]])  # h(x) of the two prompts
best_policies = []
preferences = []
values = []
for rewards in (reward.expand(2, 5), reward + shift):  # (2 prompts, 5 replies)
    best_policies.append((reference.log() + rewards / beta).softmax(-1))
    preferences.append(ppo_offline.rlhf_value(rewards[:, first], rewards[:, second]))
    z_ref = (best_policies[-1] * rewards).sum(-1).mean()
    values.append(kto.kahneman_tversky_value(rewards, z_ref))
print(f"best policies differ by at most   {(best_policies[0] - best_policies[1]).abs().max():.1e}")
print(f"preferences differ by at most     {(preferences[0] - preferences[1]).abs().max():.1e}")
assert torch.allclose(best_policies[0], best_policies[1], atol=1e-12)
assert torch.allclose(preferences[0], preferences[1], atol=1e-12)
print("Kahneman-Tversky values of      ", *(f"{reply:>13}" for reply in REPLIES))
for name, of_prompts in (("r", values[0]), ("r + h", values[1])):
    for number, of_prompt in enumerate(of_prompts, 1):
        print(f"    {name:<6} prompt {number}             ", *(f"{v:13.2f}" for v in of_prompt))

# %% [markdown]
# With $r + h$, even the best reply to the second prompt is a loss, and even a vague one to the
# first prompt is a gain. That is what a loss on labelled single replies can express, and one on
# pairs cannot. (Were the reference point each prompt's own mean, $h$ would drop out.)

# %% [markdown]
# ## Contradictory preferences, exactly
#
# *A theorem of the KTO paper.* A share $p > 1/2$ of people prefers $y_a$ to $y_b$, the others
# $y_b$ to $y_a$. If $p^{1/\beta}\,\pi_{\text{ref}}(y_a) < (1-p)^{1/\beta}\,\pi_{\text{ref}}(y_b)$,
# the best DPO policy is likelier to give the minority's $y_b$; the best KTO policy gives $y_a$.
#
# The smallest case has two replies, so a policy is one number $q = \pi(y_a)$. DPO's best is known:
# $\sigma(\beta(r_a - r_b)) = p$, so the odds $\frac{q}{1-q}$ are
# $\big(\frac{p}{1-p}\big)^{1/\beta}$ times those of $\pi_{\text{ref}}$. For KTO each preference is
# split in two examples, as the trainer does.

# %%
p = 0.6
beta = 0.1
reference_a = 0.01


def log_ratios_of(q):
    return (q / reference_a).log(), ((1 - q) / (1 - reference_a)).log()


def dpo_of(q):
    """Expected DPO loss of a policy, over people."""
    r_a, r_b = log_ratios_of(q)
    zero = torch.zeros_like(q)
    a_first, b_first = (dpo.dpo_loss(*r, zero, zero, beta) for r in ((r_a, r_b), (r_b, r_a)))
    return p * a_first + (1 - p) * b_first


def kto_of(q, kl):
    """Expected KTO loss of a policy, over people and the two examples of each."""
    total = 0
    for r, share in zip(log_ratios_of(q), (p, 1 - p)):
        for label, weight in ((True, share), (False, 1 - share)):
            labels = torch.full(q.shape, label)
            total = total + weight * kto.kto_loss(r, torch.zeros_like(q), labels, kl, beta)
    return total / 2


def kl_of(q):
    r_a, r_b = log_ratios_of(q)
    return q * r_a + (1 - q) * r_b


left = p ** (1 / beta) * reference_a
right = (1 - p) ** (1 / beta) * (1 - reference_a)
print(f"p = {p}, beta = {beta}, pi_ref(y_a) = {reference_a}")
print(f"the condition, {left:.1e} < {right:.1e}, holds: {left < right}")
odds = reference_a / (1 - reference_a) * (p / (1 - p)) ** (1 / beta)
q_dpo = minimize_scalar(lambda q: dpo_of(torch.tensor(q)).item(), bounds=(1e-9, 1 - 1e-9)).x
compare("pi(y_a) of the best DPO policy", odds / (1 + odds), q_dpo)

q = torch.linspace(-12, 12, 401).sigmoid().requires_grad_()
steepest = []
for reference_point in (0.0, 1.0, 10.0, kl_of(q)):  # kto_loss detaches it
    (slope,) = torch.autograd.grad(kto_of(q, reference_point).sum(), q)
    steepest.append(slope.max().item())
print(f"KTO's loss falls towards y_a at every policy tried: {max(steepest) < 0}")

# %% [markdown]
# KTO's two examples of a reply with a share $s$ of approval cost
# $s(1 - \sigma(z)) + (1 - s)\sigma(z) = s + (1 - 2s)\sigma(z)$. For $y_a$, where $s = p > 1/2$,
# that falls with its reward; for $y_b$ it rises; whatever the reference point, $q \to 1$ is best.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
with torch.no_grad():
    for curve, line, name in ((dpo_of(q), "C0-", "DPO"), (kto_of(q, 0.0), "C1--", "KTO")):
        panels[0].plot(q.logit(), curve, line, label=name)
    panels[0].plot(math.log(odds), dpo_of(torch.tensor(odds / (1 + odds))), "C0o")
marks = torch.tensor([1e-4, 0.01, 0.5, 0.99, 0.9999])
panels[0].set(
    xlabel=r"$\pi(y_a)$", ylabel="expected loss", xticks=marks.logit(), ylim=(0.45, 1.0),
    xticklabels=["0.0001", "0.01", "0.5", "0.99", "0.9999"], title="the dot: DPO's best policy",
)  # fmt: skip
panels[0].legend()
betas = torch.linspace(0.05, 1, 400)
best_odds = reference_a / (1 - reference_a) * (p / (1 - p)) ** (1 / betas)
panels[1].plot(betas, best_odds / (1 + best_odds), "C0-", label="DPO")
panels[1].plot(betas, torch.ones_like(betas), "C1--", label="KTO")
panels[1].axhline(0.5, color="0.8", lw=1, zorder=0)
panels[1].axhline(reference_a, color="0.5", lw=1, ls=":")
panels[1].text(1, reference_a + 0.02, r"$\pi_{ref}(y_a)$", ha="right", color="0.3")
panels[1].set(
    xlabel=r"$\beta$", ylabel=r"$\pi(y_a)$ of the best policy", title=f"{p:.0%} prefer $y_a$"
)
panels[1].legend(loc="center right")
plt.show()

# %% [markdown]
# DPO answers the majority only where $\beta$ is small enough for it to leave a reference that
# hardly knows $y_a$; KTO's optimum is $y_a$ everywhere. (An optimum is not what a run reaches: KTO
# gets no push from far away, as the saturation above shows, and a minority of labels that is right
# where the majority is not would be lost the same way.)
