"""How a command ends when it cannot do what was asked: one line on stderr and an exit code, never a traceback.

2 is the caller's to mend (a wrong argument, a bad file), 1 is ours or the machine's (a lost rank, no memory, a bug), 130 is Ctrl-C, 141 a
reader that has gone. HETERO_ATTN_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback

from hetero_attn.artifacts import CacheError
from hetero_attn.backend import UnsupportedError
from hetero_attn.communicator import CommunicatorError
from hetero_attn.jit import BuildError
from hetero_attn.models.config import ModelError
from hetero_attn.models.sampling import LogitsError
from hetero_attn.parallel.placement import DeviceMemoryError
from hetero_attn.parallel.window import WindowError
from hetero_attn.profile import ProfileError
from hetero_attn.registry import UnknownBackendError

BAD_REQUEST, FAILED, INTERRUPTED, READER_GONE = 2, 1, 130, 141


class CommandError(ValueError):
    """A wrong argument or file, in one line that says what was expected."""


class CommandFailed(RuntimeError):
    """The request was right and could not be carried out, in one line."""


REFUSED = (CommandError, DeviceMemoryError, ModelError, ProfileError, UnknownBackendError, UnsupportedError)
BROKE = (BuildError, CacheError, CommandFailed, CommunicatorError, LogitsError, MemoryError, WindowError)


def one_line(error: BaseException) -> str:
    """The error's text, its lines joined."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines) or type(error).__name__


def report(error: BaseException) -> int:
    """Prints what there is to say about the error that ended a command; returns its exit code."""
    if os.environ.get("HETERO_ATTN_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        silence_stdout()
        return READER_GONE
    if isinstance(error, REFUSED):
        code, text = BAD_REQUEST, one_line(error)
    elif isinstance(error, OSError):
        code, text = BAD_REQUEST, f"{error.filename}: {error.strerror}" if error.filename else error.strerror or one_line(error)
    elif isinstance(error, BROKE) or type(error).__name__ == "OutOfMemoryError":
        code, text = FAILED, one_line(error)
    else:
        code, text = FAILED, f"{type(error).__name__}: {one_line(error)} (this is a bug; HETERO_ATTN_DEBUG=1 shows where)"
    print(f"hetero-attn: error: {text}", file=sys.stderr, flush=True)
    return code


def silence_stdout() -> None:
    """What is left in stdout's buffer goes nowhere, so that the interpreter does not complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
