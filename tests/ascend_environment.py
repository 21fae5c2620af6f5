"""Make a virtual environment for the Ascend tests: python tests/ascend_environment.py torch-npu|triton-ascend [--into .venv-ascend].

torch_npu breaks `import torch` where CANN is missing, and triton-ascend *is* the package `triton`; so each gets an environment of its own,
which sees the main one's packages behind its own. Versions are constraints.txt's. Prints the environment's Python. Exit code 3, with the
reason on stderr: the wheel cannot be had (no network, no wheel for this platform), which `make test-ascend` takes as a skip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch-npu", "triton-ascend")
ALSO = {"triton-ascend": ("pybind11",)}     # imported by the wheel, named by no requirement of it
UNAVAILABLE = 3


def pin(package: str) -> str:
    """'torch-npu==2.13.0' from constraints.txt. Raises LookupError."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.split()[0]
    raise LookupError(f"constraints.txt does not pin {package}")


def make(package: str, into: Path) -> Path:
    """The environment's Python; made or completed where it is not there. Raises RuntimeError with pip's own last words."""
    folder = into / package
    pins = [pin(each) for each in (package, *ALSO.get(package, ()))]
    stamp, python = folder / f".{'-'.join(pins)}", folder / "bin" / "python"
    if stamp.exists():
        return python
    venv.EnvBuilder(clear=True, with_pip=False, symlinks=True).create(folder)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "zz_main_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--retries", "1", "--timeout", "30", *pins]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{', '.join(pins)}: {([*done.stderr.strip().splitlines()] or ['pip said nothing'])[-1]}")
    stamp.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--into", type=Path, default=ROOT / ".venv-ascend", help="folder of the environments")
    args = parser.parse_args()
    try:
        print(make(args.package, args.into))
    except RuntimeError as error:
        print(f"ascend_environment: {error}", file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
