"""The suite: its plan, running and resuming it, failures; numbers, claims, figures, report."""

import contextlib
import dataclasses
import json
import runpy
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import error_line, write_records, write_toy_folder
from matplotlib.figure import Figure

import dpo
import kto
import ppo_offline
import sft
import slic
from archangel import claims, figures, judge, kto_variants, results, sample, statistics, suite, toy
from archangel.errors import Interrupted, UserError
from archangel.records import read_records
from archangel.run import MODELS, find_model, load_tokenizer, parse_args
from archangel.tokenized import tokenize
from common import Example, Examples

LOSSES = {"sft": sft, "slic": slic, "dpo": dpo, "ppo": ppo_offline, "kto": kto}
MODULES = {f"{module.__name__}.py": module for module in LOSSES.values()}


def parse(*words: str) -> Namespace:
    """The suite's settings of a command line."""
    args = suite.parse(words)
    suite.check(args)
    return args


def commands(*words: str) -> list[list[str]]:
    """The plan of a command line: the words of every stage."""
    return [list(stage.words) for stage in suite.plan(parse(*words))]


def trainer_settings(words: list[str], monkeypatch):
    """(module, Config) of a trainer's command, as its own command line reads it."""
    for place, word in enumerate(words):
        if Path(word).name in MODULES:
            module = MODULES[Path(word).name]
            monkeypatch.setattr(sys, "argv", words[place:])
            return module, parse_args(module.Config, module.__doc__)
    raise AssertionError(f"no trainer's command: {words}")


def trainings(monkeypatch, *words: str) -> dict[str, tuple]:
    """Output folder to (module, Config), of every trainer's command."""
    runs = {}
    for command in commands(*words):
        if "archangel.kto_variants" in command:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", command[2:])
                config = parse_args(kto_variants.Config, "")
            runs[config.out] = (kto_variants, config)
        elif "-m" not in command:
            module, config = trainer_settings(command, monkeypatch)
            runs[config.out] = (module, config)
    return runs


# ----------------------------------------------------------------------------------------- the plan


def test_plan(monkeypatch):
    """Each method is trained once. SFT's model is the start of three others."""
    runs = trainings(monkeypatch, "--out", "o", "--seeds", "2", "--models", "toy", "w/small/model")
    assert len(runs) == 2 * 2 * 8
    for name, model in (("toy", "toy"), ("small", "w/small/model")):
        for seed in (1, 2):
            for loss in ("dpo", "ppo", "kto"):
                module, config = runs[f"o/{name}/from_sft_seed_{seed}/{loss}"]
                assert module is LOSSES[loss]
                assert config.model == f"o/{name}/from_base/sft_seed_{seed}"
            for loss in LOSSES:
                module, config = runs[f"o/{name}/from_base/{loss}_seed_{seed}"]
                assert module is LOSSES[loss]
                assert config.model == model
    assert all(config.resume for _, config in runs.values())


def test_sampling():
    """All replies are sampled with the same settings, except for the model and its file."""
    settings = set()
    num_commands = 0
    for words in commands("--out", "o"):
        if "archangel.sample" in words:
            num_commands += 1
            settings.add(tuple(words[4 : words.index("--out")]))
    assert num_commands == 9  # the base model's, too
    assert len(settings) == 1
    assert {"--seed", "--n", "--data"} <= set(settings.pop())


def test_order_of_data(monkeypatch):
    """The paired losses and SFT see the same data in the same order; so do the unpaired losses."""
    records = tokenize(read_records("toy", "train")[:200], load_tokenizer(find_model("toy")))
    seen = {}  # (kind, seed) to list of (module, examples of nine steps)
    for module, config in trainings(monkeypatch, "--out", "o", "--seeds", "2").values():
        examples = module.make_examples(records, config)
        config = dataclasses.replace(config, max_steps=9)
        tokens = []  # (prompt ids, completions ids)
        for batch in module.make_schedule(examples, config):
            for index in batch:
                example = examples[index]
                completions = [ids.tolist() for ids in example.completions_ids]
                tokens.append((example.prompt_ids.tolist(), completions))
        kind = "unpaired" if module in (kto, ppo_offline) else "paired"
        seen.setdefault((kind, config.seed), []).append((module, tokens))
    num_runs = {key: len(runs) for key, runs in seen.items()}
    assert num_runs == {
        ("paired", 1): 4,
        ("paired", 2): 4,
        ("unpaired", 1): 4,
        ("unpaired", 2): 4,
    }

    def first_completions(tokens: list[tuple]) -> list[tuple]:
        return [(prompt, completions[0]) for prompt, completions in tokens]

    for runs in seen.values():
        _, expected = runs[-1]  # KTO's or DPO's
        for module, tokens in runs:
            assert first_completions(tokens) == first_completions(expected)
            if module is not sft:  # which sees only the chosen completion of a pair
                assert tokens == expected
    assert seen["paired", 1][-1][1] != seen["paired", 2][-1][1]


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Of the report's models. It prints the commands and runs nothing."""
    monkeypatch.setattr(suite, "execute", None)
    suite.main(["--models", "report", "--dry_run", "--out", str(tmp_path / "o")])
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "o").exists()
    training_commands = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert len(training_commands) == 7 * 8
    models = set()
    for words in training_commands:
        assert words[1] == "--nproc_per_node=8"
        module, config = trainer_settings(words, monkeypatch)
        assert config.lr == module.Config(config.model).lr
        assert config.batch_size == 32
        assert config.data == "archangel"
        models.add(config.model)
    assert set(MODELS) <= models
    judging_commands = [line for line in lines if "archangel.judge" in line]
    assert all("gpt-4" in line for line in judging_commands)


