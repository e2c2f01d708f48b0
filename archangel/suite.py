"""The report's experiment: eight methods on every model, from data to figures by one command.

    python -m archangel.suite                                  # the toy, one seed, two cores
    python -m archangel.suite --experiment all --seeds 5       # and the ablations, all of it
    python -m archangel.suite --models report --dry_run        # the report's seven: the commands
    python -m archangel.suite --experiment rates --out runs/rates   # how some rates were chosen

It trains, samples and judges by the project's own commands, as a user would. With --dry_run it only
prints them. A stage is one command, and each is run once: the SFT model serves three methods. If
the suite is started again, it skips stages that are done and resumes those that were stopped. In
--out:

    MODEL/from_base/kto_seed_1/      a trained model, its replies.jsonl and its verdicts.jsonl
    MODEL/from_sft_seed_1/kto/       the same, trained after SFT
    stages/                          of each stage its output (.log), command, seconds and status
    numbers.json, *.png, report.md   the results, and figures drawn from the numbers alone

All methods have the same data, prompts and sampling noise. Within a seed, the paired losses and SFT
see the records in one order, the unpaired losses in another, as in the report's section 6.
"""

import argparse
import contextlib
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from archangel import judge, results, toy
from archangel.data import prepare_mixture
from archangel.errors import Interrupted, UserError, exit_status
from archangel.records import TEMPLATE_COLUMNS, format_of, read_records
from archangel.run import MODELS, find_model
from archangel.tokens import LeftOut, split_record

ROOT = Path(__file__).parent.parent
METHODS = ("sft", "slic", "dpo", "sft+dpo", "ppo", "sft+ppo", "kto", "sft+kto")  # the report's
EXPERIMENTS = ("methods", "ablations", "contradictory")  # what "all" stands for
SCRIPTS = {
    "sft": "sft.py",
    "slic": "slic.py",
    "dpo": "dpo.py",
    "ppo": "ppo_offline.py",
    "kto": "kto.py",
}
# By method, or by arm where that differs. Those of SLiC, PPO and the methods after SFT are the best
# of three or four, a factor of 3 apart. They were compared for one seed, on 500 of the toy's
# training records that were held out. No judged prompt was used. Those of SFT, DPO and KTO were set
# by hand before that; of four rates they are the best or within 0.03 of it. Those of the arms were
# chosen among RATES. Both by --experiment rates, in the same way (toy_results/rates.md). Where the
# best of RATES is the largest, no larger one was tried. With an undesirable weight of 2.0 or 3.0,
# every rate failed.
TOY_RATES = {
    "sft": 3e-4,
    "slic": 1e-4,
    "dpo": 3e-5,
    "sft+dpo": 3e-5,
    "ppo": 3e-5,
    "sft+ppo": 1e-4,
    "kto": 2e-4,
    "sft+kto": 1e-4,
    "kto_identity": 2e-4,
    "kto_log_sigmoid": 2e-4,
    "kto_equation_6": 6e-5,
    "kto_equation_6_shifted": 2e-4,
    "kto_undesirable_weight_0.5": 6e-5,
    "kto_undesirable_weight_0.75": 2e-4,
    "kto_undesirable_weight_1.5": 2e-4,
    "kto_undesirable_weight_2.0": 2e-5,
    "kto_undesirable_weight_3.0": 6e-5,
}
TOY_SETTINGS = {"--warmup_steps": "10", "--save_every": "50"}
# Defaults of this command, for the toy and for the report's models. The authors' code has 512
# prompts; 512 new tokens and 8 processes are our choice.
TOY_DEFAULTS = {"data": "toy", "n": 500, "max_new_tokens": 64, "processes": 1, "judge": "toy"}
REPORT_DEFAULTS = {
    "data": "archangel",
    "n": 512,
    "max_new_tokens": 512,
    "processes": 8,
    "judge": "server",
}
# Models whose activations would not fit beside the weights on 8 GPUs, by archangel.memory.
RECOMPUTE = ("llama-7b", "pythia-12b", "llama-13b", "llama-30b")
MAJORITIES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.95)
LABELS = 20  # of each prompt in the contradictory data, so that every majority is a whole number


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train: one of the methods, and what differs from its default settings."""

    method: str  # base (not trained), or one of METHODS
    variant: str = ""  # a name for what differs
    settings: tuple[tuple[str, str], ...] = ()  # (flag, value); "" for a flag without a value
    data: str = ""  # a folder that `write_data` makes; if empty, --data
    is_own_loop: bool = False  # trained by archangel/kto_variants.py, in one process
    # A folder that `write_data` makes, whose prompts are judged; if empty, --data.
    prompts: str = ""

    @property
    def name(self) -> str:
        """A name for files and folders."""
        if self.variant:
            return f"{self.method}_{self.variant}"
        return self.method


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and which stages must be done before it."""

    name: str
    words: tuple[str, ...]
    output: Path  # the file that it writes
    needs: tuple[str, ...] = ()


