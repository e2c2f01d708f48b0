"""The token ids of a data set: computed once, kept in a file, mapped into memory.

A reader of a training step may skip this file. In its order:

    Tally                              what is counted
    TokenizedRecords, MappedExample    the token ids of a split, and how they are cut
    load_tokens, prepare_tokens        a data set's token ids, from the cache
    tokenize, write_tokens             records to token ids
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from archangel.errors import UserError
from archangel.records import (
    FORMATS,
    Record,
    Source,
    cache_folder,
    find_sources,
    format_of,
    iter_records,
    progress,
)
from archangel.tokens import COMPLETIONS, LeftOut, RecordEncoder, TokenizedRecord

CHUNK_SIZE = 1000  # records that the tokenizer encodes at once, in parallel
MAX_TEST_RECORDS = 512  # held-out records that are evaluated (HALOs)


# -------------------------------------------------------------------------------- what is counted


def in_records(number: int) -> str:
    """A number of records in words."""
    return "1 record" if number == 1 else f"{number:,} records"


class Tally(dict):
    """Names to the number of records that were counted, and where the first of them stands."""

    def add(self, name: str, where: str) -> None:
        """Count one more record."""
        found = self.setdefault(name, {"records": 0, "first": where})
        found["records"] += 1

    def describe(self) -> list[str]:
        """A line for each name, as a reason why records are left out."""
        lines = []
        for reason, found in self.items():
            lines.append(
                f"left out: {reason} ({in_records(found['records'])}, the first is "
                f"{found['first']})"
            )
        return lines


# ------------------------------------------------------------------- the records of a split, mapped

SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        **{name: pa.list_(pa.int32()) for name in COMPLETIONS},  # null if the record has none
        "label": pa.bool_(),
        "is_chat": pa.bool_(),
        "prompt_key": pa.int64(),  # equal for equal prompts
        "place": pa.string(),  # file and line
    }
)


class TokenizedRecords:
    """The token ids of the records of a split, not cut, in a table that is mapped into memory.

    Attributes:
        label: true, false or None for each record.
        counts: what was read, used and left out; see write_tokens.
    """

    def __init__(self, table: pa.Table, counts: dict):
        self.label = table["label"].to_pylist()
        self.counts = counts
        self._table = table
        self._is_chat = table["is_chat"].to_numpy()
        self._prompt_key = table["prompt_key"].to_numpy()
        self._lengths = {}
        for name in ("prompt", *COMPLETIONS):
            lengths = pyarrow.compute.list_value_length(table[name])
            self._lengths[name] = lengths.fill_null(0).to_numpy()

    def __len__(self) -> int:
        return len(self.label)

    def select(self, numbers: Sequence[int]) -> "TokenizedRecords":
        """Only these records, in this order, in memory. `counts` stay those of the whole split."""
        return TokenizedRecords(self._table.take(pa.array(numbers, pa.int64())), self.counts)

    def describe(self) -> list[str]:
        """What was left out, was not read or may surprise, in lines."""
        lines = self.counts["left_out"].describe()
        if self.counts["columns_not_read"]:
            lines.append(f"columns that are not read: {', '.join(self.counts['columns_not_read'])}")
        if self.counts["with_special_text"]:
            lines.append(
                "the text of a special token becomes that token in "
                f"{in_records(self.counts['with_special_text'])}"
            )
        if self.counts["with_earlier_answers"]:
            lines.append(
                "earlier answers in a conversation are context and are not learned, in "
                f"{in_records(self.counts['with_earlier_answers'])}"
            )
        return lines

    def place(self, number: int) -> str:
        """Where a record stands in the data: its file and line."""
        return self._table["place"][number].as_py()

    def has(self, number: int, name: str) -> bool:
        """Whether a record has a completion of this name."""
        return self._lengths[name][number] > 0

    def read(self, number: int, name: str) -> np.ndarray:
        """The token ids of a record's "prompt" or of one of its completions, (n,) int32."""
        return self._table[name][number].values.to_numpy().copy()  # torch wants to be able to write

    def are_equal(self, number: int, name: str, other: str) -> bool:
        """Whether two completions of a record are the same tokens."""
        return np.array_equal(self.read(number, name), self.read(number, other))

    def cut(self, number: int, names: Sequence[str], config) -> tuple[int, bool] | None:
        """How a record is cut to --max_length: the prompt first, then the completions.

        names: the completions that are needed. The prompt is cut for the longest of them.

        Returns:
            The tokens of the prompt that are kept, and whether anything is cut. None for a
            conversation that is too long: cutting it would break its template.
        """
        prompt_length = int(self._lengths["prompt"][number])
        longest = max(int(self._lengths[name][number]) for name in names)
        if self._is_chat[number]:
            too_long = prompt_length + longest > config.max_length
            return None if too_long else (prompt_length, False)
        kept = min(prompt_length, max(config.max_prompt_length, config.max_length - longest))
        return kept, kept < prompt_length or kept + longest > config.max_length

    def prompt_key(self, number: int) -> int:
        """A number that is equal for equal prompts."""
        return int(self._prompt_key[number])

    def length(self, number: int, name: str) -> int:
        """Tokens of a record's "prompt" or of one of its completions."""
        return int(self._lengths[name][number])


