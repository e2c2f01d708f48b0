"""The results of archangel.real_model as numbers, tables and a figure, from its folders."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from archangel.claims import win_interval
from archangel.figures import COLORS, STYLE, save
from archangel.judge import write
from archangel.plot import smooth
from archangel.results import markdown_table
from archangel.rewards import log_ratios, summarize

# Of a run; these are averaged over seeds.
AVERAGED = (
    "reward_accuracy",
    "log_ratio_chosen",
    "log_ratio_rejected",
    "log_ratio_margin",
    "kl_of_replies",
    "reply_tokens",
    "replies_ended",
    "steps_with_kl_above_0",
    "steps",
    "seconds",
    "reference_seconds",
    "tokens_per_second",
    "max_memory_mib",
)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe_replies(folder: Path, shown_prompts: Sequence[str]) -> dict:
    """The mean length of a model's replies, the share that ended by itself, and the shown ones."""
    replies = read_lines(folder / "replies.jsonl")
    shown = {}  # the file is in order of length
    for reply in read_lines(folder / "shown.jsonl"):
        shown[reply["conversation"]["prompt"][-1]["content"]] = reply["reply"]
    return {
        "replies": len(replies),
        "reply_tokens": statistics.fmean(reply["tokens"] for reply in replies),
        "replies_ended": statistics.fmean(float(reply["ended"]) for reply in replies),
        "shown": [shown[prompt] for prompt in shown_prompts],
    }


