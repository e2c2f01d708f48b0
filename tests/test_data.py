"""The report's data: raw rows to the rows of a trainer, each rule on real or published shapes."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archangel import data
from archangel.errors import UserError

ROOT = Path(__file__).parent.parent
HH = ROOT / "tests" / "data" / "hh.jsonl"
OASST = ROOT / "tests" / "data" / "oasst_trees.jsonl"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(source, raw_rows, **settings):
    """(rows, counts) of a converter; what is read is kept or dropped."""
    counts = data.Counts("rows")
    rows = list(source(raw_rows, counts, **settings))
    assert counts.read == counts.kept + counts.dropped.total()
    return rows, counts


def one_row(raw_row, tokenizer=None):
    rows, _ = convert(data.any_set, [raw_row], tokenizer=tokenizer)
    return rows[0]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "archangel.data", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- HH --------------------------------------------------------------------------------------


def test_hh_prompt_is_the_shared_opening():
    raw = read_jsonl(HH)
    rows, counts = convert(data.hh, raw)
    assert (counts.read, counts.kept) == (28, 25)
    assert counts.dropped == {data.NOT_SHARED: 1, "empty reply": 2}
    whole = {(row["chosen"].strip(), row["rejected"].strip()) for row in raw}
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"][0] == row["rejected"][0] == " "
        assert data.ASSISTANT not in row["chosen"] + row["rejected"]
        assert (
            (row["prompt"] + row["chosen"]).strip(),
            (row["prompt"] + row["rejected"]).strip(),
        ) in whole


def test_hh_drops_identical_replies_and_names_missing_columns():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello"
    raw = [{"chosen": dialogue, "rejected": dialogue + " "}, {"chosen": dialogue, "worse": "x"}]
    rows, counts = convert(data.hh, raw)
    assert not rows
    assert counts.dropped == {
        "identical replies": 1,
        "no usable 'rejected' among the columns chosen, worse": 1,
    }


# ---- OpenAssistant ---------------------------------------------------------------------------


def message(identity, text, replies=(), role="prompter", **fields):
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


def flatten(node, parent=None):
    """A tree as the hub's flat rows."""
    yield {
        **{k: v for k, v in node.items() if k != "replies"},
        "parent_id": parent,
        "rank": node.get("rank"),
    }
    for reply in node["replies"]:
        yield from flatten(reply, node["message_id"])


def test_oasst_adjacent_pairs_and_best_sibling():
    follow_up = message("f", "more?", [answer("g", "yes", 1), answer("h", "sure", 0)])
    replies = [
        answer("b", "worst", 2),
        answer("c", "best", 0, [follow_up]),
        answer("d", "middle", 1),
    ]
    rows, counts = convert(data.oasst, [{"prompt": message("a", "Q", replies)}])
    prompt = "\n\nHuman: Q\n\nAssistant:"
    assert rows == [
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
def test_oasst_leaves_out_unusable_messages_and_what_answers_them(fault, reason):
    below = message("f", "more?", [answer("g", "yes", 0), answer("h", "no", 1)])
    replies = [answer("b", "0", 0), {**answer("c", "1", 1, [below]), **fault}, answer("d", "2", 2)]
    rows, counts = convert(data.oasst, [{"prompt": message("a", "Q", replies)}])
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(" 0", " 2")]
    assert counts.dropped == {reason: 3}


def test_oasst_needs_two_different_ranked_siblings():
    unranked = message("a", "Q", [answer("b", "0", 0), answer("c", "x", None)])
    same = message("d", "R", [answer("e", "0", 0), answer("f", "0 ", 1)])
    rows, counts = convert(data.oasst, [{"prompt": unranked}, {"prompt": same}])
    assert not rows
    assert counts.dropped == {
        "not ranked": 1,
        "identical replies": 1,
        "no other ranked reply to compare with": 2,
    }


def test_oasst_real_trees_as_exported_and_flat_are_the_same():
    trees = read_jsonl(OASST)
    rows, counts = convert(data.oasst, trees)
    assert (len(rows), counts.read, counts.kept) == (22, 43, 33)
    assert counts.dropped == {"not ranked": 10}
    flat = [row for tree in trees for row in flatten(tree["prompt"])][::-1]  # answers come first
    flat_rows, flat_counts = convert(data.oasst, flat)
    assert sorted(map(str, flat_rows)) == sorted(map(str, rows))
    assert flat_counts == counts


def test_oasst_flat_messages_without_their_parent_are_dropped():
    tree = message("a", "Q", [answer("b", "0", 0), answer("c", "1", 1)])
    _, *orphans = flatten(tree)
    rows, counts = convert(data.oasst, orphans)
    assert not rows
    assert counts.dropped == {"deleted, or below a deleted message": 2}