def test_dry_run_one_model_of_report(tmp_path, capsys):
    suite.main(["--models", "pythia-1.4b", "--dry_run", "--out", str(tmp_path / "o")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torchrun")]
    assert len(lines) == 8
    for line in lines:
        assert "--nproc_per_node=8" in line
        assert "--data archangel" in line
        assert "--lr" not in line


def changed_settings(config, unchanged) -> set[str]:
    """The names of the settings in which two configurations differ, except for --out."""
    defaults = kto_variants.Config(model="toy")
    changed = set()
    for name, value in vars(config).items():
        if name != "out" and value != getattr(unchanged, name, getattr(defaults, name, None)):
            changed.add(name)
    return changed


def test_ablations(monkeypatch):
    """Each arm changes what it should of its method, and nothing else."""
    runs = trainings(monkeypatch, "--out", "o", "--experiment", "methods", "ablations")
    unchanged = {
        "sft+kto": runs["o/toy/from_sft_seed_1/kto"][1],
        "sft+dpo": runs["o/toy/from_sft_seed_1/dpo"][1],
        "kto": runs["o/toy/from_base/kto_seed_1"][1],
        "dpo": runs["o/toy/from_base/dpo_seed_1"][1],
    }
    args = suite.parse(["--out", "o"])
    changed = {}  # title to value to the names of changed settings
    configs = {}
    for title, arms in suite.ABLATIONS.items():
        changed[title] = {}
        configs[title] = {}
        for value, arm in arms.items():
            _, config = runs[str(suite.folder(args, "toy", arm, 1))]
            configs[title][value] = config
            changed[title][value] = changed_settings(config, unchanged[arm.method])
    reference_points = {
        "other_half": set(),
        "mismatched": {"kl"},
        "zero": {"kl"},
        "attached": {"attached"},
        "groups of 4": {"group_size"},
        "groups of 4, attached": {"group_size", "attached"},
    }
    with_greeting = {value: names | {"data"} for value, names in reference_points.items()}
    assert changed["reference point"] == reference_points
    assert changed["reference point, replies with a greeting"] == with_greeting
    for names in changed["value of a gain"].values():
        assert names - {"lr"} in (set(), {"value"})
    for value, names in changed["loss aversion (undesirable / desirable weight)"].items():
        assert names - {"lr"} == (set() if value == "1.0" else {"undesirable_weight"})
    for method in ("KTO", "DPO"):
        for value, names in changed[f"beta of SFT+{method}"].items():
            assert names == (set() if value == "0.1" else {"beta"})
    assert changed["one reply per prompt"] == {
        "DPO, pairs": {"epochs"},
        "KTO, both replies": set(),
        "KTO, one reply": {"epochs", "data"},
    }
    for of_class in suite.CLASSES:
        name = f"{of_class} examples dropped"
        assert changed[name].pop("DPO") == {"epochs"}
        for value, names in changed[name].items():
            config = configs[name][value]
            assert config.data == f"o/data/{of_class}_{value[:2]}_dropped"
            if value.endswith("%"):
                assert names == {"data"}
            elif value.endswith("4/3"):
                assert names == {"data", "desirable_weight"}
                assert config.desirable_weight == pytest.approx(4 / 3, abs=1e-4)
            else:
                assert names == {"data", "class_balance", "kl", f"{of_class}_weight"}
                kept = 1 - int(value[:2]) / 100
                shares = {"desirable": 1.0, "undesirable": 1.0, of_class: kept}
                weighted = config.desirable_weight * shares["desirable"]
                ratio = weighted / (config.undesirable_weight * shares["undesirable"])
                assert ratio == pytest.approx(4 / 3, abs=1e-3)


def test_equal_steps(monkeypatch):
    """Where examples are dropped, all arms make as many steps as KTO on all pairs; 2% more or less
    where one reply per prompt was drawn."""
    runs = trainings(monkeypatch, "--out", "o", "--experiment", "ablations")
    num_pairs = len(read_records("toy", "train"))
    numbers_kept = {"toy": (num_pairs, num_pairs), "o/data/one_reply": (2010, 1990)}
    for of_class in suite.CLASSES:
        for percent in suite.DROPPED:
            num_kept = num_pairs * (100 - percent) // 100
            kept = (num_kept, num_pairs) if of_class == "desirable" else (num_pairs, num_kept)
            numbers_kept[f"o/data/{of_class}_{percent}_dropped"] = kept
    args = suite.parse(["--out", "o"])
    titles = ("one reply per prompt", "desirable examples dropped", "undesirable examples dropped")
    for title in titles:
        for arm in suite.ABLATIONS[title].values():
            module, config = runs[str(suite.folder(args, "toy", arm, 1))]
            examples = Examples()
            if arm.method == "dpo":
                for number in range(num_pairs):
                    examples.append(Example([number], [[1], [1]]))
            else:
                num_desirable, num_undesirable = numbers_kept[config.data]
                for number in range(num_desirable + num_undesirable):
                    example = Example([number], [[1]])
                    examples.append(example, desirable=number < num_desirable)
            assert len(module.make_schedule(examples, config)) == pytest.approx(250, rel=0.02)


def test_rates(monkeypatch):
    """Several learning rates of each, on other prompts than those of the other experiments."""
    runs = trainings(monkeypatch, "--out", "o", "--experiment", "rates")
    # SFT, DPO, DPO for two epochs and KTO have four rates, nine further arms of KTO three.
    assert len(runs) == 4 * 4 + 9 * 3
    for _, config in runs.values():
        assert config.data == "o/data/rates"
        assert config.seed == 1
    for words in commands("--out", "o", "--experiment", "rates"):
        if "archangel.sample" in words:
            assert words[words.index("--data") + 1] == "o/data/rates"
    chosen = set(suite.TOY_RATES) - set(suite.METHODS)
    tuned = [*suite.VALUES.values(), *suite.LOSS_AVERSIONS.values()]
    assert chosen == {arm.name for arm in tuned} - {"kto"}
    assert {suite.TOY_RATES[name] for name in chosen} <= {float(rate) for rate in suite.RATES}
    for method, rates in suite.RATES_OF_METHODS.items():
        assert suite.TOY_RATES[method] in [float(rate) for rate in rates]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--n", "1"], "--n 1"),
        (["--lr", "kto"], "--lr kto"),
        (["--lr", "ktoo=1"], "METHOD=RATE"),
        (["--models", "a/model", "b/a"], "name of its own"),
        (["--models", "runs/stages"], "name of its own"),
        (["--experiment", "contradictory", "--data", "rows"], "about the toy"),
        (["--experiment", "rates", "--data", "rows"], "about the toy"),
        (["--experiment", "rates", "methods"], "the only one"),
    ],
)
def test_check(words, message):
    with pytest.raises(UserError, match=message):
        suite.main([*words, "--dry_run"])


