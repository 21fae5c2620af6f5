"""The group of ranks behind the shared-memory communicator: its memory, the call in progress, and what becomes of one that fails.

A collective begins (_begin) with a look at whether the group still stands, and ends (_settle) with what the native call returned: done,
more memory wanted, or a failure, which becomes the base's error. Operations are in communicator.py.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch

from hetero_attn.communicator import Communicator, CommunicatorError
from hetero_attn_cpu.heap import Heap
from hetero_attn_cpu.segments import Segment, release, share
from hetero_attn_cpu.shared_calls import GAVE_UP, OUT_OF_STEP, WAITING, SharedCalls, group_add

CLOSE_S = 2.5                                        # a call that still waits this long after close() is given up
log = logging.getLogger("hetero_attn")


class Sizes(NamedTuple):
    """Bytes of a rank's shared memory. stage: one of its two staging buffers; heap: to begin with, it grows when a tensor does not fit."""

    stage: int
    heap: int


def one_shot_bytes(world_size: int, crowded: bool) -> int:
    """Up to which size an all-reduce is one exchange of everything: it saves an exchange and reads world_size / 2 times as much.

    Between two running ranks an exchange costs less than reading 2 KiB more of the other's cache (Zen 4, 2 ranks, one exchange / two: 4 KiB
    2.4 / 2.4 us, 8 KiB 3.2 / 2.6, 32 KiB 6.8 / 3.6); where ranks outnumber the cores it costs a change of process.
    """
    return (1 << 17 if crowded else 1 << 12) // max(world_size // 2, 1)


