"""An overview, Figures 2, 3 and 5, the ablations and the contradictory labels, from numbers alone.

    numbers = json.loads(Path("runs/suite/numbers.json").read_text())
    figure2(numbers, Path("figure_2.png"))

The colors are Okabe and Ito's, which the color-blind can tell apart. A method after SFT has the
color of the method alone, and is hatched.
"""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dpo
import kto
import ppo_offline
import sft
import slic
from archangel.claims import name_of, optimum_of_dpo

COLORS = {  # of methods
    "base": "#BBBBBB",
    "sft": "#F0E442",
    "slic": "#CC79A7",
    "dpo": "#0072B2",
    "ppo": "#009E73",
    "kto": "#D55E00",
}
MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MODEL_MARKERS = "os^Dv<>"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 1,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the whole file or nothing."""
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)


def by_size(numbers: dict, tables=("methods", "ablations", "contradictory")) -> list[dict]:
    """The models that have results in these tables, the smallest first."""
    names = set()
    for table in tables:
        for row in numbers[table]:
            names.add(row["model"])
    models = [model for model in numbers["models"] if model["name"] in names]
    return sorted(models, key=lambda model: model["parameters"])


def size(parameters: int) -> str:
    """1234567 as 1.23M."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M"


def name_and_size(model: dict) -> str:
    """A model in the legend."""
    return f"{model['name']}, {size(model['parameters'])}"


def offset(number: int, total: int, width: float) -> float:
    """Where in a group of this width, centered at 0, the number-th of `total` items is."""
    return (number - (total - 1) / 2) * width / total


def bars(axes: Axes, numbers: dict, models: Sequence[dict], arms: Sequence[str]) -> None:
    """Bars of win rate minus one half, a group for each model, with both intervals and seeds."""
    rows = {(row["model"], row["arm"]): row for row in numbers["methods"]}
    model_names = [model["name"] for model in models]
    shown_arms = []
    for arm in arms:
        if any((name, arm) in rows for name in model_names):
            shown_arms.append(arm)
    width = 0.8 / max(1, len(shown_arms))
    for number, arm in enumerate(shown_arms):
        color = COLORS[arm.removeprefix("sft+")]
        hatch = "///" if arm.startswith("sft+") else None
        is_in_legend = False
        for group, name in enumerate(model_names):
            if (name, arm) not in rows:
                continue
            row = rows[name, arm]
            win = row["win_rate_minus_half"]
            x = group + offset(number, len(shown_arms), width=0.8)
            label = None if is_in_legend else row["name"]
            is_in_legend = True
            axes.bar(
                x,
                win["mean"],
                0.92 * width,
                color=color,
                edgecolor="white",
                hatch=hatch,
                label=label,
            )
            axes.vlines(x, *win["interval_95"], color="black", linewidth=1)
            axes.vlines(x, *win["interval_75"], color="black", linewidth=3)
            seeds = win["by_seed"]
            if len(seeds) > 1:
                axes.scatter(
                    [x] * len(seeds), seeds, facecolor="white", edgecolor="black", zorder=3, s=14
                )
    axes.axhline(0, color="black", linewidth=0.8)
    ticks = [f"{model['name']}\n{size(model['parameters'])}" for model in models]
    axes.set_xticks(range(len(models)), ticks)
    axes.set_xlabel("model, parameters")
    axes.set_ylabel("win rate against the\nchosen reply, minus 0.5")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def arms_of(numbers: dict) -> list[str]:
    """The arms of the methods, in their order."""
    return list(dict.fromkeys(row["arm"] for row in numbers["methods"]))


def win_rates(numbers: dict, path: Path, arms: Sequence[str]) -> None:
    """A figure of the bars alone."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    bars(figure.add_subplot(), numbers, by_size(numbers, ("methods",)), arms)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


def pushes(axes: Axes) -> None:
    """The negative gradient of each loss with respect to a desirable completion's log-ratio.

    Each is scaled to a maximum of 1. The log-ratio of the other completion of a pair, and KTO's
    reference point, stay at 0. SFT and SLiC have no reference; here their log-probabilities are
    measured from the reference's.
    """
    log_ratio = torch.linspace(-60, 60, 1201, dtype=torch.float64, requires_grad=True)  # nats
    zeros = torch.zeros_like(log_ratio)
    advantages = torch.ones_like(log_ratio)
    desirable = torch.ones_like(log_ratio, dtype=torch.bool)
    mask = desirable  # of PPO, whose completions are of one token here
    losses = {
        "sft": sft.sft_loss(log_ratio),
        "slic": slic.slic_loss(log_ratio, zeros, log_ratio),  # its target is the chosen reply
        "dpo": dpo.dpo_loss(log_ratio, zeros, zeros, zeros),
        "ppo": ppo_offline.ppo_offline_loss(log_ratio, zeros, advantages, mask),
        "kto": kto.kto_loss(log_ratio, zeros, desirable, 0.0),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        push = -gradient / gradient.abs().max()
        label = "PPO (per token)" if name == "ppo" else name_of(name)
        style = "--" if name == "slic" else "-"  # half of it coincides with SFT's
        axes.plot(log_ratio.detach(), push, style, color=COLORS[name], label=label, linewidth=2)
    axes.set_xlabel("log-ratio of the desirable completion, nats")
    axes.set_ylabel("gradient magnitude, normalized")
    axes.set_ylim(-0.05, 1.4)
    axes.set_yticks([0, 0.5, 1])
    axes.legend(frameon=False, loc="upper center", ncols=3)


@rc_context(STYLE)
def overview(numbers: dict, path: Path) -> None:
    """The five losses at a glance: the gradient of each, and the win rates of the largest model."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pushes(left)
    left.set_title("how strongly a loss pushes a desirable completion up", fontsize=11)
    largest = by_size(numbers, ("methods",))[-1:]
    bars(right, numbers, largest, arms_of(numbers))
    right.set_title("win rates after training", fontsize=11)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


