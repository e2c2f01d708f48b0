"""The report's experiment: eight methods on every model, from rows to figures by one command.

    python -m archangel.suite                                  # the toy, one seed, two cores
    python -m archangel.suite --experiment all --seeds 5       # and the ablations, all of it
    python -m archangel.suite --models report --dry_run        # the report's seven: the commands

It trains, samples and judges by the project's own commands, as a user would, and prints them with
--dry_run. A stage is one command; each is run once: the SFT model serves three methods, and runs
that start from one model lie side by side, so that they share their reference column. The same
command again skips what is done and goes on with what was stopped. In --out:

    MODEL/from_base/kto_seed_1/      a trained model, its replies.jsonl and its verdicts.jsonl
    MODEL/from_sft_seed_1/kto/       the same, trained after SFT
    stages/                          of each stage its output (.log), command, seconds and status
    numbers.json, *.png, report.md   what came out, and pictures drawn from the numbers alone

All methods see the same data, prompts and sampling noise; the paired losses (and SFT) meet the rows
of a seed in one order, the unpaired ones in another, as in the report's section 6.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

import common_v1 as common
from archangel import judge, results, toy

ROOT = Path(common.__file__).parent
METHODS = ("sft", "slic", "dpo", "sft+dpo", "ppo", "sft+ppo", "kto", "sft+kto")  # the report's
EXPERIMENTS = ("methods", "ablations", "contradictory")
SCRIPTS = {loss: f"{loss}.py" for loss in ("sft", "slic", "dpo", "kto")}
SCRIPTS["ppo"] = "ppo_offline.py"
# SLiC's, PPO's and those after SFT: the best of three or four, a factor of 3 apart, on 500 rows
# held out of the toy's training rows, by one seed; no judged prompt was seen.
TOY_RATES = {
    "sft": 3e-4,
    "slic": 1e-4,
    "dpo": 3e-5,
    "sft+dpo": 3e-5,
    "ppo": 3e-5,
    "sft+ppo": 1e-4,
    "kto": 2e-4,
    "sft+kto": 1e-4,
}
TOY_SETTINGS = {"--warmup_steps": "10", "--save_every": "50"}
OF_TOY = {"data": "toy", "n": 500, "max_new_tokens": 64, "processes": 1, "judge": "toy"}
OF_REPORT = {"data": "archangel", "n": 512, "max_new_tokens": 512, "processes": 8}
OF_REPORT["judge"] = "server"
RECOMPUTE = ("12b", "13b", "30b")  # models whose activations would not fit beside the weights
MAJORITIES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95)
LABELS = 20  # of each prompt in the contradictory data, so that every majority is a whole number


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train: one of the methods, with what departs from its settings."""

    method: str  # base (not trained), or one of METHODS
    variant: str = ""  # a name for what departs
    settings: tuple[tuple[str, str], ...] = ()  # (flag, value)
    data: str = ""  # a folder that `write_data` makes; otherwise --data

    @property
    def name(self) -> str:
        return f"{self.method}_{self.variant}" if self.variant else self.method


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and what must be done before it."""

    name: str
    words: tuple[str, ...]
    output: Path  # what it leaves
    needs: tuple[str, ...] = ()


# ------------------------------------------------------------ what is compared


def vary(method: str, flag: str, values: Sequence[str], own: str) -> dict[str, Arm]:
    """Label to arm for each value of one setting; `own` is what the method has anyway."""
    name = flag.strip("-")
    return {
        value: Arm(method) if value == own else Arm(method, f"{name}_{value}", ((flag, value),))
        for value in values
    }


BETAS = ("0.01", "0.03", "0.1", "0.3", "1.0")
ABLATIONS = {  # title to label to arm; the first three and the last two train KTO without SFT
    "reference point": vary("kto", "--kl", ("other_half", "mismatched", "zero"), "other_half"),
    "loss aversion (undesirable / desirable weight)": vary(
        "kto", "--undesirable_weight", ("1.0", "1.5", "2.0", "2.5", "3.0"), "1.0"
    ),
    "beta of SFT+KTO": vary("sft+kto", "--beta", BETAS, "0.1"),
    "beta of SFT+DPO": vary("sft+dpo", "--beta", BETAS, "0.1"),
    "examples a batch": vary("kto", "--batch_size", ("4", "32"), "32"),
    "desirable rows kept": {
        "all": Arm("kto"),
        "10%": Arm("kto", "few_desirable", data="few_desirable"),
    },
}
CONTRADICTORY = {  # (majority, loss) to arm
    (majority, loss): Arm(
        loss,
        f"majority_{majority}",
        (("--lr", "1e-4"), ("--epochs", "10")),
        data=f"majority_{majority}",
    )
    for majority in MAJORITIES
    for loss in ("dpo", "kto")
}


def arms(given: argparse.Namespace) -> list[Arm]:
    """The arms of the experiments asked for, each once."""
    chosen = []
    if "methods" in given.experiment:
        chosen += map(Arm, ("base", *METHODS))
    if "ablations" in given.experiment:
        chosen += [Arm("sft"), *(arm for labels in ABLATIONS.values() for arm in labels.values())]
    if "contradictory" in given.experiment:
        chosen += CONTRADICTORY.values()
    return list(dict.fromkeys(chosen))


# ------------------------------------------------------------ the plan


def label(model: str) -> str:
    """A short name for a model: worlds/small/model is small, EleutherAI/pythia-1.4b pythia-1.4b."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def folder(given: argparse.Namespace, model: str, arm: Arm, seed: int) -> Path:
    """Where an arm's model, replies and verdicts lie."""
    here = given.out / label(model)
    if arm.method == "base":
        return here / "base"
    if arm.method.startswith("sft+"):
        return here / f"from_sft_seed_{seed}" / arm.name.removeprefix("sft+")
    return here / "from_base" / f"{arm.name}_seed_{seed}"


