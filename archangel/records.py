"""Data files to records. A reader of a training step may skip this file.

--data takes what preference data is usually kept in:

    toy, archangel              the data sets that come with this project
    pairs.jsonl                 JSON Lines, a JSON array (.json), CSV, parquet or Arrow; text files
                                also as .gz. Several files, or a glob such as 'part-*.jsonl', are
                                read as one; all of their records are for training
    folder                      of such files, with `train` and `test` (or `validation`) in their
                                names; or of Dataset.save_to_disk
    NAME, NAME:CONFIG,
    NAME:CONFIG:SPLIT           a data set of the Hugging Face hub (NAME::SPLIT for its default
                                CONFIG). A split train_x is evaluated on test_x; other splits on
                                test or validation, if there is one

A record has the columns of one of these formats. Where several fit, the first one counts.

    preference    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
                  and optionally "target", a completion that SFT and SLiC imitate
    unpaired      {"prompt": "2+2?", "completion": " 4", "label": true}
                  true is desirable; also 1 and 0, "good" and "bad", "desirable" and "undesirable"
    supervised    {"prompt": "2+2?", "completion": " 4"}
    conversation  {"messages": [{"role": "user", "content": "2+2?"},
                                {"role": "assistant", "content": "4"}]}
                  the last message is the completion, which is supervised, or unpaired if there is a
                  label. The assistant's earlier messages are not learned

Instead of text, prompts and completions may be lists of messages:

    {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", ...}], ...}

The prompt may be left out where chosen and rejected are whole conversations that differ in their
last message, as lists of messages or as the text of Anthropic's HH, with "\\n\\nAssistant:" turns.
The chat template gets `tools` and `chat_template_kwargs`, if a record has these columns.

Text is used unchanged; the text of a special token, such as "</s>", becomes that token. Messages
are written by the tokenizer's chat template; a record with the text of a special token in a message
is left out. What is left out is counted. `python -m archangel.data show` prints the tokens.
"""

# The trainers' --help prints the text above, from its second paragraph on.

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import datasets
from tqdm import tqdm

from archangel.errors import UserError

TOY = Path(__file__).parent / "toy_world"  # a small model and data set, for trying things offline
FORMATS = {  # what an error message says of the columns of each
    "preference": "{prompt, chosen, rejected}",
    "unpaired": "{prompt, completion, label}",
    "supervised": "{prompt, completion} or {messages}",
}
# How data sets spell labels. True and 1.0 find the entry of 1, which is equal to them in Python.
LABELS = {1: True, 0: False}
LABELS |= dict.fromkeys(["true", "1", "1.0", "yes", "good", "chosen", "desirable"], True)
LABELS |= dict.fromkeys(["false", "0", "0.0", "no", "bad", "rejected", "undesirable"], False)
# Columns that change what a record means and that no loss reads, and what to do instead.
REFUSED_COLUMNS = {
    "system": "put its text at the beginning of the prompt, or into a first message",
    "images": "only text can be learned from",
    "image": "only text can be learned from",
    "videos": "only text can be learned from",
    "audio": "only text can be learned from",
}
TEMPLATE_COLUMNS = {"tools": list, "chat_template_kwargs": dict}  # read beside messages
HH_TURN = "\n\nAssistant:"  # begins the assistant's turns in the text of Anthropic's HH
# A small compressed file may hold what would fill the memory.
MAX_LINE_BYTES = 2**26
MAX_ARRAY_BYTES = 2**30

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a UserError says it in one line
datasets.disable_progress_bars()

Record = dict  # with the columns of a format; prompt and completions are text or lists of messages


# ----------------------------------------------------------------------------- --data to sources


