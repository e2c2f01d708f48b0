"""The report's data, and any other preference data, as the records that a trainer reads.

The report (section 3.4) aligns every model on one mixture of three sets: Anthropic HH,
OpenAssistant, and "the subset of SHP recommended in the original release". Its SFT targets are "a
subset of the generations used to subsequently align the model". This file makes those records, and
the records of any other set in a common format. A record is one JSON object in one of three forms:

    preference   {"prompt", "chosen", "rejected"}, and "target" if SFT imitates another reply
    unpaired     {"prompt", "completion", "label"}: true is desirable
    supervised   {"prompt", "completion"}

Conversations are written as HH writes them: a turn opens with "\\n\\nHuman:" or
"\\n\\nAssistant:", a prompt ends in "\\n\\nAssistant:", and a completion begins with a space.

    python -m archangel.data hh --input harmless-base.jsonl.gz --out rows/hh
    python -m archangel.data oasst --input oasst_trees.jsonl.gz --out rows/oasst
    python -m archangel.data shp --out rows/shp              # without --input: from the hub
    python -m archangel.data archangel                       # the mixture, for `--data archangel`
    python -m archangel.data rows --input pairs.parquet --out rows/pairs

Each writes `train.jsonl`, `test.jsonl` (no prompt is in both) and `counts.json`: what was read,
what was kept, what was dropped and why.
"""

import argparse
import csv
import dataclasses
import functools
import gzip
import itertools
import json
import os
import random
import shutil
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from archangel.errors import UserError, exit_status

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
NOT_SHARED = "no shared opening up to the last Assistant turn"
MIN_SCORE_RATIO = 2  # SHP: smaller differences are mostly noise
MAX_PAIRS_PER_PROMPT = 5  # SHP: otherwise a few busy posts outweigh the rest

Record = dict[str, str | bool]


# ----------------------------------------------------------------------------------------- counting


class Dropped(Exception):
    """Something that was read and gives no record. The message is the reason."""


@dataclasses.dataclass
class Counts:
    """What became of everything that was read: `read == kept + sum(dropped.values())`."""

    unit: str  # of what is counted, such as "pairs"
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)  # by reason

    def __str__(self) -> str:
        text = f"read {self.read} {self.unit}, kept {self.kept}, dropped {self.dropped.total()}"
        reasons = [f"{reason}: {number}" for reason, number in self.dropped.most_common()]
        if reasons:
            text += f" ({'; '.join(reasons)})"
        return text


def convert_each(raw_records: Iterable[dict], convert: Callable, counts: Counts) -> Iterator:
    """Yield convert(raw_record) for every raw record, except for those that raise `Dropped`.

    Both kinds are counted.
    """
    for raw_record in tqdm(raw_records, unit=f" {counts.unit}", disable=None):
        counts.read += 1
        try:
            converted = convert(raw_record)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
        else:
            counts.kept += 1
            yield converted


def field(record: dict, name: str, kind: type | tuple = str) -> object:
    """The value of a column. Raises Dropped if it is missing or of another type."""
    if not isinstance(record.get(name), kind):
        raise Dropped(f"no usable {name!r} among the columns {', '.join(map(str, record))}")
    return record[name]


def preference(prompt: str, chosen: str, rejected: str, target: str | None = None) -> Record:
    """A preference record. target: the reply that SFT imitates, if it is not `chosen`."""
    if not chosen.strip() or not rejected.strip():
        raise Dropped("empty reply")
    if chosen.strip() == rejected.strip():
        raise Dropped("identical replies")
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if target is not None and target != chosen:
        record["target"] = target
    return record


# --------------------------------------- the report's three sets: raw records to preference records


def hh(raw_records: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Record]:
    """Anthropic HH: two dialogues that differ in the last reply. What they share is the prompt."""

    def convert(raw_record: dict) -> Record:
        dialogues = {name: field(raw_record, name) for name in ("chosen", "rejected")}
        return any_record(dialogues)

    return convert_each(raw_records, convert, counts)


