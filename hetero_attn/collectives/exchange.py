"""What travels: each collective as a generator over torch.distributed calls, which yields the work objects it has issued.

A Choice says which algorithm serves a call: torch.distributed's own collective ("native"), or one of algorithms.py over point-to-point
messages. Run to the end such a generator is the synchronous form; left after its first yield it is the asynchronous one. What
torch.distributed leaves open is settled here: 16-bit floats are summed in fp32 and rounded once, rows need not divide by the ranks, any
dtype moves (as bytes), tensors of devices without a library go through host memory: packed, where a codec has kernels for the device.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hetero_attn.collective_arguments import NormArguments, agreed_sizes, shape_record
from hetero_attn.collectives import algorithms
from hetero_attn.collectives.choice import NATIVE, PLAIN, Choice, Fixed, Route
from hetero_attn.collectives.codec import Codecs, resident
from hetero_attn.collectives.coding import Coding, Plain, sum_in_rank_order
from hetero_attn.collectives.wire import AHEAD_BYTES, Wire
from hetero_attn.communicator import add_and_norm, shard_counts, shard_rows

Steps = Generator[Any, None, Any]                    # yields torch.distributed work objects, returns the operation's result
SUMS = frozenset({"all_reduce", "reduce_scatter"})      # what a codec may serve
GLOO_SUMS = frozenset({torch.float32, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64})
# Up to this many gathered elements a 16-bit sum gathers everything: one collective's latency instead of two.
ONE_SHOT_ELEMENTS = 1 << 16

# torch 2.13 renamed these two and warns about the old names; both take one flat output or input tensor.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """The collectives of one rank over one group. Arguments are checked by the caller; results are as Communicator documents them.

    group: serves CPU tensors by gloo and, where `native` names a device type, that device's tensors by its own library.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None, native: str, choice: Choice | None = None) -> None:
        self.rank, self.world_size, self.group, self.native = rank, world_size, group, native
        self.choice = choice or Choice()
        self.wire = Wire(rank, world_size, group)
        self.codecs = Codecs(rank, world_size)

    def is_single(self, operation: str, x: torch.Tensor, site: str, nbytes: int) -> bool:
        """Whether the call issues all it sends by its first step. nbytes as Choice.pick takes them."""
        algorithm = self._route(operation, x, nbytes, site).algorithm
        if algorithm == NATIVE or self.is_native(x):
            return operation != "all_reduce" or x.dtype in GLOO_SUMS or x.is_complex() or self.is_native(x)
        if operation == "all_reduce" and 2 * nbytes > AHEAD_BYTES:       # one_shot's runs: each is issued, and waited for, by its own step
            return False
        return algorithm in algorithms.SINGLE[operation]

    def is_coded(self, operation: str, x: torch.Tensor, site: str) -> bool:
        """Whether the call's sum goes through a codec, whose end the host waits for."""
        return operation in SUMS and not self._coding(self._route(operation, x, x.nbytes, site), x, site).lossless

    def all_reduce(self, x: torch.Tensor, site: str = "") -> Steps:
        if not x.numel() or self.world_size == 1:
            return _written_back(x, self._sendable(x))
        route = self._route("all_reduce", x, x.nbytes, site)
        coding = self._coding(route, x, site)
        buffer = self._sendable(x, on_device=coding.on_device)
        flat = torch.view_as_real(buffer).flatten() if buffer.is_complex() else buffer.flatten()
        if route.algorithm == NATIVE or (self.is_native(x) and coding.lossless):
            yield from self._native_sum(flat)
        else:
            if self.is_native(x):
                yield from resident.all_reduce(route.algorithm, self._gather_native, self._swap, self.rank, self.world_size, coding, flat)
            else:
                yield from algorithms.all_reduce(route.algorithm, self.wire, coding, flat)
            coding.finish()
        return _written_back(x, buffer)

    def _native_sum(self, flat: torch.Tensor) -> Steps:
        """Sum flat [n] over the ranks into flat by torch.distributed's collectives."""
        if self.is_native(flat) or flat.dtype in GLOO_SUMS:
            yield dist.all_reduce(flat, group=self.group, async_op=True)
        elif flat.numel() * self.world_size <= ONE_SHOT_ELEMENTS:
            parts = yield from self._gather_native(flat, [flat.numel()] * self.world_size)
            flat.copy_(sum_in_rank_order(parts, flat.dtype))
        else:
            counts = shard_counts(self.world_size, flat.numel())
            own = yield from self._scatter_native(flat, counts)
            parts = yield from self._gather_native(own, counts)
            torch.cat([part[:count] for part, count in zip(parts, counts)], out=flat)

    def reduce_scatter(self, x: torch.Tensor, site: str = "") -> Steps:
        own = shard_rows(x.shape[0], self.rank, self.world_size)
        if self.world_size == 1 or not x.numel():
            return x[own].clone(memory_format=torch.contiguous_format)
        route = self._route("reduce_scatter", x, x.nbytes, site)
        # With fewer rows than ranks some rank hears from nobody, and would not learn that a codec refused: such calls are short anyway.
        coding = self._coding(route if x.shape[0] >= self.world_size else Route(route.algorithm), x, site)
        buffer = self._sendable(x, on_device=coding.on_device)
        flat = torch.view_as_real(buffer).flatten() if buffer.is_complex() else buffer.flatten()
        width = flat.numel() // x.shape[0]
        counts = [rows * width for rows in shard_counts(self.world_size, x.shape[0])]
        if route.algorithm == NATIVE or (self.is_native(x) and coding.lossless):
            total = yield from self._scatter_native(flat, counts)
        else:
            if self.is_native(x):
                total = yield from resident.reduce_scatter(self._swap, self.rank, coding, flat, counts)
            else:
                total = yield from algorithms.reduce_scatter(route.algorithm, self.wire, coding, flat, counts)
            coding.finish()
        if x.is_complex():
            total = torch.view_as_complex(total.view(-1, 2))
        return total.view(own.stop - own.start, *x.shape[1:]).to(x.device)

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int] | None, site: str = "") -> Steps:
        if sizes is None:
            sizes = yield from self._exchange_sizes(x, dim)
        buffer = self._sendable(x)
        width = math.prod(size for axis, size in enumerate(x.shape) if axis != dim)
        counts = [size * width for size in sizes]
        whole = yield from self._gather_flat(buffer.flatten(), counts, site)
        if dim == 0:
            return whole.view(sum(sizes), *x.shape[1:]).to(x.device)
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat([part.view(shape) for part, shape in zip(whole.split(counts), shapes)], dim).to(x.device)

    def broadcast(self, x: torch.Tensor, src: int, site: str = "") -> Steps:
        buffer = self._sendable(x)
        if buffer.numel() and self.world_size > 1:
            route = self._route("broadcast", x, x.nbytes, site)
            if route.algorithm == NATIVE:
                yield dist.broadcast(_as_bytes(buffer), src, group=self.group, async_op=True)
            else:
                yield from algorithms.broadcast(route.algorithm, self.wire, _as_bytes(buffer), src)
        return x if self.rank == src else _written_back(x, buffer)

    def all_reduce_rms_norm(self, call: NormArguments) -> Steps:
        shard = yield from self.reduce_scatter(call.x, call.site)                                       # [rows(T), C]
        normed = add_and_norm(shard, call.residual_shard, call.weight, call.eps, call.weight_offset, call.post_weight)
        normed = yield from self.all_gather(normed, 0, shard_counts(self.world_size, call.x.shape[0]), call.site)     # [T, C]
        return normed, call.residual_shard

    # ---- pieces: flat tensors in and out

    def _route(self, operation: str, x: torch.Tensor, nbytes: int, site: str) -> Route:
        """What the choice says. A device library keeps its own ways, but for sums that the profile asks to be coded: a table measured on
        other links says nothing of it."""
        if not self.is_native(x):
            return self.choice.pick(operation, nbytes, x.dtype, site)
        asked = operation in SUMS and isinstance(self.choice, Fixed) and self.choice.coded
        return self.choice.pick(operation, nbytes, x.dtype, site) if asked else Route()

    def _coding(self, route: Route, x: torch.Tensor, site: str) -> Coding:
        """How x's values become bytes on this route: as they are, unless a codec is asked for and x is of real numbers."""
        dtype = x.dtype.to_real() if x.is_complex() else x.dtype
        if route.codec == PLAIN or not x.dtype.is_floating_point:
            return Plain(dtype)
        return self.codecs.coding(route.codec, site, x.shape[-1] if x.dim() else 1, dtype, x.device, resident=self.is_native(x))

    def _gather_flat(self, flat: torch.Tensor, counts: list[int], site: str = "") -> Steps:
        """flat [counts[rank]] of each rank -> all of them [sum of counts] on every rank, in rank order."""
        total = sum(counts) * flat.element_size()
        route = self._route("all_gather", flat, total, site)
        if route.algorithm == NATIVE or self.world_size == 1 or not total:
            parts = yield from self._gather_native(flat, counts)
            return parts.view(-1) if min(counts) == max(counts) else torch.cat([part[:count] for part, count in zip(parts, counts)])
        out = flat.new_empty(sum(counts))
        sizes = [count * flat.element_size() for count in counts]
        yield from algorithms.all_gather(route.algorithm, self.wire, _as_bytes(flat), sizes, _as_bytes(out))
        return out

    def _scatter_native(self, flat: torch.Tensor, counts: list[int]) -> Steps:
        """flat [sum of counts] on every rank -> the sum of this rank's piece [counts[rank]], added in rank order."""
        own = counts[self.rank]
        if self.is_native(flat):
            if min(counts) == max(counts):
                total = flat.new_empty(own)
                yield reduce_scatter_single(total, flat, group=self.group, async_op=True)
                return total
            total = flat.clone()
            yield dist.all_reduce(total, group=self.group, async_op=True)
            return total.split(counts)[self.rank].clone()
        item = flat.element_size()
        parts = yield from self._swap(_as_bytes(flat), [count * item for count in counts], own * item)
        return sum_in_rank_order(parts.flatten().view(flat.dtype).view(self.world_size, own), flat.dtype)

    def _swap(self, flat: torch.Tensor, sizes: list[int], own: int) -> Steps:
        """flat uint8 [sum of sizes], sizes[r] bytes for rank r -> uint8 [N, own], from each rank what it had for this one."""
        parts = flat.new_empty(self.world_size, own)
        yield dist.all_to_all_single(parts.view(-1), flat, [own] * self.world_size, sizes, group=self.group, async_op=True)
        return parts

    def _gather_native(self, flat: torch.Tensor, counts: list[int]) -> Steps:
        """flat [counts[rank]] of each rank -> all of them [N, longest] on every rank; shorter ones are padded at their end."""
        longest = max(counts)
        if self.world_size == 1:
            return flat.clone().view(1, longest)
        parts = flat.new_empty(self.world_size, longest)                                       # [N, longest]
        if longest:
            padded = flat
            if flat.numel() < longest:
                padded = flat.new_empty(longest)
                padded[: flat.numel()] = flat
            yield all_gather_single(_as_bytes(parts), _as_bytes(padded), group=self.group, async_op=True)
        return parts

    def _exchange_sizes(self, x: torch.Tensor, dim: int) -> Steps:
        """Every rank's extent of `dim`. ValueError, on every rank alike, when their other axes or their dtypes differ."""
        own = shape_record(x, dim)
        rows = yield from self._gather_flat(own, [own.numel()] * self.world_size)
        return agreed_sizes(rows.view(self.world_size, -1).tolist())

    def is_native(self, x: torch.Tensor) -> bool:
        """Whether the group's device library (NCCL, HCCL) takes this tensor; gloo is not meant."""
        return x.device.type != "cpu" and x.device.type == self.native

    def _sendable(self, x: torch.Tensor, *, on_device: bool = False) -> torch.Tensor:
        """x itself where the group, or (on_device) a coding, can take it; else a contiguous copy, on the host where the device has no
        library."""
        x = x.detach().resolve_conj().resolve_neg()
        if x.device.type != "cpu" and not self.is_native(x) and not on_device:
            x = x.to("cpu")
        return x.contiguous()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as the bytes it is made of: gloo moves few dtypes, and bytes are one of them."""
    return x.reshape(-1).view(torch.uint8)


def _written_back(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The result in x's own memory: copied there unless the buffer is that memory."""
    if buffer.data_ptr() != x.data_ptr() or buffer.device != x.device or buffer.stride() != x.stride() or x.is_conj() or x.is_neg():
        x.copy_(buffer)
    return x