def test_parse_refuses_mixed_models(capsys):
    """With models of the report and others, --data has no default."""
    with pytest.raises(SystemExit) as ended:
        suite.parse(["--models", "toy", "pythia-1.4b"])
    assert ended.value.code == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize("module", [suite, results])
def test_command_ends_with_status_2(module, tmp_path, monkeypatch, capsys):
    arguments = {
        suite: ["--n", "1"],
        results: [str(tmp_path / "no.json"), "--out", str(tmp_path / "out")],
    }
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments[module]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(module.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert arguments[module][0] in error_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------- the data it writes


@pytest.mark.parametrize("of_class", suite.CLASSES)
@pytest.mark.parametrize("percent", suite.DROPPED)
def test_dropped(of_class, percent):
    args = parse("--experiment", "ablations")
    pairs = read_records("toy", "train")
    by_label = {True: [], False: []}
    for record in suite.dropped(args, of_class, percent):
        by_label[record["label"]].append(record["completion"])
    all_completions = {
        True: [pair["chosen"] for pair in pairs],
        False: [pair["rejected"] for pair in pairs],
    }
    is_desirable = of_class == "desirable"
    assert by_label[not is_desirable] == all_completions[not is_desirable]
    assert len(by_label[is_desirable]) == round(len(pairs) * (1 - percent / 100))
    assert set(by_label[is_desirable]) <= set(all_completions[is_desirable])


def test_one_reply():
    args = parse("--experiment", "ablations")
    pairs = read_records("toy", "train")
    records = list(suite.one_reply(args))
    assert len(records) == len(pairs)
    for record, pair in zip(records, pairs):
        assert record["prompt"] == pair["prompt"]
        assert record["completion"] == pair["chosen" if record["label"] else "rejected"]
    assert 0.45 < np.mean([record["label"] for record in records]) < 0.55


def test_greeting():
    args = parse("--experiment", "ablations")
    records = suite.greeting(args)
    for record, pair in zip(records, read_records("toy", "train")):
        assert record["chosen"] == " Good day." + pair["chosen"]
        assert record["rejected"] == " Good day." + pair["rejected"]


def test_write_data_of_rates(tmp_path):
    """The prompts that are judged are not trained on."""
    args = parse("--experiment", "rates", "--out", str(tmp_path))
    suite.write_data(args)
    train = read_records(str(tmp_path / "data" / "rates"), "train")
    test = read_records(str(tmp_path / "data" / "rates"), "test")
    assert train + test == read_records("toy", "train")
    assert len(test) == suite.NUM_RATE_PROMPTS
    prompts = {record["prompt"] for record in test}
    assert not prompts & {record["prompt"] for record in train}


def test_write_data_of_conversations(tmp_path):
    """The completions have the tokens of the pairs that they are of, with the tools of a record."""
    question = [{"role": "user", "content": "Is it in stock?"}]
    pairs = []
    for number in range(10):
        answers = {}
        for name in ("chosen", "rejected"):
            answers[name] = [{"role": "assistant", "content": f"{name} {number}"}]
        tools = [{"type": "function", "function": {"name": f"tool_{number}"}}]
        pairs.append({"prompt": question, **answers, "tools": tools})
    pairs[1]["rejected"][0]["content"] = ""  # left out
    for name in ("chosen", "rejected"):
        pairs[2][name] = pairs[2]["prompt"] + pairs[2][name]
    del pairs[2]["prompt"]
    data = write_records(tmp_path / "pairs.jsonl", pairs)
    args = parse("--experiment", "ablations", "--out", str(tmp_path / "out"), "--data", str(data))
    suite.write_data(args)
    tokenizer = load_tokenizer(find_model("toy"))
    tokenizer.chat_template = (
        "{{ tools }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    expected = tokenize(pairs, tokenizer)
    assert not (tmp_path / "out" / "data" / "greeting").exists()  # it is of the toy
    written = read_records(str(tmp_path / "out" / "data" / "desirable_90_dropped"), "train")
    found = tokenize(written, tokenizer)
    assert len(expected) == 9
    assert sorted(found.label) == [False] * 9 + [True]
    number = -1  # of the pair
    for place in range(len(found)):
        if not found.label[place]:
            number += 1
        pair = number + 1 if found.label[place] else number  # a desirable one comes first
        name = "chosen" if found.label[place] else "rejected"
        for ours, theirs in (("prompt", "prompt"), ("completion", name)):
            assert found.read(place, ours).tolist() == expected.read(pair, theirs).tolist()


def test_write_data_needs_pairs(tmp_path):
    record = {"prompt": "Hi", "completion": " Hello.", "label": True}
    data = write_records(tmp_path / "records.jsonl", [record])
    args = parse("--experiment", "ablations", "--out", str(tmp_path / "out"), "--data", str(data))
    with pytest.raises(UserError, match="pairs"):
        suite.write_data(args)


def test_write_data_contradictory(tmp_path):
    args = parse("--experiment", "contradictory", "--out", str(tmp_path))
    suite.write_data(args)
    for majority in suite.MAJORITIES:
        folder = tmp_path / "data" / f"majority_{majority}"
        records = read_records(str(folder), "train")
        for prompt, preferred, other in suite.two_replies():
            chosen = []
            for record in records:
                if record["prompt"] == prompt:
                    chosen.append(record["chosen"])
                    assert {record["chosen"], record["rejected"]} == {preferred, other}
            assert chosen.count(preferred) == round(majority * len(chosen))


def test_two_replies():
    """The base model prefers the minority's so strongly that DPO's optimum can side with it."""
    odds = results.log_odds(find_model("toy"), suite.two_replies())
    assert odds.shape == (32,)
    assert odds.max() < -4
    gap = -float(odds.mean())
    # At DPO's optimum 60% of the labels are not enough for the other reply, 80% are.
    assert claims.optimum_of_dpo(0.6, gap) < 0.5 < claims.optimum_of_dpo(0.8, gap)


def test_optimum_of_dpo():
    """It is where DPO's loss is least."""
    margins = torch.linspace(-60, 60, 120001, dtype=torch.float64)  # change of the log-odds, nats
    zeros = torch.zeros_like(margins)
    for share in (0.55, 0.7, 0.95):
        agree = dpo.dpo_loss(margins, zeros, zeros, zeros, beta=0.1)
        disagree = dpo.dpo_loss(zeros, margins, zeros, zeros, beta=0.1)
        best = margins[(share * agree + (1 - share) * disagree).argmin()].item()
        expected = 1 / (1 + np.exp(6 - best))
        assert claims.optimum_of_dpo(share, gap=6) == pytest.approx(expected, abs=1e-3)


# --------------------------------------------------------------------------------------- running it


def stage(name: str, code: str, out: Path, *needs: str) -> suite.Stage:
    """A stage that runs Python code, which writes its output file, argv[1]."""
    return suite.Stage(name, ("python", "-c", code, str(out / name)), out / name, needs)


TOUCH = "import sys; open(sys.argv[1], 'a').write('x')"


def test_execute_runs_outdated_stages(tmp_path, capsys):
    """Those that need a stage whose command has changed. Their replies or verdicts are removed."""
    stages = [
        stage("model", TOUCH, tmp_path),
        stage("replies.jsonl", TOUCH, tmp_path, "model"),
        stage("verdicts.jsonl", TOUCH, tmp_path, "replies.jsonl"),
        stage("other.jsonl", TOUCH, tmp_path),
    ]
    assert suite.execute(stages, tmp_path, 1) == {}
    stages[0] = stage("model", TOUCH + " ", tmp_path)
    assert suite.execute(stages, tmp_path, 1) == {}
    found = {each.name: each.output.read_text() for each in stages}
    once_more = {"replies.jsonl": "x", "verdicts.jsonl": "x", "other.jsonl": "x"}
    assert found == {"model": "xx", **once_more}
    written = capsys.readouterr().err
    assert f"{tmp_path}/replies.jsonl: outdated" in written
    assert f"{tmp_path}/verdicts.jsonl: outdated" in written
    assert "other.jsonl: outdated" not in written
    records = [
        json.loads((tmp_path / "stages" / f"{each.name}.json").read_text()) for each in stages
    ]
    assert all(record["status"] == 0 for record in records)


def test_execute_skips_finished_stages(tmp_path):
    """It runs a stage again if its command has changed, or its output is missing."""

    def outputs() -> list[str]:
        return [(tmp_path / name).read_text() for name in "ab"]

    stages = [stage("a", TOUCH, tmp_path), stage("b", TOUCH, tmp_path, "a")]
    assert suite.execute(stages, tmp_path, 2) == {}
    assert suite.execute(stages, tmp_path, 2) == {}
    assert outputs() == ["x", "x"]
    record = json.loads((tmp_path / "stages" / "a.json").read_text())
    assert record["status"] == 0
    assert record["seconds"] >= 0
    assert shlex.split(record["command"]) == list(stages[0].words)
    stages[1] = stage("b", TOUCH + " ", tmp_path, "a")
    assert suite.execute(stages, tmp_path, 2) == {}
    assert outputs() == ["x", "xx"]
    (tmp_path / "a").unlink()
    assert suite.execute(stages, tmp_path, 2) == {}
    assert outputs() == ["x", "xx"]


def test_execute_failure(tmp_path, capsys):
    """Stages that need a failed one are left out, and no others."""
    fail = "import sys; print('error: --lr 7: no\\nand torchrun goes on', file=sys.stderr); exit(3)"
    stages = [
        stage("bad", fail, tmp_path),
        stage("child", TOUCH, tmp_path, "bad"),
        stage("grandchild", TOUCH, tmp_path, "child"),
        stage("good", TOUCH, tmp_path),
    ]
    failed = suite.execute(stages, tmp_path, 1)
    assert set(failed) == {"bad", "child", "grandchild"}
    assert (tmp_path / "good").exists()
    assert failed["bad"] == "status 3, error: --lr 7: no"
    assert "bad: status 3, error: --lr 7: no" in capsys.readouterr().err
    assert not (tmp_path / "child").exists()
    assert json.loads((tmp_path / "stages" / "bad.json").read_text())["status"] == 3


def test_execute_jobs(tmp_path):
    """No more stages run at once than were asked for."""
    code = (
        "import sys, time, pathlib; me = pathlib.Path(sys.argv[1]); me.touch();"
        "time.sleep(0.3); me.write_text(str(len(list(me.parent.glob('run_*')))));"
        "me.rename(me.with_name('done_' + me.name))"
    )
    names = ["run_0", "run_1", "run_2"]
    suite.execute([stage(name, code, tmp_path) for name in names], tmp_path, 1)
    for name in names:
        assert (tmp_path / f"done_{name}").read_text() == "1"


def test_execute_interrupted(tmp_path):
    """The running stage is terminated, and is run again later."""
    code = (
        "import pathlib, signal, sys, time; me = pathlib.Path(sys.argv[1]);"
        "stop = lambda *_: (me.write_text('saved'), sys.exit(75));"
        "signal.signal(signal.SIGTERM, stop); me.with_name('up').touch();"
        "me.exists() or time.sleep(60)"
    )
    stages = [stage("a", code, tmp_path)]

    def stop_when_up():
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, suite.interrupt)
    try:
        threading.Thread(target=stop_when_up, daemon=True).start()
        with pytest.raises(Interrupted):
            suite.execute(stages, tmp_path, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "a").read_text() == "saved"
    assert not suite.is_done(stages[0], tmp_path)
    assert suite.execute(stages, tmp_path, 1) == {}
    assert suite.is_done(stages[0], tmp_path)


def test_main_locks_folder(tmp_path):
    with FileLock(tmp_path / "stages.lock"), pytest.raises(UserError, match="another process"):
        suite.main(["--out", str(tmp_path)])


# ------------------------------------------------------------------------------------------- claims


def table(seeds: int = 2, prompts: int = 400, **rates: float) -> claims.Table:
    """Random wins (0 or 1) of arms at these rates. The arm sft+dpo is written `sft_dpo`."""
    rng = np.random.default_rng(0)
    wins = {}
    for arm, rate in rates.items():
        by_seed = {}
        for seed in range(1, seeds + 1):
            by_seed[seed] = (rng.random(prompts) < rate).astype(float)
        wins[arm.replace("_", "+")] = by_seed
    return wins


def outcome(kind: str, wins: claims.Table, weights: dict) -> str:
    """Whether a claim holds."""
    claim = claims.Claim("c", "somebody", "somewhere", weights, kind)
    (record,) = claims.examine_all({"m": {"win": wins}}, {"m": [claim]})
    return record["outcome"]


@pytest.mark.parametrize(
    ("kind", "a", "b", "prompts", "expected"),
    [
        ("above", 0.7, 0.4, 400, "holds"),
        ("above", 0.4, 0.7, 400, "does not hold"),
        ("above", 0.5, 0.48, 50, "cannot tell"),
        ("equivalent", 0.5, 0.5, 20000, "holds"),
        ("equivalent", 0.5, 0.8, 400, "does not hold"),
        ("equivalent", 0.5, 0.5, 50, "cannot tell"),
        ("not below", 0.8, 0.5, 400, "holds"),
        ("not below", 0.3, 0.7, 400, "does not hold"),
        ("not below", 0.45, 0.5, 50, "cannot tell"),
    ],
)
def test_decide(kind, a, b, prompts, expected):
    wins = table(prompts=prompts, kto=a, dpo=b)
    assert outcome(kind, wins, {"kto": 1.0, "dpo": -1.0}) == expected


def test_above_requires_every_seed():
    wins = table(seeds=3, prompts=2000, kto=0.7, dpo=0.4)
    weights = {"kto": 1.0, "dpo": -1.0}
    assert outcome("above", wins, weights) == "holds"
    wins["kto"][3], wins["dpo"][3] = wins["dpo"][3], wins["kto"][3]
    assert outcome("above", wins, weights) == "cannot tell"


def test_claim_share_of_gain():
    """Most of the gain of SFT+DPO comes from SFT."""
    claim = claims.claims_of_report()[0]
    most = table(base=0.1, sft=0.5, sft_dpo=0.6)
    little = table(base=0.1, sft=0.2, sft_dpo=0.6)
    assert outcome(claim.kind, most, claim.weights) == "holds"
    assert outcome(claim.kind, little, claim.weights) == "does not hold"
    record = claims.examine(claim, most)
    # SFT's gain less half of the whole gain: 0.5 - (0.1 + 0.6) / 2.
    assert record["effect"] == pytest.approx(0.15, abs=0.05)


def test_examine_all():
    """Claims without results are left out. p-values are corrected over all models."""
    tables = {"a": {"win": table(kto=0.55, dpo=0.5)}, "b": {"win": table(kto=0.56, dpo=0.5)}}
    claims_of_models = {"a": claims.claims_of_report(), "b": claims.claims_of_report()}
    records = claims.examine_all(tables, claims_of_models)
    assert [record["contrast"] for record in records] == ["KTO - DPO"] * 2
    assert records[0]["who"] == "report"
    assert records[0]["where"] == "section 5, item 3, at 13B and 30B"
    expected = statistics.holm([record["p"] for record in records])
    assert [record["p_holm"] for record in records] == expected


def test_claims_of_ablations():
    """The default beta is compared with the best of the others."""
    wins = table(sft_kto=0.5, kto=0.5)
    wins["sft+kto_beta_0.01"] = {1: np.zeros(9)}
    wins["sft+kto_beta_0.3"] = {1: np.ones(9)}
    claim = claims.claims_of_ablations(wins)[0]
    assert claim.weights == {"sft+kto": 1.0, "sft+kto_beta_0.3": -1.0}


def test_claims_are_about_arms_of_the_suite():
    args = parse("--experiment", "all")
    names = {arm.name for arm in suite.arms(args)}
    by_arm = {arm.name: majority_loss for majority_loss, arm in suite.CONTRADICTORY.items()}
    wins = table(**dict.fromkeys(("sft_kto", "kto"), 0.5))
    found = claims.claims_of_report() + claims.claims_of_ablations(wins)
    found += claims.claims_of_contradictory_labels(by_arm, gap=5.9)
    texts = [claim.text for claim in found]
    assert len(set(texts)) == len(texts)
    for claim in found:
        assert set(claim.weights) <= names, claim.text
        assert claim.who in ("report", "KTO paper", "nobody")
        assert claim.where


def test_claims_of_contradictory_labels():
    """They are about the shares at which DPO's optimum sides with the minority."""
    by_arm = {arm.name: majority_loss for majority_loss, arm in suite.CONTRADICTORY.items()}
    arms = set()
    for claim in claims.claims_of_contradictory_labels(by_arm, gap=5.9):
        arms.update(claim.weights)
    assert arms == {
        "dpo_majority_0.55",
        "kto_majority_0.55",
        "dpo_majority_0.6",
        "kto_majority_0.6",
    }


def test_verdicts_table():
    """A row for each claim, a column for each model; without the claim it is empty."""
    wins = {"a": table(kto=0.9, dpo=0.1), "b": table(kto=0.9, dpo=0.1)}
    tables = {model: {"win": of_model} for model, of_model in wins.items()}
    beats = claims.Claim("KTO beats DPO", "report", "here", {"kto": 1.0, "dpo": -1.0})
    loses = claims.Claim("DPO beats KTO", "nobody", "here", {"kto": -1.0, "dpo": 1.0})
    records = claims.examine_all(tables, {"a": [beats], "b": [beats, loses]})
    lines = results.verdicts_table(records).splitlines()
    effect = np.mean(list(wins["b"]["kto"].values())) - np.mean(list(wins["b"]["dpo"].values()))
    assert lines[0] == "| claim | who claims it | a | b |"
    assert lines[2].startswith("| KTO beats DPO | report | holds (")
    assert lines[3] == f"| DPO beats KTO | nobody |  | does not hold ({-effect:+.3f}) |"


def test_prompts_needed():
    """Those of a claim of equivalence follow from the variance of its contrast."""
    wins = table(seeds=1, prompts=2000, kto=0.5, dpo=0.5)
    claim = claims.Claim("c", "somebody", "somewhere", {"kto": 1.0, "dpo": -1.0}, "equivalent")
    (record,) = claims.examine_all({"m": {"win": wins}}, {"m": [claim]})
    sd = np.std(wins["kto"][1] - wins["dpo"][1], ddof=1)
    needed = statistics.prompts_needed(sd)
    assert record["prompts_needed"] == pytest.approx(needed, rel=0.1)


def test_not_below():
    rng = np.random.default_rng(0)
    a = rng.random(1000)
    b = rng.random(1000)
    assert statistics.not_below(a, b) < 0.05 < statistics.not_below(a - 0.1, b)
    ones = np.ones(9)
    assert statistics.not_below(ones, ones) == 0
    assert statistics.not_below(ones - 0.1, ones) == 1
    assert statistics.not_below([1.0], [0.0]) == 1


# ------------------------------------------------------------------------- numbers, figures, report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(settings, stages) of a suite that looks finished: random replies, judged by the toy."""
    out = tmp_path_factory.mktemp("suite")
    prompts = sample.read_prompts("toy", 40)
    args = parse("--experiment", "methods", "ablations", "--seeds", "2", "--out", str(out))
    suite.write_data(args)
    for model, arm, seed in suite.cells(args):
        place = suite.folder(args, model, arm, seed)
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, len(arm.name)])
        replies = []
        for prompt in rng.permutation(prompts):
            text = prompt["chosen"] if rng.random() < 0.7 else " No."
            reply = {**prompt, "reply": text, "tokens": len(text.split()), "ended": True}
            replies.append(reply)
        write_records(place / "replies.jsonl", replies)
        write_records(place / "verdicts.jsonl", [judge.judge_toy(reply) for reply in replies])
    stages = suite.plan(args)
    (out / "stages").mkdir()
    for one in stages:
        record = {"command": shlex.join(one.words), "seconds": 1.0, "status": 0}
        suite.record_of(one, out).write_text(json.dumps(record))
        one.output.touch()
    return args, stages


