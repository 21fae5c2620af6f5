"""The compiled switch: from the user's cache, or made now by the system's compiler.

Not by hetero_attn.jit: importing hetero_attn imports torch, which takes seconds, and the links are a tool for any program. The object is
known by a digest of its source, the compiler and the machine, and is renamed into place whole. Root loads it: the folder must be root's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from links.command import LinksError, command

SOURCE = Path(__file__).with_name("switch.cpp")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")


@functools.cache
def compiler() -> tuple[list[str], str] | None:
    """The C++ compiler's command (CXX, else the first usual one that answers) and its version; None = there is none."""
    for asked in filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"]):
        words = shlex.split(asked)
        if words and shutil.which(words[0]):
            done = subprocess.run([*words, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode == 0 and done.stdout:
                return words, done.stdout.splitlines()[0]
    return None


def compiler_reason() -> str | None:
    """Why the switch cannot be compiled, with the remedy; None = it can."""
    return None if compiler() else "no C++ compiler; install one (Debian, Ubuntu: apt install g++) or set CXX to its path"


def switch_library() -> str:
    """The path of the shared object; compiled in a second where it is not in the cache. Raises LinksError."""
    found = compiler()
    if found is None:
        raise LinksError(f"the switch cannot be compiled: {compiler_reason()}")
    words, version = found
    facts = repr((SOURCE.read_bytes(), version, FLAGS, platform.machine(), platform.libc_ver()))
    made = cache_folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
            part = Path(scratch) / made.name
            command(*words, *FLAGS, str(SOURCE), "-o", str(part))
            part.rename(made)
    return str(made)


def cache_folder() -> Path:
    """links_switch in the project's cache folder (HETERO_ATTN_CACHE_DIR, XDG_CACHE_HOME or ~/.cache), made where it is not there.

    Raises LinksError where it cannot be made or others may write into it."""
    own, base = os.environ.get("HETERO_ATTN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(own).expanduser() if own else Path(base if os.path.isabs(base) else Path.home() / ".cache") / "hetero_attn"
    folder = parent.absolute() / "links_switch"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise LinksError(f"{folder}: {error.strerror}; set HETERO_ATTN_CACHE_DIR to a folder of yours") from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise LinksError(f"{folder} can be written by others, and we load what lies there; set HETERO_ATTN_CACHE_DIR to a folder of yours")
    return folder