def oasst(raw_records: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Record]:
    """OpenAssistant: every set of ranked English replies to a message gives its adjacent pairs.

    The prompt is the conversation from the root; rank 0 is best. The SFT target is the best reply
    (the authors' code took the worst). `n` ranked replies give `n - 1` records. The assistant's
    replies are counted.

    raw_records: exported trees, or the hub's flat messages.
    """
    raw_records = list(raw_records)
    try:
        if raw_records and "prompt" in raw_records[0]:
            trees = [record["prompt"] for record in raw_records]
        else:
            trees = nest(raw_records)
        for tree in tqdm(trees, unit=" trees", disable=None):
            for prompt, replies, fault in conversations(tree):
                yield from adjacent_pairs(prompt, replies, fault, counts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"oasst: neither exported trees nor flat messages ({error!r})") from None


def nest(messages: list[dict]) -> list[dict]:
    """The roots of the hub's flat messages, each message with a list of its `replies`."""
    by_id = {message["message_id"]: {**message, "replies": []} for message in messages}
    # A message whose parent is missing has lost its prompt. It is treated as if it stood below a
    # deleted message.
    missing = {"text": "", "role": "prompter", "deleted": True, "replies": []}
    roots = [missing]
    for message in by_id.values():
        parent_id = message.get("parent_id")
        if parent_id:
            parent = by_id.get(parent_id, missing)
            parent["replies"].append(message)
        else:
            roots.append(message)
    return roots


def conversations(
    message: dict, opening: str = "", fault: str | None = None
) -> Iterator[tuple[str, list[dict], str | None]]:
    """(prompt, replies, fault) of each of the user's turns, from `message` down.

    Args:
        opening: the conversation before `message`.
        fault: why this message cannot be used; None if it can. Nothing below it can be used either.
    """
    fault = fault or unusable(message)
    opening += turn("user" if message["role"] == "prompter" else "assistant", message["text"])
    if message["role"] == "prompter":
        yield opening + ASSISTANT, message["replies"], fault
    for reply in message["replies"]:
        yield from conversations(reply, opening, fault)


def unusable(message: dict) -> str | None:
    """Why an OpenAssistant message and all below it are left out. None if they are not."""
    if message.get("deleted"):
        return "deleted, or below a deleted message"
    if message.get("lang", "en") != "en":
        return "not English, or below a message that is not"
    if not message["text"].strip():
        return "empty, or below an empty message"
    return None


def adjacent_pairs(
    prompt: str, replies: list[dict], fault: str | None, counts: Counts
) -> Iterator[Record]:
    """The records of the replies to one prompt: rank 0 over 1, rank 1 over 2, and so on.

    fault: why the prompt cannot be used; None if it can.
    """
    best_first = []
    for reply in sorted(replies, key=lambda reply: reply.get("rank") or 0):
        text = completion_text(reply["text"])
        reason = fault or unusable(reply)
        if reason is None and reply.get("rank") is None:
            reason = "not ranked"
        if reason is None and text in best_first:
            reason = "identical replies"
        if reason is None:
            best_first.append(text)
        else:
            counts.dropped[reason] += 1
    counts.read += len(replies)
    if len(best_first) == 1:
        counts.dropped["no other ranked reply to compare with"] += 1
    else:
        counts.kept += len(best_first)
    for better, worse in itertools.pairwise(best_first):
        yield preference(prompt, better, worse, target=best_first[0])


