"""Our trainers beside TRL's, step by step, on the same token ids: DPO, KTO or SFT.

    python -m archangel.parity --method dpo --model runs/real_model/model \\
        --data runs/real_model/data/pairs_subset/train.jsonl

Both start from the same model, see the same batches, and update all weights by AdamW in float32, on
the CPU. Printed, and written to OUT/parity_METHOD.json: of each step the losses and the gradient
norms of both, and how much their weights differ after the last one. The token ids are ours; TRL is
given them as they are. For KTO, ours has --kl mismatched, and each prompt is paired with the
previous completion of its batch, as TRL does it. The data must be unpaired records.

Written for TRL 1.16 (pip install trl). Each of the two runs in a process of its own.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.torch import load_file

import common
from archangel.benchmark_trl import find_trainer
from archangel.benchmark_turns import run_alone
from archangel.errors import UserError, exit_status
from archangel.judge import write

LR = 1e-6
MAX_GRAD_NORM = 10.0


# ------------------------------------------------------------------------------------------- ours


def consecutive_batches(args: argparse.Namespace, examples: common.Examples) -> list[list[int]]:
    """The batches of all steps: the first examples that are short enough, in their order."""
    short = [i for i in range(len(examples)) if examples.length[i] <= args.max_length]
    num_needed = args.steps * args.batch_size
    if len(short) < num_needed:
        raise UserError(
            f"--data: {len(short)} examples of at most {args.max_length} tokens, "
            f"{num_needed} are needed"
        )
    return [
        short[start : start + args.batch_size] for start in range(0, num_needed, args.batch_size)
    ]


def rotate_within_batches(args: argparse.Namespace, examples: common.Examples) -> common.Examples:
    """TRL's mismatched examples: each prompt with the completion before it in its batch."""
    if len(examples) == 0:  # there are no held-out examples
        return common.Examples()
    if len(set(examples.record_number)) < len(examples):
        raise UserError("--data: has pairs; KTO needs unpaired records here")
    other_of = {}
    for batch in consecutive_batches(args, examples):
        for place, index in enumerate(batch):
            other_of[index] = batch[place - 1]
    mismatched = common.Examples()
    for index in range(len(examples)):
        other = other_of.get(index, index)
        mismatched.append(
            examples.with_completions_of(index, other),
            record_number=examples.record_number[index],
        )
    return mismatched


def as_row(examples: common.Examples, index: int) -> dict:
    """An example as JSON holds it."""
    example = examples[index]
    return {
        "prompt_ids": np.asarray(example.prompt_ids).tolist(),
        "completions_ids": [np.asarray(ids).tolist() for ids in example.completions_ids],
        "label": examples.desirable[index],
    }


def train_ours(args: argparse.Namespace) -> None:
    """Our script. The token ids of its batches go to OUT/METHOD/rows.json."""
    script = importlib.import_module(args.method)

    def make_schedule(examples: common.Examples, config) -> list[list[int]]:
        schedule = consecutive_batches(args, examples)
        indices = itertools.chain.from_iterable(schedule)
        rows = [as_row(examples, index) for index in indices]
        (args.out / args.method / "rows.json").write_text(json.dumps(rows))
        return schedule

    settings = {"kl": "mismatched"} if args.method == "kto" else {}
    config = script.Config(
        model=str(args.model),
        data=str(args.data),
        out=str(args.out / args.method / "ours"),
        batch_size=args.batch_size,
        micro_batch_tokens=args.micro_batch_tokens,
        lr=LR,
        optimizer="adamw",
        warmup_steps=0,
        max_grad_norm=MAX_GRAD_NORM,
        save_every=0,
        dtype="float32",
        **settings,
    )
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(script, "make_schedule", make_schedule))
        if args.method == "kto":

            def draw_mismatched(examples: common.Examples, config) -> common.Examples:
                return rotate_within_batches(args, examples)

            patches.enter_context(mock.patch.object(script, "draw_mismatched", draw_mismatched))
        script.train(config)


# -------------------------------------------------------------------------------------------- TRL


