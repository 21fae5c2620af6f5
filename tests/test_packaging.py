"""The wheel holds what a user needs and runs from there: packages of both trees, profiles, kernel sources, the command."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed (pip install 'hetero-attn[dev]')")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    subprocess.run(build, check=True, timeout=240)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_both_trees_profiles_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("hetero_attn/ops.py", "hetero_attn_sdpa/__init__.py", "hetero_attn/configs/cpu.yaml", "hetero_attn/configs/v100.yaml",
                   "hetero_attn/configs/profile.schema.json", "hetero_attn/testing/attention.py"):
        assert wanted in names, wanted
    assert not [n for n in names if n.startswith(("tests/", "examples/", "backends/", "benchmarks/"))]
    entry_points = next(n for n in names if n.endswith("entry_points.txt"))
    assert "hetero-attn = hetero_attn.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import hetero_attn, torch, pathlib; from hetero_attn.profile import shipped_profiles;"
        "q = torch.randn(1, 4, 3, 16); print(hetero_attn.attention(q, q, q, is_causal=True).shape);"
        f"root = pathlib.Path({str(tmp_path)!r}).resolve();"
        "assert pathlib.Path(hetero_attn.__file__).resolve().is_relative_to(root), hetero_attn.__file__;"
        "assert all(path.resolve().is_relative_to(root) for path in shipped_profiles().values())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 4, 3, 16])" in result.stdout


def test_a_bare_checkout_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}
    command = [sys.executable, "-m", "hetero_attn", "doctor", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert '"name": "sdpa"' in result.stdout
