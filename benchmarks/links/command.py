"""Running a command of the system, and the one error that everything here ends in. Standard library only: guard.py starts quickly."""

from __future__ import annotations

import subprocess


class LinksError(RuntimeError):
    """The emulated network cannot be made, or broke. The text says what was tried and what the system said."""


def command(*words: str, text: str | None = None) -> str:
    """Run a command and return its output. Raises LinksError with the command and its last words."""
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, errors="replace", timeout=60,
                              stdin=subprocess.DEVNULL if text is None else None)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinksError(f"{' '.join(words)}: {error}") from None
    if done.returncode:
        given = f" <<< {text.strip()!r}" if text else ""
        raise LinksError(f"{' '.join(words)}{given}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
