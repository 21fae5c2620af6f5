"""The page that a run leaves in docs/measured/<device>.md: where, when and with what, each check's verdict, and the tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from hetero_attn.testing.gpu.outcome import BELOW, FAILED, Outcome

ROOT = Path(__file__).parents[3]


def page_path(device_name: str) -> Path:
    """docs/measured/nvidia_h100_80gb_hbm3.md for 'NVIDIA H100 80GB HBM3'."""
    return ROOT / "docs" / "measured" / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".md")


def versions() -> dict[str, str]:
    """What is installed, as far as it matters."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
             "CUDA": str(torch.version.cuda), "ROCm": str(torch.version.hip)}
    for package in ("torch", "triton", "flash-attn", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found["commit"] = done.stdout.strip() or "unknown"
    return found


def text_of(device_name: str, known: dict[str, str], outcomes: dict[str, Outcome], *, quick: bool, rehearsal: bool) -> str:
    """The page in Markdown."""
    lines = [f"# {device_name}: gpu-check", ""]
    if rehearsal:
        lines += ["**A rehearsal on a CPU: nothing here says anything of a GPU.**", ""]
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    installed = ", ".join(f"{name} {value}" for name, value in known.items())
    lines += [f"{when}, `make gpu-check`{' --quick' if quick else ''}; {installed}.", ""]
    lines += ["| check | verdict | seconds | |", "|---|---|---|---|"]
    for name, each in outcomes.items():
        first = _cell((each.text.splitlines() or [""])[0])
        lines.append(f"| {name} | {_marked(each.status)} | {each.seconds:.0f} | {first} |")
    for name, each in outcomes.items():
        rest = each.text.splitlines()
        if not (each.figures or each.table or len(rest) > 1):
            continue
        lines += ["", f"## {name}", ""]
        if len(rest) > 1:
            lines += [*(f"- {line.strip()}" for line in rest), ""]
        lines += [f"- {figure}" for figure in each.figures]
        if each.table:
            head, *rows = each.table
            lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            lines += ["| " + " | ".join(_cell(field) for field in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _marked(status: str) -> str:
    return f"**{status}**" if status in (FAILED, BELOW) else status


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def written(path: Path, text: str) -> None:
    """In one step. Raises OSError."""
    handle, draft = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
