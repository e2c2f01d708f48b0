"""Data files to records: archangel/records.py.

HALOS_LONG=1 python -m pytest tests/test_records.py makes up 2,000 files instead of 200.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archangel import records as records_module
from archangel.errors import UserError
from archangel.records import find_sources, iter_records, read_records

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
UNPAIRED = {"prompt": "Q:", "completion": " yes", "label": True}
SUPERVISED = {"prompt": "Q:", "completion": " yes"}
USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
GO = {"role": "assistant", "content": "Go."}
MESSAGES = {"messages": [USER, HELLO]}
RECORDS = {
    "preference": PAIR,
    "preference of messages": {"prompt": [USER], "chosen": [HELLO], "rejected": [GO]},
    "preference without a prompt": {"chosen": [USER, HELLO], "rejected": [USER, GO]},
    "preference of dialogues": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Go.",
    },
    "preference of conversations": {
        "prompt": "Hi",
        "chosen": [USER, HELLO],
        "rejected": [USER, GO],
    },
    "unpaired": UNPAIRED,
    "unpaired of messages": {"prompt": [USER], "completion": [HELLO], "label": False},
    "unpaired conversation": {**MESSAGES, "label": False},
    "supervised": SUPERVISED,
    "supervised of messages": {"prompt": [USER], "completion": [HELLO]},
    "supervised without a prompt": {"completion": [USER, HELLO]},
    "conversation": MESSAGES,
}
SEARCH = {"type": "function", "function": {"name": "search"}}


def write(path: Path, lines: list, end: str = "\n") -> str:
    """Write records, or lines of text, as JSONL; compressed if the name ends in .gz."""
    content = ""
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(line, ensure_ascii=False)
        content += line + end
    return write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> str:
    """Write a file, in a folder that is made if needed; compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


def error_of(data: str | Path | list[str]) -> str:
    """The one line of the UserError that read_records raises."""
    if isinstance(data, Path):
        data = str(data)
    with pytest.raises(UserError) as caught:
        read_records(data, "train")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


def names_line(message: str, data: str, number: int) -> bool:
    """Whether a message names this line, or this record, of this file."""
    return re.search(rf"{re.escape(data)}, \w+ {number}:", message) is not None


# ------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz", "records.json"])
@pytest.mark.parametrize("format_name", list(RECORDS))
def test_formats(tmp_path, format_name, name):
    record = RECORDS[format_name]
    assert read_records(write(tmp_path / name, [record, record]), "train") == [record, record]


def test_prompt_may_be_empty(tmp_path):
    records = [{**PAIR, "prompt": ""}, {**UNPAIRED, "prompt": " \n"}]
    assert read_records(write(tmp_path / "records.jsonl", records), "train") == records


def test_first_format_that_fits_counts(tmp_path):
    """Columns of later formats are not read, and neither are others. They are counted."""
    everything = {**PAIR, **UNPAIRED, **MESSAGES, "target": " maybe", "source": 3}
    without_pair = {**UNPAIRED, **MESSAGES, "chosen": " yes", "source": None}
    without_label = {**SUPERVISED, **MESSAGES}
    conversation = {**MESSAGES, "prompt": "Hi", "score": 5}
    data = write(
        tmp_path / "records.jsonl", [everything, without_pair, without_label, conversation]
    )
    found = [
        (record, not_read) for _, record, not_read in iter_records(find_sources(data)["train"])
    ]
    assert found == [
        ({**PAIR, "target": " maybe"}, {"completion", "label", "messages", "source"}),
        (UNPAIRED, {"messages", "chosen", "source"}),
        (SUPERVISED, {"messages"}),
        (MESSAGES, {"prompt", "score"}),
    ]


