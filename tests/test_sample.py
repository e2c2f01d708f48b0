"""Sampling: a prompt's reply depends on the seed and the prompt alone, and is sampled once."""

import gzip
import json
import runpy
import shutil
import sys

import pytest
import torch
from helpers import TOY, error_line, write_records

from archangel import sample, toy
from archangel.errors import UserError

PROMPTS = sample.read_prompts("toy", 12)


@pytest.fixture(scope="module")
def base():
    return sample.load(TOY / "model")


def sample_all(base, prompts, **settings) -> dict[str, dict]:
    """The replies by prompt, in the order in which they are sampled."""
    replies = {}
    for batch in sample.sample(*base, prompts, **settings):
        for reply in batch:
            replies[reply["prompt"]] = reply
    return replies


def test_sample_any_batch_and_order(base):
    """A reply does not depend on the other prompts of its batch."""
    replies = sample_all(base, PROMPTS, batch_size=12)
    assert list(replies) != [prompt["prompt"] for prompt in PROMPTS]  # sampled by length
    assert replies == sample_all(base, list(reversed(PROMPTS)), batch_size=5)
    assert replies == sample_all(base, PROMPTS, batch_size=1)
    assert replies != sample_all(base, PROMPTS, batch_size=12, seed=2)


def test_sample_ended_and_tokens(base):
    _, tokenizer = base
    short = sample_all(base, PROMPTS, max_new_tokens=24)
    long = sample_all(base, PROMPTS, max_new_tokens=400)
    assert {reply["ended"] for reply in short.values()} == {True, False}
    for prompt, reply in short.items():
        # A reply of 24 tokens has no room for the end-of-sequence token.
        assert reply["ended"] == (reply["tokens"] < 24)
        if reply["ended"]:
            assert reply == long[prompt]
        else:
            assert long[prompt]["reply"].startswith(reply["reply"])
        assert toy.EOS not in reply["reply"]
        assert reply["tokens"] == len(tokenizer(reply["reply"])["input_ids"])


def test_sample_cuts_long_prompt(base):
    question = "\n\nHuman: What does the tin mug cost?"
    long_prompt = {"prompt": question * 200 + PROMPTS[0]["prompt"]}
    replies = sample_all(base, [long_prompt, PROMPTS[0]], max_new_tokens=8)
    assert list(replies) == [long_prompt["prompt"], PROMPTS[0]["prompt"]]
    with pytest.raises(UserError, match="max_new_tokens"):
        sample_all(base, [long_prompt], max_new_tokens=2048)


def test_seeded_top_p():
    """Its draws have the distribution of top-p sampling."""
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    prompts = [f"prompt {number}" for number in range(4000)]
    noise = sample.SeededTopP(prompts, seed=0, top_p=0.9, device=torch.device("cpu"))
    drawn = noise(None, scores.expand(4000, 4)).argmax(-1)
    shares = drawn.bincount(minlength=4) / 4000
    # 0.5 + 0.3 is below 0.9, so the third can be drawn, the fourth cannot.
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    again = noise(None, scores.expand(4000, 4)).argmax(-1)
    assert (drawn != again).any()  # the noise of the next token is different


def test_sample_ignores_generation_config(base):
    """The model's own settings, such as a temperature, do not change the distribution."""
    model, _ = base
    expected = sample_all(base, PROMPTS[:3])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    assert sample_all(base, PROMPTS[:3]) == expected


def test_main_resumes(tmp_path, monkeypatch):
    """What --out has already is not sampled again."""
    out = tmp_path / "replies.jsonl"
    arguments = ["toy", "--n", "8", "--batch_size", "3", "--out", str(out)]
    sample.main(arguments)
    lines = out.read_bytes().splitlines(keepends=True)
    replies = [json.loads(line) for line in lines]
    assert {reply["prompt"] for reply in replies} == {prompt["prompt"] for prompt in PROMPTS[:8]}
    assert {"prompt", "chosen", "reply", "tokens", "ended"} <= replies[0].keys()

    out.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while it wrote the sixth
    sampled = []
    original = sample.sample

    def spy(model, tokenizer, missing, **settings):
        sampled.extend(prompt["prompt"] for prompt in missing)
        return original(model, tokenizer, missing, **settings)

    monkeypatch.setattr(sample, "sample", spy)
    sample.main(arguments)
    assert set(sampled) == {reply["prompt"] for reply in replies[5:]}
    lines_after = out.read_bytes().splitlines(keepends=True)
    assert lines_after[:5] == lines[:5]
    assert sorted(lines_after) == sorted(lines)

    monkeypatch.setattr(sample, "load", lambda path: pytest.fail("loaded for nothing"))
    sample.main(arguments)
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_main_refuses_other_settings(tmp_path):
    """And other weights: the replies of one file are all of one model, sampled alike."""
    out = tmp_path / "replies.jsonl"
    sample.main(["toy", "--n", "2", "--out", str(out)])
    for more in (["--seed", "2"], ["--max_new_tokens", "9"]):
        with pytest.raises(UserError, match="row 1: sampled with"):
            sample.main(["toy", "--n", "2", "--out", str(out), *more])
        assert len(out.read_text().splitlines()) == 2
    copied = tmp_path / "copied"
    shutil.copytree(TOY / "model", copied)
    sample.main([str(copied), "--n", "2", "--out", str(out)])  # the same weights elsewhere
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="row 1: sampled with"):
        sample.main([str(copied), "--n", "2", "--out", str(out)])