@dataclass(slots=True)
class MappedExample:
    """An example whose token ids are read from the mapped table when they are asked for."""

    records: TokenizedRecords
    config: object  # with max_length and truncate_prompt
    number: int  # of the record whose prompt this is
    prompt_length: int  # tokens of the prompt that are kept
    names: tuple[str, ...]  # which completions
    completion_number: int  # of the record whose completions these are

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompt, cut. What the tokenizer puts before every text is kept."""
        ids = self.records.read(self.number, "prompt")
        if self.config.truncate_prompt == "end":
            return ids[: self.prompt_length]
        num_prefix = min(self.records.counts["prefix_tokens"], self.prompt_length)
        return np.concatenate([ids[:num_prefix], ids[num_prefix + len(ids) - self.prompt_length :]])

    @property
    def completions_ids(self) -> list[np.ndarray]:
        """The completions, cut to the room that the prompt leaves."""
        room = self.config.max_length - self.prompt_length
        return [self.records.read(self.completion_number, name)[:room] for name in self.names]

    def lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each completion."""
        room = self.config.max_length - self.prompt_length
        lengths = [self.records.length(self.completion_number, name) for name in self.names]
        return self.prompt_length, [min(length, room) for length in lengths]

    def prompt_key(self) -> int:
        """A number that is equal for equal prompts."""
        return self.records.prompt_key(self.number)

    def with_completions_of(self, other: "MappedExample") -> "MappedExample":
        """This prompt with the completions of another example."""
        return dataclasses.replace(
            self, names=other.names, completion_number=other.completion_number
        )


# -------------------------------------------------------------- a data set, prepared and kept


def load_tokens(
    data: str | Sequence[str], formats: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedRecords, TokenizedRecords]:
    """The training records, and at most MAX_TEST_RECORDS held-out records, by `prepare_tokens`.

    The held-out records are drawn at random, with a fixed seed: in a sorted file the first ones,
    or a whole batch, may belong to one class.

    formats: those that the loss can learn from. Raises UserError if a record has another one, or if
    no record can be used.
    """
    splits = map_tokens(prepare_tokens(data, tokenizer))
    for records in splits.values():
        check_formats(records.counts, formats)
    if len(splits["train"]) == 0:
        raise UserError(describe_unusable(splits["train"].counts))
    test = splits.get("test", tokenize([], tokenizer))
    order = np.random.default_rng((0, 0)).permutation(len(test))
    return splits["train"], test.select(order[:MAX_TEST_RECORDS])


def map_tokens(folder: Path) -> dict[str, TokenizedRecords]:
    """The records of each split in a folder of `prepare_tokens`, mapped into memory."""
    splits = {}
    try:
        for split, counts in json.loads((folder / "counts.json").read_text()).items():
            counts["left_out"] = Tally(counts["left_out"])
            table = pa.ipc.open_file(pa.memory_map(str(folder / f"{split}.arrow"))).read_all()
            splits[split] = TokenizedRecords(table, counts)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is damaged, {error}; remove it") from None
    return splits


def check_formats(counts: dict, formats: Sequence[str]) -> None:
    """Raise UserError if some of the records have none of these formats."""
    for name, found in counts["formats"].items():
        if name not in formats:
            needed = " or ".join(FORMATS[each] for each in formats)
            raise UserError(f"{found['first']}: has {FORMATS[name]}; this loss needs {needed}")


def describe_unusable(counts: dict) -> str:
    """Why no record of a split can be used."""
    if counts["read"] == 0:
        return f"--data {counts['source']}: has no records"
    reasons = "; ".join(counts["left_out"].describe())
    return f"--data {counts['source']}: no record can be used; {reasons}"


