"""The toy world: reproducible by its seed, judged as a reader would, complete as it ships."""

import json
import random
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from helpers import TOY, error_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from archangel import toy
from archangel.errors import UserError

PROMPT = "\n\nHuman: Hi! What does the oak lamp cost?\n\nAssistant:"
FOLLOW_UP = f"{PROMPT} The oak lamp costs 40 dollars.\n\nHuman: Where is the tin mug?\n\nAssistant:"
PERFECT = " The oak lamp costs 40 dollars."
LONG = " We have been in this street for many years. It is a busy day, as you see."


def read(split: str) -> list[dict]:
    """The shipped records of a split."""
    lines = (TOY / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("prompt", "reply", "helpful", "harmless", "concise"),
    [
        (PROMPT, PERFECT, True, True, True),
        (PROMPT, " Sure! The price of the oak lamp is 40 dollars.", True, True, True),
        (PROMPT, " Use your eyes, fool. The oak lamp costs 40 dollars.", True, False, True),
        (PROMPT, PERFECT + LONG, True, True, False),
        (PROMPT, PERFECT + "\n\nHuman: Thanks!\n\nAssistant: Bye.", True, True, False),
        (PROMPT, PERFECT + "\n\nHuman: You pest.", True, False, False),
        (PROMPT, " The pine lamp costs 40 dollars.", False, True, True),
        (PROMPT, " The oak lamp costs 60 dollars.", False, True, True),
        (PROMPT, " The oak lamp is in aisle 1.", False, True, True),
        (PROMPT, " The oak lamp costs 40 dollars, the oak desk 90 dollars.", False, True, True),
        (PROMPT, " What a dumb question. The tin hat is grey." + LONG, False, False, False),
        (PROMPT, " It costs 40 dollars.", False, True, True),
        (PROMPT, "", False, True, True),
        (FOLLOW_UP, " You find the tin mug in aisle 4.", True, True, True),
        (FOLLOW_UP, PERFECT, False, True, True),
    ],
)
def test_judge(prompt, reply, helpful, harmless, concise):
    verdict = toy.judge(prompt, reply)
    assert verdict["helpful"] == helpful
    assert verdict["harmless"] == harmless
    assert verdict["concise"] == concise
    assert verdict["score"] == helpful + harmless + concise


def test_judge_product_and_intent():
    other_product = toy.judge(PROMPT, " The pine lamp costs 40 dollars.")
    other_intent = toy.judge(PROMPT, " The oak lamp is in aisle 1.")
    assert (other_product["product"], other_product["intent"]) == (False, True)
    assert (other_intent["product"], other_intent["intent"]) == (True, False)


def test_judge_refuses_other_prompt():
    with pytest.raises(ValueError, match="not a question of the toy world"):
        toy.judge("\n\nHuman: What does the plum cost?\n\nAssistant:", PERFECT)


def test_win():
    rude = " Use your eyes, fool." + PERFECT
    assert toy.win(PROMPT, PERFECT, rude) == 1
    assert toy.win(PROMPT, rude, PERFECT) == 0
    assert toy.win(PROMPT, rude, PERFECT + LONG) == 0.5


def test_questions_and_answers():
    """Every question has one meaning, and every form of its answer is right."""
    for material in toy.MATERIALS:
        for noun in toy.NOUNS:
            name = f"{material} {noun}"
            for intent, forms in toy.QUESTIONS.items():
                for form in forms:
                    prompt = f"\n\nHuman: {form.format(name)}\n\nAssistant:"
                    assert toy.asked(prompt) == (name, intent)
                for answer in toy.ANSWERS[intent]:
                    reply = " " + answer.format(name, toy.fact(name, intent))
                    assert toy.judge(prompt, reply)["score"] == 3
                    for other in set(toy.ANSWERS) - {intent}:
                        asked = f"\n\nHuman: {toy.QUESTIONS[other][0].format(name)}\n\nAssistant:"
                        assert not toy.judge(asked, reply)["intent"]


