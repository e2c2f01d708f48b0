"""The report's data: raw records to a trainer's records, each rule on real or published formats."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT, error_line, write_records
from hypothesis import given
from hypothesis import strategies as st

from archangel import data
from archangel.errors import UserError
from archangel.records import read_records

HH = ROOT / "tests" / "data" / "hh.jsonl"
OASST = ROOT / "tests" / "data" / "oasst_trees.jsonl"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(source, raw_records, **settings):
    """(records, counts) of a converter. Everything that is read is kept or dropped."""
    counts = data.Counts("rows")
    records = list(source(raw_records, counts, **settings))
    assert counts.read == counts.kept + counts.dropped.total()
    return records, counts


def prompts(records):
    return {record["prompt"] for record in records}


def completions(records):
    return [record["completion"] for record in records]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "archangel.data", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ----------------------------------------------------------------------------------------------- HH


def test_hh():
    """The prompt is the shared opening of the two dialogues."""
    raw_records = read_jsonl(HH)
    records, counts = convert(data.hh, raw_records)
    assert (counts.read, counts.kept) == (28, 25)
    assert counts.dropped == {data.NOT_SHARED: 1, "empty reply": 2}
    dialogues = {(raw["chosen"].strip(), raw["rejected"].strip()) for raw in raw_records}
    for record in records:
        prompt = record["prompt"]
        chosen = record["chosen"]
        rejected = record["rejected"]
        assert prompt.startswith("\n\nHuman:")
        assert prompt.endswith("\n\nAssistant:")
        assert chosen[0] == rejected[0] == " "
        assert data.ASSISTANT not in chosen + rejected
        assert ((prompt + chosen).strip(), (prompt + rejected).strip()) in dialogues


def test_hh_drops():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello"
    identical = {"chosen": dialogue, "rejected": dialogue + " "}
    without_rejected = {"chosen": dialogue, "worse": "x"}
    records, counts = convert(data.hh, [identical, without_rejected])
    assert not records
    assert counts.dropped == {
        "identical replies": 1,
        "no usable 'rejected' among the columns chosen, worse": 1,
    }


# ------------------------------------------------------------------------------------ OpenAssistant


def message(identity, text, replies=(), role="prompter", **fields):
    """A message of an exported tree."""
    return {
        "message_id": identity,
        "text": text,
        "role": role,
        "lang": "en",
        "replies": list(replies),
        **fields,
    }


def answer(identity, text, rank, replies=(), **fields):
    return message(identity, text, replies, "assistant", rank=rank, **fields)


def flatten(tree, parent_id=None):
    """A tree as the hub's flat messages."""
    flat = {"rank": None, **tree, "parent_id": parent_id}
    del flat["replies"]
    yield flat
    for reply in tree["replies"]:
        yield from flatten(reply, tree["message_id"])


def test_oasst():
    """Replies next to each other in rank make a pair. The target is the best reply."""
    follow_up = message("f", "more?", [answer("g", "yes", 1), answer("h", "sure", 0)])
    replies = [
        answer("b", "worst", 2),
        answer("c", "best", 0, [follow_up]),
        answer("d", "middle", 1),
    ]
    records, counts = convert(data.oasst, [{"prompt": message("a", "Q", replies)}])
    prompt = "\n\nHuman: Q\n\nAssistant:"
    assert records == [
        {"prompt": prompt, "chosen": " best", "rejected": " middle"},
        {"prompt": prompt, "chosen": " middle", "rejected": " worst", "target": " best"},
        {
            "prompt": prompt + " best\n\nHuman: more?\n\nAssistant:",
            "chosen": " sure",
            "rejected": " yes",
        },
    ]
    assert (counts.read, counts.kept) == (5, 5)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"deleted": True}, "deleted, or below a deleted message"),
        ({"lang": "de"}, "not English, or below a message that is not"),
        ({"text": " "}, "empty, or below an empty message"),
    ],
)
def test_oasst_unusable(fault, reason):
    """An unusable message is left out, with everything below it."""
    below = message("f", "more?", [answer("g", "yes", 0), answer("h", "no", 1)])
    unusable = {**answer("c", "1", 1, [below]), **fault}
    replies = [answer("b", "0", 0), unusable, answer("d", "2", 2)]
    records, counts = convert(data.oasst, [{"prompt": message("a", "Q", replies)}])
    assert [(record["chosen"], record["rejected"]) for record in records] == [(" 0", " 2")]
    assert counts.dropped == {reason: 3}