def collect(args: Namespace, stages: list, failed: dict[str, str]) -> tuple[dict, str]:
    """Numbers and report of a suite."""
    suite.collect(args, stages, failed)
    numbers = json.loads((args.out / "numbers.json").read_text())
    return numbers, (args.out / "report.md").read_text()


def test_collect(finished):
    args, stages = finished
    numbers, report = collect(args, stages, {})
    by_arm = {row["arm"]: row for row in numbers["methods"]}
    assert list(by_arm) == ["base", *suite.METHODS]
    means = []
    for seed in (1, 2):
        place = suite.folder(args, "toy", suite.Arm("sft+kto"), seed)
        wins = []
        for reply in judge.read_replies(place / "replies.jsonl"):
            wins.append(toy.win(reply["prompt"], reply["reply"], reply["chosen"]))
        means.append(np.mean(wins) - 0.5)
    win = by_arm["sft+kto"]["win_rate_minus_half"]
    assert win["by_seed"] == pytest.approx(means)
    assert win["mean"] == pytest.approx(np.mean(means))
    low, high = win["interval_95"]
    assert low < win["mean"] < high
    assert numbers["models"] == [{"name": "toy", "parameters": 726_144}]
    assert len(numbers["ablations"]) == sum(map(len, suite.ABLATIONS.values()))

    assert report.index(results.CAUTION) < report.index("| claim |")
    drawn = [line for line in report.splitlines() if line.startswith("![")]
    assert len(drawn) == 5
    for line in drawn:
        name = line.rpartition("(")[2].rstrip(")")
        assert (args.out / name).stat().st_size > 5000
    assert not list(args.out.glob("*.part"))


