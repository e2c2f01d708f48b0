"""Data files to records, and records to token ids. A reader of a training step may skip this file.

A record is one line of a data file. It has the columns of one of these formats:

    preference    prompt, chosen, rejected      and optionally target, which SFT and SLiC imitate
    unpaired      prompt, completion, label     label is true (desirable) or false; also 1 or 0,
                                                or "desirable", "good", "yes" and their opposites
    supervised    prompt, completion
"""

import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from archangel.errors import UserError

TOY = Path(__file__).parent / "toy_world"  # a small model and data set, for trying things offline
COLUMNS = {
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "supervised": ("prompt", "completion"),
}
# How data sets spell labels. 1 also stands for true and 1.0, which are equal to it in Python.
LABELS = {1: True, 0: False}
LABELS |= dict.fromkeys(["true", "1", "1.0", "yes", "good", "chosen", "desirable"], True)
LABELS |= dict.fromkeys(["false", "0", "0.0", "no", "bad", "rejected", "undesirable"], False)
# Columns that change what a record means and that no loss reads, and what to do instead.
REFUSED_COLUMNS = {
    "system": "put its text at the beginning of the prompt",
    "tools": "put them into the prompt, as the model expects them there",
    "images": "only text can be learned from",
    "image": "only text can be learned from",
    "videos": "only text can be learned from",
    "audio": "only text can be learned from",
}
MAX_LINE_BYTES = 2**26  # a small compressed file may hold a line that would fill the memory
MAX_TEST_RECORDS = 512  # held-out records that are evaluated


