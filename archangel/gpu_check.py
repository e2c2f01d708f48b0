"""What only a GPU can answer: whether the numbers are right, how fast a step is, what it needs.

    python -m archangel.gpu_check             # about eight minutes on one GPU
    python -m archangel.gpu_check --small     # a tiny model; works on a CPU, too

Every fact is one line of JSON, printed as soon as it is known and appended to
OUT/gpu_check.jsonl. archangel/GPU.md says what the lines mean. The stages, in this order:

    numerics    log-probabilities and gradients, against float32 on the CPU
    toy         KTO on the toy: train, save, resume and export, beside the same run on the CPU
    speed       training steps of a model of Pythia-1.4B's shape, with random weights
    trl         the same for DPO beside TRL's trainer, where TRL is installed

and, only if it is asked for by --stages variants,

    variants    DPO's steps with ideas that may be faster, of archangel/gpu_variants.py

Each stage runs in a process of its own with a time limit. So a stage that fails, crashes or hangs
does not stop the later ones, and its GPU memory is free again. What a stage writes to stderr is in
OUT/STAGE.log. The exit status is 0 if all is well, and 1 if something failed.

Nothing is downloaded. With --here the stages run in this process, for a debugger. Then there is no
time limit, and a crash stops the later ones.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

import common
from archangel import packed
from archangel.errors import exit_status
from archangel.gpu_variants import VARIANTS
from archangel.records import TOY
from archangel.run import build_without_weights
from archangel.workload import (
    SHAPES,
    Shape,
    make_examples,
    make_model_config,
    matmul_rate,
    synchronize,
    useful_work,
    write_model,
    write_records,
)

ROOT = Path(__file__).parent.parent
GIB = 2**30

# Read by torch, huggingface_hub, tqdm and Python itself when a process starts, so they are set for
# the stages.
ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONFAULTHANDLER": "1",  # a process that crashes, or is aborted, writes what it was doing
}

# Seconds after which a stage is ended. All stages together have --seconds.
TIME_LIMITS = {"numerics": 110, "toy": 130, "speed": 120, "trl": 300, "variants": 345}

# bfloat16 floating-point operations per second of dense matrix products, from NVIDIA's data sheets.
NOMINAL_RATES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


# --------------------------------------------------------------------------- what a stage reports


class Check:
    """What a stage gets: where it computes, at which size, and how it reports a fact."""

    def __init__(self, stage: str, small: bool, out: Path):
        self.stage = stage
        self.small = small
        self.out = out
        self.failed = False
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", 0)

    def report(self, fact: str, **values) -> None:
        """Print a fact as a line of JSON, and append it to the file."""
        line = json.dumps({"stage": self.stage, "fact": fact, **to_json(values)})
        print(line, flush=True)
        with (self.out / "gpu_check.jsonl").open("a") as file:
            file.write(line + "\n")

    def fail(self, fact: str, error: str, **values) -> None:
        """Report what is wrong. The stage continues, and the exit status becomes 1."""
        self.failed = True
        self.report(fact, error=error, **values)

    @contextlib.contextmanager
    def surviving(self, fact: str) -> Iterator[None]:
        """Report an exception as this fact instead of raising it."""
        try:
            yield
        except Exception:
            self.fail(fact, traceback.format_exc()[-1200:])


def to_json(value: object) -> object:
    """The value with floats cut to six digits; JSON has no nan, so that becomes text."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def run_program(command: Sequence[str]) -> None:
    """Run another program, with its output on stderr. Raises RuntimeError if it fails."""
    status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
    if status != 0:
        raise RuntimeError(f"exit status {status} of {' '.join(command)}")


# ------------------------------------------------------------------------------- stage 1: numerics

# The largest differences from float32 on the CPU that pass: the mean of a log-probability's, in
# nats; and the relative difference of the whole gradient.
MAX_LOGP_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.03}
MAX_GRADIENT_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}


