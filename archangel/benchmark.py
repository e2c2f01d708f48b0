"""How fast a training step is, compared with TRL's on the same data.

    python -m archangel.benchmark --model small-50k --method dpo             # ours alone
    python -m archangel.benchmark --model small-50k --method dpo --peer trl  # if TRL is installed
    python -m archangel.benchmark --model small-50k --method dpo --ladder    # what each idea gains
    python -m archangel.benchmark --model small-50k --method dpo --peer DIR  # another checkout

Nothing is downloaded: the model is one of four shapes with random weights, the data are random
tokens with lognormal lengths (prompts of 160 tokens on average, completions of 64).

Each contender runs in its own process, so that its peak memory can be measured. They take turns, a
step each, so that whatever else the machine does slows all of them alike. On a GPU, whose memory is
too small for all, one runs after the other. After two steps to warm up, each makes one pass over
the same batches. A batch has sequences of similar length, which suits a trainer that pads. (The
batches of the ladder are random, like those of our trainers.)

TRL takes part in three variants, since its defaults save memory rather than time, and since without
Triton its output head computes every position, padding included:

    as it comes   its defaults, but with our optimizer, precision and batches
    best          reference precomputed by a separate model, no gradient checkpointing
    compact       best, with the output head on completion tokens only, as on a GPU

On a GPU, best is compact already, and the last variant is left out. The last one in the list is the
one that counts. TRL has no offline PPO. For SLiC the peer is DPO's hinge loss, which is on
log-ratios and needs a reference.

The peer can also be a folder with another checkout of this project, such as an earlier commit.

Weights are in float32. Matrix products are too on a CPU, and in bfloat16 on a GPU, unless --dtype
says otherwise. Freed memory stays with the process, for all contenders: it is faster.

Useful work is what no implementation can leave out: each prompt once, each completion once (one
that is mismatched for KTO is a completion), the output head on completion tokens, and attention to
the tokens that a token may attend to. A forward pass takes these floating-point operations, with L
layers, hidden size H, feed-forward size I and vocabulary size V:

    2 L (4 H^2 + 2 H I)   per token
    4 L H                 per pair of a token and one that it attends to
    2 H V                 per completion token, for the output head

A training step takes three times that (KTO's mismatched completions: once), the reference pass
once. MFU is useful work divided by time and by the rate of a large matrix product on this machine.
On a CPU it is by CPU time, like the metrics with "cpu" in their names (means over all steps, all
threads together): other processes may delay the wall clock, but not CPU time.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers

from archangel import benchmark_ours, benchmark_trl, workload
from archangel.benchmark_ours import Stage
from archangel.benchmark_turns import WARMUP_STEPS, Contender, run_alone, take_turns
from archangel.errors import UserError
from archangel.run import run_script
from archangel.workload import SHAPES, useful_work

# Freed memory stays with the process. This is faster, and the same for all contenders, as is what
# common.start_run sets on a GPU.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
UNLIMITED = 2**62  # tokens of a micro-batch: the whole batch is one


@dataclass
class Config:
    """All settings; the comments are what --help prints."""

    model: str  # a shape: pythia-1.4b, small-50k, small-4k, tiny
    method: Literal["sft", "dpo", "kto", "slic", "ppo_offline"] = "dpo"  # the loss
    kl: Literal["mismatched", "other_half", "zero"] = "mismatched"  # KTO's reference point
    peer: str = "none"  # beside ours: trl (three variants), compact (the last), or a checkout
    ladder: bool = False  # instead of a peer, our own step without its ideas, one by one (DPO)
    steps: int = 12  # measured steps: one pass over this number of batches
    other_steps: int = 3  # measured steps of the variants that do not count
    batch_size: int = 8  # pairs, or completions, per step
    micro_batch_tokens: int = 8192  # ours: tokens of the largest micro-batch
    peer_rows_at_once: int = 0  # TRL's micro-batch, in pairs or completions; 0: the whole batch
    max_length: int = 512  # tokens of a prompt and a completion together, at most
    lr: float = 1e-6  # learning rate
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs
    turn_seconds: int = 3600  # a contender whose reference pass or step takes longer is ended
    seed: int = 1  # of the data and the weights
    out: str = "runs/benchmark"  # folder for the report, as JSON

    def __post_init__(self):
        if self.model not in SHAPES:
            raise UserError(f"--model {self.model}: not one of {', '.join(SHAPES)}")
        if not self.lr > 0:
            raise UserError(f"--lr {self.lr}: must be above 0")
        if not self.out:
            raise UserError("--out: needs the name of a folder")
        minima = {
            "steps": WARMUP_STEPS,  # the warm-up uses the first batches
            "other_steps": 1,
            "turn_seconds": 1,
            "batch_size": 1,
            "max_length": 64,
            "seed": 0,
            "peer_rows_at_once": 0,
            "micro_batch_tokens": 2 * self.max_length,  # the largest pair is shorter
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value < minimum:
                raise UserError(f"--{name} {value}: must be at least {minimum}")
        if self.batch_size % 2 and self.method in workload.LABELED_METHODS:
            raise UserError(
                f"--batch_size {self.batch_size}: must be even, half of it for each class"
            )
        self._check_peer()

    def _check_peer(self) -> None:
        if self.ladder and self.method != "dpo":
            raise UserError("--ladder: is for --method dpo only")
        if self.ladder and self.peer != "none":
            raise UserError("--ladder: takes no --peer")
        rows_at_once = self.peer_rows_at_once
        if rows_at_once > 0 and self.batch_size % rows_at_once:
            raise UserError(f"--peer_rows_at_once {rows_at_once}: must divide --batch_size")
        if rows_at_once == 1 and self.method == "kto":
            raise UserError(
                "--peer_rows_at_once 1: TRL's KTO needs 2, to make mismatched pairs of them"
            )
        if self.peer in ("trl", "compact"):
            if self.method == "ppo_offline":
                raise UserError(f"--peer {self.peer}: TRL has no offline PPO; leave it out")
            if importlib.util.find_spec("trl") is None:
                raise UserError(
                    f"--peer {self.peer}: TRL is not installed; pip install trl, or leave it out"
                )
        elif self.peer != "none" and not (Path(self.peer) / "kto.py").exists():
            raise UserError(
                f"--peer {self.peer}: is not trl, compact or a checkout of this project"
            )


# -------------------------------------------------------------------------------- the contenders


def contenders(config: Config) -> list[Contender]:
    """Ours first, then the peers; or the stages of the ladder.

    The benchmark of another checkout calls this function, too, and runs the first contender.
    """
    if config.ladder:
        return ladder(config)
    found = [Contender("ours", benchmark_ours.ours, Stage(), config.steps)]
    if config.peer in ("trl", "compact"):
        found.extend(trl_variants(config))
    elif config.peer != "none":
        found.append(
            Contender("other checkout", benchmark_ours.other_checkout, config.peer, config.steps)
        )
    return found


def ladder(config: Config) -> list[Contender]:
    """Our own step without its ideas. Each stage adds one idea to the stage before it."""
    stages = {
        "padded, all logits": Stage(
            packed=False, micro_batch_tokens=UNLIMITED, plain_head=True, all_logits=True
        ),
        "completion tokens only": Stage(
            packed=False, micro_batch_tokens=UNLIMITED, plain_head=True
        ),
        # Micro-batches are made of examples sorted by length.
        "similar lengths together": Stage(
            packed=False, micro_batch_tokens=2 * config.max_length, plain_head=True
        ),
        "packed, each prompt once": Stage(plain_head=True),
        "head in place": Stage(),
    }
    found = []
    for name, stage in stages.items():
        found.append(Contender(name, benchmark_ours.ours, stage, config.steps))
    return found


def trl_variants(config: Config) -> list[Contender]:
    """TRL's variants. The last one makes as many steps as ours, the others a few."""
    names = list(benchmark_trl.VARIANTS)
    if torch.cuda.is_available():  # the best variant is compact already
        names.remove("trl, compact")
    last = names[-1]
    if config.peer == "compact":
        names = [last]
    found = []
    for name in names:
        num_steps = config.steps
        if name != last:
            num_steps = min(config.other_steps, config.steps)
        options = benchmark_trl.VARIANTS[name]
        found.append(Contender(name, benchmark_trl.trl_trainer, options, num_steps))
    return found