class SharedGroup(Communicator):
    """Owns the segments of every rank, in rank order, once the ranks have agreed on them (sharing.py)."""

    def __init__(self, base: Communicator, calls: SharedCalls, segments: list[Segment], sizes: Sizes, *, crowded: bool) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self.crowded = crowded                       # more ranks than cores
        self._base = base                            # `base` itself may be exchanged before close(); failures and order are this one's
        self._calls, self._segments, self._sizes = calls, segments, sizes
        this = weakref.ref(self)
        answers = _answers(this)
        next(answers)
        self._waiting = WAITING(answers.send)
        self._group: int | None = calls.group_open(
            self.rank, self.world_size, sizes.stage, one_shot_bytes(self.world_size, crowded), crowded, self._waiting
        )
        if not self._group:
            raise MemoryError("no memory for a group of ranks")
        group_add(calls, self._group, [each.address for each in segments], segments[0].size)
        self._heap = Heap()
        self._heap.add(segments[self.rank], calls.group_reserved(sizes.stage))
        self._at: tuple = ()                         # (operation, shape, dtype, site) of the last call
        self._count, self._inside = 0, False
        self._waited: tuple[int, float] = (0, 0.0)   # number of the call that is being waited for, and since when
        self._trouble: BaseException | None = None   # why _wait_on gave up
        self._closing: float | None = None
        self._approved: set[tuple] = set()           # signatures of all_reduce_rms_norm that have been checked
        self._added: list[list[Segment]] = []
        base.wrapper_doing = lambda: getattr(this(), "_doing", str)()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In this rank's shared memory, where the collectives of all ranks take it without a copy; private when that is full."""
        # After a failure a rank that is late may still write into what the last call gave it: nothing new is made there.
        tensor = None if self._group is None or self._base.failure is not None else self._heap.empty(tuple(shape), dtype)
        return super().empty(shape, dtype) if tensor is None else tensor

    # ---- one call: its beginning, its end, its failure ----------------------------------------------------------------------------

    def _begin(self, operation: str, x: torch.Tensor | None, site: str) -> None:
        if self._group is None or self._base.failure is not None:
            self._base.raise_if_broken()
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: the communicator has been closed", rank=self.rank)
        self._at = (operation, x, site) if x is None else (operation, (x.shape, x.dtype), site)
        self._count += 1
        self._inside = True

    def _settle(self, status: int) -> None:
        """What a native call returned: nothing to do, more shared memory wanted by some rank, or a failure."""
        if status == 0:
            return
        if status > 0:
            self._grow(status)
            return
        began = self._waited[1] if self._waited[0] == self._count else time.monotonic()
        trouble, self._trouble = self._trouble, None
        if status == OUT_OF_STEP:
            trouble = RuntimeError(f"rank {self._calls.group_odd(self._group)} made another call: operation, shape or dtype differ")
        elif status != GAVE_UP:
            trouble = RuntimeError(f"the kernel refused the call (code {status})")
        if isinstance(trouble, Exception):
            raise self._base.fail(self._text(), trouble, began) from trouble
        # Ctrl-C: the others are in the middle of this call, and no later one can be in step with them.
        self._base.failure = CommunicatorError(
            f"rank {self.rank} of {self.world_size}: {self._text()} was interrupted", rank=self.rank, operation=self._text()
        )
        raise trouble

    def _wait_on(self, missing: int) -> None:
        """Ten times a second while a call waits for the ranks in `missing` (bits): raises when there is nothing to wait for any more."""
        now = time.monotonic()
        if self._waited[0] != self._count:
            self._waited = (self._count, now - 0.1)
        if self._closing is not None and now > self._closing:
            raise RuntimeError("the communicator has been closed")
        late = [rank for rank in range(self.world_size) if missing >> rank & 1]
        gone = [rank for rank in late if not self._segments[rank].is_held()]
        if gone:
            raise RuntimeError(f"rank {', '.join(map(str, gone))} has ended")
        if now - self._waited[1] > self.timeout_s:
            raise RuntimeError(f"rank {', '.join(map(str, late))} did not come")

    def _grow(self, wanted: int) -> None:
        """One more segment of every rank, `wanted` bytes each: all ranks are here, in the same call. Without room nothing changes."""
        made = share(self._base, -(-wanted // (1 << 20)) << 20)
        if not isinstance(made[0], Segment):
            log.info("shared memory stays as it is: %s", made[0])
            self._heap.stop_growing()
            return
        release(made)                                # the lock on the first segment is what says that a rank lives
        if group_add(self._calls, self._group, [each.address for each in made], made[0].size):
            self._heap.add(made[self.rank])
            self._added.append(made)
        else:
            log.info("shared memory stays as it is: it is in as many segments as a group may have")
            self._heap.stop_growing()

    def _text(self) -> str:
        operation, x, site = self._at
        of = "" if x is None else f" of x {list(x[0])} {str(x[1]).removeprefix('torch.')}"
        return f"{operation}{of}" + (f" at {site}" if site else "")

    def _doing(self) -> str:
        """For ranks that ask: the call in progress, or the last one."""
        if not self._at:
            return ""
        if self._inside:
            return f"in {self._text()} (call {self._count})"
        return f"outside any collective (last: {self._text()}, call {self._count})"

    def close(self) -> None:
        """Finish what was started (briefly), close the base, give the shared memory back; tensors from empty() stay valid."""
        if self._group is None:
            return
        if self._closing is None:
            self._closing = time.monotonic() + CLOSE_S
        super().close()
        if self._base.busy():
            return                                   # a started call still waits for a lost rank: it needs the memory a moment longer
        group, self._group = self._group, None
        self._calls.group_close(group)
        release(self._segments)
        self._segments, self._added = [], []


def _answers(this: weakref.ref) -> Generator[int, int, None]:
    """What the waiting kernel calls, by send(): 0 to go on, 1 to give up; _settle() then raises what has happened.

    A generator, because a signal's exception (Ctrl-C) comes up at the first instruction of a Python function, where no `try` of its
    own can catch it, and no exception passes through C. A generator that is resumed is inside its `try` already.
    """
    answer = 0
    while True:
        try:
            missing = yield answer
            this()._wait_on(missing)
            answer = 0
        except GeneratorExit:
            raise
        except BaseException as error:
            this()._trouble = error
            answer = 1
