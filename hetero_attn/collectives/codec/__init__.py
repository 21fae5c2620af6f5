"""Codecs: partial sums in 4 or 8 bits on the wire. Which there are, and what each makes of a call.

    int4_outliers   4.19 bits  scales measured beforehand (`hetero-attn calibrate`), the largest 1/64 of the features as bf16, and a factor
                               a row (4.1875 bits + 16 a row)
    int4_group32    4.50 bits  a scale for 32 values in a row, taken from them
    int8_group32    8.50 bits  the same in 8 bits
Tensors of a device are packed there where a backend has codec kernels for it, so that only packed bytes cross to the host (on_device.py);
over a device library they do not cross at all (resident.py). Else the host packs, and traffic.packing says why.

A codec is lossy, so nothing gets one unless the profile asks for it. The embedding is looked up, not summed (one rank has the row, the
others zeros), and travels as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from hetero_attn.backend import Backend
from hetero_attn.collectives.codec.calibration import Calibration
from hetero_attn.collectives.codec.definition import TorchKernels
from hetero_attn.collectives.codec.lossy import GroupCoding, NonFiniteError, OutlierCoding
from hetero_attn.collectives.codec.on_device import DevicePath, StagedCoding
from hetero_attn.collectives.codec.resident import ResidentCoding, ThroughHost
from hetero_attn.collectives.codec.traffic import Traffic
from hetero_attn.collectives.coding import Coding, Plain

CALIBRATED = "int4_outliers"
NAMES = (CALIBRATED, "int4_group32", "int8_group32")
GROUP_BITS = {"int4_group32": 4, "int8_group32": 8}
EXACT_SITES = ("embed",)
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
log = logging.getLogger("hetero_attn")


class Codecs:
    """One rank's codecs: `calibration` (None until a model brings one) and the counts in `traffic`. on_calibration: called by take(), to
    weigh the codec that has become possible; None where nothing is chosen. paths: how tensors of a device get to the wire and back, found
    at the first of them; None = the host packs, as it does the CPU's."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.calibration: Calibration | None = None
        self.traffic = Traffic()
        self.on_calibration: Callable[[], None] | None = None
        self.paths: dict[torch.device, DevicePath | None] = {CPU: None}

    def take(self, calibration: Calibration) -> None:
        """A model's calibration has come. All ranks call it together: under `codec: auto` they choose anew."""
        self.calibration = calibration
        if self.on_calibration is not None:
            self.on_calibration()

    def coding(
        self, name: str, site: str, width: int, dtype: torch.dtype, device: torch.device = CPU, *, resident: bool = False
    ) -> Coding:
        """How a call's values travel under codec `name`. width: values in a row of the tensor; double precision stays as it is. device: of
        the tensor; a coding that is not `on_device` takes it on the CPU. resident: payloads are to be on the device as well.

        Raises ValueError for an unknown name, and under int4_outliers for a site or width that was not calibrated; all ranks alike.
        """
        if name not in NAMES:
            raise ValueError(f"codec is {name!r}, expected none or one of {', '.join(NAMES)}")
        if site in EXACT_SITES or dtype not in CODED_DTYPES:
            return Plain(dtype)
        if name == CALIBRATED and self.calibration is None:
            raise ValueError(f"codec is {name}, and no calibration has been loaded; run hetero-attn calibrate MODEL --text FILE "
                             f"--tp {self.world_size}, or take a codec that needs none: {', '.join(GROUP_BITS)}")
        tables = self.calibration.tables(site, width, self.world_size) if name == CALIBRATED else ()
        path = self.path(device, name, dtype)
        packs = path.kernels if path else ThroughHost(kernels("cpu")) if resident else kernels("cpu")
        call = (site, self.rank, dtype, packs, self.traffic)
        lossy = GroupCoding(GROUP_BITS[name], *call) if name in GROUP_BITS else OutlierCoding(*tables, *call)
        return ResidentCoding(lossy) if resident else StagedCoding(lossy, path) if path else lossy

    def path(self, device: torch.device, name: str, dtype: torch.dtype) -> DevicePath | None:
        """The device's way for values of a dtype under codec `name`; None = the host packs them, and traffic.packing says why."""
        if device not in self.paths:
            found = device_kernels(device.type)
            self.paths[device] = None if found.kernels is None else DevicePath(found.kernels, found.name, device, self.traffic)
            self._say(f"packed on {device} by {found.name}" if found.kernels else f"packed on the host: {'; '.join(found.reasons)}")
        path = self.paths[device]
        if path is None or (objection := path.objection(name, dtype)) is None:
            return path
        self._say(f"packed on the host: {path.name}: {objection}")
        return None

    def _say(self, packing: str) -> None:
        """Who packs, once."""
        if packing != self.traffic.packing:
            self.traffic.packing = packing
            log.info("sums under a codec are %s", packing)


class Found(NamedTuple):
    """Codec kernels for a type of device and the backend they are of; None and why not."""

    kernels: Any
    name: str
    reasons: tuple[str, ...]


@cache
def device_kernels(device: str) -> Found:
    """The kernels for tensors on a device type: those of the first available backend of its profile that has some."""
    from hetero_attn import registry  # here: the registry looks for backends, which a call without a codec has no use for

    reasons, profile = [], registry.current_profile(device)
    for name in profile.backends:
        backend = registry.find(name)
        if type(backend).codec_kernels is Backend.codec_kernels:
            continue
        against = registry.unavailable(backend)
        kernels = None if against else backend.codec_kernels(device)
        if kernels is not None:
            return Found(kernels, name, tuple(reasons))
        reasons.append(f"{name}: {against[0] if against else f'it has no codec kernels for {device}'}")
    return Found(None, "", tuple(reasons) or (f"no backend of profile {profile.name!r} has codec kernels ({', '.join(profile.backends)})",))


def kernels(device: str) -> Any:
    """device_kernels(), and torch's where there are none: for tensors on the CPU."""
    return device_kernels(device).kernels or TorchKernels()


__all__ = [
    "CALIBRATED", "NAMES", "Calibration", "Codecs", "DevicePath", "NonFiniteError", "Traffic", "device_kernels", "kernels",
]
