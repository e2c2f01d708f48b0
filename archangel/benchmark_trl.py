"""TRL's trainers as contenders of the benchmark: their own training loop, a step per turn.

Written for TRL 1.16. It is needed for --peer trl and --peer compact only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from archangel.benchmark_turns import WARMUP_STEPS, Turns, fingerprint


@dataclass(frozen=True)
class Options:
    """How TRL is set."""

    best: bool = False  # precomputed reference, no gradient checkpointing
    compact: bool = False  # the output head on completion tokens only, although without Triton


VARIANTS = {
    "trl, as it comes": Options(),
    "trl, best": Options(best=True),
    "trl, compact": Options(best=True, compact=True),
}


class StepTurns(TrainerCallback):
    """Lets TRL's loop take one optimizer step per turn, data loading included.

    combine: makes the loss of a batch from the losses of its micro-batches.
    """

    def __init__(self, turns: Turns, combine: Callable):
        self.turns = turns
        self.combine = combine
        self.micro_batch_losses = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Wait for the turn of the first step."""
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """End the turn. After the warm-up, begin a new epoch, over all of the data."""
        self.turns.stop()
        loss = self.combine(torch.stack(self.micro_batch_losses))
        self.turns.tell(loss=loss.item())
        self.micro_batch_losses.clear()
        control.should_epoch_stop = state.global_step == WARMUP_STEPS
        self.turns.wait()


def make_settings(config, options: Options, folder: Path) -> dict:
    """The settings that TRL's three trainers have in common."""
    rows_at_once = config.peer_rows_at_once or config.batch_size
    bfloat16 = config.dtype == "bfloat16"
    if config.dtype == "auto":
        bfloat16 = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows_at_once,
        "gradient_accumulation_steps": config.batch_size // rows_at_once,
        "num_train_epochs": 2,
        "optim": "rmsprop",
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 10.0,
        "max_length": config.max_length,
        "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": not options.best,
        "train_sampling_strategy": "sequential",  # in the order of our batches
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def find_trainer(method: str) -> tuple[type, type, dict]:
    """TRL's trainer for a method, the class of its settings, and the method's own settings."""
    import trl

    if method == "sft":
        return trl.SFTTrainer, trl.SFTConfig, {}
    if method == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": 0.1}
    # SLiC's hinge without a reference is only in TRL's experimental CPOTrainer. The one of the
    # DPOTrainer is on log-ratios, and has a reference.
    loss_type = "sigmoid" if method == "dpo" else "hinge"
    return trl.DPOTrainer, trl.DPOConfig, {"beta": 0.1, "loss_type": [loss_type]}


def find_logps(dataset) -> dict[str, float]:
    """The log pi_ref of each completion of a data set that TRL prepared, by its fingerprint.

    In nats; nan if TRL has not computed it.
    """
    logps = {}
    for row in dataset:
        if "labels" in row:  # SFT: one sequence, with labels of -100 before the completion
            prompt_length = 0
            while row["labels"][prompt_length] == -100:
                prompt_length += 1
            prompt_ids = row["input_ids"][:prompt_length]
            completion_ids = row["input_ids"][prompt_length:]
            logps[fingerprint(prompt_ids, completion_ids)] = math.nan
        if "chosen_ids" in row:  # DPO
            for name in ("chosen", "rejected"):
                key = fingerprint(row["prompt_ids"], row[f"{name}_ids"])
                logps[key] = row.get(f"ref_{name}_logps", math.nan)
        if "completion_ids" in row:  # KTO
            key = fingerprint(row["prompt_ids"], row["completion_ids"])
            logps[key] = row.get("ref_logps", math.nan)
    return logps


def trl_trainer(
    connection, config, folder: Path, records_path: Path, name: str, options: Options
) -> None:
    """TRL's trainer: its reference pass, if that comes before training, then its `train`, in turns.

    See Contender for the arguments.
    """
    import trl.trainer.utils
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.compact:
        # TRL's output head on completion tokens asks for Triton, but computes with torch.
        trl.trainer.utils._use_triton = lambda device: True
    turns = Turns(connection)
    trainer_class, config_class, own_settings = find_trainer(config.method)
    precompute_reference = options.best and config.method != "sft"
    if precompute_reference:
        own_settings["precompute_ref_log_probs"] = True
    # SFT divides the loss of a micro-batch by the tokens of the whole batch, the others by its own
    # number of rows.
    callback = StepTurns(turns, torch.sum if config.method == "sft" else torch.mean)

    class MeasuredTrainer(trainer_class):
        """The trainer with turns and with the losses of its micro-batches."""

        def _precompute_ref_logps(self, *args, **kwargs):
            turns.count_tokens(self.model)
            turns.count_tokens(self.ref_model)
            turns.wait()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            turns.stop()
            turns.tell(texts=find_logps(dataset))
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            callback.micro_batch_losses.append(loss.detach())
            return loss

    dataset = load_dataset(
        "json", data_files=str(records_path), cache_dir=str(folder / name), split="train"
    )
    model_path = folder / "model"
    models = {"model": str(model_path)}
    if precompute_reference:
        # A separate model for the reference. With the policy for both, TRL would also compute
        # metrics in the reference pass, and throw them away.
        models["ref_model"] = AutoModelForCausalLM.from_pretrained(model_path, use_safetensors=True)
    settings = make_settings(config, options, folder) | own_settings
    trainer = MeasuredTrainer(
        **models,
        args=config_class(**settings),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        callbacks=[callback],
    )
    if not precompute_reference:  # the turn of the reference pass, with nothing to compute
        turns.count_tokens(trainer.model)
        if getattr(trainer, "ref_model", None) is not None:
            turns.count_tokens(trainer.ref_model)
        turns.wait()
        turns.stop()
        turns.tell(texts=find_logps(trainer.train_dataset))
    trainer.train()