# ---------------------------------------------------------------------------------- the measures


def count_work(examples: Sequence[dict], config: Config) -> dict[str, float]:
    """Tokens, operations and bytes of an average step, before anything is measured."""
    shape = SHAPES[config.model]
    work = useful_work(examples, shape, config.method, config.kl)
    completion_tokens = work["completion_tokens"] / config.steps
    head_passes = 3  # a forward pass, and a backward pass of twice the operations
    if config.method == "kto" and config.kl == "mismatched":
        head_passes += 1  # the forward pass over mismatched completions
    head_flops = head_passes * 2 * shape.width * shape.vocabulary * completion_tokens

    num_separate = 0  # tokens of sequences of one completion each, after its prompt
    num_padded = 0  # the same, padded to the longest one of a batch
    for start in range(0, len(examples), config.batch_size):
        lengths = []
        for example in examples[start : start + config.batch_size]:
            for completion_ids in example["completions_ids"]:
                lengths.append(len(example["prompt_ids"]) + len(completion_ids))
        num_separate += sum(lengths)
        num_padded += len(lengths) * max(lengths)

    weights_mib = 4 * workload.num_parameters(shape) / 2**20  # float32
    return {
        "useful_tokens": work["tokens"] / config.steps,
        "completion_tokens": completion_tokens,
        "prompt_with_each_completion_tokens": num_separate / config.steps,
        "padded_rows_tokens": num_padded / config.steps,
        "step_gflop": work["step_flops"] / config.steps / 1e9,
        "of_it_output_head_gflop": head_flops / 1e9,
        "reference_gflop": work["reference_flops"] / config.steps / 1e9,
        "weights_mib": weights_mib,
        "weights_gradient_optimizer_mib": 3 * weights_mib,
        # Clipping reads the gradient and rescales it. RMSprop reads three arrays and writes two.
        "optimizer_traffic_mib": 8 * weights_mib,
        "logits_mib": 4 * completion_tokens * shape.vocabulary / 2**20,
    }


