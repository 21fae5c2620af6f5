"""Hopper and other CUDA GPUs with fast links: collectives by our own kernels (csrc/hopper), attention by torch's cuDNN and FlashAttention.

The communicator fuses all-reduce, residual add and RMSNorm in one kernel (TokenWeave, arXiv 2505.11329), summed by the switch where there
is one (multimem), else through the peers' pointers. `plan`, `layout` and `abi` are pure Python; `making` is where the ranks agree; `device`
is what another device would have to provide. Attention (`attention`, `operators`) is torch's kernels, and those of an installed package
(`package`: flash-attn before flashinfer); what none expresses the profile's next backend serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetero_attn.backend import Backend
from hetero_attn.communicator import Communicator
from hetero_attn.cubin import Cubin
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import HALF_DTYPES, AttentionSpec, Operands, dtype_name
from hetero_attn_hopper import attention
from hetero_attn_hopper.cuda import CudaDevice
from hetero_attn_hopper.device import Device
from hetero_attn_hopper.flash_attn import FlashAttnPackage
from hetero_attn_hopper.flashinfer import FlashInferPackage
from hetero_attn_hopper.kernels import cubins
from hetero_attn_hopper.making import hopper_communicator, symmetric_bytes
from hetero_attn_hopper.operators import TorchOperators
from hetero_attn_hopper.package import Package, serving

ARCH = "sm_90"
MAX_HEAD_DIM, HEAD_STEP = 256, 8       # of FlashAttention in torch


class HopperBackend(Backend):
    """operators, packages: what computes attention; device: what the communicator runs on. Tests give others."""

    name = "hopper"
    judges_lengths = False

    def __init__(
        self, operators: TorchOperators | None = None, device: Device | None = None, packages: Sequence[Package] | None = None
    ) -> None:
        self.operators, self.device = operators or TorchOperators(), device or CudaDevice()
        self.packages = (FlashAttnPackage(), FlashInferPackage()) if packages is None else tuple(packages)
        self._reasons: dict[int | None, list[str]] = {}      # by device, None = the current one

    def unavailable_reasons(self) -> list[str]:
        return self._looked_at(None)

    def unavailable_on(self, index: int) -> list[str]:
        return self._looked_at(index)

    def _looked_at(self, index: int | None) -> list[str]:
        if index not in self._reasons:
            self._reasons[index] = self.operators.unavailable_reasons(index)
        return list(self._reasons[index])

    def communicator_unavailable_reasons(self) -> list[str]:
        """Its own: the collectives run where torch has no FlashAttention, and from compute capability 7.0 on."""
        return self.device.unavailable_reasons()

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != self.operators.device:
            reasons.append(f"device is {spec.device}, torch's cuDNN and FlashAttention kernels run on {self.operators.device}")
        if spec.dtype not in HALF_DTYPES:
            reasons.append(f"dtype is {dtype_name(spec.dtype)}, the kernels have float16 and bfloat16; cast, or use backend 'sdpa'")
        if spec.needs_grad:
            reasons.append("gradients are needed, this backend serves inference; use backend 'sdpa', or torch.no_grad()")
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % HEAD_STEP:
            reasons.append(f"head_dim is {spec.head_dim}, FlashAttention takes multiples of {HEAD_STEP} up to {MAX_HEAD_DIM}; use 'sdpa'")
        if spec.v_head_dim != spec.head_dim:
            reasons.append(f"v_head_dim is {spec.v_head_dim}, FlashAttention wants head_dim's {spec.head_dim}; use backend 'sdpa'")
        if spec.mask is not None:
            reasons.append(f"attn_mask is {dtype_name(spec.mask)}, FlashAttention takes none and cuDNN would round it; use backend 'sdpa'")
        if spec.scale <= 0:
            reasons.append(f"scale is {spec.scale:g}, the kernels want it positive; use backend 'sdpa'")
        return reasons + self._package_reasons(spec)

    def _package_reasons(self, spec: AttentionSpec) -> list[str]:
        """Of what torch's kernels do not express: why no package serves it either."""
        if not attention.needs_package(spec):
            return []
        reasons = []
        if spec.page_size and attention.rows_see_unlike_keys(spec):
            reasons.append("rows of a paged call see unlike keys, and the kernels multiply what a row does not see by 0, which NaN "
                           "survives: only decoding a token at a time without a window goes on pages; use backend 'triton' or 'sdpa'")
        if serving(self.packages, spec) is not None:
            return reasons
        other = "use backend 'triton' or 'sdpa'"
        absent = [reason for each in self.packages for reason in each.reasons()]
        missing = f"; {' or '.join(absent)}" if absent else ""
        if spec.softcap:
            reasons.append(f"softcap is {spec.softcap:g}, torch's kernels have none{missing}, or {other}")
        if spec.alibi:
            reasons.append(f"alibi: torch's FlashAttention is built without it{missing}, or {other}")
        if spec.page_size:
            reasons.append("pages: torch's FlashAttention writes wrong rows when it decodes on them (pytorch#194167), older builds take "
                           f"none{missing}, or {other}")
        return reasons + [f"{reason}; or {other}" for each in self.packages for reason in each.objections(spec)]

    def remarks(self, spec: AttentionSpec) -> list[str]:
        remarks = []
        if attention.rows_see_unlike_keys(spec):
            remarks.append("values are read once more and copied, so that what is not finite stays with the rows that see it")
        if attention.needs_package(spec) and (package := serving(self.packages, spec)):
            remarks += [f"by the package {package.name}, which has not been run here so far", *package.remarks(spec)]
        return remarks

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attention.attention(self.operators, self.packages, q, k, v, spec, operands)

    def communicator(self, base: Communicator, profile: DeviceProfile) -> Communicator | list[str]:
        return hopper_communicator(base, profile, self.device)

    def communicator_bytes(self, profile: DeviceProfile, world_size: int) -> int:
        return symmetric_bytes(profile, world_size) if profile.device == self.device.type else 0

    def kernels(self) -> list[Cubin]:
        """Cubins for sm_90: used where a Hopper is. Making them takes NVRTC 12, no device."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = any(torch.cuda.get_device_capability(index) == (9, 0) for index in range(count))
        return cubins(ARCH, used_here=here)


backend = HopperBackend
