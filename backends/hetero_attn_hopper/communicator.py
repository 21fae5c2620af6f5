"""Collectives by kernels that reach into every rank's memory: what becomes a launch, and what goes to the communicator below.

A tensor from empty() is taken where it lies; another is copied into the symmetric room for the length of the call. What has no kernel
(dtype, size, sizes unknown) goes to the base, decided by what all ranks know alike (plan.py); `objections` keeps why. Nothing waits for the
device: a kernel whose wait ran into the time-out says so in a word of host memory, which every call and every wait() looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from hetero_attn.collective_arguments import NormArguments, check_all_gather, check_all_reduce, check_broadcast, check_reduce_scatter
from hetero_attn.communicator import Handle
from hetero_attn.spec import dtype_name
from hetero_attn_hopper import plan
from hetero_attn_hopper.abi import KINDS, UNIT
from hetero_attn_hopper.group import HopperGroup
from hetero_attn_hopper.lane import LaneHandle

VECTOR = 16                                          # bytes that are moved at once
BYTES = torch.bfloat16                               # all_gather moves bytes, whatever they are: one dtype's kernel does it for all


class Work(NamedTuple):
    """A checked call that the kernels do: run(ctas) enqueues it and gives its result; site: for the number of CTAs."""

    run: Callable[[int], Any]
    tensors: tuple[torch.Tensor, ...]
    site: str


class HopperCommunicator(HopperGroup):
    """Made by making.py once the ranks have agreed."""

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        return self._now("all_reduce", x, site=site)

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        return self._now("reduce_scatter", x, site=site)

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        return self._now("all_gather", x, dim, sizes=sizes, site=site)

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        return self._now("broadcast", x, src, site=site)

    def reduce_add_norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        return self._now("all_reduce_rms_norm", *call[:4], **_options(call))

    def _now(self, operation: str, *args: Any, **options: Any) -> Any:
        """A call on the calling stream, by as many CTAs as are quickest when nothing runs beside it."""
        work = getattr(self, f"_plan_{operation}")(*args, **options)
        if work is None:
            return getattr(self._base, operation)(*args, **options)
        self._check_status()
        with _modes(work.tensors):
            result, mark = self._lane.run(lambda: work.run(self.ctas.alone))
        self._marked(mark)
        if self._lane.streams is None:                   # it is done, and may have failed
            self._check_status()
        return result

    def start(self, operation: str, *args: Any, **options: Any) -> Handle:
        work = None if operation == "barrier" else getattr(self, f"_plan_{operation}")(*args, **options)
        if work is None:
            return self._base.start(operation, *args, **options)
        self._check_status()
        with _modes(work.tensors):
            handle, mark = self._lane.start(lambda: work.run(self.ctas_beside(work.site)), work.tensors, self._check_status)
        self._marked(mark)
        if not isinstance(handle, LaneHandle):
            self._check_status()
        return handle

    # ---- checked and planned: the work, or None where the base does it --------------------------------------------------------------

    def _plan_all_reduce(self, x: torch.Tensor, *, site: str = "") -> Work | None:
        check_all_reduce(x)
        if self._below_for("all_reduce", x, plan.sum_objections(x.dtype, x.nbytes, self.layout)):
            return None
        return Work(lambda ctas: self._all_reduce(x, ctas, _text("all_reduce", x, site)), (x,), site)

    def _plan_reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> Work | None:
        check_reduce_scatter(x)
        padded = sum(plan.padded_shards(x.shape[0], math.prod(x.shape[1:]), self.world_size)[1]) * UNIT * x.itemsize
        if self._below_for("reduce_scatter", x, plan.sum_objections(x.dtype, padded, self.layout)):
            return None
        return Work(lambda ctas: self._reduce_scatter(x, ctas, _text("reduce_scatter", x, site)), (x,), site)

    def _plan_all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> Work | None:
        dim = check_all_gather(x, dim, sizes, self.rank, self.world_size)
        if sizes is None:
            objections = ["sizes are not given, and asking the other ranks for theirs would stop the host"]
        else:
            objections = plan.move_objections(VECTOR * sum(self._vectors(x, dim, sizes)), self.layout)
        if self._below_for("all_gather", x, objections):
            return None
        return Work(lambda ctas: self._all_gather(x, dim, list(sizes), ctas, _text("all_gather", x, site)), (x,), site)

    def _plan_broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> Work | None:
        check_broadcast(x, src, self.world_size)
        if self._below_for("broadcast", x, plan.move_objections(x.nbytes, self.layout)):
            return None
        return Work(lambda ctas: self._broadcast(x, src, ctas, _text(f"broadcast from rank {src}", x, site)), (x,), site)

    def _plan_all_reduce_rms_norm(self, *args: Any, **options: Any) -> Work | None:
        call = self.checked_norm(NormArguments(*args, **options))
        weights = [each.dtype for each in (call.weight, call.post_weight) if each is not None]
        objections = plan.norm_objections(call.x.dtype, call.residual_shard.dtype, weights, tuple(call.x.shape), self.layout,
                                          self._shared_bytes)
        if self._below_for("all_reduce_rms_norm", call.x, objections):
            return None
        return Work(lambda ctas: self._norm(call, ctas, _text("all_reduce_rms_norm", call.x, call.site)), tuple(call.tensors.values()),
                    call.site)

    # ---- enqueued, on the stream that is current --------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor, ctas: int, text: str) -> torch.Tensor:
        elements, units = x.numel(), plan.units_of(x.numel())
        if plan.is_one_shot(units, x.dtype, self.layout):
            source = _vectors_of(x)
            fields = {"source": source.data_ptr(), "out": source.data_ptr(), "elements": elements, "staging": self.layout.staging_at,
                      "staging_units": self.layout.stage // (UNIT * x.itemsize)}
            launch = plan.one_shot_launch(units, min(self.ctas.alone, plan.ONE_SHOT_CTAS))
            self._launch("one_shot", x.dtype, launch, text, [elements], fields)
            return _written_back(x, source)
        padded = units * UNIT * x.itemsize
        offset, room = self._place(x, padded), None
        if offset is None:
            room, offset = self._room(padded).view(x.dtype)[:elements], self.layout.room_at
            room.copy_(_flat(x))
        own = self.rows(units)
        launch = plan.flat_launch(-(-units // self.world_size), ctas)
        self._launch("all_reduce", x.dtype, launch, text, [elements],
                     {"offset": offset, "first": own.start, "count": own.stop - own.start})
        return x if room is None else _written_back(x, room.view(x.shape))

    def _reduce_scatter(self, x: torch.Tensor, ctas: int, text: str) -> torch.Tensor:
        T, width = x.shape[0], math.prod(x.shape[1:])
        starts, units = plan.padded_shards(T, width, self.world_size)
        offset = self._place(x, x.nbytes) if width % UNIT == 0 else None
        if offset is None:
            room, offset, begin = self._room(sum(units) * UNIT * x.itemsize).view(x.dtype), self.layout.room_at, 0
            flat = _flat(x)
            if width % UNIT == 0:
                room.copy_(flat)
            else:                                    # each shard on units of its own
                for start, count in zip(starts, self.row_counts(T)):
                    room[start * UNIT : start * UNIT + count * width].copy_(flat[begin * width : (begin + count) * width])
                    begin += count
        rows = self.rows(T)
        out = torch.empty(max(units[self.rank], 1) * UNIT, dtype=x.dtype, device=x.device)
        self._launch("reduce_scatter", x.dtype, plan.flat_launch(max(units), ctas), text, [list(x.shape)],
                     {"offset": offset, "out": out.data_ptr(), "first": starts[self.rank], "count": units[self.rank]})
        return out[: (rows.stop - rows.start) * width].view(rows.stop - rows.start, *x.shape[1:])

    def _all_gather(self, x: torch.Tensor, dim: int, sizes: list[int], ctas: int, text: str) -> torch.Tensor:
        vectors, shape = self._vectors(x, dim, sizes), [*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]]
        starts, source = [0, *accumulate(vectors)], _whole_vectors(x, vectors[self.rank])
        whole = math.prod(x.shape[:dim]) == 1 and VECTOR * starts[-1] == math.prod(shape) * x.itemsize
        target = self._take(VECTOR * starts[-1]) if whole else None
        if target is None:
            offset, target, kept = self.layout.room_at, self._room(VECTOR * starts[-1]), False
        else:
            offset, kept = self._place(target, target.nbytes), True
        self._launch("all_gather", BYTES, plan.flat_launch(max(vectors), ctas), text, [x.dtype, dim, sizes, *shape],
                     {"offset": offset, "source": source.data_ptr(), "first": starts[self.rank], "count": vectors[self.rank]})
        if kept:
            return target.view(x.dtype).view(shape)
        pieces = []
        for start, size in zip(starts, sizes):
            own = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
            pieces.append(target[VECTOR * start : VECTOR * start + math.prod(own) * x.itemsize].view(x.dtype).view(own))
        return torch.cat(pieces, dim)

    def _broadcast(self, x: torch.Tensor, src: int, ctas: int, text: str) -> torch.Tensor:
        vectors = -(-x.nbytes // VECTOR)
        room, source = self._room(VECTOR * vectors), _whole_vectors(x, vectors) if self.rank == src else x
        self._launch("all_gather", BYTES, plan.flat_launch(vectors, ctas), text, ["broadcast", src, x.dtype, *x.shape],
                     {"offset": self.layout.room_at, "source": source.data_ptr(), "count": vectors if self.rank == src else 0})
        return x if self.rank == src else _written_back(x, room[: x.nbytes].view(x.dtype).view(x.shape))

    def _norm(self, call: NormArguments, ctas: int, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, (T, C) = call.x, call.x.shape
        offset, room = self._place(x, x.nbytes), None
        if offset is None:
            room, offset = self._room(x.nbytes).view(x.dtype).view(T, C), self.layout.room_at
            room.copy_(x)
        residual, own = _vectors_of(call.residual_shard), self.rows(T)
        weight, post_weight = _one_dtype(call.weight, call.post_weight)
        self._launch("all_reduce_rms_norm", x.dtype, plan.norm_launch(T, C, self.world_size, ctas), text,
                     [T, C, call.post_weight is None], {
            "offset": offset, "first": own.start, "count": own.stop - own.start, "hidden": C,
            "residual": residual.data_ptr(), "residual_kind": KINDS[residual.dtype], "weight": weight.data_ptr(),
            "weight_kind": KINDS[weight.dtype], "post_weight": 0 if post_weight is None else post_weight.data_ptr(),
            "eps": call.eps, "weight_offset": call.weight_offset,
        })
        _written_back(call.residual_shard, residual)
        return (x if room is None else room.clone()), call.residual_shard

    def _vectors(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> list[int]:
        """16-byte vectors of every rank's piece, each from a vector on."""
        width = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :]) * x.itemsize
        return [-(-size * width // VECTOR) for size in sizes]


def _text(operation: str, x: torch.Tensor, site: str) -> str:
    return f"{operation} of x {list(x.shape)} {dtype_name(x.dtype)}" + (f" at {site}" if site else "")


def _options(call: NormArguments) -> dict[str, Any]:
    return {"site": call.site, "weight_offset": call.weight_offset, "post_weight": call.post_weight}


@contextmanager
def _modes(tensors: Sequence[torch.Tensor]):
    """No gradient; inference mode where the call is made under it, or a tensor was."""
    with torch.inference_mode(torch.is_inference_mode_enabled() or any(each.is_inference() for each in tensors)), torch.no_grad():
        yield


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1)


def _vectors_of(x: torch.Tensor) -> torch.Tensor:
    """x as plain contiguous memory that begins at a whole vector: x's own where it is that, else a copy."""
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    return x if x.data_ptr() % VECTOR == 0 else x.clone()


def _whole_vectors(x: torch.Tensor, vectors: int) -> torch.Tensor:
    """Memory of so many whole vectors that begins with x's bytes: x's own where they are that, else a copy."""
    source = _vectors_of(x)
    if source.nbytes == VECTOR * vectors:
        return source
    padded = torch.empty(VECTOR * vectors, dtype=torch.uint8, device=x.device)
    padded[: source.nbytes].copy_(source.view(-1).view(torch.uint8))
    return padded


def _one_dtype(weight: torch.Tensor, post_weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both as the kernel reads them: contiguous, of one dtype. fp32 holds every value of the others."""
    if post_weight is None:
        return _vectors_of(weight), None
    if weight.dtype != post_weight.dtype:
        weight, post_weight = weight.float(), post_weight.float()
    return _vectors_of(weight), _vectors_of(post_weight)


def _written_back(x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The result in x's own memory: copied there unless it is that memory."""
    if result.data_ptr() != x.data_ptr() or result.stride() != x.stride() or x.is_neg() or x.is_conj():
        x.copy_(result)
    return x
