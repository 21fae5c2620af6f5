"""The collectives conformance suite on groups that a machine with one GPU can have: two ranks on it, one rank alone, a GPU and a CPU rank.

Each rank writes down what it begins and what it has found, line by line, so a rank that dies or hangs has said where, and the rest counts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.testing.collective_cases import CASES
from hetero_attn.testing.collectives import Found, suite_names, together, whole_suite
from hetero_attn.testing.gpu.groups import OVERLAPPING, Group, groups_of, joined, objections
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, SKIPPED, Outcome

SHOWN, SHOWN_LETTERS, QUICK_SHARE = 5, 300, 6


@dataclass
class Journal:
    """What one rank has written: found by name, and what it had begun and not ended, '' = nothing."""

    found: dict[str, Found]
    begun: str = ""

    @classmethod
    def read(cls, path: Path) -> Journal:
        journal = cls({})
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                name, found = json.loads(line)
            except ValueError:                       # the rank was killed within a line
                continue
            journal.begun = name if found is None else ""
            if found is not None:
                journal.found[name] = tuple(found)
        return journal


def in_rank(group: Group, share: int, folder: str) -> tuple[str, dict[str, int]]:
    """One rank's part: (what serves, why calls were left to its base and how many)."""
    with joined(group) as communicator:
        run_in(communicator, share, Path(folder) / f"rank.{communicator.rank}")
        return described(communicator), dict(getattr(communicator, "objections", {}))


def run_in(communicator: Communicator, share: int, path: Path) -> None:
    """Every `share`-th case and all behaviours on this rank, written to `path` as they go."""
    with path.open("w", buffering=1) as file:
        whole_suite(communicator, CASES[::share], lambda name, found: file.write(json.dumps([name, found]) + "\n"))


def described(communicator: Communicator) -> str:
    """'HopperCommunicator (unicast, by CUDA IPC)'."""
    said = [str(getattr(communicator, name)) for name in ("door", "how") if getattr(communicator, name, None)]
    return type(communicator).__name__ + (f" ({', by '.join(said)})" if said else "")


def summed(names: Sequence[str], journals: Sequence[Journal]) -> dict[str, Any]:
    """What all ranks found, together: {"passed", "failures", "failed": {name: text}, "left": how many not every rank has run}."""
    failed, passed, left = {}, 0, 0
    for name in names:
        found = [journal.found.get(name) for journal in journals]
        known = [each for each in found if each is not None]
        complaint = next((f"rank {rank}: {each[0]}" for rank, each in enumerate(found) if each is not None and each[0]), None)
        if complaint is None and len(known) < len(found):
            left += 1
            continue
        complaint = complaint or together(known)
        if complaint:
            failed[name] = complaint[-1500:]
        else:
            passed += 1
    return {"passed": passed, "failures": len(failed), "failed": failed, "left": left}


def suite_on(group: Group, limit_s: float, share: int = 1) -> tuple[str, list[str], dict[str, Any]]:
    """The suite on one group: (status, lines, figures). A group that does not end within limit_s is ended, and what it had done counts."""
    if reasons := objections(group):
        return SKIPPED, [f"{group}: {'; '.join(reasons)}"], {}
    names, began, trouble, served = suite_names(CASES[::share]), time.monotonic(), "", [(group.communicator, {})]
    with tempfile.TemporaryDirectory(prefix="hetero-attn-suite-") as folder:
        try:
            served = run_ranks(in_rank, (group, share, folder), len(group.devices), timeout_s=limit_s, env=OVERLAPPING)
        except RankFailure as failure:
            trouble = str(failure)
        journals = [Journal.read(Path(folder) / f"rank.{rank}") for rank in range(len(group.devices))]
    found = summed(names, journals) | {"seconds": round(time.monotonic() - began, 1)}
    text = f"{group}: {served[0][0]}: {found['passed']} of {len(names)} cases passed, {found['failures']} failed"
    lines = [text + (f", {found['left']} not reached" if found["left"] else "") + f", in {found['seconds']} s"]
    if trouble:
        at = "; ".join(f"rank {rank} was at {journal.begun}" for rank, journal in enumerate(journals) if journal.begun)
        lines.append(f"  {trouble}" + (f" ({at})" if at else ""))
    lines += [f"  {name}: {_one_line(words)}" for name, words in list(found["failed"].items())[:SHOWN]]
    lines += [f"  left to the base: {reason} ({count} calls)" for reason, count in _most(served[0][1])]
    right = not trouble and not found["failures"] and not found["left"] and found["passed"]
    return PASSED if right else FAILED, lines, found


def suite(device: torch.device, limit_s: float, quick: bool = False, twin: str = "hopper") -> Outcome:
    """The suite on every group, one after the other, each within its share of the time that is left."""
    began, status, lines, details = time.monotonic(), SKIPPED, [], {}
    wanted = groups_of(device, twin)
    for place, group in enumerate(wanted):
        share_s = (limit_s - (time.monotonic() - began)) / (len(wanted) - place)
        verdict, said, details[group.name] = suite_on(group, max(share_s, 1.0), QUICK_SHARE if quick else 1)
        lines += said
        status = FAILED if FAILED in (verdict, status) else PASSED if PASSED in (verdict, status) else SKIPPED
    return Outcome(status, "\n".join(lines), details=details)


def _most(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda each: -each[1])[:SHOWN]


def _one_line(text: str) -> str:
    """A complaint's last words: of a traceback the exception."""
    last = text.strip().splitlines()[-1] if text.strip() else text
    return (last if "Traceback" in text else " ".join(text.split()))[:SHOWN_LETTERS]