def test_oasst_drops():
    """Replies that are not ranked, or not different from the others."""
    unranked = message("a", "Q", [answer("b", "0", 0), answer("c", "x", None)])
    same = message("d", "R", [answer("e", "0", 0), answer("f", "0 ", 1)])
    records, counts = convert(data.oasst, [{"prompt": unranked}, {"prompt": same}])
    assert not records
    assert counts.dropped == {
        "not ranked": 1,
        "identical replies": 1,
        "no other ranked reply to compare with": 2,
    }


def test_oasst_flat_messages():
    """They give the same records as exported trees, on real ones."""
    trees = read_jsonl(OASST)
    records, counts = convert(data.oasst, trees)
    assert (len(records), counts.read, counts.kept) == (22, 43, 33)
    assert counts.dropped == {"not ranked": 10}
    flat = []
    for tree in trees:
        flat.extend(flatten(tree["prompt"]))
    flat.reverse()  # answers come before what they answer
    flat_records, flat_counts = convert(data.oasst, flat)
    assert sorted(map(str, flat_records)) == sorted(map(str, records))
    assert flat_counts == counts


def test_oasst_without_parent():
    tree = message("a", "Q", [answer("b", "0", 0), answer("c", "1", 1)])
    _, *orphans = flatten(tree)
    records, counts = convert(data.oasst, orphans)
    assert not records
    assert counts.dropped == {"deleted, or below a deleted message": 2}


def test_oasst_refuses_other_set():
    with pytest.raises(UserError, match="neither exported trees nor flat messages"):
        convert(data.oasst, read_jsonl(HH))


# ---------------------------------------------------------------------------------------------- SHP


def shp_record(history="Q", a="A", b="B", score_a=10, score_b=2, **fields):
    return {
        "post_id": "p",
        "domain": "askculinary_train",
        "history": history,
        "human_ref_A": a,
        "human_ref_B": b,
        "score_A": score_a,
        "score_B": score_b,
        "labels": int(score_a > score_b),
        "score_ratio": max(score_a, score_b) / min(score_a, score_b),
        **fields,
    }


def test_shp():
    """Label 1 prefers A. The target is the reply with the highest score."""
    raw_records = [
        shp_record(a="good", b="bad", score_a=10, score_b=2),
        shp_record(a="bad", b="best", score_a=2, score_b=90),
        shp_record(a="best", b="close", score_a=90, score_b=60),
    ]
    records, counts = convert(data.shp, raw_records)
    prompt = "\n\nHuman: Q\n\nAssistant:"
    assert records == [
        {"prompt": prompt, "chosen": " good", "rejected": " bad", "target": " best"},
        {"prompt": prompt, "chosen": " best", "rejected": " bad"},
    ]
    assert counts.dropped == {"score ratio below 2": 1}


@given(
    st.lists(st.tuples(st.sampled_from("PQR"), st.integers(2, 50)), max_size=40), st.integers(0, 9)
)
def test_shp_at_most_five_pairs(drawn, seed):
    raw_records = []
    num_pairs = Counter()
    for number, (letter, score) in enumerate(drawn):
        raw_records.append(shp_record(letter, f"{letter}{number}", "b", score, 1))
        num_pairs[letter] += 1
    records, counts = convert(data.shp, raw_records, seed=seed)
    letters = Counter(record["prompt"][len("\n\nHuman: ")] for record in records)
    assert letters == {letter: min(number, 5) for letter, number in num_pairs.items()}
    assert counts.kept == len(records)
    assert records == convert(data.shp, raw_records, seed=seed)[0]


def test_shp_seed():
    raw_records = [shp_record("Q", str(number), "b") for number in range(40)]
    draws = set()
    for seed in range(5):
        records, _ = convert(data.shp, raw_records, seed=seed)
        draws.add(str(records))
    assert len(draws) > 1


# ----------------------------------------------------------------------------------- train and test


@given(st.lists(st.integers(0, 9), min_size=1), st.floats(0.01, 0.9), st.integers(0, 99))
def test_separate(names, fraction, seed):
    """No prompt is in both splits, no record is lost, and the records' order does not matter."""
    records = []
    for number, name in enumerate(names):
        records.append({"prompt": str(name), "completion": str(number)})
    num_prompts = len(prompts(records))
    num_held_out = max(1, round(num_prompts * fraction))
    if num_held_out == num_prompts:
        with pytest.raises(UserError, match="no prompt is left to train on"):
            data.separate({"train": records, "test": []}, fraction, seed)
        return
    train, test, num_dropped = data.separate({"train": records, "test": []}, fraction, seed)
    assert not prompts(train) & prompts(test)
    assert len(prompts(test)) == num_held_out
    assert num_dropped == 0
    assert sorted(map(str, train + test)) == sorted(map(str, records))
    records.reverse()
    _, test_again, _ = data.separate({"train": records, "test": []}, fraction, seed)
    assert prompts(test_again) == prompts(test)


