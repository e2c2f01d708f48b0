"""Records to exact token ids. A reader of a training step may skip this file.

Text. The prompt's ids are what the tokenizer gives for the prompt, with what it puts before every
text, such as a beginning-of-sequence token. A completion's ids are the rest of what it gives for
prompt and completion together, so that they decode to the text. The text of a special token, such
as "</s>", is that special token. The end-of-sequence token ends every completion.

Conversations are written by the tokenizer's chat template. The prompt's ids are those of
apply_chat_template(prompt, add_generation_prompt=True). A completion's ids are the rest of those of
the prompt with the completion, up to the token that ends the assistant's turn; what the template
writes after it is never sampled. A record is left out if one of its messages has the text of a
special token, since the template cannot tell it from the token.

The ids are not cut yet. archangel/tokenized.py keeps those of a data set, and cuts them by the
settings of a run.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from archangel.errors import UserError
from archangel.records import (
    HH_TURN,
    Record,
)

COMPLETIONS = ("chosen", "rejected", "target", "completion")  # what a record may have

# Names that chat_template_kwargs cannot give to a template: apply_chat_template's own parameters,
# and the special tokens.
RESERVED_OPTIONS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
RESERVED_OPTIONS -= {"tools", "documents"}
RESERVED_OPTIONS |= {"messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}

# What a template may raise for a conversation: its own errors, and Python's for what it computes.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

Message = dict  # {"role": ..., "content": ...}, and what else the chat template reads


class LeftOut(Exception):
    """Why a record is not used. The message is counted and printed."""


# ------------------------------------------------------------------------- a record to its texts


@dataclass
class Texts:
    """A record's prompt and completions, as the text that the tokenizer encodes."""

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

    def render(self, record: Record) -> Texts:
        """The texts of a record's prompt and completions. Raises LeftOut.

        Raises UserError for a conversation, if the tokenizer has no chat template.
        """
        prompt, completions = split_record(record)
        if isinstance(prompt, str):
            check_not_messages([prompt, *completions.values()])
            texts = Texts(prompt, completions, is_chat=False)
        else:
            texts = self._render_conversation(prompt, completions, record)
        for text in texts.completions.values():
            if not text.strip():
                raise LeftOut("an empty completion")
        check_unicode([texts.prompt, *texts.completions.values()])
        return texts

    def _render_conversation(
        self, prompt: list[Message], answers: dict[str, Message], record: Record
    ) -> Texts:
        """Prompt and completions as the chat template writes them."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the data has conversations, and the model's tokenizer no chat template to write "
                "them with; give text, or a model that has one"
            )
        template_settings = record.get("chat_template_kwargs", {})
        strings = iter_strings([prompt, answers, record.get("tools"), template_settings])
        found = self.special_text.search(" ".join(strings))
        if found is not None:
            raise LeftOut(f"a message holds the text of a special token, {found[0]}")
        for name in template_settings:
            if name in RESERVED_OPTIONS:
                raise LeftOut(f"chat_template_kwargs that hold the reserved name {name}")
        options = {"tools": record.get("tools"), **template_settings}
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
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise LeftOut(f"the chat template refuses it: {reason}") from None

    def has_special_text(self, texts: Texts) -> bool:
        """Whether the text of a special token stands in a text record. It becomes that token."""
        if texts.is_chat:
            return False
        return any(map(self.special_text.search, [texts.prompt, *texts.completions.values()]))

    # --------------------------------------------------------------------------- texts to tokens

    def encode(self, all_texts: Sequence[Texts]) -> "list[TokenizedRecord | LeftOut]":
        """The token ids of many records at once, which a fast tokenizer encodes in parallel.

        In the place of a record that cannot be encoded stands the reason, LeftOut.
        """
        needed = set()
        for texts in all_texts:
            needed.add(texts.prompt)
            for completion in texts.completions.values():
                needed.add(texts.prompt + completion)
        ids_of = self._encode(needed)
        spanned = set()  # completions where a token spans the border to the prompt
        for texts in all_texts:
            for completion in texts.completions.values():
                if not starts_with(ids_of[texts.prompt + completion], ids_of[texts.prompt]):
                    spanned.add(completion)
        ids_of_spanned = self._encode_after_a_character(spanned)

        results = []
        for texts in all_texts:
            prompt_ids = ids_of[texts.prompt]
            completions = {}
            for name, completion in texts.completions.items():
                whole_ids = ids_of[texts.prompt + completion]
                if starts_with(whole_ids, prompt_ids):
                    completions[name] = whole_ids[len(prompt_ids) :]
                else:
                    completions[name] = ids_of_spanned.get(completion)
            if None in completions.values():
                results.append(LeftOut("a completion that cannot be encoded apart from its prompt"))
            else:
                results.append(self._finish(texts, prompt_ids, completions))
        return results

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Texts to their token ids, without what the tokenizer puts before and after them."""
        texts = list(texts)
        if not texts:
            return {}
        # verbose: no warning about texts that are longer than the model, which are cut later.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False
        )
        return dict(zip(texts, encoded["input_ids"]))

    def _encode_after_a_character(self, completions: set[str]) -> dict[str, list[int]]:
        """Completions to their ids, without those that cannot be divided from what is before.

        Encoded by themselves, they would get a space in front of them from tokenizers such as
        Llama 2's.
        """
        found = {}
        for character in "\na0":  # a completion that merges with one of these may not with the next
            missing = completions - found.keys()
            ids_of = self._encode([character, *(character + text for text in missing)])
            for text in missing:
                ids = ids_of[character + text]
                if starts_with(ids, ids_of[character]):
                    found[text] = ids[len(ids_of[character]) :]
        return found

    def _finish(
        self, texts: Texts, prompt_ids: list[int], completions: dict[str, list[int]]
    ) -> "TokenizedRecord":
        """Add what a prompt begins and a completion ends with."""
        end_id = self.end_id(texts.is_chat)
        finished = {}
        for name, ids in completions.items():
            if texts.is_chat:
                ids = cut_after_last(ids, end_id)
            if ids[-1:] != [end_id]:
                ids = [*ids, end_id]
            finished[name] = ids
        if not texts.is_chat and not starts_with(prompt_ids, self.prefix_ids):
            prompt_ids = self.prefix_ids + prompt_ids  # unless the text itself begins with it
        if not prompt_ids:  # some token must come before a completion, to predict its first token
            prompt_ids = [self.end_of_text_id]
        return TokenizedRecord(prompt_ids, finished, texts.is_chat)


@dataclass
class TokenizedRecord:
    """The token ids of a record's prompt and completions, not cut."""

    prompt_ids: list[int]  # at least one
    completions: dict[str, list[int]]  # "chosen", "rejected", "target" or "completion"
    is_chat: bool


def starts_with(ids: list[int], beginning: list[int]) -> bool:
    """Whether ids begin with these."""
    return ids[: len(beginning)] == beginning


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
    for completion in completions.values():
        if HH_TURN in prompt and completion.startswith(prompt):
            raise LeftOut("a completion that repeats its prompt; remove either")
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
    """All strings in nested lists and dictionaries, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from iter_strings(name)
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
    except TEMPLATE_ERRORS:  # as it will say of records
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
