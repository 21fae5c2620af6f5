"""docs/add_a_backend.md, followed to the letter: its shell blocks are run, in order, in a folder outside the tree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add_a_backend.md"


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


def test_the_page_builds_a_backend_that_passes_the_suite(tmp_path):
    assert len(blocks()) == 6
    script = "set -euo pipefail\n" + "\necho '--- next block ---'\n".join(blocks())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HETERO_ATTN") and k != "PYTHONPATH"}
    environment |= {"HETERO_ATTN": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    parts = result.stdout.split("--- next block ---\n")
    assert parts[1].strip() == "mychip"
    doctor_and_explain = parts[3]
    assert re.search(r"^  mychip +runs here \(cpu\)", doctor_and_explain, re.M)
    assert "cannot: head_dim is 512, mychip has up to 256" in doctor_and_explain
    assert re.search(r"^choice +sdpa$", doctor_and_explain, re.M)
    suite = parts[4]
    passed, skipped = (int(re.search(rf"(\d+) {word}", suite)[1]) for word in ("passed", "skipped"))
    assert passed > 100 and skipped > 0
    assert "torch.Size([1, 32, 128, 64])" in parts[5]
    assert not (ROOT / "backends" / "hetero_attn_mychip").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the page's commands are a POSIX shell's")
def test_a_backend_that_is_wrong_does_not_pass(tmp_path):
    """The page's promise is worth something only if the suite refuses: the same copy, with the scale forgotten."""
    script = "set -euo pipefail\n" + "\n".join(blocks()[:3]) + (
        "\nsed -i 's/v, spec.scale, /v, 1.0, /; s/v_chunk, spec.scale, /v_chunk, 1.0, /' hetero_attn_mychip/dense.py\n"
        "HETERO_ATTN_TEST_BACKENDS=mychip python -m pytest -q -x -p no:cacheprovider --pyargs hetero_attn.testing.test_attention\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HETERO_ATTN") and k != "PYTHONPATH"}
    environment |= {"HETERO_ATTN": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 1 and "1 failed" in result.stdout