# ------------------------------------------------------------------------------- what is compared


def vary(method: str, flag: str, values: Sequence[str], default: str) -> dict[str, Arm]:
    """Value to arm, for each value of one setting. default: the method's own value."""
    name = flag.removeprefix("--")
    by_value = {}
    for value in values:
        if value == default:
            by_value[value] = Arm(method)
        else:
            by_value[value] = Arm(method, f"{name}_{value}", ((flag, value),))
    return by_value


# The reference point by the settings of kto.py, and as in the authors' code of December 2023: with
# gradient, and from the examples of one process alone. The report mentions minibatches of 4
# examples per GPU (section 5), at a batch of 32 (section 6).
ATTACHED = ("--attached", "")
GROUPS_OF_4 = ("--group_size", "4")
REFERENCE_POINTS = {
    **vary("kto", "--kl", ("other_half", "mismatched", "zero"), "other_half"),
    "attached": Arm("kto", "attached", (ATTACHED,), is_own_loop=True),
    "groups of 4": Arm("kto", "groups", (GROUPS_OF_4,), is_own_loop=True),
    "groups of 4, attached": Arm(
        "kto", "groups_attached", (GROUPS_OF_4, ATTACHED), is_own_loop=True
    ),
}


def with_greeting(arm: Arm) -> Arm:
    """The arm, trained on the data in which all replies begin with a greeting; see `greeting`."""
    variant = f"greeting_{arm.variant}".removesuffix("_")
    return dataclasses.replace(arm, variant=variant, data="greeting")


VALUES = {
    "sigmoid": Arm("kto"),
    "identity": Arm("kto", "identity", (("--value", "identity"),), is_own_loop=True),
    "log sigmoid": Arm("kto", "log_sigmoid", (("--value", "log_sigmoid"),), is_own_loop=True),
    "(6), smoothed": Arm("kto", "equation_6", (("--value", "equation_6"),), is_own_loop=True),
    "(6), shifted": Arm(
        "kto", "equation_6_shifted", (("--value", "equation_6_shifted"),), is_own_loop=True
    ),
}
LOSS_AVERSIONS = vary(
    "kto", "--undesirable_weight", ("0.5", "0.75", "1.0", "1.5", "2.0", "3.0"), "1.0"
)
# On the toy, one epoch of DPO has half as many steps as one of KTO.
DPO_AS_MANY_STEPS = Arm("dpo", "2_epochs", (("--epochs", "2"),))
DROPPED = (50, 75, 90)  # percent of the examples of one class
CLASSES = ("desirable", "undesirable")


def arms_with_dropped(of_class: str) -> dict[str, Arm]:
    """KTO where examples of one class were dropped, and DPO on all pairs.

    As many steps each. KTO with batches that are half and half, as kto.py makes them, with weights
    of 1 and in the proportion 4/3; and as in the KTO paper, with batches that have the class ratio
    of the data, weights with which desirable_weight * desirable examples is 4/3 of the same for the
    undesirable ones, and the reference point of mismatched completions.
    """
    by_value = {"DPO": DPO_AS_MANY_STEPS}
    for percent in DROPPED:
        name = f"{of_class}_{percent}_dropped"
        kept = 1 - percent / 100
        if of_class == "desirable":
            paper_weight = ("--desirable_weight", f"{4 / 3 / kept:.4f}")
        else:
            paper_weight = ("--undesirable_weight", f"{3 / 4 / kept:.4f}")
        as_data = (("--class_balance", "data"), ("--kl", "mismatched"), paper_weight)
        by_value[f"{percent}%"] = Arm("kto", name, data=name)
        by_value[f"{percent}%, 4/3"] = Arm(
            "kto", f"{name}_weighted", (("--desirable_weight", "1.3333"),), name
        )
        by_value[f"{percent}%, as the data"] = Arm(
            "kto", f"{name}_as_data", as_data, name, is_own_loop=True
        )
    return by_value