@rc_context(STYLE)
def figure2(numbers: dict, path: Path) -> None:
    """Win rate minus one half by method and size, with 75% and 95% intervals."""
    win_rates(numbers, path, arms_of(numbers))


ARMS_OF_FIGURE_5 = ("dpo", "kto", "sft+dpo", "sft+kto")


@rc_context(STYLE)
def figure5(numbers: dict, path: Path) -> None:
    """KTO against DPO, each with and without SFT before."""
    win_rates(numbers, path, ARMS_OF_FIGURE_5)


@rc_context(STYLE)
def figure3(numbers: dict, path: Path) -> None:
    """How long each method's replies are, and how many end with the end-of-sequence token."""
    models = by_size(numbers, ("methods",))
    names = list(dict.fromkeys(row["name"] for row in numbers["methods"]))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, factor in ((left, "tokens", 1), (right, "ended", 100)):
        for number, model in enumerate(models):
            rows = [row for row in numbers["methods"] if row["model"] == model["name"]]
            shift = offset(number, len(models), width=0.5)
            places = [names.index(row["name"]) + shift for row in rows]
            means = factor * np.array([row[measure]["mean"] for row in rows])  # (methods,)
            ends = factor * np.array([row[measure]["interval_95"] for row in rows])  # (methods, 2)
            axes.errorbar(
                means,
                places,
                xerr=np.abs(ends.T - means),
                linestyle="none",
                label=name_and_size(model),
                color=MODEL_COLORS[number % len(MODEL_COLORS)],
                marker=MODEL_MARKERS[number % len(MODEL_MARKERS)],
            )
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("reply length, tokens")
    right.set_xlabel("replies that stop at EOS, %")
    right.set_xlim(0, 105)
    if len(models) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def over_seeds(axes: Axes, x: float, summary: dict, color: str, label: str | None = None) -> None:
    """A mean with one standard deviation over seeds, and each seed. For one seed: its interval."""
    seeds = summary["by_seed"]
    mean = summary["mean"]
    if len(seeds) > 1:
        sd = np.std(seeds, ddof=1)
        low = mean - sd
        high = mean + sd
        axes.scatter([x] * len(seeds), seeds, facecolor="white", edgecolor=color, s=16, zorder=3)
    else:
        low, high = summary["interval_95"]
    axes.vlines(x, low, high, color=color, linewidth=1.5)
    axes.plot(x, mean, "o", color=color, label=label)


def ablation(axes: Axes, numbers: dict, title: str) -> None:
    """Win rate minus one half for each value of one setting."""
    chosen = [row for row in numbers["ablations"] if row["ablation"] == title]
    model_names = {row["model"] for row in chosen}
    models = [model for model in by_size(numbers) if model["name"] in model_names]
    values = list(dict.fromkeys(row["value"] for row in chosen))
    for number, model in enumerate(models):
        color = MODEL_COLORS[number % len(MODEL_COLORS)]
        shift = offset(number, len(models), width=0.5)
        label = name_and_size(model)
        for row in chosen:
            if row["model"] == model["name"]:
                x = values.index(row["value"]) + shift
                over_seeds(axes, x, row["win_rate_minus_half"], color, label)
                label = None  # once in the legend
    axes.set_xticks(range(len(values)), values, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(textwrap.fill(title, width=42), fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    if len(models) > 1:
        axes.legend(frameon=False)


@rc_context(STYLE)
def ablations(numbers: dict, path: Path) -> None:
    """All ablations in a grid, with equal scales."""
    titles = list(dict.fromkeys(row["ablation"] for row in numbers["ablations"]))
    num_columns = min(3, len(titles))
    num_rows = -(-len(titles) // num_columns)
    figure = Figure(figsize=(5 * num_columns, 3.7 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < len(titles):
            ablation(axes, numbers, titles[number])
        else:
            axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("win rate against the\nchosen reply, minus 0.5")
    save(figure, path)


@rc_context(STYLE)
def contradictory(numbers: dict, path: Path) -> None:
    """The probability of the majority's reply, after training on labels that disagree."""
    rows = numbers["contradictory"]
    models = by_size(numbers, ("contradictory",))
    figure = Figure(figsize=(1.5 + 5 * len(models), 4), layout="constrained")
    columns = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(columns, models):
        rows_of_model = [row for row in rows if row["model"] == model["name"]]
        for loss in ("dpo", "kto"):
            rows_of_loss = [row for row in rows_of_model if row["loss"] == loss]
            rows_of_loss.sort(key=lambda row: row["share"])
            shares = [row["share"] for row in rows_of_loss]
            means = [row["probability"]["mean"] for row in rows_of_loss]
            axes.plot(shares, means, color=COLORS[loss], label=loss.upper())
            for row in rows_of_loss:
                over_seeds(axes, row["share"], row["probability"], COLORS[loss])
        shares = np.linspace(0.5, 0.95, 200)
        gap = rows_of_model[0]["gap"]
        axes.plot(
            shares,
            optimum_of_dpo(shares, gap),
            color=COLORS["dpo"],
            linestyle="--",
            label="DPO's optimum",
        )
        base = 1 / (1 + np.exp(gap))
        axes.axhline(base, color="grey", linestyle=":", label="before training")
        axes.axhline(0.5, color="black", linewidth=0.8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(name_and_size(model), fontsize=11)
        axes.set_xlabel("labels that agree on the reply")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("the majority's reply's\nshare of probability")
    save(figure, path)
