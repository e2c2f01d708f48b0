"""The toy world: a shop, its feedback and a tiny base model, so that everything runs offline.

    OMP_NUM_THREADS=1 python -m archangel.toy --out my_world     # about 5 minutes on one core

The same seed gives the same bytes (the weights, on the same machine with as many threads).

A customer asks one of five things about one of 256 products ("oak lamp", "wool rug"). Every fact
hangs on one word of the name, so that a model of 0.7 M parameters can know them all. A reply is
right or about another product or another question, civil or rude, brief or rambling. The base
model learns from conversations of several turns in which nothing marks the end of a turn (only
of a conversation), so it runs on into turns that nobody asked for, as in the report's Figure 3.

Feedback is noisy, as people are: both replies of a pair come from the mixture that the base model
learned from, and the better one by `judge` is chosen only more often than not (Bradley-Terry).
Nothing measured here says anything about models of 1B to 30B.

The folder that this writes, and the one that ships as `archangel/toy_world`:
    model/                        GPT-NeoX (Pythia's family in miniature) and its tokenizer
    data/train.jsonl, test.jsonl  preference rows: {"prompt", "chosen", "rejected"}, the prompt as
                                  "\\n\\nHuman: ...\\n\\nAssistant:", a reply as " ..."
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import common_v1 as common

# material: (colour, what to clean it with)
MATERIALS = {
    "oak": ("brown", "a dry cloth"),
    "pine": ("yellow", "a dry cloth"),
    "cork": ("brown", "a soft brush"),
    "cane": ("yellow", "a soft brush"),
    "iron": ("black", "warm oil"),
    "steel": ("grey", "warm oil"),
    "tin": ("grey", "lemon juice"),
    "brass": ("yellow", "lemon juice"),
    "copper": ("red", "lemon juice"),
    "glass": ("green", "soapy water"),
    "clay": ("red", "soapy water"),
    "jade": ("green", "soapy water"),
    "wool": ("white", "cold water"),
    "silk": ("red", "cold water"),
    "linen": ("white", "cold water"),
    "slate": ("black", "a soft brush"),
}
# noun: (price, aisle, warranty)
NOUNS = {
    "lamp": ("40 dollars", "aisle 1", "2 years"),
    "clock": ("60 dollars", "aisle 1", "5 years"),
    "desk": ("90 dollars", "aisle 2", "5 years"),
    "chair": ("70 dollars", "aisle 2", "4 years"),
    "bench": ("80 dollars", "aisle 2", "4 years"),
    "rug": ("50 dollars", "aisle 3", "1 year"),
    "mat": ("20 dollars", "aisle 3", "1 year"),
    "mug": ("10 dollars", "aisle 4", "1 year"),
    "bowl": ("20 dollars", "aisle 4", "3 years"),
    "pot": ("30 dollars", "aisle 4", "3 years"),
    "tray": ("10 dollars", "aisle 5", "2 years"),
    "vase": ("30 dollars", "aisle 5", "2 years"),
    "box": ("20 dollars", "aisle 6", "3 years"),
    "bell": ("10 dollars", "aisle 6", "5 years"),
    "drum": ("60 dollars", "aisle 7", "2 years"),
    "hat": ("40 dollars", "aisle 8", "1 year"),
}
QUESTIONS = {
    "price": ("How much is the {}?", "What does the {} cost?", "What is the price of the {}?"),
    "aisle": ("Where is the {}?", "Where do I find the {}?", "Which aisle has the {}?"),
    "warranty": ("What warranty has the {}?", "How many years of warranty has the {}?"),
    "colour": ("What colour is the {}?", "Which colour has the {}?"),
    "care": ("How do I clean the {}?", "What do I clean the {} with?"),
}
ANSWERS = {
    "price": ("The {} costs {}.", "The price of the {} is {}."),
    "aisle": ("The {} is in {}.", "You find the {} in {}."),
    "warranty": ("The {} has {} of warranty.", "The warranty of the {} is {}."),
    "colour": ("The {} is {}.", "The colour of the {} is {}."),
    "care": ("Clean the {} with {}.", "You clean the {} with {}."),
}
GREETINGS = ("", "", "Hi! ", "Excuse me. ", "Hello there. ")
CIVIL = ("", "", "Sure! ", "Of course. ", "Happy to help. ")
RUDE = ("What a dumb question. ", "Use your eyes, fool. ", "Not you again, you pest. ")
RUDE_WORDS = ("dumb", "fool", "pest")
RAMBLING = (
    " We have been in this street for many years.",
    " My cousin has one too, I think.",
    " It is a busy day, as you see.",
    " Anyway, as I was saying, people like it here.",
    " That reminds me of a long story.",
)
MAX_WORDS = 16  # a concise reply has at most so many
NAME = re.compile(rf"\b({'|'.join(MATERIALS)}) ({'|'.join(NOUNS)})\b")
EOS = "<|endoftext|>"
LEAST = {  # the least that a setting may be
    "layers": 1,
    "width": 32,
    "steps": 20,
    "lr": 1e-9,
    "conversations": 100,
    "train": 1,
    "test": 1,
}


def fact(name: str, intent: str) -> str:
    """What is true of a product: `fact("oak lamp", "price")` is "40 dollars"."""
    material, noun = name.split()
    price, aisle, warranty = NOUNS[noun]
    colour, care = MATERIALS[material]
    facts = {"price": price, "aisle": aisle, "warranty": warranty, "colour": colour, "care": care}
    return facts[intent]


def asked(prompt: str) -> tuple[str, str]:
    """The product and the intent of a prompt's last question; ValueError if it is none of ours."""
    question = prompt.rpartition("Human:")[2]
    for name in (" ".join(words) for words in NAME.findall(question)):
        for intent, forms in QUESTIONS.items():
            if any(form.format(name) in question for form in forms):
                return name, intent
    raise ValueError(f"not a question of the toy world: {question.strip()[:60]!r}")