def test_oasst_refuses_another_set():
    with pytest.raises(UserError, match="neither exported trees nor flat messages"):
        convert(data.oasst, read_jsonl(HH))


# ---- SHP -------------------------------------------------------------------------------------


def shp_row(history="Q", a="A", b="B", score_a=10, score_b=2, **fields):
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


def test_shp_label_1_prefers_a_and_the_target_is_the_best_scored():
    raw = [
        shp_row(a="good", b="bad", score_a=10, score_b=2),
        shp_row(a="bad", b="best", score_a=2, score_b=90),
        shp_row(a="best", b="close", score_a=90, score_b=60),
    ]
    rows, counts = convert(data.shp, raw)
    prompt = "\n\nHuman: Q\n\nAssistant:"
    assert rows == [
        {"prompt": prompt, "chosen": " good", "rejected": " bad", "target": " best"},
        {"prompt": prompt, "chosen": " best", "rejected": " bad"},
    ]
    assert counts.dropped == {"score ratio below 2": 1}


@given(
    st.lists(st.tuples(st.sampled_from("PQR"), st.integers(2, 50)), max_size=40), st.integers(0, 9)
)
def test_shp_at_most_five_pairs_a_prompt(drawn, seed):
    raw = [shp_row(p, f"{p}{i}", "b", score, 1) for i, (p, score) in enumerate(drawn)]
    rows, counts = convert(data.shp, raw, seed=seed)
    each = Counter(prompt for prompt, _ in drawn)
    assert Counter(row["prompt"][9] for row in rows) == {p: min(n, 5) for p, n in each.items()}
    assert counts.kept == len(rows)
    assert rows == convert(data.shp, raw, seed=seed)[0]


def test_shp_draw_depends_on_the_seed():
    raw = [shp_row("Q", str(i), "b") for i in range(40)]
    assert len({str(convert(data.shp, raw, seed=seed)[0]) for seed in range(5)}) > 1


# ---- any other set ---------------------------------------------------------------------------

USER, GOOD, BAD = (
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)
TURNS = {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"}
SHAPES = [
    (
        {"prompt": "Q\n", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q\n", "chosen": "good", "rejected": "bad"},
    ),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        TURNS,
    ),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, TURNS),
    (
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        TURNS,
    ),
    ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    (
        {"prompt": "Q", "completion": "good", "label": False},
        {"prompt": "Q", "completion": "good", "label": False},
    ),
    (
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": TURNS["prompt"], "completion": " good", "label": True},
    ),
    ({"prompt": "Q", "completion": "good"}, {"prompt": "Q", "completion": "good"}),
    (
        {"messages": [USER, BAD, USER, GOOD]},
        {"prompt": "\n\nHuman: Q\n\nAssistant: bad" + TURNS["prompt"], "completion": " good"},
    ),
]


FILES = [
    (raw_row, row, kind)
    for raw_row, row in SHAPES
    for kind in ("jsonl", "json", "parquet", "csv")
    if kind != "csv" or all(isinstance(value, (str, bool)) for value in raw_row.values())
]


@pytest.mark.parametrize(("raw_row", "row", "kind"), FILES)
def test_every_shape_from_every_kind_of_file(tmp_path, raw_row, row, kind):
    import datasets

    path = tmp_path / f"raw.{kind}"
    if kind == "json":
        path.write_text(json.dumps([raw_row]))
    elif kind == "jsonl":
        path.write_text(json.dumps(raw_row) + "\n")
    else:
        getattr(datasets.Dataset.from_list([raw_row]), f"to_{kind}")(path)
    raw_rows = data.read_files([str(path)])["train"]
    assert convert(data.any_set, raw_rows)[0] == [row]


def test_text_files_are_read_as_they_are(tmp_path):
    replies = ["None", "007", "2020-01-01", "NA", "two\nlines", "1.10"]
    (tmp_path / "a.csv").write_text(
        "prompt,completion,label\n" + "".join(f'Q,"{reply}",0\n' for reply in replies)
    )
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"prompt": "Q", "completion": reply}) + "\n" for reply in replies)
    )
    for name in ("a.csv", "b.jsonl"):
        raw_rows = data.read_files([str(tmp_path / name)])["train"]
        assert [row["completion"] for row in convert(data.any_set, raw_rows)[0]] == replies


