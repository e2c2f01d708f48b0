"""How the contenders of the benchmark take turns: each in its own process, one step per turn.

The main process calls `take_turns`. It tells one contender at a time to compute, so that whatever
else the machine does slows all of them alike. A contender calls the methods of `Turns`:

    turns.wait()              before the reference pass and before each step: start the clock
    turns.stop()              after it: stop the clock
    turns.tell(loss=loss)     report the metrics of the turn
"""

import hashlib
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from archangel.errors import UserError
from archangel.records import progress
from archangel.workload import synchronize

WARMUP_STEPS = 2  # steps that are not measured


# --------------------------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Contender:
    """A trainer that takes part in the benchmark.

    It is started as run(connection, config, folder, records_path, name, options), where
    connection: its end of the pipe to the main process, for `Turns`.
    config: the benchmark's settings.
    folder: has the model, in folder / "model". The contender may write into folder / name.
    records_path: the training data, a JSONL file in the order of the batches.

    It computes log pi_ref in its first turn and takes a training step in each further one. The
    steps are the first WARMUP_STEPS batches, then all batches from the beginning.
    """

    name: str
    run: Callable
    options: object  # of the run function
    num_steps: int  # measured steps


class Turns:
    """A contender's side of the pipe."""

    def __init__(self, connection):
        self.connection = connection
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.num_tokens = 0  # computed in this turn, padding included
        self.flop_counter = None
        self.start_time = 0.0
        self.cpu_start_time = 0.0
        self.metrics = {}

    def count_tokens(self, model: torch.nn.Module) -> None:
        """From now on, count the tokens that the model computes, padding included."""

        def add(module, args, kwargs) -> None:
            input_ids = args[0] if args else kwargs["input_ids"]
            self.num_tokens += input_ids.numel()

        model.base_model.register_forward_pre_hook(add, with_kwargs=True)

    def wait(self) -> None:
        """Wait for this contender's turn, then start the clock. Ends the process at the end."""
        order = self.connection.recv()
        if order == "leave":
            raise SystemExit
        self.num_tokens = 0
        self.flop_counter = None
        if order == "count" and self.device.type == "cpu":  # torch.compile cannot be counted
            self.flop_counter = make_flop_counter()
            self.flop_counter.__enter__()
        synchronize(self.device)
        self.start_time = time.perf_counter()
        self.cpu_start_time = time.process_time()

    def stop(self) -> None:
        """Stop the clock."""
        synchronize(self.device)
        self.metrics = {
            "seconds": time.perf_counter() - self.start_time,
            "cpu_seconds": time.process_time() - self.cpu_start_time,
            "tokens": self.num_tokens,
        }
        if self.flop_counter is not None:
            self.flop_counter.__exit__(None, None, None)
            self.metrics["flops"] = self.flop_counter.get_total_flops()
        if self.device.type == "cuda":
            self.metrics["max_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        else:
            max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
            self.metrics["max_memory_mib"] = max_rss / 2**10

    def tell(self, **more) -> None:
        """Send the metrics of the turn, and `more`, to the main process."""
        self.connection.send(self.metrics | more)


def make_flop_counter() -> FlopCounterMode:
    """A counter of floating-point operations that knows the attention of a CPU, too."""

    def count_forward(query: tuple, key: tuple, value: tuple, *args, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def count_backward(grad: tuple, query: tuple, key: tuple, value: tuple, *args, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {attention: count_forward, attention_backward: count_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def fingerprint(prompt_ids: Sequence[int] | Tensor, completion_ids: Sequence[int] | Tensor) -> str:
    """A name for the token ids of a prompt and a completion, by which contenders are compared."""
    prompt_bytes = np.asarray(prompt_ids, dtype=np.int64).tobytes()
    completion_bytes = np.asarray(completion_ids, dtype=np.int64).tobytes()
    return hashlib.sha256(prompt_bytes + b"|" + completion_bytes).hexdigest()[:16]


# ------------------------------------------------------------------------------- the main process


def run_alone(function: Callable, *args) -> bool:
    """Run a function in its own process, which frees its memory. Returns whether it succeeded."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode == 0


def take_turns(
    contenders: Sequence[Contender], config, folder: Path, records_path: Path
) -> dict[str, list[dict]]:
    """Run the contenders in turns.

    On a GPU, whose memory is too small for all of them, one contender runs after the other.

    Returns:
        By a contender's name, the metrics of its turns: of the reference pass, then of each step.
    """
    metrics = {}
    if torch.cuda.is_available():
        for contender in contenders:
            metrics.update(take_turns_together([contender], config, folder, records_path))
    else:
        metrics.update(take_turns_together(contenders, config, folder, records_path))
    return metrics


def take_turns_together(
    contenders: Sequence[Contender], config, folder: Path, records_path: Path
) -> dict[str, list[dict]]:
    """The same, for contenders that all run at once."""
    spawn = multiprocessing.get_context("spawn")  # unlike a fork, it shares no memory
    metrics = {}
    connections = {}
    processes = []
    most_steps = max(contender.num_steps for contender in contenders)
    try:
        for contender in contenders:
            name = contender.name
            connection, its_end = spawn.Pipe()
            args = (its_end, config, folder, records_path, name, contender.options)
            process = spawn.Process(target=contender.run, args=args)
            process.start()
            its_end.close()  # the contender has a copy; when it ends, so does the connection
            metrics[name] = []
            connections[name] = connection
            processes.append(process)
        for turn in progress(range(1 + WARMUP_STEPS + most_steps), "turns"):
            for contender in contenders:
                if turn < 1 + WARMUP_STEPS + contender.num_steps:
                    # Turn 1 is the first step, in warm-up. Counting its operations takes time.
                    order = "count" if turn == 1 else "go"
                    connection = connections[contender.name]
                    reply = ask(connection, order, contender.name, config.turn_seconds)
                    metrics[contender.name].append(reply)
        for connection in connections.values():
            connection.send("leave")
        for process in processes:
            process.join(timeout=60)
    finally:
        # After an error, the others still wait. A training script would not end on SIGTERM.
        for process in processes:
            process.kill()
            process.join()
    return metrics


def ask(connection, order: str, name: str, time_limit: float) -> dict:
    """Give a contender its turn, and return what it tells.

    Raises UserError if it has ended, or is not done after time_limit seconds.
    """
    try:
        connection.send(order)
        if not connection.poll(time_limit):
            raise UserError(
                f"{name}: not done after {time_limit:g} seconds; give more --turn_seconds"
            )
        return connection.recv()
    except (EOFError, OSError):
        raise UserError(f"{name}: ended early; its error stands above") from None