BETAS = ("0.01", "0.03", "0.1", "0.3", "1.0")
# Title to value to arm. All train without SFT, except for those of beta.
ABLATIONS = {
    "reference point": REFERENCE_POINTS,
    "reference point, replies with a greeting": {
        value: with_greeting(arm) for value, arm in REFERENCE_POINTS.items()
    },
    "value of a gain": VALUES,
    "loss aversion (undesirable / desirable weight)": LOSS_AVERSIONS,
    "beta of SFT+KTO": vary("sft+kto", "--beta", BETAS, "0.1"),
    "beta of SFT+DPO": vary("sft+dpo", "--beta", BETAS, "0.1"),
    "one reply per prompt": {
        "DPO, pairs": DPO_AS_MANY_STEPS,
        "KTO, both replies": Arm("kto"),
        "KTO, one reply": Arm("kto", "one_reply", (("--epochs", "2"),), "one_reply"),
    },
    "desirable examples dropped": arms_with_dropped("desirable"),
    "undesirable examples dropped": arms_with_dropped("undesirable"),
}

RATES = ("2e-05", "6e-05", "0.0002")  # as f"{rate:g}" prints them
RATES_OF_METHODS = {
    "sft": ("6e-05", "0.0002", "0.0003", "0.0006"),
    "dpo": ("2e-05", "3e-05", "6e-05", "0.0002"),
    "kto": ("2e-05", "6e-05", "0.0002", "0.0006"),
}
NUM_RATE_PROMPTS = 500  # training records that --experiment rates holds out


def rate_arms() -> dict[str, dict[str, Arm]]:
    """Title to learning rate to arm: what --experiment rates compares."""
    rates_of_arms = {Arm(method): rates for method, rates in RATES_OF_METHODS.items()}
    rates_of_arms[DPO_AS_MANY_STEPS] = RATES_OF_METHODS["dpo"]
    for arm in [*VALUES.values(), *LOSS_AVERSIONS.values()]:
        rates_of_arms.setdefault(arm, RATES)
    by_title = {}
    for arm, rates in rates_of_arms.items():
        by_rate = {}
        for rate in rates:
            by_rate[rate] = dataclasses.replace(
                arm,
                variant=f"{arm.variant}_lr_{rate}".removeprefix("_"),
                settings=(*arm.settings, ("--lr", rate)),
                data="rates",
                prompts="rates",
            )
        by_title[f"learning rate of {arm.name}"] = by_rate
    return by_title


RATE_ARMS = rate_arms()


def contradictory_arms() -> dict[tuple[float, str], Arm]:
    """(majority, loss) to arm."""
    by_majority_and_loss = {}
    settings = (("--lr", "1e-4"), ("--epochs", "10"))
    for majority in MAJORITIES:
        name = f"majority_{majority}"
        for loss in ("dpo", "kto"):
            by_majority_and_loss[majority, loss] = Arm(loss, name, settings, data=name)
    return by_majority_and_loss


CONTRADICTORY = contradictory_arms()


def arms(args: argparse.Namespace) -> list[Arm]:
    """The arms of the experiments that were asked for, each once."""
    chosen = []
    if "methods" in args.experiment:
        for method in ("base", *METHODS):
            chosen.append(Arm(method))
    if "ablations" in args.experiment:
        chosen.append(Arm("sft"))
        for arms_of_ablation in ABLATIONS.values():
            for arm in arms_of_ablation.values():
                is_possible = args.processes == 1 or not arm.is_own_loop
                if is_possible and (args.data == "toy" or arm.data != "greeting"):
                    chosen.append(arm)
    if "rates" in args.experiment:
        for arms_of_rate in RATE_ARMS.values():
            chosen.extend(arms_of_rate.values())
    if "contradictory" in args.experiment:
        chosen.extend(CONTRADICTORY.values())
    return list(dict.fromkeys(chosen))


