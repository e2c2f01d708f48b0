"""Data files to records, and records to token ids: archangel/records.py.

HALOS_LONG=1 python -m pytest tests/test_records.py makes up 2,000 files instead of 200.
"""

import codecs
import functools
import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import golden_cases
import numpy as np
import pytest
from helpers import TOY, word_tokenizer, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from archangel.errors import UserError
from archangel.records import (
    MAX_TEST_RECORDS,
    TokenizedRecord,
    cut_to_length,
    find_file,
    load_records,
    read_split,
    split_completion,
    tokenize,
)

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
UNPAIRED = {"prompt": "Q:", "completion": " yes", "label": True}
SUPERVISED = {"prompt": "Q:", "completion": " yes"}
RECORDS = {"preference": PAIR, "unpaired": UNPAIRED, "supervised": SUPERVISED}
ALL_FORMATS = list(RECORDS)


def write(path: Path, lines: list, end: str = "\n") -> str:
    """Write records, or lines of text, as JSONL; compressed if the name ends in .gz."""
    content = ""
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(line, ensure_ascii=False)
        content += line + end
    content = content.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return str(path)


def error_of(data: str | Path, formats: list[str] = ALL_FORMATS) -> str:
    """The one line of the UserError that read_split raises."""
    with pytest.raises(UserError) as caught:
        read_split(str(data), "train", formats)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def names_line(message: str, data: str, number: int) -> bool:
    """Whether a message names this line of this file."""
    return re.search(rf"{re.escape(data)}, \w+ {number}:", message) is not None


# ---------------------------------------------------------------------------- files and splits


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
@pytest.mark.parametrize("format_name", ALL_FORMATS)
def test_read_split_formats(tmp_path, format_name, name):
    record = RECORDS[format_name]
    records = [record, {**record, "prompt": ""}, {**record, "prompt": " \n"}]
    assert read_split(write(tmp_path / name, records), "train", [format_name]) == records


