"""The numbers of one Ascend chip that planning needs, taken from a profile's `hardware` section.

Planner, model and kernel read this and never a chip's name: another chip is another YAML file. A number that the profile does not state
is named in the error, because a tile that fits a guessed buffer is a tile that overflows the real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hetero_attn.profile import DeviceProfile

_NEEDED = ("units", "matrix_shape", "l1_bytes", "l0a_bytes", "l0b_bytes", "l0c_bytes", "ub_bytes")


class Buffers(NamedTuple):
    """A number of bytes for each on-chip buffer of a core."""

    L1: int
    L0A: int
    L0B: int
    L0C: int
    UB: int


class MissingNumbers(ValueError):
    """A profile does not state what planning needs. The text names every missing key."""


@dataclass(frozen=True)
class Chip:
    """Sizes are bytes of one core; UB is one vector unit's, without the part that a kernel must leave alone. Rates are a core's share of
    the device's, per second; None = the profile does not say, and the estimate leaves that term out."""

    name: str
    cores: int                                  # cube cores: each runs its own list of tasks
    vector_units: int                           # of one cube core: 2 on the 910B, 1 where cube and vector share a core
    matrix_shape: tuple[int, int, int]          # smallest m, n, k of the matrix unit
    capacity: Buffers
    alignment: Buffers                          # what an allocation is rounded up to
    cube_flops: float | None
    vector_ops: float | None                    # fp32 lane operations, all vector units of a core together
    memory_bytes: float | None
    l2_bytes: float | None
    l2_size: int | None                         # bytes of the whole device's L2

    @classmethod
    def of(cls, profile: DeviceProfile) -> Chip:
        """Raises MissingNumbers, and ValueError for vector units that the cores cannot share."""
        hardware = profile.hardware
        missing = [name for name in _NEEDED if getattr(hardware, name) is None]
        if missing:
            keys = ", ".join(f"hardware.{name}" for name in missing)
            raise MissingNumbers(f"profile {profile.name!r} does not state {keys}; add them to its YAML or give --set hardware.KEY=VALUE")
        cores, vector_units = hardware.units, hardware.vector_units or hardware.units
        if vector_units % cores:
            raise ValueError(f"profile {profile.name!r}: hardware.vector_units is {vector_units} beside hardware.units {cores}, expected a "
                             "multiple of it: every cube core has as many vector units")
        return cls(
            name=profile.name, cores=cores, vector_units=vector_units // cores,
            matrix_shape=hardware.matrix_shape,
            capacity=Buffers(hardware.l1_bytes, hardware.l0a_bytes, hardware.l0b_bytes, hardware.l0c_bytes,
                             hardware.ub_bytes - (hardware.ub_reserved_bytes or 0)),
            alignment=Buffers(*(getattr(hardware.alignments, f"{buffer.lower()}_bytes") or 1 for buffer in Buffers._fields)),
            cube_flops=_share(hardware.fp16_tflops, 1e12, cores), vector_ops=_share(hardware.fp32_tflops, 0.5e12, cores),
            memory_bytes=_share(hardware.memory_gbps, 1e9, cores), l2_bytes=_share(hardware.l2_gbps, 1e9, cores),
            l2_size=hardware.l2_bytes,
        )

    def aligned(self, buffer: str, size: int) -> int:
        """What an allocation of `size` bytes takes of a buffer."""
        step = getattr(self.alignment, buffer)
        return -(-size // step) * step


def _share(rate: float | None, unit: float, cores: int) -> float | None:
    return None if rate is None else rate * unit / cores

