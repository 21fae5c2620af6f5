"""The C++ compiler of this machine: which one, or why there is none.

CXX decides where it is set, as everywhere; else the first of the usual names on PATH. "There is one" means that it answered --version.
A kernel built here is keyed by the compiler's path, version and target, so that a new compiler builds anew.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass

NAMES = ("g++", "c++", "clang++")
REMEDY = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX to its path"
ANSWER_S = 60


@dataclass(frozen=True)
class Compiler:
    """A compiler that answers: its command line (a wrapper such as ccache included), first line of --version, and target triple."""

    command: tuple[str, ...]
    version: str
    target: str


def environment() -> dict[str, str]:
    """The compiler's environment: ours, but its messages in English."""
    return {**os.environ, "LC_ALL": "C"}


def find_compiler(asked: str | None = None) -> Compiler | str:
    """The compiler `asked` for (a command line), else CXX, else the first usual one on PATH; or the reason why there is none."""
    return _find(asked, os.environ.get("CXX"), os.environ.get("PATH"))


def compiler_reason(asked: str | None = None) -> str | None:
    """Why there is no usable C++ compiler, with the remedy; None = there is one."""
    found = find_compiler(asked)
    return found if isinstance(found, str) else None


@functools.cache
def _find(asked: str | None, variable: str | None, path: str | None) -> Compiler | str:
    named, origin = (asked, "the compiler asked for") if asked else (variable, "CXX")
    if named and named.strip():
        try:
            return _ask(tuple(shlex.split(named)), f"{origin} is {named!r}, which")
        except ValueError as error:
            return f"{origin} is {named!r}, not a command line ({error}); {REMEDY}"
    reasons = []
    for name in NAMES:
        if shutil.which(name, path=path):
            found = _ask((name,), name)
            if isinstance(found, Compiler):
                return found
            reasons.append(found)
    return reasons[0] if reasons else f"no C++ compiler: none of {', '.join(NAMES)} is on PATH; {REMEDY}"


def _ask(command: tuple[str, ...], subject: str) -> Compiler | str:
    program = shutil.which(command[0])
    if program is None:
        return f"{subject} is not an executable on PATH; {REMEDY}"
    command, answers = (program, *command[1:]), []
    for question in ("--version", "-dumpmachine"):
        try:
            done = subprocess.run([*command, question], capture_output=True, text=True, errors="replace", env=environment(),
                                  timeout=ANSWER_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{subject} does not run ({error}); {REMEDY}"
        if done.returncode or not done.stdout.strip():
            words = (done.stderr or done.stdout).strip().splitlines()
            return f"{subject} does not answer {question} (exit code {done.returncode}{': ' + words[-1] if words else ''}); {REMEDY}"
        answers.append(done.stdout.strip().splitlines()[0])
    return Compiler(command, *answers)
