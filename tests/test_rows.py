"""Rows, tokens and the order of examples: what is read, what is cut, who comes when.

HALOS_LONG=1 python -m pytest tests/test_rows.py makes up 2,000 files instead of 200.
"""

import codecs
import functools
import gzip
import json
import os
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import common
from common import UserError, endless, plan, read_data, read_rows, tokenise

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
UNPAIRED = {"prompt": "Q:", "completion": " yes", "label": True}
SUPERVISED = {"prompt": "Q:", "completion": " yes"}
ALL_FORMS = ("preference", "unpaired", "supervised")


def write(path, rows, end: str = "\n"):
    """Rows (objects, or raw text) as a JSONL file; compressed where the name ends in .gz."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def error_of(data, forms=ALL_FORMS, split: str = "train") -> str:
    """The one line that `read_rows` raises UserError with."""
    with pytest.raises(UserError) as caught:
        read_rows(str(data), split, forms)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "form, row", [("preference", PAIR), ("unpaired", UNPAIRED), ("supervised", SUPERVISED)]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_reads_each_form_from_each_kind_of_file(tmp_path, form, row, name):
    rows = [row, {**row, "prompt": ""}, {**row, "prompt": " \n"}]
    assert read_rows(write(tmp_path / name, rows), "train", [form]) == rows


def test_a_row_has_the_fields_of_the_first_form_that_it_holds_and_no_others(tmp_path):
    both = {**PAIR, **UNPAIRED, "label": False, "source": 3, "target": " maybe"}
    data = write(tmp_path / "rows.jsonl", [both, {**SUPERVISED, "source": None}])
    assert read_rows(data, "train", ["preference", "supervised"]) == [
        {**PAIR, "target": " maybe"},
        SUPERVISED,
    ]
    assert read_rows(data, "train", ["unpaired", "supervised"]) == [
        {**UNPAIRED, "label": False, "target": " maybe"},
        SUPERVISED,
    ]
    assert read_rows(data, "train", ["supervised"])[0] == {**SUPERVISED, "target": " maybe"}


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_a_folder_holds_train_and_test(tmp_path, end):
    write(tmp_path / f"train{end}", [PAIR, PAIR])
    assert read_rows(str(tmp_path), "test", ["preference"]) == []
    write(tmp_path / f"test{end}", [{**PAIR, "prompt": "held out"}])
    assert read_rows(str(tmp_path), "train", ["preference"]) == [PAIR, PAIR]
    assert read_rows(str(tmp_path), "test", ["preference"]) == [{**PAIR, "prompt": "held out"}]


def test_held_out_rows_are_drawn_so_that_a_sorted_file_is_mixed(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "a", "label": i < 400} for i in range(800)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    train, held_out = read_data(str(tmp_path), ["unpaired"])
    assert train == rows and len(held_out) == 512
    assert len({row["prompt"] for row in held_out}) == 512
    for first in range(0, 512, 32):
        assert {row["label"] for row in held_out[first : first + 32]} == {True, False}
    assert read_data(str(tmp_path), ["unpaired"])[1] == held_out
    assert read_data(str(tmp_path / "train.jsonl"), ["unpaired"]) == (rows, [])


def test_a_file_of_another_kind_is_told_where_to_go(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\na,b\n")
    assert "archangel.data rows" in error_of(table)


def test_a_file_is_all_for_training(tmp_path, monkeypatch):
    data = write(tmp_path / "test.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for given_as in (data, "test.jsonl", "./test.jsonl"):
        assert read_rows(given_as, "train", ["preference"]) == [PAIR]
        assert read_rows(given_as, "test", ["preference"]) == []


def test_the_toy_has_both_splits():
    train, test = (read_rows("toy", split, ["preference"]) for split in ("train", "test"))
    assert len(train) > len(test) > 0
    assert all({"prompt", "chosen", "rejected"} <= row.keys() for row in train + test)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_archangel_is_prepared_when_asked_for(tmp_path, monkeypatch):
    from archangel import data

    write(tmp_path / "train.jsonl", [PAIR])
    monkeypatch.setattr(data, "prepare", lambda: tmp_path)
    assert read_rows("archangel", "train", ["preference"]) == [PAIR]
    assert read_rows("archangel", "test", ["preference"]) == []


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        codecs.BOM_UTF8 + f"{json.dumps(PAIR)}\r\n\r\n  \n{json.dumps(SUPERVISED)}".encode()
    )
    assert read_rows(str(path), "train", ALL_FORMS) == [PAIR, SUPERVISED]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_unicode_arrives_as_written(tmp_path, name):
    text = 'naïve 東京 🦉 e\u0301 \u2028 \x85 \u00a0 \ufeff \x00 \r\n \t \\ " \U0010ffff'
    row = {"prompt": text, "completion": text}
    for escaped in (True, False):
        data = write(tmp_path / name, [json.dumps(row, ensure_ascii=escaped)])
        assert read_rows(data, "train", ["supervised"]) == [row]


# ------------------------------------------------------------------------------ what is refused


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "nothing.jsonl") in error_of(tmp_path / "nothing.jsonl")


def test_a_folder_without_train_is_named(tmp_path):
    write(tmp_path / "test.jsonl", [PAIR])
    assert str(tmp_path / "train.jsonl") in error_of(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_rows_is_named(tmp_path, content):
    data = write(tmp_path / "rows.jsonl", [content], end="")
    message = error_of(data)
    assert data in message and "no rows" in message


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
        ({**UNPAIRED, "label": 0}, "label"),
        ({**UNPAIRED, "label": 1}, "label"),
        ({**UNPAIRED, "label": 1.0}, "label"),
        ({**UNPAIRED, "label": "true"}, "label"),
        ({**UNPAIRED, "label": None}, "label"),
        ({**SUPERVISED, "prompt": None}, "prompt"),
        ({**SUPERVISED, "prompt": 3}, "prompt"),
        ({**SUPERVISED, "prompt": ["Q:"]}, "prompt"),
        ({**SUPERVISED, "completion": {"text": "a\nb"}}, "completion"),
        ({**PAIR, "chosen": True}, "chosen"),
        ('{"prompt": "\\ud800", "completion": "c"}', ""),
        ('{"prompt": "Q:", "completion": "c \\udc80"}', ""),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, said):
    data = write(tmp_path / "rows.jsonl", [PAIR, "", UNPAIRED, line, PAIR])
    message = error_of(data)
    assert data in message and "row 4" in message and said in message
    assert len(message) < 500


def test_a_row_that_this_loss_cannot_use_says_what_it_needs(tmp_path):
    data = write(tmp_path / "rows.jsonl", [PAIR, UNPAIRED, SUPERVISED])
    message = error_of(data, ["preference", "unpaired"])
    assert "row 3" in message and "{prompt, chosen, rejected}" in message
    assert "{prompt, completion, label}" in message
    assert "row 2" in error_of(data, ["preference"])


def many_rows(tmp_path):
    rows = [{**PAIR, "chosen": f" {number} {number**7}"} for number in range(300)]
    return tmp_path / "rows.jsonl.gz", write(tmp_path / "rows.jsonl.gz", rows)


@pytest.mark.parametrize("kept", [-1, -4, -8, -9, 0.5, 20, 9, 2, 1])
def test_a_compressed_file_cut_short_is_named(tmp_path, kept):
    path, data = many_rows(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    assert data in error_of(data)


@pytest.mark.parametrize("damage", [b"\x00", b"\xff" * 40], ids=["check sum", "stream"])
def test_a_damaged_compressed_file_is_named(tmp_path, damage):
    path, data = many_rows(tmp_path)
    content, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:middle] + damage + content[middle + len(damage) :])
    assert data in error_of(data)


def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path):
    plain, packed = tmp_path / "rows.jsonl.gz", tmp_path / "rows.jsonl"
    plain.write_text(json.dumps(PAIR))
    packed.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert str(plain) in error_of(plain)
    assert str(packed) in error_of(packed)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf_8_is_named(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({**PAIR, "chosen": "café"}, ensure_ascii=False)
    path.write_bytes(f"{json.dumps(PAIR)}\n".encode() + line.encode(encoding))
    message = error_of(path)
    assert str(path) in message and "row 2" in message


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELD = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "label", "target", "Prompt", ""]
)
ROWS = st.one_of(
    *(
        st.fixed_dictionaries(
            {field: st.booleans() if field == "label" else st.text(max_size=6) for field in row},
            optional={"target": st.text(max_size=6), "other": ANY_JSON},
        )
        for row in (PAIR, UNPAIRED, SUPERVISED)
    )
)
TWICE = st.sampled_from(  # JSON readers differ in which of the two they take
    [
        '{"prompt": "Q:", "chosen": "a", "rejected": "b", "chosen": "c"}',
        '{"prompt": "Q:", "completion": "a", "label": true, "label": false}',
        '{"prompt": "Q:", "completion": "a", "other": {"x": 1, "x": 1}}',
    ]
)
NESTED = st.sampled_from(
    [1, 20, 400, 3000, 50_000]
).map(  # Python reads up to some 900
    lambda depth: json.dumps(SUPERVISED)[:-1] + ', "other": ' + "[" * depth + "]" * depth + "}"
)
SURROGATES = st.text(st.characters(categories=["Cs", "Ll"]), max_size=3)
LINES = st.one_of(
    ROWS.map(json.dumps),
    ROWS.map(json.dumps),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False)),
    st.dictionaries(FIELD, ANY_JSON | SURROGATES, max_size=6).map(json.dumps),
    ANY_JSON.map(json.dumps),
    st.text(max_size=10).filter(lambda text: text.strip() and not {*text} & {*"\r\n\ufeff"}),
    st.sampled_from(["", " ", "{", "{}", "nul", '{"prompt"']),
    TWICE,
    NESTED,
)
BYTES = st.lists(st.sampled_from(b'\x00 "\\,:{}[]a0\n\x80\xc3\xff'), max_size=3).map(bytes)
TORN = st.tuples(st.integers(0, 200), BYTES) | st.none()


def should_read(line: str, forms) -> dict | None:
    """The row that a line says, or None where it says none: the contract, spelled out."""

    def once(pairs):
        assert len({name for name, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once)
    except (ValueError, AssertionError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    for form in forms:
        fields = {"preference": PAIR, "unpaired": UNPAIRED, "supervised": SUPERVISED}[form]
        if all(field in row for field in fields):
            break
    else:
        return None
    kept = {field: row[field] for field in row if field in fields or field == "target"}
    for field, value in kept.items():
        if field == "label":
            if value is not True and value is not False:
                return None
        elif type(value) is not str or any("\ud800" <= c <= "\udfff" for c in value):
            return None
        elif field != "prompt" and value.strip() == "":
            return None
    return kept


@settings(
    max_examples=2000 if os.environ.get("HALOS_LONG") else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(LINES, max_size=4),
    st.sampled_from(["\n", "\n", "\r\n"]),
    TORN,
    st.sampled_from([".jsonl", ".jsonl.gz"]),
    st.integers(0, 60) | st.just(0),
    st.permutations(ALL_FORMS).flatmap(
        lambda forms: st.integers(1, 3).map(lambda count: forms[:count])
    ),
)
def test_any_file_gives_its_rows_or_a_user_error(tmp_path, lines, line_end, torn, end, cut, forms):
    content = line_end.join(lines).encode()
    if torn:  # a few bytes written over the file, as they come
        content = content[: torn[0]] + torn[1] + content[torn[0] + len(torn[1]) :]
    path = tmp_path / f"rows{end}"
    written = gzip.compress(content) if end.endswith("gz") else content
    cut = cut if end.endswith("gz") else 0  # of a compressed file the last bytes may be missing
    path.write_bytes(written[: len(written) - cut] if cut < len(written) else b"")
    try:
        lines = [line for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        expected = [should_read(line, forms) for line in lines]
    except UnicodeDecodeError:
        expected = []
    if expected and None not in expected and not cut:
        assert read_rows(str(path), "train", forms) == expected
    else:
        assert str(path) in error_of(path, forms)


def test_long_rows_are_read_and_endless_ones_do_not_fill_the_memory(tmp_path):
    rows = [{**PAIR, "chosen": f" {number}" + "é " * 500_000} for number in range(4)]  # 1.5 MB each
    data = write(tmp_path / "long.jsonl.gz", rows)
    tracemalloc.start()
    assert read_rows(data, "train", ["preference"]) == rows
    most = tracemalloc.get_traced_memory()[1]
    assert most < 10 * 1.5e6 * len(rows)

    path = tmp_path / "endless.jsonl.gz"  # 200 kB that unpack to one row of 200 MB
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(json.dumps(PAIR).encode() + b'\n{"prompt": "')
        for _ in range(200):
            file.write(b"a" * 10**6)
    tracemalloc.reset_peak()
    message = error_of(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "row 2: is longer than" in message and most < 150e6


# --------------------------------------------------------------------------- rows to token ids


@functools.cache
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(common.TOY / "model")


@functools.cache
def words(bos: bool = False, pad: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer of words: "w7" is 17. `</s>` is 1; with bos it begins every text with `<s>`, 0.

    Its end-of-sequence token doubles as padding, as in the models of the report.
    """
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3}
    vocabulary |= {f"w{number}": 10 + number for number in range(100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
    )


def text(*ids: int) -> str:
    """The text of these ids (of 10 and above) in `words`."""
    return " ".join(f"w{i - 10}" for i in ids)


def limits(max_length=12, max_prompt_length=4, truncate_prompt="start") -> SimpleNamespace:
    return SimpleNamespace(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncate_prompt=truncate_prompt,
    )


def ids_of(texts, tokenizer, config) -> list[tuple[list[int], list[list[int]]]]:
    """What `tokenise` gives, as lists of numbers."""
    examples = tokenise(texts, tokenizer, config)
    for example in examples:
        assert example.keys() == {"prompt_ids", "completions_ids"}
        for ids in (example["prompt_ids"], *example["completions_ids"]):
            assert isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind == "i"
    return [
        (example["prompt_ids"].tolist(), [ids.tolist() for ids in example["completions_ids"]])
        for example in examples
    ]


def one(prompt, completions, config, bos: bool = False):
    """(prompt ids, [completion ids]) of texts given as ids, by `words`."""
    row = (text(*prompt), [text(*ids) for ids in completions])
    return ids_of([row], words(bos), config)[0]


def test_the_toys_tokens_are_the_tokenizers_own_joined():
    tokenizer = toy_tokenizer()
    row = read_rows("toy", "train", ["preference"])[0]
    completions = [row["chosen"], row["rejected"]]
    ((prompt, ids),) = ids_of([(row["prompt"], completions)], tokenizer, limits(500, 250))
    assert prompt == tokenizer(row["prompt"])["input_ids"]
    for completion, completion_ids in zip(completions, ids):
        assert completion_ids == tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        assert tokenizer.decode(prompt + completion_ids[:-1]) == row["prompt"] + completion


def test_no_token_straddles_the_border():
    tokenizer = toy_tokenizer()
    whole = tokenizer("the colour")["input_ids"]
    prompt, completion = "the co", "lour"
    ((prompt_ids, (completion_ids,)),) = ids_of(
        [(prompt, [completion])], tokenizer, limits(100, 50)
    )
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(completion_ids[:-1]) == completion
    assert prompt_ids + completion_ids[:-1] != whole


def test_the_text_of_a_special_token_stays_text():
    tokenizer = toy_tokenizer()
    said = f"a{tokenizer.eos_token}b"
    ((prompt, (completion,)),) = ids_of([(said, [said])], tokenizer, limits(200, 100))
    eos = tokenizer.eos_token_id
    assert eos not in prompt and tokenizer.decode(prompt) == said
    assert completion.count(eos) == 1 and completion[-1] == eos
    assert tokenizer.decode(completion[:-1]) == said


def test_rows_keep_their_order_whatever_their_number():
    rows = [(text(10 + i % 90), [text(11 + i % 80)] * (1 + i % 3)) for i in range(2500)]
    found = ids_of(rows, words(), limits())
    assert found == [([10 + i % 90], [[11 + i % 80, 1]] * (1 + i % 3)) for i in range(2500)]
    assert tokenise([], words(), limits()) == []


def test_what_fits_is_whole_though_the_prompt_is_over_its_own_limit():
    prompt, completion = [*range(20, 30)], [40]
    assert one(prompt, [completion], limits(12, 4)) == (prompt, [[40, 1]])


@pytest.mark.parametrize("side, kept", [("start", [22, 23, 24, 25]), ("end", [20, 21, 22, 23])])
def test_a_prompt_is_cut_first_by_as_few_tokens_as_needed(side, kept):
    prompt, completion = [*range(20, 26)], [*range(40, 47)]  # 6 and 8, of 12
    assert one(prompt, [completion], limits(12, 3, side)) == (kept, [[*completion, 1]])


@pytest.mark.parametrize("side, kept", [("start", [25, 26]), ("end", [20, 21])])
def test_a_prompt_is_cut_to_its_limit_then_the_completion_is_cut(side, kept):
    prompt, completion = [*range(20, 27)], [*range(40, 60)]
    assert one(prompt, [completion], limits(8, 2, side)) == (kept, [[*range(40, 46)]])


def test_a_prompt_below_its_limit_is_left_when_the_completion_is_cut():
    assert one([20, 21], [[*range(40, 60)]], limits(8, 4)) == ([20, 21], [[*range(40, 46)]])


def test_a_whole_completion_ends_once_and_a_cut_one_does_not():
    # At the limit to a token: 4 + 4 of 8 fits; one token more leaves no room for the end.
    prompt = [20, 21, 22, 23]
    assert one(prompt, [[40, 41, 42]], limits(8, 4)) == (prompt, [[40, 41, 42, 1]])
    assert one(prompt, [[40, 41, 42, 43]], limits(8, 4)) == (prompt, [[40, 41, 42, 43]])


def test_the_completions_of_a_row_share_a_prompt_cut_for_the_longest():
    prompt, long, short = [*range(20, 26)], [*range(40, 47)], [50]
    kept = [22, 23, 24, 25]
    assert one(prompt, [long, short], limits(12, 3)) == (kept, [[*long, 1], [50, 1]])
    assert one(prompt, [short, long], limits(12, 3)) == (kept, [[50, 1], [*long, 1]])
    over = [*range(40, 60)]
    assert one(prompt, [over, short], limits(12, 3)) == ([23, 24, 25], [over[:9], [50, 1]])


def test_padding_that_is_the_end_of_sequence_token_takes_none_away():
    row = [(text(20), [text(40, 41), text(50)])]
    for pad in ("</s>", "<pad>"):
        ((prompt, completions),) = ids_of(row, words(pad=pad), limits())
        assert prompt == [20] and completions == [[40, 41, 1], [50, 1]]


def test_a_beginning_of_sequence_token_comes_once_and_stays():
    assert one([20, 21], [[40]], limits(), bos=True) == ([0, 20, 21], [[40, 1]])
    prompt, completion = [*range(20, 30)], [*range(40, 47)]
    # It counts: 4 + 8 of 12, of which 3 are the prompt's own.
    for side, kept in (("start", [27, 28, 29]), ("end", [20, 21, 22])):
        found = one(prompt, [completion], limits(12, 2, side), bos=True)
        assert found == ([0, *kept], [[*completion, 1]])
        found = one(prompt, [[*range(40, 70)]], limits(12, 1, side), bos=True)
        assert found == ([0], [[*range(40, 51)]])


def test_a_tokenizer_that_has_a_beginning_but_does_not_add_it_is_left_alone():
    assert one([20, 21], [[40]], limits(), bos=False) == ([20, 21], [[40, 1]])


def test_an_empty_prompt_still_has_something_to_predict_from():
    assert one([], [[40]], limits()) == ([1], [[40, 1]])
    assert one([], [[40]], limits(), bos=True) == ([0], [[40, 1]])
    over = [*range(40, 60)]
    assert one([], [over], limits(12, 4)) == ([1], [over[:11]])
    assert one([], [over], limits(12, 4), bos=True) == ([0], [over[:11]])


def test_a_completion_never_becomes_empty():
    prompt = [*range(20, 40)]
    assert one(prompt, [[40, 41], [50, 51, 52]], limits(2, 1)) == ([39], [[40], [50]])
    assert one(prompt, [[40]], limits(2, 1), bos=True) == ([0], [[40]])
    assert one([], [[40]], limits(2, 1)) == ([1], [[40]])
    ((_, completions),) = ids_of([(text(20), [" "])], words(), limits())  # no token of its own
    assert completions == [[1]]


LENGTHS = st.integers(0, 24)


@settings(max_examples=300, deadline=None)
@given(
    LENGTHS,
    st.lists(LENGTHS.filter(bool), min_size=1, max_size=3),
    st.integers(2, 30).flatmap(lambda most: st.tuples(st.just(most), st.integers(1, most - 1))),
    st.sampled_from(["start", "end"]),
    st.booleans(),
)
def test_cutting_at_any_lengths_and_limits(length, lengths, most, side, bos):
    max_length, max_prompt_length = most
    prompt = [*range(10, 10 + length)]
    whole = [[*range(40 + 20 * k, 40 + 20 * k + n)] for k, n in enumerate(lengths)]
    config = limits(max_length, max_prompt_length, side)
    found_prompt, found = one(prompt, whole, config, bos)
    stands_first = [0] if bos else [] if prompt else [1]  # bos, or the stand-in of an empty prompt
    full = stands_first + prompt
    longest = max(lengths) + 1
    # The prompt: whole where all fits, else just short enough, but never shorter than its limit.
    keep = min(len(full), max(max_prompt_length, max_length - longest))
    assert len(found_prompt) == keep >= 1
    own = found_prompt[len(stands_first) :]
    assert found_prompt == stands_first + own
    assert own == (prompt[len(prompt) - len(own) :] if side == "start" else prompt[: len(own)])
    assert len(found) == len(whole)
    for ids, original in zip(found, whole):
        assert 1 <= len(ids) <= max_length - len(found_prompt)
        assert ids == [*original, 1][: max_length - len(found_prompt)]
    if len(full) + longest <= max_length:
        assert found_prompt == full and found == [[*ids, 1] for ids in whole]


# ------------------------------------------------------------- which examples, in what pieces


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(0, 5), st.data())
def test_endless_passes_are_permutations_and_slices_agree(n, seed, data):
    whole = endless(n, (seed,), 0, 4 * n)
    for number in range(4):
        assert sorted(whole[number * n : (number + 1) * n]) == list(range(n))
    start = data.draw(st.integers(0, 4 * n))
    stop = data.draw(st.integers(start, 4 * n))
    assert endless(n, (seed,), start, stop) == whole[start:stop]
    assert all(type(item) is int for item in whole)