def test_read_split_takes_the_first_format(tmp_path):
    """A record has the columns of the first format that it can have, and no others."""
    both = {**PAIR, **UNPAIRED, "label": False, "source": 3, "target": " maybe"}
    data = write(tmp_path / "records.jsonl", [both, {**SUPERVISED, "source": None}])
    assert read_split(data, "train", ["preference", "supervised"]) == [
        {**PAIR, "target": " maybe"},
        SUPERVISED,
    ]
    assert read_split(data, "train", ["unpaired", "supervised"]) == [
        {**UNPAIRED, "label": False, "target": " maybe"},
        SUPERVISED,
    ]
    assert read_split(data, "train", ["supervised"]) == [
        {**SUPERVISED, "target": " maybe"},
        SUPERVISED,
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_read_split_of_a_folder(tmp_path, suffix):
    held_out = {**PAIR, "prompt": "held out"}
    write(tmp_path / f"train{suffix}", [PAIR, PAIR])
    assert read_split(str(tmp_path), "test", ["preference"]) == []
    write(tmp_path / f"test{suffix}", [held_out])
    assert read_split(str(tmp_path), "train", ["preference"]) == [PAIR, PAIR]
    assert read_split(str(tmp_path), "test", ["preference"]) == [held_out]


def test_read_split_of_a_file(tmp_path, monkeypatch):
    """All of a file is for training, whatever its name."""
    data = write(tmp_path / "test.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for path in (data, "test.jsonl", "./test.jsonl"):
        assert read_split(path, "train", ["preference"]) == [PAIR]
        assert read_split(path, "test", ["preference"]) == []


def test_find_file(tmp_path):
    train = tmp_path / "train.jsonl"
    compressed = tmp_path / "train.jsonl.gz"
    assert find_file(str(tmp_path), "test") is None
    assert find_file(str(tmp_path), "train") == train  # which read_split then finds missing
    write(compressed, [PAIR])
    assert find_file(str(tmp_path), "train") == compressed
    write(train, [PAIR])
    assert find_file(str(tmp_path), "train") == train
    assert find_file(str(train), "train") == train
    assert find_file(str(train), "test") is None


def test_load_records_draws_the_held_out_ones(tmp_path):
    """In a sorted file, every batch of the held-out records has both labels."""
    records = []
    for number in range(800):
        records.append({"prompt": f"{number}", "completion": "a", "label": number < 400})
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", records)
    train_records, test_records = load_records(str(tmp_path), ["unpaired"])
    assert train_records == records
    assert len(test_records) == MAX_TEST_RECORDS == 512
    assert len({record["prompt"] for record in test_records}) == 512
    for start in range(0, 512, 32):
        assert {record["label"] for record in test_records[start : start + 32]} == {True, False}


def test_load_records_draws_the_same_ones(tmp_path):
    records = [{**PAIR, "prompt": f"{number}"} for number in range(40)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", records)
    _, first = load_records(str(tmp_path), ["preference"])
    np.random.seed(5)
    _, second = load_records(str(tmp_path), ["preference"])
    assert first == second != records
    assert sorted(record["prompt"] for record in first) == sorted(map(str, range(40)))


def test_load_records_without_a_test_split(tmp_path):
    data = write(tmp_path / "train.jsonl", [PAIR])
    assert load_records(data, ["preference"]) == ([PAIR], [])
    assert load_records(str(tmp_path), ["preference"]) == ([PAIR], [])


def test_toy_has_both_splits():
    train_records = read_split("toy", "train", ["preference"])
    test_records = read_split("toy", "test", ["preference"])
    assert len(train_records) > len(test_records) > 0
    for record in train_records + test_records:
        assert record.keys() >= {"prompt", "chosen", "rejected"}
    train_prompts = {record["prompt"] for record in train_records}
    assert train_prompts.isdisjoint(record["prompt"] for record in test_records)


def test_archangel_is_prepared_on_first_use(tmp_path, monkeypatch):
    from archangel import data

    write(tmp_path / "train.jsonl", [PAIR])
    monkeypatch.setattr(data, "prepare", lambda: tmp_path)
    assert read_split("archangel", "train", ["preference"]) == [PAIR]
    assert read_split("archangel", "test", ["preference"]) == []


def test_read_split_skips_blank_lines(tmp_path):
    """A byte order mark and Windows line ends are no part of a record."""
    path = tmp_path / "records.jsonl"
    text = f"{json.dumps(PAIR)}\r\n\r\n  \n{json.dumps(SUPERVISED)}"
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_split(str(path), "train", ALL_FORMATS) == [PAIR, SUPERVISED]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_unicode_arrives_as_written(tmp_path, name, escaped):
    text = 'naïve 東京 🦉 e\u0301 \u2028 \x85 \u00a0 \ufeff \x00 \r\n \t \\ " \U0010ffff'
    record = {"prompt": text, "completion": text}
    data = write(tmp_path / name, [json.dumps(record, ensure_ascii=escaped)])
    assert read_split(data, "train", ["supervised"]) == [record]


# ------------------------------------------------------------------- missing and malformed files


def test_missing_file_is_named(tmp_path):
    assert str(tmp_path / "nothing.jsonl") in error_of(tmp_path / "nothing.jsonl")


def test_folder_without_train_is_named(tmp_path):
    write(tmp_path / "test.jsonl", [PAIR])
    assert str(tmp_path / "train.jsonl") in error_of(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_empty_file_is_named(tmp_path, content):
    data = write(tmp_path / "records.jsonl", [content], end="")
    assert data in error_of(data)


def test_other_file_names_the_converter(tmp_path):
    table = tmp_path / "records.csv"
    table.write_text("prompt,completion\na,b\n")
    assert "python -m archangel.data" in error_of(table)


DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "completion": "c"}'


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "Q:", ', ""),
        ("prompt: Q", ""),
        ("{'prompt': 'Q'}", ""),
        (DEEP, ""),
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
        ({**SUPERVISED, "completion": ""}, "completion"),
        ({**SUPERVISED, "completion": " \n\t"}, "completion"),
        ({**PAIR, "chosen": ""}, "chosen"),
        ({**PAIR, "rejected": " "}, "rejected"),
        ({**PAIR, "target": ""}, "target"),
        ({**PAIR, "target": None}, "target"),
        ({**UNPAIRED, "label": 2}, "label"),
        ({**UNPAIRED, "label": 0.5}, "label"),
        ({**UNPAIRED, "label": "fine"}, "label"),
        ({**UNPAIRED, "label": None}, "label"),
        ({**UNPAIRED, "label": [1]}, "label"),
        ({**PAIR, "system": "Be brief."}, "beginning of the prompt"),
        ({**PAIR, "tools": [{"name": "search"}]}, "tools"),
        ({**SUPERVISED, "images": ["a.png"]}, "only text"),
        ({**SUPERVISED, "prompt": None}, "prompt"),
        ({**SUPERVISED, "prompt": 3}, "prompt"),
        ({**SUPERVISED, "prompt": ["Q:"]}, "prompt"),
        ({**SUPERVISED, "completion": {"text": "a\nb"}}, "completion"),
        ({**PAIR, "chosen": True}, "chosen"),
        ('{"prompt": "\\ud800", "completion": "c"}', ""),
        ('{"prompt": "Q:", "completion": "c \\udc80"}', ""),
    ],
)
def test_bad_record_is_named(tmp_path, line, said):
    data = write(tmp_path / "records.jsonl", [PAIR, "", UNPAIRED, line, PAIR])
    message = error_of(data)
    assert names_line(message, data, 4)
    assert said in message
    assert len(message) < 500


def test_labels(tmp_path):
    """As data sets spell them. A column that has nothing in it is not lost."""
    labels = {
        True: [True, 1, 1.0, "true", "True", "1", "1.0", " yes", "good", "chosen", "desirable"],
        False: [False, 0, 0.0, "false", "FALSE", "0", "no", "bad", "rejected", "undesirable"],
    }
    for label, spellings in labels.items():
        records = [{**UNPAIRED, "label": spelling, "system": ""} for spelling in spellings]
        data = write(tmp_path / "records.jsonl", records)
        found = read_split(data, "train", ["unpaired"])
        assert found == [{**UNPAIRED, "label": label}] * len(spellings)
        assert all(type(record["label"]) is bool for record in found)


def test_record_of_another_format_is_named(tmp_path):
    data = write(tmp_path / "records.jsonl", [PAIR, UNPAIRED, SUPERVISED])
    message = error_of(data, ["preference", "unpaired"])
    assert names_line(message, data, 3)
    assert "{prompt, chosen, rejected}" in message
    assert "{prompt, completion, label}" in message
    assert names_line(error_of(data, ["preference"]), data, 2)


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
    assert read_split(data, "train", ["preference"]) == records
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 10 * 1.5e6 * len(records)
    tracemalloc.reset_peak()
    message = error_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names_line(message, str(path), 2)
    assert peak < 150e6


# ----------------------------------------------------------------------------------- any bytes

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
COLUMN_NAMES = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "label", "target", "Prompt", ""]
)


