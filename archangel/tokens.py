"""Records to exact token ids. A reader of a training step may skip this file.

Text. The prompt's ids are what the tokenizer gives for the prompt, with what it puts before every
text, such as a beginning-of-sequence token. A completion's ids are the rest of what it gives for
prompt and completion together, so that they decode to the text. The text of a special token, such
as "</s>", is that special token. The end-of-sequence token ends every completion.

Conversations are written by the tokenizer's chat template. The prompt's ids are those of
apply_chat_template(prompt, add_generation_prompt=True). A completion's ids are the rest of those of
the prompt with the completion, up to the token that ends the assistant's turn; what the template
writes after it is never sampled. A message with the text of a special token is left out, since the
template cannot tell it from the token.

The ids of all records are computed once, and kept in a file that is mapped into memory: see
prepare_tokens. They are not cut yet: TokenizedRecords.cut does that, by the settings of a run.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
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
    HH_TURN,
    Record,
    Source,
    cache_folder,
    find_sources,
    format_of,
    iter_records,
    progress,
)

COMPLETIONS = ("chosen", "rejected", "target", "completion")  # what a record may have
MAX_TEST_RECORDS = 512  # held-out records that are evaluated

# Names that chat_template_kwargs cannot give to a template: apply_chat_template's own parameters.
RESERVED_OPTIONS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
RESERVED_OPTIONS = RESERVED_OPTIONS - {"tools", "documents"} | {"messages"}

Message = dict  # {"role": ..., "content": ...}, and what else the chat template reads


class LeftOut(Exception):
    """Why a record is not used. The message is counted and printed."""


# ------------------------------------------------------------------------- a record to its texts


@dataclass
class Texts:
    """What a record's prompt and completions are, as text that the tokenizer encodes."""

    prompt: str
    completions: dict[str, str]  # "chosen", "rejected", "target" or "completion" to text
    is_chat: bool  # the chat template wrote it, with all special tokens
    has_earlier_answers: bool = False  # the prompt holds messages of the assistant


