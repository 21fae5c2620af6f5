"""The map of a rank's symmetric memory, the same on every rank: what the CTAs meet by, staging for short messages, and the heap.

    control    slots, epochs, broken (csrc/hopper/call.h)       zeroed before anyone's first call
    staging    two buffers for one-shot calls, taken in turn
    heap       what Communicator.empty hands out

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
    """Bytes. stage: of one of the two staging buffers; heap: of the room for tensors. Raises ValueError for a size that is not above 0."""

    stage: int
    heap: int

    def __post_init__(self) -> None:
        if self.stage <= 0 or self.heap <= 0 or self.stage % ALIGN:
            raise ValueError(f"stage is {self.stage} and heap {self.heap} bytes, expected more than 0, stage a multiple of {ALIGN}")

    @property
    def staging_at(self) -> int:
        return aligned(CONTROL_BYTES)

    @property
    def heap_at(self) -> int:
        return self.staging_at + 2 * self.stage

    @property
    def size(self) -> int:
        return self.heap_at + aligned(self.heap)
