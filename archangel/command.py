"""A program's command line: settings from a dataclass, one line for what is wrong, exit status."""

import argparse
import contextlib
import dataclasses
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator

import torch.distributed as dist
from tqdm import tqdm

from archangel.errors import Interrupted, UserError

T = typing.TypeVar("T")


def check_settings(config, above_zero: tuple[str, ...] = ()) -> None:
    """Raise UserError for a number out of range: all are at least 0, some above it."""
    above_zero += ("lr", "max_grad_norm", "epochs", "batch_size", "max_prompt_length")
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        if not 0 <= value < math.inf or value == 0 and name in above_zero:
            least = "above" if name in above_zero else "at least"
            raise UserError(f"--{name} {value}: must be a finite number {least} 0")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"--max_prompt_length {config.max_prompt_length}: must be below --max_length "
            f"{config.max_length}, so that a completion has room"
        )


def parse(config_class: type[T], description: str) -> T:
    """The command line as a `config_class`, whose comments are the lines of --help."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))

    def fail(message: str) -> None:
        raise UserError(f"{message} (--help lists the settings)")

    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL [--SETTING VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    for field in dataclasses.fields(config_class):
        required = field.default is dataclasses.MISSING
        line = comments[field.name] + ("" if required else f" (default: {field.default})")
        kind = {"type": str if required else type(field.default)}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif choices := typing.get_args(field.type):
            kind = {"choices": choices}
        arguments = {"required": required, "default": field.default, "help": line, **kind}
        parser.add_argument(f"--{field.name}", **arguments)
    return config_class(**vars(parser.parse_args()))


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Exit with 2 and one line for what the user must mend, with 75 when interrupted."""
    status = 0
    try:
        yield
    except (UserError, OSError, FloatingPointError) as error:  # an OSError names its file
        tqdm.write(f"error: {error}", file=sys.stderr)
        status = 2
    except (Interrupted, KeyboardInterrupt) as error:
        why = str(error) or "the same command starts again; a trainer's with --resume"
        tqdm.write(f"interrupted: {why}", file=sys.stderr)
        status = 75
    if dist.is_initialized():
        # At once: gloo's threads may still hold tensors, and would now and then abort Python's own
        # ending ("terminate called without an active exception"), whatever its status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


def progress(iterable: Iterable[T], description: str) -> Iterable[T]:
    """A bar on process 0 for whatever takes more than a few seconds."""
    return tqdm(iterable, description, delay=2, disable=os.environ.get("RANK", "0") != "0")