@dataclass
class Source:
    """Where the records of a split are: in files, or in a data set of the `datasets` library."""

    name: str
    files: list[Path]
    dataset: datasets.Dataset | None = None  # then `files` are those that it is mapped from

    def sha256(self) -> str:
        """A fingerprint of what the files hold. (Their times may be unchanged by an edit.)"""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(path.name.encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        if self.dataset is not None:
            digest.update(repr(self.dataset.features).encode())  # names of labels
            # Its rows may be in no file, or be some of those in the files.
            digest.update(self.dataset._fingerprint.encode())
        return digest.hexdigest()


def find_sources(data: str | Sequence[str], needs_train: bool = True) -> dict[str, Source]:
    """The sources of the splits "train" and "test", as far as they exist. Raises UserError.

    Args:
        data: --data, a name or several; see the top of this file.
        needs_train: whether it is an error if there is no training split.
    """
    names = [data] if isinstance(data, str) else list(data)
    if names == ["archangel"]:
        names = [str(cache_folder() / "archangel")]  # archangel/data.py makes it
    elif names == ["toy"]:
        names = [str(TOY / "data")]
    files = find_files(names)
    if files:
        return {"train": Source(", ".join(names), files)}
    name = names[0]  # find_files raises an error for several that are not all files
    parts = [name] if Path(name).is_dir() else name.split(":")
    if len(parts) > 3:
        raise UserError(f"--data {name}: has more than NAME:CONFIG:SPLIT")
    path = parts[0]
    config = parts[1] if len(parts) > 1 else ""
    split = parts[2] if len(parts) > 2 else ""
    splits = find_splits(name, path, config)
    train = split or "train"
    sources = {}
    if train in splits:
        sources["train"] = splits[train]
    for test in (train.replace("train", "test"), "test", "validation"):
        if test in splits and test != train:
            sources["test"] = splits[test]
            break
    if "train" not in sources and (needs_train or not sources):
        raise UserError(
            f"--data {name}: has the splits {', '.join(splits)}; choose the one to train on: "
            f"{path}:{config}:{next(iter(splits))}"
        )
    return sources


def find_files(names: list[str]) -> list[Path]:
    """The files of these names, and of those that are globs. [] for a single other name."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_file():
            files.append(path)
        elif glob.has_magic(name) and not path.is_dir():
            found = [Path(file) for file in sorted(glob.glob(name)) if Path(file).is_file()]
            if not found:
                raise UserError(f"--data {name}: no file has such a name")
            files.extend(found)
        elif len(names) > 1:
            raise UserError(f"--data {name}: is not a file; several are read only if all are files")
        elif file_kind(path) and not path.is_dir():
            raise UserError(f"--data {name}: no such file")
    return files


def find_splits(name: str, path: str, config: str) -> dict[str, Source]:
    """All splits of a folder or of a data set of the hub. Raises UserError."""
    try:
        if is_saved_to_disk(path):
            loaded = datasets.load_from_disk(path)
        elif Path(path).is_dir():
            if glob.has_magic(path):  # the library would read other folders that match it, too
                raise ValueError("its path has one of *?[")
            with tempfile.TemporaryDirectory() as unused:  # where the library writes a lock
                builder = datasets.load_dataset_builder(path, config or None, cache_dir=unused)
            return make_folder_sources(path, builder.config.data_files)
        else:
            loaded = datasets.load_dataset(path, config or None)
    except UserError:
        raise
    except Exception as error:  # the library, its formats and the hub fail in many ways
        if Path(path).is_dir():
            reason = "holds no data files that can be read"
        else:
            reason = "is no file or folder here, and the hub does not give it"
        raise UserError(f"--data {name}: {reason} ({in_one_line(error)})") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    splits = {}
    for split, dataset in loaded.items():
        files = [Path(file["filename"]) for file in dataset.cache_files]
        splits[str(split)] = Source(f"{name}, {split}", files, dataset)
    return splits


def make_folder_sources(name: str, found: dict[str, list[str]]) -> dict[str, Source]:
    """The sources of the files that the `datasets` library found in a folder, by split."""
    folder = Path(os.path.abspath(name))
    splits = {}
    all_found = set()
    for split, file_names in found.items():
        files = [Path(os.path.abspath(file_name)) for file_name in file_names]
        all_found.update(files)
        splits[str(split)] = Source(f"{name}, {split}", without_copies(files))
    for file in all_found:
        if not file.is_relative_to(folder):
            raise UserError(f"--data {name}: its README.md names a file elsewhere, {file}")
    # The library reads files of one kind, and says nothing of the others.
    for file in sorted(folder.rglob("*")):
        is_of_split = any(word in file.name for word in ("train", "test", "valid"))
        if file_kind(file) and is_of_split and file not in all_found:
            raise UserError(
                f"--data {name}: {file.name} would not be read, since other files are of another "
                "kind; keep one kind in a folder, or name the files"
            )
    return splits


def without_copies(files: list[Path]) -> list[Path]:
    """The files without those that are another one, compressed: train.jsonl and train.jsonl.gz."""
    kept = []
    for file in files:
        if file.suffix != ".gz" or file.with_suffix("") not in files:
            kept.append(file)
    return kept


def is_saved_to_disk(folder: str) -> bool:
    """Whether a folder was written by save_to_disk of the `datasets` library."""
    marks = ("state.json", "dataset_dict.json")
    return any((Path(folder) / mark).is_file() for mark in marks)


def in_one_line(error: BaseException) -> str:
    """An exception's message in one line. The `datasets` library keeps the cause behind it."""
    error = error.__cause__ or error
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------------------- sources to records

# The standard library reads text files. The readers of `datasets` guess types: a completion
# "2020-01-01 00:00:00" becomes a date, in CSV "007" becomes 7 and "None" becomes nothing; they do
# not say in which line an error is.


def file_kind(path: Path) -> str:
    """The suffix of a file's name, without a last ".gz": one of READERS, or "" for any other."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    """The values of JSON Lines, or of one JSON array."""
    where = str(path)
    is_first = True
    try:
        with open_file(path) as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if is_first and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                    rest = file.read(MAX_ARRAY_BYTES + 1)
                    if len(rest) > MAX_ARRAY_BYTES:
                        raise ValueError(f"its array exceeds {MAX_ARRAY_BYTES} bytes; use .jsonl")
                    text = (line + rest).decode("utf-8-sig")
                    where = f"{path}, in the array that begins in line {number}"
                    for place, value in enumerate(split_array(text), 1):
                        yield f"{path}, record {place}", value
                    return
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
                text = line.decode("utf-8-sig").strip()
                if text:
                    is_first = False
                    yield where, json.loads(text, object_pairs_hook=refuse_repeated_columns)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: {in_one_line(error)}") from None


def split_array(text: str) -> Iterator[object]:
    """The elements of a JSON array, one at a time: all of them would need much more memory."""
    decoder = json.JSONDecoder(object_pairs_hook=refuse_repeated_columns)
    whitespace = re.compile(r"[ \t\n\r]*")
    position = whitespace.match(text, text.index("[") + 1).end()
    if text[position : position + 1] == "]":
        end = position
    else:
        while True:
            value, position = decoder.raw_decode(text, position)
            yield value
            end = whitespace.match(text, position).end()
            if text[end : end + 1] != ",":
                break
            position = whitespace.match(text, end + 1).end()
    if text[end : end + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']' of the array", text, end)
    if text[end + 1 :].strip():
        raise json.JSONDecodeError("Expecting nothing after the array", text, end + 1)


def refuse_repeated_columns(columns: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError if it has a name twice: readers differ in what they take."""
    record = dict(columns)
    if len(record) < len(columns):
        raise ValueError("has a field twice")
    return record


def read_csv(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file with a header. Every cell is text, and stays as it is."""
    where = str(path)
    csv.field_size_limit(MAX_LINE_BYTES)  # the default refuses a cell over 128 KiB
    try:
        with open_file(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError("the header has a name twice")
            where = f"{path}, line {reader.line_num + 1}"
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(f"has {len(row)} cells, the header has {len(header)}")
                if row:
                    yield where, dict(zip(header, row))
                where = f"{path}, line {reader.line_num + 1}"
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{where}: {in_one_line(error)}") from None


def open_file(path: Path) -> IO[bytes]:
    """Open a file, compressed by gzip or not, to read its bytes."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_arrow(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a parquet or Arrow file, read in parts: nothing is copied to another file."""
    builder = file_kind(path).removeprefix(".")
    pattern = glob.escape(str(path))  # which is what the library expects
    try:
        with tempfile.TemporaryDirectory() as unused:  # where the library writes a lock
            dataset = datasets.load_dataset(
                builder, data_files=pattern, split="train", streaming=True, cache_dir=unused
            )
    except Exception as error:  # the library's and Arrow's
        raise UserError(f"{path}: {in_one_line(error)}") from None
    yield from read_dataset(dataset, str(path))


def read_dataset(dataset: Iterable, name: str) -> Iterator[tuple[str, object]]:
    """The rows of a data set of the `datasets` library."""
    labels = {}  # column -> names of its codes
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            labels[column] = feature.names
    where = name
    try:
        for number, row in enumerate(dataset, 1):
            where = f"{name}, record {number}"
            for column, names in labels.items():
                code = row[column]
                if code is not None:
                    row[column] = names[code] if code >= 0 else None  # -1 stands for no label
            yield where, {key: without_nulls(item) for key, item in row.items()}
            where = f"{name}, after record {number}"
    except Exception as error:  # the library's and Arrow's
        raise UserError(f"{where}: {in_one_line(error)}") from None


def without_nulls(value: object) -> object:
    """A value without the fields that are null.

    Arrow adds them where only other rows have a field. It does not tell them from nulls that mean
    something, such as an argument of a tool call; JSON Lines keeps these.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# What reads a file, by the end of its name.
READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_arrow,
    ".arrow": read_arrow,
}


# -------------------------------------------------------------------------- what a record must be


def iter_records(source: Source) -> Iterator[tuple[str, Record, set[str]]]:
    """Yield (where it stands, record, names of the columns that are not read) of a source.

    Raises UserError, with the place, for what cannot be read or has no known format.
    """
    for where, value in iter_values(source):
        try:
            record = check_record(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {in_one_line(error)}") from None
        yield where, record, value.keys() - record.keys()


def iter_values(source: Source) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, value) of everything in a source that should be a record."""
    if source.dataset is not None:
        yield from read_dataset(source.dataset, source.name)
        return
    for path in source.files:
        yield from read_file(path)


def read_file(path: Path) -> Iterator[tuple[str, object]]:
    """The values in a file that should be records, and where they stand."""
    read = READERS.get(file_kind(path))
    if read is None:
        raise UserError(f"--data {path}: its name must end in one of {', '.join(READERS)}")
    return read(path)


def check_record(value: object) -> Record:
    """A record with the columns of its format and no others. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    given = {column: item for column, item in value.items() if item is not None}
    columns = find_columns(given)
    if not columns:
        raise ValueError(
            f"has the columns {', '.join(sorted(given)) or 'none'}; needs "
            + " or ".join(FORMATS.values())
        )
    # Without its label, an unpaired record would be taken for a supervised one.
    if "label" in value and "label" not in columns and "chosen" not in columns:
        raise ValueError("label is null")
    for column, advice in REFUSED_COLUMNS.items():
        if given.get(column):
            raise ValueError(f"has a column {column}, which would be lost; {advice}")
    record = {}
    is_conversation = False
    for column in columns:
        if column == "label":
            record[column] = parse_label(given[column])
        elif column == "messages" and isinstance(given[column], str):
            raise ValueError(
                "messages must be a list, not text; save the data as JSON Lines or parquet"
            )
        elif is_text_or_messages(given[column]):
            record[column] = given[column]
            is_conversation |= not isinstance(given[column], str)
        else:
            raise ValueError(
                f"{column} must be text or a list of messages, not {given[column]!r:.40}"
            )
    for column, kind in TEMPLATE_COLUMNS.items():
        if not given.get(column):
            continue
        if not is_conversation:
            raise ValueError(
                f"has a column {column}, which only conversations have; write messages, or put it "
                "into the prompt's text"
            )
        record[column] = parse_template_column(column, given[column], kind)
    return record


def parse_template_column(column: str, item: object, kind: type) -> object:
    """What the chat template gets of a column, which may be JSON as text. Raises ValueError."""
    if isinstance(item, str):
        try:
            item = json.loads(item)
        except ValueError as error:
            raise ValueError(f"{column} is text, and not JSON: {error}") from None
    if not isinstance(item, kind):
        raise ValueError(f"{column} must be a {kind.__name__}, not {item!r:.40}")
    return item


def find_columns(given: dict) -> list[str]:
    """The columns to read of a record, for the first format that it has. [] if it has none."""

    def is_whole_dialogue(column: str) -> bool:
        item = given[column]
        return isinstance(item, list) or (isinstance(item, str) and HH_TURN in item)

    prompt = ["prompt"] if "prompt" in given else []
    label = ["label"] if "label" in given else []
    is_pair = "chosen" in given and "rejected" in given
    if is_pair and (prompt or (is_whole_dialogue("chosen") and is_whole_dialogue("rejected"))):
        target = ["target"] if given.get("target") else []  # a cell of CSV may be blank
        return [*prompt, "chosen", "rejected", *target]
    if "completion" in given and (prompt or isinstance(given["completion"], list)):
        return [*prompt, "completion", *label]
    if "messages" in given:
        return ["messages", *label]
    return []


def is_text_or_messages(item: object) -> bool:
    """Whether a value can be a prompt or a completion."""
    if isinstance(item, str):
        return True
    if not isinstance(item, list) or not item:
        return False
    return all(is_message(message) for message in item)


def is_message(item: object) -> bool:
    """Whether a value can be a message. What it holds besides a role is the template's business."""
    if not isinstance(item, dict):
        return False
    role = item.get("role")
    return isinstance(role, str) and role != ""


def parse_label(value: object) -> bool:
    """A label as one of the LABELS. Raises ValueError."""
    if isinstance(value, str):
        value = value.strip().lower()
    if not isinstance(value, str | int | float) or value not in LABELS:
        raise ValueError(
            f"label must be true or false (or 1 or 0, desirable or undesirable), not {value!r:.40}"
        )
    return LABELS[value]


def format_of(record: Record) -> str:
    """Which of the FORMATS a record has."""
    if "chosen" in record:
        return "preference"
    if "label" in record:
        return "unpaired"
    return "supervised"


def read_records(data: str | Sequence[str], split: str) -> list[Record]:
    """All records of a split, in memory. [] if there is no such split. Raises UserError."""
    source = find_sources(data).get(split)
    if source is None:
        return []
    return [record for _, record, _ in iter_records(source)]


def progress(iterable: Iterable, description: str) -> Iterable:
    """Show a progress bar, on process 0, if it takes more than two seconds."""
    is_first = os.environ.get("RANK", "0") == "0"
    # leave=None: inside of another bar, such as that of training, it disappears at its end.
    return tqdm(iterable, description, delay=2, leave=None, disable=not is_first)


def cache_folder() -> Path:
    """Where prepared data is kept, until somebody removes it: $HALOS_CACHE, or ~/.cache/halos."""
    return Path(os.environ.get("HALOS_CACHE") or Path.home() / ".cache" / "halos")