def test_tabulate(tmp_path):
    """The prompts that were judged in all folders, in one order."""
    wins = {"kto": {"a": 1.0, "b": 0.0, "c": 0.5}, "dpo": {"c": 1.0, "b": None, "a": 0.0}}
    for arm, by_prompt in wins.items():
        replies = []
        verdicts = []
        for prompt, win in by_prompt.items():
            reply = {"prompt": prompt, "chosen": "x", "reply": "y", "tokens": 3, "ended": True}
            replies.append(reply)
            verdicts.append({"prompt": prompt, "win": win})
        (tmp_path / arm).mkdir()
        write_records(tmp_path / arm / "replies.jsonl", replies)
        write_records(tmp_path / arm / "verdicts.jsonl", verdicts)
    tables = results.tabulate({arm: {1: tmp_path / arm} for arm in wins})
    assert tables["win"]["kto"][1].tolist() == [1.0, 0.5]
    assert tables["win"]["dpo"][1].tolist() == [0.0, 1.0]
    assert tables["win_less_half"]["kto"][1].tolist() == [0.5, 0.0]


def test_results_main(finished, tmp_path):
    """The results of two suites together."""
    args, stages = finished
    first, _ = collect(args, stages, {})
    second = json.loads(json.dumps(first).replace('"toy"', '"small"'))
    second["data"] = "toy"
    paths = []
    for name, numbers in (("a.json", first), ("b.json", second)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(numbers))
    out = tmp_path / "both"
    results.main([*map(str, paths), "--out", str(out)])
    both = json.loads((out / "numbers.json").read_text())
    for name in ("methods", "ablations", "models"):
        assert both[name] == first[name] + second[name]
    pvalues = [record["p"] for record in both["claims"]]
    assert [record["p_holm"] for record in both["claims"]] == statistics.holm(pvalues)
    claims_of_equivalence = [record for record in both["claims"] if record["kind"] == "equivalent"]
    assert max(record["prompts_needed"] for record in claims_of_equivalence) > 40
    report = (out / "report.md").read_text()
    assert f"{claims_of_equivalence[0]['prompts_needed']} prompts needed" in report
    assert report.count("![") == 5
    assert "| claim | who claims it | toy | small |" in report
    tests = report.partition("### The tests")[2].splitlines()
    lines = [line for line in tests if line.startswith("| KTO alone beats DPO")]
    assert [line.split(" | ")[4] for line in lines] == ["toy", "small"]


