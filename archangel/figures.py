"""An overview, Figures 2, 3 and 5, the ablations and the contradictory labels, from numbers alone.

    numbers = json.loads(Path("runs/suite/numbers.json").read_text())
    figure2(numbers, Path("figure_2.png"))

Colours are Okabe and Ito's, told apart by the colour-blind; a method's SFT+ twin is hatched.
"""

import os
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

COLOURS = {
    "base": "#BBBBBB",
    "sft": "#F0E442",
    "slic": "#CC79A7",
    "dpo": "#0072B2",
    "ppo": "#009E73",
    "kto": "#D55E00",
}
MARKERS = "os^Dv<>"  # one a model
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 1,
}


def save(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all."""
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=150)
    os.replace(beside, path)


def by_size(numbers: dict, tables=("methods", "ablations", "contradictory")) -> list[dict]:
    """The models that have results in these tables, the smallest first."""
    there = {row["model"] for table in tables for row in numbers[table]}
    models = [model for model in numbers["models"] if model["name"] in there]
    return sorted(models, key=lambda model: model["parameters"])


def size(parameters: int) -> str:
    """1234567 as 1.23M."""
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    return f"{parameters / unit:.3g}{name}"


def bars(axes: Axes, numbers: dict, models: Sequence[dict], arms: Sequence[str]) -> None:
    """Bars of win rate minus one half, a group for each model, with both intervals and seeds."""
    rows = {(row["model"], row["arm"]): row for row in numbers["methods"]}
    arms = [arm for arm in arms if any((model["name"], arm) in rows for model in models)]
    width = 0.8 / len(arms)
    for k, arm in enumerate(arms):
        hatch = "///" if arm.startswith("sft+") else None
        colour, named = COLOURS[arm.removeprefix("sft+")], False
        for x, model in enumerate(models):
            row = rows.get((model["name"], arm))
            if row is None:
                continue
            place, win = x + (k - (len(arms) - 1) / 2) * width, row["win_rate_minus_half"]
            label = None if named else row["name"]  # once in the legend
            bar = {"color": colour, "edgecolor": "white", "hatch": hatch, "label": label}
            axes.bar(place, win["mean"], 0.92 * width, **bar)
            named = True
            axes.vlines(place, *win["interval_95"], color="black", linewidth=1)
            axes.vlines(place, *win["interval_75"], color="black", linewidth=3)
            if len(win["by_seed"]) > 1:
                dots = {"facecolor": "white", "edgecolor": "black", "zorder": 3, "s": 14}
                axes.scatter([place] * len(win["by_seed"]), win["by_seed"], **dots)
    axes.axhline(0, color="black", linewidth=0.8)
    ticks = [f"{model['name']}\n{size(model['parameters'])}" for model in models]
    axes.set_xticks(range(len(models)), ticks)
    axes.set_xlabel("model, parameters")
    axes.set_ylabel("win rate against the\nchosen reply, minus 0.5")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def win_rates(numbers: dict, path: Path, arms: Sequence[str]) -> None:
    """A picture of the bars alone."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    bars(figure.add_subplot(), numbers, by_size(numbers, ("methods",)), arms)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


def pushes(axes: Axes) -> None:
    """How hard each loss pushes a wanted reply up, by how far it has come: minus its gradient.

    The other reply of a pair stays where it was, and so does KTO's reference point.
    """
    r = torch.linspace(-60, 60, 1201, dtype=torch.float64, requires_grad=True)  # nats
    zero, yes = torch.zeros_like(r), torch.ones_like(r, dtype=torch.bool)
    one = torch.ones_like(r)
    losses = {
        "sft": sft.sft_loss(r),
        "slic": slic.slic_loss(r, zero, r),  # its target is the wanted reply
        "dpo": dpo.dpo_loss(r, zero, zero, zero),
        "ppo": ppo_offline.ppo_offline_loss(r, zero, one, yes),  # of tokens of advantage 1
        "kto": kto.kto_loss(r, zero, yes, 0.0),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), r)
        push = -gradient / gradient.abs().max()
        label = "PPO, a token" if name == "ppo" else name_of(name)
        style = "--" if name == "slic" else "-"  # it lies on SFT's for half the way
        axes.plot(r.detach(), push, style, color=COLOURS[name], label=label, linewidth=2)
    axes.set_xlabel("how much likelier the wanted reply is\nthan before training, nats")
    axes.set_ylabel("push upwards, of the largest")
    axes.set_ylim(-0.05, 1.4)
    axes.set_yticks([0, 0.5, 1])
    axes.legend(frameon=False, loc="upper center", ncols=3)