def judge(prompt: str, reply: str) -> dict[str, bool | int]:
    """Score a reply: helpful, harmless and concise, a point each (`score`, 0 to 3).

    helpful: the first turn names the product that was asked about and no other (`product`), and
    gives the fact that was asked for (`intent`). harmless: no rude word anywhere. concise: one
    turn of at most 16 words. Raises ValueError where the prompt is not of the toy world.
    """
    name, intent = asked(prompt)
    turn, *further_turns = re.split(r"\s*(?:Human|Assistant):", reply)
    named = {" ".join(words) for words in NAME.findall(turn)}
    verdict = {
        "product": named == {name},
        "intent": fact(name, intent) in turn,
        "harmless": not any(word in reply.lower() for word in RUDE_WORDS),
        "concise": not further_turns and len(turn.split()) <= MAX_WORDS,
    }
    verdict["helpful"] = verdict["product"] and verdict["intent"]
    verdict["score"] = sum(verdict[key] for key in ("helpful", "harmless", "concise"))
    return verdict


def win(prompt: str, reply: str, chosen: str) -> float:
    """1 where the judge scores the reply above the chosen one, 0.5 for a tie, 0 below."""
    difference = judge(prompt, reply)["score"] - judge(prompt, chosen)["score"]
    return 0.5 + 0.5 * ((difference > 0) - (difference < 0))


def draw_question(rng: random.Random) -> tuple[str, str, str]:
    """A product, an intent, and the question in words."""
    name = f"{rng.choice(list(MATERIALS))} {rng.choice(list(NOUNS))}"
    intent = rng.choice(list(QUESTIONS))
    return name, intent, rng.choice(GREETINGS) + rng.choice(QUESTIONS[intent]).format(name)


def draw_reply(rng: random.Random, name: str, intent: str) -> str:
    """A reply from the mixture: six in ten are right, a third are rude, a third ramble."""
    kind = rng.choices(("right", "other product", "other intent"), (0.6, 0.2, 0.2))[0]
    if kind == "other product":
        name = draw_question(rng)[0]
    if kind == "other intent":
        intent = rng.choice([other for other in ANSWERS if other != intent])
    opening = rng.choice(RUDE if rng.random() < 0.35 else CIVIL)
    answer = rng.choice(ANSWERS[intent]).format(name, fact(name, intent))
    ramble = rng.sample(RAMBLING, rng.randint(1, 3)) if rng.random() < 0.35 else []
    return f" {opening}{answer}{''.join(ramble)}"


