"""Which shipped profile fits a device of this machine, from the `detect:` section of the shipped files.

Matching is data: a CUDA or NPU device is compared by name (a listed name must begin a word of the device's own, so that H200 is no GH200)
and by compute capability. No vendor package is imported to look: an NPU counts only if torch_npu has been loaded by whoever wants it.
A GPU that no file names gets the generic `cuda` profile; a CPU always gets `cpu` (`edge` is chosen by name only).
"""

from __future__ import annotations

import difflib
import functools
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hetero_attn.profile_fields import ProfileError, check_fields, setting

GENERIC = {"cpu": "cpu", "cuda": "cuda"}        # device type -> the profile of a device that no other file names


@dataclass(frozen=True)
class Detect:
    """The devices a shipped profile is for. Everything stated must match; with nothing stated it is chosen by name only."""

    device_name: tuple[str, ...] = setting("Names of which one must begin a word of the device's own name, any case", default=(),
                                           pattern=r"\S(.*\S)?", form="not empty")
    cuda_capability: str | None = setting("CUDA compute capability, quoted", default=None, pattern=r"\d+\.\d", form="quoted, as in '7.0'")

    def __post_init__(self):
        check_fields(self)

    def closeness(self, name: str, capability: str | None) -> int:
        """0 if a device of this name (and CUDA capability 'major.minor', None off CUDA) is not meant; else the more is stated of it, the
        more: Ascend910B2 stands above Ascend910B, which is another chip."""
        if self.cuda_capability not in (None, capability):
            return 0
        named = [len(n) for n in self.device_name if re.search(rf"(?<![a-z0-9]){re.escape(n.lower())}", name.lower())]
        if self.device_name and not named:
            return 0
        return 2 * max(named, default=0) + (self.cuda_capability is not None)


def configs_directory() -> Path:
    """Where the shipped profiles lie: inside the package in a wheel, beside it in a checkout. Raises ProfileError if in neither."""
    package = Path(__file__).resolve().parent
    for directory in (package / "configs", package.parent / "configs"):
        if (directory / "cpu.yaml").is_file():
            return directory
    raise ProfileError(f"no shipped profiles: neither {package / 'configs'} nor {package.parent / 'configs'} has a cpu.yaml; "
                       "reinstall hetero-attn")


def shipped_profiles() -> dict[str, Path]:
    """Profile name -> its YAML file, in alphabetical order."""
    return {path.stem: path for path in sorted(configs_directory().glob("*.yaml"))}


def unknown_profile(name: str, known: Iterable[str]) -> str:
    """The error for a profile name that no shipped file has."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"unknown profile {name!r}{hint} shipped are {', '.join(known)}; a profile of your own is given as a path ending in .yaml"


def present_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the best this machine has: cuda, then an NPU whose torch_npu is already loaded, then cpu.

    Raises ProfileError if the one asked for is of a kind without profiles, or torch sees none of it."""
    if device is None:
        return torch.device(next(kind for kind in ("cuda", "npu", "cpu") if _count(kind)))
    if str(device).partition(":")[0] == "npu" and "torch_npu" not in sys.modules:      # without it torch does not parse the name
        raise ProfileError(f"device {str(device)!r} asked for, but torch_npu is not loaded; import torch_npu first")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ProfileError(f"device {device!r} is not one that torch knows, expected cpu, cuda or npu, with an index if need be") from None
    if device.type not in ("cpu", "cuda", "npu"):
        raise ProfileError(f"no profiles for device type {device.type!r}, expected cpu, cuda or npu; name a profile to use it all the same")
    count = _count(device.type)
    if not count or (device.index or 0) >= count:
        raise ProfileError(f"device {str(device)!r} asked for, but torch sees {count} {device.type} devices on this machine")
    return device


def _count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "npu":
        return torch.npu.device_count() if "torch_npu" in sys.modules and hasattr(torch, "npu") else 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's own name, as its driver gives it ('Tesla V100-SXM2-32GB'); for a CPU the model and the number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "npu":
        return torch.npu.get_device_name(device)
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    try:
        found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown CPU"


def choose(kind: str, name: str, capability: str | None, candidates: dict[str, tuple[str, Detect]]) -> str:
    """The profile for a device of type `kind`; candidates: profile name -> (device type, its detect section). The closest wins.
    Raises ProfileError if nothing fits and the kind has no generic profile."""
    fits = {profile: d.closeness(name, capability) for profile, (device, d) in candidates.items() if device == kind}
    best = max(fits, key=fits.__getitem__, default=None)
    if best is not None and fits[best]:
        return best
    if kind in GENERIC:
        return GENERIC[kind]
    near = ", ".join(profile for profile, (device, _) in candidates.items() if device == kind)
    raise ProfileError(f"no shipped profile names the {kind} device {name!r} (there are {near}); write a YAML that extends the nearest "
                       "and give its path by HETERO_ATTN_PROFILE")
