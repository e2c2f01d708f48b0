"""Learning curves of one or several runs, from their metrics.jsonl.

    python -m archangel.plot runs/kto runs/dpo --out curves.png
    python -m archangel.plot runs/kto --show                          # the fields that there are
    python -m archangel.plot runs/kto --show loss grad_norm --out curves.png

Each run has a color, each field of a panel a line style. Many steps are smoothed by the mean over a
window of 8% of them, with the steps themselves pale behind. Dots are held-out metrics.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from archangel.errors import UserError, exit_status
from archangel.figures import MODEL_COLORS, STYLE, save

# Title to fields. A panel is drawn if a run has one of its fields.
PANELS = {
    "loss": ["loss"],
    "reward": ["reward_chosen", "reward_rejected", "reward_desirable", "reward_undesirable"],
    "reward margin": ["reward_margin"],
    "margin of log-probabilities, nats": ["logp_margin"],
    "margin of log-ratios, nats": ["log_ratio_margin"],
    "accuracy": ["reward_accuracy", "logp_accuracy"],
    "share of pairs past the margin": ["clear_of_margin"],
    "share of tokens clipped": ["clipped"],
    "loss of the critic": ["critic_loss"],
    "reference point and mean log-ratios, nats": [
        "kl",
        "log_ratio_desirable",
        "log_ratio_undesirable",
    ],
    "gradient norm": ["grad_norm"],
    "completion tokens per second": ["tokens_per_second"],
}
# Of the two classes of a panel, one is solid and one dashed; the reference point is dotted.
LINE_STYLES = {
    "reward_rejected": "--",
    "reward_undesirable": "--",
    "log_ratio_undesirable": "--",
    "kl": ":",
}


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises UserError if there are none."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, {error}; name the --out of a run") from None
    if not lines:
        raise UserError(f"{path}: has no step yet")
    return lines


def fields_of(runs: dict[str, list[dict]]) -> list[str]:
    """The fields that can be drawn, without the eval_ of held-out ones."""
    found = {}
    for lines in runs.values():
        for line in lines:
            for name in line:
                found[name.removeprefix("eval_")] = None
    return [name for name in found if name not in ("step", "seconds")]


def values_of(lines: Sequence[dict], field: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) that have this field, and its values (n,)."""
    steps = []
    values = []
    for line in lines:
        if line.get(field) is not None:
            steps.append(line["step"])
            values.append(line[field])
    return np.array(steps), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the values (n,) in a window around each. Fewer than 25 stay as they are."""
    half = len(values) // 25
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts = np.maximum(0, places - half)
    stops = np.minimum(len(values), places + half + 1)
    return (sums[stops] - sums[starts]) / (stops - starts)


def draw_field(axes: Axes, lines: Sequence[dict], field: str, color: str, style: str) -> None:
    """One field of one run, and its held-out values."""
    steps, values = values_of(lines, field)
    smoothed = smooth(values)
    if smoothed is not values:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    axes.plot(steps, smoothed, style, color=color, linewidth=1.5)
    steps, values = values_of(lines, f"eval_{field}")
    inside = "white" if style == "--" else color
    axes.plot(steps, values, "o", color=color, markerfacecolor=inside, markersize=5)


def draw_panel(axes: Axes, runs: dict[str, list[dict]], title: str, fields: Sequence[str]) -> None:
    """The fields of one panel, of all runs."""
    drawn = []
    for color, lines in zip(MODEL_COLORS, runs.values()):
        for field in fields:
            if any(field in line or f"eval_{field}" in line for line in lines):
                draw_field(axes, lines, field, color, LINE_STYLES.get(field, "-"))
                if field not in drawn:
                    drawn.append(field)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        handles = []
        for field in drawn:
            style = LINE_STYLES.get(field, "-")
            handles.append(Line2D([], [], color="black", linestyle=style, label=field))
        axes.legend(handles=handles, frameon=False, fontsize=8)


@rc_context(STYLE)
def draw(runs: dict[str, list[dict]], panels: dict[str, list[str]], path: Path) -> None:
    """A grid of panels. runs: name to lines of metrics.jsonl."""
    num_columns = min(4, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4 * num_columns, 0.6 + 3 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, fields) in zip(grid.flat, panels.items()):
        draw_panel(axes, runs, title, fields)
    handles = []
    for color, name in zip(MODEL_COLORS, runs):
        handles.append(Line2D([], [], color=color, label=name))
    handles.append(Line2D([], [], color="black", marker="o", linestyle="", label="held out"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs")
    add("--out", type=Path, help="a .png to write (default: curves.png in the first run's folder)")
    add("--show", nargs="*", metavar="FIELD", help="fields to draw; without any, list them")
    args = parser.parse_args(arguments)
    if len(args.runs) > len(MODEL_COLORS):
        raise UserError(f"{len(args.runs)} runs: at most {len(MODEL_COLORS)} can be told apart")
    runs = {str(folder): read_metrics(folder) for folder in args.runs}
    if len(runs) < len(args.runs):
        raise UserError("a run is named twice")
    known = fields_of(runs)
    if args.show == []:
        print("\n".join(known))
        return
    if args.show is None:
        panels = {}
        for title, fields in PANELS.items():
            if any(field in known for field in fields):
                panels[title] = fields
    else:
        for field in args.show:
            if field not in known:
                raise UserError(f"--show {field}: there are {', '.join(known)}")
        panels = {field: [field] for field in args.show}
    out = args.out or args.runs[0] / "curves.png"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no folder {out.parent}")
    draw(runs, panels, out)
    print(f"the curves are in {out}")


if __name__ == "__main__":
    with exit_status():
        main()