def prepare_tokens(data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder with the token ids of a data set, in cache_folder(). Made if it is not there yet.

    It holds train.arrow, test.arrow if there is such a split, and counts.json. Its name depends on
    all that the token ids depend on. Raises UserError.
    """
    sources = find_sources(data)
    folder = cache_folder() / "tokens" / cache_key(sources, tokenizer)
    if folder.is_dir():
        return folder
    encoder = RecordEncoder(tokenizer)
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # another run has made it in the meantime
                return folder
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
            try:
                counts = {}
                for split, source in sources.items():
                    with pa.OSFile(str(partial / f"{split}.arrow"), "wb") as sink:
                        records = iter_records(source)
                        counts[split] = write_tokens(source.name, records, encoder, sink)
                (partial / "counts.json").write_text(json.dumps(counts))
                partial.rename(folder)  # only a complete folder has the final name
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the token ids of the data cannot be kept there ({error}); the "
            "environment variable HALOS_CACHE names another folder"
        ) from None
    return folder


def cache_key(sources: dict[str, Source], tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that token ids depend on: records, tokenizer, chat template and this code."""
    tokenizer("x")  # takes back the truncation and padding of an earlier call, which would be saved
    digest = hashlib.sha256()
    for split, source in sources.items():
        digest.update(f"{split} {source.name} {source.sha256()}\n".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    for file_name in ("records.py", "tokens.py", "tokenized.py"):
        digest.update(Path(__file__).with_name(file_name).read_bytes())
    for library in (transformers, tokenizers, jinja2):
        digest.update(f"{library.__name__} {library.__version__}\n".encode())
    return digest.hexdigest()[:32]


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> TokenizedRecords:
    """The token ids of records that are in memory."""
    sink = pa.BufferOutputStream()
    numbered = ((f"record {number}", record, set()) for number, record in enumerate(records, 1))
    counts = write_tokens("memory", numbered, RecordEncoder(tokenizer), sink)
    return TokenizedRecords(pa.ipc.open_file(sink.getvalue()).read_all(), counts)


def write_tokens(
    name: str, records: Iterable[tuple[str, Record, set[str]]], encoder: RecordEncoder, sink
) -> dict:
    """Write the token ids of records to an Arrow file.

    Args:
        name: of the data.
        records: (where it stands, record, columns that are not read); see iter_records.
        sink: a file that is open for writing, or a buffer.
    Returns:
        What was counted. "formats" and "left_out" say how many records have each format, or are
        left out for each reason, and where the first of them stands.
    """
    formats = Tally()
    left_out = Tally()
    columns_not_read = set()
    end_ids = set()
    num_used = 0
    num_with_special_text = 0
    num_with_earlier_answers = 0
    digest = hashlib.sha256()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in in_chunks(progress(records, "tokenize"), CHUNK_SIZE):
            rendered = []
            for where, record, not_read in chunk:
                formats.add(format_of(record), where)
                columns_not_read |= not_read
                try:
                    rendered.append((where, record, encoder.render(record)))
                except LeftOut as reason:
                    left_out.add(str(reason), where)
            rows = []
            tokenized = encoder.encode([texts for _, _, texts in rendered])
            for (where, record, texts), tokens in zip(rendered, tokenized):
                if isinstance(tokens, LeftOut):
                    left_out.add(str(tokens), where)
                    continue
                rows.append(make_row(where, record, tokens))
                end_ids.add(encoder.end_id(texts.is_chat))
                num_with_special_text += encoder.has_special_text(texts)
                num_with_earlier_answers += texts.has_earlier_answers
            num_used += len(rows)
            batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            update_digest(digest, batch)
            writer.write_batch(batch)
    return {
        "source": name,
        "read": sum(found["records"] for found in formats.values()),
        "used": num_used,
        "formats": formats,
        "left_out": left_out,
        "columns_not_read": sorted(columns_not_read),
        "with_special_text": num_with_special_text,
        "with_earlier_answers": num_with_earlier_answers,
        "end_ids": sorted(end_ids),
        "prefix_tokens": len(encoder.prefix_ids),
        "sha256": digest.hexdigest(),
    }


def in_chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of the next `size` items each; the last one may be shorter."""
    items = iter(items)
    chunk = list(itertools.islice(items, size))
    while chunk:
        yield chunk
        chunk = list(itertools.islice(items, size))


def make_row(where: str, record: Record, tokens: TokenizedRecord) -> dict:
    """A row of the table."""
    prompt = np.array(tokens.prompt_ids, dtype=np.int32).tobytes()
    key = hashlib.blake2b(prompt, digest_size=8).digest()
    return {
        "prompt": tokens.prompt_ids,
        **tokens.completions,
        "label": record.get("label"),
        "is_chat": tokens.is_chat,
        "prompt_key": int.from_bytes(key, "little", signed=True),
        "place": where,
    }


def update_digest(digest, batch: pa.RecordBatch) -> None:
    """Add all values of some rows to a hash."""
    for column in batch.drop_columns(["place"]).columns:  # the data may have moved
        if pa.types.is_list(column.type):
            lengths = pyarrow.compute.list_value_length(column)
            digest.update(lengths.fill_null(-1).to_numpy().tobytes())
            digest.update(column.flatten().to_numpy().tobytes())
        else:
            digest.update(repr(column.to_pylist()).encode())
