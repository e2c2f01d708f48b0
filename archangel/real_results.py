"""What archangel.real_model found: numbers, a table and a picture, from the folders of its runs."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from archangel.figures import COLORS, STYLE, save
from archangel.judge import write
from archangel.rewards import log_ratios, summarize
from archangel.statistics import binomial_interval

NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "kto_one_reply": "KTO, one reply per prompt",
    "sft+dpo": "SFT+DPO",
    "sft+kto": "SFT+KTO",
}


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe_replies(replies: Sequence[dict]) -> dict[str, float]:
    """Their mean length, and the share that ended by itself."""
    return {
        "replies": len(replies),
        "reply_tokens": statistics.fmean(reply["tokens"] for reply in replies),
        "replies_ended": statistics.fmean(float(reply["ended"]) for reply in replies),
    }


def describe_run(folder: Path, num_shown: int) -> dict:
    """One trained model. num_shown: of its first replies, which are to harmless prompts."""
    run = json.loads((folder / "run.json").read_text())
    metrics = read_lines(folder / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    rewards = read_lines(folder / "rewards.jsonl")
    replies = read_lines(folder / "replies.jsonl")
    curve_names = [
        name
        for name in steps[0]
        if name.startswith(("loss", "reward_", "log_ratio_", "kl", "grad_norm"))
    ]
    pairs = [row for row in rewards if "chosen" in row["completions"]]
    differences = np.subtract(log_ratios(pairs, "chosen"), log_ratios(pairs, "rejected"))
    described = {
        **summarize(rewards),
        **describe_replies(replies[num_shown:]),
        "wins": np.heaviside(differences, 0.5).tolist(),
        "shown": [reply["reply"] for reply in replies[:num_shown]],
        "machine": run["machine"],
        "steps": run["steps"],
        "seconds": metrics[-1]["seconds"],
        "reference_seconds": run.get("reference_seconds"),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "max_memory_mib": max(line["max_memory_mib"] for line in steps),
        "curve": {name: [line[name] for line in steps] for name in curve_names},
    }
    if "kl" in steps[0]:
        above = [float(line["kl"] > 0) for line in steps]
        described["steps_with_kl_above_0"] = statistics.fmean(above)
    return described


def over_seeds(runs: Sequence[dict]) -> dict:
    """The means over seeds, and the interval of the accuracy over prompts."""
    means = {}
    for name, value in runs[0].items():
        if isinstance(value, int | float) and all(name in run for run in runs):
            means[name] = statistics.fmean(run[name] for run in runs)
    wins = np.mean([run["wins"] for run in runs], axis=0)  # of each pair, over seeds
    means["reward_accuracy_95"] = list(binomial_interval(float(wins.sum()), len(wins), 0.95))
    accuracies = [run["reward_accuracy"] for run in runs]
    means["reward_accuracy_of_seeds"] = accuracies
    return means


# ------------------------------------------------------------------------------------- the report


def make_report(results: dict) -> str:
    """The results as Markdown."""
    counts = results["counts"]
    lines = [
        f"# {results['model']} on HH harmless",
        "",
        f"{results['training_pairs']} training pairs, {counts['held_out']} held-out pairs, "
        f"{results['seeds']} seed(s). Written by `python -m archangel.real_model`.",
        "",
        "| method | learning rate | reward accuracy [95%] | log-ratio chosen | rejected | margin "
        "| KL of replies | reply, tokens | ended | steps with `kl` > 0 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    before = results["before"]
    lines.append(
        f"| before training | | | 0 | 0 | 0 | 0 | {before['reply_tokens']:.0f} "
        f"| {before['replies_ended']:.0%} | |"
    )
    for method, row in results["methods"].items():
        mean = row["mean"]
        low, high = mean["reward_accuracy_95"]
        above = ""
        if "steps_with_kl_above_0" in mean:
            above = f"{mean['steps_with_kl_above_0']:.0%}"
        lines.append(
            f"| {NAMES[method]} | {row['rate']} "
            f"| {mean['reward_accuracy']:.1%} [{low:.1%}, {high:.1%}] "
            f"| {mean['log_ratio_chosen']:+.1f} | {mean['log_ratio_rejected']:+.1f} "
            f"| {mean['log_ratio_margin']:+.1f} | {mean['kl_of_replies']:.1f} "
            f"| {mean['reply_tokens']:.0f} | {mean['replies_ended']:.0%} | {above} |"
        )
    lines += [
        "",
        "Log-ratios (log pi - log pi_ref of whole completions) and KL divergences are in nats, "
        "means over held-out pairs or sampled replies.",
        "",
        "## Learning rates",
        "",
        "The loss on the pairs for choosing, after training with seed 1 on "
        f"{counts['few']} pairs; the lowest was taken.",
        "",
        "| method | " + " | ".join(["rate: loss"] * 3) + " |",
        "| --- | --- | --- | --- |",
    ]
    for method, row in results["methods"].items():
        cells = [f"{rate}: {loss:.4f}" for rate, loss in row["losses_by_rate"].items()]
        cells += [""] * (3 - len(cells))
        lines.append(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Time and memory",
        "",
        "| method | steps | seconds, all | of it the reference pass | completion tokens per second "
        "| peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, row in results["methods"].items():
        mean = row["mean"]
        reference = mean.get("reference_seconds")
        lines.append(
            f"| {NAMES[method]} | {mean['steps']:.0f} | {mean['seconds']:.0f} "
            f"| {'' if reference is None else f'{reference:.0f}'} "
            f"| {mean['tokens_per_second']:.0f} | {mean['max_memory_mib']:.0f} |"
        )
    lines += ["", "## Replies to harmless prompts", ""]
    for number, prompt in enumerate(results["shown_prompts"]):
        lines += [f"**{prompt}**", "", f"- before training: {quote(before['shown'][number])}"]
        for method, row in results["methods"].items():
            lines.append(f"- {NAMES[method]}: {quote(row['runs'][0]['shown'][number])}")
        lines.append("")
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """A reply in one line."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------ the picture


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """The mean over up to `window` values around each."""
    values = np.array([np.nan if value is None else value for value in values], float)
    half = window // 2
    means = []
    for place in range(len(values)):
        means.append(np.nanmean(values[max(0, place - half) : place + half + 1]))
    return np.array(means)