def test_together_first_claim_counts(finished, monkeypatch):
    """If two suites have the same claim about the same model."""
    monkeypatch.setattr(results, "draw", lambda *_: [])
    args, stages = finished
    first, _ = collect(args, stages, {})
    pvalues = [record["p"] for record in first["claims"]]
    second = {**first, "methods": [], "ablations": []}
    second["claims"] = [{**record, "p": 1.0} for record in first["claims"]]
    combined = results.together([first, second])
    assert [record["p"] for record in combined["claims"]] == pvalues


def test_results_main_errors(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda *_: [])
    args, stages = finished
    numbers, _ = collect(args, stages, {})
    good = tmp_path / "good.json"
    good.write_text(json.dumps(numbers))
    other_data = tmp_path / "other_data.json"
    other_data.write_text(json.dumps({**numbers, "data": "archangel"}))
    incomplete = tmp_path / "incomplete.json"
    incomplete.write_text('{"data": "toy", "claims": []}')
    errors = [
        (good, "twice"),
        (args.out / "report.md", "report.md"),
        (incomplete, "incomplete.json"),
        (other_data, "different data"),
    ]
    for second, message in errors:
        with pytest.raises(UserError, match=message):
            results.main([str(good), str(second), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_collect_after_failure(finished, monkeypatch):
    """What failed is left out of the numbers, and named in the report."""
    args, stages = finished
    args = Namespace(**{**vars(args), "experiment": ["methods"]})
    monkeypatch.setattr(results, "draw", lambda *_: [])
    failed = {"toy.from_base.kto_seed_2.judge": "status 2, error: no", "toy.base.judge": "left out"}
    numbers, report = collect(args, stages, failed)
    by_arm = {row["arm"]: row for row in numbers["methods"]}
    assert "base" not in by_arm
    assert len(by_arm["kto"]["win_rate_minus_half"]["by_seed"]) == 1
    by_contrast = {record["contrast"]: record for record in numbers["claims"]}
    assert len(by_contrast["KTO - DPO"]["by_seed"]) == 1
    assert "base - SFT" not in by_contrast
    assert "status 2, error: no" in report


def test_draw_from_numbers_alone(tmp_path):
    """Two model sizes, and contradictory labels."""
    models = [{"name": "small", "parameters": 10**5}, {"name": "toy", "parameters": 10**6}]
    summary = {"mean": 0.1, "by_seed": [0.0, 0.2], "interval_75": [0, 0.2], "interval_95": [-1, 1]}
    numbers = {"models": models, "ablations": [], "claims": [], "methods": [], "contradictory": []}
    for model in ("small", "toy"):
        for arm in ("base", *suite.METHODS):
            numbers["methods"].append(
                {
                    "model": model,
                    "arm": arm,
                    "name": claims.name_of(arm),
                    "win_rate_minus_half": summary,
                    "tokens": summary,
                    "ended": summary,
                }
            )
        for majority, loss in suite.CONTRADICTORY:
            row = {"model": model, "loss": loss, "share": majority, "gap": 6.0}
            numbers["contradictory"].append({**row, "probability": summary})
    assert [model["name"] for model in figures.by_size(numbers)] == ["small", "toy"]
    drawn = {name for name, _ in results.draw(numbers, tmp_path)}
    names = ("overview", "figure_2", "figure_3", "figure_5", "contradictory")
    assert drawn == {f"{name}.png" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == drawn


def test_bars_without_results():
    """A model that has no results of the methods gets no bars."""
    win = {"mean": 0.1, "by_seed": [0.1], "interval_75": [0, 0.2], "interval_95": [-1, 1]}
    row = {"arm": "kto", "name": "KTO", "model": "toy", "win_rate_minus_half": win}
    numbers = {
        "models": [{"name": "small", "parameters": 10**5}, {"name": "toy", "parameters": 10**6}],
        "methods": [row],
        "ablations": [{"model": "small"}],
        "contradictory": [],
    }
    models = figures.by_size(numbers, ("methods",))
    assert [model["name"] for model in models] == ["toy"]
    axes = Figure().add_subplot()
    figures.bars(axes, numbers, models, ["dpo", "kto"])
    assert [bar.get_height() for bar in axes.patches] == [0.1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["toy\n1M"]


def test_pushes():
    """Each loss's gradient by the log-ratio r, by its equation, as a share of the largest."""
    axes = Figure().add_subplot()
    figures.pushes(axes)
    curves = {line.get_label(): line.get_xydata().T for line in axes.lines}
    r = curves["DPO"][0]
    sigmoid = 1 / (1 + np.exp(-0.1 * r))
    is_not_clipped = r < np.log(1.5)
    ratio = np.exp(r[is_not_clipped])
    expected = {
        "SFT": np.ones_like(r),
        "SLiC": np.where(r < 1 + 1e-9, 1.1, 0.1) / 1.1,  # the hinge up to its margin; likelihood
        "DPO": (1 - sigmoid) / (1 - sigmoid).max(),
        "PPO (per token)": np.where(is_not_clipped, np.exp(r), 0) / ratio.max(),
        "KTO": 4 * sigmoid * (1 - sigmoid),
    }
    assert curves.keys() == expected.keys()
    for name, push in expected.items():
        np.testing.assert_allclose(curves[name][1], push, atol=1e-8, err_msg=name)


def test_main_one_method(tmp_path, monkeypatch):
    """From data to report, by the real commands, on a few records."""
    folder = tmp_path / "data"
    folder.mkdir()
    data = write_toy_folder(folder, train=6, test=6)
    monkeypatch.setattr(suite, "arms", lambda _: [suite.Arm("kto")])
    words = ["--data", data, "--n", "3", "--max_steps", "1", "--max_new_tokens", "8"]
    with contextlib.chdir(tmp_path):
        suite.main([*words, "--out", "out", "--lr", "kto=1e-4", "--judge", "shorter"])
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [row["arm"] for row in numbers["methods"]] == ["kto"]
    run_folder = tmp_path / "out" / "toy" / "from_base" / "kto_seed_1"
    record = json.loads((run_folder / "run.json").read_text())
    assert record["finished"]
    assert record["settings"]["lr"] == 1e-4
