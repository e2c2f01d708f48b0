"""Rows as JSONL to token ids, and in which order: what the trainers read."""

import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from archangel.command import UserError, progress

TOY = Path(__file__).parent / "toy_world"  # model/ and data/: all runs offline
FIELDS = {  # what a row may hold; a script names the forms that its loss can learn from
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "supervised": ("prompt", "completion"),
}
LONGEST_ROW = 2**26  # bytes: a small compressed file may hold a row that fills the memory
EVAL_ROWS = 512  # held-out rows measured, as many as the prompts that the authors judged


def read_rows(data: str, split: str, forms: Sequence[str]) -> list[dict]:
    """The rows of a split (train, test), each with the fields of the first of `forms` it has.

    data: `toy`, `archangel`, a folder with train.jsonl and test.jsonl (or .jsonl.gz), or one such
    file, all of it for training. A preference row may carry a `target`, the text that SFT and SLiC
    imitate. Raises UserError with file and row; a data set without test rows gives none.
    """
    if data == "archangel":
        from archangel.data import prepare  # the report's mixture, prepared when first asked for

        data = prepare()
    path = TOY / "data" if data == "toy" else Path(data)
    if path.is_dir():
        plain, zipped = path / f"{split}.jsonl", path / f"{split}.jsonl.gz"
        path = zipped if zipped.exists() and not plain.exists() else plain
    elif split == "test":
        return []
    if split == "test" and not path.exists():
        return []
    rows, where = [], f"--data {path}"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW), b""), 1):
                where = f"{path}, row {number}"
                if len(line) == LONGEST_ROW:
                    raise ValueError(f"is longer than {LONGEST_ROW} bytes")
                if line := line.decode("utf-8-sig").strip():
                    row = json.loads(line, object_pairs_hook=_fields_once)
                    rows.append(_check_row(row, forms))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        known = path.name.endswith((".jsonl", ".jsonl.gz")) or not path.exists()
        hint = "" if known else "; python -m archangel.data rows makes JSONL of other files"
        raise UserError(f"{where}: {str(error) or type(error).__name__}{hint}") from None
    if not rows and split == "train":
        raise UserError(f"--data {path}: has no rows")
    return rows