def numerics(check: Check) -> None:
    """The machine; then log-probabilities and gradients on it, against float32 on the CPU."""
    device = check.device
    check.report("machine", **describe_machine(device))
    check.report("matmul", flops_per_second=matmul_rate(device), nominal=nominal_rate(device))
    check.report("copy", bytes_per_second=copy_rate(device, 2**26 if check.small else 2**30))

    if device.type == "cuda":
        with check.surviving("allocator"):
            check_allocator(check)

    shape = dataclasses.replace(SHAPES["pythia-1.4b"], layers=4)
    if check.small:
        shape = SHAPES["tiny"]
    lm = make_random_model(shape, device)
    examples = []
    for example in make_examples(shape, "dpo", num_examples=8, max_length=256, seed=1):
        examples.append(common.Example(example["prompt_ids"], example["completions_ids"]))

    lm.to("cpu")
    expected = {}  # number of examples -> log-probabilities and gradients
    for num_examples in (2, 4, 8):
        logps, gradients = logps_and_gradients(
            common.Policy(lm, bfloat16=False), examples[:num_examples], common.PaddedLayout()
        )
        gradients = [gradient.to(device) for gradient in gradients]
        expected[num_examples] = (logps.to(device), gradients)
    lm.to(device)

    packed.use_packed_attention(lm, device)  # which leaves padded sequences as they were
    with one_process_group(device):
        compare_all(check, lm, make_sharded_policy(lm, device), examples, expected)


def compare_all(
    check: Check,
    lm: nn.Module,
    sharded_policy: common.Policy,
    examples: Sequence[common.Example],
    expected: dict[int, tuple[Tensor, list[Tensor]]],
) -> None:
    """Report the differences of each number format in each layout.

    expected: by number of examples, log-probabilities and gradients in float32 on the CPU.
    """
    # Packed float32 comes last: it is the likeliest to exceed the shared memory, and only --dtype
    # float32 needs it.
    for dtype, layout_name, is_sharded in (
        ("float32", "padded", False),
        ("bfloat16", "padded", False),
        ("bfloat16", "packed", False),
        ("bfloat16", "packed", True),
        ("float32", "packed", False),
    ):
        with check.surviving(f"{dtype} {layout_name}"):
            bfloat16 = dtype == "bfloat16"
            policy = sharded_policy if is_sharded else common.Policy(lm, bfloat16)
            layout = common.PaddedLayout() if layout_name == "padded" else packed.PackedLayout()
            # Flex attention is compiled for the first size, for all sizes at the second, and then
            # not again.
            for num_examples in (2, 4, 8, 4):
                start_time = time.perf_counter()
                logps, gradients = logps_and_gradients(policy, examples[:num_examples], layout)
                seconds = time.perf_counter() - start_time
                differences = compare(logps, gradients, *expected[num_examples])
                check.report(
                    "difference",
                    dtype=dtype,
                    layout=layout_name,
                    sharded=is_sharded,
                    examples=num_examples,
                    **differences,
                    seconds=seconds,
                    compiled_graphs=counters["stats"]["unique_graphs"],
                )
                check_differences(check, differences, dtype, layout_name)


def describe_machine(device: torch.device) -> dict:
    """The device, and the versions of what computes on it."""
    facts = {
        "device": "cpu",
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_gib"] = properties.total_memory / GIB
        facts["multiprocessors"] = properties.multi_processor_count
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
        if importlib.util.find_spec("triton") is not None:
            facts["triton"] = importlib.import_module("triton").__version__
    return facts


# As common.start_run does it: after the import of torch, before the first use of the GPU.
ALLOCATOR_PROGRAM = """
import os
import torch
assert torch.cuda.is_available()
os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
torch.zeros(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


def check_allocator(check: Check) -> None:
    """Whether torch still reads the allocator's settings when common.start_run makes them."""
    environment = dict(os.environ)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR_PROGRAM], env=environment, capture_output=True, text=True
    )
    check.report("allocator", expandable_segments=done.stdout.strip())
    if done.stdout.strip() != "True":
        check.fail("allocator", f"expandable_segments is not on; {done.stderr[-600:]}")