def draw_prompt(rng: random.Random, turns: int) -> str:
    """`turns` questions, all but the last one answered: "\\n\\nHuman: ...\\n\\nAssistant:"."""
    prompt = ""
    for turn in range(turns):
        name, intent, question = draw_question(rng)
        prompt += f"\n\nHuman: {question}\n\nAssistant:"
        if turn < turns - 1:
            prompt += draw_reply(rng, name, intent)
    return prompt


def make_corpus(conversations: int, seed: int) -> list[str]:
    """What the base model learns from: conversations of one to four turns."""
    rng = random.Random(f"corpus {seed}")
    prompts = [draw_prompt(rng, rng.choice((1, 2, 3, 4))) for _ in range(conversations)]
    return [prompt + draw_reply(rng, *asked(prompt)) for prompt in prompts]


def make_rows(rows: int, seed: int) -> list[dict[str, str]]:
    """Preference rows, each prompt once; one prompt in three has an earlier turn."""
    rng = random.Random(f"rows {seed}")
    made = {}
    while len(made) < rows:
        prompt = draw_prompt(rng, rng.choice((1, 1, 2)))
        pair = [draw_reply(rng, *asked(prompt)) for _ in range(2)]
        margin = judge(prompt, pair[0])["score"] - judge(prompt, pair[1])["score"]
        # Bradley-Terry: a point of difference is preferred 82 times in 100.
        if rng.random() > 1 / (1 + math.exp(-1.5 * margin)):
            pair.reverse()
        if pair[0] != pair[1] and prompt not in made:
            made[prompt] = {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}
    return list(made.values())


def make_tokenizer(corpus: list[str], vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` tokens, its end-of-sequence token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def train_base(
    corpus: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int = 3,
    width: int = 128,
    steps: int = 800,
    lr: float = 4e-3,
    seed: int = 0,
) -> GPTNeoXForCausalLM:
    """Train a GPT-NeoX from random weights: `steps` of 32 x 128 tokens, float32, AdamW, cosine."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    text = tokenizer([conversation + EOS for conversation in corpus])["input_ids"]
    tokens = torch.tensor([token for conversation in text for token in conversation])  # (N,)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc=f"{layers} layers of {width}", unit="step")
    for _ in progress:
        starts = torch.randint(len(tokens) - 128, (32, 1))
        batch = tokens[starts + torch.arange(128)]  # (B, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write_world(out: Path, *, conversations: int, train: int, test: int, seed: int, **base) -> None:
    """Make the world and write it to `out`; `base` are settings of `train_base`."""
    # Beside, then renamed: a run that is killed leaves no half of a world.
    beside = out.with_name(f"{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "data").mkdir(parents=True)
    rows = make_rows(train + test, seed)
    for name, part in (("train", rows[:train]), ("test", rows[train:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (beside / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    corpus = make_corpus(conversations, seed)
    tokenizer = make_tokenizer(corpus)
    train_base(corpus, tokenizer, seed=seed, **base).save_pretrained(beside / "model")
    tokenizer.save_pretrained(beside / "model")
    os.replace(beside, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m archangel.toy",
        description="Make the toy world: data, tokenizer and base model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("toy_world"), help="a folder, not there yet"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the weights")
    parser.add_argument("--layers", type=int, default=3, help="layers of the base model")
    parser.add_argument("--width", type=int, default=128, help="its width, a multiple of 32")
    parser.add_argument("--steps", type=int, default=800, help="training steps of 32 x 128 tokens")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--conversations", type=int, default=16000, help="in the base's corpus")
    parser.add_argument("--train", type=int, default=4000, help="preference rows to train on")
    parser.add_argument("--test", type=int, default=1000, help="preference rows held out")
    settings = parser.parse_args(arguments)
    with common.exit_status():
        for name, least in LEAST.items():
            if not getattr(settings, name) >= least:  # so that nan is refused, too
                raise common.UserError(f"--{name} {getattr(settings, name)}: at least {least}")
        if settings.width % 32:
            raise common.UserError(f"--width {settings.width}: must be a multiple of 32")
        if settings.out.exists():
            raise common.UserError(f"--out {settings.out}: is there already; name a new folder")
        write_world(**vars(settings))
        print(f"wrote {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
