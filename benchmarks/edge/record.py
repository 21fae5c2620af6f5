"""What has been measured: a JSON file that grows step by step, so that a run of half an hour can be broken off and gone on with.

A step is one measurement with a name. With `resume` a step that the file has is not run again; with `steps` no more than so many are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Enough(Exception):
    """As many steps as were asked for have run."""


class Record:
    """results[part][step]; `file` None keeps them in memory alone. A part also holds `machine`: where and when its last step ran."""

    def __init__(self, file: Path | None, machine: Callable[[], dict], *, resume: bool = False, steps: int | None = None) -> None:
        self.file, self._machine, self._resume, self._left = file, machine, resume, steps
        self.results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file is not None and file.exists() else {}
        self._began: set[str] = set()

    def missing(self, part: str, step: str) -> bool:
        """Whether this step is to be run: what it needs beforehand may be dear."""
        return not (self._resume and step in self.results.get(part, {}))

    def step(self, part: str, step: str, measure: Callable[[], Any]) -> Any:
        """The measurement, made now or known. Raises Enough where it would be one too many."""
        if not self.missing(part, step):
            return self.results[part][step]
        if self._left == 0:
            raise Enough
        if not self._resume and part not in self._began:
            self.results.pop(part, None)             # a part that is measured anew has no step of another day
        self._began.add(part)
        found = json.loads(json.dumps(measure()))
        self.results.setdefault(part, {})[step] = found
        self.results[part]["machine"] = self._machine()
        if self._left is not None:
            self._left -= 1
        if self.file is not None:
            fresh = self.file.with_suffix(".part")
            fresh.write_text(json.dumps(self.results, indent=1) + "\n")
            fresh.rename(self.file)
        return found