def test_messages_beside_texts_without_a_prompt(tmp_path):
    """The first format does not fit, since nothing says what the prompt is."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"chosen": "a", "rejected": "b", "messages": messages}
    assert read_records(write(tmp_path / "r.jsonl", [row]), "train") == [{"messages": messages}]


def test_blank_target(tmp_path):
    """In CSV every row has the column."""
    path = tmp_path / "r.csv"
    path.write_text("prompt,chosen,rejected,target\nq,a,b,\nq,a,b,c\n")
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read_records(str(path), "train") == [pair, {**pair, "target": "c"}]


def test_null_is_no_column(tmp_path):
    """Sets that are joined have columns that only some of their records fill."""
    joined = dict.fromkeys([*PAIR, *UNPAIRED, "messages", "target", "system", "tools"])
    records = [{**joined, **PAIR}, {**joined, **UNPAIRED}, {**joined, **MESSAGES}]
    data = write(tmp_path / "records.jsonl", [{**joined, **PAIR}, {**joined, **UNPAIRED}])
    assert read_records(data, "train") == [PAIR, UNPAIRED]
    data = write(tmp_path / "records.jsonl", records)
    assert names_line(error_of(data), data, 3)  # its label is null
    del records[2]["label"]
    data = write(tmp_path / "records.jsonl", records)
    assert read_records(data, "train") == [PAIR, UNPAIRED, MESSAGES]


@pytest.mark.parametrize("as_text", [False, True])
def test_template_columns(tmp_path, as_text):
    """Also as JSON in a string, which is how they fit into one column of parquet."""
    options = {"tools": [SEARCH], "chat_template_kwargs": {"thinking": True}}
    record = {**MESSAGES, **options}
    written = record
    if as_text:
        written = {**MESSAGES, **{name: json.dumps(item) for name, item in options.items()}}
    assert read_records(write(tmp_path / "records.jsonl", [written]), "train") == [record]


def test_labels(tmp_path):
    """As data sets spell them. A column that has nothing in it is not lost."""
    labels = {
        True: [True, 1, 1.0, "true", "True", "1", "1.0", " yes", "good", "chosen", "desirable"],
        False: [False, 0, 0.0, "false", "FALSE", "0", "no", "bad", "rejected", "undesirable"],
    }
    for label, spellings in labels.items():
        records = [{**UNPAIRED, "label": spelling, "system": ""} for spelling in spellings]
        data = write(tmp_path / "records.jsonl", records)
        found = read_records(data, "train")
        assert found == [{**UNPAIRED, "label": label}] * len(spellings)
        assert all(type(record["label"]) is bool for record in found)


# ---------------------------------------------------------------------------- files and splits


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_folder(tmp_path, suffix):
    held_out = {**PAIR, "prompt": "held out"}
    write(tmp_path / f"train{suffix}", [PAIR, PAIR])
    assert read_records(str(tmp_path), "test") == []
    write(tmp_path / f"test{suffix}", [held_out])
    assert read_records(str(tmp_path), "train") == [PAIR, PAIR]
    assert read_records(str(tmp_path), "test") == [held_out]


def test_folder_with_validation(tmp_path):
    """It is the held-out split, unless there is a test split."""
    held_out = {**PAIR, "prompt": "held out"}
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "validation.jsonl", [held_out])
    assert read_records(str(tmp_path), "test") == [held_out]
    write(tmp_path / "test.jsonl", [held_out, held_out])
    assert read_records(str(tmp_path), "test") == [held_out, held_out]


def test_folder_of_archangel_data(tmp_path):
    """counts.json and README.md are not data."""
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "test.jsonl", [PAIR, PAIR])
    write(tmp_path / "counts.json", [{"rows": {"train": 1, "test": 2}}])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nPairs.\n")
    assert read_records(str(tmp_path), "train") == [PAIR]
    assert read_records(str(tmp_path), "test") == [PAIR, PAIR]


def test_folder_with_a_compressed_copy(tmp_path):
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "train.jsonl.gz", [PAIR])
    assert read_records(str(tmp_path), "train") == [PAIR]


def test_folder_of_shards(tmp_path):
    first = [{**PAIR, "prompt": f"{number}"} for number in range(3)]
    second = [{**PAIR, "prompt": f"{number}"} for number in range(3, 5)]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list(first).to_parquet(folder / "train-00000-of-00002.parquet")
    datasets.Dataset.from_list(second).to_parquet(folder / "train-00001-of-00002.parquet")
    datasets.Dataset.from_list([PAIR]).to_parquet(folder / "test-00000-of-00001.parquet")
    for data in (tmp_path, folder):
        assert read_records(str(data), "train") == first + second
        assert read_records(str(data), "test") == [PAIR]


@pytest.mark.parametrize("name", ["a b", "a:b", "é", "a#b%20", "{a}"])
def test_folder_names(tmp_path, name):
    write(tmp_path / name / "train.jsonl", [PAIR])
    assert read_records(str(tmp_path / name), "train") == [PAIR]


@pytest.mark.parametrize("name", ["a[1]", "a?", "a*"])
def test_folder_whose_name_is_a_pattern(tmp_path, name):
    """The datasets library would read other folders that match it."""
    write(tmp_path / name / "train.jsonl", [PAIR])
    write(tmp_path / "ab" / "train.jsonl", [SUPERVISED])
    assert str(tmp_path / name) in error_of(tmp_path / name)
    datasets.Dataset.from_list([UNPAIRED]).to_parquet(tmp_path / name / "x.parquet")
    datasets.Dataset.from_list([SUPERVISED]).to_parquet(tmp_path / "ab" / "x.parquet")
    assert read_records(str(tmp_path / name / "x.parquet"), "train") == [UNPAIRED]
    assert read_records(str(tmp_path / name / "train.jsonl"), "train") == [PAIR]


def test_file(tmp_path, monkeypatch):
    """All of a file is for training, whatever its name."""
    data = write(tmp_path / "test.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for path in (data, "test.jsonl", "./test.jsonl"):
        assert read_records(path, "train") == [PAIR]
        assert read_records(path, "test") == []


def test_several_files(tmp_path):
    """As a list, or as a glob. They may be of different kinds."""
    names = []
    expected = []
    for number in (3, 1, 2):
        records = [{**PAIR, "prompt": f"{number}"}]
        names.append(write(tmp_path / f"part-{number}.jsonl", records))
        expected.append(records[0])
    names.append(str(tmp_path / "more.csv"))
    write_bytes(tmp_path / "more.csv", b"prompt,completion\nQ:, yes\n")
    assert read_records(names, "train") == [*expected, SUPERVISED]
    assert read_records(names, "test") == []
    in_order = [expected[1], expected[2], expected[0]]
    assert read_records(str(tmp_path / "part-*.jsonl"), "train") == in_order
    assert read_records([names[3], str(tmp_path / "part-[12].jsonl")], "train") == [
        SUPERVISED,
        *in_order[:2],
    ]


def test_several_names_that_are_not_all_files(tmp_path):
    data = write(tmp_path / "train.jsonl", [PAIR])
    for other in (str(tmp_path / "no.jsonl"), str(tmp_path), "toy"):
        assert f"--data {other}: is not a file" in error_of([data, other])
    assert "no file has such a name" in error_of(tmp_path / "part-*.jsonl")


def test_toy_has_both_splits():
    train_records = read_records("toy", "train")
    test_records = read_records("toy", "test")
    assert len(train_records) > len(test_records) > 0
    for record in train_records + test_records:
        assert record.keys() >= {"prompt", "chosen", "rejected"}
    train_prompts = {record["prompt"] for record in train_records}
    assert train_prompts.isdisjoint(record["prompt"] for record in test_records)


def test_archangel_is_in_the_cache(tmp_path, monkeypatch):
    """test_data tries how archangel.data makes it there."""
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    write(tmp_path / "archangel" / "train.jsonl", [PAIR])
    assert read_records("archangel", "train") == [PAIR]
    assert read_records("archangel", "test") == []


# ------------------------------------------------------------------- saved data sets, and the hub


def test_saved_data_set(tmp_path):
    datasets.Dataset.from_list([PAIR, PAIR]).save_to_disk(tmp_path / "saved")
    assert read_records(str(tmp_path / "saved"), "train") == [PAIR, PAIR]
    assert read_records(str(tmp_path / "saved"), "test") == []
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert read_records(str(file), "train") == [PAIR, PAIR]


def split_named(name: str) -> datasets.Dataset:
    """A data set whose prompts are the name of a split."""
    return datasets.Dataset.from_list([{**PAIR, "prompt": name}])


def prompts_of(data: str) -> dict[str, str]:
    """The first prompt of each split that --data names."""
    prompts = {}
    for split, source in find_sources(data).items():
        _, record, _ = next(iter_records(source))
        prompts[split] = record["prompt"]
    return prompts


PAIRED_SPLITS = ["train_sft", "test_sft", "train_prefs", "test_prefs", "test"]


def test_saved_splits(tmp_path):
    """A split train_x is evaluated on test_x, others on test or validation."""
    splits = {name: split_named(name) for name in ["validation", *PAIRED_SPLITS, "extra"]}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert prompts_of(f"{folder}::train_prefs") == {"train": "train_prefs", "test": "test_prefs"}
    assert prompts_of(f"{folder}::train_sft") == {"train": "train_sft", "test": "test_sft"}
    assert prompts_of(f"{folder}::extra") == {"train": "extra", "test": "test"}
    assert prompts_of(f"{folder}::test") == {"train": "test", "test": "validation"}
    for data in (folder, f"{folder}::none"):
        message = error_of(data)
        assert "train_sft, test_sft, train_prefs, test_prefs, test, extra" in message
        assert f"{folder}::validation" in message


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path: str, config: str | None) -> datasets.DatasetDict:
        asked.append((path, config))
        names = ["train", "validation"] if config == "plain" else PAIRED_SPLITS
        return datasets.DatasetDict({name: split_named(name) for name in names})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts_of("owner/name:plain") == {"train": "train", "test": "validation"}
    assert prompts_of("owner/name:plain:validation") == {"train": "validation"}
    assert prompts_of("owner/name::train_sft") == {"train": "train_sft", "test": "test_sft"}
    assert prompts_of("owner/name:other:train_prefs")["test"] == "test_prefs"
    assert "owner/name::train_sft" in error_of("owner/name")
    assert asked[:3] == [("owner/name", "plain")] * 2 + [("owner/name", None)]


@pytest.mark.parametrize(
    "name", ["owner/name", "name", "a:b:c", "https://host/file", "/no/folder", ":", "a b", "NAME:"]
)
def test_what_the_hub_does_not_give(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert error_of(name).startswith(f"--data {name}: ")


# -------------------------------------------------------------------------------- JSON Lines


def test_blank_lines(tmp_path):
    """A byte order mark and Windows line ends are no part of a record."""
    path = tmp_path / "records.jsonl"
    text = f"{json.dumps(PAIR)}\r\n\r\n  \n{json.dumps(SUPERVISED)}"
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_records(str(path), "train") == [PAIR, SUPERVISED]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz", "records.json"])
def test_unicode_arrives_as_written(tmp_path, name, escaped):
    text = 'naïve 東京 🦉 e\u0301 \u2028 \x85 \u00a0 \ufeff \x00 \r\n \t \\ " \U0010ffff'
    record = {"prompt": text, "completion": text}
    written = [record] if name == "records.json" else record
    data = write(tmp_path / name, [json.dumps(written, ensure_ascii=escaped)])
    assert read_records(data, "train") == [record]


DEEP = "[" * 100_000 + "]" * 100_000
TOO_DEEP_FOR_REPR = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "Q:", ', ""),
        ("prompt: Q", ""),
        ("{'prompt': 'Q'}", ""),
        ('{"prompt": ' + DEEP + ', "completion": "c"}', ""),
        ('{"prompt": ' + TOO_DEEP_FOR_REPR + ', "completion": "c"}', ""),
        ('{"prompt": ' + "9" * 5000 + ', "completion": "c"}', ""),
        ('{"prompt": "Q:", "completion": "a", "completion": "b"}', "twice"),
        ("[]", "object"),
        ('"text"', "object"),
        ("null", "object"),
        ("3", "object"),
        ({}, "prompt, completion"),
        ({"prompt": "Q:"}, "prompt, completion"),
        ({"prompt": "Q:", "chosen": "a"}, "prompt, chosen, rejected"),
        ({"prompt": "Q:", "Completion": "a"}, "prompt, completion"),
        ({**PAIR, "rejected": None}, "has the columns chosen, prompt; needs"),
        (
            {"question": "Q:", "chosen": "a", "rejected": "b", "system": ""},  # Orca's
            "has the columns chosen, question, rejected, system; needs {prompt, chosen, rejected}",
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "{messages}"),  # ShareGPT's
        ({**PAIR, "target": 3}, "target"),
        ({**UNPAIRED, "label": 2}, "label"),
        ({**UNPAIRED, "label": 0.5}, "label"),
        ({**UNPAIRED, "label": "fine"}, "label"),
        ({**UNPAIRED, "label": ""}, "label"),
        ({**UNPAIRED, "label": float("nan")}, "label"),
        ({**UNPAIRED, "label": None}, "label is null"),
        ({**MESSAGES, "label": None}, "label is null"),
        ({**UNPAIRED, "label": [1]}, "label"),
        ({**PAIR, "system": "Be brief."}, "beginning of the prompt"),
        ({**MESSAGES, "system": "Be brief."}, "first message"),
        ({**PAIR, "tools": [SEARCH]}, "tools"),
        ({**MESSAGES, "tools": "search"}, "tools is text, and not JSON"),
        ({**MESSAGES, "tools": {"name": "search"}}, "tools must be a list"),
        ({**MESSAGES, "tools": DEEP}, ""),
        ({**MESSAGES, "chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict"),
        ({**SUPERVISED, "images": ["a.png"]}, "only text"),
        ({**SUPERVISED, "prompt": None}, "prompt"),
        ({**SUPERVISED, "prompt": 7}, "prompt must be text or a list of messages, not 7"),
        ({**SUPERVISED, "prompt": ["Q:"]}, "prompt"),
        ({**SUPERVISED, "prompt": []}, "prompt"),
        ({**SUPERVISED, "prompt": [{"content": "Hi"}]}, "prompt"),
        ({**SUPERVISED, "completion": {"text": "a\nb"}}, "completion"),
        ({**PAIR, "chosen": True}, "chosen"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "messages"),
        ({"messages": [{"role": 3, "content": "Hi"}]}, "messages must be"),
        ({"messages": "Hi"}, "messages must be a list, not text; save the data as JSON Lines"),
    ],
)
def test_bad_record_is_named(tmp_path, line, said):
    data = write(tmp_path / "records.jsonl", [PAIR, "", UNPAIRED, line, PAIR])
    message = error_of(data)
    assert names_line(message, data, 4)
    assert said in message


def test_bad_line_of_a_large_file_is_named(tmp_path):
    """A reader that guesses a column's type from the first records would read 7 as "7"."""
    lines = (json.dumps(PAIR) + "\n" * 20).encode() * 10_000  # most lines are blank
    for last in ('{"broken', json.dumps({**PAIR, "chosen": 7})):
        content = lines + last.encode() + b"\n" + json.dumps(PAIR).encode()
        data = write_bytes(tmp_path / "records.jsonl", content)
        message = error_of(data)
        assert names_line(message, data, 200_001)
    assert "chosen must be text or a list of messages, not 7" in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "records.jsonl"
    line = json.dumps({**PAIR, "chosen": "café"}, ensure_ascii=False)
    path.write_bytes(f"{json.dumps(PAIR)}\n".encode() + line.encode(encoding))
    assert names_line(error_of(path), str(path), 2)