def records_like(record: dict) -> st.SearchStrategy[dict]:
    """Records with the columns of this one, and perhaps others; some texts are empty."""
    columns = {}
    for column in record:
        columns[column] = st.booleans() if column == "label" else st.text(max_size=6)
    others = {"target": st.text(max_size=6), "other": ANY_JSON}
    return st.fixed_dictionaries(columns, optional=others)


def nested(depth: int) -> str:
    """A record with a column that no loss needs, of lists within lists."""
    return json.dumps(SUPERVISED)[:-1] + ', "other": ' + "[" * depth + "]" * depth + "}"


GOOD_RECORDS = records_like(PAIR) | records_like(UNPAIRED) | records_like(SUPERVISED)
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
    st.sampled_from(["", " ", "{", "{}", "nul", '{"prompt"']),
    REPEATED_COLUMNS,
    st.sampled_from([1, 20, 400, 3000, 50_000]).map(nested),  # Python reads up to about 900
)
BYTES = st.lists(st.sampled_from(b'\x00 "\\,:{}[]a0\n\x80\xc3\xff'), max_size=3).map(bytes)
SOME_FORMATS = st.tuples(st.permutations(ALL_FORMATS), st.integers(1, 3)).map(
    lambda drawn: drawn[0][: drawn[1]]
)


def refuse_repeated_columns(columns: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in columns]
    if len(set(names)) < len(names):
        raise ValueError
    return dict(columns)


