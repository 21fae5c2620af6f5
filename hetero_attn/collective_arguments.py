"""Refuse what no collective can take, before anything is sent: afterwards the other ranks would wait.

One function an operation, the same for every communicator, and the arguments of all_reduce_rms_norm as one object. Each check names the
operation, the argument, what it was and what was expected: TypeError for a wrong kind, ValueError for a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

SUMMABLE = frozenset({
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
})

# How a tensor's shape travels where ranks' shapes may differ: int64 words, the dtype by number.
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
MAX_DIMS = 14


def check_tensor(operation: str, argument: str, value: Any, *, written: bool = False) -> None:
    """Refuse what no collective can take: TypeError for a non-tensor, ValueError for one that autograd is recording.

    `written`: the operation writes into the tensor, so its elements must not share memory (an expanded tensor's do).
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operation}: {argument} is {type(value).__name__}, expected a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{operation}: {argument} has layout {value.layout}, expected a dense (strided) tensor")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operation}: {argument} requires grad, and collectives carry no gradient; call it under torch.no_grad()")
    if written and any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride())):
        raise ValueError(f"{operation}: {argument} {list(value.shape)} is expanded and cannot be written in place; pass a clone()")


def check_sum(operation: str, x: torch.Tensor) -> None:
    """Raise TypeError for a dtype whose sum is not defined (bool, 8-bit floats)."""
    if x.dtype not in SUMMABLE:
        raise TypeError(f"{operation}: x is {x.dtype}, which has no sum here; cast it, to torch.int32 or torch.float32 for example")


def check_rows(operation: str, x: torch.Tensor) -> None:
    """Raise ValueError for a scalar where rows are needed."""
    if x.dim() < 1:
        raise ValueError(f"{operation}: x is a scalar, expected rows [T, ...]")


def check_rank(operation: str, argument: str, value: int, world_size: int) -> None:
    """Raise TypeError or ValueError unless value is a rank of the group."""
    if not isinstance(value, int):
        raise TypeError(f"{operation}: {argument} is {type(value).__name__}, expected an int")
    if not 0 <= value < world_size:
        raise ValueError(f"{operation}: {argument} is {value}, expected a rank of 0 .. {world_size - 1}")


def check_dim(operation: str, x: torch.Tensor, dim: int) -> int:
    """The axis `dim` of x counted from the front; raises ValueError for a scalar or an axis that x does not have."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{operation}: dim is {dim}, expected an axis of x {list(x.shape)}")
    return dim % x.dim()


def check_sizes(operation: str, sizes: Sequence[int] | None, own: int, rank: int, world_size: int) -> None:
    """Raise ValueError unless `sizes` (when given) has one extent per rank and this rank's agrees with its tensor."""
    if sizes is not None and (len(sizes) != world_size or sizes[rank] != own):
        raise ValueError(f"{operation}: sizes is {list(sizes)}, expected {world_size} extents with {own} for rank {rank}")


def shape_record(x: torch.Tensor, dim: int) -> torch.Tensor:
    """What a rank tells the others of its x before an all_gather along `dim` of unknown sizes: [MAX_DIMS + 3] int64.

    Raises ValueError for more than MAX_DIMS axes.
    """
    if x.dim() > MAX_DIMS:
        raise ValueError(f"all_gather: x has {x.dim()} axes, expected at most {MAX_DIMS}")
    own = [x.dim(), dim, DTYPES.index(x.dtype), *x.shape]
    return torch.tensor(own + [0] * (MAX_DIMS + 3 - len(own)), dtype=torch.int64, device="cpu")


