"""The suite: which commands, each once; resumed, failing in part; numbers, claims, pictures."""

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from matplotlib.figure import Figure

import common_v1 as common
import dpo
import kto
import ppo_offline
import sft
import slic
from archangel import claims, figures, judge, results, sample, statistics, suite, toy

MODULES = {f"{module.__name__}.py": module for module in (sft, slic, dpo, ppo_offline, kto)}


def commands(*words: str) -> list[list[str]]:
    """The plan of a command line, in words."""
    given = suite.parse(words)
    suite.check(given)
    return [list(stage.words) for stage in suite.plan(given)]


def settings(words: list[str], monkeypatch):
    """(module, Config) of a trainer's command, as its own command line reads it."""
    script = next(word for word in words if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", words[words.index(script) :])
    module = MODULES[Path(script).name]
    return module, common.parse(module.Config, module.__doc__)


def trainings(monkeypatch, *words: str) -> dict[str, tuple]:
    """Name of the output folder to (module, Config)."""
    made = [settings(w, monkeypatch) for w in commands(*words) if "--model" in w and "-m" not in w]
    return {config.out: (module, config) for module, config in made}


# ------------------------------------------------------------ the plan


def test_each_method_is_trained_once_and_sft_serves_three(monkeypatch):
    runs = trainings(monkeypatch, "--out", "o", "--seeds", "2", "--models", "toy", "w/small/model")
    assert len(runs) == 2 * 2 * 8
    for name, start in (("toy", "toy"), ("small", "w/small/model")):
        for seed in (1, 2):
            after = {f"o/{name}/from_sft_seed_{seed}/{loss}" for loss in ("dpo", "ppo", "kto")}
            starts = {runs[out][1].model for out in after}
            assert starts == {f"o/{name}/from_base/sft_seed_{seed}"} <= runs.keys()
            alone = [f"o/{name}/from_base/{m}_seed_{seed}" for m in ("slic", "dpo", "ppo", "kto")]
            assert {runs[out][1].model for out in alone} == {start}
            # Beside each other, so that they share the reference column.
            assert len({Path(out).parent for out in after}) == 1
            assert len({Path(out).parent for out in alone}) == 1
    assert all(config.resume for _, config in runs.values())


def test_all_replies_are_sampled_alike():
    sampled = [words for words in commands("--out", "o") if "archangel.sample" in words]
    assert len(sampled) == 9  # the base model's, too
    alike = {
        tuple(words[4 : words.index("--out")]) for words in sampled
    }  # all but the model and its file
    assert len(alike) == 1 and {"--seed", "--n", "--data"} <= set(alike.pop())


def tokens_of_step(module, examples, config, step: int) -> list[tuple]:
    """(prompt ids, completions ids) of the examples of a step, counted from 0."""
    if module in (kto, dpo):
        schedule = module.make_schedule(examples, dataclasses.replace(config, max_steps=step + 1))
        batch = [examples[index] for index in schedule[step]]
        return [(example.prompt_ids, example.completions_ids) for example in batch]
    batch = module.global_batch(examples, config, step)  # a script on the old core
    return [(example["prompt_ids"], example["completions_ids"]) for example in batch]


def test_losses_of_a_kind_see_the_same_data_in_the_same_order(monkeypatch):
    rows = common.read_rows("toy", "train", ("preference",))[:200]
    tokenizer = common.load_tokenizer(common.find_model("toy"))
    seen = {}
    for module, config in trainings(monkeypatch, "--out", "o", "--seeds", "2").values():
        examples = module.make_examples(rows, tokenizer, config)
        kind = "unpaired" if module in (kto, ppo_offline) else "paired"
        completions = 1 if module is sft else None  # of a pair, SFT sees the chosen one
        ids = []
        for step in range(9):
            for prompt_ids, completions_ids in tokens_of_step(module, examples, config, step):
                texts = [each.tolist() for each in completions_ids[:completions]]
                ids.append((prompt_ids.tolist(), texts))
        chosen = [(prompt, texts[0]) for prompt, texts in ids]
        seen.setdefault((kind, config.seed), []).append((module, ids, chosen))
    assert {key: len(group) for key, group in seen.items()} == {
        ("paired", 1): 4,
        ("paired", 2): 4,
        ("unpaired", 1): 4,
        ("unpaired", 2): 4,
    }
    for group in seen.values():
        assert all(chosen == group[0][2] for _, _, chosen in group)
        whole = [ids for module, ids, _ in group if module is not sft]
        assert all(ids == whole[0] for ids in whole)
    assert seen["paired", 1][0][2] != seen["paired", 2][0][2]


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "execute", None)
    suite.main(["--models", "report", "--dry_run", "--out", str(tmp_path / "o")])
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "o").exists()
    trained = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert len(trained) == 7 * 8
    for words in trained:
        assert words[1] == "--nproc_per_node=8"
        module, config = settings(words, monkeypatch)
        own = module.Config(config.model)
        assert (config.lr, config.batch_size, config.data) == (own.lr, 32, "archangel")
    started = {words[words.index("--model") + 1] for words in trained}
    assert set(common.MODELS) <= started
    assert all("gpt-4" in line for line in lines if "archangel.judge" in line)


