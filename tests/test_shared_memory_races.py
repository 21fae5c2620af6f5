"""The shared-memory collectives under the thread and address sanitizers, with threads for ranks (shared_memory_driver.cpp).

A checker that has never complained proves little: two faults are seeded into copies of the sources, and must be found.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hetero_attn.compiler import Compiler, find_compiler

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("shared_memory_driver.cpp")
FULL = os.environ.get("HETERO_ATTN_FULL") == "1"
CALLS = 6000 if FULL else 600
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(not isinstance(find_compiler(), Compiler), reason="no C++ compiler")]

FAULTS = {                                           # file, what is replaced, by what
    "a post that orders nothing": ("shared_group.h", "++step, std::memory_order_release", "++step, std::memory_order_relaxed"),
    "no step after the last chunk": ("shared_pieces.h", "chunks || publish || any_in_place) g.post();", "chunks) g.post();"),
}


def build(folder: Path, sanitizer: str, csrc: Path = ROOT / "csrc") -> Path:
    program = folder / f"driver-{sanitizer.partition(',')[0]}"
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-ffp-contract=fast", "-fno-math-errno", "-DHETERO_ATTN_PORTABLE"]
    command = [*find_compiler().command, *flags, f"-I{csrc}", str(DRIVER), str(csrc / "cpu" / "shared_memory.cpp"), "-pthread",
               "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and ("-fsanitize" in done.stderr or "lib" + {"t": "tsan"}.get(sanitizer[0], "asan") in done.stderr):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, ranks: int, calls: int, timeout_s: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run([str(program), str(ranks), str(calls), str(ranks + 5)], capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_race_and_nothing_out_of_bounds(tmp_path, sanitizer):
    program = build(tmp_path, sanitizer)
    for ranks in (2, 3, 4):
        done = run(program, ranks, CALLS)
        assert (done.returncode, done.stdout) == (0, f"ok {CALLS}\n"), (done.stdout + done.stderr)[-4000:]
        assert "runtime error" not in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(tmp_path, fault):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "cpu", csrc / "cpu")
    name, right, wrong = FAULTS[fault]
    text = (csrc / "cpu" / name).read_text()
    assert text.count(right) == 1, f"{name} has changed: seed the fault anew"
    (csrc / "cpu" / name).write_text(text.replace(right, wrong))
    try:
        done = run(build(tmp_path, "thread", csrc), 2, 300, timeout_s=60)
    except subprocess.TimeoutExpired:
        return                                       # out of step: found as well
    assert done.returncode != 0 and ("data race" in done.stderr or "expected" in done.stdout), done.stdout + done.stderr[-2000:]
