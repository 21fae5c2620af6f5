"""When our own kernel serves a call and where it comes from: what the fused operators cannot express, if triton-ascend is there."""

from __future__ import annotations

import importlib.metadata
import re

import torch

from hetero_attn.profile import ProfileError, load_profile
from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.kernel_launch import TwoLevelKernel
from hetero_attn_ascend.kernel_tiling import compiler_options

LEAST = (3, 2)                              # triton-ascend 3.2.0 is what the kernel is lowered with in the tests
PLANNED_FOR = "ascend910b"                  # where the device's own profile cannot be told


def kernel_reasons() -> list[str]:
    """Why the kernel cannot run on this machine's NPU; [] also where there is no torch_npu: then nothing runs here anyway, and a call for
    a device elsewhere is judged as if it were complete."""
    if not _version("torch_npu"):
        return []
    found = _version("triton-ascend")
    if not found:
        return ["our own kernel would serve it, but triton-ascend is not installed; pip install triton-ascend==3.2.0"]
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < LEAST:                  # of "3.2rc1" too
        return [f"our own kernel would serve it, but triton-ascend is {found}, expected 3.2.0 or later"]
    return []


def make_kernel() -> TwoLevelKernel:
    """Planned for the chip that is here, with the options that tell triton-ascend's compiler of level 2."""
    try:
        chip = Chip.of(load_profile(None, device="npu" if hasattr(torch, "npu") and torch.npu.is_available() else None))
    except (ProfileError, ValueError):
        chip = Chip.of(load_profile(PLANNED_FOR))
    return TwoLevelKernel(chip, options=compiler_options)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