@rc_context(STYLE)
def draw(results: dict, path: Path) -> None:
    """Log-ratios and margins during training, and the accuracy on held-out pairs."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    ratios, margins, accuracy = figure.subplots(1, 3)
    for number, (method, row) in enumerate(results["methods"].items()):
        color = COLORS[method.removeprefix("sft+").partition("_")[0]]
        style = "-"
        if method.startswith("sft+"):
            style = "--"
        elif method == "kto_one_reply":
            style = ":"
        curve = row["runs"][0]["curve"]
        for chosen, rejected in (
            ("log_ratio_desirable", "log_ratio_undesirable"),
            ("reward_chosen", "reward_rejected"),
        ):
            if chosen not in curve:
                continue
            scale = 1 if chosen.startswith("log_ratio") else 1 / results["beta"]
            window = max(1, len(curve[chosen]) // 8)
            good = scale * smooth(curve[chosen], window)
            bad = scale * smooth(curve[rejected], window)
            progress = np.arange(1, len(good) + 1) / len(good)
            ratios.plot(progress, good, style, color=color, label=NAMES[method])
            ratios.plot(progress, bad, style, color=color, alpha=0.4)
            margins.plot(progress, good - bad, style, color=color, label=NAMES[method])
        mean = row["mean"]
        low, high = mean["reward_accuracy_95"]
        accuracy.vlines(number, low, high, color=color, linewidth=1.5)
        seeds = mean["reward_accuracy_of_seeds"]
        accuracy.scatter([number] * len(seeds), seeds, facecolor="white", edgecolor=color, zorder=3)
        accuracy.plot(number, mean["reward_accuracy"], "o", color=color)
    for axes in (ratios, margins):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("share of the training steps")
        axes.grid(alpha=0.3)
    ratios.set_ylabel("mean log-ratio, nats")
    ratios.set_title("chosen or desirable (dark), rejected or undesirable (pale)", fontsize=11)
    margins.set_ylabel("difference of these, nats")
    margins.set_title("margin on training batches", fontsize=11)
    margins.legend(frameon=False)
    accuracy.axhline(0.5, color="black", linewidth=0.8)
    names = [NAMES[method] for method in results["methods"]]
    accuracy.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    accuracy.set_title("reward accuracy on held-out pairs, 95% intervals", fontsize=11)
    accuracy.grid(axis="y", alpha=0.3)
    save(figure, path)


def write_results(out: Path, results: dict) -> None:
    """Write results.json, report.md and curves.png."""
    write(out / "results.json", json.dumps(results, indent=1) + "\n")
    write(out / "report.md", make_report(results))
    draw(results, out / "curves.png")