def test_endless_passes_differ_and_depend_on_all_of_the_seed():
    n = 50
    whole = endless(n, (1, 0), 0, 4 * n)
    passes = {tuple(whole[k * n : (k + 1) * n]) for k in range(4)}
    passes |= {tuple(endless(n, seed, 0, n)) for seed in ((2, 0), (1, 1), (0, 1), (1,))}
    assert len(passes) >= 7  # numpy takes (1,) and (1, 0) for one seed
    assert tuple(range(n)) not in passes
    assert endless(n, (1, 0), 0, 4 * n) == whole
    # An order depends on nothing that other code draws.
    np.random.seed(5)
    assert endless(n, (1, 0), 7 * n, 8 * n) == endless(n, (1, 0), 6 * n, 9 * n)[n : 2 * n]


def of_lengths(*rows: tuple) -> list[dict]:
    """Examples of (prompt, completion, ...) tokens."""
    return [
        {"prompt_ids": np.ones(prompt), "completions_ids": [np.ones(n) for n in completions]}
        for prompt, *completions in rows
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4), max_size=40),
    st.integers(1, 200),
    st.integers(1, 5),
    st.booleans(),
)
def test_plan_deals_every_example_once_within_the_limit(lengths, limit, processes, packed):
    examples = of_lengths(*lengths)

    def tokens(piece):
        return common.make_batch([examples[i] for i in piece], packed=packed).input_ids.numel()

    shares = plan(examples, limit, processes, packed)
    assert len(shares) == processes
    assert len({len(pieces) for pieces in shares}) == 1, "not the same number on every process"
    dealt = Counter(i for pieces in shares for piece in pieces for i in piece)
    assert dealt == Counter(range(len(examples)))
    for pieces in shares:
        assert all(len(piece) <= 1 or tokens(piece) <= limit for piece in pieces)
        # No more pieces than needed: what begins one would not have fitted into that before.
        full = [piece for piece in pieces if piece]
        for a, b in zip(full, full[1:]):
            assert tokens([*a, b[0]]) > limit, (a, b)
    # Work is balanced: nobody has more than another by over one example.
    loads = [sum(tokens([i]) for piece in pieces for i in piece) for pieces in shares]
    assert max(loads) - min(loads) <= max((tokens([i]) for i in range(len(examples))), default=0)


