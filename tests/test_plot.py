"""Learning curves: which panels there are, smoothing, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from archangel import plot
from archangel.errors import UserError


def write_run(folder: Path, num_steps: int, **fields: float) -> Path:
    """A run's metrics: the fields grow by step; held-out loss before and after."""
    folder.mkdir()
    lines = [{"step": 0, "eval_loss": 0.5, "seconds": 0.1}]
    for step in range(1, num_steps + 1):
        line = {"step": step, "seconds": float(step)}
        for name, slope in fields.items():
            line[name] = slope * step
        lines.append(line)
    lines[-1]["eval_loss"] = 0.4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(plot, "save", lambda figure, path: saved.append(figure))
    return saved


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def test_panels(tmp_path, figures, capsys):
    """A panel is drawn if a run has one of its fields; each run has a color in each panel."""
    kto = write_run(tmp_path / "kto", 10, loss=-0.1, kl=0.2, log_ratio_desirable=1.0)
    sft = write_run(tmp_path / "sft", 4, loss=-0.2, grad_norm=1.0)
    plot.main([str(kto), str(sft), "--out", str(tmp_path / "curves.png")])
    (figure,) = figures
    reference = "reference point and mean log-ratios, nats"
    assert titles(figure) == ["loss", reference, "gradient norm"]
    loss = figure.axes[0]
    lines = [line for line in loss.lines if len(line.get_xdata()) in (10, 4)]
    np.testing.assert_allclose(lines[0].get_ydata(), -0.1 * np.arange(1, 11))
    np.testing.assert_allclose(lines[1].get_ydata(), -0.2 * np.arange(1, 5))
    held_out = [line for line in loss.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in held_out] == [[0.5, 0.4], [0.5, 0.4]]
    assert len({line.get_color() for line in loss.lines}) == 2
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["kl", "log_ratio_desirable"]


def test_written(tmp_path, capsys):
    """The default place is the first run's folder."""
    run = write_run(tmp_path / "kto", 300, loss=-0.1)
    plot.main([str(run)])
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_show(tmp_path, figures, capsys):
    run = write_run(tmp_path / "kto", 3, loss=-0.1, grad_norm=1.0)
    plot.main([str(run), "--show"])
    assert capsys.readouterr().out.split() == ["loss", "grad_norm"]
    plot.main([str(run), "--show", "grad_norm"])
    assert titles(figures[0]) == ["grad_norm"]


def test_smooth():
    few = np.arange(24.0) ** 2
    np.testing.assert_array_equal(plot.smooth(few), few)
    many = np.random.default_rng(0).normal(size=1000)
    smoothed = plot.smooth(many)
    assert smoothed[500] == pytest.approx(many[460:541].mean())
    assert smoothed[0] == pytest.approx(many[:41].mean())
    assert smoothed[-1] == pytest.approx(many[-41:].mean())


def test_values_without_null(tmp_path):
    lines = [{"step": 1, "kl": None}, {"step": 2, "kl": 1.0}, {"step": 3}]
    steps, values = plot.values_of(lines, "kl")
    assert steps.tolist() == [2] and values.tolist() == [1.0]


def test_errors(tmp_path):
    run = write_run(tmp_path / "kto", 3, loss=-0.1)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    for words, reason in (
        ([tmp_path / "none"], "cannot be read"),
        ([empty], "has no step yet"),
        ([run, run], "named twice"),
        ([run, "--show", "los"], "--show los: there are loss"),
        ([run, "--out", tmp_path / "no" / "a.png"], "no folder"),
        ([run] * 8, "at most 7"),
    ):
        with pytest.raises(UserError, match=reason):
            plot.main([str(word) for word in words])
