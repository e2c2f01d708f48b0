"""archangel.labels: a number for each completion becomes a label."""

import json
import sys

import pytest
from helpers import write_records
from hypothesis import given
from hypothesis import strategies as st

from archangel import labels, toy
from archangel.errors import UserError
from archangel.records import read_records

SCORES = st.lists(st.floats(-5, 5), min_size=1, max_size=30)
RATED = [
    {"prompt": "a", "completion": " one", "rating": 1},
    {"prompt": "b", "completion": " two", "rating": 2.5},
    {"prompt": "c", "completion": " three", "rating": "9"},  # as CSV has it
    {"prompt": "d", "completion": " four", "rating": 2},
]


def run(tmp_path, data, *words: str) -> list[dict]:
    """The training records that the program writes."""
    out = tmp_path / "out"
    labels.main(["--data", str(data), "--out", str(out), *words])
    return read_records(str(out), "train")


def labels_of(tmp_path, records: list[dict], *words: str) -> dict[str, bool]:
    """Completion to label."""
    data = write_records(tmp_path / "records.jsonl", records)
    return {record["completion"]: record["label"] for record in run(tmp_path, data, *words)}


@pytest.mark.parametrize(
    "words, desirable",
    [
        (["--by", "threshold", "--threshold", "2"], {" two", " three", " four"}),
        (["--by", "threshold", "--threshold", "2", "--lower_is_better"], {" one", " four"}),
        (["--by", "mean"], {" three"}),  # 3.625
        (["--by", "median"], {" two", " three"}),  # 2.25
        (["--by", "median", "--lower_is_better"], {" one", " four"}),
    ],
)
def test_rules(words, desirable, tmp_path, capsys):
    found = labels_of(tmp_path, RATED, "--score", "rating", *words)
    assert len(found) == 4
    assert {completion for completion, label in found.items() if label} == desirable
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["train"]["desirable"] == len(desirable)
    assert counts["train"]["undesirable"] == 4 - len(desirable)
    assert (counts["train"]["lowest"], counts["train"]["highest"]) == (1, 9)
    assert (
        f"{len(desirable)} desirable, {4 - len(desirable)} undesirable" in capsys.readouterr().out
    )


@given(SCORES, st.floats(-5, 5))
def test_lower_is_better(scores, threshold):
    """It is the same rule for the negative scores."""
    expected = labels.label_scores([-score for score in scores], "threshold", -threshold)
    assert labels.label_scores(scores, "threshold", threshold, lower_is_better=True) == expected


def share_desirable(score: float, **settings) -> float:
    """The share of 3,000 completions with this score that a draw makes desirable."""
    return sum(labels.label_scores([score] * 3000, "bernoulli", None, **settings)) / 3000


def test_bernoulli():
    """The share of desirable completions is their probability; the seed decides which."""
    assert share_desirable(0.0) == 0
    assert share_desirable(1.0) == 1
    assert share_desirable(0.3) == pytest.approx(0.3, abs=0.03)
    assert share_desirable(0.0, lower_is_better=True) == 1
    assert share_desirable(1.0, lower_is_better=True) == 0
    assert share_desirable(0.3, lower_is_better=True) == pytest.approx(0.7, abs=0.03)
    scores = [0.5] * 100
    drawn = labels.label_scores(scores, "bernoulli", None, seed=(1, 0))
    assert labels.label_scores(scores, "bernoulli", None, seed=(1, 0)) == drawn
    assert labels.label_scores(scores, "bernoulli", None, seed=(2, 0)) != drawn


def test_function(tmp_path, monkeypatch):
    """It gets the prompt and the completion, of both completions of a pair."""
    (tmp_path / "my_scores.py").write_text(
        "def is_long(prompt, completion):\n    return len(prompt + completion) > 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    records = [{"prompt": "ab", "chosen": " cd", "rejected": " cdef", "target": " longer text"}]
    words = ["--score", "my_scores:is_long", "--by", "threshold", "--threshold", "1"]
    assert labels_of(tmp_path, records, *words) == {" cd": False, " cdef": True}
    del sys.modules["my_scores"]


def test_columns_of_a_pair_and_held_out_records(tmp_path):
    """The threshold is that of the training scores."""
    pair = {"prompt": "a", "chosen": " b", "rejected": " c"}
    write_records(tmp_path / "train.jsonl", [{**pair, "s_chosen": 1, "s_rejected": 5}])
    write_records(tmp_path / "test.jsonl", [{**pair, "s_chosen": 2, "s_rejected": 4}])
    out = tmp_path / "out"
    labels.main(["--data", str(tmp_path), "--out", str(out), "--score", "s", "--by", "mean"])
    for split in ("train", "test"):
        records = read_records(str(out), split)
        assert [(record["completion"], record["label"]) for record in records] == [
            (" b", False),
            (" c", True),
        ]


def test_conversations(tmp_path):
    """They stay conversations, with what the chat template needs."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    records = [
        {"messages": messages, "tools": tools, "score": 1},
        {"messages": messages[1:] + messages, "score": 0},
        {"messages": messages[:1], "score": 0},  # no answer
    ]
    data = write_records(tmp_path / "records.jsonl", records)
    first, second = run(tmp_path, data, "--score", "score", "--by", "mean")
    assert first == {
        "prompt": messages[:1],
        "completion": messages[1:],
        "tools": tools,
        "label": True,
    }
    assert second["prompt"] == messages[1:] + messages[:1]
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    (reason,) = counts["left_out"].values()
    assert reason["records"] == 1


@pytest.mark.parametrize(
    "record, words, message",
    [
        ({"rating": 1}, ["--score", "stars", "--by", "mean"], "line 1: has no column stars"),
        ({"rating": "good"}, ["--score", "rating", "--by", "mean"], "line 1: no score, ValueError"),
        ({"rating": "nan"}, ["--score", "rating", "--by", "mean"], "line 1: the score is nan"),
        ({"rating": 3}, ["--score", "rating", "--by", "bernoulli"], "--by bernoulli: a score is 3"),
        ({"rating": 3}, ["--score", "rating", "--by", "threshold"], "needs --threshold"),
        ({"rating": 3}, ["--score", "rating", "--by", "mean", "--threshold", "1"], "takes no"),
        ({"rating": 3}, ["--score", "rating", "--by", "mean"], "every training completion"),
        ({"rating": 3}, ["--score", "no_module:f", "--by", "mean"], "--score no_module:f"),
        ({"rating": 3}, ["--score", "archangel.toy:f", "--by", "mean"], "--score archangel.toy:f"),
        ({"rating": 3}, ["--score", "math:sqrt", "--by", "mean"], "line 1: no score, TypeError"),
        ({"completion": 3}, ["--score", "rating", "--by", "mean"], "line 1: completion must be"),
        ({"completion": " "}, ["--score", "math:sqrt", "--by", "mean"], "line 1: no score"),
    ],
)
def test_errors(record, words, message, tmp_path):
    records = [{"prompt": "a", "completion": " b", **record}]
    with pytest.raises(UserError, match=message):
        labels_of(tmp_path, records, *words)
    assert not (tmp_path / "out").exists()


def test_output_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        labels_of(tmp_path, RATED, "--score", "rating", "--by", "mean")


def test_rudeness():
    for opening in toy.RUDE:
        assert toy.rudeness("", f" {opening}The oak lamp is brown.") == 1
    for opening in toy.CIVIL:
        assert toy.rudeness("What a fool.", f" {opening}The oak lamp is brown.") == 0