def test_long_lines(tmp_path):
    """Records of 1.5 MB are read. A line of 200 MB in a small file does not fill the memory."""
    records = [{**PAIR, "chosen": f" {number}" + "é " * 500_000} for number in range(4)]
    data = write(tmp_path / "long.jsonl.gz", records)
    path = tmp_path / "endless.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(json.dumps(PAIR).encode() + b'\n{"prompt": "')
        for _ in range(200):
            file.write(b"a" * 10**6)

    tracemalloc.start()
    assert read_records(data, "train") == records
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 10 * 1.5e6 * len(records)
    tracemalloc.reset_peak()
    message = error_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names_line(message, str(path), 2)
    assert peak < 150e6


# --------------------------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize("before", ["", "\n \n\n", "\ufeff", "\ufeff\n", " "])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, before, indent):
    text = before + json.dumps([PAIR, MESSAGES], indent=indent) + "\n"
    data = write_bytes(tmp_path / "records.json", text.encode())
    assert read_records(data, "train") == [PAIR, MESSAGES]


def test_json_array_that_would_fill_the_memory(tmp_path, monkeypatch):
    """A compressed file of it may be small."""
    monkeypatch.setattr(records_module, "MAX_ARRAY_BYTES", 1000)
    path = tmp_path / "r.json.gz"
    with gzip.open(path, "wt") as file:
        file.write("[\n" + " " * 2000 + "]")
    assert "exceeds 1000 bytes" in error_of(path)


