"""`make npu-check` on a machine without an NPU: it says what it needs, and its rehearsal on the CPU produces the page."""

import subprocess
import sys
from collections import Counter
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


def test_a_rehearsal_runs_the_communicator(tmp_path):
    done = run("--rehearse", "cpu", "--quick", "--page", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "page.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| collectives |"))
    assert int(row.split("|")[2]) >= 5 and "communicator: 2 ranks, one a device" in text, text


def test_which_way_calls_went_is_counted(tmp_path, monkeypatch):
    """The plugin and the page, with an ascend whose calls were counted; one device runs no communicator and says so."""
    sys.path.insert(0, str(SCRIPT.parent))
    import npu_check
    import npu_served

    from hetero_attn import registry

    monkeypatch.setattr(registry.get("ascend"), "served", Counter({"by the fused operators": 3, "by our two-level kernel": 2}))
    monkeypatch.setenv("HETERO_ATTN_TEST_BACKENDS", "ascend")
    monkeypatch.setenv(npu_served.VARIABLE, str(tmp_path / "served"))
    npu_served.write()
    npu_served.write()
    words = npu_served.read(tmp_path / "served")
    assert words == "4 by our two-level kernel, 6 by the fused operators" and list(tmp_path.iterdir()) == []
    suite = npu_check.Suite("attention conformance", 5, 0, 0, 1.0, words)
    arguments, said = npu_check.collectives_run("ascend", 1, False)
    assert arguments is None and npu_check.collectives_run("ascend", 8, False)[1] == "2 and 3 ranks, one a device"
    text = npu_check.page("ascend", "npu", "Ascend910B2", {}, [suite], [], said)
    assert f"| attention conformance | 5 | 0 | 0 | 1 | {words} |" in text and "communicator: not run, 1 device" in text


def test_bad_arguments(tmp_path):
    assert run("--rehearse", "nothing").returncode == 2
    done = run("--rehearse", "sdpa", "--page", str(tmp_path / "away" / "page.md"))
    assert done.returncode == 2 and "does not exist" in done.stderr
