"""Collectives in shared memory, for ranks on one host whose tensors are on the CPU: the wrapper of torch.distributed's communicator.

What is done in csrc/cpu/shared_memory.cpp; this file checks arguments, at the cost of a microsecond (the decoder calls it a hundred times a
token), and turns a wait that does not end into the base's error. Whatever has no form here (device tensors, fp64 norms) goes to the base or
is composed; which way a call goes depends on what all ranks share, so they go the same way.
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
import weakref
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Any

import torch

from hetero_attn.collective_arguments import (
    agreed_sizes,
    check_dim,
    check_rank,
    check_rows,
    check_sizes,
    check_sum,
    check_tensor,
    shape_record,
)
from hetero_attn.communicator import Communicator, CommunicatorError, Handle
from hetero_attn_cpu.heap import Heap
from hetero_attn_cpu.segments import Segment, share
from hetero_attn_cpu.shared_calls import GAVE_UP, NORM, OUT_OF_STEP, SUMMABLE, WAITING, SharedCalls, group_add

STAGE_BYTES = 1 << 19                                # two such buffers a rank: with their chunks they stay in the second-level cache
HEAP_BYTES = 4 << 20                                 # to begin with; grows when a tensor does not fit
HEAP_RESULT_BYTES = 1 << 16                          # making a tensor in the heap takes 3 us: as long as copying this much
CLOSE_S = 2.5                                        # a call that still waits this long after close() is given up
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_strided = torch.strided
log = logging.getLogger("hetero_attn")


def one_shot_bytes(world_size: int, crowded: bool) -> int:
    """Up to which size an all-reduce is one exchange of everything: it saves an exchange and reads world_size / 2 times as much."""
    return (1 << 17 if crowded else 1 << 15) // max(world_size // 2, 1)


class SharedMemoryCommunicator(Communicator):
    """Made by backends/hetero_attn_cpu/sharing.py once the ranks have agreed. segments: of every rank, in rank order."""

    def __init__(self, base: Communicator, calls: SharedCalls, segments: list[Segment], *, crowded: bool) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self.crowded = crowded                       # more ranks than cores
        self._base = base                            # `base` itself may be exchanged before close(); failures and order are this one's
        self._calls, self._segments = calls, segments
        this = weakref.ref(self)
        answers = _answers(this)
        next(answers)
        self._waiting = WAITING(answers.send)
        self._group: int | None = calls.group_open(
            self.rank, self.world_size, STAGE_BYTES, one_shot_bytes(self.world_size, crowded), crowded, self._waiting
        )
        if not self._group:
            raise MemoryError("no memory for a group of ranks")
        group_add(calls, self._group, [each.address for each in segments], segments[0].size)
        self._heap = Heap()
        self._heap.add(segments[self.rank], calls.group_reserved(STAGE_BYTES))
        self._at: tuple = ()                         # (operation, shape, dtype, site) of the last call
        self._count, self._inside = 0, False
        self._waited: tuple[int, float] = (0, 0.0)   # number of the call that is being waited for, and since when
        self._trouble: BaseException | None = None   # why _wait_on gave up
        self._closing: float | None = None
        self._approved: set[tuple] = set()           # signatures of all_reduce_rms_norm that have been checked
        self._added: list[list[Segment]] = []
        base.wrapper_doing = lambda: getattr(this(), "_doing", str)()

    # ---- operations -----------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """In this rank's shared memory, where the collectives of all ranks take it without a copy; private when that is full."""
        tensor = None if self._group is None else self._heap.empty(tuple(shape), dtype)
        return super().empty(shape, dtype) if tensor is None else tensor

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        code = SUMMABLE.get(x.dtype) if type(x) in _PLAIN else None
        if code is None or x.requires_grad or not (x.is_cpu and x.layout is _strided and x.is_contiguous()) or x.is_neg():
            return self._other_all_reduce(x, site)
        if self._base.busy():
            return self._base.in_background(lambda: self.all_reduce(x, site=site)).wait()
        self._begin("all_reduce", x, site)
        if count := x.numel():
            status = self._calls.all_reduce(self._group, x.data_ptr(), count, code, self._heap.wanted)
            if status:
                self._settle(status)
        self._inside = False
        return x

    def _other_all_reduce(self, x: torch.Tensor, site: str) -> torch.Tensor:
        """What the quick path leaves: refused arguments, strided tensors, complex numbers, devices."""
        self._check_all_reduce(x)
        if not x.is_cpu:
            return self._base.all_reduce(x, site=site)
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            buffer = _contiguous(x)
            self.all_reduce(torch.view_as_real(buffer) if buffer.is_complex() else buffer, site=site)
            return _written_back(x, buffer)

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        self._check_reduce_scatter(x)
        if not x.is_cpu:
            return self._base.reduce_scatter(x, site=site)
        if self._base.busy():
            return self._base.in_background(lambda: self.reduce_scatter(x, site=site)).wait()
        own = self.rows(x.shape[0])
        out = torch.empty((own.stop - own.start, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self._begin("reduce_scatter", x, site)
        if x.numel():
            source, target = _contiguous(x), out
            if x.is_complex():
                source, target = torch.view_as_real(source), torch.view_as_real(target)
            rows = x.shape[0]
            self._settle(self._calls.reduce_scatter(
                self._group, source.data_ptr(), target.data_ptr(), rows, source.numel() // rows, SUMMABLE[source.dtype], self._heap.wanted
            ))
        self._inside = False
        return out

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        dim = self._check_all_gather(x, dim, sizes=sizes)
        if not x.is_cpu:
            return self._base.all_gather(x, dim, sizes=sizes, site=site)
        if self._base.busy():
            return self._base.in_background(lambda: self.all_gather(x, dim, sizes=sizes, site=site)).wait()
        self._begin("all_gather", x, site)
        source = _contiguous(x)
        if sizes is None:
            sizes = agreed_sizes(self._gather(shape_record(x, dim).view(1, -1), 0, [1] * self.world_size).tolist())
        out = self._gather(source, dim, sizes)
        self._inside = False
        return out

    def _gather(self, source: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """source, contiguous, whose extent in `dim` is sizes[rank] -> all ranks' [..., sum of sizes, ...]."""
        shape = source.shape
        out = torch.empty((*shape[:dim], sum(sizes), *shape[dim + 1 :]), dtype=source.dtype, device=source.device)
        if out.numel():
            outer = math.prod(shape[:dim])
            parts = _part_bytes(tuple(sizes), outer * math.prod(shape[dim + 1 :]) * source.element_size())
            self._settle(self._calls.all_gather(
                self._group, source.data_ptr(), out.data_ptr(), ctypes.addressof(parts), outer, self._heap.wanted
            ))
        return out

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        self._check_broadcast(x, src)
        if not x.is_cpu:
            return self._base.broadcast(x, src, site=site)
        if self._base.busy():
            return self._base.in_background(lambda: self.broadcast(x, src, site=site)).wait()
        self._begin("broadcast", x, site)
        buffer = _contiguous(x)
        if size := buffer.numel() * buffer.element_size():
            self._settle(self._calls.broadcast(self._group, buffer.data_ptr(), size, src, self._heap.wanted))
        self._inside = False
        return x if self.rank == src else _written_back(x, buffer)

    def barrier(self, *, site: str = "") -> None:
        if self._base.busy():
            return self._base.in_background(lambda: self.barrier(site=site)).wait()
        self._begin("barrier", None, site)
        self._settle(self._calls.barrier(self._group, self._heap.wanted))
        self._inside = False
        return None

    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        residual_shard: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        site: str,
        weight_offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In one pass: each rank sums, adds and normalises its rows and writes them to all. An x from empty() becomes the result."""
        signature = (
            x.shape, x.dtype, residual_shard.shape, residual_shard.dtype, weight.shape, weight.dtype,
            *((post_weight.shape, post_weight.dtype) if post_weight is not None else ()),
        ) if self._are_plain(x, residual_shard, weight, post_weight) else None
        if signature not in self._approved:
            if not self._approve(signature, x, residual_shard, weight, post_weight):
                return self._other_norm(x, residual_shard, weight, eps, site, weight_offset, post_weight)
        if self._base.busy():
            options = {"site": site, "weight_offset": weight_offset, "post_weight": post_weight}
            return self._base.in_background(lambda: self.all_reduce_rms_norm(x, residual_shard, weight, eps, **options)).wait()
        self._begin("all_reduce_rms_norm", x, site)
        tokens, channels = x.shape
        address = x.data_ptr()
        # Private x stays as it is, for callers that go on using it. A large result in the heap spares a copy, and new memory's page faults.
        if self._heap.holds(address):
            out = x
        else:
            out = torch.empty_like(x) if x.nbytes < HEAP_RESULT_BYTES else self.empty(x.shape, x.dtype)
        if tokens and channels:
            post, post_code = (0, 0) if post_weight is None else (post_weight.data_ptr(), NORM[post_weight.dtype])
            status = self._calls.all_reduce_rms_norm(
                self._group, address, out.data_ptr(), tokens, channels, NORM[x.dtype],
                residual_shard.data_ptr(), NORM[residual_shard.dtype], weight.data_ptr(), NORM[weight.dtype], post, post_code,
                eps, weight_offset, self._heap.wanted,
            )
            if status:
                self._settle(status)
        self._inside = False
        return out, residual_shard

    def _approve(self, signature: tuple | None, x: Any, residual_shard: Any, weight: Any, post_weight: Any) -> bool:
        """Check the arguments in full; True (and quick from now on) for shapes and dtypes that the native form takes."""
        self.check_norm_arguments(x, residual_shard, weight, post_weight)
        dtypes = {each.dtype for each in (x, residual_shard, weight, post_weight) if each is not None}
        if signature is None or not dtypes <= NORM.keys() or not self._row_fits(x):
            return False
        if len(self._approved) >= 4096:
            self._approved.clear()
        self._approved.add(signature)
        return True

    def _row_fits(self, x: torch.Tensor) -> bool:
        """Whether a row of every rank has room in a staging buffer."""
        return x.shape[1] * x.element_size() <= STAGE_BYTES // self.world_size

    def _other_norm(self, x, residual_shard, weight, eps, site, weight_offset, post_weight):
        """What the native form does not take as it lies: strided tensors by copies of them, other dtypes and long rows composed."""
        self.check_norm_arguments(x, residual_shard, weight, post_weight)
        tensors = [each for each in (x, residual_shard, weight, post_weight) if each is not None]
        options = {"site": site, "weight_offset": weight_offset}
        if not (all(each.dtype in NORM and each.is_cpu for each in tensors) and self._row_fits(x)):
            return super().all_reduce_rms_norm(x, residual_shard, weight, eps, post_weight=post_weight, **options)
        residual = _copied(residual_shard)
        post = None if post_weight is None else _copied(post_weight)
        with torch.no_grad():
            out, _ = self.all_reduce_rms_norm(_copied(x), residual, _copied(weight), eps, post_weight=post, **options)
            residual_shard.copy_(residual)
        return out, residual_shard

    def start(self, operation: str, *args: Any, **options: Any) -> Handle:
        getattr(self, f"_check_{operation}")(*args, **options)
        self._base.raise_if_broken()
        call = getattr(self, operation)
        return self._base.in_background(lambda: call(*args, **options))

    # ---- checks: all that refuses a call, before anything is sent ---------------------------------------------------------------

    def _are_plain(self, *tensors: Any) -> bool:
        """Contiguous CPU tensors that nobody differentiates: check_tensor() has nothing against them, and memory may be read as it lies."""
        for x in tensors:
            if x is not None and not (type(x) in _PLAIN and x.is_cpu and x.layout is _strided and not x.requires_grad
                                      and x.is_contiguous() and not x.is_neg()):
                return False
        return True

    def _check_all_reduce(self, x: Any, *, site: str = "") -> None:
        check_tensor("all_reduce", "x", x, written=True)
        check_sum("all_reduce", x)

    def _check_reduce_scatter(self, x: Any, *, site: str = "") -> None:
        check_tensor("reduce_scatter", "x", x)
        check_rows("reduce_scatter", x)
        check_sum("reduce_scatter", x)

    def _check_all_gather(self, x: Any, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> int:
        check_tensor("all_gather", "x", x)
        dim = check_dim("all_gather", x, dim)
        check_sizes("all_gather", sizes, x.shape[dim], self.rank, self.world_size)
        if sizes is None:
            shape_record(x, dim)                     # refuses too many axes
        return dim

    def _check_broadcast(self, x: Any, src: int = 0, *, site: str = "") -> None:
        check_tensor("broadcast", "x", x, written=True)
        check_rank("broadcast", "src", src, self.world_size)

    def _check_barrier(self, *, site: str = "") -> None:
        pass

    def _check_all_reduce_rms_norm(self, x, residual_shard, weight, eps, *, site, weight_offset=0.0, post_weight=None) -> None:
        self.check_norm_arguments(x, residual_shard, weight, post_weight)

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
        if isinstance(made[0], Segment) and group_add(self._calls, self._group, [each.address for each in made], made[0].size):
            self._heap.add(made[self.rank])
            for each in made:
                each.release()                       # the lock on the first segment is what says that a rank lives
            self._added.append(made)
        else:
            log.info("shared memory stays as it is: %s", made[0])
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
        for each in self._segments:
            each.release()
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


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """x as plain contiguous memory: x's own where it is that, else a copy."""
    if type(x) is not torch.Tensor:
        x = x.detach().as_subclass(torch.Tensor)
    return x.detach().resolve_conj().resolve_neg().contiguous()


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def _written_back(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The result in x's own memory: copied there unless the buffer is that memory."""
    if buffer.data_ptr() != x.data_ptr() or buffer.stride() != x.stride() or x.is_conj() or x.is_neg():
        x.copy_(buffer)
    return x


@lru_cache(maxsize=256)
def _part_bytes(sizes: tuple[int, ...], width: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(sizes))(*(size * width for size in sizes))