# --------------------------------------------------------------------------------------- the plan


def label(model: str) -> str:
    """A short name: small for worlds/small/model, pythia-1.4b for EleutherAI/pythia-1.4b."""
    path = Path(model)
    if path.name == "model" and path.parent.name:
        return path.parent.name
    return path.name


def folder(args: argparse.Namespace, model: str, arm: Arm, seed: int) -> Path:
    """The folder of an arm's model, replies and verdicts."""
    model_folder = args.out / label(model)
    if arm.method == "base":
        return model_folder / "base"
    if arm.method.startswith("sft+"):
        return model_folder / f"from_sft_seed_{seed}" / arm.name.removeprefix("sft+")
    return model_folder / "from_base" / f"{arm.name}_seed_{seed}"


def training(args: argparse.Namespace, model: str, arm: Arm, seed: int) -> tuple[str, ...]:
    """The command that trains an arm. It has --resume, which also starts a new run."""
    start_model = model
    if arm.method.startswith("sft+"):
        start_model = folder(args, model, Arm("sft"), seed)
    data = args.out / "data" / arm.data if arm.data else args.data
    settings = {"--model": start_model, "--data": data, "--out": folder(args, model, arm, seed)}
    rate = args.rates.get(arm.name, args.rates.get(arm.method))
    if rate is not None:
        settings["--lr"] = f"{rate:g}"
    if args.data == "toy":
        settings.update(TOY_SETTINGS)
    if args.max_steps:
        settings["--max_steps"] = args.max_steps
    settings["--seed"] = seed
    settings.update(arm.settings)

    if arm.is_own_loop:
        words = ["python", "-m", "archangel.kto_variants"]
    else:
        script = os.path.relpath(ROOT / SCRIPTS[arm.method.removeprefix("sft+")])
        if args.processes > 1:
            words = ["torchrun", f"--nproc_per_node={args.processes}", script]
        else:
            words = ["python", script]
    for flag, value in settings.items():
        words.append(flag)
        if value != "":
            words.append(str(value))
    if model in RECOMPUTE:
        words.append("--activation_checkpointing")
    words.append("--resume")
    return tuple(words)


def sampling(args: argparse.Namespace, model: str, arm: Arm, replies: Path) -> tuple[str, ...]:
    """The command that samples replies to the held-out prompts, with the same seed for all."""
    data = str(args.out / "data" / arm.prompts) if arm.prompts else args.data
    words = f"--n {args.n} --max_new_tokens {args.max_new_tokens} --seed 1 --show 0".split()
    words += ["--data", data, "--out", str(replies)]
    return ("python", "-m", "archangel.sample", model, *words)


def judging(args: argparse.Namespace, replies: Path, verdicts: Path) -> tuple[str, ...]:
    """The command that judges the replies."""
    words = ["--judge", args.judge, "--out", str(verdicts)]
    if args.judge == "server":
        words += ["--base_url", args.base_url, "--model", args.judge_model]
    return ("python", "-m", "archangel.judge", str(replies), *words)


def stage_name(args: argparse.Namespace, place: Path, step: str) -> str:
    """The name of a step (train, sample or judge) for the arm in this folder."""
    return ".".join([*place.relative_to(args.out).parts, step])


def stages_of(args: argparse.Namespace, model: str, arm: Arm, seed: int) -> list[Stage]:
    """The stages that train, sample and judge one arm, as far as it needs them, in this order."""
    place = folder(args, model, arm, seed)
    stages = []
    needs = ()
    trained = model
    if arm.method.startswith("sft+"):
        needs = (stage_name(args, folder(args, model, Arm("sft"), seed), "train"),)
    if arm.method != "base":
        name = stage_name(args, place, "train")
        stages.append(Stage(name, training(args, model, arm, seed), place / "run.json", needs))
        needs = (name,)
        trained = str(place)
    # No replies of the arms with contradictory labels are sampled: two given ones are scored.
    if arm not in CONTRADICTORY.values():
        replies = place / "replies.jsonl"
        verdicts = place / "verdicts.jsonl"
        name = stage_name(args, place, "sample")
        stages.append(Stage(name, sampling(args, trained, arm, replies), replies, needs))
        needs = (name,)
        name = stage_name(args, place, "judge")
        stages.append(Stage(name, judging(args, replies, verdicts), verdicts, needs))
    return stages


