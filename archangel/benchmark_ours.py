"""This project's trainers as contenders of the benchmark: the `train` of a script, in turns."""

import dataclasses
import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GPTNeoXForCausalLM

import common
from archangel.benchmark_turns import WARMUP_STEPS, Turns, fingerprint
from archangel.workload import METHODS_WITH_REFERENCE


@dataclass(frozen=True)
class Stage:
    """The trainer with all of its ideas or, on a lower rung of the ladder, without some."""

    packed: bool = True  # the packed layout: each prompt once, no padding
    micro_batch_tokens: int | None = None  # None: the benchmark's setting
    plain_head: bool = False  # torch's cross-entropy, of all completion tokens at once
    all_logits: bool = False  # logits of all tokens, by the model's own forward pass


class PlainHead:
    """Takes the place of `common.TokenLogps`."""

    @staticmethod
    def apply(logits: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        """Log-probabilities (n,) of targets (n,), from logits (n, V)."""
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none"), None


def logps_from_all_logits(policy: common.Policy, micro_batch: common.MicroBatch) -> Tensor:
    """Takes the place of a policy's forward pass: (N,) from the logits of every position."""
    device_type = micro_batch.targets.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=policy.bfloat16):
        logits = policy.lm(**micro_batch.inputs).logits  # (R, T, V)
    logps = logits.float().log_softmax(-1)  # (R, T, V)
    return logps.flatten(0, 1)[micro_batch.predictors, micro_batch.targets]


def make_script_config(
    script, config, folder: Path, records_path: Path, name: str, stage: Stage
) -> object:
    """The script's settings, from those of the benchmark."""
    settings = {
        "model": str(folder / "model"),
        "data": str(records_path),
        "out": str(folder / name / "run"),
        "batch_size": config.batch_size,
        "micro_batch_tokens": stage.micro_batch_tokens or config.micro_batch_tokens,
        "lr": config.lr,
        "warmup_steps": 0,
        "save_every": 0,
        "max_length": config.max_length,
        "max_prompt_length": config.max_length * 3 // 4,
        "dtype": config.dtype,
    }
    if config.method == "kto":
        settings["kl"] = config.kl
    return script.Config(**settings)


def ours(connection, config, folder: Path, records_path: Path, name: str, stage: Stage) -> None:
    """The `train` of our script, which waits for its turn before the reference pass and each step.

    Four functions that it calls are replaced by those below. See Contender for the arguments.
    """
    turns = Turns(connection)
    script = importlib.import_module(config.method)
    original_check = common.check_model_and_choose_layout
    original_add_reference_logps = common.add_reference_logps

    def make_schedule(examples: common.Examples, script_config) -> list[list[int]]:
        """The batches in the order of the data, after the first ones as warm-up."""
        batches = []
        for start in range(0, len(examples), config.batch_size):
            stop = min(start + config.batch_size, len(examples))
            batches.append(list(range(start, stop)))
        return batches[:WARMUP_STEPS] + batches

    def check_model_and_choose_layout(
        policy: common.Policy, example_sets: list[common.Examples], run: common.Run
    ) -> None:
        original_check(policy, example_sets, run)
        leave_out_ideas(policy, run, stage)
        train_set = example_sets[0]
        if run.device.type == "cuda":
            compile_attention(policy, train_set, run)
        turns.count_tokens(policy.lm)
        if config.method not in METHODS_WITH_REFERENCE:
            turns.wait()  # the turn of the reference pass, with nothing to compute
            turns.stop()
            turns.tell(**check_logps(policy, train_set, config.batch_size, run))
            turns.wait()  # for the first step

    def add_reference_logps(
        policy: common.Policy, examples: common.Examples, indices, split: str, run: common.Run
    ) -> None:
        if split != "train":  # there are no held-out examples
            return
        turns.wait()
        original_add_reference_logps(policy, examples, indices, split, run)
        turns.stop()
        turns.tell(**check_logps(policy, examples, config.batch_size, run))
        turns.wait()  # for the first step

    def log(run: common.Run, step: int, step_metrics: dict[str, float]) -> None:
        """Ends the turn of a step."""
        if step == 0:  # metrics before training
            return
        turns.stop()
        turns.tell(loss=step_metrics["loss"])
        turns.wait()  # for the next step

    script.make_schedule = make_schedule
    common.check_model_and_choose_layout = check_model_and_choose_layout
    common.add_reference_logps = add_reference_logps
    common.Run.log = log
    try:
        script.train(make_script_config(script, config, folder, records_path, name, stage))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_out_ideas(policy: common.Policy, run: common.Run, stage: Stage) -> None:
    """Make the trainer what it is at this stage."""
    if not stage.packed:
        run.layout = common.PaddedLayout()
    if stage.plain_head:
        common.MAX_LOGITS = sys.maxsize
        common.TokenLogps = PlainHead
    if stage.all_logits:
        policy.forward = functools.partial(logps_from_all_logits, policy)


