"""TRL's own trainers as contenders of the benchmark: their real loop, a step a turn.

Read for TRL 1.16. Imported only where TRL is installed; nothing else of the project needs it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from archangel.benchmark import WARMUP, Config, Turns, fingerprint


@dataclass(frozen=True)
class Options:
    """How TRL is set."""

    best: bool = False  # precomputed reference, no gradient checkpointing
    compact: bool = False  # the output head on completion tokens, though there is no Triton


ROWS = {
    "trl, as it comes": Options(),
    "trl, best": Options(best=True),
    "trl, compact": Options(best=True, compact=True),
}


class TakeTurns(TrainerCallback):
    """Lets TRL's loop do one optimizer step a turn, data loading included.

    whole: makes a batch's loss of its parts'.
    """

    def __init__(self, turns: Turns, whole: Callable):
        self.turns, self.losses, self.whole = turns, [], whole

    def on_train_begin(self, args, state, control, **_) -> None:
        """The first step's turn."""
        self.turns.wait()

    def on_step_end(self, args, state, control, **_) -> None:
        """The end of a turn. After the warm-up the epoch starts again, over all rows."""
        self.turns.stop()
        self.turns.tell(loss=self.whole(torch.stack(self.losses)).item())
        self.losses.clear()
        control.should_epoch_stop = state.global_step == WARMUP
        self.turns.wait()


def settings(config: Config, options: Options, folder: Path) -> dict:
    """What TRL's three trainers are told alike."""
    at_once = config.peer_rows_at_once or config.batch_size
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.batch_size // at_once,
        "num_train_epochs": 2,
        "optim": "rmsprop",
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 10.0,
        "max_length": config.max_length,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": not options.best,
        "train_sampling_strategy": "sequential",  # in the order of our batches
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def trainer_class(method: str) -> tuple[type, type, dict]:
    """TRL's trainer, its settings' class, and what this loss needs of them."""
    import trl

    if method == "sft":
        return trl.SFTTrainer, trl.SFTConfig, {}
    if method == "kto":
        return trl.KTOTrainer, trl.KTOConfig, {"beta": 0.1}
    # SLiC's hinge without a reference is in TRL's experimental CPOTrainer alone; this one, on log-
    # ratios, has a reference.
    loss = "sigmoid" if method == "dpo" else "hinge"
    return trl.DPOTrainer, trl.DPOConfig, {"beta": 0.1, "loss_type": [loss]}


def completions(dataset) -> dict[str, float]:
    """The log-probability of each completion of a prepared data set; nan where it has none."""
    found = {}
    for row in dataset:
        if "labels" in row:  # SFT: one sequence, -100 where there is no completion
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            found[fingerprint(row["input_ids"][:start], row["input_ids"][start:])] = math.nan
        for name in ("chosen", "rejected", "completion"):
            if f"{name}_ids" in row:
                column = "ref_logps" if name == "completion" else f"ref_{name}_logps"
                key = fingerprint(row["prompt_ids"], row[f"{name}_ids"])
                found[key] = row.get(column, math.nan)
    return found


def peer(connection, config: Config, folder: Path, rows: Path, name: str, options: Options) -> None:
    """TRL's trainer in turns: the reference pass, where it is done apart, then its `train`."""
    import trl.trainer.utils
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.compact:  # where add_fused_lm_head asks; the kernels themselves stay torch's
        trl.trainer.utils._use_triton = lambda device: True
    turns = Turns(connection)
    # SFT's parts are divided by the tokens of the whole batch already.
    callback = TakeTurns(turns, torch.sum if config.method == "sft" else torch.mean)
    base, config_class, own = trainer_class(config.method)
    if config.method != "sft":
        own = own | {"precompute_ref_log_probs": options.best}

    class Measured(base):
        def _precompute_ref_logps(self, *args, **kwargs):
            turns.count_tokens(self.model)
            turns.count_tokens(self.ref_model)
            turns.wait()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            turns.stop()
            turns.tell(texts=completions(dataset))
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            callback.losses.append(loss.detach())
            return loss

    dataset = load_dataset(
        "json", data_files=str(rows), cache_dir=str(folder / name), split="train"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    models = {"model": str(folder / "model")}
    if own.get("precompute_ref_log_probs"):
        # A model of its own for the reference: from the policy TRL would take more than log-
        # probabilities, its metrics, and throw them away.
        models["ref_model"] = AutoModelForCausalLM.from_pretrained(
            folder / "model", use_safetensors=True
        )
    trainer = Measured(
        **models,
        args=config_class(**settings(config, options, folder), **own),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    if not own.get("precompute_ref_log_probs"):
        turns.count_tokens(trainer.model)
        if getattr(trainer, "ref_model", None) is not None:
            turns.count_tokens(trainer.ref_model)
        turns.wait()
        turns.stop()
        turns.tell(texts=completions(trainer.train_dataset))
    trainer.train()