class RecordEncoder:
    """Turns records into token ids, by a tokenizer.

    Attributes:
        prefix_ids: what the tokenizer puts before a text.
        end_of_text_id: the token that ends a text completion.
        end_of_turn_id: the token that ends an assistant's turn in the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.prefix_ids = find_prefix(tokenizer)
        self.end_of_text_id = tokenizer.eos_token_id
        self.end_of_turn_id = find_end_of_turn(tokenizer)
        self.special_text = special_token_pattern(tokenizer)

    def end_id(self, is_chat: bool) -> int:
        """The token that ends a completion, and where sampling stops."""
        return self.end_of_turn_id if is_chat else self.end_of_text_id

    def write(self, record: Record) -> Texts:
        """The texts of a record's prompt and completions. Raises LeftOut."""
        prompt, completions = split_record(record)
        if isinstance(prompt, str):
            check_not_messages([prompt, *completions.values()])
            texts = Texts(prompt, completions, is_chat=False)
        else:
            texts = self._write_conversation(prompt, completions, record)
        for text in texts.completions.values():
            if not text.strip():
                raise LeftOut("an empty completion")
        check_unicode([texts.prompt, *texts.completions.values()])
        return texts

    def _write_conversation(
        self, prompt: list[Message], answers: dict[str, Message], record: Record
    ) -> Texts:
        """Prompt and completions as the chat template writes them."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the data has conversations, and the model's tokenizer no chat template to write "
                "them with; give text, or a model that has one"
            )
        strings = iter_strings([prompt, answers, record.get("tools")])
        found = self.special_text.search(" ".join(strings))
        if found is not None:
            raise LeftOut(f"a message holds the text of a special token, {found[0]}")
        options = record.get("chat_template_kwargs", {})
        for name in options:
            if name in RESERVED_OPTIONS:
                raise LeftOut(f"chat_template_kwargs holds {name}, which is no template's variable")
        options = {"tools": record.get("tools"), **options}
        start = self._apply_template(prompt, add_generation_prompt=True, **options)
        texts = {}
        for name, answer in answers.items():
            whole = self._apply_template([*prompt, answer], **options)
            if not whole.startswith(start):
                raise LeftOut("the chat template writes the prompt differently before an answer")
            texts[name] = whole[len(start) :]
            self._check_tools_are_written([*prompt, answer], whole, options)
        has_earlier_answers = any(message["role"] == "assistant" for message in prompt)
        return Texts(start, texts, is_chat=True, has_earlier_answers=has_earlier_answers)

    def _check_tools_are_written(self, messages: list[Message], whole: str, options: dict) -> None:
        """Raise LeftOut if the template writes the same without the tools, or without their calls.

        whole: what it writes with them. Many templates know nothing of tools.
        """
        if options["tools"] and whole == self._try_template(messages, {**options, "tools": None}):
            raise LeftOut("the chat template ignores tools")
        if any(message.get("tool_calls") for message in messages):
            without_calls = []
            for message in messages:
                kept = {name: item for name, item in message.items() if name != "tool_calls"}
                without_calls.append(kept)
            if whole == self._try_template(without_calls, options):
                raise LeftOut("the chat template ignores tool_calls")

    def _try_template(self, messages: list[Message], options: dict) -> str | None:
        """What the template writes, or None if it refuses: such as no content and no tool call."""
        try:
            return self._apply_template(messages, **options)
        except LeftOut:
            return None

    def _apply_template(self, messages: list[Message], **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise LeftOut(f"the chat template refuses it: {reason}") from None

    def has_special_text(self, texts: Texts) -> bool:
        """Whether the text of a special token stands in a text record. It becomes that token."""
        if texts.is_chat:
            return False
        return any(map(self.special_text.search, [texts.prompt, *texts.completions.values()]))

    # --------------------------------------------------------------------------- texts to tokens

    def encode(self, all_texts: Sequence[Texts]) -> "list[TokenizedRecord | LeftOut]":
        """The token ids of many records at once, which a fast tokenizer encodes in parallel."""
        wholes = []  # of all records: the prompt, then the prompt with each completion
        for texts in all_texts:
            wholes.append(texts.prompt)
            wholes.extend(texts.prompt + completion for completion in texts.completions.values())
        encoded = iter(self._encode(wholes))
        results = []
        for texts in all_texts:
            prompt_ids = next(encoded)
            wholes_ids = [next(encoded) for _ in texts.completions]
            try:
                results.append(self._finish(texts, prompt_ids, wholes_ids))
            except LeftOut as reason:
                results.append(reason)
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: no warning about texts that are longer than the model, which are cut later.
        return self.tokenizer(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False
        )["input_ids"]

    def _finish(
        self, texts: Texts, prompt_ids: list[int], wholes_ids: list[list[int]]
    ) -> "TokenizedRecord":
        end_id = self.end_id(texts.is_chat)
        completions = {}
        for (name, text), whole_ids in zip(texts.completions.items(), wholes_ids):
            ids = self._split_completion(prompt_ids, whole_ids, text)
            if texts.is_chat:
                ids = cut_after_last(ids, end_id)
            if ids[-1:] != [end_id]:
                ids = [*ids, end_id]
            completions[name] = ids
        if not texts.is_chat and prompt_ids[: len(self.prefix_ids)] != self.prefix_ids:
            prompt_ids = self.prefix_ids + prompt_ids  # unless the text itself begins with it
        if not prompt_ids:  # some token must come before a completion, to predict its first token
            prompt_ids = [self.end_of_text_id]
        return TokenizedRecord(prompt_ids, completions, texts.is_chat)

    def _split_completion(
        self, prompt_ids: list[int], whole_ids: list[int], completion: str
    ) -> list[int]:
        """The ids of a completion, from those of prompt and completion together."""
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        # A token spans the border. Then encode the completion after some other character. (Encoded
        # by itself, it would get a space in front of it from tokenizers such as Llama 2's.)
        for neighbor in "\na0":
            neighbor_ids, both_ids = self._encode([neighbor, neighbor + completion])
            if both_ids[: len(neighbor_ids)] == neighbor_ids:
                return both_ids[len(neighbor_ids) :]
        raise LeftOut("a completion that cannot be encoded apart from its prompt")


@dataclass
class TokenizedRecord:
    """The token ids of a record's prompt and completions, not cut."""

    prompt_ids: list[int]  # at least one
    completions: dict[str, list[int]]  # "chosen", "rejected", "target" or "completion"
    is_chat: bool


def cut_after_last(ids: list[int], end_id: int) -> list[int]:
    """The ids up to the last end_id; all of them if there is none."""
    for place in reversed(range(len(ids))):
        if ids[place] == end_id:
            return ids[: place + 1]
    return ids


# ----------------------------------------------------------- a record to prompt and completions


def split_record(record: Record) -> tuple[str | list[Message], dict[str, str | Message]]:
    """The prompt and the completions of a record. Raises LeftOut.

    These are texts; or, in a conversation, the messages of the prompt, and for each completion the
    message that is the assistant's answer.
    """
    prompt = record.get("prompt")
    completions = {name: record[name] for name in COMPLETIONS if name in record}
    if "messages" in record:
        completions = {"completion": record["messages"]}
    items = [prompt or "", *completions.values()]
    if not all(isinstance(item, str) for item in items):
        return split_conversation(prompt, completions)
    if prompt is None:
        return split_dialogues(completions)
    return prompt, completions


