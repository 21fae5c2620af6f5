"""Which of the built objects serves on this machine: the CPU's best one that can be had and that computes rightly.

Asked for by name, an instruction set serves or the backend is unavailable; otherwise what cannot be built or fails its check is passed over
for the next best, with a note that `hetero-attn doctor` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hetero_attn.jit import BuildError
from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_cpu import calls, self_check
from hetero_attn_cpu.instruction_sets import BY_NAME, InstructionSet, InstructionSetError, asked, of_this_cpu
from hetero_attn_cpu.library import CallError, Library


@dataclass(frozen=True)
class Selected:
    """The object that serves, or the reasons why none does; and what the user should know of it."""

    library: Library | None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def select(name: str | None, load: Callable[[InstructionSet], Library]) -> Selected:
    """Load the object that serves: the instruction set named, else what the environment names, else the best. Compiles if it must."""
    try:
        wanted = asked(name)
    except InstructionSetError as error:
        return Selected(None, (str(error),))
    passed_over: list[str] = []
    for each in [wanted] if wanted else of_this_cpu():
        try:
            library = load(each)
            objection = _tiny_calls(library)
            checked = "" if each.verified or objection else _checked(library, load)
        except (BuildError, CallError, MemoryError) as error:
            passed_over.append(str(error).splitlines()[0])
            continue
        if objection or checked:
            passed_over.append(f"{each.name}: {objection or checked}")
            continue
        return Selected(library, (), (*_notes(library), *(f"not used: {line}" for line in passed_over)))
    return Selected(None, tuple(dict.fromkeys(line.partition("cannot be built: ")[2] or line for line in passed_over)))


def _notes(library: Library) -> list[str]:
    each = library.instruction_set
    unverified = "verified on no real CPU yet; its check against the portable kernels passed here"
    where = f"verified on {each.verified}" if each.verified else unverified
    notes = [f"kernels for {each.name}, {where}"]
    if not library.parallel:
        notes.append("on one thread: torch's kernels here use no OpenMP runtime with GOMP_parallel (libgomp, libomp)")
    return notes


def _checked(library: Library, load: Callable[[InstructionSet], Library]) -> str:
    """'' where an unverified object agrees with the portable one, else what to say of it."""
    found = self_check.objections(library, load(BY_NAME["portable"]))
    return f"verified on no real CPU, and its check failed here: {found[0]} ({len(found)} calls in all)" if found else ""


def _tiny_calls(library: Library) -> str:
    """'' where a tiny attention and a tiny linear give the right numbers."""
    ones, three = torch.ones(1, 1, 2, 8, device="cpu"), torch.empty(2, 3, device="cpu")
    out, _ = calls.attention(library, ones, ones, ones, AttentionSpec("cpu", torch.float32, 1, 1, 1, 2, 2, 8, 8), Operands())
    calls.linear(library, ones[0, 0], torch.ones(3, 8, device="cpu"), None, three)
    return "" if torch.equal(out, ones) and torch.equal(three, torch.full((2, 3), 8.0, device="cpu")) else "a tiny call gave wrong numbers"
