"""Where a trace goes: whether a path can take one, before anything runs, and the writing of it.

A regular file is replaced in one step, behind whatever links lead to it, so that a reader or a full disk leaves the old trace or the new
one. Pipes and character devices (`>(gzip)`, /dev/null) are written into: replaced, they would be gone.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hetero_attn.parallel.trace import Event, chrome_trace

OWN_STREAMS = (1, 2)                                 # stdout, stderr


def write_trace(path: str | os.PathLike, ranks: Sequence[Sequence[Event]]) -> None:
    """Write the Chrome trace of all ranks to `path`: a regular file whole or not at all. Raises OSError."""
    text, target, found = json.dumps(chrome_trace(ranks)), _target(path), _found(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    draft = target.with_name(f".trace-{secrets.token_hex(8)}")
    try:
        with open(draft, "x", encoding="utf-8") as file:         # as the umask has it, which mkstemp does not ask
            if found is not None:
                with suppress(OSError):                          # not every file system keeps modes
                    os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
            file.write(text)
        os.replace(draft, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def objection(path: str | os.PathLike) -> str | None:
    """Why no trace can be written to `path`, as far as can be known beforehand; None: it can."""
    try:
        found, target = _found(path), _target(path)
    except OSError as error:
        return f"which cannot be looked at ({error.strerror}); name a file in a folder of yours"
    if found is not None and not stat.S_ISREG(found.st_mode):
        if not (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            return "expected a file in a folder that exists, or a pipe"
        return None if os.access(path, os.W_OK) else "which cannot be written; name a file in a folder of yours"
    if target.is_symlink() or not target.parent.is_dir():        # a link that leads to itself stays one
        return "expected a file in a folder that exists"
    if found is not None and any(_same(found, stream) for stream in OWN_STREAMS):
        return "which is where this command's own output goes; name another file"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"and a file in {target.parent} cannot be replaced: that folder cannot be written; name a file in a folder of yours"
    if found is not None and not os.access(target, os.W_OK):
        return "which cannot be written; name a file in a folder of yours"
    return None


def settled(path: str | os.PathLike) -> Path:
    """`path` as ranks that are started from here can use it: absolute, and /dev/fd/63 as this process's own."""
    return Path(os.path.realpath(Path(path).parent)) / Path(path).name


def _target(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(path))


def _found(path: str | os.PathLike) -> os.stat_result | None:
    """What is at `path`, links followed; None: nothing, or a link to nothing."""
    try:
        return os.stat(Path(path))                               # '' is the folder, too
    except (FileNotFoundError, NotADirectoryError):
        return None


def _same(found: os.stat_result, stream: int) -> bool:
    try:
        return os.path.samestat(found, os.fstat(stream))
    except OSError:                                              # closed
        return False