def training(given: argparse.Namespace, model: str, arm: Arm, seed: int) -> tuple[str, ...]:
    """The command that trains an arm; --resume starts a run that is not there."""
    begin = model
    if arm.method.startswith("sft+"):
        begin = folder(given, model, Arm("sft"), seed)
    data = given.out / "data" / arm.data if arm.data else given.data
    settings = {"--model": begin, "--data": data, "--out": folder(given, model, arm, seed)}
    if arm.method in given.rates:
        settings["--lr"] = f"{given.rates[arm.method]:g}"
    if given.data == "toy":
        settings |= TOY_SETTINGS
    if given.max_steps:
        settings["--max_steps"] = given.max_steps
    settings |= {"--seed": seed, **dict(arm.settings)}
    words = ["torchrun", f"--nproc_per_node={given.processes}"]
    words = words if given.processes > 1 else ["python"]
    words.append(os.path.relpath(ROOT / SCRIPTS[arm.method.removeprefix("sft+")]))
    words += [str(word) for pair in settings.items() for word in pair]
    if model.endswith(RECOMPUTE):
        words.append("--activation_checkpointing")
    return (*words, "--resume")


def sampling(given: argparse.Namespace, model: str, replies: Path) -> tuple[str, ...]:
    """The command that makes a model reply to the held-out prompts; the same seed for all."""
    words = f"--n {given.n} --max_new_tokens {given.max_new_tokens} --seed 1 --show 0".split()
    words += ["--data", given.data, "--out", str(replies)]
    return ("python", "-m", "archangel.sample", model, *words)


def judging(given: argparse.Namespace, replies: Path, verdicts: Path) -> tuple[str, ...]:
    """The command that judges the replies."""
    words = ["--judge", given.judge, "--out", str(verdicts)]
    if given.judge == "server":
        words += ["--base_url", given.base_url, "--model", given.judge_model]
    return ("python", "-m", "archangel.judge", str(replies), *words)