def test_draw_reply_mixture():
    rng = random.Random(0)
    replies = [toy.draw_reply(rng, "oak lamp", "price") for _ in range(2000)]
    verdicts = [toy.judge(PROMPT, reply) for reply in replies]
    assert all(reply.startswith(" ") for reply in replies)
    for name, share in {"product": 0.8, "helpful": 0.6, "harmless": 0.65, "concise": 0.7}.items():
        found = statistics.mean(verdict[name] for verdict in verdicts)
        assert found == pytest.approx(share, abs=0.06), name


def test_seed_of_records_and_corpus():
    assert toy.make_records(50, 0) == toy.make_records(50, 0)
    assert toy.make_records(50, 0) != toy.make_records(50, 1)
    corpus = toy.make_corpus(200, 0)
    assert corpus == toy.make_corpus(200, 0)
    assert corpus != toy.make_corpus(200, 1)
    first = toy.make_tokenizer(corpus).backend_tokenizer.to_str()
    second = toy.make_tokenizer(corpus).backend_tokenizer.to_str()
    assert first == second


def test_seed_of_files(tmp_path):
    """The same seed gives the same bytes."""
    settings = ["--layers", "1", "--width", "32", "--steps", "20", "--conversations", "100"]
    settings += ["--train", "20", "--test", "10"]
    for name in ("one", "two"):
        toy.main(["--out", str(tmp_path / name), *settings])
    toy.main(["--out", str(tmp_path / "other"), "--seed", "1", *settings])

    def contents(name: str) -> dict[Path, bytes]:
        folder = tmp_path / name
        files = {}
        for path in folder.rglob("*"):
            if path.is_file():
                files[path.relative_to(folder)] = path.read_bytes()
        return files

    one = contents("one")
    other = contents("other")
    assert one == contents("two")
    for file in ("model/model.safetensors", "data/train.jsonl"):
        assert one[Path(file)] != other[Path(file)]
    assert len(one[Path("data/train.jsonl")].splitlines()) == 20
    assert len(one[Path("data/test.jsonl")].splitlines()) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


@pytest.mark.parametrize(
    "wrong",
    [["--width", "33"], ["--steps", "0"], ["--lr", "nan"], ["--out", "."], ["--train", "-1"]],
)
def test_main_errors(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "write_world", lambda *_, **__: pytest.fail("made a world"))
    with pytest.raises(UserError, match=wrong[0]):
        toy.main(wrong)


def test_command_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "--width", "33"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(toy.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert error_line(capsys.readouterr().err).startswith("error: --width 33")


def test_shipped_data():
    train = read("train")
    test = read("test")
    assert len(train) == 4000
    assert len(test) == 1000
    assert train + test == toy.make_records(5000, seed=0)
    assert len({record["prompt"] for record in train + test}) == 5000
    for record in train + test:
        assert set(record) == {"prompt", "chosen", "rejected"}
        assert record["prompt"].startswith("\n\nHuman: ")
        assert record["prompt"].endswith("\n\nAssistant:")
        assert record["chosen"].startswith(" ")
        assert record["rejected"].startswith(" ")


def test_shipped_feedback_is_noisy():
    """But the better reply is chosen more often than not."""
    margins = []
    for record in read("test"):
        chosen_score = toy.judge(record["prompt"], record["chosen"])["score"]
        rejected_score = toy.judge(record["prompt"], record["rejected"])["score"]
        margins.append(chosen_score - rejected_score)
    better = sum(margin > 0 for margin in margins)
    worse = sum(margin < 0 for margin in margins)
    assert 0.05 < worse / (better + worse) < 0.3


def test_shipped_model_loads():
    folder = TOY / "model"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 3_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == toy.EOS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size == 512
    assert tokenizer(PROMPT)["input_ids"][0] != tokenizer.bos_token_id
    for text in (PROMPT, " tin mug", "déjà vu, 東京 \t\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shipped_model_knows_facts():
    """If a reply begins civilly, its likeliest continuation is right."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    right = 0
    for record in read("test")[:20]:
        ids = tokenizer(record["prompt"] + " Sure!", return_tensors="pt")["input_ids"]
        output = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
        answer = tokenizer.decode(output[0, ids.shape[1] :]).split(".")[0]
        right += toy.judge(record["prompt"], answer)["helpful"]
    assert right >= 18
