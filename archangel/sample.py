"""What a trained model replies to held-out prompts, beside what another model replies.

    python -m archangel.sample runs/kto --against toy         # the same prompts, before and after
    python -m archangel.sample runs/kto --n 1000 --out replies.jsonl

Top-p sampling at temperature 1. The random numbers for a reply depend only on the seed and the
prompt. So a prompt gets the same reply (up to rounding) whatever else is in its batch, and the
replies of two models to a prompt differ because of the models, not by chance.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

from archangel import toy
from archangel.data import prepare_mixture
from archangel.errors import UserError, exit_status
from archangel.records import TEMPLATE_COLUMNS, Source, find_files, find_sources, iter_records
from archangel.run import find_model, load_tokenizer
from archangel.tokens import LeftOut, RecordEncoder, TokenizedRecord, split_record

WIDTH = 100  # columns of the terminal


class SeededTopP(LogitsProcessor):
    """Top-p sampling for a decoder that takes the largest score (`do_sample=False`).

    The index of the largest log-probability plus Gumbel noise is a draw from the distribution. Each
    prompt has its own generator, seeded by (seed, prompt). So its t-th draw is always the same, on
    the same kind of device: a GPU's generator gives other numbers than a CPU's.
    """

    def __init__(self, prompts: Sequence[str], seed: int, top_p: float, device: torch.device):
        self.top_p = TopPLogitsWarper(top_p)
        self.generators = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
            generator = torch.Generator(device)
            self.generators.append(generator.manual_seed(int.from_bytes(digest[:6], "big")))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add noise to scores (B, V); scores outside of the top p become -inf."""
        exponential = torch.empty(scores.shape, device=scores.device)
        for noise_of_prompt, generator in zip(exponential, self.generators, strict=True):
            noise_of_prompt.exponential_(generator=generator)
        # Minus the logarithm of an exponential variable is a Gumbel variable.
        return self.top_p(input_ids, scores) - exponential.log()


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder; on a GPU in bfloat16 if there is one, else in float32.

    Raises UserError if the folder does not hold a causal language model in safetensors.
    """
    tokenizer = load_tokenizer(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32
    if device == "cuda" and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {path}: cannot be loaded, {reason}") from None
    return model.to(device).eval(), tokenizer


def held_out_source(data: str) -> Source:
    """Where the held-out records of --data are; of files, all records. Raises UserError."""
    prepare_mixture(data)
    sources = find_sources(data, needs_train=False)
    if "test" not in sources and not find_files([data]):
        raise UserError(f"--data {data}: has no held-out records; name a file to read all of it")
    return sources.get("test") or sources["train"]


def read_prompts(data: str, n: int) -> list[dict]:
    """The first `n` prompts, each once: {"prompt": ..., "chosen": ... if there is one}.

    In a conversation, `prompt` is its messages as text, for readers and judges, and `conversation`
    is what the chat template gets. `chosen` is the text of the chosen completion, which of an
    unpaired record is its completion if that is desirable, and of a supervised record always.

    data: as the trainers take it. The held-out records are read; of files, all records.
    """
    prompts = {}
    for _, record, _ in iter_records(held_out_source(data)):
        try:
            messages, completions = split_record(record)
        except LeftOut:  # as in training, which counts them
            continue
        if isinstance(messages, str):
            row = {"prompt": messages}
        else:
            conversation = {"prompt": messages}
            for name in TEMPLATE_COLUMNS:
                if name in record:
                    conversation[name] = record[name]
            row = {"prompt": as_text(messages), "conversation": conversation}
        kept = prompts.setdefault(row["prompt"], row)
        if "chosen" in completions:
            chosen = completions["chosen"]
        elif record.get("label", True):
            chosen = completions["completion"]
        else:
            continue
        if not isinstance(chosen, str):
            chosen = message_text(chosen)
        kept.setdefault("chosen", chosen)
    return list(prompts.values())[:n]


def as_text(messages: list[dict]) -> str:
    """A conversation for readers, who know nothing of chat templates."""
    turns = [f"{message['role'].capitalize()}: {message_text(message)}" for message in messages]
    return "\n\n".join(turns)


def message_text(message: dict) -> str:
    """What a message says. What is not text (parts, calls of tools) is written as JSON."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    if message.get("tool_calls"):
        content += json.dumps(message["tool_calls"], ensure_ascii=False)
    return content