def should_read(line: str, formats: list[str]) -> dict | None:
    """The record that a line holds, or None if the line is malformed: the contract, spelled out."""
    try:
        record = json.loads(line, object_pairs_hook=refuse_repeated_columns)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    fitting = [name for name in formats if set(RECORDS[name]) <= set(record)]
    if not fitting:
        return None
    kept = {}
    for column, value in record.items():
        if column == "target" or column in RECORDS[fitting[0]]:
            kept[column] = value
    for column, value in kept.items():
        if column == "label":
            if isinstance(value, str):
                value = value.strip().lower()
            if value in ("true", "1", "1.0", "yes", "good", "chosen", "desirable"):
                value = True
            if value in ("false", "0", "0.0", "no", "bad", "rejected", "undesirable"):
                value = False
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                return None
            kept["label"] = value == 1
        elif type(value) is not str:
            return None
        elif any("\ud800" <= character <= "\udfff" for character in value):
            return None
        elif column != "prompt" and value.strip() == "":
            return None
    return kept


@settings(
    max_examples=2000 if os.environ.get("HALOS_LONG") else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(LINES, max_size=4),
    line_end=st.sampled_from(["\n", "\n", "\r\n"]),
    overwritten=st.tuples(st.integers(0, 200), BYTES) | st.none(),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
    missing=st.integers(0, 60) | st.just(0),
    formats=SOME_FORMATS,
)
def test_any_file_gives_records_or_one_line(
    tmp_path, lines, line_end, overwritten, suffix, missing, formats
):
    content = line_end.join(lines).encode()
    if overwritten is not None:
        place, damage = overwritten
        content = content[:place] + damage + content[place + len(damage) :]
    try:
        whole_lines = content.decode("utf-8-sig").split("\n")
        expected = [should_read(line, formats) for line in whole_lines if line.strip()]
    except UnicodeDecodeError:
        expected = []

    path = tmp_path / f"records{suffix}"
    written = content
    if suffix == ".jsonl.gz":  # the last bytes of a compressed file may be missing
        written = gzip.compress(content)
        written = written[: max(0, len(written) - missing)]
    else:
        missing = 0
    path.write_bytes(written)
    if expected and None not in expected and missing == 0:
        assert read_split(str(path), "train", formats) == expected
    else:
        assert str(path) in error_of(path, formats)


# -------------------------------------------------------------------------- records to token ids


@functools.cache
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "model")


def limits(
    max_length: int = 12, max_prompt_length: int = 4, truncate_prompt: str = "start"
) -> SimpleNamespace:
    """The settings that tokenize reads."""
    return SimpleNamespace(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncate_prompt=truncate_prompt,
    )


def as_lists(record: TokenizedRecord) -> tuple[list[int], list[list[int]]]:
    """The prompt's and the completions' ids."""
    for ids in [record.prompt_ids, *record.completions_ids]:
        assert isinstance(ids, np.ndarray)
        assert ids.ndim == 1
        assert ids.dtype == np.int32
    return record.prompt_ids.tolist(), [ids.tolist() for ids in record.completions_ids]


def tokenize_one(
    prompt: list[int], completions: list[list[int]], config, add_bos: bool = False
) -> TokenizedRecord:
    """The record whose texts encode as these ids."""
    text = (words(*prompt), [words(*ids) for ids in completions])
    (record,) = tokenize([text], word_tokenizer(add_bos), config)
    return record


def test_tokenize_the_toy():
    tokenizer = toy_tokenizer()
    record = read_split("toy", "train", ["preference"])[0]
    completions = [record["chosen"], record["rejected"]]
    (tokenized,) = tokenize([(record["prompt"], completions)], tokenizer, limits(500, 250))
    prompt_ids, completions_ids = as_lists(tokenized)
    assert prompt_ids == tokenizer(record["prompt"])["input_ids"]
    for completion, ids in zip(completions, completions_ids):
        assert ids == tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        assert tokenizer.decode(prompt_ids + ids[:-1]) == record["prompt"] + completion


