"""The report's data, and any other preference data, as the rows that a trainer reads.

The report (section 3.4) aligns every model on one mixture of three sets: Anthropic HH,
OpenAssistant, and "the subset of SHP recommended in the original release". Its SFT targets are "a
subset of the generations used to subsequently align the model". This file makes those rows, and the
rows of any other set in the field's usual shapes. A row is one JSON object in one of three forms:

    preference   {"prompt", "chosen", "rejected"}, and "target" where SFT imitates another reply
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

from archangel.command import exit_status
from archangel.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
NOT_SHARED = "no shared opening up to the last Assistant turn"
MIN_SCORE_RATIO = 2  # SHP: smaller differences are mostly noise
MAX_PAIRS_PER_PROMPT = 5  # SHP: else a few busy posts outweigh the rest

Row = dict[str, str | bool]


# ---- counting ----------------------------------------------------------------------------------


class Dropped(Exception):
    """Something read that gives no row; the message is the reason."""


@dataclasses.dataclass
class Counts:
    """What became of all that one source held: `read == kept + sum(dropped.values())`."""

    unit: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = "; ".join(f"{reason}: {number}" for reason, number in self.dropped.most_common())
        text = f"read {self.read} {self.unit}, kept {self.kept}, dropped {self.dropped.total()}"
        return f"{text} ({reasons})" if reasons else text


def convert_each(raw_rows: Iterable[dict], to_row: Callable, counts: Counts) -> Iterator:
    """Yield `to_row(raw_row)` for every raw row that is not `Dropped`, and count both kinds."""
    for raw_row in tqdm(raw_rows, unit=f" {counts.unit}", disable=None):
        counts.read += 1
        try:
            row = to_row(raw_row)
        except Dropped as reason:
            counts.dropped[str(reason)] += 1
        else:
            counts.kept += 1
            yield row


def field(row: dict, name: str, kind: type | tuple = str) -> object:
    """The value of a column, which must be there and of that kind (text unless said)."""
    if not isinstance(row.get(name), kind):
        raise Dropped(f"no usable {name!r} among the columns {', '.join(map(str, row))}")
    return row[name]


def preference(prompt: str, chosen: str, rejected: str, target: str | None = None) -> Row:
    """A preference row; `target`, the reply that SFT imitates, is left out where it is `chosen`."""
    if not chosen.strip() or not rejected.strip():
        raise Dropped("empty reply")
    if chosen.strip() == rejected.strip():
        raise Dropped("identical replies")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row if target in (None, chosen) else {**row, "target": target}


# ---- the report's three sets: raw rows -> preference rows --------------------------------------


def hh(raw_rows: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Row]:
    """Anthropic HH: two dialogues that part at the last reply; what they share is the prompt."""
    pair = ("chosen", "rejected")
    return convert_each(raw_rows, lambda row: any_row({k: field(row, k) for k in pair}), counts)


def oasst(raw_rows: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Row]:
    """OpenAssistant: every English set of ranked sibling replies gives its adjacent pairs.

    Takes exported trees or the hub's flat messages. The prompt is the conversation from the root;
    rank 0 is best. The SFT target is the best sibling (the authors' code took the worst). What is
    counted is the assistant's replies, of which `n` ranked siblings give `n - 1` rows.
    """
    raw_rows = list(raw_rows)
    try:
        exported = raw_rows and "prompt" in raw_rows[0]
        trees = [row["prompt"] for row in raw_rows] if exported else nest(raw_rows)
        for tree in tqdm(trees, unit=" trees", disable=None):
            for prompt, replies, fault in conversations(tree):
                yield from adjacent_pairs(prompt, replies, fault, counts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"oasst: neither exported trees nor flat messages ({error!r})") from None


def nest(messages: list[dict]) -> list[dict]:
    """The roots of the hub's flat messages, each message with a list of its `replies`."""
    known = {message["message_id"]: {**message, "replies": []} for message in messages}
    # What answers a message that is not there has lost its prompt: as below a deleted one.
    absent = {"text": "", "role": "prompter", "deleted": True, "replies": []}
    roots = [absent]
    for message in known.values():
        parent = message.get("parent_id")
        siblings = known.get(parent, absent)["replies"] if parent else roots
        siblings.append(message)
    return roots


def conversations(
    message: dict, opening: str = "", fault: str | None = None
) -> Iterator[tuple[str, list[dict], str | None]]:
    """(prompt, replies, fault) of each person's turn from `message` down.

    `fault` says why nothing there can be used: this message, or one above it, cannot.
    """
    fault = fault or unusable(message)
    opening += turn("user" if message["role"] == "prompter" else "assistant", message["text"])
    if message["role"] == "prompter":
        yield opening + ASSISTANT, message["replies"], fault
    for reply in message["replies"]:
        yield from conversations(reply, opening, fault)


def unusable(message: dict) -> str | None:
    """Why an OpenAssistant message and all below it are left out; None where they are not."""
    if message.get("deleted"):
        return "deleted, or below a deleted message"
    if message.get("lang", "en") != "en":
        return "not English, or below a message that is not"
    if not message["text"].strip():
        return "empty, or below an empty message"
    return None


def adjacent_pairs(
    prompt: str, replies: list[dict], fault: str | None, counts: Counts
) -> Iterator[Row]:
    """The rows of one set of siblings: rank 0 over rank 1, rank 1 over rank 2, and so on."""
    best_first = []
    for reply in sorted(replies, key=lambda reply: reply.get("rank") or 0):
        text = said(reply["text"])
        reason = fault or unusable(reply)
        if not reason and reply.get("rank") is None:
            reason = "not ranked"
        if not reason and text in best_first:
            reason = "identical replies"
        if reason:
            counts.dropped[reason] += 1
        else:
            best_first.append(text)
    counts.read += len(replies)
    if len(best_first) == 1:
        counts.dropped["no other ranked reply to compare with"] += 1
    else:
        counts.kept += len(best_first)
    for better, worse in itertools.pairwise(best_first):
        yield preference(prompt, better, worse, target=best_first[0])


def shp(raw_rows: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Row]:
    """Stanford Human Preferences: the subset that its authors recommend.

    Pairs whose scores differ at least twofold, and of these at most five a prompt, drawn by `seed`.
    The SFT target is the best-scored reply in all of a prompt's twofold pairs.
    """
    pairs, best = defaultdict(list), {}
    for row, scored in convert_each(raw_rows, shp_pair, counts):
        prompt = row["prompt"]
        pairs[prompt].append(row)
        best[prompt] = max(scored, best.get(prompt, scored))
    draw = random.Random(seed)
    for prompt, rows in pairs.items():
        drawn = draw.sample(rows, min(len(rows), MAX_PAIRS_PER_PROMPT))
        if surplus := len(rows) - len(drawn):
            counts.kept -= surplus
            counts.dropped[f"more than {MAX_PAIRS_PER_PROMPT} pairs of one prompt"] += surplus
        for row in drawn:
            yield preference(**row, target=best[prompt][1])


def shp_pair(row: dict) -> tuple[Row, tuple[float, str]]:
    """An SHP row as a preference row, and (score, text) of its better-scored reply."""
    number = (int, float)
    if field(row, "score_ratio", number) < MIN_SCORE_RATIO:
        raise Dropped(f"score ratio below {MIN_SCORE_RATIO}")
    a, b = said(field(row, "human_ref_A")), said(field(row, "human_ref_B"))
    chosen, rejected = (a, b) if field(row, "labels", int) == 1 else (b, a)  # 1: A is preferred
    pair = preference(turn("user", field(row, "history")) + ASSISTANT, chosen, rejected)
    return pair, max((field(row, "score_A", number), a), (field(row, "score_B", number), b))


# name -> (hub id, what converts it, what is counted)
REPORT_SETS = {
    "hh": ("Anthropic/hh-rlhf", hh, "pairs of dialogues"),
    "oasst": ("OpenAssistant/oasst1", oasst, "replies"),
    "shp": ("stanfordnlp/SHP", shp, "pairs"),
}


# ---- any other set: raw rows -> rows -----------------------------------------------------------


def any_set(
    raw_rows: Iterable[dict], counts: Counts, seed: int = 1, tokenizer=None
) -> Iterator[Row]:
    """Preferences, labelled or supervised examples, as text or messages."""
    return convert_each(raw_rows, lambda row: any_row(row, tokenizer), counts)


def any_row(row: dict, tokenizer=None) -> Row:
    """The row that a raw row of one of the field's usual shapes stands for."""
    if {"chosen", "rejected"} <= row.keys():
        given = row.get("prompt")
        prompt, chosen = split_dialogue(given, row["chosen"], tokenizer)
        other_prompt, rejected = split_dialogue(given, row["rejected"], tokenizer)
        if prompt != other_prompt:
            raise Dropped(NOT_SHARED)
        return preference(prompt, chosen, rejected)
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = split_dialogue(row["prompt"], row["completion"], tokenizer)
    elif "messages" in row:
        prompt, completion = split_dialogue(None, row["messages"], tokenizer)
    else:
        raise Dropped(f"unknown columns {', '.join(map(str, row))}")
    if not completion.strip():
        raise Dropped("empty reply")
    example = {"prompt": prompt, "completion": completion}
    if "label" not in row:
        return example
    label = str(row["label"]).lower()  # CSV has text, and some sets 0 and 1
    if label not in ("true", "1", "false", "0"):
        raise Dropped("label neither true nor false")
    return {**example, "label": label in ("true", "1")}


def split_dialogue(prompt, reply, tokenizer=None) -> tuple[str, str]:
    """(prompt, completion) as text, from text or from lists of {"role", "content"} messages.

    Text with a prompt of its own stays as it is. A reply is the whole dialogue where `prompt` is
    None, and where it is messages that open with another turn than the assistant's.
    """
    if isinstance(reply, str) and isinstance(prompt, str):
        return prompt, reply
    if isinstance(reply, str) and prompt is None:
        opening, found, last = reply.rpartition(ASSISTANT)
        if not found:
            raise Dropped(NOT_SHARED)
        return opening + ASSISTANT, said(last)
    messages, answer = as_messages(prompt or [], "user"), as_messages(reply, "assistant")
    follows = answer and answer[0]["role"] == "assistant"
    messages = messages + answer if follows else answer
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Dropped("not messages that end in the assistant's answer")
    if not messages[-1]["content"].strip():
        raise Dropped("empty reply")
    if tokenizer is not None:
        return apply_template(messages, tokenizer)
    opening = "".join(turn(message["role"], message["content"]) for message in messages[:-1])
    return opening + ASSISTANT, said(messages[-1]["content"])


def as_messages(value, role: str) -> list[dict[str, str]]:
    """A list of messages with nothing but role and content; text is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Dropped("neither text nor a list of messages")
    return [{key: field(message, key) for key in ("role", "content")} for message in value]


def said(text: str) -> str:
    """What follows a role in the HH form."""
    return " " + text.strip()


def turn(role: str, text: str) -> str:
    """One turn in the HH form, which has no name for other roles: they keep their own."""
    opening = {"user": HUMAN, "assistant": ASSISTANT}.get(role, f"\n\n{role.capitalize()}:")
    return opening + said(text)


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


# ---- reading -----------------------------------------------------------------------------------

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def file_kind(path: str) -> str:
    """The suffix of a file's name, a last `.gz` left out."""
    return Path(path.removesuffix(".gz")).suffix


def read_files(paths: list[str]) -> dict[str, Iterable[dict]]:
    """The raw rows of local files; they are all in one split."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no file of that name")
        if file_kind(path) not in FILE_KINDS:
            raise UserError(f"{path}: not one of {', '.join(FILE_KINDS)} (text also as .gz)")
    return {"train": itertools.chain.from_iterable(map(read_file, paths))}


def read_file(path: str) -> Iterator[dict]:
    """The raw rows of a file; what cannot be read becomes a `UserError` that says where."""
    number = 1
    try:
        for row in read_parquet(path) if file_kind(path) == ".parquet" else read_text(path):
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")  # noqa: TRY004, as json's own errors
            yield row
            number += 1
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{path}: row {number} cannot be read ({first_line(error)})") from None


def read_text(path: str) -> Iterator[dict]:
    """Raw rows of CSV with a header, of JSON lines, or of one JSON array.

    By the standard library: the readers of the datasets library guess types, so that a reply
    "None" becomes no reply, "007" becomes 7.0 and "2020-01-01" a date.
    """
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        if file_kind(path) == ".csv":
            csv.field_size_limit(2**31 - 1)  # the default refuses a cell over 128 KiB
            yield from csv.DictReader(file)
        elif file.read(1) == "[":
            file.seek(0)
            yield from json.load(file)
        else:
            file.seek(0)
            yield from (json.loads(line) for line in file if line.strip())


def read_parquet(path: str) -> Iterator[dict]:
    """Raw rows of a parquet file; the library's copy of them goes to a temporary folder."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.Dataset.from_parquet(path, cache_dir=cache)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(first_line(error.__cause__ or error)) from None
        yield from loaded


def read_hub(name: str, split: str | None = None) -> dict[str, Iterable[dict]]:
    """The raw rows of a set on the hub: one split as "train", or its own "train" and "test"."""
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
    test = "test" if "test" in loaded else "validation"  # OpenAssistant has the latter
    return {"train": loaded["train"]} | ({"test": loaded[test]} if test in loaded else {})


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- writing -----------------------------------------------------------------------------------


def separate(
    rows: dict[str, list[Row]], test_fraction: float, seed: int
) -> tuple[list[Row], list[Row], int]:
    """(train, test, dropped): no prompt is in both, and each is shuffled by `seed`.

    A set's own test split stays one, and its prompts leave the training rows (`dropped`). Without
    one, `seed` draws `test_fraction` of the prompts, at least one, whatever the order of the rows.
    """
    draw = random.Random(seed)
    train, test = rows["train"], rows["test"]
    if test:
        held_out = {row["prompt"] for row in test}
    else:
        prompts = sorted({row["prompt"] for row in train})
        held_out = set(draw.sample(prompts, max(1, round(len(prompts) * test_fraction))))
        test = [row for row in train if row["prompt"] in held_out]
    train = [row for row in train if row["prompt"] not in held_out]
    if not train:
        raise UserError("no prompt is left to train on: there are too few, or all are held out")
    dropped = sum(map(len, rows.values())) - len(train) - len(test)
    return draw.sample(train, len(train)), draw.sample(test, len(test)), dropped


def check_out(out: Path) -> None:
    """Refuse a folder that holds something already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there and not empty; remove it or name another folder")


def write(out: Path, train: list[Row], test: list[Row], counts: dict) -> None:
    """Write the folder that a trainer reads: beside `out` first, then renamed in one step."""
    out = out.resolve()
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        for name, rows in (("train", train), ("test", test)):
            # "replace": half a surrogate pair, as some scraped replies have, is no text
            with open(beside / f"{name}.jsonl", "w", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (beside / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def make(out: Path, sources: dict[str, tuple], test_fraction: float = 0.1, seed: int = 1) -> None:
    """Convert, separate, write and report.

    `sources`: name -> (raw rows by split, what converts them, the unit that it counts).
    """
    rows, record = {"train": [], "test": []}, {}
    for name, (splits, convert, unit) in sources.items():
        counts = Counts(unit)
        for split, raw_rows in splits.items():
            rows[split] += convert(raw_rows, counts, seed)
        if not counts.kept:
            raise UserError(f"{name}: no usable rows ({counts})")
        print(f"{name}: {counts}")
        record[name] = vars(counts)
    train, test, dropped = separate(rows, test_fraction, seed)
    sizes = {"train": len(train), "test": len(test), "dropped, prompt is in test": dropped}
    write(out, train, test, {"seed": seed, "sources": record, "rows": sizes})
    print(f"{out}: rows {', '.join(f'{name}: {size}' for name, size in sizes.items())}")


# ---- what trainers and the command line call ---------------------------------------------------


def report_sources(files: dict[str, list[str] | None]) -> dict[str, tuple]:
    """The named ones of the report's sets, for `make`: from local files, or else from the hub."""
    sources = {}
    for name, paths in files.items():
        hub_name, convert, unit = REPORT_SETS[name]
        sources[name] = (read_files(paths) if paths else read_hub(hub_name), convert, unit)
    return sources


def cache_folder() -> Path:
    """Where the prepared mixture is kept: `archangel` in $HALOS_CACHE, or in ~/.cache/halos."""
    return Path(os.environ.get("HALOS_CACHE") or Path.home() / ".cache" / "halos") / "archangel"


def prepare() -> Path:
    """The folder of the report's mixture, made from the hub where it is not there yet.

    Raises `UserError` where the hub cannot be reached.
    """
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes one prepares, the others find it done
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
    about = {
        name: f"{hub_name} as preference rows" for name, (hub_name, _, _) in REPORT_SETS.items()
    }
    about["archangel"] = "the report's mixture of " + ", ".join(REPORT_SETS)
    about["rows"] = "any other set of preferences, labelled or supervised examples"
    for name, text in about.items():
        add = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        ).add_argument
        file = {"action": "append", "metavar": "FILE"}
        if name in REPORT_SETS:
            add("--input", **file, help="local file; repeatable (default: read from the hub)")
        elif name == "rows":
            add("--input", required=True, help="local file or hub id")
            add("--split", help="the one split of the hub's to read (default: train and test)")
            text = (
                "its chat template writes messages, text stays as it is (default: Human, Assistant)"
            )
            add("--tokenizer", metavar="NAME_OR_FOLDER", help=text)
        else:
            text = "local file; repeatable; with any, the sets not given are left out"
            for source in REPORT_SETS:
                add(f"--{source}", **file, help=f"{text} (default: all from the hub)")
        default = cache_folder() if name == "archangel" else None
        text = f"new or empty folder to write ({f'default: {default}' if default else 'required'})"
        add("--out", type=Path, metavar="DIR", default=default, required=not default, help=text)
        text = "share of prompts to hold out, if no test split is there (default: %(default)s)"
        add("--test_fraction", type=float, default=0.1, help=text)
        add("--seed", type=int, default=1, help="of all draws and shuffles (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit status 2, with one line, for anything wrong with what was given."""
    args = parse(arguments)
    with exit_status():
        check_out(args.out)
        if not 0 < args.test_fraction < 1:
            raise UserError(f"--test_fraction {args.test_fraction}: must lie between 0 and 1")
        if args.command == "rows":
            is_file = Path(args.input).exists() or file_kind(args.input) in FILE_KINDS
            if is_file and args.split:
                raise UserError(f"--split {args.split}: the local {args.input} has no splits")
            tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
            splits = read_files([args.input]) if is_file else read_hub(args.input, args.split)
            convert = functools.partial(any_set, tokenizer=tokenizer)
            sources = {args.input: (splits, convert, "rows")}
        elif args.command == "archangel":
            given = {name: getattr(args, name) for name in REPORT_SETS}
            some = {name: files for name, files in given.items() if files}
            sources = report_sources(some or given)
        else:
            sources = report_sources({args.command: args.input})
        make(args.out, sources, args.test_fraction, args.seed)


if __name__ == "__main__":
    main()