def agreed_sizes(records: Sequence[Sequence[int]]) -> list[int]:
    """Every rank's extent of `dim`, from all ranks' shape records.

    Raises ValueError, on every rank alike, when their other axes or their dtypes differ.
    """
    others = [[*row[: 3 + row[1]], *row[4 + row[1] :]] for row in records]
    if any(other != others[0] for other in others):
        shapes = ", ".join(f"{list(row[3:3 + row[0]])} (dim {row[1]}, {DTYPES[row[2]]})" for row in records)
        raise ValueError(f"all_gather: the ranks' tensors are {shapes}; expected them to differ in dim only")
    return [row[3 + row[1]] for row in records]


# ---- one an operation ------------------------------------------------------------------------------------------------------------


def check_all_reduce(x: Any, *, site: str = "", operation: str = "all_reduce") -> None:
    """Raise TypeError or ValueError unless all_reduce takes x."""
    check_tensor(operation, "x", x, written=True)
    check_sum(operation, x)


def check_reduce_scatter(x: Any, *, site: str = "") -> None:
    """Raise TypeError or ValueError unless reduce_scatter takes x."""
    check_tensor("reduce_scatter", "x", x)
    check_rows("reduce_scatter", x)
    check_sum("reduce_scatter", x)


def check_all_gather(x: Any, dim: int, sizes: Sequence[int] | None, rank: int, world_size: int) -> int:
    """The axis counted from the front; raises TypeError or ValueError unless all_gather takes the arguments."""
    check_tensor("all_gather", "x", x)
    dim = check_dim("all_gather", x, dim)
    check_sizes("all_gather", sizes, x.shape[dim], rank, world_size)
    if x.dim() > MAX_DIMS:
        raise ValueError(f"all_gather: x has {x.dim()} axes, expected at most {MAX_DIMS}")
    return dim


def check_broadcast(x: Any, src: int, world_size: int) -> None:
    """Raise TypeError or ValueError unless broadcast takes the arguments."""
    check_tensor("broadcast", "x", x, written=True)
    check_rank("broadcast", "src", src, world_size)


class NormArguments(NamedTuple):
    """The arguments of Communicator.all_reduce_rms_norm, as its docstring describes them; may be built of what start() is given."""

    x: torch.Tensor                                  # [T, C]
    residual_shard: torch.Tensor                     # [rows(T), C]
    weight: torch.Tensor                             # [C]
    eps: float
    site: str
    weight_offset: float = 0.0
    post_weight: torch.Tensor | None = None          # [C]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are given, by name."""
        named = {"x": self.x, "residual_shard": self.residual_shard, "weight": self.weight}
        return named if self.post_weight is None else {**named, "post_weight": self.post_weight}

    def check(self, own_rows: int, where: str) -> None:
        """Raise TypeError or ValueError for what all_reduce_rms_norm does not take. own_rows: this rank's of T; where: which rank."""
        named = self.tensors
        for argument, value in named.items():
            check_tensor("all_reduce_rms_norm", argument, value, written=argument == "residual_shard")
            if not value.is_floating_point():
                raise TypeError(f"all_reduce_rms_norm: {argument} is {value.dtype}, expected a floating-point tensor")
        check_sum("all_reduce_rms_norm", self.x)
        shape = {"residual_shard": [own_rows, self.x.shape[-1]], "weight": [self.x.shape[-1]], "post_weight": [self.x.shape[-1]]}
        for argument, value in named.items():
            if argument != "x" and list(value.shape) != shape[argument]:
                raise ValueError(f"all_reduce_rms_norm: {argument} is {list(value.shape)}, expected {shape[argument]} "
                                 f"for x {list(self.x.shape)} on {where}")
        for argument, value in (("eps", self.eps), ("weight_offset", self.weight_offset)):
            if not isinstance(value, int | float):
                raise TypeError(f"all_reduce_rms_norm: {argument} is {type(value).__name__}, expected a number")
        if not (math.isfinite(self.eps) and self.eps >= 0 and math.isfinite(self.weight_offset)):
            raise ValueError(f"all_reduce_rms_norm: eps is {self.eps} and weight_offset {self.weight_offset}, expected finite numbers, "
                             "eps >= 0")