def test_read_replies_refuses_other_file(tmp_path):
    """And leaves it as it is."""
    out = tmp_path / "other.jsonl"
    out.write_text('{"prompt": "x"}\nhalf')
    with pytest.raises(UserError, match="row 1"):
        sample.read_replies(out, {})
    assert out.read_text() == '{"prompt": "x"}\nhalf'


@pytest.mark.parametrize(
    "wrong",
    [
        ["{}/nothing"],
        ["toy", "--against", "{}/nothing"],
        ["toy", "--data", "{}/nothing"],
        ["toy", "--data", "{}"],
        ["toy", "--out", "{}/nothing/replies.jsonl"],
        ["toy", "--top_p", "0"],
        ["toy", "--n", "0"],
    ],
)
def test_main_errors(wrong, tmp_path, monkeypatch):
    """In one line, before a model is loaded."""
    monkeypatch.setattr(sample, "load", lambda path: pytest.fail("loaded a model"))
    with pytest.raises(UserError) as raised:
        sample.main([word.format(tmp_path) for word in wrong])
    message = str(raised.value)
    assert "\n" not in message
    assert wrong[-1].format(tmp_path) in message


def test_command_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample", "toy", "--n", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sample.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert error_line(capsys.readouterr().err).startswith("error: --n 0")


def test_read_prompts_formats(tmp_path):
    records = [
        {"prompt": "a", "completion": "bad", "label": False},
        {"prompt": "a", "completion": "good", "label": True},
        {"prompt": "b", "completion": "bad", "label": False},
        {"prompt": "c", "completion": "only"},
        {"prompt": "d", "chosen": "this", "rejected": "that"},
    ]
    expected = [
        {"prompt": "a", "chosen": "good"},
        {"prompt": "b"},
        {"prompt": "c", "chosen": "only"},
        {"prompt": "d", "chosen": "this"},
    ]
    lines = write_records(tmp_path / "test.jsonl", records).read_text()
    compressed = tmp_path / "records.jsonl.gz"
    with gzip.open(compressed, "wt") as file:
        file.write(lines)
    assert sample.read_prompts(str(tmp_path), 9) == expected
    assert sample.read_prompts(str(compressed), 9) == expected
    assert sample.read_prompts(str(tmp_path), 2) == expected[:2]


def test_summarize():
    prompt = "\n\nHuman: What does the oak lamp cost?\n\nAssistant:"
    right = " The oak lamp costs 40 dollars."
    wrong = " Use your eyes, fool. The tin hat is grey."
    replies = [
        {"prompt": prompt, "chosen": right, "reply": right, "tokens": 10, "ended": True},
        {"prompt": prompt, "chosen": right, "reply": wrong, "tokens": 21, "ended": False},
    ]
    table = sample.summarize(replies, is_toy=False)
    assert list(table.values()) == ["15.5", "50%"]
    table = sample.summarize(replies, is_toy=True)
    assert list(table.values()) == ["-0.25", "15.5", "50%", "50%", "50%"]


def test_show_fits_terminal(base):
    replies = list(sample_all(base, PROMPTS[:3]).values())
    replies[0]["prompt"] *= 9
    replies[0]["reply"] = "word " * 300 + "x" * 200
    replies[1]["reply"] = "\n"
    text = sample.show({"before": replies, "after": replies}, 2, is_toy=False)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 50
    assert text.count("before") == 3  # two prompts and the table's head
    assert text.count("after") == 3


def test_main_against(capsys):
    sample.main(["toy", "--against", "toy", "--n", "3", "--show", "1"])
    text = capsys.readouterr().out
    assert "win rate" in text
    block = text.split("\n\n")[0]
    before, after = block.split("before")[1].split("after")
    assert before.split() == after.split()  # the same model and the same noise
