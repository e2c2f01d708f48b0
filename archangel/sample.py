"""What a trained model replies to held-out prompts, beside what another replied before.

    python -m archangel.sample runs/kto --against toy         # the same prompts, before and after
    python -m archangel.sample runs/kto --n 1000 --out replies.jsonl

Top-p sampling at temperature 1. The noise of a reply comes from the seed and its prompt alone, so
a prompt gets the same reply whatever else is in its batch (but for rounding), and the replies of
two models to a prompt differ by the models, not by luck.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)
from transformers.utils.logging import disable_progress_bar

import common_v1 as common
from archangel import toy

WIDTH = 100  # columns of the terminal


class SeededTopP(LogitsProcessor):
    """Top-p sampling for a decoder that takes the largest score (`do_sample=False`).

    The largest of log-probability plus Gumbel noise is a draw from the distribution. Each prompt
    has its own generator, on the CPU, seeded by (seed, prompt): its t-th draw is always the same.
    """

    def __init__(self, prompts: Sequence[str], seed: int, top_p: float):
        self.top_p = TopPLogitsWarper(top_p)
        self.generators = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in, scores with noise (B, V) out, -inf outside the top p."""
        exponential = torch.empty(scores.shape)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return self.top_p(input_ids, scores) - exponential.log().to(scores.device)


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, on the GPU in bfloat16 where there is one, else in float32.

    Raises UserError where the folder does not hold a causal language model in safetensors.
    """
    tokenizer = common.load_tokenizer(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise common.UserError(f"model {path}: cannot be loaded, {reason}") from None
    return model.to(device).eval(), tokenizer


def read_prompts(data: str, n: int) -> list[dict[str, str]]:
    """The first `n` prompts, each once: {"prompt": ..., "chosen": ... where the row has one}.

    data: as the trainers take it; the test rows of a folder, all rows of a file. An unpaired row's
    completion is its chosen reply where it is desirable, a supervised row's always.
    """
    split = "train" if Path(data).is_file() else "test"
    prompts = {}
    for row in common.read_rows(data, split, ("preference", "unpaired", "supervised")):
        chosen = row.get("chosen", row.get("completion") if row.get("label", True) else None)
        kept = prompts.setdefault(row["prompt"], {"prompt": row["prompt"]})
        if chosen is not None:
            kept.setdefault("chosen", chosen)
    if not prompts:
        raise common.UserError(f"--data {data}: no such file, and no folder with a test.jsonl")
    return list(prompts.values())[:n]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    *,
    seed: int = 1,
    top_p: float = 0.95,
    max_new_tokens: int = 64,
    batch_size: int = 50,
) -> Iterator[list[dict]]:
    """Reply to the prompts; yields batch after batch of rows, prompts of like length together.

    To the row's own fields come `reply`, `tokens` (of the reply, its end mark not counted) and
    `ended` (whether it ended by itself, not by `max_new_tokens`). A prompt that does not fit the
    model's positions with its reply loses its start.
    """
    room = getattr(model.config, "max_position_embeddings", 2048) - max_new_tokens
    if room < 1:
        raise common.UserError(f"--max_new_tokens {max_new_tokens}: no room for a prompt")
    # Prompts become tokens as in training: the same beginning, no special token by chance.
    limits = SimpleNamespace(max_length=room + 1, max_prompt_length=room, truncate_prompt="start")
    texts = [(row["prompt"], [""]) for row in rows]
    examples = common.tokenise(texts, tokenizer, limits)
    prompts = [example["prompt_ids"].tolist() for example in examples]

    eos = tokenizer.eos_token_id
    # The model's own settings (temperature, penalties) would bend the distribution, and generate
    # falls back on them: they are replaced.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos
    )
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts[batch[0]])
        padding = [longest - len(prompts[i]) for i in batch]  # on the left: replies start together
        ids = torch.tensor([[eos] * pad + prompts[i] for pad, i in zip(padding, batch)])  # (B, T)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])  # (B, T)
        noise = SeededTopP([rows[i]["prompt"] for i in batch], seed, top_p)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([noise]),
        )
        replies = []
        for i, tokens in zip(batch, output[:, longest:].tolist()):
            ended = eos in tokens
            tokens = tokens[: tokens.index(eos)] if ended else tokens
            reply = tokenizer.decode(tokens, skip_special_tokens=True)
            replies.append({**rows[i], "reply": reply, "tokens": len(tokens), "ended": ended})
        yield replies


def read_replies(out: Path, sampled: dict) -> dict[str, dict]:
    """Prompt to row of what `--out` wrote before; a half-written last line is cut off the file.

    Raises UserError where a row was not sampled as `sampled` says (weights, seed, ...).
    """
    text = out.read_bytes() if out.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    done = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            before = row["sampled"]
            done[row["prompt"]] = row
        except (ValueError, KeyError, TypeError):
            raise common.UserError(
                f"--out {out}, row {number}: not a row of this command; name a new file"
            ) from None
        if before != sampled:
            raise common.UserError(
                f"--out {out}, row {number}: sampled with {before}, not {sampled}; name a new file"
            )
    if whole != text:
        os.truncate(out, len(whole))
    return done


def reply_to(
    path: Path, rows: Sequence[dict], *, batch_size: int, out: Path | None = None, **sampling
) -> list[dict]:
    """The rows, in order, with the replies of the model in `path`; those in `out` are not sampled.

    sampling: `seed`, `top_p` and `max_new_tokens`. `out` gets each batch as soon as it is there.
    """
    done = {}
    if out:
        digest = hashlib.sha256()
        for weights in sorted(path.glob("*.safetensors")):
            with weights.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        sampled = {"weights_sha256": digest.hexdigest()[:16], **sampling}
        done = read_replies(out, sampled)
    missing = [row for row in rows if row["prompt"] not in done]
    if missing:
        model, tokenizer = load(path)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(out, "a", encoding="utf-8")) if out else None
            bar = stack.enter_context(tqdm(total=len(missing), desc=f"sample {path}", delay=2))
            for batch in sample(model, tokenizer, missing, batch_size=batch_size, **sampling):
                done |= {row["prompt"]: row for row in batch}
                if file:
                    lines = [json.dumps({**row, "sampled": sampled}) + "\n" for row in batch]
                    file.writelines(lines)
                    file.flush()
                bar.update(len(batch))
    return [{**done[row["prompt"]], **row} for row in rows]


def figures(rows: Sequence[dict], is_toy: bool) -> dict[str, str]:
    """What the table says of one model's replies; the toy judge's verdicts for toy data only."""

    def mean(values) -> float:
        return statistics.mean(map(float, values))

    table = {
        "reply length, tokens": f"{mean(row['tokens'] for row in rows):.1f}",
        "ended by itself": f"{mean(row['ended'] for row in rows):.0%}",
    }
    if is_toy:
        verdicts = [toy.judge(row["prompt"], row["reply"]) for row in rows]
        wins = mean(toy.win(row["prompt"], row["reply"], row["chosen"]) for row in rows)
        table = {
            "win rate against the chosen reply, minus 0.5": f"{wins - 0.5:+.2f}",
            **table,
            "rude": f"{mean(not verdict['harmless'] for verdict in verdicts):.0%}",
            "about another product": f"{mean(not verdict['product'] for verdict in verdicts):.0%}",
        }
    return table


def lay_out(label: str, text: str, lines: int) -> str:
    """A labelled block of at most `lines` lines of the terminal, its blank lines left out."""
    wrapped = []
    for line in filter(str.strip, text.splitlines()):
        wrapped += textwrap.wrap(line.strip(), WIDTH - 10)
    if len(wrapped) > lines:
        wrapped = [*wrapped[:lines], "[...]"]
    return f"{label:<10}" + ("\n" + " " * 10).join(wrapped or ["-"])


def show(replies: dict[str, list[dict]], count: int, is_toy: bool) -> str:
    """The first `count` prompts with each model's reply (label to rows), and the table."""
    blocks = []
    first = next(iter(replies.values()))
    for i, row in enumerate(first[:count]):
        prompt = row["prompt"].strip()
        if len(prompt) > 400:
            prompt = "[...] " + prompt[-400:]
        block = [lay_out("prompt", prompt, 8)]
        block += [lay_out(label, rows[i]["reply"], 5) for label, rows in replies.items()]
        blocks.append("\n".join(block))
    tables = [figures(rows, is_toy) for rows in replies.values()]
    head = f"{f'{len(first)} prompts':<46}" + "".join(f"{label:>12}" for label in replies)
    lines = [f"{key:<46}" + "".join(f"{t[key]:>12}" for t in tables) for key in tables[0]]
    return "\n\n".join([*blocks, "\n".join([head, *lines])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m archangel.sample",
        description="A trained model's replies to held-out prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="a folder, `toy`, a short name (pythia-1.4b) or a hub id")
    add("--against", metavar="MODEL", help="a second model, what was before; shown side by side")
    add("--data", default="toy", help="`toy`, a folder with test.jsonl, or a .jsonl(.gz) file")
    add("--n", type=int, default=100, help="prompts to reply to, the first ones of the data")
    add("--show", type=int, default=4, help="prompts whose replies are printed")
    add("--out", type=Path, help="a .jsonl for MODEL's replies; what is there is not sampled again")
    add("--seed", type=int, default=1, help="of the noise; the same for both models")
    add("--batch_size", type=int, default=50, help="prompts at a time; changes speed only")
    add("--max_new_tokens", type=int, default=64, help="most tokens of a reply")
    add("--top_p", type=float, default=0.95, help="sample from the likeliest so much of the mass")
    given = parser.parse_args(arguments)
    disable_progress_bar()  # transformers' own, for loading weights
    with common.exit_status():
        for name, least in (("n", 1), ("show", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            if getattr(given, name) < least:
                raise common.UserError(f"--{name} {getattr(given, name)}: at least {least}")
        if not 0 < given.top_p <= 1:
            raise common.UserError(f"--top_p {given.top_p}: above 0 and at most 1")
        if given.out and not given.out.parent.is_dir():
            raise common.UserError(f"--out {given.out}: no folder {given.out.parent}")
        rows = read_prompts(given.data, given.n)
        names = {"reply": given.model}
        if given.against is not None:
            names = {"before": given.against, "after": given.model}
        paths = {label: common.find_model(name) for label, name in names.items()}
        sampling = {name: getattr(given, name) for name in ("seed", "top_p", "max_new_tokens")}
        replies = {}
        for label, path in paths.items():
            out = None if label == "before" else given.out
            replies[label] = reply_to(path, rows, batch_size=given.batch_size, out=out, **sampling)
        print(show(replies, given.show, is_toy=given.data == "toy"))


if __name__ == "__main__":
    main()