def cells(args: argparse.Namespace) -> list[tuple[str, Arm, int]]:
    """Every model, seed and arm, in this order."""
    found = []
    for model in args.models:
        for seed in range(1, args.seeds + 1):
            for arm in arms(args):
                found.append((model, arm, seed))
    return found


def plan(args: argparse.Namespace) -> list[Stage]:
    """All stages, each once, in an order in which they can run."""
    stages = {}  # by name
    for model, arm, seed in cells(args):
        for stage in stages_of(args, model, arm, seed):
            stages[stage.name] = stage
    return list(stages.values())


# ----------------------------------------------------------------- data that the suite itself makes


def read_pairs(args: argparse.Namespace) -> list[tuple[dict, dict]]:
    """The training pairs: (prompt and what the chat template needs, completions by name).

    Raises UserError if there are other records.
    """
    pairs = []
    prepare_mixture(args.data)
    for record in read_records(args.data, "train"):
        if format_of(record) != "preference":
            raise UserError(f"--data {args.data}: has other records than pairs")
        try:
            prompt, completions = split_record(record)
        except LeftOut:  # the trainers leave it out, too
            continue
        shared = {name: record[name] for name in TEMPLATE_COLUMNS if name in record}
        completions_of_record = {}
        for name, completion in completions.items():
            is_text = isinstance(completion, str)  # else a message
            completions_of_record[name] = completion if is_text else [completion]
        pairs.append(({"prompt": prompt, **shared}, completions_of_record))
    return pairs


def dropped(args: argparse.Namespace, of_class: str, percent: int) -> Iterator[dict]:
    """The training records as single completions, without some of one class, drawn at random."""
    pairs = read_pairs(args)
    num_kept = max(1, round(len(pairs) * (1 - percent / 100)))
    kept = set(random.Random(f"{of_class} {percent}").sample(range(len(pairs)), num_kept))
    for number, (shared, completions) in enumerate(pairs):
        for name, label in (("chosen", True), ("rejected", False)):
            is_of_class = label == (of_class == "desirable")
            if not is_of_class or number in kept:
                yield {**shared, "completion": completions[name], "label": label}


def one_reply(args: argparse.Namespace) -> Iterator[dict]:
    """One completion of each training pair, drawn at random."""
    rng = random.Random("one reply")
    for shared, completions in read_pairs(args):
        label = rng.random() < 0.5
        completion = completions["chosen" if label else "rejected"]
        yield {**shared, "completion": completion, "label": label}


def greeting(args: argparse.Namespace) -> Iterator[dict]:
    """The toy's training pairs, where all replies begin with a greeting.

    The toy's replies are samples of what its base model was trained on. So the mean log-ratio of
    both classes together estimates minus a KL divergence, and the reference point is almost always
    0. Replies of people are not samples of a model. The base model has never seen this greeting; in
    training, all replies become more likely, and the reference point rises above 0.
    """
    for record in read_records(args.data, "train"):
        for name in ("chosen", "rejected"):
            record[name] = " Good day." + record[name]
        yield record


def two_replies(num_prompts: int = 32) -> list[tuple[str, str, str]]:
    """(prompt, the majority's reply, the minority's): an answer with small talk, and without.

    For the base model the short one, which is the minority's, is some 6 nats likelier.
    """
    rng = random.Random("contradictory")
    by_prompt = {}
    while len(by_prompt) < num_prompts:
        name, intent, question = toy.draw_question(rng)
        prompt = f"\n\nHuman: {question}\n\nAssistant:"
        short = " " + toy.ANSWERS[intent][0].format(name, toy.fact(name, intent))
        long = short + "".join(rng.sample(toy.RAMBLING, 3))
        by_prompt[prompt] = (prompt, long, short)
    return list(by_prompt.values())


