"""Codecs: partial sums in 4 or 8 bits on the wire. Which there are, and what each makes of a call.

    int4_outliers   4.19 bits  scales measured beforehand (`hetero-attn calibrate`), the largest 1/64 of the features as bf16, and a factor
                               a row (4.1875 bits + 16 a row)
    int4_group32    4.50 bits  a scale for 32 values in a row, taken from them
    int8_group32    8.50 bits  the same in 8 bits
A codec is lossy, so nothing gets one unless the profile asks for it. The embedding is looked up, not summed (one rank has the row, the
others zeros), and travels as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from hetero_attn.backend import Backend
from hetero_attn.collectives.codec.calibration import Calibration
from hetero_attn.collectives.codec.definition import TorchKernels
from hetero_attn.collectives.codec.lossy import GroupCoding, NonFiniteError, OutlierCoding
from hetero_attn.collectives.codec.traffic import Traffic
from hetero_attn.collectives.coding import Coding, Plain

CALIBRATED = "int4_outliers"
NAMES = (CALIBRATED, "int4_group32", "int8_group32")
GROUP_BITS = {"int4_group32": 4, "int8_group32": 8}
EXACT_SITES = ("embed",)
CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Codecs:
    """One rank's codecs: `calibration` (None until a model brings one) and the counts in `traffic`. on_calibration: called by take(), to
    weigh the codec that has become possible; None where nothing is chosen."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.calibration: Calibration | None = None
        self.traffic = Traffic()
        self.on_calibration: Callable[[], None] | None = None

    def take(self, calibration: Calibration) -> None:
        """A model's calibration has come. All ranks call it together: under `codec: auto` they choose anew."""
        self.calibration = calibration
        if self.on_calibration is not None:
            self.on_calibration()

    def coding(self, name: str, site: str, width: int, dtype: torch.dtype) -> Coding:
        """How a call's values travel under codec `name`. width: values in a row of the tensor; double precision stays as it is.

        Raises ValueError for an unknown name, and under int4_outliers for a site or width that was not calibrated; all ranks alike.
        """
        if name not in NAMES:
            raise ValueError(f"codec is {name!r}, expected none or one of {', '.join(NAMES)}")
        if site in EXACT_SITES or dtype not in CODED_DTYPES:
            return Plain(dtype)
        call = (site, self.rank, dtype, kernels("cpu"), self.traffic)
        if name in GROUP_BITS:
            return GroupCoding(GROUP_BITS[name], *call)
        if self.calibration is None:
            raise ValueError(f"codec is {name}, and no calibration has been loaded; run hetero-attn calibrate MODEL --text FILE "
                             f"--tp {self.world_size}, or take a codec that needs none: {', '.join(GROUP_BITS)}")
        return OutlierCoding(*self.calibration.tables(site, width, self.world_size), *call)


@cache
def kernels(device: str) -> TorchKernels:
    """The kernels for tensors on a device type: those of the first available backend of its profile that has some, else torch's."""
    from hetero_attn import registry  # here: the registry looks for backends, which a call without a codec has no use for

    for name in registry.current_profile(device).backends:
        backend = registry.find(name)
        if type(backend).codec_kernels is not Backend.codec_kernels and not registry.unavailable(backend):
            found = backend.codec_kernels(device)
            if found is not None:
                return found
    return TorchKernels()


__all__ = ["CALIBRATED", "NAMES", "Calibration", "Codecs", "NonFiniteError", "Traffic", "kernels"]