@torch.no_grad()
def compile_attention(policy: common.Policy, examples: common.Examples, run: common.Run) -> None:
    """Let torch compile flex attention before anything is measured.

    It is compiled for the first length that it sees; then, at another length, for all lengths.
    """
    for num_examples in (1, 2, 4):
        indices = range(min(num_examples, len(examples)))
        sample = [examples[index] for index in indices]
        policy(common.make_micro_batch(sample, indices, run.layout, run.device))


@torch.no_grad()
def check_logps(
    policy: common.Policy, examples: common.Examples, batch_size: int, run: common.Run
) -> dict:
    """What shows whether the log-probabilities are right.

    Returns:
        texts: the log pi_ref of each completion, in nats, by its fingerprint; nan without a
            reference.
        log_ratio_mean, log_ratio_max: absolute log-ratios per token in the first batch. Policy and
            reference are still the same, so they should be 0. Not without a reference.
        token_error_mean, token_error_max: on a GPU, the absolute differences from
            log-probabilities in float32 on the CPU, of at most four examples.
    """
    logps_of_completions = {}
    for index in range(len(examples)):
        example = examples[index]
        token_logps = np.full(examples.num_completion_tokens([index]), np.nan)
        if examples.reference_logps is not None:
            token_logps = examples.get_reference_logps(index)
        start = 0
        for completion_ids in example.completions_ids:
            stop = start + len(completion_ids)
            key = fingerprint(example.prompt_ids, completion_ids)
            logps_of_completions[key] = float(token_logps[start:stop].sum())
            start = stop
    metrics = {"texts": logps_of_completions}

    first_batch = range(min(batch_size, len(examples)))
    if examples.reference_logps is not None:
        log_ratios = []
        for micro_batch in common.make_micro_batches(examples, first_batch, run):
            log_ratios.append((policy(micro_batch) - micro_batch.reference_logps).abs())
        log_ratios = torch.cat(log_ratios)
        metrics["log_ratio_mean"] = log_ratios.mean().item()
        metrics["log_ratio_max"] = log_ratios.max().item()
    if run.device.type == "cuda":
        indices = first_batch[:4]
        sample = [examples[index] for index in indices]
        logps = policy(common.make_micro_batch(sample, indices, run.layout, run.device))
        exact_model = GPTNeoXForCausalLM.from_pretrained(run.model_path, dtype=torch.float32).eval()
        exact_logps = common.completion_logps(exact_model, common.make_batch(sample))
        errors = (logps.cpu() - exact_logps).abs()
        metrics["token_error_mean"] = errors.mean().item()
        metrics["token_error_max"] = errors.max().item()
    return metrics


def other_checkout(
    connection, config, folder: Path, records_path: Path, name: str, path: str
) -> None:
    """The trainer of another checkout of this project, by the benchmark of that checkout.

    path: its folder. Its Config may lack settings of ours, and its Stage may differ.
    """
    for module in list(sys.modules):
        if module.partition(".")[0] in ("archangel", "common"):
            del sys.modules[module]
    sys.path.insert(0, str(Path(path).resolve()))
    script = importlib.import_module(config.method)
    original_script_config = script.Config

    def make_script_config(**settings) -> object:
        """The script's settings. An older benchmark does not pass these two on."""
        settings["dtype"] = config.dtype
        if config.method == "kto":
            settings["kl"] = config.kl
        return original_script_config(**settings)

    script.Config = make_script_config
    benchmark = importlib.import_module("archangel.benchmark")
    settings = {}
    for field in dataclasses.fields(benchmark.Config):
        if hasattr(config, field.name):
            settings[field.name] = getattr(config, field.name)
    settings["peer"] = "none"
    its_config = benchmark.Config(**settings)
    its_trainer = benchmark.contenders(its_config)[0]
    its_trainer.run(connection, its_config, folder, records_path, name, its_trainer.options)