def contradictory(majority: float) -> Iterator[dict]:
    """Each prompt's pair, labeled `LABELS` times; a share `majority` prefers the same reply."""
    num_agreeing = round(majority * LABELS)
    for prompt, preferred, other in two_replies():
        for number in range(LABELS):
            if number < num_agreeing:
                yield {"prompt": prompt, "chosen": preferred, "rejected": other}
            else:
                yield {"prompt": prompt, "chosen": other, "rejected": preferred}


def write_data(args: argparse.Namespace) -> None:
    """Write the data folders that the arms need, each with a train.jsonl."""
    # Generators: only what an arm needs is read and made.
    records = {"one_reply": one_reply(args), "greeting": greeting(args)}
    for of_class in CLASSES:
        for percent in DROPPED:
            records[f"{of_class}_{percent}_dropped"] = dropped(args, of_class, percent)
    for majority in MAJORITIES:
        records[f"majority_{majority}"] = contradictory(majority)
    if "rates" in args.experiment:
        pairs = read_records(args.data, "train")
        records["rates"] = pairs[:-NUM_RATE_PROMPTS]
        write_lines(args.out / "data" / "rates" / "test.jsonl", pairs[-NUM_RATE_PROMPTS:])
    for name in {arm.data for arm in arms(args)} - {""}:
        write_lines(args.out / "data" / name / "train.jsonl", records[name])


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON Lines, and the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    judge.write(path, "".join(json.dumps(record) + "\n" for record in records))


# -------------------------------------------------------------------------------------- running it


def record_of(stage: Stage, out: Path) -> Path:
    """The file with a stage's command, seconds and exit status."""
    return out / "stages" / f"{stage.name}.json"


def has_succeeded(stage: Stage, out: Path) -> bool:
    """Whether this same command has succeeded before."""
    try:
        record = json.loads(record_of(stage, out).read_text())
    except (OSError, ValueError):
        return False
    return record.get("command") == shlex.join(stage.words) and record.get("status") == 0


def is_done(stage: Stage, out: Path) -> bool:
    """Whether this same command has succeeded before, and its output is still there."""
    return has_succeeded(stage, out) and stage.output.exists()


def find_done(stages: Sequence[Stage], out: Path) -> set[str]:
    """The names of the stages that need not run again.

    A stage is outdated if the command of a stage that it needs has changed since then: for example
    if a model is trained for more steps. Outdated replies and verdicts are removed.
    """
    by_name = {stage.name: stage for stage in stages}

    def is_outdated(stage: Stage) -> bool:
        for need in stage.needs:
            if not has_succeeded(by_name[need], out) or is_outdated(by_name[need]):
                return True
        return False

    done = set()
    for stage in stages:
        if not is_done(stage, out):
            continue
        if not is_outdated(stage):
            done.add(stage.name)
            continue
        # It must not count as done after the stages that it needs, if this is interrupted.
        record_of(stage, out).unlink()
        if stage.output.suffix == ".jsonl":
            tqdm.write(f"{stage.output}: outdated, is made anew", file=sys.stderr)
            stage.output.unlink()
    return done


