"""What an emulated network is asked to be, and what follows from it: sizes of pieces, queues and bursts, names and addresses.

emulator.py writes it as JSON into the guard's command line, where it is read again. Standard library only.
"""

from __future__ import annotations

import dataclasses

INTERFACE = "link0"
NETWORK = "10.213.0.0/16"
PIECE_S = 0.5e-3                                         # a piece of TCP is no longer than this on the wire: finer is dearer
LARGEST_PIECE = 65000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the owner asks for. owner: its process id. names: a namespace for each rank. folder: its temporary files, to be removed too.
    library: the compiled switch, '' = wired, the kernel does all."""

    owner: int
    names: list[str]
    folder: str
    rate_mbit: float
    delay_ms: float
    mtu: int
    queue_ms: float
    library: str

    @property
    def ranks(self) -> int:
        return len(self.names)

    @property
    def bits_per_s(self) -> int:
        return round(self.rate_mbit * 1e6)

    def queue_bytes(self, seconds: float) -> int:
        """Bytes that the link carries in that time, and room for a few pieces at least."""
        return max(int(self.bits_per_s / 8 * seconds), 4 * LARGEST_PIECE)

    @property
    def piece_bytes(self) -> int:
        return min(LARGEST_PIECE, max(self.mtu, int(self.bits_per_s / 8 * PIECE_S)))

    @property
    def burst_bytes(self) -> int:
        """What tc tbf lets through at once before the switch, which books the sender's rate exactly: tbf need only keep its queue short."""
        return 2 * self.piece_bytes + self.mtu


def address(rank: int) -> str:
    """The rank's IPv4 address on its link."""
    return f"10.213.{(rank + 1) // 256}.{(rank + 1) % 256}"