def encode_prompts(
    prompts: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenizedRecord | LeftOut]:
    """The token ids of prompts, as in training, or why there are none.

    A text that is longer than max_length loses its start. A conversation cannot be cut.
    """
    encoder = RecordEncoder(tokenizer)
    encoded = []
    for prompt in prompts:
        record = prompt.get("conversation", {"prompt": prompt["prompt"]})
        try:
            (tokens,) = encoder.encode([encoder.render(record)])
        except LeftOut as reason:
            encoded.append(reason)
            continue
        excess = len(tokens.prompt_ids) - max_length
        if excess > 0 and tokens.is_chat:
            tokens = LeftOut(f"a conversation of more than {max_length} tokens")
        elif excess > 0:
            num_prefix = len(encoder.prefix_ids)
            del tokens.prompt_ids[num_prefix : num_prefix + excess]
        encoded.append(tokens)
    return encoded


def leave_out_unusable(
    prompts: list[dict], paths: Iterable[Path], max_new_tokens: int
) -> list[dict]:
    """The prompts that all of these models can reply to. Says how many are left out, and why."""
    for path in paths:
        config = AutoConfig.from_pretrained(path).get_text_config()
        encoded = encode_prompts(
            prompts, load_tokenizer(path), room_for_prompt(config, max_new_tokens)
        )
        reasons = [str(tokens) for tokens in encoded if isinstance(tokens, LeftOut)]
        for reason, number in Counter(reasons).items():
            tqdm.write(f"{path}: {number} prompts left out: {reason}", file=sys.stderr)
        prompts = [
            prompt for prompt, tokens in zip(prompts, encoded) if not isinstance(tokens, LeftOut)
        ]
    return prompts


def room_for_prompt(config: PretrainedConfig, max_new_tokens: int) -> int:
    """The tokens that a prompt may have. Raises UserError if there is no room for it."""
    room = getattr(config, "max_position_embeddings", 2048) - max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: no room for a prompt")
    return room


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict],
    *,
    seed: int = 1,
    top_p: float = 0.95,
    max_new_tokens: int = 64,
    batch_size: int = 50,
) -> Iterator[list[dict]]:
    """Reply to prompts (see read_prompts). Yields batches; prompts of similar length are together.

    To each prompt's own fields it adds `reply`, `reply_ids` (with the token that ends it), `tokens`
    (without that token) and `ended` (whether there is one, and it was not cut at `max_new_tokens`).
    A text loses its start if it does not fit, with its reply, the model's number of positions.
    """
    room = room_for_prompt(model.config.get_text_config(), max_new_tokens)
    encoded = encode_prompts(prompts, tokenizer, room)
    for tokens in encoded:
        if isinstance(tokens, LeftOut):
            raise UserError(f"a prompt cannot be replied to: {tokens}; see leave_out_unusable")
    prompts_ids = [tokens.prompt_ids for tokens in encoded]
    encoder = RecordEncoder(tokenizer)
    # Stop where completions end in training: after a text, or after a turn of a conversation.
    end_ids = sorted({encoder.end_id(tokens.is_chat) for tokens in encoded})

    eos = tokenizer.eos_token_id
    # Replace the model's own generation settings, which generate falls back on: a temperature or a
    # penalty would change the distribution.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_ids, pad_token_id=eos
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts_ids[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts_ids[batch[0]])
        input_ids = []
        attention_mask = []
        for index in batch:  # padded on the left, so that all replies start at the same place
            length = len(prompts_ids[index])
            padding = longest - length
            input_ids.append([eos] * padding + prompts_ids[index])
            attention_mask.append([0] * padding + [1] * length)
        texts = [prompts[index]["prompt"] for index in batch]
        noise = SeededTopP(texts, seed, top_p, model.device)
        output = model.generate(
            input_ids=torch.tensor(input_ids, device=model.device),  # (B, T)
            attention_mask=torch.tensor(attention_mask, device=model.device),  # (B, T)
            logits_processor=LogitsProcessorList([noise]),
        )
        replies = []
        for index, reply_ids in zip(batch, output[:, longest:].tolist()):
            ends = [place for place, token_id in enumerate(reply_ids) if token_id in end_ids]
            ended = len(ends) > 0
            text_ids = reply_ids
            if ended:
                text_ids = reply_ids[: ends[0]]
                reply_ids = reply_ids[: ends[0] + 1]  # with the token that ends it
            replies.append(
                {
                    **prompts[index],
                    "reply": tokenizer.decode(text_ids, skip_special_tokens=True),
                    "reply_ids": reply_ids,
                    "tokens": len(text_ids),
                    "ended": ended,
                }
            )
        yield replies