def summarize(
    examples: Sequence[dict], turns: Sequence[dict], config: Config, matmul_rate: float
) -> dict:
    """The metrics of one contender.

    examples: in the order of the batches. turns: the metrics of the contender's turns on them.
    """
    shape = SHAPES[config.model]
    reference = turns[0]
    first_step = turns[1]
    steps = turns[1 + WARMUP_STEPS :]
    num_batches = len(examples) / config.batch_size
    measured_examples = examples[: len(steps) * config.batch_size]
    work = useful_work(measured_examples, shape, config.method, config.kl)
    first_batch = examples[: config.batch_size]
    first_batch_work = useful_work(first_batch, shape, config.method, config.kl)

    seconds = np.array([step["seconds"] for step in steps])
    lower, median, upper = np.percentile(seconds, [25, 50, 75])
    cpu_seconds = np.mean([step["cpu_seconds"] for step in steps])
    # The reference pass is over all batches. This is the share of one of them.
    reference_seconds = reference["seconds"] / num_batches
    cpu_seconds_with_reference = cpu_seconds + reference["cpu_seconds"] / num_batches
    total_seconds = seconds.sum() + reference_seconds * len(steps)

    mfu_seconds = cpu_seconds_with_reference * len(steps)
    first_step_gflop = None  # not counted on a GPU
    if torch.cuda.is_available():
        mfu_seconds = total_seconds
    else:
        first_step_gflop = first_step["flops"] / 1e9
    metrics = {
        "steps": len(steps),
        "seconds_per_step": median,
        "seconds_per_step_quartiles": [lower, upper],
        "reference_seconds_per_step": reference_seconds,
        "seconds_per_step_with_reference": median + reference_seconds,
        "cpu_seconds_per_step": cpu_seconds,
        "cpu_seconds_per_step_with_reference": cpu_seconds_with_reference,
        "completion_tokens_per_second": work["completion_tokens"] / total_seconds,
        "max_memory_mib": max(turn["max_memory_mib"] for turn in turns),
        "useful_share": work["tokens"] / sum(step["tokens"] for step in steps),
        "mfu": (work["step_flops"] + work["reference_flops"]) / matmul_rate / mfu_seconds,
        "first_step_gflop": first_step_gflop,
        "first_step_useful_gflop": first_batch_work["step_flops"] / 1e9,
        "seconds": seconds.tolist(),
    }
    for name, value in reference.items():
        if name.startswith(("log_ratio", "token_error")):
            metrics[name] = value
    return metrics


def find_differences(turns: dict[str, list[dict]]) -> dict[str, dict]:
    """How much the numbers of each contender differ from those of the first.

    turns: the metrics of each contender's turns.

    Returns:
        By name, first_losses, the absolute differences of the losses of at most three steps, and
        completion_logps, the largest difference of the reference log-probability of a completion,
        in nats. Without completion_logps, if one of the two has computed none in the first turn.

    Raises UserError if the contenders have not seen the same tokens.
    """
    first, *others = turns
    expected_logps = turns[first][0]["texts"]
    differences = {}
    for name in others:
        logps = turns[name][0]["texts"]
        if logps.keys() != expected_logps.keys():
            raise UserError(f"{name} and {first} do not see the same tokens")
        loss_differences = []
        for expected_step, step in zip(turns[first][1:4], turns[name][1:4]):
            loss_differences.append(abs(step["loss"] - expected_step["loss"]))
        differences[name] = {"first_losses": loss_differences}
        logp_differences = [abs(logps[key] - expected_logps[key]) for key in logps]
        if not np.isnan(logp_differences).any():
            differences[name]["completion_logps"] = max(logp_differences)
    return differences


def find_ratios(metrics: dict[str, dict]) -> dict[str, dict]:
    """How large the metrics of each contender are, divided by those of the first."""
    first, *others = metrics
    compared = []
    for key, value in metrics[first].items():
        is_time = key.startswith(("seconds_per", "cpu_seconds_per"))
        if is_time and not isinstance(value, list):
            compared.append(key)
    compared += ["max_memory_mib", "completion_tokens_per_second"]
    ratios = {}
    for name in others:
        ratios[name] = {key: metrics[name][key] / metrics[first][key] for key in compared}
    return ratios