def shp(raw_records: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Record]:
    """Stanford Human Preferences: the subset that its authors recommend.

    Pairs whose scores differ at least twofold. If a prompt has more than five of these, five are
    drawn by `seed`. The SFT target is the reply with the highest score in all of a prompt's pairs
    that differ twofold.
    """
    pairs = defaultdict(list)  # by prompt
    best = {}  # prompt to (score, reply)
    for pair, score_and_reply in convert_each(raw_records, shp_pair, counts):
        prompt = pair["prompt"]
        pairs[prompt].append(pair)
        best[prompt] = max(score_and_reply, best.get(prompt, score_and_reply))
    rng = random.Random(seed)
    for prompt, pairs_of_prompt in pairs.items():
        drawn = rng.sample(pairs_of_prompt, min(len(pairs_of_prompt), MAX_PAIRS_PER_PROMPT))
        surplus = len(pairs_of_prompt) - len(drawn)
        if surplus:
            counts.kept -= surplus
            counts.dropped[f"more than {MAX_PAIRS_PER_PROMPT} pairs of one prompt"] += surplus
        _, target = best[prompt]
        for pair in drawn:
            yield preference(**pair, target=target)


def shp_pair(raw_record: dict) -> tuple[Record, tuple[float, str]]:
    """A raw record of SHP as a preference record, and (score, reply) of the higher-scored reply."""
    number = (int, float)
    if field(raw_record, "score_ratio", number) < MIN_SCORE_RATIO:
        raise Dropped(f"score ratio below {MIN_SCORE_RATIO}")
    reply_a = completion_text(field(raw_record, "human_ref_A"))
    reply_b = completion_text(field(raw_record, "human_ref_B"))
    if field(raw_record, "labels", int) == 1:  # A is preferred
        chosen = reply_a
        rejected = reply_b
    else:
        chosen = reply_b
        rejected = reply_a
    prompt = turn("user", field(raw_record, "history")) + ASSISTANT
    pair = preference(prompt, chosen, rejected)
    score_a = field(raw_record, "score_A", number)
    score_b = field(raw_record, "score_B", number)
    return pair, max((score_a, reply_a), (score_b, reply_b))


# name: (hub id, function that converts it, what is counted)
REPORT_SETS = {
    "hh": ("Anthropic/hh-rlhf", hh, "pairs of dialogues"),
    "oasst": ("OpenAssistant/oasst1", oasst, "replies"),
    "shp": ("stanfordnlp/SHP", shp, "pairs"),
}


# ------------------------------------------------------------ any other set: raw records to records


def any_set(
    raw_records: Iterable[dict], counts: Counts, seed: int = 1, tokenizer=None
) -> Iterator[Record]:
    """Preference, unpaired or supervised data, as text or messages."""
    return convert_each(raw_records, lambda record: any_record(record, tokenizer), counts)


def any_record(raw_record: dict, tokenizer=None) -> Record:
    """The record of a raw record in one of the common formats."""
    if {"chosen", "rejected"} <= raw_record.keys():
        given = raw_record.get("prompt")
        prompt, chosen = split_dialogue(given, raw_record["chosen"], tokenizer)
        other_prompt, rejected = split_dialogue(given, raw_record["rejected"], tokenizer)
        if prompt != other_prompt:
            raise Dropped(NOT_SHARED)
        return preference(prompt, chosen, rejected)
    if {"prompt", "completion"} <= raw_record.keys():
        prompt, completion = split_dialogue(
            raw_record["prompt"], raw_record["completion"], tokenizer
        )
    elif "messages" in raw_record:
        prompt, completion = split_dialogue(None, raw_record["messages"], tokenizer)
    else:
        raise Dropped(f"unknown columns {', '.join(map(str, raw_record))}")
    if not completion.strip():
        raise Dropped("empty reply")
    record = {"prompt": prompt, "completion": completion}
    if "label" in raw_record:
        label = str(raw_record["label"]).lower()  # CSV has text, and some sets have 0 and 1
        if label not in ("true", "1", "false", "0"):
            raise Dropped("label neither true nor false")
        record["label"] = label in ("true", "1")
    return record