def test_empty_json_array(tmp_path):
    assert read_records(write(tmp_path / "records.json", [" [ ] "]), "train") == []


def test_json_array_in_a_long_line(tmp_path, monkeypatch):
    """It may be longer than a line of JSON Lines, and end within a character."""
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 64)
    for length in (100, 101):
        record = {**PAIR, "chosen": "é" * length, "rejected": "a"}
        text = json.dumps([record, record], ensure_ascii=False)
        data = write_bytes(tmp_path / "records.json", text.encode())
        assert read_records(data, "train") == [record, record]


GOOD = json.dumps(PAIR)


@pytest.mark.parametrize(
    "text, said",
    [
        (f"[{GOOD},]", "in the array that begins in line 1"),
        (f"[{GOOD}", "Expecting ',' or ']'"),
        (f"[{GOOD[:-5]}", "in the array"),
        (f"[{GOOD} {GOOD}]", "Expecting ',' or ']'"),
        (f"[{GOOD}] {GOOD}", "nothing after the array"),
        (f"[{GOOD}]\n[{GOOD}]", "nothing after the array"),
        (f"\n\n[\n{GOOD},\n{GOOD[:-1]},\n{GOOD}]", "in the array that begins in line 3"),
        (f"[[{GOOD}]]", "record 1: is not a JSON object"),
        (f"[{GOOD}, null]", "record 2: is not a JSON object"),
        (f"[{GOOD}, {{}}]", "record 2: has the columns none"),
        ("[", ""),
        ("[,]", ""),
        (f"[{DEEP}]", ""),
        ('[{"prompt": "Q:", "completion": "a", "completion": "b"}]', "twice"),
        (f'{{"data": [{GOOD}]}}', "has the columns data"),
        (json.dumps(PAIR, indent=2), "line 1"),
        (f"{GOOD}\n[{GOOD}]", "line 2: is not a JSON object"),
    ],
)
def test_bad_json_array_is_named(tmp_path, text, said):
    data = write_bytes(tmp_path / "records.json", text.encode())
    message = error_of(data)
    assert data in message
    assert said in message