def nominal_rate(device: torch.device) -> float | None:
    """The data sheet's bfloat16 operations per second; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    return NOMINAL_RATES.get(torch.cuda.get_device_name(device))


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that the memory reads and writes in a large copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    num_copies = 20
    synchronize(device)
    start_time = time.perf_counter()
    for _ in range(num_copies):
        target.copy_(source)
    synchronize(device)
    return 2 * num_copies * num_bytes / (time.perf_counter() - start_time)


def make_random_model(shape: Shape, device: torch.device) -> GPTNeoXForCausalLM:
    """A model of random float32 weights, drawn on the device: a CPU would take long."""
    torch.manual_seed(1)
    with torch.device(device):
        return GPTNeoXForCausalLM(make_model_config(shape)).eval()


@contextlib.contextmanager
def one_process_group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, as common.start_run makes it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_sharded_policy(lm: nn.Module, device: torch.device) -> common.Policy:
    """A copy of the model in bfloat16, sharded by FSDP as with several processes.

    Here it is sharded over this process alone, so it has all of the weights. But they are rounded
    to bfloat16 before they are used.
    """
    run = SimpleNamespace(
        bfloat16=True,
        dtype=torch.float32,
        device=device,
        info={},
        config=SimpleNamespace(activation_checkpointing=False),
    )
    copy = build_without_weights(lm.config, torch.float32)
    policy = common.prepare_policy(common.Policy(copy, bfloat16=True), run)
    packed.use_packed_attention(copy, device)
    common.shard(policy, lm, run)
    return policy


def logps_and_gradients(
    policy: common.Policy, examples: Sequence[common.Example], layout: common.Layout
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities (N,), and the gradients of a random combination of them."""
    device = next(policy.parameters()).device
    policy.zero_grad()
    micro_batch = common.make_micro_batch(examples, range(len(examples)), layout, device)
    logps = policy(micro_batch)
    # The factors are drawn on the CPU, because a GPU's generator gives other numbers.
    factors = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    (logps * factors.to(logps)).sum().backward()
    synchronize(device)
    gradients = []
    for parameter in policy.parameters():
        is_sharded = hasattr(parameter.grad, "full_tensor")
        gradients.append(parameter.grad.full_tensor() if is_sharded else parameter.grad)
    policy.zero_grad()  # which leaves the tensors in `gradients` alone
    return logps.detach(), gradients


def compare(
    logps: Tensor,
    gradients: Sequence[Tensor],
    expected_logps: Tensor,
    expected_gradients: Sequence[Tensor],
) -> dict[str, float]:
    """How much log-probabilities differ, in nats, and the gradient of all weights, relatively."""
    errors = (logps - expected_logps).abs()
    error_norms = []
    norms = []
    for gradient, expected in zip(gradients, expected_gradients):
        error_norms.append((gradient - expected).norm())
        norms.append(expected.norm())
    relative = torch.stack(error_norms).norm() / torch.stack(norms).norm()
    return {
        "logp_mean": errors.mean().item(),
        "logp_largest": errors.max().item(),
        "gradient_relative": relative.item(),
    }


def check_differences(check: Check, differences: dict, dtype: str, layout_name: str) -> None:
    """Fail if they are too large. "not <=" is also true for nan."""
    what = f"{dtype} {layout_name}"
    if not differences["logp_mean"] <= MAX_LOGP_DIFFERENCE[dtype]:
        check.fail(what, f"log-probabilities differ by more than {MAX_LOGP_DIFFERENCE[dtype]}")
    if not differences["gradient_relative"] <= MAX_GRADIENT_DIFFERENCE[dtype]:
        check.fail(what, f"gradients differ by more than {MAX_GRADIENT_DIFFERENCE[dtype]}")


# ------------------------------------------------------------------------------------ stage 2: toy

COMPARED_METRICS = ("loss", "reward_margin", "grad_norm")
# On a CPU, bfloat16 and float32 differ by at most 0.001 in the losses of these 20 steps, and by a
# factor of 1.0005 in the first gradient norm. These limits leave room.
MAX_LOSS_DIFFERENCE = 0.02
MAX_FIRST_GRAD_NORM_DIFFERENCE = 0.02  # relative


