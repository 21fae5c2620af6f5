"""Collectives in shared memory, for ranks on one host whose tensors are on the CPU: the wrapper of torch.distributed's communicator.

What is done in csrc/cpu/shared_memory.cpp; this file checks arguments, at the cost of a microsecond (the decoder calls it a hundred times a
token), and group.py turns a wait that does not end into the base's error. Whatever has no form here (device tensors, fp64 norms) goes to
the base or is composed; which way a call goes depends on what all ranks share, so they go the same way.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from hetero_attn.collective_arguments import (
    NormArguments,
    agreed_sizes,
    check_all_gather,
    check_all_reduce,
    check_broadcast,
    check_reduce_scatter,
    shape_record,
)
from hetero_attn.communicator import Handle
from hetero_attn_cpu.group import SharedGroup
from hetero_attn_cpu.shared_calls import NORM, SUMMABLE

HEAP_RESULT_BYTES = 1 << 16                          # making a tensor in the heap takes 3 us: as long as copying this much
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_strided = torch.strided


class SharedMemoryCommunicator(SharedGroup):
    """Made by backends/hetero_attn_cpu/sharing.py once the ranks have agreed."""

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
        check_all_reduce(x)
        if not x.is_cpu:
            return self._base.all_reduce(x, site=site)
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            buffer = _contiguous(x)
            self.all_reduce(torch.view_as_real(buffer) if buffer.is_complex() else buffer, site=site)
            return _written_back(x, buffer)

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        check_reduce_scatter(x)
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
        dim = check_all_gather(x, dim, sizes, self.rank, self.world_size)
        if not x.is_cpu:
            return self._base.all_gather(x, dim, sizes=sizes, site=site)
        if self._base.busy():
            return self._base.in_background(lambda: self.all_gather(x, dim, sizes=sizes, site=site)).wait()
        self._begin("all_gather", x, site)
        if sizes is None:
            records = self._gather(shape_record(x, dim).view(1, -1), 0, [1] * self.world_size).tolist()
            self._inside = False                     # unlike shapes are refused, on every rank
            sizes = agreed_sizes(records)
            self._inside = True
        out = self._gather(_contiguous(x), dim, sizes)
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
        check_broadcast(x, src, self.world_size)
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
            x.shape, x.dtype, residual_shard.shape, residual_shard.dtype, weight.shape, weight.dtype, eps, weight_offset,
            *((post_weight.shape, post_weight.dtype) if post_weight is not None else ()),
        ) if _are_plain(x, residual_shard, weight, post_weight) else None
        if signature not in self._approved:
            call = self.checked_norm(NormArguments(x, residual_shard, weight, eps, site, weight_offset, post_weight))
            if not self._approve(signature, call):
                return self._other_norm(call)
        if self._base.busy():
            call = NormArguments(x, residual_shard, weight, eps, site, weight_offset, post_weight)
            return self._base.in_background(lambda: self._norm(call)).wait()
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

    def _norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        return self.all_reduce_rms_norm(*call[:4], **_options(call))

    def _approve(self, signature: tuple | None, call: NormArguments) -> bool:
        """Whether the native form takes checked arguments as they lie; if so they are quick from now on."""
        if signature is None or not {each.dtype for each in call.tensors.values()} <= NORM.keys() or not self._row_fits(call.x):
            return False
        if len(self._approved) >= 4096:
            self._approved.clear()
        self._approved.add(signature)
        return True

    def _row_fits(self, x: torch.Tensor) -> bool:
        """Whether a row of every rank has room in a staging buffer."""
        return x.shape[1] * x.element_size() <= self._sizes.stage // self.world_size

    def _other_norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        """What the native form does not take as it lies: strided tensors by copies of them, other dtypes and long rows composed."""
        if not (all(each.dtype in NORM and each.is_cpu for each in call.tensors.values()) and self._row_fits(call.x)):
            return self.reduce_add_norm(call)
        copies = {name: _copied(tensor) for name, tensor in call.tensors.items()}
        with torch.inference_mode(call.residual_shard.is_inference()), torch.no_grad():
            out, residual = self._norm(call._replace(**copies))
            call.residual_shard.copy_(residual)
        return out, call.residual_shard

    def start(self, operation: str, *args: Any, **options: Any) -> Handle:
        self._check(operation, *args, **options)
        self._base.raise_if_broken()
        call = getattr(self, operation)
        return self._base.in_background(lambda: call(*args, **options))

    def _check(self, operation: str, *args: Any, **options: Any) -> None:
        """Refuse what the operation does not take, before it is queued: afterwards the other ranks would wait."""
        if operation == "all_reduce_rms_norm":
            self.checked_norm(NormArguments(*args, **options))
        elif operation != "barrier":
            getattr(self, f"_check_{operation}")(*args, **options)

    def _check_all_reduce(self, x: Any, *, site: str = "") -> None:
        check_all_reduce(x)

    def _check_reduce_scatter(self, x: Any, *, site: str = "") -> None:
        check_reduce_scatter(x)

    def _check_all_gather(self, x: Any, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> None:
        check_all_gather(x, dim, sizes, self.rank, self.world_size)

    def _check_broadcast(self, x: Any, src: int = 0, *, site: str = "") -> None:
        check_broadcast(x, src, self.world_size)


def _options(call: NormArguments) -> dict[str, Any]:
    return {"site": call.site, "weight_offset": call.weight_offset, "post_weight": call.post_weight}


def _are_plain(*tensors: Any) -> bool:
    """Contiguous CPU tensors that nobody differentiates: check_tensor() has nothing against them, and memory may be read as it lies."""
    for x in tensors:
        if x is not None and not (type(x) in _PLAIN and x.is_cpu and x.layout is _strided and not x.requires_grad
                                  and x.is_contiguous() and not x.is_neg()):
            return False
    return True


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
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            x.copy_(buffer)
    return x


@lru_cache(maxsize=256)
def _part_bytes(sizes: tuple[int, ...], width: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(sizes))(*(size * width for size in sizes))