def last_line(log: Path) -> str:
    """The line of a failed stage's output that says why: its error line, or the last line.

    torchrun's own output may follow the error line.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    last = "(it printed nothing)"
    last_error = None
    for line in re.split(r"[\r\n]+", text):
        line = line.strip()
        if line:
            last = line
        if line.startswith(("error:", "interrupted:")):
            last_error = line
    return last if last_error is None else last_error


def start(stage: Stage, out: Path) -> subprocess.Popen:
    """Start a stage's command, on one thread unless OMP_NUM_THREADS says otherwise."""
    program, *arguments = stage.words
    command = [sys.executable]
    if program == "torchrun":
        command += ["-m", "torch.distributed.run"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    if os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    with record_of(stage, out).with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


@dataclasses.dataclass
class Job:
    """A stage that is running."""

    stage: Stage
    process: subprocess.Popen
    start_time: float


def execute(stages: Sequence[Stage], out: Path, jobs: int) -> dict[str, str]:
    """Run the stages that are not done yet, up to `jobs` at once.

    If a stage fails, the stages that need it are left out, and no others. If this is interrupted,
    the running stages are terminated, and save what they have.

    Returns:
        The stages that failed or were left out: name to reason.
    """
    (out / "stages").mkdir(parents=True, exist_ok=True)
    done = find_done(stages, out)
    waiting = [stage for stage in stages if stage.name not in done]
    failed = {}
    running = []
    bar = tqdm(total=len(stages), initial=len(done), desc="stages")
    try:
        while waiting or running:
            for stage in list(waiting):
                failed_needs = [need for need in stage.needs if need in failed]
                if failed_needs:
                    failed[stage.name] = f"left out, since it needs {failed_needs[0]}"
                    waiting.remove(stage)
                elif done.issuperset(stage.needs) and len(running) < jobs:
                    waiting.remove(stage)
                    running.append(Job(stage, start(stage, out), time.time()))
            bar.set_postfix_str(", ".join(job.stage.name for job in running))
            time.sleep(0.05)
            for job in list(running):
                if job.process.poll() is None:
                    continue
                running.remove(job)
                bar.update()
                name = job.stage.name
                reason = finish(job, out)
                if reason is None:
                    done.add(name)
                else:
                    failed[name] = reason
                    tqdm.write(f"{name}: {reason}", file=sys.stderr)
    finally:
        bar.close()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    return failed


def finish(job: Job, out: Path) -> str | None:
    """Write the record of a job that has ended. Returns None, or the reason of its failure."""
    status = job.process.returncode
    record_path = record_of(job.stage, out)
    record = {
        "name": job.stage.name,
        "command": shlex.join(job.stage.words),
        "seconds": round(time.time() - job.start_time, 1),
        "status": status,
    }
    judge.write(record_path, json.dumps(record, indent=2) + "\n")
    if status == 0:
        return None
    return f"status {status}, {last_line(record_path.with_suffix('.log'))}"


def collect(args: argparse.Namespace, stages: Sequence[Stage], failed: dict[str, str]) -> None:
    """Write numbers, figures and report of the stages that are done."""
    folders = {}  # model to arm to seed to folder
    for model, arm, seed in cells(args):
        last_stage = stages_of(args, model, arm, seed)[-1]
        if last_stage.name not in failed:
            arms_of_model = folders.setdefault(label(model), {})
            arms_of_model.setdefault(arm.name, {})[seed] = folder(args, model, arm, seed)

    methods = ()
    if "methods" in args.experiment:
        methods = ("base", *METHODS)
    ablations = {}  # title to value to arm
    chosen = {}
    if "ablations" in args.experiment:
        chosen = ABLATIONS
    if "rates" in args.experiment:
        chosen = RATE_ARMS
    for title, arms_of_ablation in chosen.items():
        ablations[title] = {value: arm.name for value, arm in arms_of_ablation.items()}
    numbers = results.gather(
        args.data,
        folders,
        models={label(model): find_model(model) for model in args.models},
        methods=methods,
        ablations=ablations,
        contradictory={arm.name: majority_loss for majority_loss, arm in CONTRADICTORY.items()},
        replies=two_replies(),
    )

    seconds = 0.0
    commands = []
    for stage in stages:
        record_path = record_of(stage, args.out)
        if record_path.exists():
            seconds += json.loads(record_path.read_text())["seconds"]
        if stage.name.endswith(".train"):
            commands.append(shlex.join(stage.words))
    about = {
        "judge": args.judge_model if args.judge == "server" else args.judge,
        "seeds": args.seeds,
        "prompts": args.n,
        "commands": commands,
        "seconds": seconds,
        "failed": failed,
    }
    results.write(args.out, numbers, about)


# ------------------------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. The defaults of some settings depend on the models."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.suite",
        description="The report's experiment: train, sample, judge, figures, claims, report.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--experiment",
        nargs="+",
        default=["methods"],
        choices=(*EXPERIMENTS, "all", "rates"),
        help="experiments to run (default: methods); rates: learning rates of some ablations, on "
        "held-out training records",
    )
    add(
        "--models",
        nargs="+",
        default=["toy"],
        help="toy (the default), folders, hub ids; report: its seven models",
    )
    add("--data", help="as the trainers take it (default: toy; archangel for the report's models)")
    add(
        "--out",
        type=Path,
        default=Path("runs/suite"),
        help="folder for everything (default: %(default)s)",
    )
    add("--seeds", type=int, default=1, help="number of training seeds: 1, 2, ... (default: 1)")
    add("--n", type=int, help="prompts to judge (default: 500; 512 for the report's models)")
    add(
        "--max_steps",
        type=int,
        default=0,
        help="optimizer steps of every run; 0: as many as the epochs of its arm (default: 0)",
    )
    add("--max_new_tokens", type=int, help="most tokens of a reply (default: 64; report's: 512)")
    add(
        "--lr",
        nargs="*",
        default=[],
        metavar="METHOD=RATE",
        help="learning rates of methods, in place of the defaults; also for all arms of a method",
    )
    add("--jobs", type=int, help="stages at once (default: as many as cores; 1 with --processes)")
    add(
        "--processes",
        type=int,
        help="processes of a training run, started by torchrun (default: 1; report's models: 8)",
    )
    add(
        "--judge",
        choices=("toy", "shorter", "server"),
        help="the toy's own rules, the shorter reply, or a language model on a server (default: "
        "toy; server for the report's models)",
    )
    add("--base_url", default="https://api.openai.com/v1", help="of the server (%(default)s)")
    add("--judge_model", default="gpt-4-0613", help="model on the server (%(default)s)")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(arguments)
    if args.models == ["report"]:
        args.models = list(MODELS)
    is_of_report = [model in MODELS for model in args.models]
    if any(is_of_report) and not all(is_of_report) and args.data is None:
        parser.error("--models: some are the report's and some are not; say which --data is meant")
    defaults = REPORT_DEFAULTS if all(is_of_report) else TOY_DEFAULTS
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.jobs is None:
        args.jobs = len(os.sched_getaffinity(0)) if args.processes == 1 else 1
    if "rates" in args.experiment and len(args.experiment) > 1:
        raise UserError("--experiment rates: judges other prompts, so it must be the only one")
    if "all" in args.experiment:
        args.experiment = list(EXPERIMENTS)
    return args


