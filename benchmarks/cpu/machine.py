"""The head of every report: which machine, which instruction set, which versions, when. A figure without these says nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hetero_attn import registry

LEVELS = (                                              # the highest whose flags are all there names the machine
    ("AVX-512 with bf16", ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")),
    ("AVX-512", ("avx512f", "avx512bw", "avx512vl")),
    ("AVX2", ("avx2", "fma", "f16c")),
    ("NEON", ("asimd",)),
)
PACKAGES = ("torch", "onnxruntime", "transformers", "numpy")
DEFAULT_L3 = 32 << 20


def describe(backend: str, threads: int) -> dict[str, object]:
    """Facts as JSON: processor, cores, caches in bytes, instruction-set level, what the backend uses, versions, UTC date."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "family": facts.get("cpu family", ""),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),           # of the minute before: others' work, which no ratio takes out entirely
        "threads": threads,
        "level": next((name for name, needed in LEVELS if flags.issuperset(needed)), "portable"),
        "caches": caches(),
        "backend": backend,
        "kernels": kernels(backend),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def kernels(backend: str) -> str:
    """Which kernels the backend uses here (their instruction set), in the words that doctor shows; '' for one that has no notes."""
    notes = getattr(registry.get(backend), "notes", None)
    return "; ".join(notes()) if notes else ""


def caches() -> dict[str, int]:
    """{'L1d': bytes of one core, 'L2': …, 'L3': …} of the first core, as Linux tells; {} where it does not."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(re.match(r"\d+", size)[0]) << (20 if size.endswith("M") else 10)
    return found


def l3_bytes() -> int:
    """The last-level cache, or a usual size where Linux does not tell."""
    return caches().get("L3", DEFAULT_L3)


def headline(facts: dict) -> str:
    """One paragraph for a reader."""
    cached = ", ".join(f"{name} {size >> 10} KiB" for name, size in facts["caches"].items())
    packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    uses = facts["kernels"] or "torch's own kernels"
    return (f"{facts['date']}, {facts['processor']} (family {facts['family']}), {facts['cores']} cores, {facts['threads']} threads, "
            f"load {facts['load']} before the start, {facts['level']}; {cached}. "
            f"Backend `{facts['backend']}`: {uses}; torch's capability: {facts['torch_capability']}. {packages}.")


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
