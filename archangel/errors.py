"""The exceptions that end a program with one line instead of a traceback, and its exit status."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """The user can fix this; the message says what is wrong and where (exit status 2)."""


class Interrupted(Exception):
    """A signal ended the program, and its work is saved (exit status 75, as after Ctrl-C)."""


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Run the body of a program, and end the process with its exit status.

    0: done. 2: something that the user can fix, in one line: wrong input, a file that cannot be
    read or written, numbers that are not finite. 75: interrupted; the same command continues, or
    starts again. Anything else is a fault of the program, and ends with its traceback.
    """
    status = 0
    try:
        yield
    except (UserError, OSError, FloatingPointError) as error:  # most OSErrors name their file
        tqdm.write(f"error: {error}", file=sys.stderr)
        status = 2
    except (Interrupted, KeyboardInterrupt) as error:
        reason = str(error) or "start it again; a training run that was begun needs --resume"
        tqdm.write(f"interrupted: {reason}", file=sys.stderr)
        status = 75
    if dist.is_initialized():
        # Leave at once: threads of torch.distributed may still hold tensors, and now and then they
        # abort Python's own ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status != 0:
        sys.exit(status)