# ------------------------------------------------------------------------------------ the report


def format_report(report: dict) -> str:
    """The report as a table."""
    lines = []
    for key, value in report["counts"].items():
        lines.append(f"{key:<40}{value:>14,.1f}")
    lines.append(f"{'matrix product, Gflop/s':<40}{report['matmul_rate'] / 1e9:>14,.1f}")
    lines.append("")

    metrics = report["figures"]
    first = next(iter(metrics))
    longest_name = max(len(name) for name in metrics)
    width = max(14, longest_name + 2)
    header = " " * 36
    for name in metrics:
        header += f"{name:>{width}}"
    lines.append(header)
    for key in metrics[first]:
        if key == "seconds":  # of every single step
            continue
        line = f"{key:<36}"
        for name in metrics:
            line += f"{format_cell(metrics[name].get(key)):>{width}}"
        lines.append(line)
    for name, ratios in report["ratios"].items():
        shown = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        lines.append(f"{name} to {first}: {shown}")
    return "\n".join(lines)


def format_cell(value: float | list[float] | None) -> str:
    """A number, the two ends of a range, or nothing."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "-".join(f"{number:.3g}" for number in value)
    return f"{value:,.4g}"


def draw_ladder(report: dict, path: Path) -> None:
    """The ladder as a bar chart: the median seconds per step, with quartiles."""
    from matplotlib.figure import Figure  # needed for --ladder only

    names = []
    medians = []
    below = []  # from the lower quartile to the median
    above = []
    for name, metrics in report["figures"].items():
        median = metrics["seconds_per_step"]
        lower, upper = metrics["seconds_per_step_quartiles"]
        names.append(name)
        medians.append(median)
        below.append(median - lower)
        above.append(upper - median)
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, medians, xerr=[below, above], color="0.7", ecolor="0.3")
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds per step ({report['settings']['model']}, DPO, median and quartiles)")
    figure.savefig(path, dpi=150)


def find_versions(config: Config) -> dict[str, str]:
    """The versions of the libraries that take part."""
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    if config.peer in ("trl", "compact"):
        versions["trl"] = importlib.metadata.version("trl")
    return versions


def measure(
    examples: Sequence[dict], everyone: Sequence[Contender], config: Config
) -> dict[str, list[dict]]:
    """Write model and data into a temporary folder, and run the contenders on them.

    Returns the metrics of each contender's turns.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        if not run_alone(workload.write_model, SHAPES[config.model], config.seed, folder / "model"):
            raise UserError(f"--model {config.model}: could not be written to {folder}")
        records_path = folder / "records.jsonl"
        workload.write_records(examples, config.method, records_path)
        return take_turns(everyone, config, folder, records_path)


def main(config: Config) -> None:
    """Measure, print, and write --out/MODEL_METHOD.json, and the picture of the ladder."""
    os.environ |= ALLOCATOR  # read when a process starts
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL would use all GPUs
    os.environ["TQDM_DISABLE"] = "1"  # the progress bars of the contenders
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    num_examples = config.steps * config.batch_size
    examples = workload.make_examples(
        SHAPES[config.model], config.method, num_examples, config.max_length, config.seed
    )
    if not config.ladder:
        examples = workload.sort_into_batches(examples, config.batch_size, config.seed)

    everyone = contenders(config)
    load_before = os.getloadavg()
    turns = measure(examples, everyone, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matmul_rate = workload.matmul_rate(device, config.dtype)
    metrics = {}
    for contender in everyone:
        name = contender.name
        metrics[name] = summarize(examples, turns[name], config, matmul_rate)
    report = {
        "settings": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": [load_before, os.getloadavg()],
        "versions": find_versions(config),
        "counts": count_work(examples, config),
        "matmul_rate": matmul_rate,
        "figures": metrics,
        "differ_from_first": find_differences(turns),
        "ratios": find_ratios(metrics),
    }
    report_name = f"{config.model}_{'ladder' if config.ladder else config.method}"
    partial = out / f"{report_name}.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(out / f"{report_name}.json")
    print(format_report(report))
    if config.ladder:
        draw_ladder(report, out / f"{report_name}.png")
    for name, differences in report["differ_from_first"].items():
        print(f"{name} differs from {everyone[0].name}: {differences}")
        # KTO's mismatched completions are not TRL's, and its hinge is not SLiC's.
        is_comparable = config.method in ("sft", "dpo")
        if is_comparable and not max(differences["first_losses"]) < 0.05:
            raise UserError(f"{name}: its losses are not those of {everyone[0].name}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
