"""Row-parallel products fused with their all-reduce on Ascend: npu_mm_all_reduce_base over HCCL (CANN calls it MC2).

The operator cuts the product into tiles and sends one while it computes the next, which is the paper's tiling-AllReduce done by the device.
Its documentation bounds it: 16-bit floats, 1, 2, 4 or 8 ranks on one HCCS mesh, nothing empty, prefill only. A call beyond the bounds goes
to the base communicator, as a product and a sum; a group that can never fuse says so when it is made, and the profile's next communicator
(with the schedule's own tiled all-reduce) serves.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import HALF_DTYPES, dtype_name

WORLD_SIZES = (1, 2, 4, 8)
MIN_ROWS = 16                               # "not for decode" in the operator's documentation; fewer rows go as product and sum


def fusion_objections(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    """Why npu_mm_all_reduce_base cannot take x [..., K] @ weight [C, K].T; [] = it can. The same on every rank, for all must go one way:
    it looks at nothing that ranks may differ in (K, which may be 0 on some, and who holds a bias)."""
    objections = []
    rows = x.shape[:-1].numel()
    if x.dtype not in HALF_DTYPES:
        objections.append(f"dtype is {dtype_name(x.dtype)}, the operator has float16 and bfloat16")
    if weight.dtype != x.dtype:
        objections.append(f"weight is {dtype_name(weight.dtype)} beside x of {dtype_name(x.dtype)}, the operator wants one dtype")
    if not weight.shape[0]:
        objections.append("weight has no rows, the operator takes nothing empty")
    if rows < MIN_ROWS:
        objections.append(f"{rows} rows, the operator is for prefill (from {MIN_ROWS} rows on here)")
    return objections


class HcclCommunicator(Communicator):
    """Wraps the torch.distributed communicator. npu: the torch_npu module; group_name: HCCL's name of a group for the operator alone: then
    its messages never mix with collectives in flight on the base's."""

    def __init__(self, base: Communicator, npu: Any, group_name: str) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self._npu, self._group_name = npu, group_name
        self._fits: dict[str, bool] = {}            # site -> whether every rank holds columns there; one without cannot call the operator

    def linear_all_reduce(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, site: str
    ) -> torch.Tensor:
        fits = x.dim() and weight.dim() == 2 and x.shape[-1] == weight.shape[1]         # else the base says what is wrong
        if not fits or self.failure or fusion_objections(x, weight) or not self._every_rank_has_columns(x, site):
            return super().linear_all_reduce(x, weight, bias, site=site)
        rows = x.reshape(-1, x.shape[-1]).contiguous()                                                  # [M, K]
        # The operator's documents do not say whether a bias counts once or once a rank; ours counts rank 0's, and joins after the sum.
        out = self._npu.npu_mm_all_reduce_base(rows, weight.T, self._group_name, reduce_op="sum")
        out = out.view(*x.shape[:-1], weight.shape[0])
        if self._any_bias(bias, site):
            out += self._bias_of_rank_0(bias, weight, site)
        return out

    def _every_rank_has_columns(self, x: torch.Tensor, site: str) -> bool:
        """Asked once a site, over the base: K may differ between ranks and be 0, and then all must go the other way together."""
        if site not in self._fits:
            counts = self.base.all_gather(torch.tensor([x.shape[-1]], device=self.device), sizes=[1] * self.world_size, site=site)
            self._fits[site] = bool((counts > 0).all())
        return self._fits[site]

    def _any_bias(self, bias: torch.Tensor | None, site: str) -> bool:
        key = f"{site} bias"
        if key not in self._fits:
            given = torch.tensor([int(bias is not None)], device=self.device)
            self._fits[key] = bool(self.base.broadcast(given, 0, site=site)[0])
        return self._fits[key]

    def _bias_of_rank_0(self, bias: torch.Tensor | None, weight: torch.Tensor, site: str) -> torch.Tensor:
        own = bias.clone() if self.rank == 0 else torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return self.base.broadcast(own, 0, site=site)


def hccl_communicator(base: Communicator, profile: DeviceProfile, launcher: Any) -> Communicator | list[str]:
    """The communicator, or the reasons against it, which are every rank's alike. All ranks call it together."""
    reasons = []
    if base.device.type != launcher.device:
        reasons.append(f"device is {base.device}, npu_mm_all_reduce_base runs on {launcher.device}")
    if base.world_size not in WORLD_SIZES:
        reasons.append(f"world size is {base.world_size}, npu_mm_all_reduce_base takes {', '.join(map(str, WORLD_SIZES))}")
    if profile.codec not in ("none", "auto"):
        reasons.append(f"codec is {profile.codec}, which packs partial sums; npu_mm_all_reduce_base sends them plain; say codec: none")
    name = ""
    if not reasons:
        try:
            name = launcher.group_name(base)
        except (RuntimeError, AttributeError, ValueError) as error:
            reasons.append(f"HCCL gives the group no name: {str(error).splitlines()[0]}")
    told = _told_by_all(base, {"reasons": reasons, "host": socket.gethostname()})
    reasons = [f"rank {rank}: {reason}" for rank, each in enumerate(told) for reason in each["reasons"]]
    hosts = sorted({each["host"] for each in told})
    if len(hosts) > 1 and not reasons:
        reasons = [f"the ranks are on {', '.join(hosts)}; npu_mm_all_reduce_base wants one HCCS mesh, which is one host"]
    return reasons or HcclCommunicator(base, launcher.load(), name)


def _told_by_all(base: Communicator, said: dict) -> list[dict]:
    """Every rank's words, in rank order, as JSON in bytes over the base."""
    own = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device="cpu")
    lengths = base.all_gather(torch.tensor([own.numel()], device="cpu"), sizes=[1] * base.world_size).tolist()
    joined = bytes(base.all_gather(own, sizes=lengths).tolist())
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [json.loads(joined[start : start + length]) for start, length in zip(starts, lengths)]
