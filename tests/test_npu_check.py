"""`make npu-check` on a machine without an NPU: it says what it needs, and its rehearsal on the CPU produces the page."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "npu_check.py"


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280, cwd=cwd)


def test_says_what_it_needs(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "torch_npu is not installed" in done.stdout and "CANN" in done.stdout and "triton-ascend==3.2.0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_writes_the_page(tmp_path):
    done = run("--rehearse", "sdpa", "--quick", "--page", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "page.md").read_text()
    assert "A rehearsal with backend sdpa" in text and "all suites passed" in text and "prefill 1K" in text and "torch_npu: absent" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_bad_arguments(tmp_path):
    assert run("--rehearse", "nothing").returncode == 2
    done = run("--rehearse", "sdpa", "--page", str(tmp_path / "away" / "page.md"))
    assert done.returncode == 2 and "does not exist" in done.stderr