def test_bytes_in_a_json_array_are_named(tmp_path):
    data = write_bytes(tmp_path / "records.json", b"[" + GOOD.encode() + b', "\xff"]')
    assert data in error_of(data)


# ---------------------------------------------------------------------------------------- CSV


def test_csv(tmp_path):
    """Quotes, commas and line ends in cells. "None", "007" and nothing stay what they are."""
    text = (
        'prompt,completion,label\n"a ""b"", c","x\ny",True\n\n007,None,0\nNA,,bad\n2020-01-01,3,1'
    )
    expected = [
        {"prompt": 'a "b", c', "completion": "x\ny", "label": True},
        {"prompt": "007", "completion": "None", "label": False},
        {"prompt": "NA", "completion": "", "label": False},
        {"prompt": "2020-01-01", "completion": "3", "label": True},
    ]
    assert read_records(write_bytes(tmp_path / "a.csv", text.encode()), "train") == expected
    assert read_records(write_bytes(tmp_path / "a.csv.gz", text.encode()), "train") == expected
    windows = codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode()
    expected[0]["completion"] = "x\r\ny"
    assert read_records(write_bytes(tmp_path / "a.csv", windows), "train") == expected


@pytest.mark.parametrize(
    "text, number, said",
    [
        ("prompt,completion\na,b\na\n", 3, "has 1 cells, the header has 2"),
        ('prompt,completion\n"a\n\na",b\na,b,c\n', 5, "has 3 cells"),
        ('prompt,completion\na,"b\n', 2, "end"),
        ('prompt,completion\na,"b"c\n', 2, ""),
        ('prompt,completion,label\na,"b\nc",maybe\n', 2, "label"),
        ("prompt,completion,label\na,b,\n", 2, "label"),
        ("prompt;completion\na;b\n", 2, "has the columns prompt;completion"),
    ],
)
def test_bad_csv_is_named(tmp_path, text, number, said):
    data = write_bytes(tmp_path / "records.csv", text.encode())
    message = error_of(data)
    assert names_line(message, data, number)
    assert said in message


