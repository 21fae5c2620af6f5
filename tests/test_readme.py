"""The README is true: its table is the code's, the files it names exist, its example runs."""

import re
import subprocess
import sys
from pathlib import Path

from hetero_attn.testing.feature_table import END, START, replaced, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_feature_table_is_the_code_s():
    assert replaced(README) == README, "README.md's table has drifted from the code: run `make table`"


def test_the_check_would_notice_a_drift():
    assert START in README and END in README
    assert replaced(README.replace("| softcap | ", "| softcap | x")) == README
    assert "sdpa*" in table()


def test_files_and_commands_named_exist():
    pages = [README, (ROOT / "DESIGN.md").read_text(), (ROOT / "docs" / "add_a_backend.md").read_text()]
    named = set(re.findall(r"`((?:hetero_attn|backends|configs|tests|docs|examples|benchmarks)/[\w./-]+)`", "\n".join(pages)))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    missing = [name for name in named if not (ROOT / name.rstrip("/")).exists() and name not in ("hetero_attn/configs",)]
    assert not missing, missing
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.M)):
        name = "".join(target)
        assert re.search(rf"^{name}:", makefile, re.M), f"README names `make {name}`, the Makefile has none"


def test_the_subcommands_named_exist():
    from hetero_attn.cli import SUBCOMMANDS

    names = {module.__name__.rpartition(".")[2] for module in SUBCOMMANDS}
    assert set(re.findall(r"hetero-attn ([a-z]+)", README)) <= names


def test_the_example_runs(tmp_path):
    assert len((ROOT / "example.py").read_text().splitlines()) <= 34
    import os

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}
    result = subprocess.run([sys.executable, "example.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 32, 128, 64])" in result.stdout and "volta" in result.stdout