def test_one_of_the_report_s_models_is_trained_as_the_report_s(tmp_path, capsys):
    suite.main(["--models", "pythia-1.4b", "--dry_run", "--out", str(tmp_path / "o")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torchrun")]
    assert len(lines) == 8
    for line in lines:
        assert "--nproc_per_node=8" in line and "--data archangel" in line and "--lr" not in line


def test_ablations_change_one_setting_each(monkeypatch):
    runs = trainings(monkeypatch, "--out", "o", "--experiment", "ablations")
    plain = {
        "sft+kto": runs["o/toy/from_sft_seed_1/kto"][1],
        "sft+dpo": runs["o/toy/from_sft_seed_1/dpo"][1],
        "kto": runs["o/toy/from_base/kto_seed_1"][1],
    }
    given = suite.parse(["--out", "o"])
    for title, labels in suite.ABLATIONS.items():
        assert sum(not arm.variant for arm in labels.values()) == 1, title
        for arm in labels.values():
            out = str(suite.folder(given, "toy", arm, 1))
            config, own = vars(runs[out][1]), vars(plain[arm.method])
            changed = {k for k in config if config[k] != own[k]} - {"out"}
            assert len(changed) == bool(arm.variant), (title, changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--n", "1"], "--n 1"),
        (["--lr", "kto"], "--lr kto"),
        (["--lr", "ktoo=1"], "METHOD=RATE"),
        (["--models", "a/model", "b/a"], "name of its own"),
        (["--models", "runs/stages"], "name of its own"),
        (["--experiment", "contradictory", "--data", "rows"], "about the toy"),
        (["--models", "toy", "pythia-1.4b"], "--data"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        suite.main([*words, "--dry_run"])
    assert left.value.code == 2 and said in capsys.readouterr().err


# ------------------------------------------------------------ the data it writes


def test_the_data_it_writes(tmp_path):
    given = suite.parse(["--experiment", "all", "--out", str(tmp_path)])
    suite.check(given)
    suite.write_data(given)
    pairs = common.read_rows("toy", "train", ("preference",))
    few = common.read_rows(str(tmp_path / "data" / "few_desirable"), "train", ("unpaired",))
    kept = [row["completion"] for row in few if row["label"]]
    assert len(kept) == len(pairs) / 10 and set(kept) <= {row["chosen"] for row in pairs}
    assert [r["completion"] for r in few if not r["label"]] == [r["rejected"] for r in pairs]
    for majority in suite.MAJORITIES:
        rows = common.read_rows(
            str(tmp_path / "data" / f"majority_{majority}"), "train", dpo.FORMATS
        )
        for prompt, liked, other in suite.two_replies():
            its = [row for row in rows if row["prompt"] == prompt]
            assert sum(row["chosen"] == liked for row in its) == round(majority * len(its))
            assert all({row["chosen"], row["rejected"]} == {liked, other} for row in its)


def test_the_base_prefers_the_minority():
    odds = results.log_odds(common.find_model("toy"), suite.two_replies())
    assert odds.shape == (32,) and odds.max() < -4
    gap = -float(odds.mean())
    # With 60% of the labels for the other reply, DPO's optimum is still on the minority's side.
    assert claims.optimum_of_dpo(0.6, gap) < 0.5 < claims.optimum_of_dpo(0.8, gap)


def test_optimum_of_dpo_is_where_its_loss_is_least():
    import torch

    margins = torch.linspace(-60, 60, 120001, dtype=torch.float64)  # change of the log-odds, nats
    zeros = torch.zeros_like(margins)
    for share in (0.55, 0.7, 0.95):
        agree = dpo.dpo_loss(margins, zeros, zeros, zeros, beta=0.1)
        differ = dpo.dpo_loss(zeros, margins, zeros, zeros, beta=0.1)
        best = margins[(share * agree + (1 - share) * differ).argmin()].item()
        expected = 1 / (1 + np.exp(6 - best))
        assert claims.optimum_of_dpo(share, gap=6) == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------ running it


def stage(name: str, code: str, out: Path, *needs: str) -> suite.Stage:
    """A stage that runs Python code, which should write its output file, argv[1]."""
    return suite.Stage(name, ("python", "-c", code, str(out / name)), out / name, needs)


TOUCH = "import sys; open(sys.argv[1], 'a').write('x')"


def test_a_finished_stage_is_skipped_and_a_changed_one_is_not(tmp_path):
    stages = [stage("a", TOUCH, tmp_path), stage("b", TOUCH, tmp_path, "a")]
    assert suite.execute(stages, tmp_path, 2) == {}
    assert suite.execute(stages, tmp_path, 2) == {}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]
    record = json.loads((tmp_path / "stages" / "a.json").read_text())
    assert record["status"] == 0 and record["seconds"] >= 0
    assert shlex.split(record["command"]) == list(stages[0].words)
    stages[1] = stage("b", TOUCH + " ", tmp_path, "a")
    assert suite.execute(stages, tmp_path, 2) == {}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "xx"]
    (tmp_path / "a").unlink()
    assert suite.execute(stages, tmp_path, 2) == {}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "xx"]


def test_a_failure_takes_with_it_what_needs_it_alone(tmp_path, capsys):
    fail = "import sys; print('error: --lr 7: no\\nand torchrun goes on', file=sys.stderr); exit(3)"
    stages = [
        stage("bad", fail, tmp_path),
        stage("child", TOUCH, tmp_path, "bad"),
        stage("grandchild", TOUCH, tmp_path, "child"),
        stage("good", TOUCH, tmp_path),
    ]
    failed = suite.execute(stages, tmp_path, 1)
    assert set(failed) == {"bad", "child", "grandchild"} and (tmp_path / "good").exists()
    assert failed["bad"] == "status 3, error: --lr 7: no"
    assert "bad: status 3, error: --lr 7: no" in capsys.readouterr().err
    assert not (tmp_path / "child").exists()
    assert json.loads((tmp_path / "stages" / "bad.json").read_text())["status"] == 3


def test_no_more_stages_at_once_than_asked_for(tmp_path):
    code = (
        "import sys, time, pathlib; me = pathlib.Path(sys.argv[1]); me.touch();"
        "time.sleep(0.3); me.write_text(str(len(list(me.parent.glob('run_*')))));"
        "me.rename(me.with_name('done_' + me.name))"
    )
    stages = [stage(f"run_{k}", code, tmp_path) for k in range(3)]
    suite.execute(stages, tmp_path, 1)
    assert [(tmp_path / f"done_run_{k}").read_text() for k in range(3)] == ["1"] * 3


def test_when_stopped_the_running_stage_is_stopped_and_goes_on_later(tmp_path):
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
        with pytest.raises(common.Interrupted, match="goes on from here"):
            suite.execute(stages, tmp_path, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "a").read_text() == "saved"
    assert not suite.is_done(stages[0], tmp_path)
    assert suite.execute(stages, tmp_path, 1) == {} and suite.is_done(stages[0], tmp_path)


def test_two_suites_in_one_folder_are_refused(tmp_path, capsys):
    with FileLock(tmp_path / "suite.lock"), pytest.raises(SystemExit) as left:
        suite.main(["--out", str(tmp_path)])
    assert left.value.code == 2 and "another suite" in capsys.readouterr().err


# ------------------------------------------------------------ claims


def table(seeds: int = 2, prompts: int = 400, **rates: float) -> claims.Table:
    """Wins (0 or 1) of arms at given rates, `sft_dpo` for sft+dpo."""
    rng = np.random.default_rng(0)
    return {
        arm.replace("_", "+"): {
            seed: (rng.random(prompts) < rate).astype(float) for seed in range(1, seeds + 1)
        }
        for arm, rate in rates.items()
    }


def outcome(kind: str, made: claims.Table, weights: dict) -> str:
    claim = claims.Claim("c", weights, kind)
    (record,) = claims.examine_all({"m": {"win": made}}, {"m": [claim]})
    return record["here"]


@pytest.mark.parametrize(
    ("kind", "a", "b", "prompts", "here"),
    [
        ("above", 0.7, 0.4, 400, "holds"),
        ("above", 0.4, 0.7, 400, "does not"),
        ("above", 0.5, 0.48, 50, "cannot tell"),
        ("par", 0.5, 0.5, 20000, "holds"),
        ("par", 0.5, 0.8, 400, "does not"),
        ("par", 0.5, 0.5, 50, "cannot tell"),
        ("not below", 0.8, 0.5, 400, "holds"),
        ("not below", 0.3, 0.7, 400, "does not"),
        ("not below", 0.45, 0.5, 50, "cannot tell"),
    ],
)
def test_rules(kind, a, b, prompts, here):
    made = table(prompts=prompts, kto=a, dpo=b)
    assert outcome(kind, made, {"kto": 1.0, "dpo": -1.0}) == here


def test_above_asks_every_seed():
    made = table(seeds=3, prompts=2000, kto=0.7, dpo=0.4)
    assert outcome("above", made, {"kto": 1.0, "dpo": -1.0}) == "holds"
    made["kto"][3], made["dpo"][3] = made["dpo"][3], made["kto"][3]
    assert outcome("above", made, {"kto": 1.0, "dpo": -1.0}) == "cannot tell"


def test_the_claim_on_sft_s_share_of_the_gain():
    claim = claims.claims_of_report()[0]
    most = table(base=0.1, sft=0.5, sft_dpo=0.6)
    little = table(base=0.1, sft=0.2, sft_dpo=0.6)
    assert outcome(claim.kind, most, claim.weights) == "holds"
    assert outcome(claim.kind, little, claim.weights) == "does not"
    record = claims.examine(claim, most)
    # 0.5 - (0.1 + 0.6) / 2, that is: SFT's gain less half of the whole gain.
    assert record["effect"] == pytest.approx(0.15, abs=0.05)


def test_p_values_are_corrected_over_all_models_and_claims_need_their_arms():
    made = {"a": {"win": table(kto=0.55, dpo=0.5)}, "b": {"win": table(kto=0.56, dpo=0.5)}}
    wanted = {"a": claims.claims_of_report(), "b": claims.claims_of_report()}
    records = claims.examine_all(made, wanted)
    assert [record["claim"] for record in records] == ["KTO alone beats DPO alone"] * 2
    expected = statistics.holm([record["p"] for record in records])
    assert [record["p_holm"] for record in records] == expected


def test_claims_of_the_ablations_and_the_theorem():
    wins = table(sft_kto=0.5, kto=0.5)
    wins |= {f"sft+kto_beta_{beta}": {1: np.full(9, rate)} for beta, rate in ((0.01, 0), (0.3, 1))}
    made = claims.claims_of_ablations(wins)
    assert made[0].weights == {"sft+kto": 1.0, "sft+kto_beta_0.3": -1.0}
    of_arm = {arm.name: of for of, arm in suite.CONTRADICTORY.items()}
    made = claims.claims_of_theorem(of_arm, gap=5.9)
    assert {next(iter(claim.weights)) for claim in made} == {
        f"{loss}_majority_{share}" for loss in ("dpo", "kto") for share in (0.55, 0.6)
    }


def test_prompts_needed_for_a_par_are_those_of_its_spread():
    made = table(seeds=1, prompts=2000, kto=0.5, dpo=0.5)
    claim = claims.Claim("c", {"kto": 1.0, "dpo": -1.0}, "par")
    (record,) = claims.examine_all({"m": {"win": made}}, {"m": [claim]})
    sd = np.std(made["kto"][1] - made["dpo"][1], ddof=1)
    needed = statistics.prompts_needed(sd)
    assert record["prompts_needed"] == pytest.approx(needed, rel=0.1)


def test_not_below():
    rng = np.random.default_rng(0)
    a, b = rng.random(1000), rng.random(1000)
    assert statistics.not_below(a, b) < 0.05 < statistics.not_below(a - 0.1, b)
    ones = np.ones(9)
    assert statistics.not_below(ones, ones) == 0 and statistics.not_below(ones - 0.1, ones) == 1
    assert statistics.not_below([1.0], [0.0]) == 1


# ------------------------------------------------------------ numbers, pictures, report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A suite whose stages a stub has done: two seeds of made-up replies, the real judge."""
    out = tmp_path_factory.mktemp("suite")
    rows = sample.read_prompts("toy", 40)
    words = ["--experiment", "methods", "ablations", "--seeds", "2", "--out", str(out)]
    given = suite.parse(words)
    suite.check(given)
    suite.write_data(given)
    for model, arm, seed in suite.cells(given):
        place = suite.folder(given, model, arm, seed)
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, len(arm.name)])
        made = []
        for row in rng.permutation(rows):
            reply = row["chosen"] if rng.random() < 0.7 else " No."
            made.append({**row, "reply": reply, "tokens": len(reply.split()), "ended": True})
        replies = place / "replies.jsonl"
        replies.write_text("".join(json.dumps(row) + "\n" for row in made))
        verdicts = [judge.judge_toy(row) for row in made]
        text = "".join(json.dumps(verdict) + "\n" for verdict in verdicts)
        (place / "verdicts.jsonl").write_text(text)
    stages = suite.plan(given)
    (out / "stages").mkdir()
    for one in stages:
        record = {"command": shlex.join(one.words), "seconds": 1.0, "status": 0}
        suite.record_of(one, out).write_text(json.dumps(record))
        one.output.touch()
    return given, stages


