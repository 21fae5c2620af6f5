"""Children of a run: started in process groups of their own, ended with all that they started, and what they had said is kept.

A child begins in main(): python -m hetero_attn.testing.gpu.children PARENT MODULE ARGUMENTS... (or PARENT -- COMMAND...), which goes on to
the module or command once it is sure to end when its parent does, however that ends. Ranks that it starts end with it in turn.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hetero_attn.parallel.launch import die_with

ROOT = Path(__file__).parents[3]
GRACE_S = 5.0


def child(module: str, arguments: list[str], limit_s: float, before: tuple[str, ...] = (),
          environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """python -m module in a process group of its own, with this checkout in its path; see ended(). before: a tool that runs it."""
    return ended([started(module, arguments, before, environment)], limit_s)[0]


def started(module: str, arguments: list[str], before: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> subprocess.Popen:
    paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
    # A tool stands between: Python's parent is then the tool, and it is the tool that ends with this process.
    after = ["--", *before, sys.executable, "-m", module] if before else [module]
    command = [sys.executable, "-m", "hetero_attn.testing.gpu.children", str(os.getpid()), *after, *arguments]
    out, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")       # files: a full pipe would stop a child nobody reads
    process = subprocess.Popen(command, env=known, stdout=out, stderr=errors, text=True, start_new_session=True)
    process.told = (out, errors)
    return process


def ended(processes: list[subprocess.Popen], limit_s: float) -> list[subprocess.CompletedProcess]:
    """What children said once all have ended. After limit_s seconds their groups are ended, with all that they started; the return code
    of such a child is -9, and what it had said is kept."""
    deadline, done, late = time.monotonic() + limit_s, [], set()
    try:
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.add(process)
                _kill(process)
    finally:
        for process in processes:
            _kill(process)                           # also where a child has gone and left children of its own
    for process in processes:
        texts = []
        for file in process.told:
            file.seek(0)
            texts.append(file.read())
            file.close()
        done.append(subprocess.CompletedProcess(process.args, -signal.SIGKILL if process in late else process.returncode, *texts))
    return done


def _kill(process: subprocess.Popen) -> None:
    """Asked first and killed after GRACE_S: what tidies up behind the ranks' semaphores lives in the group, too, and is let finish."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:                       # the group is empty
        pass
    process.wait()


def last_words(text: str) -> str:
    """The last three lines in one."""
    return " | ".join((text.strip() or "it said nothing").splitlines()[-3:])


def main(argv: list[str]) -> None:
    """In the child."""
    parent, module, *arguments = argv
    die_with(int(parent))
    if module == "--":
        os.execvp(arguments[0], arguments)           # what ends it with its parent outlives the exec
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
