"""Data files to records, and records to token ids. A reader of a training step may skip this file.

A record is one line of a data file. It has the columns of one of these formats:

    preference    prompt, chosen, rejected      and optionally target, which SFT and SLiC imitate
    unpaired      prompt, completion, label     label is true (desirable) or false
    supervised    prompt, completion
"""

import gzip
import json
import os
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
                where = f"{path}, row {number}"
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
        raise UserError(f"--data {path}: has no rows")
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
    checked = {}
    for column in (*columns, "target"):
        if column not in record:
            continue
        value = record[column]
        if column == "label":
            if not isinstance(value, bool):
                raise ValueError(f"label must be true or false, not {value!r:.40}")
        elif not isinstance(value, str):
            raise ValueError(f"{column} must be text, not {value!r:.40}")
        elif column != "prompt" and not value.strip():
            raise ValueError(f"{column} is empty")
        checked[column] = value
    json.dumps(checked, ensure_ascii=False).encode()  # an unpaired surrogate raises ValueError
    return checked


@dataclass
class TokenizedRecord:
    """The token ids of a record's prompt and completions."""

    prompt_ids: np.ndarray  # (P,) int32, at least one token
    completions_ids: list[np.ndarray]  # (C,) int32 each; if not cut, ends in end-of-sequence
    was_cut: bool  # some tokens were cut off, to keep within --max_length


def tokenize(texts: Sequence[tuple[str, list[str]]], tokenizer, config) -> list[TokenizedRecord]:
    """Prompts with their completions to token ids.

    Prompt and completions are encoded separately, so that no token straddles the border. The text
    of a special token, such as "</s>", stays text. The end-of-sequence token ends every completion
    that is not cut. A record that is too long loses tokens of the prompt first, down to
    --max_prompt_length, then of the completions.
    """

    def encode(batch: list[str]) -> list[list[int]]:
        if not batch:
            return []
        return tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    bos_ids = []
    if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:  # the tokenizer itself adds it
        bos_ids = [tokenizer.bos_token_id]
    eos_ids = [tokenizer.eos_token_id]

    tokenized = []
    chunk_size = 1000  # a fast tokenizer encodes many texts at once, in parallel
    for start in progress(range(0, len(texts), chunk_size), "tokenize"):
        chunk = texts[start : start + chunk_size]
        prompts = []
        completions = []  # of all records of the chunk
        for prompt, its_completions in chunk:
            prompts.append(prompt)
            completions.extend(its_completions)
        encoded_prompts = encode(prompts)
        encoded_completions = iter(encode(completions))
        for number, (_, its_completions) in enumerate(chunk):
            completions_ids = [next(encoded_completions) + eos_ids for _ in its_completions]
            tokenized.append(
                cut_to_length(encoded_prompts[number], completions_ids, bos_ids, eos_ids, config)
            )
    return tokenized


def cut_to_length(
    prompt_ids: list[int],
    completions_ids: list[list[int]],
    bos_ids: list[int],
    eos_ids: list[int],
    config,
) -> TokenizedRecord:
    """Cut a record to --max_length: the prompt first, then the completions."""
    longest_completion = max(len(ids) for ids in completions_ids)
    room = max(config.max_prompt_length, config.max_length - longest_completion) - len(bos_ids)
    if config.truncate_prompt == "start":
        kept = prompt_ids[max(0, len(prompt_ids) - room) :]
    else:
        kept = prompt_ids[:room]
    was_cut = len(kept) < len(prompt_ids)
    kept = bos_ids + kept
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