@functools.cache
def space_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text.

    metaspace: as SentencePiece does, in a pre-tokenizer. prepend: as Llama 2's, in a normalizer.
    """
    texts = []
    for record in [*golden_cases.toy_records(200), *hh_records()]:
        texts += [record["prompt"], record["chosen"], record["rejected"]]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=sorted(set("".join(texts)) | set("▁\n#+:")),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def hh_records() -> list[dict]:
    """50 records of Anthropic HH."""
    return [json.loads(line) for line in (golden_cases.FOLDER / "hh.jsonl").open()]


def assert_exact(tokenizer, texts: list[tuple[str, list[str]]]) -> None:
    """Prompt ids are the tokenizer's own; prompt and completion ids decode to the text."""
    for (prompt, completions), tokenized in zip(texts, tokenize(texts, tokenizer, limits(9999, 9))):
        prompt_ids, completions_ids = as_lists(tokenized)
        assert prompt_ids == tokenizer(prompt)["input_ids"]
        for completion, ids in zip(completions, completions_ids):
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(prompt_ids + ids[:-1]) == prompt + completion


TOKENIZERS = ["bytes", "metaspace", "prepend"]


def tokenizer_of(kind: str):
    return toy_tokenizer() if kind == "bytes" else space_tokenizer(kind)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenize_decodes_to_the_text(kind):
    """Also where a token would span the border, and where the completion begins without a space."""
    tokenizer = tokenizer_of(kind)
    texts = [
        ("### Answer\n", ["The tin bowl is grey."]),
        ("return ", ["x + 1"]),
        ("the co", ["lour"]),
        ("the tin bo", ["wl is grey", "w", " wl"]),
        ("The tin bowl", [" is grey.", "\nis grey.", "  is grey."]),
    ]
    for record in hh_records():
        texts.append((record["prompt"], [record["chosen"], record["rejected"]]))
    assert_exact(tokenizer, texts)