def test_separate_seed():
    records = [{"prompt": str(number), "completion": "x"} for number in range(30)]
    draws = set()
    for seed in range(3):
        _, test, _ = data.separate({"train": records, "test": []}, 0.2, seed)
        draws.add(frozenset(prompts(test)))
    assert len(draws) == 3
    train_orders = set()
    test_orders = set()
    for seed in range(3):
        train, test, _ = data.separate({"train": records, "test": records[:9]}, 0.2, seed)
        train_orders.add(str(train))
        test_orders.add(str(test))
    assert len(train_orders) == 3
    assert len(test_orders) == 3


def test_separate_own_test_split():
    """It is kept, and its prompts are dropped from the training records."""
    records = [{"prompt": str(number), "completion": "x"} for number in range(4)]
    own_test = [{"prompt": "0", "completion": "another"}]
    train, test, num_dropped = data.separate({"train": records, "test": own_test}, 0.5, 1)
    assert prompts(train) == {"1", "2", "3"}
    assert test == own_test
    assert num_dropped == 1


# ---------------------------------------------------------------------- the command line, the cache


def test_command_hh(tmp_path):
    command = ["hh", "--input", str(HH), "--test_fraction", "0.2"]
    outs = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    done = run(*command, "--out", outs[0])
    assert done.returncode == 0, done.stderr
    assert "read 28 pairs of dialogues, kept 25, dropped 3" in done.stdout
    for out, seed in zip(outs[1:], ("1", "2")):
        data.main([*command, "--out", str(out), "--seed", seed])
    a, b, c = [(out / "train.jsonl").read_bytes() for out in outs]
    assert a == b
    assert a != c
    train = read_jsonl(outs[0] / "train.jsonl")
    test = read_jsonl(outs[0] / "test.jsonl")
    assert (len(train), len(test)) == (20, 5)
    assert not prompts(train) & prompts(test)
    counts = json.loads((outs[0] / "counts.json").read_text())
    assert counts["rows"] == {"train": 20, "test": 5, "dropped, prompt is in test": 0}
    assert counts["sources"]["hh"]["dropped"] == {data.NOT_SHARED: 1, "empty reply": 2}
    refused = run("hh", "--input", HH, "--out", outs[0])
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"error: {outs[0]}: is there and not empty" in refused.stderr


def test_archangel_from_files(tmp_path):
    """No prompt is in both splits, whichever set it comes from."""
    hh_records, _ = convert(data.hh, read_jsonl(HH))
    histories = []
    for record in hh_records:
        prompt = record["prompt"]
        if prompt.count("\n\nHuman:") == 1:
            histories.append(prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:"))
    shp_records = [shp_record(history) for history in histories]
    shp_file = write_records(tmp_path / "shp.jsonl", shp_records)
    out = tmp_path / "out"
    sources = ["--hh", str(HH), "--oasst", str(OASST), "--shp", str(shp_file)]
    data.main(["archangel", *sources, "--out", str(out), "--test_fraction", "0.3"])
    train = read_jsonl(out / "train.jsonl")
    test = read_jsonl(out / "test.jsonl")
    assert prompts(train) | prompts(test) >= prompts(hh_records)
    assert not prompts(train) & prompts(test)
    counts = json.loads((out / "counts.json").read_text())
    assert list(counts["sources"]) == ["hh", "oasst", "shp"]
    assert len(train) + len(test) == 25 + 22 + len(histories)
    train_prompts = [record["prompt"] for record in train]
    assert train_prompts != sorted(train_prompts)  # shuffled
    for source in counts["sources"].values():
        assert source["read"] == source["kept"] + sum(source["dropped"].values())


def test_prepare_mixture_once(tmp_path, monkeypatch):
    """The command fills the same folder, from which it is not prepared again."""
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    data.main(["archangel", "--hh", str(HH), "--oasst", str(OASST)])
    monkeypatch.setattr(data, "read_hub", lambda name: pytest.fail("the hub was asked"))
    data.prepare_mixture("archangel")
    pairs = read_jsonl(tmp_path / "cache" / "archangel" / "train.jsonl")
    assert read_records("archangel", "train") == pairs


def test_prepare_mixture_from_hub(tmp_path, monkeypatch):
    """Test splits of the hub are kept."""
    hh_records = read_jsonl(HH)
    flat = [list(flatten(tree["prompt"])) for tree in read_jsonl(OASST)]
    chain = itertools.chain.from_iterable
    hub = {
        "Anthropic/hh-rlhf": {"train": hh_records, "test": hh_records[:2]},
        "OpenAssistant/oasst1": {"train": chain(flat[:4]), "test": chain(flat[4:])},
        "stanfordnlp/SHP": {"train": [shp_record("Q")], "test": [shp_record("R")]},
    }
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "read_hub", hub.get)
    data.prepare_mixture("archangel")
    folder = tmp_path / "archangel"
    train = read_jsonl(folder / "train.jsonl")
    test = read_jsonl(folder / "test.jsonl")
    assert not prompts(train) & prompts(test)
    counts = json.loads((folder / "counts.json").read_text())
    assert counts["rows"]["dropped, prompt is in test"] == 2
    assert len(train) + len(test) + 2 == 25 + 2 + 22 + 2