def test_numbers_report_and_pictures(finished):
    given, stages = finished
    suite.collect(given, stages, {})
    numbers = json.loads((given.out / "numbers.json").read_text())
    assert [row["arm"] for row in numbers["methods"]] == ["base", *suite.METHODS]
    row = next(row for row in numbers["methods"] if row["arm"] == "sft+kto")
    replies = [
        {r["prompt"]: r for r in judge.read_replies(place / "replies.jsonl")}
        for place in (suite.folder(given, "toy", suite.Arm("sft+kto"), s) for s in (1, 2))
    ]
    wins = [[toy.win(p, r["reply"], r["chosen"]) for p, r in rows.items()] for rows in replies]
    assert row["win_rate_minus_half"]["by_seed"] == pytest.approx(np.mean(wins, 1) - 0.5)
    assert row["win_rate_minus_half"]["mean"] == pytest.approx(np.mean(wins) - 0.5)
    low, high = row["win_rate_minus_half"]["interval_95"]
    assert low < row["win_rate_minus_half"]["mean"] < high
    assert numbers["models"] == [{"name": "toy", "parameters": 726_144}]
    assert len(numbers["ablations"]) == sum(map(len, suite.ABLATIONS.values()))
    text = (given.out / "report.md").read_text()
    assert text.index(results.CAUTION) < text.index("| claim |")
    for line in text.splitlines():
        if line.startswith("!["):
            assert (given.out / line.rpartition("(")[2].rstrip(")")).stat().st_size > 5000
    assert text.count("![") == 4 + len(suite.ABLATIONS)
    assert not list(given.out.glob("*.part"))