TEXTS = st.text(st.sampled_from("theco lurwn\n.:?H"), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(prompt=TEXTS.filter(lambda text: text[0] != " "), completion=TEXTS)
def test_tokenize_decodes_to_any_text(kind, prompt, completion):
    """Metaspace drops a space at the beginning of a text, so none is there."""
    assert_exact(tokenizer_of(kind), [(prompt, [completion])])


def test_spanning_token_is_not_used():
    """The prompt's ids do not depend on the completion."""
    tokenizer = toy_tokenizer()
    (tokenized,) = tokenize([("the co", ["lour"])], tokenizer, limits(100, 50))
    prompt_ids, (completion_ids,) = as_lists(tokenized)
    assert prompt_ids + completion_ids[:-1] != tokenizer("the colour")["input_ids"]


def test_text_of_a_special_token_is_that_token(capsys):
    """As people who write a template by themselves expect it. One line says how many there are."""
    tokenizer = toy_tokenizer()
    eos = tokenizer.eos_token_id
    with_eos = f"a{tokenizer.eos_token}b"
    texts = [(with_eos, [with_eos, "b"]), ("a", ["b"])]
    first, second = tokenize(texts, tokenizer, limits(200, 100))
    (a, b) = tokenizer("ab")["input_ids"]
    assert as_lists(first) == ([a, eos, b], [[a, eos, b, eos], [b, eos]])
    assert as_lists(second) == ([a], [[b, eos]])
    assert "1 of 2 records hold the text of a special token" in capsys.readouterr().err
    tokenize(texts[1:], tokenizer, limits(200, 100))
    assert capsys.readouterr().err == ""


def test_special_tokens_come_once():
    """What the text has at its beginning or end is not added again."""
    tokenizer = word_tokenizer(add_bos=True)
    texts = [("<s> " + words(20), [" " + words(40) + " </s>", " " + words(40)])]
    (tokenized,) = tokenize(texts, tokenizer, limits())
    assert as_lists(tokenized) == ([0, 20], [[40, 1], [40, 1]])


def test_border_that_cannot_be_resolved():
    """A tokenizer for which every token depends on all of the text."""

    def encode_whole(texts, add_special_tokens=False, verbose=False):
        return {"input_ids": [[100 + len(text)] * 2 for text in texts]}

    with pytest.raises(UserError, match="completion 'a b': cannot be encoded apart"):
        split_completion(encode_whole, [103, 103], [106, 106], "a b")


def test_tokenize_keeps_the_order():
    texts = []
    expected = []
    for number in range(2500):  # more than one chunk
        prompt_id = 10 + number % 90
        completion_id = 11 + number % 80
        num_completions = 1 + number % 3
        texts.append((words(prompt_id), [words(completion_id)] * num_completions))
        expected.append(([prompt_id], [[completion_id, 1]] * num_completions))
    tokenized = tokenize(texts, word_tokenizer(), limits())
    assert [as_lists(record) for record in tokenized] == expected
    assert tokenize([], word_tokenizer(), limits()) == []


def test_padding_token_that_is_the_eos_token():
    for pad_token in ("</s>", "<pad>"):
        tokenizer = word_tokenizer(pad_token=pad_token)
        (record,) = tokenize([(words(20), [words(40, 41), words(50)])], tokenizer, limits())
        assert as_lists(record) == ([20], [[40, 41, 1], [50, 1]])


def test_bos_comes_once_and_stays():
    record = tokenize_one([20, 21], [[40]], limits(), add_bos=True)
    assert as_lists(record) == ([0, 20, 21], [[40, 1]])
    prompt = list(range(20, 30))
    completion = list(range(40, 47))
    long_completion = list(range(40, 70))
    for truncate_prompt, kept in (("start", [27, 28, 29]), ("end", [20, 21, 22])):
        # Bos counts: 1 + 3 tokens of the prompt and 8 of the completion make 12.
        config = limits(12, 2, truncate_prompt)
        record = tokenize_one(prompt, [completion], config, add_bos=True)
        assert as_lists(record) == ([0, *kept], [[*completion, 1]])
        config = limits(12, 1, truncate_prompt)
        record = tokenize_one(prompt, [long_completion], config, add_bos=True)
        assert as_lists(record) == ([0], [long_completion[:11]])


def test_bos_that_the_tokenizer_does_not_add():
    assert word_tokenizer().bos_token_id == 0
    assert as_lists(tokenize_one([20, 21], [[40]], limits())) == ([20, 21], [[40, 1]])


def test_empty_prompt():
    """Bos or eos stands in its place, to predict the first completion token from."""
    long_completion = list(range(40, 60))
    for add_bos, stand_in in ((False, 1), (True, 0)):
        record = tokenize_one([], [[40]], limits(), add_bos)
        assert as_lists(record) == ([stand_in], [[40, 1]])
        assert not record.was_cut
        record = tokenize_one([], [long_completion], limits(12, 4), add_bos)
        assert as_lists(record) == ([stand_in], [long_completion[:11]])
        assert record.was_cut


def test_no_completion_becomes_empty():
    prompt = list(range(20, 40))
    record = tokenize_one(prompt, [[40, 41], [50, 51, 52]], limits(2, 1))
    assert as_lists(record) == ([39], [[40], [50]])
    record = tokenize_one(prompt, [[40]], limits(2, 1), add_bos=True)
    assert as_lists(record) == ([0], [[40]])
    assert as_lists(tokenize_one([], [[40]], limits(2, 1))) == ([1], [[40]])
    (record,) = tokenize([(words(20), [" "])], word_tokenizer(), limits())
    assert as_lists(record) == ([20], [[1]])  # a text without a token


# -------------------------------------------------------------------------------------- cutting


def cut(
    prompt: list[int], completions: list[list[int]], config, bos_ids: list[int] | None = None
) -> TokenizedRecord:
    """cut_to_length of completions that do not have their end-of-sequence token, 1, yet."""
    return cut_to_length(prompt, [[*ids, 1] for ids in completions], bos_ids or [], [1], config)


def test_cut_keeps_what_fits():
    """Even if the prompt is above its own limit."""
    prompt = list(range(20, 30))
    record = cut(prompt, [[40]], limits(12, 4))
    assert as_lists(record) == (prompt, [[40, 1]])
    assert not record.was_cut


@pytest.mark.parametrize(
    "truncate_prompt, kept", [("start", [22, 23, 24, 25]), ("end", [20, 21, 22, 23])]
)
def test_cut_prompt_first(truncate_prompt, kept):
    """By as few tokens as needed: of 6 + 8 tokens, 12 may stay."""
    completion = list(range(40, 47))
    record = cut(list(range(20, 26)), [completion], limits(12, 3, truncate_prompt))
    assert as_lists(record) == (kept, [[*completion, 1]])
    assert record.was_cut


@pytest.mark.parametrize("truncate_prompt, kept", [("start", [25, 26]), ("end", [20, 21])])
def test_cut_prompt_to_its_limit_then_completion(truncate_prompt, kept):
    record = cut(list(range(20, 27)), [list(range(40, 60))], limits(8, 2, truncate_prompt))
    assert as_lists(record) == (kept, [list(range(40, 46))])
    assert record.was_cut


def test_cut_leaves_a_prompt_below_its_limit():
    record = cut([20, 21], [list(range(40, 60))], limits(8, 4))
    assert as_lists(record) == ([20, 21], [list(range(40, 46))])
    assert record.was_cut


def test_cut_drops_the_eos_token():
    """4 + 4 of 8 tokens fit. One token more leaves no room for the end."""
    prompt = [20, 21, 22, 23]
    record = cut(prompt, [[40, 41, 42]], limits(8, 4))
    assert as_lists(record) == (prompt, [[40, 41, 42, 1]])
    assert not record.was_cut
    record = cut(prompt, [[40, 41, 42, 43]], limits(8, 4))
    assert as_lists(record) == (prompt, [[40, 41, 42, 43]])
    assert record.was_cut


def test_cut_for_the_longest_completion():
    """Both completions have the same prompt, in either order."""
    prompt = list(range(20, 26))
    long = list(range(40, 47))
    record = cut(prompt, [long, [50]], limits(12, 3))
    assert as_lists(record) == ([22, 23, 24, 25], [[*long, 1], [50, 1]])
    record = cut(prompt, [[50], long], limits(12, 3))
    assert as_lists(record) == ([22, 23, 24, 25], [[50, 1], [*long, 1]])
    too_long = list(range(40, 60))
    record = cut(prompt, [[50], too_long], limits(12, 3))
    assert as_lists(record) == ([23, 24, 25], [[50, 1], too_long[:9]])
    assert record.was_cut


LENGTHS = st.integers(0, 24)


@st.composite
def some_limits(draw) -> SimpleNamespace:
    max_length = draw(st.integers(2, 30))
    max_prompt_length = draw(st.integers(1, max_length - 1))
    return limits(max_length, max_prompt_length, draw(st.sampled_from(["start", "end"])))


@settings(max_examples=300)
@given(
    prompt_length=LENGTHS,
    lengths=st.lists(LENGTHS.filter(bool), min_size=1, max_size=3),
    config=some_limits(),
    add_bos=st.booleans(),
)
def test_cut_at_any_length(prompt_length, lengths, config, add_bos):
    prompt = list(range(10, 10 + prompt_length))
    completions = []
    for number, length in enumerate(lengths):
        start = 40 + 20 * number
        completions.append(list(range(start, start + length)))
    record = tokenize_one(prompt, completions, config, add_bos)
    prompt_ids, completions_ids = as_lists(record)

    prefix = []  # what stands before the prompt's own tokens
    if add_bos:
        prefix = [0]
    elif not prompt:
        prefix = [1]  # stands in for an empty prompt
    whole_length = len(prefix) + len(prompt)
    longest = max(lengths) + 1
    # The prompt is whole if all fits, else as long as there is room, but not below its limit.
    room = max(config.max_prompt_length, config.max_length - longest)
    assert len(prompt_ids) == min(whole_length, room) >= 1
    num_kept = len(prompt_ids) - len(prefix)
    kept = prompt[:num_kept]
    if config.truncate_prompt == "start":
        kept = prompt[len(prompt) - num_kept :]
    assert prompt_ids == prefix + kept

    assert len(completions_ids) == len(completions)
    for ids, completion in zip(completions_ids, completions):
        assert ids == [*completion, 1][: config.max_length - len(prompt_ids)]
        assert len(ids) >= 1
    assert record.was_cut == (whole_length + longest > config.max_length)