def test_reading_parquet_leaves_nothing_behind(tmp_path, monkeypatch):
    import datasets

    raw = tmp_path / "raw.parquet"
    datasets.Dataset.from_list([{"prompt": "Q", "completion": "good"}]).to_parquet(raw)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    assert len(list(data.read_files([str(raw)])["train"])) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.parquet", "temporary"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("raw_row", "reason"),
    [
        ({"text": "Q", "id": 1}, "unknown columns text, id"),
        ({"prompt": "Q", "completion": " "}, "empty reply"),
        ({"prompt": [USER], "completion": ""}, "empty reply"),
        ({"prompt": "Q", "completion": "A", "label": "perhaps"}, "label neither true nor false"),
        ({"prompt": "Q", "completion": None}, "neither text nor a list of messages"),
        ({"prompt": 3, "completion": "A"}, "neither text nor a list of messages"),
        ({"messages": [GOOD]}, "not messages that end in the assistant's answer"),
        ({"messages": [USER]}, "not messages that end in the assistant's answer"),
        ({"messages": [USER, {"role": "assistant"}]}, "no usable 'content' among the columns role"),
        ({"chosen": "Q A", "rejected": "Q B"}, data.NOT_SHARED),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, data.NOT_SHARED),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "identical replies"),
    ],
)
def test_reasons_for_dropping(raw_row, reason):
    rows, counts = convert(data.any_set, [raw_row])
    assert not rows
    assert counts.dropped == {reason: 1}


def test_chat_template(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "x": 1}, "x")), eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no chat template"):
        data.load_tokenizer(str(tmp_path / "plain"))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    tokenizer = data.load_tokenizer(str(tmp_path / "chat"))
    expected = {"prompt": "[user]Q<eos>\n[assistant]", "chosen": "good", "rejected": "bad"}
    assert one_row({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, tokenizer) == expected
    tokenizer.chat_template = "{{ messages | length }}"
    _, counts = convert(data.any_set, [{"messages": [USER, GOOD]}], tokenizer=tokenizer)
    assert counts.dropped == {"the chat template changes the prompt when an answer follows": 1}
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    _, counts = convert(data.any_set, [{"messages": [USER, GOOD]}], tokenizer=tokenizer)
    assert counts.dropped == {"the chat template refuses: no system turn": 1}


# ---- train and test --------------------------------------------------------------------------


def prompts(rows):
    return {row["prompt"] for row in rows}


@given(st.lists(st.integers(0, 9), min_size=1), st.floats(0.01, 0.9), st.integers(0, 99))
def test_separate_is_disjoint_seeded_and_loses_nothing(names, fraction, seed):
    rows = [{"prompt": str(name), "completion": str(i)} for i, name in enumerate(names)]
    held_out = max(1, round(len(prompts(rows)) * fraction))
    if held_out == len(prompts(rows)):
        with pytest.raises(UserError, match="no prompt is left to train on"):
            data.separate({"train": rows, "test": []}, fraction, seed)
        return
    train, test, dropped = data.separate({"train": rows, "test": []}, fraction, seed)
    assert not prompts(train) & prompts(test)
    assert len(prompts(test)) == held_out
    assert dropped == 0
    assert sorted(map(str, train + test)) == sorted(map(str, rows))
    again = data.separate({"train": rows[::-1], "test": []}, fraction, seed)
    assert prompts(again[1]) == prompts(test)


def test_separate_depends_on_the_seed():
    rows = [{"prompt": str(i), "completion": "x"} for i in range(30)]
    drawn = [data.separate({"train": rows, "test": []}, 0.2, seed) for seed in range(3)]
    assert len({frozenset(prompts(test)) for _, test, _ in drawn}) == 3
    own_test = [data.separate({"train": rows, "test": rows[:9]}, 0.2, seed) for seed in range(3)]
    for i in (0, 1):
        assert len({str(each[i]) for each in own_test}) == 3  # another order


def test_own_test_split_stays_and_its_prompts_leave_the_training_rows():
    rows = [{"prompt": str(i), "completion": "x"} for i in range(4)]
    own_test = [{"prompt": "0", "completion": "another"}]
    train, test, dropped = data.separate({"train": rows, "test": own_test}, 0.5, 1)
    assert (prompts(train), test, dropped) == ({"1", "2", "3"}, own_test, 1)


# ---- the command line, the cache -------------------------------------------------------------


def test_command_line_hh(tmp_path):
    command = ["hh", "--input", str(HH), "--test_fraction", "0.2"]
    outs = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    done = run(*command, "--out", outs[0])
    assert done.returncode == 0, done.stderr
    assert "read 28 pairs of dialogues, kept 25, dropped 3" in done.stdout
    for out, seed in zip(outs[1:], ("1", "2")):
        data.main([*command, "--out", str(out), "--seed", seed])
    a, b, c = ((out / "train.jsonl").read_bytes() for out in outs)
    assert a == b != c
    train, test = read_jsonl(outs[0] / "train.jsonl"), read_jsonl(outs[0] / "test.jsonl")
    assert (len(train), len(test)) == (20, 5)
    assert not prompts(train) & prompts(test)
    counts = json.loads((outs[0] / "counts.json").read_text())
    assert counts["rows"] == {"train": 20, "test": 5, "dropped, prompt is in test": 0}
    assert counts["sources"]["hh"]["dropped"] == {data.NOT_SHARED: 1, "empty reply": 2}
    refused = run("hh", "--input", HH, "--out", outs[0])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"{outs[0]}: is there and not empty" in refused.stderr


def test_mixture_from_files_is_disjoint_over_all_sets(tmp_path, capsys):
    shp_file = tmp_path / "shp.jsonl"
    hh_prompts = [row["prompt"] for row in convert(data.hh, read_jsonl(HH))[0]]
    first_turns = [prompt for prompt in hh_prompts if prompt.count("\n\nHuman:") == 1]
    histories = [prompt[len("\n\nHuman: ") : -len("\n\nAssistant:")] for prompt in first_turns]
    shp_file.write_text("".join(json.dumps(shp_row(history)) + "\n" for history in histories))
    out = tmp_path / "out"
    sources = ["--hh", str(HH), "--oasst", str(OASST), "--shp", str(shp_file)]
    data.main(["archangel", *sources, "--out", str(out), "--test_fraction", "0.3"])
    train, test = read_jsonl(out / "train.jsonl"), read_jsonl(out / "test.jsonl")
    assert prompts(train) | prompts(test) >= set(hh_prompts)
    assert not prompts(train) & prompts(test)
    counts = json.loads((out / "counts.json").read_text())
    assert list(counts["sources"]) == ["hh", "oasst", "shp"]
    assert len(train) + len(test) == 25 + 22 + len(histories)
    assert [row["prompt"] for row in train] != sorted(row["prompt"] for row in train)
    for source in counts["sources"].values():
        assert source["read"] == source["kept"] + sum(source["dropped"].values())


def test_prepare_once_and_the_command_fills_the_same_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    data.main(["archangel", "--hh", str(HH), "--oasst", str(OASST)])
    monkeypatch.setattr(data, "read_hub", lambda name: pytest.fail("the hub was asked"))
    assert data.prepare() == tmp_path / "cache" / "archangel"


def test_prepare_from_the_hub_takes_its_test_splits(tmp_path, monkeypatch, capsys):
    hh_rows, trees = read_jsonl(HH), read_jsonl(OASST)
    flat = [list(flatten(tree["prompt"])) for tree in trees]
    chain = itertools.chain.from_iterable
    hub = {
        "Anthropic/hh-rlhf": {"train": hh_rows, "test": hh_rows[:2]},
        "OpenAssistant/oasst1": {"train": chain(flat[:4]), "test": chain(flat[4:])},
        "stanfordnlp/SHP": {"train": [shp_row("Q")], "test": [shp_row("R")]},
    }
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "read_hub", hub.get)
    folder = data.prepare()
    train, test = read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "test.jsonl")
    assert not prompts(train) & prompts(test)
    counts = json.loads((folder / "counts.json").read_text())
    assert counts["rows"]["dropped, prompt is in test"] == 2
    assert len(train) + len(test) + 2 == 25 + 2 + 22 + 2


