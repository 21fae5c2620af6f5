"""A pytest plugin for npu_check.py: which way attention calls went in the run, by the tested backends' own counts, written to a file."""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path

VARIABLE = "NPU_CHECK_SERVED"


def write() -> None:
    """Add this process's counts to the file that NPU_CHECK_SERVED names."""
    target = os.environ.get(VARIABLE)
    if not target:
        return
    from hetero_attn import registry

    total: Counter = Counter()
    for name in filter(None, os.environ.get("HETERO_ATTN_TEST_BACKENDS", "").split(",")):
        total.update(getattr(registry.get(name), "served", {}))
    if total:
        with open(target, "a") as file:
            file.write(json.dumps(total) + "\n")


def read(target: Path) -> str:
    """The file's counts in words, '' where there are none; the file is gone afterwards."""
    if not target.exists():
        return ""
    total: Counter = Counter()
    for line in target.read_text().splitlines():
        total.update(json.loads(line))
    target.unlink()
    return ", ".join(f"{count} {way}" for way, count in sorted(total.items()))


def pytest_configure(config) -> None:
    atexit.register(write)