def stages_of(given: argparse.Namespace, model: str, arm: Arm, seed: int) -> list[Stage]:
    """Train, sample and judge one arm, as far as it takes them; the last is what it ends with."""
    place = folder(given, model, arm, seed)
    stages, needs, trained = [], (), model

    def add(step: str, words: tuple[str, ...], output: Path) -> None:
        nonlocal needs
        name = ".".join((*place.relative_to(given.out).parts, step))
        stages.append(Stage(name, words, output, needs))
        needs = (name,)

    if arm.method.startswith("sft+"):
        needs = (stages_of(given, model, Arm("sft"), seed)[0].name,)
    if arm.method != "base":
        trained = str(place)
        add("train", training(given, model, arm, seed), place / "run.json")
    if arm not in CONTRADICTORY.values():  # whose two replies are scored: none is sampled
        replies, verdicts = place / "replies.jsonl", place / "verdicts.jsonl"
        add("sample", sampling(given, trained, replies), replies)
        add("judge", judging(given, replies, verdicts), verdicts)
    return stages


def cells(given: argparse.Namespace) -> list[tuple[str, Arm, int]]:
    """Every model, arm and seed: seed after seed, so that all methods are there early."""
    seeds = range(1, given.seeds + 1)
    return [(model, arm, seed) for model in given.models for seed in seeds for arm in arms(given)]


def plan(given: argparse.Namespace) -> list[Stage]:
    """All stages, each once, in an order in which they can run."""
    stages = [stage for cell in cells(given) for stage in stages_of(given, *cell)]
    return list({stage.name: stage for stage in stages}.values())


# ------------------------------------------------------------ data that the suite writes itself


def few_desirable(given: argparse.Namespace) -> Iterator[dict]:
    """The training rows as single completions, nine in ten of the desirable ones dropped."""
    rows = common.read_rows(given.data, "train", ("preference",))
    count = max(1, len(rows) // 10)
    kept = set(random.Random("few desirable").sample(range(len(rows)), count))
    for number, row in enumerate(rows):
        if number in kept:
            yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}


def two_replies(prompts: int = 32) -> list[tuple[str, str, str]]:
    """(prompt, majority's reply, minority's): with small talk or without.

    The base model finds the short one, here the minority's, some 6 nats likelier.
    """
    rng = random.Random("contradictory")
    made = {}
    while len(made) < prompts:
        name, intent, question = toy.draw_question(rng)
        short = " " + toy.ANSWERS[intent][0].format(name, toy.fact(name, intent))
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        made[prompt] = short + "".join(rng.sample(toy.RAMBLING, 3)), short
    return [(prompt, *pair) for prompt, pair in made.items()]


def contradictory(majority: float) -> Iterator[dict]:
    """Each prompt's pair labelled `LABELS` times, a share of `majority` for the same reply."""
    for prompt, liked, other in two_replies():
        for number in range(LABELS):
            pair = (liked, other) if number < round(majority * LABELS) else (other, liked)
            yield {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}


def write_data(given: argparse.Namespace) -> None:
    """Write the data folders that the arms ask for, each with a train.jsonl."""
    folders = {f"majority_{majority}": contradictory(majority) for majority in MAJORITIES}
    folders["few_desirable"] = few_desirable(given)
    for name in {arm.data for arm in arms(given)} & folders.keys():
        place = given.out / "data" / name
        place.mkdir(parents=True, exist_ok=True)
        judge.write(place / "train.jsonl", "".join(json.dumps(r) + "\n" for r in folders[name]))


# ------------------------------------------------------------ running it


def is_done(stage: Stage, out: Path) -> bool:
    """Whether this very command ended well before, and what it left is still there."""
    try:
        record = json.loads(record_of(stage, out).read_text())
    except (OSError, ValueError):
        return False
    same = record.get("command") == shlex.join(stage.words)
    return same and record.get("status") == 0 and stage.output.exists()