def split_dialogue(prompt, reply, tokenizer=None) -> tuple[str, str]:
    """(prompt, completion) as text, from text or from lists of {"role", "content"} messages.

    Args:
        prompt: text, which stays as it is if the reply is text too; messages; or None.
        reply: the reply. It is the whole dialogue if `prompt` is None, or if it is messages that
            begin with another turn than the assistant's.
        tokenizer: its chat template formats messages. If None, they are formatted as HH's turns.
    """
    if isinstance(reply, str) and isinstance(prompt, str):
        return prompt, reply
    if isinstance(reply, str) and prompt is None:
        opening, separator, last_reply = reply.rpartition(ASSISTANT)
        if not separator:
            raise Dropped(NOT_SHARED)
        return opening + ASSISTANT, completion_text(last_reply)
    prompt_messages = as_messages(prompt or [], "user")
    messages = as_messages(reply, "assistant")
    if messages and messages[0]["role"] == "assistant":
        messages = prompt_messages + messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Dropped("not messages that end in the assistant's answer")
    answer = messages[-1]["content"]
    if not answer.strip():
        raise Dropped("empty reply")
    if tokenizer is not None:
        return apply_template(messages, tokenizer)
    opening = "".join(turn(message["role"], message["content"]) for message in messages[:-1])
    return opening + ASSISTANT, completion_text(answer)


def as_messages(value, role: str) -> list[dict[str, str]]:
    """A list of messages with only role and content. Text becomes one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Dropped("neither text nor a list of messages")
    messages = []
    for message in value:
        messages.append({"role": field(message, "role"), "content": field(message, "content")})
    return messages


def completion_text(text: str) -> str:
    """What follows a role in HH's format."""
    return " " + text.strip()


def turn(role: str, text: str) -> str:
    """One turn in HH's format. It has no names for roles other than these two: they keep theirs."""
    if role == "user":
        name = HUMAN
    elif role == "assistant":
        name = ASSISTANT
    else:
        name = f"\n\n{role.capitalize()}:"
    return name + completion_text(text)


def apply_template(messages: list[dict], tokenizer) -> tuple[str, str]:
    """(prompt, completion) by the tokenizer's chat template, without the end-of-sequence token.

    The trainers add that token to every completion themselves.
    """
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise Dropped(f"the chat template refuses: {error}") from None
    if not whole.startswith(prompt):
        raise Dropped("the chat template changes the prompt when an answer follows")
    completion = whole[len(prompt) :].rstrip()
    return prompt, completion.removesuffix(tokenizer.eos_token or "")


# ------------------------------------------------------------------------------------------ reading

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def file_kind(path: str) -> str:
    """The suffix of a file's name, without a last `.gz`."""
    return Path(path.removesuffix(".gz")).suffix


def read_files(paths: list[str]) -> dict[str, Iterable[dict]]:
    """The raw records of local files, all as one split."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no file of that name")
        if file_kind(path) not in FILE_KINDS:
            raise UserError(f"{path}: not one of {', '.join(FILE_KINDS)} (text also as .gz)")
    return {"train": itertools.chain.from_iterable(map(read_file, paths))}


def read_file(path: str) -> Iterator[dict]:
    """The raw records of a file. Raises UserError that says where, if it cannot be read."""
    read = read_parquet if file_kind(path) == ".parquet" else read_text
    number = 1
    try:
        for raw_record in read(path):
            if not isinstance(raw_record, dict):
                raise ValueError("not a JSON object")  # noqa: TRY004, as json's own errors
            yield raw_record
            number += 1
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{path}: row {number} cannot be read ({first_line(error)})") from None


def read_text(path: str) -> Iterator[dict]:
    """Raw records of CSV with a header, of JSON lines, or of one JSON array.

    It uses the standard library. The readers of the datasets library guess types: a reply "None"
    becomes no reply, "007" becomes 7.0 and "2020-01-01" a date.
    """
    open_file = gzip.open if path.endswith(".gz") else open
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        if file_kind(path) == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default refuses a cell over 128 KiB
            yield from csv.DictReader(file)
        elif file.read(1) == "[":
            file.seek(0)
            yield from json.load(file)
        else:
            file.seek(0)
            for line in file:
                if line.strip():
                    yield json.loads(line)


def read_parquet(path: str) -> Iterator[dict]:
    """Raw records of a parquet file. The library's copy of them goes to a temporary folder."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.Dataset.from_parquet(path, cache_dir=cache)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(first_line(error.__cause__ or error)) from None
        yield from loaded


