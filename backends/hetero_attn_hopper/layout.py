"""The map of a rank's symmetric memory, the same on every rank.

    control    slots, epochs, broken (csrc/hopper/call.h)       zeroed before anyone's first call
    staging    two buffers for one-shot calls, taken in turn
    room       one tensor that is not symmetric by itself, for the length of a call
    heap       what Communicator.empty hands out: no two ranks need have the same in it

Pure numbers, from what rank 0's profile says.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetero_attn_hopper.abi import CHANNELS, MAX_RANKS

ALIGN = 256                            # of every part and every tensor: a few lines, and more than any vector needs
SLOT_BYTES = 8
SLOTS_BYTES = 2 * CHANNELS * MAX_RANKS * SLOT_BYTES
EPOCHS_AT = SLOTS_BYTES
BROKEN_AT = EPOCHS_AT + 4 * CHANNELS
CONTROL_BYTES = BROKEN_AT + 4


def aligned(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN


@dataclass(frozen=True)
class Layout:
    """Bytes. stage: one of the two staging buffers; room: the largest tensor of a call; heap. Raises ValueError for what cannot be."""

    stage: int
    room: int
    heap: int

    def __post_init__(self) -> None:
        for name in ("stage", "room", "heap"):
            if getattr(self, name) <= 0 or getattr(self, name) % ALIGN:
                raise ValueError(f"{name} is {getattr(self, name)} bytes, expected a multiple of {ALIGN} above 0")

    @property
    def staging_at(self) -> int:
        return aligned(CONTROL_BYTES)

    @property
    def room_at(self) -> int:
        return self.staging_at + 2 * self.stage

    @property
    def heap_at(self) -> int:
        return self.room_at + self.room

    @property
    def size(self) -> int:
        return self.heap_at + self.heap