def test_plan_by_hand():
    ten, seven, hundred = (7, 3), (3, 4), (90, 10)
    shares = plan(of_lengths(*[ten] * 8), 40, 2)
    assert [[len(piece) for piece in pieces] for pieces in shares] == [[4], [4]]
    shares = plan(of_lengths(*[ten] * 9), 40, 2)
    assert [[len(piece) for piece in pieces] for pieces in shares] == [[4, 1], [4, 0]]
    assert plan(of_lengths(seven, hundred, seven), 20, 1) == [[[1], [0, 2]]]
    nine_two_four = of_lengths((8, 1), (1, 1), (1, 3))
    assert plan(nine_two_four, 15, 1) == [[[0, 2, 1]]]
    assert plan(nine_two_four, 15, 1, packed=False) == [[[0], [2, 1]]]
    by_work = of_lengths((80, 10), (30, 10), (20, 10), (10, 10))
    assert plan(by_work, 200, 2) == [[[0]], [[1, 2, 3]]]
    # Apart, two rows of 10 and one of 19 are three of 19, 57 tokens.
    unlike = of_lengths((2, 8, 8), (10, 9))
    assert plan(unlike, 56, 1, packed=False) == [[[0], [1]]]
    assert plan(unlike, 57, 1, packed=False) == [[[0, 1]]]


def test_plan_gives_who_has_no_example_an_empty_piece():
    assert sorted(plan(of_lengths((4, 1)), 10, 3)) == [[[]], [[]], [[0]]]
    shares = plan(of_lengths(*[(4, 1)] * 3), 5, 2)
    assert sorted(map(len, shares[0] + shares[1])) == [0, 1, 1, 1]