def test_prompts_are_those_judged_for_all_in_one_order(tmp_path):
    wins = {"kto": {"a": 1.0, "b": 0.0, "c": 0.5}, "dpo": {"c": 1.0, "b": None, "a": 0.0}}
    for arm, its in wins.items():
        (tmp_path / arm).mkdir()
        rows = [{"prompt": p, "chosen": "x", "reply": "y", "tokens": 3, "ended": True} for p in its]
        verdicts = [{"prompt": p, "win": win} for p, win in its.items()]
        for name, made in (("replies", rows), ("verdicts", verdicts)):
            text = "".join(json.dumps(row) + "\n" for row in made)
            (tmp_path / arm / f"{name}.jsonl").write_text(text)
    tables = results.tabulate({arm: {1: tmp_path / arm} for arm in wins})
    assert tables["win"]["kto"][1].tolist() == [1.0, 0.5]
    assert tables["win"]["dpo"][1].tolist() == [0.0, 1.0]


def test_results_of_two_suites_together(finished, tmp_path, capsys):
    given, stages = finished
    suite.collect(given, stages, {})
    whole = json.loads((given.out / "numbers.json").read_text())
    other = json.loads((given.out / "numbers.json").read_text().replace('"toy"', '"small"'))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, numbers in zip(paths, (whole, {**other, "data": "toy"})):
        path.write_text(json.dumps(numbers))
    results.main([*map(str, paths), "--out", str(tmp_path / "both")])
    both = json.loads((tmp_path / "both" / "numbers.json").read_text())
    for table in ("methods", "ablations", "models"):
        assert both[table] == whole[table] + other[table]
    pvalues = [record["p"] for record in both["claims"]]
    assert [record["p_holm"] for record in both["claims"]] == statistics.holm(pvalues)
    pars = [record for record in both["claims"] if record["kind"] == "par"]
    assert max(record["prompts_needed"] for record in pars) > 40
    text = (tmp_path / "both" / "report.md").read_text()
    assert f"{pars[0]['prompts_needed']} prompts needed" in text and text.count("![") == 10
    (line,) = [line for line in text.splitlines() if line.startswith("| KTO alone beats DPO")]
    assert line.count("**") == 4  # what it comes to, for both models
    # The same claims of the same model twice: the first stand.
    again = {**whole, "claims": [{**record, "p": 1.0} for record in whole["claims"]]}
    again |= {"methods": [], "ablations": []}
    assert [r["p"] for r in results.together([whole, again])["claims"]] == pvalues[
        : len(pvalues) // 2
    ]

    capsys.readouterr()
    (tmp_path / "part.json").write_text('{"data": "toy", "claims": []}')
    bad = (
        (paths[0], "twice"),
        (given.out / "report.md", "report.md"),
        (tmp_path / "part.json", "is"),
    )
    for second, said in bad:
        with pytest.raises(SystemExit, match="2"):
            results.main([str(paths[0]), str(second), "--out", str(tmp_path / "none")])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_failed_is_left_out_and_named(finished, monkeypatch):
    given, stages = finished
    given = Namespace(**{**vars(given), "experiment": ["methods"]})
    monkeypatch.setattr(results, "draw", lambda *_: [])
    failed = {"toy.from_base.kto_seed_2.judge": "status 2, error: no", "toy.base.judge": "left out"}
    suite.collect(given, stages, failed)
    numbers = json.loads((given.out / "numbers.json").read_text())
    by_arm = {row["arm"]: row for row in numbers["methods"]}
    assert "base" not in by_arm and len(by_arm["kto"]["win_rate_minus_half"]["by_seed"]) == 1
    (claim,) = [r for r in numbers["claims"] if r["claim"] == "KTO alone beats DPO alone"]
    assert len(claim["by_seed"]) == 1
    text = (given.out / "report.md").read_text()
    assert "status 2, error: no" in text and "SFT shortens replies" not in text