def rows_for_trl(args: argparse.Namespace) -> list[dict]:
    """The rows of OUT/METHOD/rows.json as TRL's trainers have them after their preparation."""
    rows = json.loads((args.out / args.method / "rows.json").read_text())
    prepared = []
    for number, row in enumerate(rows):
        prompt_ids = row["prompt_ids"]
        completions_ids = row["completions_ids"]
        if args.method == "dpo":
            chosen_ids, rejected_ids = completions_ids
            prepared.append(
                {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            )
        elif args.method == "kto":
            start = number // args.batch_size * args.batch_size
            before = number - 1 if number > start else start + args.batch_size - 1
            prepared.append(
                {
                    "prompt_ids": prompt_ids,
                    "completion_ids": completions_ids[0],
                    "KL_completion_ids": rows[before]["completions_ids"][0],
                    "label": row["label"],
                }
            )
        else:
            (completion_ids,) = completions_ids
            prepared.append(
                {
                    "input_ids": prompt_ids + completion_ids,
                    "labels": [-100] * len(prompt_ids) + completion_ids,
                }
            )
    return prepared


def train_trl(args: argparse.Namespace) -> None:
    """TRL's trainer. Its metrics go to OUT/METHOD/trl.json, its weights to OUT/METHOD/trl/."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    trainer_class, config_class, own_settings = find_trainer(args.method)
    losses = []

    class RecordingTrainer(trainer_class):
        """The trainer, given token ids, with the exact losses."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    settings = {
        "output_dir": str(args.out / args.method / "trl"),
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": 1,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": True,  # TRL's default: the same numbers, in less memory
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = RecordingTrainer(
        model=str(args.model),
        args=config_class(**settings, **own_settings),
        train_dataset=Dataset.from_list(rows_for_trl(args)),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    trainer.save_model(str(args.out / args.method / "trl"))
    grad_norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    steps = [
        {"loss": loss, "grad_norm": norm} for loss, norm in zip(losses, grad_norms, strict=True)
    ]
    (args.out / args.method / "trl.json").write_text(json.dumps(steps))


# ------------------------------------------------------------------------------------- comparison


def weight_differences(args: argparse.Namespace) -> dict[str, float]:
    """How much our weights differ from TRL's, beside how much training has changed them."""
    ours = load_file(args.out / args.method / "ours" / "model.safetensors")
    theirs = load_file(args.out / args.method / "trl" / "model.safetensors")
    before = load_file(args.model / "model.safetensors")
    largest_difference = 0.0
    largest_change = 0.0
    squared_difference = 0.0
    squared_change = 0.0
    for name, weight in ours.items():
        difference = (weight - theirs[name]).double()
        change = (weight - before[name]).double()
        largest_difference = max(largest_difference, difference.abs().max().item())
        largest_change = max(largest_change, change.abs().max().item())
        squared_difference += difference.square().sum().item()
        squared_change += change.square().sum().item()
    return {
        "largest_weight_difference": largest_difference,
        "largest_weight_change": largest_change,
        # of all weights: norm(ours - TRL's) / norm(ours - before training)
        "relative_weight_difference": (squared_difference / squared_change) ** 0.5,
    }


def compare(args: argparse.Namespace) -> dict:
    """The report: all steps, and the largest differences."""
    folder = args.out / args.method
    lines = (folder / "ours" / "metrics.jsonl").read_text().splitlines()
    ours = [record for record in map(json.loads, lines) if record["step"] > 0]
    theirs = json.loads((folder / "trl.json").read_text())
    steps = []
    for our_step, their_step in zip(ours, theirs, strict=True):
        steps.append(
            {
                "step": our_step["step"],
                "loss": our_step["loss"],
                "trl_loss": their_step["loss"],
                "grad_norm": our_step["grad_norm"],
                "trl_grad_norm": their_step["grad_norm"],
            }
        )
    loss_differences = [abs(step["loss"] - step["trl_loss"]) for step in steps]
    norm_differences = [abs(step["grad_norm"] / step["trl_grad_norm"] - 1) for step in steps]
    return {
        "method": args.method,
        "model": str(args.model),
        "steps": steps,
        "largest_loss_difference": max(loss_differences),
        "largest_relative_grad_norm_difference": max(norm_differences),
        **weight_differences(args),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--method", choices=("dpo", "kto", "sft"), required=True)
    add("--model", type=Path, required=True, help="a folder with model.safetensors")
    add("--data", type=Path, required=True, help="records of at least steps x batch_size examples")
    add("--out", type=Path, default=Path("runs/parity"), help="(default: runs/parity)")
    add("--steps", type=int, default=8, help="(default: 8)")
    add("--batch_size", type=int, default=8, help="(default: 8)")
    add("--max_length", type=int, default=256, help="tokens; longer ones are not used (256)")
    add("--micro_batch_tokens", type=int, default=2048, help="ours (default: 2048)")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("trl") is None:
        raise UserError("needs TRL: pip install trl")
    folder = args.out / args.method
    if folder.exists():
        raise UserError(f"--out {folder}: is there already; remove it or name another folder")
    folder.mkdir(parents=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of both processes
    for train in (train_ours, train_trl):
        if not run_alone(train, args):
            raise UserError(f"{train.__name__} failed; its error stands above")
    report = compare(args)
    write(args.out / f"parity_{args.method}.json", json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    with exit_status():
        main()
