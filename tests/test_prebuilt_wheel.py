"""A wheel that carries its kernels: built from a checkout with a kernel of a few lines, installed, and used where there is no compiler.

The checkout is a copy whose csrc/ and backends/ hold that kernel alone; the real ones are compiled by `hetero-attn build`'s users.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from native import needs_compiler, write_sources

ROOT = Path(__file__).parents[1]
BACKEND = '''"""A backend that declares one kernel."""
from hetero_attn.backend import Backend
from hetero_attn.jit import Kernel


class TinyBackend(Backend):
    name = "tiny"

    def kernels(self):
        return [Kernel("tiny", ["tiny/tiny.cpp"], abi_version=1)]


backend = TinyBackend
'''
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed (pip install 'hetero-attn[dev]')")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "hatch_build.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("hetero_attn", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_sources(folder / "csrc" / "tiny")
    (folder / "backends" / "hetero_attn_tiny").mkdir(parents=True)
    (folder / "backends" / "hetero_attn_tiny" / "__init__.py").write_text(BACKEND)
    return folder


def build(checkout: Path, out: Path, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, checkout]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)


def test_it_works_without_a_compiler(checkout, tmp_path):
    built = build(checkout, tmp_path / "dist", HETERO_ATTN_PREBUILD="1")
    assert built.returncode == 0, built.stderr
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    carried = [name for name in zipfile.ZipFile(wheel).namelist() if "/prebuilt/" in name]
    assert sorted(Path(name).suffix for name in carried) == [".json", ".so"]

    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run(install, check=True, timeout=240)
    program = (
        "import hetero_attn, hetero_attn_tiny\n"
        "from hetero_attn.jit import compiler_reason\n"
        "kernel, = hetero_attn_tiny.backend().kernels()\n"
        "print(hetero_attn.__file__, kernel.find(), compiler_reason(), kernel.try_load().answer(), sep='\\n')"
    )
    (tmp_path / "empty").mkdir()
    environment = {"PATH": str(tmp_path / "empty"), "PYTHONPATH": str(place), "HETERO_ATTN_CACHE_DIR": "/dev/null/cache"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    package, found, reason, answer = result.stdout.splitlines()
    assert Path(package).is_relative_to(place) and Path(found).is_relative_to(place / "hetero_attn" / "csrc" / "prebuilt")
    assert "no C++ compiler" in reason and answer == "42"


def test_without_the_variable_it_stays_pure(checkout, tmp_path):
    assert build(checkout, tmp_path, HETERO_ATTN_PREBUILD="0").returncode == 0
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hetero_attn/csrc/tiny/tiny.cpp" in names and not [name for name in names if "prebuilt" in name]


def test_a_kernel_that_does_not_compile_stops_the_wheel(checkout, tmp_path):
    built = build(checkout, tmp_path, HETERO_ATTN_PREBUILD="1", CXX="no-such-compiler")
    assert built.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "CXX is 'no-such-compiler'" in built.stdout + built.stderr and "could not be built" in built.stdout + built.stderr