def describe_run(folder: Path, shown_prompts: Sequence[str]) -> dict:
    """One trained model."""
    run = json.loads((folder / "run.json").read_text())
    metrics = read_lines(folder / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    rewards = read_lines(folder / "rewards.jsonl")
    pairs = [row for row in rewards if "chosen" in row["completions"]]
    differences = np.subtract(log_ratios(pairs, "chosen"), log_ratios(pairs, "rejected"))
    curves = {}
    for name in steps[0]:
        if name.startswith(("loss", "reward_", "log_ratio_", "kl", "grad_norm")):
            curves[name] = [float(f"{line[name]:.5g}") for line in steps]
    described = {
        **summarize(rewards),
        **describe_replies(folder, shown_prompts),
        "wins": np.heaviside(differences, 0.5).tolist(),  # of each test pair
        "beta": run["settings"].get("beta"),  # SFT has none
        "machine": run["machine"],
        "steps": run["steps"],
        "seconds": metrics[-1]["seconds"],
        "reference_seconds": run.get("reference_seconds", 0.0),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "max_memory_mib": max(line["max_memory_mib"] for line in steps),
        "curves": curves,
    }
    if "kl" in curves:
        described["steps_with_kl_above_0"] = statistics.fmean(kl > 0 for kl in curves["kl"])
    return described


def over_seeds(runs: Sequence[dict]) -> dict:
    """Means over seeds, and the interval of the accuracy over test pairs.

    For one seed it is Wilson's. For several it is by the bootstrap: pairs are drawn with all of
    their seeds.
    """
    means = {}
    for name in AVERAGED:
        if name in runs[0]:
            means[name] = statistics.fmean(run[name] for run in runs)
    low, high = win_interval(np.array([run["wins"] for run in runs]), 0.95)
    means["reward_accuracy_95"] = [low + 0.5, high + 0.5]
    means["reward_accuracy_of_seeds"] = [run["reward_accuracy"] for run in runs]
    return means


# ------------------------------------------------------------------------------------- the report


def make_report(results: dict) -> str:
    """The results as Markdown."""
    counts = results["counts"]
    parts = [
        f"# {results['model']}, trained on HH harmless",
        f"{results['training_pairs']} training pairs, {counts['test']} test pairs that nothing was "
        f"trained on or chosen by, batches of {results['batch_size']}, AdamW, beta 0.1, training "
        f"seeds: {results['seeds']}. Written by `python -m archangel.real_model`.",
        results_table(results),
        "Log-ratios (log pi - log pi_ref, of whole completions) and KL divergences are in nats. "
        "*Reward accuracy* is the share of test pairs whose chosen reply has the higher log-ratio; "
        "its interval is over pairs. The reference of a method after SFT is the SFT model, else "
        "the model before training. *KL* is KL(pi || pi_ref), estimated on replies that the model "
        f"samples to prompts of test pairs, of at most {results['max_new_tokens']} tokens. *Ended* "
        "is the share of these replies that stop at EOS.",
        "## Learning rates",
        f"Validation loss after training with seed 1 on {counts['subset']} pairs. The lowest was "
        "taken; where it is at the end of the range, a better rate may lie beyond.",
        rates_table(results),
        "## Time and memory",
        f"{results['jobs']} stages at once shared the machine ({results['device']}). KTO takes "
        "both replies of a pair as examples, so its epoch has twice as many steps.",
        time_table(results),
        "## Replies to harmless prompts",
        *shown_replies(results),
    ]
    return "\n\n".join(parts) + "\n"


def results_table(results: dict) -> str:
    """A row for each method."""
    head = ["method", "learning rate", "reward accuracy", "95% interval", "log-ratio of chosen"]
    head += ["of rejected", "difference", "KL", "reply, tokens", "ended", "steps with `kl` > 0"]
    before = results["before"]
    blank = [""] * 7
    length = f"{before['reply_tokens']:.0f}"
    rows = [["before training", *blank, length, f"{before['replies_ended']:.0%}", ""]]
    for row in results["methods"].values():
        mean = row["mean"]
        low, high = mean["reward_accuracy_95"]
        above = ""
        if "steps_with_kl_above_0" in mean:
            above = f"{mean['steps_with_kl_above_0']:.0%}"
        accuracy = f"{mean['reward_accuracy']:.1%}"
        seeds = mean["reward_accuracy_of_seeds"]
        if len(seeds) > 1:
            accuracy += f" (seeds {min(seeds):.1%} to {max(seeds):.1%})"
        rows.append(
            [
                row["label"],
                row["rate"],
                accuracy,
                f"{low:.1%} to {high:.1%}",
                f"{mean['log_ratio_chosen']:+.1f}",
                f"{mean['log_ratio_rejected']:+.1f}",
                f"{mean['log_ratio_margin']:+.1f}",
                f"{mean['kl_of_replies']:.1f}",
                f"{mean['reply_tokens']:.0f}",
                f"{mean['replies_ended']:.0%}",
                above,
            ]
        )
    return markdown_table(head, rows)


def rates_table(results: dict) -> str:
    """The validation losses of all learning rates."""
    rows = []
    for row in results["methods"].values():
        losses = [f"{rate}: {loss:.4f}" for rate, loss in row["losses_by_rate"].items()]
        rows.append([row["label"], ", ".join(losses) or "not chosen, given", row["rate"]])
    return markdown_table(["method", "loss by learning rate", "taken"], rows)


def time_table(results: dict) -> str:
    """Seconds and memory of the reported runs, means over seeds."""
    head = ["method", "steps", "seconds, all", "of them for the reference"]
    head += ["completion tokens per second", "peak memory, MiB"]
    rows = []
    for row in results["methods"].values():
        mean = row["mean"]
        cells = [row["label"], f"{mean['steps']:.0f}", f"{mean['seconds']:.0f}"]
        cells.append(f"{mean['reference_seconds']:.0f}")
        cells += [f"{mean['tokens_per_second']:.0f}", f"{mean['max_memory_mib']:.0f}"]
        rows.append(cells)
    return markdown_table(head, rows)


def shown_replies(results: dict) -> list[str]:
    """Of each harmless prompt, a list of the replies of all methods, with seed 1."""
    parts = []
    for number, prompt in enumerate(results["shown_prompts"]):
        lines = [f"- before training: {quote(results['before']['shown'][number])}"]
        for row in results["methods"].values():
            lines.append(f"- {row['label']}: {quote(row['runs'][0]['shown'][number])}")
        parts += [f"**{prompt}**", "\n".join(lines)]
    return parts


def quote(text: str) -> str:
    """A reply in one line."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------- the figure


def log_ratio_curves(run: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """Log-ratios of chosen or desirable, and of rejected or undesirable, in the training batches.

    None for SFT, which has no reference.
    """
    curves = run["curves"]
    if "log_ratio_desirable" in curves:
        good = np.array(curves["log_ratio_desirable"])
        bad = np.array(curves["log_ratio_undesirable"])
    elif "reward_chosen" in curves:
        good = np.array(curves["reward_chosen"]) / run["beta"]
        bad = np.array(curves["reward_rejected"]) / run["beta"]
    else:
        return None
    return smooth(good), smooth(bad)


@rc_context(STYLE)
def draw(results: dict, path: Path) -> None:
    """Log-ratios during training, by seed 1, and the reward accuracy on test pairs."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    log_ratios_axes, difference_axes, accuracy_axes = figure.subplots(1, 3)
    for number, (name, row) in enumerate(results["methods"].items()):
        color = COLORS[name.removeprefix("sft+").removesuffix("_one_reply")]
        style = "--" if row["after_sft"] else "-"
        if name.endswith("one_reply"):
            style = ":"
        curves = log_ratio_curves(row["runs"][0])
        if curves is not None:
            good, bad = curves
            progress = np.arange(1, len(good) + 1) / len(good)
            log_ratios_axes.plot(progress, good, style, color=color, label=row["label"])
            log_ratios_axes.plot(progress, bad, style, color=color, alpha=0.4)
            difference_axes.plot(progress, good - bad, style, color=color)
        draw_accuracy(accuracy_axes, number, row["mean"], color)
    for axes in (log_ratios_axes, difference_axes):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("share of the training steps")
        axes.grid(alpha=0.3)
    log_ratios_axes.set_ylabel("mean log-ratio, nats")
    log_ratios_axes.set_title(
        "training batches: chosen or desirable (dark),\nrejected or undesirable (pale)", fontsize=11
    )
    difference_axes.set_ylabel("difference of log-ratios, nats")
    difference_axes.set_title("training batches: difference of the two", fontsize=11)
    figure.legend(
        *log_ratios_axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(results["methods"]),
        frameon=False,
    )
    accuracy_axes.axvline(0.5, color="black", linewidth=0.8)
    labels = [row["label"].replace(", ", ",\n") for row in results["methods"].values()]
    accuracy_axes.set_yticks(range(len(labels)), labels)
    accuracy_axes.invert_yaxis()
    accuracy_axes.set_xlabel("reward accuracy")
    accuracy_axes.set_title("test pairs, 95% intervals", fontsize=11)
    accuracy_axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_accuracy(axes: Axes, height: int, mean: dict, color: str) -> None:
    """One method's accuracy with its interval; small circles are seeds, if there are several."""
    axes.hlines(height, *mean["reward_accuracy_95"], color=color, linewidth=1.5)
    axes.plot(mean["reward_accuracy"], height, "o", color=color)
    seeds = mean["reward_accuracy_of_seeds"]
    if len(seeds) > 1:
        heights = [height] * len(seeds)
        axes.scatter(seeds, heights, facecolor="white", edgecolor=color, zorder=3, s=16)


def write_results(out: Path, results: dict) -> None:
    """Write results.json, report.md and curves.png."""
    write(out / "results.json", json.dumps(results) + "\n")
    write(out / "report.md", make_report(results))
    draw(results, out / "curves.png")