def weights_sha256(path: Path) -> str:
    """A fingerprint of the weights in a folder."""
    digest = hashlib.sha256()
    for file_path in sorted(path.glob("*.safetensors")):
        with file_path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_replies(out: Path, sampled: dict) -> dict[str, dict]:
    """The replies that are in `--out` already, by prompt. A half-written last line is cut off.

    Raises UserError if a reply was not sampled as `sampled` says (weights, seed, ...).
    """
    text = out.read_bytes() if out.exists() else b""
    whole_lines = text[: text.rfind(b"\n") + 1]
    replies = {}
    for number, line in enumerate(whole_lines.splitlines(), 1):
        try:
            reply = json.loads(line)
            sampled_before = reply["sampled"]
            replies[reply["prompt"]] = reply
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--out {out}, row {number}: not a row of this command; name a new file"
            ) from None
        if sampled_before != sampled:
            raise UserError(
                f"--out {out}, row {number}: sampled with {sampled_before}, not {sampled}; "
                "name a new file"
            )
    if whole_lines != text:
        os.truncate(out, len(whole_lines))
    return replies


def reply_to(
    path: Path, prompts: Sequence[dict], *, batch_size: int, out: Path | None = None, **sampling
) -> list[dict]:
    """The prompts, in order, with the replies of the model in `path`.

    Args:
        out: a file to which each batch of replies is written as soon as it is sampled. What it has
            already is not sampled again.
        sampling: `seed`, `top_p` and `max_new_tokens`.
    """
    sampled = {}
    replies = {}  # by prompt
    if out is not None:
        sampled = {"weights_sha256": weights_sha256(path), **sampling}
        replies = read_replies(out, sampled)
    missing = [prompt for prompt in prompts if prompt["prompt"] not in replies]
    if missing:
        model, tokenizer = load(path)
        with tqdm(total=len(missing), desc=f"sample {path}", delay=2) as bar:
            for batch in sample(model, tokenizer, missing, batch_size=batch_size, **sampling):
                for reply in batch:
                    replies[reply["prompt"]] = reply
                if out is not None:
                    with out.open("a", encoding="utf-8") as file:
                        for reply in batch:
                            file.write(json.dumps({**reply, "sampled": sampled}) + "\n")
                bar.update(len(batch))
    return [{**replies[prompt["prompt"]], **prompt} for prompt in prompts]


def mean(values: Iterable) -> float:
    """The mean of numbers or truth values."""
    return statistics.mean(float(value) for value in values)


def summarize(replies: Sequence[dict], is_toy: bool) -> dict[str, str]:
    """What the table shows of one model's replies; for toy data, also the toy judge's verdicts."""
    table = {}
    if is_toy:
        wins = [toy.win(reply["prompt"], reply["reply"], reply["chosen"]) for reply in replies]
        table["win rate against the chosen reply, minus 0.5"] = f"{mean(wins) - 0.5:+.2f}"
    table["reply length, tokens"] = f"{mean(reply['tokens'] for reply in replies):.1f}"
    table["stopped at EOS"] = f"{mean(reply['ended'] for reply in replies):.0%}"
    if is_toy:
        verdicts = [toy.judge(reply["prompt"], reply["reply"]) for reply in replies]
        is_rude = [not verdict["harmless"] for verdict in verdicts]
        is_off_topic = [not verdict["product"] for verdict in verdicts]
        table["rude"] = f"{mean(is_rude):.0%}"
        table["about another product"] = f"{mean(is_off_topic):.0%}"
    return table


