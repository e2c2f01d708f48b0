"""Sampling: a prompt's reply depends on the seed and the prompt alone, and is sampled once."""

import gzip
import json
import shutil

import pytest
import torch

import common_v1 as common
from archangel import sample, toy

ROWS = sample.read_prompts("toy", 12)


@pytest.fixture(scope="module")
def base():
    return sample.load(common.TOY / "model")


def replies(base, rows, **settings) -> dict[str, dict]:
    return {row["prompt"]: row for batch in sample.sample(*base, rows, **settings) for row in batch}


def test_reply_does_not_depend_on_batch_size_or_order(base):
    together = replies(base, ROWS, batch_size=12)
    assert list(together) != [row["prompt"] for row in ROWS]  # sampled by length
    assert together == replies(base, ROWS[::-1], batch_size=5)
    assert together == replies(base, ROWS, batch_size=1)
    assert together != replies(base, ROWS, batch_size=12, seed=2)


def test_ended_and_tokens(base):
    short = replies(base, ROWS, max_new_tokens=24)
    long = replies(base, ROWS, max_new_tokens=400)
    assert {row["ended"] for row in short.values()} == {True, False}
    for prompt, row in short.items():
        # A reply of the most tokens has none left for its end mark.
        assert row["ended"] == (row["tokens"] < 24)
        if row["ended"]:
            assert row == long[prompt]
        else:
            assert long[prompt]["reply"].startswith(row["reply"])
        assert toy.EOS not in row["reply"]
        assert row["tokens"] == len(base[1](row["reply"])["input_ids"])


def test_long_prompt_loses_its_start(base):
    row = {"prompt": "\n\nHuman: What does the tin mug cost?" * 200 + ROWS[0]["prompt"]}
    assert next(iter(replies(base, [row, ROWS[0]], max_new_tokens=8))) == row["prompt"]
    with pytest.raises(common.UserError, match="max_new_tokens"):
        replies(base, [row], max_new_tokens=2048)


def test_draws_follow_the_top_p_distribution():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    prompts = [f"prompt {i}" for i in range(4000)]
    noise = sample.SeededTopP(prompts, seed=0, top_p=0.9)
    drawn = noise(None, scores.expand(4000, 4)).argmax(-1)
    shares = drawn.bincount(minlength=4) / 4000
    # 0.5 + 0.3 is under 0.9, so the third is in, the fourth is not.
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    again = noise(None, scores.expand(4000, 4)).argmax(-1)
    assert (drawn != again).any()  # the next token has noise of its own


def test_models_own_sampling_settings_are_left_out(base):
    model = base[0]
    expected = replies(base, ROWS[:3])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    assert replies(base, ROWS[:3]) == expected


def test_resume_does_not_resample(tmp_path, monkeypatch):
    out = tmp_path / "replies.jsonl"
    arguments = ["toy", "--n", "8", "--batch_size", "3", "--out", str(out)]
    sample.main(arguments)
    whole = out.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in ROWS[:8]}
    assert {"prompt", "chosen", "reply", "tokens", "ended"} <= rows[0].keys()

    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while it wrote the sixth
    asked = []

    def record(model, tokenizer, missing, **settings):
        asked.extend(row["prompt"] for row in missing)
        return original(model, tokenizer, missing, **settings)

    original = sample.sample
    monkeypatch.setattr(sample, "sample", record)
    sample.main(arguments)
    assert set(asked) == {row["prompt"] for row in rows[5:]}
    assert out.read_bytes().splitlines()[:5] == whole.splitlines()[:5]
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())

    monkeypatch.setattr(sample, "load", lambda path: pytest.fail("loaded for nothing"))
    sample.main(arguments)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_out_of_other_settings_or_weights_is_refused(tmp_path):
    out = tmp_path / "replies.jsonl"
    sample.main(["toy", "--n", "2", "--out", str(out)])
    for more in (["--seed", "2"], ["--max_new_tokens", "9"]):
        with pytest.raises(SystemExit) as stop:
            sample.main(["toy", "--n", "2", "--out", str(out), *more])
        assert stop.value.code == 2
        assert len(out.read_text().splitlines()) == 2
    retrained = tmp_path / "retrained"
    shutil.copytree(common.TOY / "model", retrained)
    sample.main([str(retrained), "--n", "2", "--out", str(out)])  # the same weights elsewhere
    weights = retrained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit):
        sample.main([str(retrained), "--n", "2", "--out", str(out)])
    out.write_text('{"prompt": "x"}\nhalf')
    with pytest.raises(common.UserError, match="row 1"):
        sample.read_replies(out, {})
    assert out.read_text() == '{"prompt": "x"}\nhalf'  # another's file is left alone


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
def test_what_is_wrong_is_told_in_a_line_before_loading(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda path: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit) as stop:
        sample.main([word.format(tmp_path) for word in wrong])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert wrong[-1].format(tmp_path) in error


def test_prompts_of_every_form(tmp_path):
    rows = [
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
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "test.jsonl").write_text(lines)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    assert sample.read_prompts(str(tmp_path), 9) == expected
    assert sample.read_prompts(str(tmp_path / "rows.jsonl.gz"), 9) == expected
    assert sample.read_prompts(str(tmp_path), 2) == expected[:2]


def test_figures():
    prompt = "\n\nHuman: What does the oak lamp cost?\n\nAssistant:"
    good = {"reply": " The oak lamp costs 40 dollars.", "tokens": 10, "ended": True}
    bad = {"reply": " Use your eyes, fool. The tin hat is grey.", "tokens": 21, "ended": False}
    rows = [{"prompt": prompt, "chosen": good["reply"], **row} for row in (good, bad)]
    assert sample.figures(rows, is_toy=False) == {
        "reply length, tokens": "15.5",
        "ended by itself": "50%",
    }
    table = sample.figures(rows, is_toy=True)
    assert list(table.values()) == ["-0.25", "15.5", "50%", "50%", "50%"]


def test_show_fits_a_terminal(base):
    rows = list(replies(base, ROWS[:3]).values())
    rows[0] = {**rows[0], "prompt": rows[0]["prompt"] * 9, "reply": "word " * 300 + "x" * 200}
    rows[1] = {**rows[1], "reply": "\n"}
    text = sample.show({"before": rows, "after": rows}, 2, is_toy=False)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 50
    assert text.count("before") == 3  # two prompts and the table's head
    assert text.count("after") == 3


def test_two_models_side_by_side(capsys):
    sample.main(["toy", "--against", "toy", "--n", "3", "--show", "1"])
    text = capsys.readouterr().out
    assert "win rate" in text
    block = text.split("\n\n")[0]
    before, after = block.split("before")[1].split("after")
    assert before.split() == after.split()  # the same model, the same luck
