"""What a rank holds of the group's symmetric memory: its own bytes, the others' addresses, and the word by which a kernel tells its
trouble.

Who makes it depends on the device: torch's symmetric memory or CUDA IPC (symmetric.py), or plain host memory under test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger("hetero_attn")


@dataclass
class SymmetricMemory:
    """
    own        this rank's memory, uint8 [size], zeroed from 0 to layout.staging_at before any rank's first call
    buffers    address of every rank's, as this process reaches it
    multicast  address of all of them at once, 0 = there is none
    how        what it was made by, in words
    view       (offset, nbytes) -> an object with weak references that holds these bytes, and a uint8 tensor of them that keeps it alive
    status     int64 [1] of host memory that the device writes; status_address: as the device reaches it
    keep       whatever must live as long
    leave      ends what was opened to make it (a process group); close() calls it, once
    """

    own: torch.Tensor
    buffers: list[int]
    multicast: int
    how: str
    view: Callable[[int, int], tuple[Any, torch.Tensor]]
    status: torch.Tensor
    status_address: int
    keep: list[Any] = field(default_factory=list)
    leave: Callable[[], None] | None = None

    def close(self) -> None:
        """Calls leave. The memory itself lives as long as a tensor in it. Raises nothing."""
        leave, self.leave = self.leave, None
        if leave is not None:
            try:
                leave()
            except Exception as error:               # the others may be gone
                log.debug("what the symmetric memory was made by did not end: %s", error)

    @property
    def address(self) -> int:
        return self.own.data_ptr()