def test_header_with_a_name_twice(tmp_path):
    data = write_bytes(tmp_path / "records.csv", b"prompt,prompt,completion\na,b,c\n")
    assert "twice" in error_of(data)


def test_csv_of_messages(tmp_path):
    """Messages in a cell are text. test_tokens tries those in other columns."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["messages"])
    writer.writerow([json.dumps(MESSAGES["messages"])])
    data = write_bytes(tmp_path / "records.csv", file.getvalue().encode())
    message = error_of(data)
    assert names_line(message, data, 2)
    assert "JSON Lines or parquet" in message


# ------------------------------------------------------------------------------ parquet and Arrow


def labelled(names: list[str], codes: list[int | None]) -> datasets.Dataset:
    """Unpaired records whose labels have names, as the datasets library keeps them."""
    features = {
        "prompt": datasets.Value("string"),
        "completion": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
    }
    columns = {"prompt": ["Q:"] * len(codes), "completion": [" yes"] * len(codes), "label": codes}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved_in_each_way(dataset: datasets.Dataset, folder: Path) -> list[str]:
    """A data set as parquet, as an Arrow file and in a folder."""
    dataset.to_parquet(folder / "records.parquet")
    dataset.save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    return [str(folder / "records.parquet"), str(arrow), str(folder / "saved")]


def test_parquet_of_all_formats(tmp_path):
    """Arrow gives every message the fields that any message has. Those that are null are left out.

    The same holds for columns.
    """
    call = {"type": "function", "function": {"name": "search", "arguments": '{"what": "pots"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "none", "name": "search"},
        HELLO,
    ]
    records = [
        PAIR,
        UNPAIRED,
        SUPERVISED,
        {"messages": messages, "tools": [SEARCH]},
        {**MESSAGES, "chat_template_kwargs": {"thinking": True}},
    ]
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list([record, record]).to_parquet(path)
        assert read_records(str(path), "train") == [record, record]
    del records[1]  # its label would be null in the others
    columns = set().union(*records)
    rows = [{**dict.fromkeys(columns), **record} for record in records]
    for data in saved_in_each_way(datasets.Dataset.from_list(rows), tmp_path):
        assert read_records(data, "train") == records


def test_names_of_labels(tmp_path):
    """Alphabetical codes make 0 of "desirable"."""
    expected = [{**UNPAIRED, "label": True}, {**UNPAIRED, "label": False}]
    for data in saved_in_each_way(labelled(["desirable", "undesirable"], [0, 1]), tmp_path):
        assert read_records(data, "train") == expected


@pytest.mark.parametrize(
    "names, codes, said",
    [
        (["negative", "positive"], [1, 0], "'positive'"),
        (["bad", "good"], [1, -1], "label is null"),  # -1 stands for no label
        (["bad", "good"], [1, None], "label is null"),
    ],
)
def test_names_of_labels_that_are_refused(tmp_path, names, codes, said):
    for data in saved_in_each_way(labelled(names, codes), tmp_path):
        message = error_of(data)
        assert said in message
        assert "record" in message


def test_file_of_pyarrow(tmp_path):
    """Without the notes that the datasets library adds; with text in types of other programs."""
    text = pa.array(["Q:", "Q:"], pa.large_string())
    label = pa.array(["good", "bad"]).dictionary_encode()
    table = pa.table({"prompt": text, "completion": text, "label": label})
    pyarrow.parquet.write_table(table, tmp_path / "records.parquet")
    record = {"prompt": "Q:", "completion": "Q:", "label": True}
    assert read_records(str(tmp_path / "records.parquet"), "train") == [
        record,
        {**record, "label": False},
    ]


def test_cache_of_the_library_is_not_used(tmp_path, monkeypatch):
    """It may be in a folder that cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "data" / "train.parquet")
    for data in (tmp_path / "data", tmp_path / "data" / "train.parquet"):
        assert read_records(str(data), "train") == [PAIR]


def test_damaged_parquet_is_named(tmp_path):
    datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "good.parquet")
    content = (tmp_path / "good.parquet").read_bytes()
    middle = content[:60] + b"\xff" * 20 + content[80:]
    for damaged in (b"", content[:-50], content[50:], middle, b"PAR1"):
        data = write_bytes(tmp_path / "records.parquet", damaged)
        assert data in error_of(data)
    (tmp_path / "records.parquet.gz").write_bytes(gzip.compress(content))
    assert "records.parquet.gz" in error_of(tmp_path / "records.parquet.gz")


def test_damaged_folder_is_named(tmp_path):
    datasets.Dataset.from_list([PAIR]).save_to_disk(tmp_path / "good")
    for number, kept in enumerate([0, 300]):
        folder = tmp_path / f"damaged_{number}"
        shutil.copytree(tmp_path / "good", folder)
        (file,) = folder.glob("*.arrow")
        file.write_bytes(file.read_bytes()[:kept])
        assert str(folder) in error_of(folder)
        file.unlink()
        assert str(folder) in error_of(folder)


