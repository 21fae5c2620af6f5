"""One check in a process of its own (inside.py), and what came of it.

A kernel that reads where it must not takes the whole process's device context with it, and a rank that hangs is ended with all that it
started; either is then one failed line of the page, and the next check begins anew.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time

import torch

from hetero_attn.testing.gpu.children import child, last_words
from hetero_attn.testing.gpu.outcome import FAILED, Outcome

MARGIN_S = 15.0                        # for a child to end its ranks and say what they did


def apart(name: str, device: torch.device, quick: bool, limit_s: float) -> Outcome:
    """The outcome of the check of that name from a child, which is ended after limit_s seconds."""
    deadline = time.monotonic() + max(1.0, limit_s - MARGIN_S)                  # one clock for all processes of a machine
    arguments = [name, str(device), f"{deadline:.1f}", *(["--quick"] if quick else [])]
    return outcome_of(child("hetero_attn.testing.gpu.inside", arguments, limit_s), limit_s)


def outcome_of(done: subprocess.CompletedProcess, limit_s: float) -> Outcome:
    """What a child said; where it died or was ended, that it did, and its last words."""
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"status"'):
            return Outcome.from_dict(json.loads(line))
    how = f"did not end within {limit_s:.0f} s" if done.returncode == -signal.SIGKILL else f"ended with {done.returncode}"
    return Outcome(FAILED, f"its process {how}: {last_words(done.stderr or done.stdout)}"[:600])