def read_data(data: str, forms: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The rows to train on, and at most EVAL_ROWS held out, in an order drawn once for all runs.

    Drawn, because in a sorted file the first rows, or a whole batch, may be of one class.
    """
    rows, held_out = (read_rows(data, split, forms) for split in ("train", "test"))
    order = endless(len(held_out), (0,), 0, min(len(held_out), EVAL_ROWS))
    return rows, [held_out[i] for i in order]


def _fields_once(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # JSON readers differ in which of the two they take
        raise ValueError("has a field twice")
    return fields


def _check_row(row, forms: Sequence[str]) -> dict:
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    form = next((FIELDS[form] for form in forms if row.keys() >= set(FIELDS[form])), None)
    if form is None:
        needed = " or ".join("{" + ", ".join(FIELDS[form]) + "}" for form in forms)
        raise ValueError(f"has {sorted(row)}; this loss needs {needed}")
    row = {field: row[field] for field in (*form, "target") if field in row}
    for field, value in row.items():
        kind, name = (bool, "true or false") if field == "label" else (str, "text")
        if not isinstance(value, kind):
            raise ValueError(f"{field} must be {name}, not {value!r:.40}")
        if kind is str and field != "prompt" and not value.strip():
            raise ValueError(f"{field} is empty")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text: ValueError
    return row


def tokenise(texts: list[tuple[str, list[str]]], tokenizer, config) -> list[dict]:
    """(prompt, completions) to examples {"prompt_ids": (P,), "completions_ids": [(C,), ...]}.

    Prompt and completions are encoded apart, so that no token straddles the border; the text of a
    special token stays text. The end-of-sequence token ends every completion that is not cut. What
    is too long loses prompt first, down to --max_prompt_length, then completion.
    """
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    has_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]  # it adds one itself
    bos, eos = [tokenizer.bos_token_id] * has_bos, [tokenizer.eos_token_id]
    examples = []
    for begin in progress(range(0, len(texts), 1000), "tokenise"):
        chunk = texts[begin : begin + 1000]
        prompts = encode([prompt for prompt, _ in chunk])["input_ids"]
        encoded = iter(
            encode([text for _, completions in chunk for text in completions])["input_ids"]
        )
        for (_, completions), prompt in zip(chunk, prompts):
            completions = [next(encoded) + eos for _ in completions]
            longest = max(len(ids) for ids in completions)
            keep = max(config.max_prompt_length, config.max_length - longest) - len(bos)
            first = max(0, len(prompt) - keep) if config.truncate_prompt == "start" else 0
            # Something must come before a completion's first token to predict it from.
            prompt = np.array(bos + prompt[first : first + keep] or eos, dtype=np.int32)
            room = config.max_length - len(prompt)
            ids = [np.array(ids[:room], dtype=np.int32) for ids in completions]
            examples.append({"prompt_ids": prompt, "completions_ids": ids})
    return examples


def add_partners(examples: list[dict], config) -> None:
    """For KTO's --kl mismatched, give each example a partner: its prompt with another's completion.

    The other has another prompt. Drawn once, by --seed; cut to --max_length.
    """
    prompts = [example["prompt_ids"].tobytes() for example in examples]
    if len(set(prompts)) == 1:
        raise UserError(
            f"--data {config.data}: --kl mismatched needs two different prompts to train on, and "
            "two held out, or none"
        )
    rng = np.random.default_rng(config.seed)
    for example, prompt in zip(examples, prompts):
        number = rng.integers(len(examples))
        while prompts[number] == prompt:
            number = rng.integers(len(examples))
        room = config.max_length - len(example["prompt_ids"])
        ids = [examples[number]["completions_ids"][0][:room]]
        example["partner"] = {"prompt_ids": example["prompt_ids"], "completions_ids": ids}


def completion_tokens(examples: Sequence[dict]) -> int:
    """The number of completion tokens in these examples."""
    return sum(len(ids) for example in examples for ids in example["completions_ids"])


def example_tokens(example: dict) -> int:
    """Tokens of the prompt and all its completions."""
    return len(example["prompt_ids"]) + completion_tokens([example])


def longest_sequence(example: dict) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["completions_ids"])


def plan(
    examples: Sequence[dict], limit: int, processes: int, packed: bool = True
) -> list[list[list[int]]]:
    """For each process its micro-batches, lists of example numbers: as many for every process.

    The examples with most tokens come first, each to the process with the fewest so far. The tokens
    of a micro-batch (unpacked: of a row for each completion, all as long as the longest) stay
    within limit, unless one example alone exceeds it; partners, which pass without gradient, are
    not counted. Who has fewer micro-batches gets empty ones.
    """

    def tokens(piece: list[int]) -> int:
        its = [examples[i] for i in piece]
        if packed:
            return sum(map(example_tokens, its))
        return sum(len(e["completions_ids"]) for e in its) * max(map(longest_sequence, its))

    shares, loads = [[] for _ in range(processes)], [0] * processes
    for i in sorted(range(len(examples)), key=lambda i: -tokens([i])):
        process = loads.index(min(loads))
        loads[process] += tokens([i])
        pieces = shares[process]
        if pieces and tokens([*pieces[-1], i]) <= limit:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    most = max(map(len, shares))
    return [pieces + [[]] * (most - len(pieces)) for pieces in shares]


def examples_sha256(examples: Sequence[dict], *more) -> str:
    """Hash of every prompt and completion, and of `more`.

    A pair's is that of its two halves, so that DPO and KTO share a reference column.
    """
    digest = hashlib.sha256(repr(more).encode())
    for example in examples:
        for ids in example["completions_ids"]:
            digest.update(repr((len(example["prompt_ids"]), len(ids))).encode())
            digest.update(example["prompt_ids"].tobytes() + ids.tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: tuple[int, ...], number: int) -> np.ndarray:
    return np.random.default_rng((*seed, number)).permutation(n)


def endless(n: int, seed: tuple[int, ...], start: int, stop: int) -> list[int]:
    """Items start to stop of endless passes over range(n), each pass in an order of its own.

    They depend on these arguments alone: not on processes, nor on whether a run was resumed.
    """
    return [int(_permutation(n, seed, place // n)[place % n]) for place in range(start, stop)]