def test_bytes_that_are_no_text_are_named(tmp_path):
    """Arrow files may hold them in columns of text."""
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": text, "completion": ["a"]})
    for data in saved_in_each_way(datasets.Dataset(table), tmp_path):
        assert data in error_of(data)


# ------------------------------------------------------------------- missing and damaged files


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.csv", "nothing.parquet", "nothing"])
def test_missing_file_is_named(tmp_path, name):
    assert str(tmp_path / name) in error_of(tmp_path / name)


def test_folder_without_train_is_named(tmp_path):
    write(tmp_path / "test.jsonl", [PAIR])
    message = error_of(tmp_path)
    assert "has the splits test" in message
    assert f"{tmp_path}::test" in message
    assert read_records(f"{tmp_path}::test", "train") == [PAIR]


def test_folder_without_data_is_named(tmp_path):
    assert str(tmp_path) in error_of(tmp_path)
    (tmp_path / "notes.pdf").write_text("Pairs.")
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize("name", ["records.txt", "records.tsv", "records", "records.jsonl.zst"])
def test_other_file_names_those_that_are_read(tmp_path, name):
    (tmp_path / name).write_text("Q: yes\n")
    message = error_of(tmp_path / name)
    assert str(tmp_path / name) in message
    assert ".jsonl, .json, .csv, .parquet, .arrow" in message


def write_compressed(tmp_path: Path) -> Path:
    """A compressed file of several kilobytes."""
    path = tmp_path / "records.jsonl.gz"
    write(path, [{**PAIR, "chosen": f" {number} {number**7}"} for number in range(300)])
    return path


@pytest.mark.parametrize("kept", [-1, -4, -8, -9, "half", 20, 9, 2, 1])
def test_truncated_gz_is_named(tmp_path, kept):
    path = write_compressed(tmp_path)
    content = path.read_bytes()
    if kept == "half":
        kept = len(content) // 2
    path.write_bytes(content[:kept])
    assert str(path) in error_of(path)


@pytest.mark.parametrize("damage", [b"\x00", b"\xff" * 40], ids=["checksum", "stream"])
def test_damaged_gz_is_named(tmp_path, damage):
    path = write_compressed(tmp_path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + damage + content[middle + len(damage) :])
    assert str(path) in error_of(path)


def test_wrong_suffix_is_named(tmp_path):
    plain = tmp_path / "records.jsonl.gz"
    plain.write_text(json.dumps(PAIR))
    compressed = tmp_path / "records.jsonl"
    compressed.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert str(plain) in error_of(plain)
    assert str(compressed) in error_of(compressed)


# ----------------------------------------------------------------------------------- any bytes

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
COLUMN_NAMES = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "target",
        "messages",
        "tools",
        "system",
        "Prompt",
        "",
    ]
)
TEXTS = st.text(max_size=6)
SOME_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": TEXTS}),
    max_size=3,
)


def records_like(record: dict) -> st.SearchStrategy[dict]:
    """Records with the columns of this one, and perhaps others."""
    columns = {}
    for column in record:
        if column == "label":
            columns[column] = st.booleans() | st.sampled_from(["bad", "1.0", "x", None])
        elif column == "messages":
            columns[column] = SOME_MESSAGES
        else:
            columns[column] = TEXTS | TEXTS | SOME_MESSAGES
    others = {"target": TEXTS, "other": ANY_JSON, "messages": SOME_MESSAGES}
    for column in record:
        others.pop(column, None)
    return st.fixed_dictionaries(columns, optional=others)


def nested(depth: int) -> str:
    """A record with a column that no loss needs, of lists within lists."""
    return json.dumps(SUPERVISED)[:-1] + ', "other": ' + "[" * depth + "]" * depth + "}"


GOOD_RECORDS = st.sampled_from([PAIR, UNPAIRED, SUPERVISED, MESSAGES]).flatmap(records_like)
SURROGATES = st.text(st.characters(categories=["Cs", "Ll"]), max_size=3)
REPEATED_COLUMNS = st.sampled_from(
    [
        '{"prompt": "Q:", "chosen": "a", "rejected": "b", "chosen": "c"}',
        '{"prompt": "Q:", "completion": "a", "label": true, "label": false}',
        '{"prompt": "Q:", "completion": "a", "other": {"x": 1, "x": 1}}',
    ]
)
LINES = st.one_of(
    GOOD_RECORDS.map(json.dumps),
    GOOD_RECORDS.map(json.dumps),
    GOOD_RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False)),
    st.dictionaries(COLUMN_NAMES, ANY_JSON | SURROGATES, max_size=6).map(json.dumps),
    ANY_JSON.map(json.dumps),
    st.text(max_size=10).filter(lambda text: text.strip() and not {*text} & {*"\r\n\ufeff"}),
    st.sampled_from(["", " ", "{", "{}", "nul", '{"prompt"', "[", "]"]),
    REPEATED_COLUMNS,
    st.sampled_from([1, 20, 400, 3000, 50_000]).map(nested),  # Python reads up to about 900
)
BYTES = st.lists(st.sampled_from(b'\x00 "\\,:{}[]a0\n\x80\xc3\xff'), max_size=3).map(bytes)


