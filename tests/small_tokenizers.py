"""Small tokenizers of the kinds that models have, and chat templates as they come with models."""

import functools
import json

import golden_cases
from helpers import TOY
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# toy: of --model toy. bytes: byte-level BPE, as GPT-2's. words: the same, with Llama 3's rules of
# what a word is. metaspace: puts a space before every text, as SentencePiece does. first: the same,
# but not after a special token. prepend: as Llama 2's, where a normalizer does it, and characters
# that are not in the vocabulary are written as bytes.
TEXT_KINDS = ["toy", "bytes", "words", "metaspace", "first", "prepend"]
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = """\
{%- for message in messages %}\
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# It writes the beginning-of-sequence token as text.
LLAMA_2 = """\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}\
{{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}\
{%- elif message['role'] == 'assistant' %}\
{{- ' ' + message['content'].strip() + ' ' + eos_token }}\
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}\
{%- endif %}{%- endfor %}"""

# The end of a turn, <|eot_id|>, is not the end-of-sequence token.
LLAMA_3 = """\
{{- bos_token }}\
{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
{{- message['content'] | trim + '<|eot_id|>' }}\
{%- endfor %}\
{%- if add_generation_prompt %}\
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\
{%- endif %}"""

GEMMA = """\
{{- bos_token }}\
{%- if messages[0]['role'] == 'system' %}\
{{- raise_exception('System role not supported') }}\
{%- endif %}\
{%- for message in messages %}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

# Nothing ends a turn but a line end; and ":" with the space after it could be one token.
NO_END = """\
{%- for message in messages %}\
{{- message['role'] + ': ' + message['content'] + '\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""

# The generation prompt opens a thought, which the template leaves out before an answer.
R1 = """\
{{- bos_token }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}\
{%- else %}\
{{- '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}\
{%- endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

# The last turn is closed by another token than earlier ones, as in Phi 3.
PHI_3 = """\
{%- for message in messages %}\
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# ChatML with tools, and with an option.
TOOLS = """\
{%- if thinking is defined and thinking %}{{- '<|im_start|>system\nThink.<|im_end|>\n' }}\
{%- endif %}\
{%- if tools %}\
{{- '<|im_start|>system\nTools:' }}\
{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}\
{{- '<|im_end|>\n' }}\
{%- endif %}\
{%- for message in messages %}\
{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}\
{%- for call in message['tool_calls'] or [] %}\
{{- '<tool_call>' + call['function'] | tojson + '</tool_call>' }}\
{%- endfor %}\
{{- '<|im_end|>\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# It refuses a message that has neither content nor calls, as Qwen's.
STRICT_TOOLS = TOOLS.replace(
    "(message['content'] or '')",
    "('' if message['tool_calls'] else 'Says: ' + message['content'])",
)

# name: (template, bos, eos, other special tokens, what ends an answer)
CHAT_TEMPLATES = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "chatml_other_eos": (CHATML, None, "</s>", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "tools": (TOOLS, None, "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "strict_tools": (STRICT_TOOLS, None, "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "llama_2": (LLAMA_2, "<s>", "</s>", [], "</s>"),
    "llama_3": (
        LLAMA_3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "phi_3": (PHI_3, "<s>", "</s>", ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "no_end": (NO_END, "<s>", "</s>", [], "</s>"),
    "r1": (R1, "<s>", "</s>", ["<|User|>", "<|Assistant|>"], "</s>"),
}


def hh_records() -> list[dict]:
    """50 records of Anthropic HH: {"prompt", "chosen", "rejected"}."""
    return [json.loads(line) for line in (golden_cases.FOLDER / "hh.jsonl").open()]


@functools.cache
def training_texts() -> list[str]:
    """What the small tokenizers are trained on."""
    texts = []
    for record in [*golden_cases.toy_records(200), *hh_records()]:
        texts += [record["prompt"], record["chosen"], record["rejected"]]
    return texts


@functools.cache
def toy_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of --model toy, with byte-level tokens."""
    return AutoTokenizer.from_pretrained(TOY / "model")


@functools.cache
def trained(kind: str) -> str:
    """A tokenizer of one of TEXT_KINDS with some 400 tokens, none of them special, as JSON."""
    trainer_settings = {"vocab_size": 400, "max_token_length": 8, "show_progress": False}
    if kind in ("bytes", "words"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(fuse_unk=True))
        alphabet = sorted(set("".join(training_texts())) | set("▁\n#+:"))
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    if kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **trainer_settings)
    tokenizer.train_from_iterator(training_texts(), trainer)
    if kind == "first":  # no token that it has learned spans words
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "prepend":
        tokenizer = with_byte_tokens(tokenizer)
    return tokenizer.to_str()


def with_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, which writes a character that is not in its vocabulary as bytes."""
    values = json.loads(tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    values["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(values))


@functools.cache
def text_tokenizer(kind: str, add_bos: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer without a chat template, of one of TEXT_KINDS.

    add_bos: whether it puts <s> before every text.
    """
    if kind == "toy":
        return toy_tokenizer()
    return make_tokenizer(kind, "<s>", "</s>", [], add_bos)


@functools.cache
def chat_tokenizer(
    name: str, kind: str = "bytes", add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one of the CHAT_TEMPLATES.

    kind: one of TEXT_KINDS. add_bos: whether it puts the beginning-of-sequence token before every
    text.
    """
    template, bos, eos, others, _ = CHAT_TEMPLATES[name]
    tokenizer = make_tokenizer(kind, bos, eos, others, add_bos)
    tokenizer.chat_template = template
    return tokenizer


def make_tokenizer(
    kind: str, bos: str | None, eos: str, others: list[str], add_bos: bool
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of TEXT_KINDS, with these special tokens."""
    tokenizer = Tokenizer.from_str(trained(kind))
    specials = [token for token in ("<unk>", bos, eos, *others) if token is not None]
    tokenizer.add_special_tokens(specials)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=others,
    )


def answer_end(name: str) -> str:
    """The token that ends an answer in one of the CHAT_TEMPLATES."""
    return CHAT_TEMPLATES[name][4]
