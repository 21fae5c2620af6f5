"""The README and the pages it leads to are true: the table is the code's, what they name exists, the example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_attn.cli import SUBCOMMANDS
from hetero_attn.testing.feature_table import END, START, replaced, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_feature_table_is_the_code_s():
    assert replaced(README) == README, "README.md's table has drifted from the code: run `make table`"


def test_the_check_would_notice_a_drift():
    assert START in README and END in README
    assert replaced(README.replace("| softcap | ", "| softcap | x")) == README
    assert "sdpa*" in table()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    """Files in backquotes from the root, links from the page, make's targets, subcommands."""
    text = page.read_text()
    named = {ROOT / name for name in re.findall(r"`((?:hetero_attn|backends|configs|tests|docs|examples|benchmarks)/[\w./-]+)`", text)}
    linked = {page.parent / name for name in re.findall(r"\]\(([\w./-]+)\)", text)}
    missing = [str(path) for path in named | linked if not path.exists() and path != ROOT / "hetero_attn" / "configs"]
    assert not missing, missing
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    assert set(re.findall(r"(?:`|^)hetero-attn ([a-z]+)", text, re.M)) <= {module.__name__.rpartition(".")[2] for module in SUBCOMMANDS}


def test_the_example_runs(tmp_path):
    assert len((ROOT / "example.py").read_text().splitlines()) <= 34
    import os

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}
    result = subprocess.run([sys.executable, "example.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 32, 128, 64])" in result.stdout and "volta" in result.stdout