def read_hub(name: str, split: str | None = None) -> dict[str, Iterable[dict]]:
    """The raw records of a set on the hub: one split as "train", or its own "train" and "test"."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {name} from the hub ({first_line(error)}): "
            "give a local file, or run this where the hub can be reached"
        ) from None
    if split:
        return {"train": loaded}
    if "train" not in loaded:
        raise UserError(f"{name}: name a split by --split, one of {', '.join(loaded)}")
    splits = {"train": loaded["train"]}
    for test_split in ("test", "validation"):  # OpenAssistant has the latter
        if test_split in loaded:
            splits["test"] = loaded[test_split]
            break
    return splits


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------------ writing


def separate(
    records: dict[str, list[Record]], test_fraction: float, seed: int
) -> tuple[list[Record], list[Record], int]:
    """Training and test records without a common prompt, each shuffled, and how many were dropped.

    If the set has a test split, it is kept, and its prompts are dropped from the training records.
    Otherwise, a share `test_fraction` of the prompts, at least one, is drawn for the test records.
    The draw does not depend on the order of the records.
    """
    rng = random.Random(seed)
    train = records["train"]
    test = records["test"]
    if test:
        held_out = {record["prompt"] for record in test}
    else:
        prompts = sorted({record["prompt"] for record in train})
        held_out = set(rng.sample(prompts, max(1, round(len(prompts) * test_fraction))))
        test = [record for record in train if record["prompt"] in held_out]
    train = [record for record in train if record["prompt"] not in held_out]
    if not train:
        raise UserError("no prompt is left to train on: there are too few, or all are held out")
    num_read = len(records["train"]) + len(records["test"])
    num_dropped = num_read - len(train) - len(test)
    shuffled_train = rng.sample(train, len(train))
    shuffled_test = rng.sample(test, len(test))
    return shuffled_train, shuffled_test, num_dropped


def check_out(out: Path) -> None:
    """Raise UserError for a folder that holds something already."""
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"{out}: is there and not empty; remove it or name another folder")


def write(out: Path, train: list[Record], test: list[Record], counts: dict) -> None:
    """Write the folder that a trainer reads, the whole of it or nothing."""
    out = out.resolve()
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, records in (("train", train), ("test", test)):
            # Some scraped replies have unpaired surrogates, which cannot be encoded: "replace".
            path = partial / f"{name}.jsonl"
            with path.open("w", encoding="utf-8", errors="replace") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        (partial / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(out: Path, sources: dict[str, tuple], test_fraction: float = 0.1, seed: int = 1) -> None:
    """Convert, separate, write and print what was counted.

    sources: name to (raw records by split, function that converts them, what is counted).
    """
    records = {"train": [], "test": []}
    counts_of_sources = {}
    for name, (splits, convert, unit) in sources.items():
        counts = Counts(unit)
        for split, raw_records in splits.items():
            records[split].extend(convert(raw_records, counts, seed))
        if not counts.kept:
            raise UserError(f"{name}: no usable rows ({counts})")
        print(f"{name}: {counts}")
        counts_of_sources[name] = vars(counts)
    train, test, num_dropped = separate(records, test_fraction, seed)
    sizes = {"train": len(train), "test": len(test), "dropped, prompt is in test": num_dropped}
    write(out, train, test, {"seed": seed, "sources": counts_of_sources, "rows": sizes})
    print(f"{out}: rows {', '.join(f'{name}: {size}' for name, size in sizes.items())}")


# ---------------------------------------------------------- what trainers and the command line call


def report_sources(files: dict[str, list[str] | None]) -> dict[str, tuple]:
    """Sources for `make`, of the report's sets. files: name to local files, or None for the hub."""
    sources = {}
    for name, paths in files.items():
        hub_id, convert, unit = REPORT_SETS[name]
        splits = read_files(paths) if paths else read_hub(hub_id)
        sources[name] = (splits, convert, unit)
    return sources


