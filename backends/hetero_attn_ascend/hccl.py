"""Row-parallel products fused with their all-reduce on Ascend: npu_mm_all_reduce_base over HCCL (CANN calls it MC2).

The operator cuts the product into tiles and sends one while it computes the next, which is the paper's tiling-AllReduce done by the device.
Its documentation bounds it: 16-bit floats, 1, 2, 4 or 8 ranks on one HCCS mesh, nothing empty, prefill only. A call beyond the bounds goes
to the base communicator, as a product and a sum. What stands against a whole group or dtype is told by fused_linear_reasons: there the
model's schedule does the tiling (models/schedule_setup.py), and where nothing does it leaves the product and its sum in one piece.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import HALF_DTYPES, dtype_name

WORLD_SIZES = (1, 2, 4, 8)
COLUMNS = 16                                # one step of the matrix unit
MIN_ROWS = 16                               # "not for decode" in the operator's documentation; fewer rows go as product and sum


def dtype_objections(dtype: torch.dtype) -> list[str]:
    return [] if dtype in HALF_DTYPES else [f"dtype is {dtype_name(dtype)}, the operator has float16 and bfloat16"]


def fusion_objections(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """Why npu_mm_all_reduce_base cannot take x [..., K] @ weight [C, K].T; [] = it can. The same on every rank, for all must go one way:
    it looks at nothing that ranks may differ in (K, and who holds a bias)."""
    objections = dtype_objections(x.dtype)
    rows = x.shape[:-1].numel()
    if weight.dtype != x.dtype:
        objections.append(f"weight is {dtype_name(weight.dtype)} beside x of {dtype_name(x.dtype)}, the operator wants one dtype")
    if not weight.shape[0]:
        objections.append("weight has no rows, the operator takes nothing empty")
    if rows < MIN_ROWS:
        objections.append(f"{rows} rows, the operator is for prefill (from {MIN_ROWS} rows on here)")
    return objections


class HcclCommunicator(Communicator):
    """Wraps the torch.distributed communicator. npu: the torch_npu module; group_name: HCCL's name of a group for the operator alone: then
    its messages never mix with collectives in flight on the base's. against: why this group cannot use it; then the base serves."""

    def __init__(self, base: Communicator, npu: Any, group_name: str, against: Sequence[str] = ()) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self._npu, self._group_name, self._against = npu, group_name, tuple(against)
        self._fits: dict[str, bool] = {}            # site -> whether every rank holds columns there; one without cannot call the operator

    def linear_all_reduce(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, site: str
    ) -> torch.Tensor:
        fits = x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1]         # else the base says what is wrong
        fits = fits and x.device.type == weight.device.type == self.device.type
        if not fits or self._against or self.failure or fusion_objections(x, weight):
            return super().linear_all_reduce(x, weight, bias, site=site)
        rows, own = x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight                              # [M, K], [C, K]
        bias = bias if self.rank == 0 else None
        if bias is not None or not rows.shape[1]:
            rows, own = _with_bias(rows, own, bias)
        out = self._npu.npu_mm_all_reduce_base(rows.contiguous(), own.T, self._group_name, reduce_op="sum")
        return out.view(*x.shape[:-1], weight.shape[0])

    def fused_linear_reasons(self, dtype: torch.dtype) -> list[str]:
        return [*self._against, *dtype_objections(dtype)]


def _with_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K + 16] and weight [C, K + 16], whose product is that of x and weight plus the bias: a column of ones meets the bias.

    The operator's documents do not say whether a bias of its own counts once or once a rank, and a rank without columns (K = 0) may not
    call it with nothing. So neither needs to be known to the other ranks."""
    ones, column = x.new_zeros(x.shape[0], COLUMNS), weight.new_zeros(weight.shape[0], COLUMNS)
    if bias is not None:
        ones[:, 0], column[:, 0] = 1, bias
    return torch.cat([x, ones], dim=1), torch.cat([weight, column], dim=1)


def hccl_communicator(base: Communicator, profile: DeviceProfile, launcher: Any) -> Communicator | list[str]:
    """The communicator, or the reasons against having one, which are every rank's alike. A group that has one and cannot fuse knows why.
    All ranks call it together."""
    away, against, name = [], [], ""
    if base.device.type != launcher.device:
        away.append(f"device is {base.device}, npu_mm_all_reduce_base runs on {launcher.device}")
    if base.world_size not in WORLD_SIZES:
        against.append(f"world size is {base.world_size}, npu_mm_all_reduce_base takes {', '.join(map(str, WORLD_SIZES))}")
    if profile.codec not in ("none", "auto"):
        against.append(f"codec is {profile.codec}, which packs partial sums; npu_mm_all_reduce_base sends them plain; say codec: none")
    told = _told_by_all(base, {"away": away, "against": against, "host": socket.gethostname()})
    away, against = (_of_ranks(told, kind) for kind in ("away", "against"))
    hosts = sorted({each["host"] for each in told})
    if len(hosts) > 1:
        against.append(f"the ranks are on {', '.join(hosts)}; npu_mm_all_reduce_base wants one HCCS mesh, which is one host")
    if away:
        return [*away, *against]
    if not against:                                                 # all ranks are here, as making a group wants it
        try:
            name = launcher.group_name(base)
            failed = []
        except (RuntimeError, AttributeError, ValueError) as error:
            failed = [f"HCCL gives the group no name: {str(error).splitlines()[0]}"]
        against = _of_ranks(_told_by_all(base, {"against": failed}), "against")
    return HcclCommunicator(base, launcher.load(), name, against)


def _of_ranks(told: list[dict], kind: str) -> list[str]:
    """The reasons of all ranks; what every rank says is said once."""
    if all(each[kind] == told[0][kind] for each in told):
        return list(told[0][kind])
    return [f"rank {rank}: {reason}" for rank, each in enumerate(told) for reason in each[kind]]


def _told_by_all(base: Communicator, said: dict) -> list[dict]:
    """Every rank's words, in rank order, as JSON in bytes over the base."""
    own = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device="cpu")
    lengths = base.all_gather(torch.tensor([own.numel()], device="cpu"), sizes=[1] * base.world_size).tolist()
    joined = bytes(base.all_gather(own, sizes=lengths).tolist())
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [json.loads(joined[start : start + length]) for start, length in zip(starts, lengths)]