def test_pictures_of_two_sizes_and_of_contradictory_labels(tmp_path):
    """From numbers alone, as a notebook draws them."""
    models = [{"name": "small", "parameters": 10**5}, {"name": "toy", "parameters": 10**6}]
    figure = {"mean": 0.1, "by_seed": [0.0, 0.2], "interval_75": [0, 0.2], "interval_95": [-1, 1]}
    row = {"win_rate_minus_half": figure, "tokens": figure, "ended": figure}
    numbers = {"models": models, "ablations": [], "claims": [], "methods": [], "contradictory": []}
    for model in ("small", "toy"):
        for arm in ("base", *suite.METHODS):
            one = {**row, "model": model, "arm": arm, "name": claims.name_of(arm)}
            numbers["methods"].append(one)
        for (majority, loss), _ in suite.CONTRADICTORY.items():
            one = {"model": model, "loss": loss, "share": majority, "gap": 6.0}
            numbers["contradictory"].append({**one, "probability": figure})
    assert [m["name"] for m in figures.by_size(numbers)] == ["small", "toy"]
    assert results.draw(numbers, tmp_path) and (tmp_path / "contradictory.png").exists()
    names = ("overview", "figure_2", "figure_3", "figure_5", "contradictory")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}


def test_a_model_without_methods_gets_no_bars():
    row = {"arm": "kto", "name": "KTO", "model": "toy"}
    row["win_rate_minus_half"] = {
        "mean": 0.1,
        "by_seed": [0.1],
        "interval_75": [0, 0.2],
        "interval_95": [-1, 1],
    }
    models = [{"name": "small", "parameters": 10**5}, {"name": "toy", "parameters": 10**6}]
    numbers = {"models": models, "methods": [row], "ablations": [{"model": "small"}]}
    numbers["contradictory"] = []
    models = figures.by_size(numbers, ("methods",))
    assert [model["name"] for model in models] == ["toy"]
    axes = Figure().add_subplot()
    figures.bars(axes, numbers, models, ["dpo", "kto"])
    assert [bar.get_height() for bar in axes.patches] == [0.1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["toy\n1M"]


def test_the_overview_s_curves():
    """Each loss's push on a log-ratio r, by its equation, as a share of the largest."""
    axes = Figure().add_subplot()
    figures.pushes(axes)
    curves = {line.get_label(): line.get_xydata().T for line in axes.lines}
    r = curves["DPO"][0]
    sigmoid = 1 / (1 + np.exp(-0.1 * r))
    expected = {
        "SFT": np.ones_like(r),
        "SLiC": np.where(r < 1 + 1e-9, 1.1, 0.1) / 1.1,  # likelihood; the hinge up to its margin
        "DPO": (1 - sigmoid) / (1 - sigmoid).max(),
        "PPO, a token": np.where(r < np.log(1.5), np.exp(r), 0) / np.exp(r[r < np.log(1.5)]).max(),
        "KTO": 4 * sigmoid * (1 - sigmoid),
    }
    assert curves.keys() == expected.keys()
    for name, push in expected.items():
        np.testing.assert_allclose(curves[name][1], push, atol=1e-8, err_msg=name)


def test_one_method_from_rows_to_report(tmp_path, monkeypatch):
    """The real commands, on a few rows."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "test"):
        lines = (common.TOY / "data" / f"{split}.jsonl").read_text().splitlines(True)[:6]
        (rows / f"{split}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(suite, "arms", lambda _: [suite.Arm("kto")])
    words = ["--data", str(rows), "--n", "3", "--max_steps", "1", "--max_new_tokens", "8"]
    with contextlib.chdir(tmp_path):
        suite.main([*words, "--out", "out", "--lr", "kto=1e-4", "--judge", "shorter"])
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [row["arm"] for row in numbers["methods"]] == ["kto"]
    record = json.loads((tmp_path / "out/toy/from_base/kto_seed_1/run.json").read_text())
    assert record["finished"] and record["settings"]["lr"] == 1e-4