def refuse_repeated_columns(columns: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in columns]
    if len(set(names)) < len(names):
        raise ValueError
    return dict(columns)


def parse(text: str) -> object:
    """A JSON value. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=refuse_repeated_columns)
    except RecursionError:
        raise ValueError from None


def should_hold(text: str) -> list[dict]:
    """The records that a file should hold. Raises ValueError if it is malformed."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    if lines and lines[0].strip().startswith("["):
        values = parse("\n".join(lines).strip())
        if not isinstance(values, list):
            raise ValueError
    else:
        values = [parse(line.strip()) for line in lines if line.strip()]
    return [should_read(value) for value in values]


def should_read(record: object) -> dict:
    """The record that a value holds: the contract, spelled out. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError
    given = {column for column, value in record.items() if value is not None}
    dialogues = 0
    for column in ("chosen", "rejected"):
        value = record.get(column)
        if isinstance(value, list) or (isinstance(value, str) and "\n\nAssistant:" in value):
            dialogues += 1
    if given >= {"chosen", "rejected"} and ("prompt" in given or dialogues == 2):
        columns = ["prompt", "chosen", "rejected", "target"]
    elif given >= {"prompt", "completion"} and not given >= {"chosen", "rejected"}:
        columns = ["prompt", "completion", "label"]
    elif isinstance(record.get("completion"), list) and not given >= {"chosen", "rejected"}:
        columns = ["completion", "label"]
    elif "messages" in given and not given >= {"chosen", "rejected"} and "completion" not in given:
        columns = ["messages", "label"]
    else:
        raise ValueError
    if "label" in columns and "label" in record and "label" not in given:
        raise ValueError
    if record.get("system"):
        raise ValueError
    kept = {}
    for column in columns:
        if column in given:
            kept[column] = should_convert(column, record[column])
    if record.get("tools"):
        raise ValueError  # no list or string that is made up here holds tools
    return kept


def should_convert(column: str, value: object) -> object:
    """The value of a column. Raises ValueError."""
    if column == "label":
        if isinstance(value, str):
            value = value.strip().lower()
        if value in ("true", "1", "1.0", "yes", "good", "chosen", "desirable"):
            value = True
        if value in ("false", "0", "0.0", "no", "bad", "rejected", "undesirable"):
            value = False
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError
        return value == 1
    if isinstance(value, str) and column != "messages":
        return value
    if not isinstance(value, list) or not value:
        raise ValueError
    for message in value:
        if not isinstance(message, dict) or not message.get("role"):
            raise ValueError
    return value


LONG = bool(os.environ.get("HALOS_LONG"))


@settings(
    max_examples=2000 if LONG else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(LINES, max_size=4),
    separator=st.sampled_from(["\n", "\n", "\r\n", "array"]),
    overwritten=st.tuples(st.integers(0, 200), BYTES) | st.none(),
    name=st.sampled_from(["records.jsonl", "records.jsonl.gz", "records.json"]),
    missing=st.integers(0, 60) | st.just(0),
)
def test_any_file_gives_records_or_one_line(tmp_path, lines, separator, overwritten, name, missing):
    content = separator.join(lines).encode()
    if separator == "array":
        content = f"[{', '.join(lines)}]".encode()
    if overwritten is not None:
        place, damage = overwritten
        content = content[:place] + damage + content[place + len(damage) :]
    expected = None
    try:
        expected = should_hold(content.decode("utf-8-sig"))
    except ValueError:  # also bytes that are no text
        pass

    path = tmp_path / name
    written = content
    if name.endswith(".gz"):  # the last bytes of a compressed file may be missing
        written = gzip.compress(content)
        written = written[: max(0, len(written) - missing)]
        if missing:
            expected = None if written else []
    path.write_bytes(written)
    if expected is None:
        assert str(path) in error_of(path)
    else:
        assert read_records(str(path), "train") == expected


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(
    max_examples=2000 if LONG else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS | st.sampled_from(["None", "007", "nan"])), max_size=3),
    end=st.sampled_from(["\n", "\r\n"]),
    overwritten=st.tuples(st.integers(0, 80), BYTES) | st.none(),
)
def test_any_csv_gives_records_or_one_line(tmp_path, rows, end, overwritten):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "completion"])
    writer.writerows(rows)
    content = file.getvalue().encode()
    path = tmp_path / "records.csv"
    path.write_bytes(content)
    expected = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    assert read_records(str(path), "train") == expected
    if overwritten is not None:
        place, damage = overwritten
        path.write_bytes(content[:place] + damage + content[place + len(damage) :])
        try:
            for record in read_records(str(path), "train"):
                assert record.keys() == {"prompt", "completion"}
        except UserError as error:
            assert str(path) in str(error)
