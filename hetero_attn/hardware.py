"""The device numbers that planning needs: tiles, splits, partitions and the roofline are computed from these, never from a device's name.

Every number is optional: null means that nobody has given one with a source, and a planner that needs it must say so rather than guess.
Sizes are bytes of one unit (one SM, one AI core, one CPU core), rates are of the whole device, dense, without sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hetero_attn.profile_fields import ProfileError, check_fields, setting


@dataclass(frozen=True)
class Alignments:
    """Address alignments in bytes that copies into each on-chip buffer want; null = unknown or no such buffer."""

    ub_bytes: int | None = setting("Alignment of the unified (vector) buffer, bytes", default=None, minimum=1)
    l1_bytes: int | None = setting("Alignment of the L1 buffer, bytes", default=None, minimum=1)
    l0a_bytes: int | None = setting("Alignment of the matrix unit's left operand buffer, bytes", default=None, minimum=1)
    l0b_bytes: int | None = setting("Alignment of the matrix unit's right operand buffer, bytes", default=None, minimum=1)
    l0c_bytes: int | None = setting("Alignment of the matrix unit's accumulator buffer, bytes", default=None, minimum=1)

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Hardware:
    """One device. Raises ProfileError for a number of the wrong kind or out of bounds."""

    units: int | None = setting("Streaming multiprocessors (CUDA), AI or cube cores (Ascend), cores (CPU)", default=None, minimum=1)
    vector_units: int | None = setting("Vector cores of the whole device, if apart from the matrix units", default=None, minimum=1)
    matrix_shape: tuple[int, int, int] | None = setting("Smallest step m, n, k of the matrix unit in fp16", default=None, minimum=1)
    clock_ghz: float | None = setting("Clock at which the rates below hold, GHz", default=None, above=0)
    memory_gib: float | None = setting("Device memory, GiB", default=None, above=0)
    memory_gbps: float | None = setting("Device memory bandwidth, GB/s (1e9 bytes)", default=None, above=0)
    fp32_tflops: float | None = setting("fp32 rate of the vector units, TFLOP/s", default=None, minimum=0)
    fp16_tflops: float | None = setting("fp16 dense rate of the matrix units, TFLOP/s; 0 = the device has none", default=None, minimum=0)
    bf16_tflops: float | None = setting("bf16 dense rate of the matrix units, TFLOP/s; 0 = the device has none", default=None, minimum=0)
    shared_memory_bytes: int | None = setting("Shared memory that one block may use (CUDA), bytes", default=None, minimum=1)
    l1_bytes: int | None = setting("L1 buffer of one AI core (Ascend) or L1 data cache of one core (CPU), bytes", default=None, minimum=1)
    l2_bytes: int | None = setting("L2 cache: of one core (CPU) or of the device, bytes", default=None, minimum=1)
    l2_gbps: float | None = setting("L2 cache bandwidth of the whole device, GB/s (1e9 bytes)", default=None, above=0)
    l3_bytes: int | None = setting("L3 cache that the cores share (CPU), bytes", default=None, minimum=1)
    l0a_bytes: int | None = setting("Left operand buffer of the matrix unit, bytes", default=None, minimum=1)
    l0b_bytes: int | None = setting("Right operand buffer of the matrix unit, bytes", default=None, minimum=1)
    l0c_bytes: int | None = setting("Accumulator buffer of the matrix unit, bytes", default=None, minimum=1)
    ub_bytes: int | None = setting("Unified (vector) buffer, reserved part included, bytes", default=None, minimum=1)
    ub_reserved_bytes: int | None = setting("Part of the unified buffer that a kernel must leave alone, bytes", default=None, minimum=0)
    link_gbps: float | None = setting("Link between devices of one host, both directions together, GB/s (1e9 bytes)", default=None, above=0)
    bus_gbps: float | None = setting("Copies between host memory and device, one way, GB/s (1e9 bytes)", default=None, above=0)
    host_memory_gib: float | None = setting("Memory of the host that the device is in, for all its devices, GiB", default=None, above=0)
    host_memory_gbps: float | None = setting("Bandwidth of that memory, for all its processors together, GB/s (1e9 bytes)", default=None,
                                             above=0)
    disk_gbps: float | None = setting("What the disk gives in large direct reads, GB/s (1e9 bytes); for planning streamed weights",
                                      default=None, above=0)
    alignments: Alignments = field(default_factory=Alignments, metadata={"doc": "Address alignments of the on-chip buffers"})

    def __post_init__(self):
        check_fields(self)
        if self.ub_reserved_bytes is not None and (self.ub_bytes is None or self.ub_reserved_bytes >= self.ub_bytes):
            bound = "ub_bytes, which is not stated" if self.ub_bytes is None else f"ub_bytes ({self.ub_bytes})"
            raise ProfileError(f"hardware.ub_reserved_bytes is {self.ub_reserved_bytes}, expected less than {bound}",
                               key="hardware.ub_reserved_bytes")


MEASURED = {"pattern": r"[a-z_]+ [0-9]+ [a-z_]+ [a-z0-9_]+ [0-9.e+-]+", "form": "operation, bytes, algorithm, codec, milliseconds"}


@dataclass(frozen=True)
class Link:
    """The link between the ranks of a group, as `hetero-attn tune` measured it into the overlay; empty where it has not."""

    latency_ms: float | None = setting("One message's way from rank to rank, milliseconds; null = not measured", default=None, minimum=0)
    message_ms: float | None = setting("What sending or receiving a message costs beside, milliseconds", default=None, minimum=0)
    crowd_ms: float | None = setting("What any rank's message costs all (shared processors), milliseconds", default=None, minimum=0)
    bandwidth_mbps: float | None = setting("A rank's link while all ranks send, 10^6 bit/s; null = beyond measuring", default=None, above=0)
    root_mbps: float | None = setting("What one rank takes in from all others at once, 10^6 bit/s", default=None, above=0)
    hosts: tuple[str, ...] = setting("Rank and host name of each rank when it was measured, as in '0 alpha'", default=())
    measured: tuple[str, ...] = setting("Collectives of float32 put to the clock", default=(), **MEASURED)

    def __post_init__(self):
        check_fields(self)