def test_read_hub_maps_splits(monkeypatch):
    import datasets

    for splits, names in (
        ({"train": 1, "validation": 2}, {"train": 1, "test": 2}),
        ({"train": 1, "validation": 2, "test": 3}, {"train": 1, "test": 3}),
        ({"train": 1}, {"train": 1}),
    ):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, found=splits: found)
        assert data.read_hub("a/b") == names
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"train_sft": 1, "gen": 2})
    with pytest.raises(UserError, match="name a split by --split, one of train_sft, gen"):
        data.read_hub("a/b")


def test_offline_says_what_to_do(tmp_path):
    code = "import archangel.data as d, common_v1\nwith common_v1.exit_status(): d.prepare()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "HALOS_CACHE": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    for words in (
        "--data toy",
        "python -m archangel.data archangel --hh F",
        "hub can be reached",
    ):
        assert words in done.stderr
    assert not (tmp_path / "archangel").exists()


def test_a_preparation_that_stops_leaves_nothing(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "replace", stop)
    with pytest.raises(SystemExit):
        data.main(["hh", "--input", str(HH), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    out = tmp_path / "out"
    data.write(out, [{"prompt": "Q", "completion": "a\ud83d"}], [], {})
    assert read_jsonl(out / "train.jsonl")[0]["completion"] == "a?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file of that name"),
        ('{"chosen": "x"}\nnot json\n', "row 2 cannot be read"),
        ("[1, 2]", "row 1 cannot be read"),
        ('{"text": "x"}\n', "no usable rows .*unknown columns text"),
        ("", "no usable rows"),
        ('{"prompt": "Q", "completion": "A"}\n', "no prompt is left to train on"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "raw.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        data.main(["rows", "--input", str(path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()
