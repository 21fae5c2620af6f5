"""Which instruction sets the kernels are built for, which of them this CPU has, and which one serves.

One object per set, chosen here when the process starts to use them: a compiler given -mavx512f uses it everywhere, so a choice inside one
object would be no choice. HETERO_ATTN_CPU_INSTRUCTION_SET forces one. `verified` says where a set has run for real; a set that nobody has
run serves only after its self-check against the portable one (self_check.py).
"""

from __future__ import annotations

import difflib
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "HETERO_ATTN_CPU_INSTRUCTION_SET"
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


class InstructionSetError(ValueError):
    """The set that was asked for is unknown, or this CPU lacks it. The text says which there are."""


@dataclass(frozen=True)
class InstructionSet:
    """One set of instructions and what it asks for."""

    name: str
    machines: tuple[str, ...]                        # platform.machine() in lower case; () = any
    features: tuple[str, ...]                        # what the CPU must have, in Linux's words
    flags: tuple[str, ...]                           # what the compiler must be told
    verified: str | None                             # on which real CPU the conformance suite has passed; None = on none

    def obstacle(self, machine: str, features: frozenset[str]) -> str | None:
        """Why a CPU of this family with these features cannot run it, as the end of 'this CPU …'; None = it can."""
        if self.machines and machine not in self.machines:
            return f"is of another family ({machine}, expected {' or '.join(self.machines)})"
        lacking = [feature for feature in self.features if feature not in features]
        return f"lacks {', '.join(lacking)}" if lacking else None


_AVX2, _AVX512 = ("avx2", "fma", "f16c"), ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_ZEN = "AMD EPYC families 25 (Zen 4) and 26 (Zen 5)"

# Best first.
SETS = (
    InstructionSet("avx512bf16", X86, (*_AVX2, *_AVX512, "avx512_bf16"), (*_AVX512_FLAGS, "-mavx512bf16"), _ZEN),
    InstructionSet("avx512", X86, (*_AVX2, *_AVX512), _AVX512_FLAGS, _ZEN),
    InstructionSet("avx2", X86, _AVX2, _AVX2_FLAGS, _ZEN),
    InstructionSet("neon", ARM, ("asimd",), (), None),                 # every 64-bit ARM CPU has it: no flag to give
    InstructionSet("portable", (), (), ("-DHETERO_ATTN_PORTABLE",), _ZEN),           # or vec.h would take what the compiler has by default
)
BY_NAME = {each.name: each for each in SETS}


def this_machine() -> str:
    return platform.machine().lower()


@cache
def cpu_features() -> frozenset[str]:
    """What this CPU has, in Linux's words: /proc/cpuinfo, or on other systems what torch found."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    listed = [line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() in ("flags", "Features")]
    if listed:                                       # cores may differ (big and little ones): what all of them have
        return frozenset.intersection(*map(frozenset, listed))
    if this_machine() in ARM:
        return frozenset({"asimd"})
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    return frozenset({"AVX512": (*_AVX2, *_AVX512), "AVX2": _AVX2}.get(level, ()))


def of_this_family() -> list[InstructionSet]:
    """The sets that a compiler for this processor family can build, best first."""
    return [each for each in SETS if not each.machines or this_machine() in each.machines]


def of_this_cpu() -> list[InstructionSet]:
    """The sets that this CPU has, best first; the portable one always."""
    return [each for each in SETS if not each.obstacle(this_machine(), cpu_features())]


def asked(name: str | None = None) -> InstructionSet | None:
    """The set named, else the environment's, else None. Raises InstructionSetError if there is none such, or not on this CPU."""
    origin = "instruction set" if name else VARIABLE
    name = name or os.environ.get(VARIABLE)
    if not name:
        return None
    here = ", ".join(each.name for each in of_this_cpu())
    found = BY_NAME.get(name)
    if found is None:
        close = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InstructionSetError(f"{origin} is {name!r}: {hint}known are {', '.join(BY_NAME)}; this CPU has {here}")
    obstacle = found.obstacle(this_machine(), cpu_features())
    if obstacle:
        raise InstructionSetError(f"{origin} is {name!r}, this CPU {obstacle}; name one of {here}, or none")
    return found
