"""The report's data, and a look at what a trainer makes of any data.

The report (section 3.4) aligns every model on one mixture of three sets: Anthropic HH,
OpenAssistant, and "the subset of SHP recommended in the original release". Its SFT targets are "a
subset of the generations used to subsequently align the model". This file makes preference records
of them: {"prompt", "chosen", "rejected"}, and "target" if SFT imitates another reply.

Conversations are written as HH writes them: a turn opens with "\\n\\nHuman:" or
"\\n\\nAssistant:", a prompt ends in "\\n\\nAssistant:", and a completion begins with a space.

    python -m archangel.data hh --input harmless-base.jsonl.gz --out records/hh
    python -m archangel.data oasst --input oasst_trees.jsonl.gz --out records/oasst
    python -m archangel.data shp --out records/shp           # without --input: from the hub
    python -m archangel.data archangel                       # the mixture, for `--data archangel`
    python -m archangel.data show --data pairs.parquet --model toy

The first four write `train.jsonl`, `test.jsonl` (no prompt is in both) and `counts.json`: what was
read, what was kept, what was dropped and why. Other data needs no conversion: the trainers' --data
reads it, and archangel/records.py says in which formats. `show` prints what would be trained on.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from archangel.errors import UserError, exit_status
from archangel.records import FORMATS, HH_TURN, Source, cache_folder, find_sources, iter_values
from archangel.run import find_model, load_tokenizer
from archangel.tokenized import in_records, load_tokens
from archangel.tokens import COMPLETIONS, LeftOut, split_dialogues

HUMAN = "\n\nHuman:"
ASSISTANT = HH_TURN
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
        if not all(ASSISTANT in dialogue for dialogue in dialogues.values()):
            raise Dropped(NOT_SHARED)
        try:
            prompt, replies = split_dialogues(dialogues)
        except LeftOut:
            raise Dropped(NOT_SHARED) from None
        return preference(
            prompt, completion_text(replies["chosen"]), completion_text(replies["rejected"])
        )

    return convert_each(raw_records, convert, counts)


def as_messages(dialogue: str) -> list[dict]:
    """HH's "\\n\\nHuman: ...\\n\\nAssistant:" as messages.

    A final assistant turn without text, which marks where the reply begins, is removed. Raises
    LeftOut for a dialogue that has empty turns or turns that do not alternate.
    """
    opening, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": text.strip()})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    if opening.strip() or len(messages) % 2 == 0:
        raise LeftOut("turns that do not alternate")
    for number, message in enumerate(messages):
        if message["role"] != ("user" if number % 2 == 0 else "assistant"):
            raise LeftOut("turns that do not alternate")
        if not message["content"]:
            raise LeftOut("an empty turn")
    return messages


def oasst(raw_records: Iterable[dict], counts: Counts, seed: int = 1) -> Iterator[Record]:
    """OpenAssistant: every set of ranked English replies to a message gives its adjacent pairs.

    The prompt is the conversation from the root; rank 0 is best. The SFT target is the best reply.
    (The authors' code took the rejected reply of the pair that was read last.) `n` ranked replies
    give `n - 1` records. The assistant's replies are counted.

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


# --------------------------------------------------------------------------------- HH's format


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


# ------------------------------------------------------------------------------------------ reading


def read_files(paths: list[str]) -> dict[str, Iterable[dict]]:
    """The raw records of local files, all as one split."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no file of that name")
    return {"train": iter_dicts(Source(", ".join(paths), [Path(path) for path in paths]))}


def read_hub(name: str) -> dict[str, Iterable[dict]]:
    """The raw records of a set on the hub: its splits "train" and, if there is one, "test"."""
    return {split: iter_dicts(source) for split, source in find_sources(name).items()}


def iter_dicts(source: Source) -> Iterator[dict]:
    """The raw records of a source. Raises UserError for anything else."""
    for where, value in iter_values(source):
        if not isinstance(value, dict):
            raise UserError(f"{where}: is not a JSON object")
        yield value


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


def prepare_mixture(data: str | list[str]) -> None:
    """If `data` is "archangel", make the report's mixture from the hub, unless it is there already.

    Raises UserError if the hub cannot be reached.
    """
    if data not in ("archangel", ["archangel"]):
        return
    folder = cache_folder() / "archangel"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one of several processes prepares it, the others wait
        if (folder / "train.jsonl").is_file():
            return
        try:
            make(folder, report_sources(dict.fromkeys(REPORT_SETS)))
        except UserError as error:
            raise UserError(
                f"--data archangel is not prepared: {error}; or train on --data toy, or "
                "prepare it by python -m archangel.data archangel --hh F --oasst F --shp F"
            ) from None


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
    add_common_arguments(command, default_out=cache_folder() / "archangel")

    command = add_command("show", "what a trainer would be given: counts, and examples as tokens")
    command.add_argument(
        "--data", nargs="+", required=True, help="as the trainers take it; see archangel/records.py"
    )
    command.add_argument("--model", required=True, help="whose tokenizer; as the trainers take it")
    command.add_argument("--n", type=int, default=5, help="records to show (default: %(default)s)")
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
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["rows"]:
        raise UserError(
            "rows: no conversion is needed any more; give the file, folder or hub id to a "
            "trainer's --data"
        )
    args = parse(arguments)
    if args.command == "show":
        show(args.data, args.model, args.n)
        return
    check_out(args.out)
    if not 0 < args.test_fraction < 1:
        raise UserError(f"--test_fraction {args.test_fraction}: must lie between 0 and 1")
    if args.command == "archangel":
        files = {name: getattr(args, name) for name in REPORT_SETS}
        if any(files.values()):  # the sets not given are left out
            files = {name: paths for name, paths in files.items() if paths}
        sources = report_sources(files)
    else:
        sources = report_sources({args.command: args.input})
    make(args.out, sources, args.test_fraction, args.seed)


def show(data: list[str], model: str, num_shown: int) -> None:
    """Print what a trainer would be given: counts, and the first records as tokens."""
    prepare_mixture(data)
    tokenizer = load_tokenizer(find_model(model))
    for split, records in zip(("train", "test"), load_tokens(data, tuple(FORMATS), tokenizer)):
        if records.counts["read"] == 0:
            continue
        counts = records.counts
        print(f"{split}: {counts['source']}: {in_records(counts['read'])}, {counts['used']:,} used")
        for name, found in counts["formats"].items():
            print(f"    {name}: {in_records(found['records'])}, the first is {found['first']}")
        for line in records.describe():
            print(f"    {line}")
        for number in range(min(num_shown, len(records)) if split == "train" else 0):
            print(f"\n{records.place(number)}")
            for name in ("prompt", *COMPLETIONS):
                if not records.has(number, name):
                    continue
                ids = records.read(number, name).tolist()
                pieces = "│".join(tokenizer.decode([token_id]) for token_id in ids)
                print(f"{name}, {len(ids)} tokens: {json.dumps(pieces, ensure_ascii=False)}")
            if records.label[number] is not None:
                print(f"label: {records.label[number]}")
        print()


if __name__ == "__main__":
    with exit_status():
        main()