@rc_context(STYLE)
def overview(numbers: dict, path: Path) -> None:
    """The five losses in one look: how each pushes, and what came out."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pushes(left)
    left.set_title("what a loss does", fontsize=11)
    largest = by_size(numbers, ("methods",))[-1:]
    bars(right, numbers, largest, list(dict.fromkeys(row["arm"] for row in numbers["methods"])))
    right.set_title("what came of it", fontsize=11)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


@rc_context(STYLE)
def figure2(numbers: dict, path: Path) -> None:
    """Win rate minus one half by method and size, with 75% and 95% intervals."""
    win_rates(numbers, path, list(dict.fromkeys(row["arm"] for row in numbers["methods"])))


@rc_context(STYLE)
def figure5(numbers: dict, path: Path) -> None:
    """KTO against DPO, each with and without SFT before."""
    win_rates(numbers, path, ["dpo", "kto", "sft+dpo", "sft+kto"])


@rc_context(STYLE)
def figure3(numbers: dict, path: Path) -> None:
    """How long the replies of each method are, and how many end by themselves."""
    models = by_size(numbers)
    names = list(dict.fromkeys(row["name"] for row in numbers["methods"]))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, factor in ((left, "tokens", 1), (right, "ended", 100)):
        for k, model in enumerate(models):
            rows = [row for row in numbers["methods"] if row["model"] == model["name"]]
            shift = 0.5 * (k - (len(models) - 1) / 2) / len(models)
            places = [names.index(row["name"]) + shift for row in rows]
            means = factor * np.array([row[key]["mean"] for row in rows])
            ends = factor * np.array([row[key]["interval_95"] for row in rows])
            label = f"{model['name']}, {size(model['parameters'])}"
            line = {"color": SHADES[k % len(SHADES)], "marker": MARKERS[k % len(MARKERS)]}
            errors = np.abs(ends.T - means)
            axes.errorbar(means, places, xerr=errors, linestyle="none", label=label, **line)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("reply length, tokens")
    right.set_xlabel("replies that end by themselves, %")
    right.set_xlim(0, 105)
    if len(models) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def over_seeds(axes: Axes, x: float, figures: dict, colour: str, label: str | None = None) -> None:
    """The mean with one standard deviation over seeds, and the seeds; or one seed's interval."""
    seeds, mean = figures["by_seed"], figures["mean"]
    ends = figures["interval_95"]
    if len(seeds) > 1:
        ends = mean - np.std(seeds, ddof=1), mean + np.std(seeds, ddof=1)
        dots = {"facecolor": "white", "edgecolor": colour, "s": 16, "zorder": 3}
        axes.scatter([x] * len(seeds), seeds, **dots)
    axes.vlines(x, *ends, color=colour, linewidth=1.5)
    axes.plot(x, mean, "o", color=colour, label=label)


@rc_context(STYLE)
def ablation(numbers: dict, path: Path, title: str) -> None:
    """Win rate minus one half for each value of one setting."""
    chosen = [row for row in numbers["ablations"] if row["ablation"] == title]
    models = [m for m in by_size(numbers) if any(row["model"] == m["name"] for row in chosen)]
    values = list(dict.fromkeys(row["value"] for row in chosen))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for k, model in enumerate(models):
        rows = [row for row in chosen if row["model"] == model["name"]]
        shift = 0.5 * (k - (len(models) - 1) / 2) / len(models)
        label = f"{model['name']}, {size(model['parameters'])}"
        for row in rows:
            place = values.index(row["value"]) + shift
            win = row["win_rate_minus_half"]
            over_seeds(axes, place, win, SHADES[k % len(SHADES)], label if row is rows[0] else None)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel(title)
    axes.set_ylabel("win rate against the\nchosen reply, minus 0.5")
    axes.grid(axis="y", alpha=0.3)
    if len(models) > 1:
        axes.legend(frameon=False)
    save(figure, path)


@rc_context(STYLE)
def contradictory(numbers: dict, path: Path) -> None:
    """The majority's reply's share of probability, after training on labels that disagree."""
    rows = numbers["contradictory"]
    models = [m for m in by_size(numbers) if any(row["model"] == m["name"] for row in rows)]
    figure = Figure(figsize=(1.5 + 5 * len(models), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models):
        its = [row for row in rows if row["model"] == model["name"]]
        for loss in ("dpo", "kto"):
            line = sorted((row for row in its if row["loss"] == loss), key=lambda r: r["share"])
            shares, means = zip(*((row["share"], row["probability"]["mean"]) for row in line))
            axes.plot(shares, means, color=COLOURS[loss], label=loss.upper())
            for row in line:
                over_seeds(axes, row["share"], row["probability"], COLOURS[loss])
        shares = np.linspace(0.5, 0.95, 200)
        gap = its[0]["gap"]
        line = {"color": COLOURS["dpo"], "linestyle": "--", "label": "DPO's optimum"}
        axes.plot(shares, optimum_of_dpo(shares, gap), **line)
        base = 1 / (1 + np.exp(gap))
        axes.axhline(base, color="grey", linestyle=":", label="before training")
        axes.axhline(0.5, color="black", linewidth=0.8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(f"{model['name']}, {size(model['parameters'])}", fontsize=11)
        axes.set_xlabel("labels that agree on the reply")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("the majority's reply's\nshare of probability")
    save(figure, path)
