"""The same numbers in unlike memory: strides, offsets and repeated axes that a kernel must honour or refuse.

What lies between and around the numbers is NaN (for integers: a value no table may hold), so a kernel that reads past its
strides shows it in the result.
"""

import torch

MEMORIES = ("contiguous", "transposed", "sliced", "interleaved", "unaligned", "expanded", "mixed")
MIXED = {"q": "sliced", "k": "contiguous", "v": "transposed"}            # what "mixed" means for each; contiguous for operands


def placed(x: torch.Tensor, memory: str, device: str, head_axis: int | None = None, name: str = "") -> torch.Tensor:
    """A new tensor on `device` that equals `x` and lies in the asked memory.

    contiguous; transposed: the last but one axis is the outermost in memory; sliced: a corner of a larger tensor, unit stride
    in the last axis; interleaved: stride 2 in the last axis; unaligned: contiguous from one element after an allocation's start;
    expanded: stride 0 along `head_axis`, along which x must repeat (contiguous where head_axis is None); mixed: q, k and v
    (`name`) each in another one, as a key out of a rotary embedding and a value that is a view are.
    """
    memory = MIXED.get(name, "contiguous") if memory == "mixed" else memory
    x = x.detach().to(device)
    if memory == "transposed" and x.dim() >= 2:
        return x.movedim(-2, 0).contiguous().clone().movedim(0, -2)
    if memory == "sliced" and x.dim():
        room = _blank([size + 3 for size in x.shape], x)
        return room[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)
    if memory == "interleaved" and x.dim():
        return _blank([*x.shape[:-1], 2 * x.shape[-1]], x)[..., ::2].copy_(x)
    if memory == "unaligned":
        return _blank([x.numel() + 1], x)[1:].view(x.shape).copy_(x)
    if memory == "expanded" and head_axis is not None and x.shape[head_axis]:
        return x.narrow(head_axis, 0, 1).contiguous().clone().expand_as(x)
    return x.contiguous().clone()


def _blank(shape: list[int], like: torch.Tensor) -> torch.Tensor:
    if like.is_floating_point():
        return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)
    return torch.full(shape, -7 if like.dtype != torch.bool else 1, dtype=like.dtype, device=like.device)
