"""Refuse what no collective can take, before anything is sent: afterwards the other ranks would wait.

Each check names the operation, the argument, what it was and what was expected: TypeError for a wrong kind, ValueError for a wrong value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