def test_prepare_mixture_is_for_its_own_name(monkeypatch):
    monkeypatch.setattr(data, "make", lambda *_: pytest.fail("it was made"))
    data.prepare_mixture("toy")
    data.prepare_mixture(["archangel", "b.jsonl"])


def test_prepare_mixture_offline(tmp_path):
    code = """
from archangel.data import prepare_mixture
from archangel.errors import exit_status
with exit_status():
    prepare_mixture("archangel")
"""
    caches = {"HF_HOME": str(tmp_path), "HALOS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **caches, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    line = error_line(done.stderr)
    assert "--data toy" in line
    assert "python -m archangel.data archangel --hh F" in line
    assert "the hub does not give it" in line
    assert not (tmp_path / "archangel").exists()


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        data.main(["hh", "--input", str(HH), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_write_unpaired_surrogate(tmp_path):
    out = tmp_path / "out"
    data.write(out, [{"prompt": "Q", "completion": "a\ud83d"}], [], {})
    assert read_jsonl(out / "train.jsonl")[0]["completion"] == "a?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file of that name"),
        ('{"chosen": "x"}\nnot json\n', "raw.jsonl, line 2: Expecting value"),
        ("[1, 2]", "raw.jsonl, record 1: is not a JSON object"),
        ('{"text": "x"}\n', "no usable rows .*no usable 'chosen' among the columns text"),
        ("", "no usable rows"),
        (
            '{"chosen": "\\n\\nAssistant: A", "rejected": "\\n\\nAssistant: B"}\n',
            "no prompt is left",
        ),
    ],
)
def test_main_errors(tmp_path, content, message):
    path = tmp_path / "raw.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as raised:
        data.main(["hh", "--input", str(path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
    assert re.search(message, str(raised.value))
    assert not (tmp_path / "out").exists()


def test_rows_names_data():
    """The converter of other data sets is gone: the trainers read them."""
    done = run("rows", "--input", "pairs.parquet", "--out", "rows/pairs")
    assert done.returncode == 2
    assert "--data" in error_line(done.stderr)


# ----------------------------------------------------------------------------------------- show


def test_show(tmp_path, capsys):
    """Counts, what is left out, and examples that decode to the text between their borders."""
    records = [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello.", "label": 1, "id": 7},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " ", "label": 0},
        {"prompt": "Q", "chosen": " yes", "rejected": " no"},
    ]
    path = write_records(tmp_path / "mixed.jsonl", records)
    data.main(["show", "--data", str(path), "--model", "toy", "--n", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"train: {path}: 3 records, 2 used"
    assert f"    unpaired: 2 records, the first is {path}, line 1" in lines
    assert f"    preference: 1 record, the first is {path}, line 3" in lines
    assert f"    left out: an empty completion (1 record, the first is {path}, line 2)" in lines
    assert "    columns that are not read: id" in lines
    texts = []
    for line in lines:
        name, _, pieces = line.partition(" tokens: ")
        if pieces:
            texts.append((name.partition(",")[0], json.loads(pieces).replace("│", "")))
    end = "<|endoftext|>"
    assert texts == [
        ("prompt", "\n\nHuman: Hi\n\nAssistant:"),
        ("completion", f" Hello.{end}"),
        ("prompt", "Q"),
        ("chosen", f" yes{end}"),
        ("rejected", f" no{end}"),
    ]
    assert "label: True" in lines


def test_show_prepares_the_mixture(tmp_path):
    """As the trainers do. Without a network it says how to make it."""
    caches = {"HF_HOME": str(tmp_path), "HALOS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("show", "--data", "archangel", "--model", "toy", **caches)
    assert done.returncode == 2
    assert "is not prepared" in error_line(done.stderr)


def test_show_says_what_is_wrong(tmp_path):
    done = run("show", "--data", tmp_path / "missing.jsonl", "--model", "toy")
    assert done.returncode == 2
    assert "no such file" in error_line(done.stderr)