def load_records(data: str, formats: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The training records, and at most MAX_TEST_RECORDS held-out records.

    The held-out records are drawn at random, with a fixed seed: in a sorted file the first ones,
    or a whole batch, may belong to one class.

    Args:
        data: `toy`, `archangel`, a folder with train.jsonl and test.jsonl (or .jsonl.gz), or one
            such file, all of which is for training.
        formats: the formats that the loss can learn from, the preferred one first.
    """
    train_records = read_split(data, "train", formats)
    test_records = read_split(data, "test", formats)
    order = np.random.default_rng((0, 0)).permutation(len(test_records))
    return train_records, [test_records[index] for index in order[:MAX_TEST_RECORDS]]


def read_split(data: str, split: str, formats: Sequence[str]) -> list[dict]:
    """The records of a split, each with the columns of the first of `formats` that it has.

    A data set without a test split gives no test records. Raises UserError, with file and line, for
    anything else that is missing or malformed.
    """
    path = find_file(data, split)
    if path is None:
        return []
    records = []
    where = f"--data {path}"
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
                text = line.decode("utf-8-sig").strip()
                if text:
                    record = json.loads(text, object_pairs_hook=_refuse_repeated_columns)
                    records.append(_check_record(record, formats))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        if path.exists() and not path.name.endswith((".jsonl", ".jsonl.gz")):
            reason += "; python -m archangel.data rows makes JSONL of other files"
        raise UserError(f"{where}: {reason}") from None
    if not records and split == "train":
        raise UserError(f"--data {path}: has no records")
    return records


def find_file(data: str, split: str) -> Path | None:
    """The file of a split. None if it is the test split and the data set has none."""
    if data == "archangel":
        from archangel.data import prepare  # the report's mixture, prepared on first use

        data = prepare()
    folder = TOY / "data" if data == "toy" else Path(data)
    if not folder.is_dir():
        return folder if split == "train" else None
    path = folder / f"{split}.jsonl"
    compressed = folder / f"{split}.jsonl.gz"
    if compressed.exists() and not path.exists():
        path = compressed
    if split == "test" and not path.exists():
        return None
    return path


def _refuse_repeated_columns(columns: list[tuple[str, object]]) -> dict:
    record = dict(columns)
    if len(record) < len(columns):  # JSON readers differ in which of the two they take
        raise ValueError("has a field twice")
    return record


def _check_record(record: object, formats: Sequence[str]) -> dict:
    """The record with the columns that are needed and no others. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    for name in formats:
        if record.keys() >= set(COLUMNS[name]):
            columns = COLUMNS[name]
            break
    else:
        needed = " or ".join("{" + ", ".join(COLUMNS[name]) + "}" for name in formats)
        raise ValueError(f"has {sorted(record)}; this loss needs {needed}")
    for column, advice in REFUSED_COLUMNS.items():
        if record.get(column):
            raise ValueError(f"has a column {column}, which would be lost; {advice}")
    checked = {}
    for column in (*columns, "target"):
        if column not in record:
            continue
        value = record[column]
        if column == "label":
            value = parse_label(value)
        elif not isinstance(value, str):
            raise ValueError(f"{column} must be text, not {value!r:.40}")
        elif column != "prompt" and not value.strip():
            raise ValueError(f"{column} is empty")
        checked[column] = value
    json.dumps(checked, ensure_ascii=False).encode()  # an unpaired surrogate raises ValueError
    return checked


def parse_label(value: object) -> bool:
    """A label as one of the LABELS. Raises ValueError."""
    if isinstance(value, str):
        value = value.strip().lower()
    if not isinstance(value, str | int | float) or value not in LABELS:
        raise ValueError(
            f"label must be true or false (or 1 or 0, desirable or undesirable), not {value!r:.40}"
        )
    return LABELS[value]


@dataclass
class TokenizedRecord:
    """The token ids of a record's prompt and completions."""

    prompt_ids: np.ndarray  # (P,) int32, at least one token
    completions_ids: list[np.ndarray]  # (C,) int32 each; if not cut, ends in end-of-sequence
    was_cut: bool  # some tokens were cut off, to keep within --max_length


def tokenize(texts: Sequence[tuple[str, list[str]]], tokenizer, config) -> list[TokenizedRecord]:
    """Prompts with their completions to token ids.

    A prompt's ids are what the tokenizer gives for it, with what it puts before every text, such as
    a beginning-of-sequence token. A completion's ids are the rest of what it gives for prompt and
    completion together, so that they decode to the text. The text of a special token, such as
    "</s>", is that special token. The end-of-sequence token ends every completion that is not cut.
    A record that is too long loses tokens of the prompt first, down to --max_prompt_length, then of
    the completions.
    """
    prefix_ids = find_prefix(tokenizer)
    eos_ids = [tokenizer.eos_token_id]
    special_text = special_token_pattern(tokenizer)
    num_with_special_text = 0
    tokenized = []
    chunk_size = 1000  # a fast tokenizer encodes many texts at once, in parallel
    for start in progress(range(0, len(texts), chunk_size), "tokenize"):
        chunk = texts[start : start + chunk_size]
        wholes = []  # of all records of the chunk: the prompt, then the prompt with each completion
        for prompt, completions in chunk:
            wholes.append(prompt)
            for completion in completions:
                wholes.append(prompt + completion)
            if special_text.search(" ".join([prompt, *completions])):
                num_with_special_text += 1
        encoded = iter(encode(tokenizer, wholes))
        for _, completions in chunk:
            prompt_ids = next(encoded)
            completions_ids = []
            for completion in completions:
                ids = split_completion(tokenizer, prompt_ids, next(encoded), completion)
                if ids[-1:] != eos_ids:
                    ids = ids + eos_ids
                completions_ids.append(ids)
            if prefix_ids and prompt_ids[: len(prefix_ids)] == prefix_ids:
                prompt_ids = prompt_ids[len(prefix_ids) :]  # the text itself begins with it
            tokenized.append(
                cut_to_length(prompt_ids, completions_ids, prefix_ids, eos_ids, config)
            )
    if num_with_special_text > 0 and os.environ.get("RANK", "0") == "0":
        tqdm.write(
            f"{num_with_special_text:,} of {len(texts):,} records hold the text of a special "
            "token, which becomes that token",
            file=sys.stderr,
        )
    return tokenized


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of texts, without what the tokenizer puts before and after them."""
    if not texts:
        return []
    # verbose: it would warn of texts that are longer than the model; these are cut later.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def find_prefix(tokenizer) -> list[int]:
    """The token ids that the tokenizer puts before every text."""
    ids = tokenizer("x")["input_ids"]
    first_id = encode(tokenizer, ["x"])[0][0]
    return ids[: ids.index(first_id)]


def special_token_pattern(tokenizer) -> re.Pattern:
    """Finds the texts of the tokenizer's special tokens."""
    texts = [re.escape(text) for text in tokenizer.all_special_tokens]
    return re.compile("|".join(texts))


def split_completion(
    tokenizer, prompt_ids: list[int], whole_ids: list[int], completion: str
) -> list[int]:
    """The ids of a completion, given those of its prompt, and of prompt and completion together."""
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    # A token spans the border. Then encode the completion after some other character. (Encoded by
    # itself, it would get a space in front of it from tokenizers such as Llama 2's.)
    for neighbor in "\na0":
        neighbor_ids, both_ids = encode(tokenizer, [neighbor, neighbor + completion])
        if both_ids[: len(neighbor_ids)] == neighbor_ids:
            return both_ids[len(neighbor_ids) :]
    raise UserError(f"completion {completion!r:.40}: cannot be encoded apart from its prompt")


def cut_to_length(
    prompt_ids: list[int],
    completions_ids: list[list[int]],
    prefix_ids: list[int],
    eos_ids: list[int],
    config,
) -> TokenizedRecord:
    """Cut a record to --max_length: the prompt first, then the completions."""
    longest_completion = max(len(ids) for ids in completions_ids)
    room = max(config.max_prompt_length, config.max_length - longest_completion) - len(prefix_ids)
    if config.truncate_prompt == "start":
        kept = prompt_ids[max(0, len(prompt_ids) - room) :]
    else:
        kept = prompt_ids[:room]
    was_cut = len(kept) < len(prompt_ids)
    kept = prefix_ids + kept
    if not kept:  # some token must come before a completion's first token, to predict it from
        kept = eos_ids
    room = config.max_length - len(kept)
    return TokenizedRecord(
        prompt_ids=np.array(kept, dtype=np.int32),
        completions_ids=[np.array(ids[:room], dtype=np.int32) for ids in completions_ids],
        was_cut=was_cut or longest_completion > room,
    )


def progress(iterable: Iterable, description: str) -> Iterable:
    """Show a progress bar, on process 0, if it takes more than two seconds."""
    return tqdm(iterable, description, delay=2, disable=os.environ.get("RANK", "0") != "0")