def toy(check: Check) -> None:
    """KTO on the toy: trained, saved, resumed and exported, beside the same run on the CPU.

    On a GPU, matrix products are in bfloat16, and on the CPU in float32.
    """
    num_steps = 4 if check.small else 20
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        cpu_folder = Path(folder) / "cpu"
        device_folder = Path(folder) / "device"
        without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        settings = ["--data", "toy"]
        if check.small:  # no held-out records: to evaluate them takes most of the time
            data = write_first_records(Path(folder) / "records.jsonl", 100)
            settings = ["--data", str(data), "--batch_size", "8"]
        cpu_command = kto_command(cpu_folder, num_steps, settings)
        # Both runs at once. Leaving the block waits for the one on the CPU.
        with subprocess.Popen(cpu_command, env=without_gpu, stdout=sys.stderr) as cpu_run:
            start_time = time.perf_counter()
            run_program(kto_command(device_folder, num_steps // 2, settings))
            seconds = time.perf_counter() - start_time
            check.report("trained", steps=num_steps // 2, seconds=seconds)

            start_time = time.perf_counter()
            run_program([*kto_command(device_folder, num_steps, settings), "--resume"])
            seconds = time.perf_counter() - start_time
            check.report("resumed", steps=num_steps, seconds=seconds)
        if cpu_run.returncode != 0:
            raise RuntimeError(f"the run on the CPU ended with status {cpu_run.returncode}")
        with check.surviving("metrics"):
            compare_runs(check, device_folder, cpu_folder, num_steps)
        with check.surviving("export"):
            check_export(check, device_folder)


def write_first_records(path: Path, num_records: int) -> Path:
    """Write the first training records of the toy to a file. Returns the file."""
    lines = (TOY / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:num_records]))
    return path


def kto_command(out: Path, max_steps: int, settings: Sequence[str]) -> list[str]:
    """The command of a KTO run on the toy."""
    command = [sys.executable, str(ROOT / "kto.py"), "--model", "toy", "--out", str(out)]
    command += ["--lr", "2e-4", "--warmup_steps", "10", "--kl", "mismatched"]
    command += ["--max_steps", str(max_steps), "--save_every", "10", *settings]
    return command


def read_steps(out: Path) -> list[dict]:
    """The metrics of all training steps of a run."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] > 0]


def compare_runs(check: Check, device_folder: Path, cpu_folder: Path, num_steps: int) -> None:
    """Report some metrics of both runs, and the largest differences over all steps."""
    ours = read_steps(device_folder)
    theirs = read_steps(cpu_folder)
    steps = [record["step"] for record in ours]
    if steps != list(range(1, num_steps + 1)):
        check.fail("metrics", f"metrics.jsonl has the steps {steps}, not 1 to {num_steps}")
    for step in (1, num_steps // 2, num_steps // 2 + 1, num_steps):
        check.report(
            "metrics",
            step=step,
            device={name: ours[step - 1][name] for name in COMPARED_METRICS},
            cpu={name: theirs[step - 1][name] for name in COMPARED_METRICS},
        )
    largest = {}
    for name in COMPARED_METRICS:
        largest[name] = max(abs(a[name] - b[name]) for a, b in zip(ours, theirs))
    check.report("largest_differences", **largest)
    if not largest["loss"] <= MAX_LOSS_DIFFERENCE:
        check.fail("metrics", f"losses differ by more than {MAX_LOSS_DIFFERENCE}")
    # In the first step the weights are the same, so this is only the number format.
    relative = abs(ours[0]["grad_norm"] / theirs[0]["grad_norm"] - 1)
    if not relative <= MAX_FIRST_GRAD_NORM_DIFFERENCE:
        check.fail("metrics", f"the first gradient norms differ by {relative:.2g} of their size")


@torch.no_grad()
def check_export(check: Check, folder: Path) -> None:
    """Load the exported model with transformers alone, and compare it with the untrained one."""
    trained = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    untrained = AutoModelForCausalLM.from_pretrained(TOY / "model", use_safetensors=True)
    largest_change = 0.0
    for name, weight in trained.named_parameters():
        change = (weight - untrained.get_parameter(name)).abs().max().item()
        largest_change = max(largest_change, change)
    logits = trained(torch.tensor([[1, 2, 3]])).logits
    is_finite = bool(logits.isfinite().all())
    check.report("export", largest_weight_change=largest_change, finite_logits=is_finite)
    if not is_finite or not 0 < largest_change < 1:
        check.fail("export", "the exported model is not a trained one")


# ---------------------------------------------------------------------------------- stage 3: speed


@dataclasses.dataclass(frozen=True)
class SpeedCase:
    """Which script is measured, and with which settings."""

    method: str
    micro_batch_tokens: int
    settings: dict = dataclasses.field(default_factory=dict)
    with_profile: bool = False
    variant: str = ""  # of archangel/gpu_variants.py

    def name(self) -> str:
        """A name for the output."""
        name = " ".join([self.method, str(self.micro_batch_tokens), *self.settings.values()])
        return f"{name}, {self.variant}" if self.variant else name


SPEED_CASES = [
    SpeedCase("dpo", 8192),
    SpeedCase("dpo", 16384, with_profile=True),
    SpeedCase("kto", 16384, {"kl": "other_half"}),
    SpeedCase("kto", 16384, {"kl": "mismatched"}),
    SpeedCase("sft", 16384),
]


# The last one compiles for minutes, and may leave no time for others.
VARIANT_CASES = [
    SpeedCase("dpo", 16384),
    SpeedCase("dpo", 16384, variant="compiled optimizer"),
    SpeedCase("dpo", 16384, variant="bfloat16 head"),
    SpeedCase("dpo", 16384, variant="varlen attention"),
    SpeedCase("dpo", 16384, {"optimizer": "adamw"}),
    SpeedCase("dpo", 16384, {"optimizer": "adamw"}, variant="fused optimizer"),
    SpeedCase("dpo", 16384, variant="compiled layers"),
]


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """The sizes of the speed stage. Each case has warm-up steps, measured ones and a profiled one.

    The profiled step is also done, without a profiler, by the other cases.
    """

    shape: Shape = SHAPES["pythia-1.4b"]
    batch_size: int = 32
    max_length: int = 512
    warmup_steps: int = 3
    measured_steps: int = 8

    def num_steps(self) -> int:
        """All steps of a case."""
        return self.warmup_steps + self.measured_steps + 1


SMALL_SPEED_SETTINGS = SpeedSettings(
    shape=SHAPES["tiny"], batch_size=4, max_length=128, warmup_steps=1, measured_steps=2
)


def speed(check: Check) -> None:
    """Time the scripts' own training steps."""
    time_cases(check, SPEED_CASES)


def variants(check: Check) -> None:
    """Time DPO's training steps with ideas that may make them faster."""
    time_cases(check, VARIANT_CASES)


def time_cases(check: Check, cases: Sequence[SpeedCase]) -> None:
    """Time each case on the same model.

    The model is made once, on the device. Two would need twice 5.3 GiB, and the time to make them.
    """
    settings = SMALL_SPEED_SETTINGS if check.small else SpeedSettings()
    measured_rate = matmul_rate(check.device)
    check.report("matmul", flops_per_second=measured_rate, nominal=nominal_rate(check.device))
    start_time = time.perf_counter()
    lm = make_random_model(settings.shape, check.device)
    synchronize(check.device)
    check.report(
        "model",
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        seconds=time.perf_counter() - start_time,
    )
    initial = {name: tensor.to("cpu", copy=True) for name, tensor in lm.state_dict().items()}
    for case in cases:
        lm.load_state_dict(initial)  # the case before has trained it
        with check.surviving(case.name()):
            time_case(check, case, settings, lm, measured_rate)
        lm.get_input_embeddings()._forward_hooks.clear()  # those of common.prepare_policy
        # The optimizer's state and the activations of this case are garbage now.
        gc.collect()
        if check.device.type == "cuda":
            torch.cuda.empty_cache()


def time_case(
    check: Check, case: SpeedCase, settings: SpeedSettings, lm: nn.Module, measured_rate: float
) -> None:
    """Call a script's own `train`, with a clock in the place of its log."""
    shape = settings.shape
    num_examples = settings.num_steps() * settings.batch_size
    examples = make_examples(shape, case.method, num_examples, settings.max_length, seed=1)
    script = importlib.import_module(case.method)
    clock = StepClock(lm, check.device, settings, case.with_profile)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        data = Path(folder) / "records.jsonl"
        write_records(examples, case.method, data)
        # The script reads the tokenizer here. These weights are not used, and so they are few.
        stand_in = dataclasses.replace(shape, layers=1, width=8, heads=1, feed_forward=8)
        write_model(stand_in, seed=1, folder=Path(folder) / "model")
        config = script.Config(
            model=str(Path(folder) / "model"),
            data=str(data),
            out=str(Path(folder) / "run"),
            batch_size=settings.batch_size,
            micro_batch_tokens=case.micro_batch_tokens,
            lr=1e-6,
            warmup_steps=0,
            max_length=settings.max_length,
            max_prompt_length=settings.max_length * 3 // 4,
            save_every=0,
            **case.settings,
        )
        with (
            VARIANTS[case.variant](check.device),
            mock.patch.object(script, "make_schedule", consecutive_batches),
            mock.patch.object(common, "load_policy", clock.load_policy),
            mock.patch.object(common, "add_reference_logps", clock.add_reference_logps),
            mock.patch.object(common.Run, "log", clock.log),
            mock.patch.object(common.Run, "export", lambda run, policy: run.lock.release()),
        ):
            script.train(config)

    first = settings.warmup_steps
    last = first + settings.measured_steps
    measured_seconds = clock.seconds[first:last]
    measured_examples = examples[first * settings.batch_size : last * settings.batch_size]
    kl = case.settings.get("kl", "mismatched")
    work = useful_work(measured_examples, shape, case.method, kl)
    flops_per_second = work["step_flops"] / sum(measured_seconds)
    nominal = nominal_rate(check.device)
    check.report(
        "steps",
        case=case.name(),
        seconds_per_step=statistics.median(measured_seconds),
        seconds=clock.seconds,
        tokens_per_second=work["tokens"] / sum(measured_seconds),
        mfu_of_nominal=None if nominal is None else flops_per_second / nominal,
        mfu_of_measured=flops_per_second / measured_rate,
        reference_seconds=clock.run.info.get("reference_seconds"),
        reference_examples=num_examples,
        **clock.log_ratios,
        **clock.memory,
        losses=clock.losses,
        packed=clock.run.info["packed_rows"],
        self_check_error=clock.run.info["self_check_error"],
        compiled_graphs=counters["stats"]["unique_graphs"],
    )
    if clock.profiler is not None:
        report_profile(check, clock.profiler, case, clock.seconds[-1])


def consecutive_batches(examples: common.Examples, config) -> list[list[int]]:
    """The place of a script's make_schedule: the examples in their order, which is random."""
    batches = []
    for start in range(0, len(examples), config.batch_size):
        batches.append(list(range(start, start + config.batch_size)))
    return batches


class StepClock:
    """Takes the places of some functions that a script's `train` calls.

    Its results:
        seconds: of each step, from the end of the one before.
        losses: of each step.
        log_ratios: of policy and reference before the first step.
        memory: the most that was in use during the steps.
        profiler: of the last step, or None.
        run: the script's Run.
    """

    def __init__(
        self, lm: nn.Module, device: torch.device, settings: SpeedSettings, with_profile: bool
    ):
        self.lm = lm
        self.device = device
        self.settings = settings
        self.original_add_reference_logps = common.add_reference_logps
        self.start_time = 0.0
        self.seconds = []
        self.losses = []
        self.log_ratios = {}
        self.memory = {}
        self.run = None
        self.profiler = None
        if with_profile:
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)

    def load_policy(self, run: common.Run) -> common.Policy:
        """The place of common.load_policy: the model that is on the device already."""
        self.run = run
        return common.prepare_policy(common.Policy(self.lm, run.bfloat16), run)

    @torch.no_grad()
    def add_reference_logps(
        self,
        policy: common.Policy,
        examples: common.Examples,
        indices: Sequence[int],
        name: str,
        run: common.Run,
    ) -> None:
        """common.add_reference_logps. Then compare with the policy, which is still the same model.

        The first batch is computed again, in the micro-batches of a training step. These are not
        those of the reference pass, so rounding differs.
        """
        self.original_add_reference_logps(policy, examples, indices, name, run)
        if name != "train":
            return
        first_batch = indices[: self.settings.batch_size]
        differences = []
        for micro_batch in common.make_micro_batches(examples, first_batch, run):
            differences.append((policy(micro_batch) - micro_batch.reference_logps).abs())
        differences = torch.cat(differences)  # (N,)
        self.log_ratios = {
            "log_ratio_mean": differences.mean().item(),
            "log_ratio_largest": differences.max().item(),
        }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The place of Run.log, which a script calls before the first step and after each one."""
        synchronize(self.device)
        now = time.perf_counter()
        last_step = self.settings.num_steps()
        if step == 0:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.seconds.append(now - self.start_time)
            self.losses.append(metrics["loss"])
        if step == last_step - 1:
            self.memory = peak_memory(self.device)  # the profiler needs memory, too
            if self.profiler is not None:
                self.profiler.start()
        if step == last_step and self.profiler is not None:
            self.profiler.stop()
        self.start_time = time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most GPU memory in use, and the most that was reserved for it; {} on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_memory_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def report_profile(check: Check, profiler: profile, case: SpeedCase, seconds: float) -> None:
    """Report where the time of a step goes, and write its trace, which chrome://tracing shows.

    seconds: of that step, with the profiler.
    """
    # The averages have rows of operators, which run on the CPU and launch kernels, and on a GPU
    # also rows of the kernels themselves. A kernel's time is counted in both.
    time_of = "self_cpu_time_total"
    if check.device.type == "cuda":
        time_of = "self_device_time_total"
    operators = []
    kernel_microseconds = 0.0
    num_launches = 0
    for row in profiler.key_averages():
        if row.device_type == DeviceType.CPU:
            operators.append(row)
            if "LaunchKernel" in row.key:  # cudaLaunchKernel, cuLaunchKernelEx and others
                num_launches += row.count
        elif not row.is_user_annotation:
            kernel_microseconds += row.self_device_time_total
    operators.sort(key=lambda row: getattr(row, time_of), reverse=True)
    top = []
    for row in operators[:14]:
        milliseconds = getattr(row, time_of) / 1000
        top.append({"name": row.key[:80], "calls": row.count, "milliseconds": milliseconds})
    check.report(
        "profile",
        case=case.name(),
        seconds=seconds,
        kernel_seconds=kernel_microseconds / 1e6,
        kernel_launches=num_launches,
        sorted_by=time_of,
        top=top,
    )
    trace_name = case.name().replace(" ", "_")
    profiler.export_chrome_trace(str(check.out / f"{trace_name}.json.gz"))


# ------------------------------------------------------------------------------------ stage 4: TRL


def trl(check: Check) -> None:
    """archangel.benchmark: DPO here and with TRL, on the same model and the same data."""
    if importlib.util.find_spec("trl") is None:
        check.report("trl", installed=False)
        return
    check.report("trl", installed=True, version=importlib.metadata.version("trl"))
    sizes = {
        "model": "pythia-1.4b",
        "batch_size": 32,
        "micro_batch_tokens": 16384,
        "peer_rows_at_once": 8,
        "steps": 4,
    }
    if check.small:
        sizes = {
            "model": "tiny",
            "batch_size": 4,
            "micro_batch_tokens": 1024,
            "peer_rows_at_once": 2,
            "steps": 2,
            "max_length": 128,
        }
    command = [sys.executable, "-m", "archangel.benchmark", "--method", "dpo", "--peer", "compact"]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    command += ["--out", str(check.out / "benchmark")]
    run_program(command)
    path = check.out / "benchmark" / f"{sizes['model']}_dpo.json"
    report = json.loads(path.read_text())
    for name, figures in report["figures"].items():
        check.report("contender", name=name, **figures)
    for name, ratios in report["ratios"].items():
        check.report("ratios", name=name, **ratios)
    for name, differences in report["differ_from_first"].items():
        check.report("differences", name=name, **differences)


# -------------------------------------------------------------------------------------- the stages

STAGES = {"numerics": numerics, "toy": toy, "speed": speed, "trl": trl, "variants": variants}
DEFAULT_STAGES = ["numerics", "toy", "speed", "trl"]


def run_here(name: str, small: bool, out: Path) -> bool:
    """Run a stage in this process. Returns whether all went well."""
    check = Check(name, small, out)
    start_time = time.perf_counter()
    with check.surviving("stage"):
        STAGES[name](check)
    check.report("end", seconds=time.perf_counter() - start_time)
    return not check.failed


def run_all_here(args: argparse.Namespace) -> bool:
    """Run the stages in this process. Returns whether all went well."""
    all_well = True
    for name in args.stages:
        if not run_here(name, args.small, args.out):
            all_well = False
    return all_well


def run_apart(command: Sequence[str], log_path: Path, time_limit: float) -> str | None:
    """Run a command in a process of its own, with its stderr in a file.

    The processes that it started end with it, also if it crashes or exceeds the limit, in seconds.
    Returns None if its exit status was 0, else what happened and the end of the file.
    """
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True)
    try:
        status = process.wait(timeout=time_limit)
        reason = f"exit status {status}"
    except subprocess.TimeoutExpired:
        status = None
        reason = f"not done after {time_limit:.0f} seconds"
        os.killpg(process.pid, signal.SIGABRT)  # they write what they were doing, see ENVIRONMENT
        time.sleep(1)
    finally:
        with contextlib.suppress(ProcessLookupError):  # there is none left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status == 0:
        return None
    return f"{reason}; {log_path.name} ends with: {log_path.read_text()[-1200:]}"


def run_all_apart(args: argparse.Namespace) -> bool:
    """Run each stage in a process of its own. Returns whether all went well."""
    all_well = True
    deadline = time.monotonic() + args.seconds
    for name in args.stages:
        time_limit = min(TIME_LIMITS[name], deadline - time.monotonic())
        command = [sys.executable, "-m", "archangel.gpu_check", "--here", "--stages", name]
        command += ["--out", str(args.out)]
        if args.small:
            command.append("--small")
        error = "there was no time left for it"
        if time_limit > 0:
            error = run_apart(command, args.out / f"{name}.log", time_limit)
        if error is not None:
            all_well = False
            Check(name, args.small, args.out).fail("stage", error)
    return all_well


def end_on_signal(signal_number: int, frame: object) -> None:
    """End as an exception does, so that run_apart ends the stage's processes."""
    sys.exit(128 + signal_number)


def parse_stages(text: str) -> list[str]:
    """Names of stages, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(STAGES)}")
    return names


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m archangel.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default=DEFAULT_STAGES,
        help=f"which ones, separated by commas (default: {','.join(DEFAULT_STAGES)})",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model and few steps")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu_check"),
        help="folder for gpu_check.jsonl and logs (default: runs/gpu_check)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="time limit of all stages together (default: 600)",
    )
    parser.add_argument("--here", action="store_true", help="run the stages in this process")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages of the command line, and end with the exit status."""
    args = parse_args(arguments)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with exit_status():
        if args.here:
            all_well = run_all_here(args)
        else:
            signal.signal(signal.SIGTERM, end_on_signal)
            # A crash writes no core file, which would be as large as the memory in use.
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            all_well = run_all_apart(args)
        if not all_well:
            sys.exit(1)


if __name__ == "__main__":
    main()