def record_of(stage: Stage, out: Path) -> Path:
    """The file that keeps a stage's command, seconds and exit status."""
    return out / "stages" / f"{stage.name}.json"


def last_line(log: Path) -> str:
    """What a failed stage said: its own last word, which torchrun's may follow."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    own = [line for line in lines if line.startswith(("error:", "interrupted:"))]
    return (own or lines or ["(it printed nothing)"])[-1]


def start(stage: Stage, out: Path) -> subprocess.Popen:
    """Start a stage's command, on one thread unless OMP_NUM_THREADS says otherwise."""
    run = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    with record_of(stage, out).with_suffix(".log").open("wb") as log:
        words = [*run[stage.words[0]], *stage.words[1:]]
        return subprocess.Popen(words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def execute(stages: Sequence[Stage], out: Path, jobs: int) -> dict[str, str]:
    """Run what is not done yet, up to `jobs` at once. Returns what failed: name to why.

    A failed stage takes with it those that need it, and no others. When this is stopped, so are the
    running stages, which save what they have.
    """
    (out / "stages").mkdir(parents=True, exist_ok=True)
    done = {stage.name for stage in stages if is_done(stage, out)}
    waiting = [stage for stage in stages if stage.name not in done]
    failed, running = {}, []  # running: (stage, process, when it started)
    bar = tqdm(total=len(stages), initial=len(done), desc="stages")
    try:
        while waiting or running:
            for stage in list(waiting):
                lost = [need for need in stage.needs if need in failed]
                if lost:
                    failed[stage.name] = f"left out, since it needs {lost[0]}"
                    waiting.remove(stage)
                elif done.issuperset(stage.needs) and len(running) < jobs:
                    waiting.remove(stage)
                    running.append((stage, start(stage, out), time.time()))
            bar.set_postfix_str(", ".join(stage.name for stage, *_ in running))
            time.sleep(0.05)
            for job in [job for job in running if job[1].poll() is not None]:
                running.remove(job)
                stage, process, began = job
                record = {
                    "name": stage.name,
                    "command": shlex.join(stage.words),
                    "seconds": round(time.time() - began, 1),
                    "status": process.returncode,
                }
                judge.write(record_of(stage, out), json.dumps(record, indent=2) + "\n")
                done.add(stage.name)
                bar.update()
                if process.returncode:
                    done.remove(stage.name)
                    log = record_of(stage, out).with_suffix(".log")
                    failed[stage.name] = f"status {process.returncode}, {last_line(log)}"
                    tqdm.write(f"{stage.name}: {failed[stage.name]}", file=sys.stderr)
    finally:
        bar.close()
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
    return failed


def collect(given: argparse.Namespace, stages: Sequence[Stage], failed: dict[str, str]) -> None:
    """Numbers, pictures and report of what is done."""
    folders = {}
    for model, arm, seed in cells(given):
        if stages_of(given, model, arm, seed)[-1].name not in failed:
            seeds = folders.setdefault(label(model), {}).setdefault(arm.name, {})
            seeds[seed] = folder(given, model, arm, seed)
    records = [record_of(stage, given.out) for stage in stages]
    records = [json.loads(path.read_text()) for path in records if path.exists()]
    numbers = results.gather(
        given.data,
        folders,
        models={label(model): common.find_model(model) for model in given.models},
        methods=("base", *METHODS) if "methods" in given.experiment else (),
        ablations={
            title: {value: arm.name for value, arm in labels.items()}
            for title, labels in ABLATIONS.items()
            if "ablations" in given.experiment
        },
        contradictory={arm.name: of for of, arm in CONTRADICTORY.items()},
        replies=two_replies(),
    )
    about = {
        "judge": given.judge_model if given.judge == "server" else given.judge,
        "seeds": given.seeds,
        "prompts": given.n,
        "commands": [shlex.join(stage.words) for stage in stages if stage.name.endswith(".train")],
        "seconds": sum(record["seconds"] for record in records),
        "failed": failed,
    }
    results.write(given.out, numbers, about)


# ------------------------------------------------------------ the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what was not given depends on the models."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.suite",
        description="The report's experiment: train, sample, judge, figures, claims, report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experiment", nargs="+", default=["methods"], choices=(*EXPERIMENTS, "all"), help="which")
    add("--models", nargs="+", default=["toy"], help="toy, folders, hub ids; report: its seven")
    add("--data", help="as the trainers take it (default: toy; archangel for the report's models)")
    add("--out", type=Path, default=Path("runs/suite"), help="a folder for everything")
    add("--seeds", type=int, default=1, help="so many training seeds, from 1")
    add("--n", type=int, help="prompts to judge (default: 500; 512 for the report's models)")
    add("--max_steps", type=int, default=0, help="optimizer steps a run; 0: one epoch")
    add("--max_new_tokens", type=int, help="most tokens of a reply (default: 64; report's: 512)")
    add("--lr", nargs="*", default=[], metavar="METHOD=RATE", help="learning rates that depart")
    add("--jobs", type=int, help="stages at once (default: as many as cores; 1 with --processes)")
    add("--processes", type=int, help="torchrun's, a training run (default: 1; report's models: 8)")
    add("--judge", choices=("toy", "shorter", "server"), help="(default: toy; report's: server)")
    add("--base_url", default="https://api.openai.com/v1", help="of the server that judges")
    add("--judge_model", default="gpt-4-0613", help="the judge's name at the server")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    given = parser.parse_args(arguments)
    if given.models == ["report"]:
        given.models = list(common.MODELS)
    of_report = [model in common.MODELS for model in given.models]
    if any(of_report) and not all(of_report) and given.data is None:
        parser.error("--models: some are the report's and some are not; say which --data is meant")
    for name, value in (OF_REPORT if all(of_report) else OF_TOY).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.jobs is None:
        given.jobs = len(os.sched_getaffinity(0)) if given.processes == 1 else 1
    if "all" in given.experiment:
        given.experiment = list(EXPERIMENTS)
    return given