def split_dialogues(completions: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Dialogues as HH writes them: what is up to the last turn, the same in all, is the prompt."""
    prompts = set()
    answers = {}
    for name, dialogue in completions.items():
        opening, turn, answer = dialogue.rpartition(HH_TURN)
        prompts.add(opening + turn)
        answers[name] = answer
    if len(prompts) > 1:
        raise LeftOut("dialogues that differ before their last turn")
    return prompts.pop(), answers


def split_conversation(
    prompt: str | list | None, completions: dict[str, str | list]
) -> tuple[list[Message], dict[str, Message]]:
    """The messages of the prompt, and the assistant's answer in each completion. Raises LeftOut.

    A completion is an answer, or a whole conversation that ends in it. Then the prompt is what
    comes before the answer, the same for all completions, and begins with the given prompt.
    """
    given = [] if prompt is None else as_messages(prompt, "user")
    openings = []
    answers = {}
    for name, completion in completions.items():
        *opening, answer = as_messages(completion, "assistant")
        check_answer(answer)
        answers[name] = answer
        begins_with_prompt = opening[: len(given)] == given
        ends_with_prompt = opening[-len(given) :] == given  # such as the text of the last question
        if not opening:
            opening = given
        elif given and not begins_with_prompt and not ends_with_prompt:
            raise LeftOut(
                "a completion of several messages, which do not begin with its prompt; "
                "a completion is one message, or the whole conversation"
            )
        openings.append(opening)
    if not completions:
        return given, {}
    if any(opening != openings[0] for opening in openings):
        raise LeftOut("conversations that differ before their last message")
    if not openings[0]:
        raise LeftOut("a conversation without a message before the answer")
    return openings[0], answers


def as_messages(value: str | list, role: str) -> list[Message]:
    """Text becomes one message of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def check_answer(message: Message) -> None:
    """Raise LeftOut unless a message is something that the assistant says."""
    if message["role"] != "assistant":
        raise LeftOut("a completion whose last message is not the assistant's")
    content = message.get("content")
    if isinstance(content, str):
        content = content.strip()
    if not content and not message.get("tool_calls"):
        raise LeftOut("an empty completion")


# -------------------------------------------------------------------------- texts and the tokenizer


def iter_strings(value: object) -> Iterator[str]:
    """All strings in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from iter_strings(item)


def check_not_messages(texts: list[str]) -> None:
    """Raise LeftOut for messages that were written as text, such as into the cells of CSV."""
    for text in texts:
        if re.match(r"(?s)\s*\[\s*\{.*['\"]role['\"]", text) and text.rstrip().endswith("]"):
            raise LeftOut("messages written as text; save the data as JSON Lines or parquet")


def check_unicode(texts: list[str]) -> None:
    """Raise LeftOut for text that cannot be encoded."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise LeftOut("text with an unpaired surrogate, which is not Unicode") from None


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token that the chat template writes after an assistant's message.

    The end-of-sequence token, if the template writes none, or if there is no template.
    """
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [
        {"role": "user", "content": "QUESTION"},
        {"role": "assistant", "content": "ANSWER"},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # as it will say of records
        return tokenizer.eos_token_id
    _, answer, rest = text.rpartition("ANSWER")
    if answer:
        for token_id in tokenizer(rest, add_special_tokens=False)["input_ids"]:
            if token_id in special_token_ids(tokenizer):
                return token_id
    return tokenizer.eos_token_id


def find_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that the tokenizer puts before every text."""
    ids = tokenizer("x")["input_ids"]
    first_id = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    return ids[: ids.index(first_id)]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {number for number, token in added if token.special}


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Finds the texts of the tokenizer's special tokens."""
    texts = set(tokenizer.all_special_tokens)
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")  # (?!) finds nothing


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
        counts: what was read, used and left out; see count_records.
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
        """Only these records, in this order. They are copied into memory."""
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
    return f"--data {counts['source']}: no record can be used: {reasons}"


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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            if not folder.is_dir():  # another run may have made it in the meantime
                counts = {}
                for split, source in sources.items():
                    path = Path(partial) / "tokens" / f"{split}.arrow"
                    path.parent.mkdir(exist_ok=True)
                    with pa.OSFile(str(path), "wb") as sink:
                        records = iter_records(source)
                        counts[split] = write_tokens(source.name, records, encoder, sink)
                path.with_name("counts.json").write_text(json.dumps(counts))
                path.parent.rename(folder)
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
    for file_name in ("records.py", "tokens.py"):
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
    records = iter(progress(records, "tokenize"))
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        while chunk := list(itertools.islice(records, 1000)):
            written = []
            for where, record, not_read in chunk:
                formats.add(format_of(record), where)
                columns_not_read |= not_read
                try:
                    written.append((where, record, encoder.write(record)))
                except LeftOut as reason:
                    left_out.add(str(reason), where)
            rows = []
            tokenized = encoder.encode([texts for _, _, texts in written])
            for (where, record, texts), tokens in zip(written, tokenized):
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