def cache_folder() -> Path:
    """Where the prepared mixture is kept: `archangel` in $HALOS_CACHE, or in ~/.cache/halos."""
    return Path(os.environ.get("HALOS_CACHE") or Path.home() / ".cache" / "halos") / "archangel"


def prepare() -> Path:
    """The folder of the report's mixture. If it does not exist, it is made from the hub.

    Raises UserError if the hub cannot be reached.
    """
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one of several processes prepares it, the others wait
        if not (folder / "train.jsonl").is_file():
            try:
                make(folder, report_sources(dict.fromkeys(REPORT_SETS)))
            except UserError as error:
                raise UserError(
                    f"--data archangel is not prepared: {error}; or train on --data toy, or "
                    "prepare it by python -m archangel.data archangel --hh F --oasst F --shp F"
                ) from None
    return folder


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that has a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded ({first_line(error)})") from None
    if not tokenizer.chat_template:
        raise UserError(f"--tokenizer {name}: has no chat template")
    return tokenizer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: a command for each of the report's sets, their mixture, and any other."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.data", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    for name, (hub_id, _, _) in REPORT_SETS.items():
        command = add_command(name, f"{hub_id} as preference rows")
        command.add_argument(
            "--input",
            action="append",
            metavar="FILE",
            help="local file; repeatable (default: read from the hub)",
        )
        add_common_arguments(command)

    command = add_command("archangel", f"the report's mixture of {', '.join(REPORT_SETS)}")
    for name in REPORT_SETS:
        command.add_argument(
            f"--{name}",
            action="append",
            metavar="FILE",
            help="local file; repeatable; with any, the sets not given are left out (default: all "
            "from the hub)",
        )
    add_common_arguments(command, default_out=cache_folder())

    command = add_command("rows", "any other set of preferences, labelled or supervised examples")
    command.add_argument("--input", required=True, help="local file or hub id")
    command.add_argument(
        "--split", help="the one split of the hub's to read (default: train and test)"
    )
    command.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="its chat template writes messages, text stays as it is (default: Human, Assistant)",
    )
    add_common_arguments(command)
    return parser.parse_args(arguments)


def add_common_arguments(command: argparse.ArgumentParser, default_out: Path | None = None) -> None:
    """The arguments that all commands have. Without a default, --out is required."""
    default = "required" if default_out is None else f"default: {default_out}"
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=default_out,
        required=default_out is None,
        help=f"new or empty folder to write ({default})",
    )
    command.add_argument(
        "--test_fraction",
        type=float,
        default=0.1,
        help="share of prompts to hold out, if no test split is there (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=int, default=1, help="of all draws and shuffles (default: %(default)s)"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands. Raises UserError for anything wrong with what was given."""
    args = parse(arguments)
    check_out(args.out)
    if not 0 < args.test_fraction < 1:
        raise UserError(f"--test_fraction {args.test_fraction}: must lie between 0 and 1")
    if args.command == "rows":
        sources = {args.input: other_source(args)}
    elif args.command == "archangel":
        files = {name: getattr(args, name) for name in REPORT_SETS}
        if any(files.values()):  # the sets not given are left out
            files = {name: paths for name, paths in files.items() if paths}
        sources = report_sources(files)
    else:
        sources = report_sources({args.command: args.input})
    make(args.out, sources, args.test_fraction, args.seed)


def other_source(args: argparse.Namespace) -> tuple:
    """The source for `make` of the command `rows`."""
    is_file = Path(args.input).exists() or file_kind(args.input) in FILE_KINDS
    if is_file and args.split:
        raise UserError(f"--split {args.split}: the local {args.input} has no splits")
    tokenizer = None
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    splits = read_files([args.input]) if is_file else read_hub(args.input, args.split)
    return splits, functools.partial(any_set, tokenizer=tokenizer), "rows"


if __name__ == "__main__":
    with exit_status():
        main()
