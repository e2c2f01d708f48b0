"""The pictures of notebooks 1 to 3.

A notebook's cell computes the numbers, and one function of this file draws them. Curves come as a
dict of label to values. Colors mean the same in all pictures:

- blue: DPO; also desirable replies, gains and positive advantages
- orange: KTO; also undesirable replies, losses and negative advantages
- green: PPO and RLHF; pink: SLiC; black: Kahneman and Tversky
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

plt.style.use(Path(__file__).with_name("figures.mplstyle"))

LINES = ("C0-", "C1--", "C2-.", "C3:", "C4-")
VALUE_LINES = {"Kahneman-Tversky": "k-", "RLHF": "C2-", "DPO": "C0-", "SLiC": "C3-", "KTO": "C1--"}
SETTING_LINES = ("C5-", "C0--", "k-.")  # from a low setting to a high one
CLASS_COLORS = {"desirable": "C0", "undesirable": "C1"}
CLASS_MARKERS = {"desirable": "o", "undesirable": "s"}
GUIDE = {"color": "0.8", "linewidth": 1, "zorder": 0}  # thin lines behind the curves


def set_finding(figure: Figure, finding: str) -> None:
    """Write above all panels what the picture shows."""
    figure.suptitle(finding, x=0.01, horizontalalignment="left")


def draw_curves(
    axes: Axes, x: ArrayLike, curves: dict[str, ArrayLike], lines: Sequence[str] = LINES
) -> None:
    """Draw one line for each entry of `curves` (label to values at `x`)."""
    for (label, values), line in zip(curves.items(), lines):
        axes.plot(x, values, line, label=label)


def draw_origin(axes: Axes) -> None:
    """Draw thin lines at x = 0 and y = 0."""
    axes.axvline(0, **GUIDE)
    axes.axhline(0, **GUIDE)


# Notebook 1: value functions.


def value_functions(outcome: ArrayLike, values: dict[str, ArrayLike]) -> None:
    """The value functions in one panel, by name (the report's Figure 4)."""
    figure, axes = plt.subplots(figsize=(8, 5))
    lines = [VALUE_LINES[name] for name in values]
    draw_curves(axes, outcome, values, lines)
    draw_origin(axes)
    axes.set_xlabel("outcome relative to the reference point")
    axes.set_ylabel("value")
    axes.legend()
    set_finding(figure, "KTO has RLHF's value function, and DPO and SLiC never exceed 0")
    plt.show()


def gains_and_losses(
    distance: ArrayLike, gained: dict[str, ArrayLike], lost: dict[str, ArrayLike]
) -> None:
    """A panel for each value function: the value gained by +d and the value lost by -d."""
    figure, panels = plt.subplots(1, len(gained), figsize=(11, 3.4))
    for axes, name in zip(panels, gained):
        curves = {"gained by $+d$": gained[name], "lost by $-d$": lost[name]}
        draw_curves(axes, distance, curves)
        axes.set_xlabel("distance $d$")
        axes.set_title(name)
    panels[0].set_ylabel("change in value")
    panels[0].legend()
    set_finding(figure, "Only Kahneman-Tversky is loss averse near the reference point")
    plt.show()


def value_settings(
    outcome: ArrayLike,
    by_alpha: dict[str, ArrayLike],
    by_loss_aversion: dict[str, ArrayLike],
    log_ratio: ArrayLike,
    by_beta: dict[str, ArrayLike],
) -> None:
    """Equation (6) at several alpha and lambda, and KTO's value at several beta."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.8))
    draw_curves(panels[0], outcome, by_alpha, SETTING_LINES)
    panels[0].set_title(r"Kahneman-Tversky, $\lambda = 2.25$")
    panels[0].set_xlabel("outcome")
    panels[0].set_ylabel("value")
    draw_curves(panels[1], outcome, by_loss_aversion, SETTING_LINES)
    panels[1].set_title(r"Kahneman-Tversky, $\alpha = 0.88$")
    panels[1].set_xlabel("outcome")
    draw_curves(panels[2], log_ratio, by_beta, SETTING_LINES)
    panels[2].set_title("KTO")
    panels[2].set_xlabel("log-ratio minus reference, nats")
    for axes in panels:
        draw_origin(axes)
        axes.legend()
    finding = r"$\alpha$ sets the curvature, $\lambda$ the weight of losses, $\beta$ the saturation"
    set_finding(figure, finding)
    plt.show()


def ppo_values(
    outcome: ArrayLike,
    by_outcome: dict[str, ArrayLike],
    log_ratio: ArrayLike,
    by_log_ratio: dict[str, ArrayLike],
    clip: float,
) -> None:
    """PPO's value by ratio times advantage and by log-ratio, with gains up to `clip` shaded."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8))
    draw_curves(panels[0], outcome, by_outcome)
    panels[0].set_title("Ratio times advantage: concave")
    panels[0].set_xlabel("ratio times advantage")
    panels[0].set_ylabel("value")
    draw_curves(panels[1], log_ratio, by_log_ratio)
    panels[1].set_title("Log-ratio: A = +1 is convex where shaded")
    panels[1].set_xlabel("log-ratio, nats")
    panels[1].axvspan(0, clip, color="0.92", zorder=0)
    for axes in panels:
        draw_origin(axes)
        axes.legend(loc="upper left")
    set_finding(figure, "For A = +1, PPO's value is concave in the ratio, not in the log-ratio")
    plt.show()


# Notebook 2: from equations to code.


def best_policies(
    betas: ArrayLike, policies: dict[str, ArrayLike], reference: Sequence[float]
) -> None:
    """The optimal policy at each beta: a curve for each reply, its reference as a triangle."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    axes.set_xscale("log")
    draw_curves(axes, betas, policies)
    right = 1.15 * betas[-1]
    for number, (reply, probability) in enumerate(zip(policies, reference)):
        color = f"C{number}"
        axes.plot(right, probability, "<", color=color, clip_on=False)
        place = {"xytext": (8, 0), "textcoords": "offset points", "verticalalignment": "center"}
        axes.annotate(reply, (right, probability), color=color, annotation_clip=False, **place)
    axes.set_xlim(betas[0], right)
    axes.set_xlabel(r"$\beta$")
    axes.set_ylabel(r"probability $\pi^*(y|x)$")
    finding = r"A small $\beta$ selects the best reply, a large one keeps $\pi_{ref}$ (triangles)"
    set_finding(figure, finding)
    plt.show()


def ppo_losses(
    log_ratio: ArrayLike, with_ratio: dict[str, ArrayLike], as_printed: dict[str, ArrayLike]
) -> None:
    """PPO's loss of a token, with the ratio (the code) and with the log-ratio (the report)."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    draw_curves(panels[0], log_ratio, with_ratio)
    panels[0].set_title(r"The code: $r = \pi/\pi_{ref}$")
    panels[0].set_ylabel("loss of a token")
    panels[0].legend()
    draw_curves(panels[1], log_ratio, as_printed)
    panels[1].set_title(r"The report as printed: $r = \log(\pi/\pi_{ref})$")
    for axes in panels:
        axes.set_xlabel("log-ratio, nats")
        axes.axvline(0, **GUIDE)
    set_finding(figure, "As printed, a token with A = -1 has no gradient before training")
    plt.show()


def gradient_fields(fields: dict[str, tuple[ArrayLike, ArrayLike, ArrayLike]]) -> None:
    """A panel for each of five losses: minus its gradient over the log-ratios of a pair.

    `fields` maps a title to the N log-ratios of either axis, and to the two components of minus
    the gradient, (N, N) each: of the chosen reply (x) and of the rejected one (y).
    """
    figure, panels = plt.subplots(2, 3, figsize=(10, 7))
    colors = plt.get_cmap("Blues")(np.linspace(0.1, 0.65, 256))  # arrows are visible on these
    blues = ListedColormap(colors)
    every = slice(6, None, 12)  # the points that get an arrow
    for axes, (title, field) in zip(panels.flat, fields.items()):
        side, chosen, rejected = (np.asarray(part) for part in field)
        length = np.hypot(chosen, rejected)
        relative = length / length.max()
        shade = axes.pcolormesh(side, side, relative, cmap=blues, vmin=0, vmax=1)
        # Arrows have length 1, or 0 where the gradient is below 2% of its maximum.
        scale = np.where(relative > 0.02, length, np.inf)
        x_arrows = (chosen / scale)[every, every]
        y_arrows = (rejected / scale)[every, every]
        places = side[every]
        axes.quiver(places, places, x_arrows, y_arrows, pivot="mid", scale=12, width=0.008)
        axes.set_aspect("equal")
        axes.set_title(title)
        axes.set_xlabel("chosen log-ratio, nats")
        axes.set_ylabel("rejected log-ratio, nats")
    panels[1, 2].axis("off")
    bar = panels[1, 2].inset_axes((0.05, 0.5, 0.9, 0.06))  # in the empty panel
    label = "norm of the gradient,\nrelative to the panel's maximum"
    figure.colorbar(shade, cax=bar, orientation="horizontal", label=label)
    set_finding(figure, "SLiC and DPO compare the two replies, PPO and KTO treat each by itself")
    plt.show()


def saturation(distance: ArrayLike, norms: dict[str, ArrayLike]) -> None:
    """The magnitude of the gradient by distance from the reference point, for each loss."""
    figure, axes = plt.subplots(figsize=(8, 4))
    draw_curves(axes, distance, norms)
    axes.axvline(0, **GUIDE)
    axes.set_xlabel("distance from the reference point, nats")
    axes.set_ylabel("magnitude of the gradient, 1/nat")
    axes.legend()
    set_finding(figure, "KTO saturates on both sides, DPO on one")
    plt.show()


def detached_gradients(examples: Sequence[str], gradients: dict[str, ArrayLike]) -> None:
    """Minus the gradient of each example; `gradients` has the cases detached and not detached."""
    figure, axes = plt.subplots(figsize=(8, 4))
    places = np.arange(len(examples))
    axes.bar(places - 0.2, gradients["detached"], 0.4, color="0.35", label="detached (the code)")
    axes.bar(
        places + 0.2,
        gradients["not detached"],
        0.4,
        color="C4",
        label="not detached (sum: 0)",
        hatch="//",
        edgecolor="white",
    )
    axes.axhline(0, color="0.5", linewidth=1)
    axes.set_xticks(places, examples)
    axes.set_ylabel("minus the gradient, 1/nat")
    axes.legend()
    set_finding(figure, "Without the detach, the gradients of a batch sum to zero")
    plt.show()


def clamped_losses(
    mean_log_ratio: ArrayLike, not_clamped: dict[str, ArrayLike], clamped: dict[str, ArrayLike]
) -> None:
    """The losses of both classes by the mean log-ratio, without and with the clamp."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    draw_curves(panels[0], mean_log_ratio, not_clamped)
    panels[0].set_title("Not clamped")
    panels[0].set_ylabel("loss")
    panels[0].legend()
    draw_curves(panels[1], mean_log_ratio, clamped)
    panels[1].set_title("Clamped at 0 (the code)")
    for axes in panels:
        axes.axvline(0, **GUIDE)
        axes.set_xlabel("mean log-ratio of the batch, nats")
    set_finding(figure, "Without the clamp, a common drop in probability has no effect")
    plt.show()


def contradictory_preferences(
    log_odds: ArrayLike,
    losses: dict[str, ArrayLike],
    dpo_optimum: tuple[float, float],
    betas: ArrayLike,
    best: dict[str, ArrayLike],
    reference_a: float,
) -> None:
    """Expected losses by policy, and the best policy by beta, where most people prefer y_a.

    `log_odds` are those of pi(y_a); `dpo_optimum` has the log-odds and loss of DPO's best policy.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    draw_curves(panels[0], log_odds, losses)
    panels[0].plot(*dpo_optimum, "C0o", markersize=8)
    probabilities = np.array([0.0001, 0.01, 0.5, 0.99, 0.9999])
    panels[0].set_xticks(np.log(probabilities / (1 - probabilities)), probabilities)
    panels[0].set_title(r"$\beta = 0.1$; the dot is DPO's best policy")
    panels[0].set_xlabel(r"$\pi(y_a)$ of a policy")
    panels[0].set_ylabel("expected loss")
    panels[0].set_ylim(0.4, 0.9)
    draw_curves(panels[1], betas, best)
    panels[1].axhline(0.5, **GUIDE)
    panels[1].axhline(reference_a, color="0.5", linewidth=1, linestyle=":")
    panels[1].text(1, reference_a + 0.05, r"dotted: $\pi_{ref}(y_a)$", ha="right", color="0.3")
    panels[1].set_title(r"The best policy at each $\beta$")
    panels[1].set_xlabel(r"$\beta$")
    panels[1].set_ylabel(r"$\pi(y_a)$ of the best policy")
    panels[0].legend(loc="upper center")
    panels[1].legend(loc="center right", bbox_to_anchor=(1.0, 0.7))
    set_finding(figure, r"KTO's best policy follows the majority, DPO's only at a small $\beta$")
    plt.show()


# Notebook 3: one KTO step.

BOXES = {  # name: (x, y, text)
    "records": (0, 1, "records\nprompt, reply, label"),
    "tokens": (0, 0, "token ids\ncommon.load_records"),
    "batch": (1, 1, "batch\nkto.make_schedule"),
    "policy": (2, 1, "policy log-probabilities\ncommon.completion_logps"),
    "reference": (1.5, 0, "reference log-probabilities, once\ncommon.add_reference_logps"),
    "ratios": (2.9, 0.5, "log-ratios\npolicy minus reference"),
    "point": (3.9, 0, "reference point\nkto.kl_from_other_half"),
    "loss": (3.9, 1, "loss, equation (7)\nkto.kto_loss"),
    "step": (4.9, 1, "optimizer step\nkto.train"),
    "replies": (4.9, 0, "replies\narchangel.sample"),
}
ARROWS = [
    ("records", "tokens"),
    ("tokens", "batch"),
    ("tokens", "reference"),
    ("batch", "policy"),
    ("policy", "ratios"),
    ("reference", "ratios"),
    ("ratios", "loss"),
    ("ratios", "point"),
    ("point", "loss"),
    ("loss", "step"),
    ("step", "replies"),
]


def pipeline() -> None:
    """The way from records to replies in the project's functions (the report's Figure 1)."""
    figure, axes = plt.subplots(figsize=(12, 2.8))
    axes.set_xlim(-0.45, 5.25)
    axes.set_ylim(-0.25, 1.3)
    axes.axis("off")
    frame = {"boxstyle": "round,pad=0.4", "facecolor": "#e8f1f8", "edgecolor": "C0"}
    boxes = {}
    for name, (x, y, text) in BOXES.items():
        boxes[name] = axes.text(x, y, text, ha="center", va="center", bbox=frame)
    figure.canvas.draw()  # gives the boxes the sizes at which the arrows end
    for start, end in ARROWS:
        style = {
            "arrowstyle": "-|>",
            "color": "0.3",
            "patchA": boxes[start].get_bbox_patch(),
            "patchB": boxes[end].get_bbox_patch(),
            "shrinkA": 2,
            "shrinkB": 2,
        }
        axes.annotate("", xy=BOXES[end][:2], xytext=BOXES[start][:2], arrowprops=style)
    set_finding(figure, "KTO needs a label for each reply, not pairs")
    plt.show()


def token_logps(tokens: dict[str, list[str]], logps: dict[str, ArrayLike]) -> None:
    """A panel for each class's reply: a bar for the log-probability of each of its tokens."""
    figure, panels = plt.subplots(1, len(tokens), figsize=(10, 5.4), sharex=True)
    for axes, name in zip(panels, tokens):
        places = range(len(tokens[name]))
        axes.barh(places, logps[name], color=CLASS_COLORS[name])
        axes.set_yticks(places, tokens[name], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("log-probability of the token, nats")
        axes.set_title(f"{name} reply: {sum(logps[name]):.2f} nats in total")
    set_finding(figure, "A few tokens carry most of a reply's log-probability")
    plt.show()


def draw_losses(
    axes: Axes,
    curve_x: ArrayLike,
    curves: dict[str, ArrayLike],
    distances: dict[str, ArrayLike],
    losses: dict[str, ArrayLike],
) -> None:
    """Draw the curve of each class's loss, and the class's examples on it."""
    for name, color in CLASS_COLORS.items():
        axes.plot(curve_x, curves[name], color=color, linewidth=1)
        axes.plot(distances[name], losses[name], CLASS_MARKERS[name], color=color, label=name)
    axes.set_xlabel("log-ratio minus reference point, nats")
    axes.set_ylabel("loss")


def batch_after_step(
    log_ratios: dict[str, ArrayLike],
    means: dict[str, float],
    curve_x: ArrayLike,
    curves: dict[str, ArrayLike],
    distances: dict[str, ArrayLike],
    losses: dict[str, ArrayLike],
) -> None:
    """A batch after its own step, by class: log-ratios with their means, and losses."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    for name, color in CLASS_COLORS.items():
        places = range(1, len(log_ratios[name]) + 1)
        panels[0].plot(log_ratios[name], places, CLASS_MARKERS[name], color=color, label=name)
        panels[0].axvline(means[name], color=color, linestyle=":")
    panels[0].axvline(0, **GUIDE)
    panels[0].set_title("Log-ratios (dotted: mean of the class)")
    panels[0].set_xlabel("log-ratio after the step, nats")
    panels[0].set_ylabel("number of the example in its class")
    draw_losses(panels[1], curve_x, curves, distances, losses)
    panels[1].set_title("Losses (0.5 before the step)")
    panels[1].legend(loc="upper center")
    set_finding(figure, "The step made desirable replies likelier, undesirable ones less likely")
    plt.show()


def training_run(
    steps: Sequence[int],
    rewards: dict[str, Sequence[float]],
    mean_losses: Sequence[float],
    curve_x: ArrayLike,
    curves: dict[str, ArrayLike],
    distances: dict[str, ArrayLike],
    losses: dict[str, ArrayLike],
) -> None:
    """A run's rewards and loss by step, and the examples of its first batch at its end."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4))
    draw_curves(panels[0], steps, rewards, ("C0-", "C1--", "k:"))
    panels[0].set_title("Mean rewards of each batch")
    panels[0].set_xlabel("step")
    panels[0].set_ylabel(r"reward ($\beta$ times nats)")
    panels[0].legend()
    panels[1].plot(steps, mean_losses, "0.35")
    panels[1].set_title("Mean loss of each batch")
    panels[1].set_xlabel("step")
    panels[1].set_ylabel("loss")
    draw_losses(panels[2], curve_x, curves, distances, losses)
    panels[2].set_title("The first batch after step 30")
    panels[2].legend(loc="center right")
    set_finding(figure, "Both classes lose probability, the undesirable one more")
    plt.show()


def packed_pair(visible: ArrayLike, positions: ArrayLike, lengths: dict[str, int]) -> None:
    """The attention mask and the positions of a packed pair; `lengths` names its segments."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), width_ratios=(1, 1.1))
    panels[0].imshow(visible, cmap="cividis")
    panels[0].set_title("Attention mask (yellow: attends)")
    panels[0].set_xlabel("key")
    panels[0].set_ylabel("query")
    panels[1].plot(positions, "C0.", markersize=7)
    panels[1].set_title("Positions")
    panels[1].set_xlabel("place in the sequence")
    panels[1].set_ylabel("position_ids")
    middles = []
    start = 0
    for length in lengths.values():
        end = start + length
        middles.append((start + end - 1) / 2)
        if start > 0:
            panels[0].axvline(start - 0.5, color="white", linewidth=1)
            panels[0].axhline(start - 0.5, color="white", linewidth=1)
            panels[1].axvline(start - 0.5, **GUIDE)
        start = end
    panels[0].set_xticks(middles, lengths)
    panels[0].set_yticks(middles, lengths, rotation=90, va="center")
    panels[1].set_xticks(middles, lengths)
    set_finding(figure, "Both replies continue the prompt and do not attend to each other")
    plt.show()
