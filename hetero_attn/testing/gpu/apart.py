"""One check in a process of its own: python -m hetero_attn.testing.gpu.apart NAME DEVICE SECONDS [--quick] prints its outcome as JSON.

A kernel that reads where it must not takes the whole process's device context with it, and a rank that hangs is ended with all that it
started; either is then one failed line of the page, and the next check begins anew.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch

from hetero_attn.testing.gpu.children import child, last_words
from hetero_attn.testing.gpu.outcome import FAILED, Outcome

if TYPE_CHECKING:
    from hetero_attn.testing.gpu.checks import Check, Run

MARGIN_S = 15.0                        # for a child to end its ranks and say what they did


def apart(check: Check, run: Run) -> Outcome:
    """The check's outcome from a child. Raises TimeoutError where the run's time is up."""
    limit_s = run.left_s()
    arguments = [check.name, str(run.device), f"{max(1.0, limit_s - MARGIN_S):.1f}", *(["--quick"] if run.quick else [])]
    return outcome_of(child("hetero_attn.testing.gpu.apart", arguments, limit_s), limit_s)


def outcome_of(done: subprocess.CompletedProcess, limit_s: float) -> Outcome:
    """What a child said; where it died or was ended, that it did, and its last words."""
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"status"'):
            return Outcome.from_dict(json.loads(line))
    how = f"did not end within {limit_s:.0f} s" if done.returncode == -signal.SIGKILL else f"ended with {done.returncode}"
    return Outcome(FAILED, f"its process {how}: {last_words(done.stderr or done.stdout)}"[:600])


def main(argv: list[str]) -> int:
    from hetero_attn.testing.gpu import checks

    name, device, seconds, *rest = argv
    check = checks.selected(name)[0]
    run = checks.Run(torch.device(device), "--quick" in rest, deadline=time.monotonic() + float(seconds))
    print(json.dumps(checks.carried_out(check, run, inside=True).to_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