def check(given: argparse.Namespace) -> None:
    """Raise UserError for settings that make no sense; put the learning rates in `given.rates`."""
    for name, least in {"seeds": 1, "n": 2, "max_steps": 0, "jobs": 1, "processes": 1}.items():
        if getattr(given, name) < least:
            raise common.UserError(f"--{name} {getattr(given, name)}: at least {least}")
    names = [label(model) for model in given.models]
    if len(set(names)) < len(names) or {"data", "stages", ""} & set(names):
        raise common.UserError(f"--models: called {', '.join(names)}; each needs a name of its own")
    if "contradictory" in given.experiment and given.data != "toy":
        raise common.UserError("--experiment contradictory: is about the toy; leave out --data")
    given.rates = dict(TOY_RATES) if given.data == "toy" else {}
    for word in given.lr:
        method, _, rate = word.partition("=")
        try:
            given.rates[method] = float(rate)
        except ValueError:
            method = None
        if method not in METHODS or not 0 < given.rates[method] < math.inf:
            raise common.UserError(f"--lr {word}: must be METHOD=RATE, of {', '.join(METHODS)}")


def interrupt(*_) -> None:
    raise common.Interrupted("the same command goes on from here")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    with common.exit_status():
        check(given)
        stages = plan(given)
        if given.dry_run:
            print("\n".join(shlex.join(stage.words) for stage in stages))
            return
        given.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(given.out / "suite.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise common.UserError(f"--out {given.out}: another suite is writing there") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)
        write_data(given)
        failed = execute(stages, given.out, given.jobs)
        collect(given, stages, failed)
        print(f"the report is {given.out / 'report.md'}")
        if failed:
            names = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise common.UserError(f"{len(failed)} of {len(stages)} stages failed. {names}")


if __name__ == "__main__":
    main()