def wrap(label: str, text: str, max_lines: int) -> str:
    """A labeled block of at most `max_lines` lines of the terminal, without blank lines."""
    indent = 10
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line.strip(), WIDTH - indent)
    if len(lines) > max_lines:
        lines = [*lines[:max_lines], "[...]"]
    if not lines:
        lines = ["-"]
    separator = "\n" + " " * indent
    return f"{label:<{indent}}{separator.join(lines)}"


def show(replies: dict[str, list[dict]], count: int, is_toy: bool) -> str:
    """The first `count` prompts with each model's reply, and the table.

    replies: label to the model's replies, to the same prompts in the same order.
    """
    labels = list(replies)
    prompts = [reply["prompt"] for reply in replies[labels[0]]]
    blocks = []
    for number, prompt in enumerate(prompts[:count]):
        shown_prompt = prompt.strip()
        if len(shown_prompt) > 400:
            shown_prompt = "[...] " + shown_prompt[-400:]
        block = [wrap("prompt", shown_prompt, 8)]
        for label in labels:
            block.append(wrap(label, replies[label][number]["reply"], 5))
        blocks.append("\n".join(block))

    tables = [summarize(replies[label], is_toy) for label in labels]
    head = f"{len(prompts)} prompts"
    lines = [f"{head:<46}" + "".join(f"{label:>12}" for label in labels)]
    for name in tables[0]:
        lines.append(f"{name:<46}" + "".join(f"{table[name]:>12}" for table in tables))
    return "\n\n".join([*blocks, "\n".join(lines)])


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a setting that is out of range."""
    for name, least in {"n": 1, "show": 0, "batch_size": 1, "max_new_tokens": 1}.items():
        value = getattr(args, name)
        if value < least:
            raise UserError(f"--{name} {value}: at least {least}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: above 0 and at most 1")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: no folder {args.out.parent}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample and show replies from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.sample",
        description="A trained model's replies to held-out prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="a folder, `toy`, a short name (pythia-1.4b) or a hub id")
    add("--against", metavar="MODEL", help="a second model, what was before; shown side by side")
    add("--data", default="toy", help="as the trainers take it; held-out records if it has some")
    add("--n", type=int, default=100, help="prompts to reply to, the first ones of the data")
    add("--show", type=int, default=4, help="prompts whose replies are printed")
    add("--out", type=Path, help="a .jsonl for MODEL's replies; what is there is not sampled again")
    add("--seed", type=int, default=1, help="of the noise; the same for both models")
    add("--batch_size", type=int, default=50, help="prompts at a time; changes speed only")
    add("--max_new_tokens", type=int, default=64, help="most tokens of a reply")
    add("--top_p", type=float, default=0.95, help="sample from the likeliest so much of the mass")
    args = parser.parse_args(arguments)
    check(args)
    disable_progress_bar()  # of transformers, when it loads weights

    prompts = read_prompts(args.data, args.n)
    if args.against is None:
        names = {"reply": args.model}
    else:
        names = {"before": args.against, "after": args.model}
    paths = {label: find_model(name) for label, name in names.items()}
    prompts = leave_out_unusable(prompts, paths.values(), args.max_new_tokens)
    replies = {}
    for label, path in paths.items():
        replies[label] = reply_to(
            path,
            prompts,
            batch_size=args.batch_size,
            out=None if label == "before" else args.out,
            seed=args.seed,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
        )
    print(show(replies, args.show, is_toy=args.data == "toy"))


if __name__ == "__main__":
    with exit_status():
        main()