def check(args: argparse.Namespace) -> None:
    """Check the settings, and set `args.rates`, the learning rates by method. Raises UserError."""
    for name, least in {"seeds": 1, "n": 2, "max_steps": 0, "jobs": 1, "processes": 1}.items():
        value = getattr(args, name)
        if value < least:
            raise UserError(f"--{name} {value}: at least {least}")
    names = [label(model) for model in args.models]
    reserved = {"data", "stages", ""}
    if len(set(names)) < len(names) or reserved & set(names):
        raise UserError(f"--models: called {', '.join(names)}; each needs a name of its own")
    for name in ("contradictory", "rates"):
        if name in args.experiment and args.data != "toy":
            raise UserError(f"--experiment {name}: is about the toy; leave out --data")
    args.rates = dict(TOY_RATES) if args.data == "toy" else {}
    for word in args.lr:
        method, _, text = word.partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if method not in METHODS or not 0 < rate < math.inf:
            raise UserError(f"--lr {word}: must be METHOD=RATE, of {', '.join(METHODS)}")
        args.rates[method] = rate
        for arm in arms(args):  # also of its arms that have a rate of their own
            if arm.method == method and arm.variant:
                args.rates.pop(arm.name, None)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder and lock it; SIGTERM and Ctrl-C end with advice. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "stages.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out {out}: another process runs stages there") from None
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        lock.release()


def interrupt(signal_number, frame) -> None:
    """End after SIGTERM or Ctrl-C."""
    raise Interrupted("run the same command again to resume")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the suite from the command line."""
    args = parse(arguments)
    check(args)
    stages = plan(args)
    if args.dry_run:
        for stage in stages:
            print(shlex.join(stage.words))
        return
    with claimed(args.out):
        if args.processes > 1 and "ablations" in args.experiment:
            print("left out, since kto_variants.py trains in one process: the arms that need it")
        write_data(args)
        failed = execute(stages, args.out, args.jobs)
        collect(args, stages, failed)
        print(f"the report is {args.out / 'report.md'}")
        if failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise UserError(f"{len(failed)} of {len(stages)} stages failed. {reasons}")


if __name__ == "__main__":
    with exit_status():
        main()
