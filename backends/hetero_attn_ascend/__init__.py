"""Ascend NPUs: torch_npu's fused operators where they express a call, our own two-level kernel in Triton for the rest.

`limits` says what the operators take, `sparse` puts causality and windows into their words, `operators` spells the calls, `calls` makes an
attention of them, `launcher` finds torch_npu. `chip`, `tiling` and `tiling_mask` say what two-level tiling is, `planner` chooses a plan by
the model of a core that `core_model` and `schedule_model` execute; `kernel_tiling`, `kernel_launch` and `two_level_kernel` do it in Triton.
`hccl` fuses product and all-reduce.
Nothing here has run on an NPU: the operators' schemas and the kernel's lowering are the real ones, the device is not.
"""

from __future__ import annotations

from collections import Counter

import torch

from hetero_attn.backend import Backend
from hetero_attn.communicator import Communicator
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_ascend import kernel_launch, limits
from hetero_attn_ascend.calls import Operators
from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.hccl import hccl_communicator
from hetero_attn_ascend.kernel_launch import TwoLevelKernel
from hetero_attn_ascend.launcher import DeviceLauncher, autoload_note
from hetero_attn_ascend.sparse import CompressedMask
from hetero_attn_ascend.tiling import Problem
from hetero_attn_ascend.tiling_report import TilingReport


class AscendBackend(Backend):
    """launcher: where torch_npu comes from and which tensors it takes; tests put an emulated one here. Constructing imports nothing."""

    name = "ascend"
    judges_lengths = True                   # lengths and batches have bounds

    def __init__(self, launcher: DeviceLauncher | None = None) -> None:
        self._launcher = launcher or DeviceLauncher()
        self._reasons: list[str] | None = None
        self._kernel_reasons: list[str] | None = None
        self._operators: Operators | None = None
        self._kernel: TwoLevelKernel | None = None
        self.served: Counter[str] = Counter()               # which way calls went; `make npu-check` shows it

    def unavailable_reasons(self) -> list[str]:
        if self._reasons is None:
            self._reasons = self._launcher.reasons()
        return list(self._reasons)

    def notes(self) -> list[str]:
        return ["verified on no NPU yet; `make npu-check` makes the page to send back", *autoload_note()]

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != self._launcher.device:
            reasons.append(f"device is {spec.device}, torch_npu's operators run on {self._launcher.device}; move the tensors there")
        if spec.needs_grad:
            reasons.append("gradients are needed, this backend serves inference; use backend 'sdpa', or torch.no_grad() if they are not")
        against_operators = operator_reasons(spec)
        if against_operators:
            if self._kernel_reasons is None:
                self._kernel_reasons = self._launcher.kernel_reasons()
            against_kernel = [*self._kernel_reasons, *kernel_launch.unsupported(spec)]
            reasons += [*against_operators, *against_kernel] if against_kernel else []
        return reasons

    def remarks(self, spec: AttentionSpec) -> list[str]:
        remarks = []
        if operator_reasons(spec):
            remarks.append(f"our own two-level kernel, which has run on no NPU: {operator_reasons(spec)[0]}")
        else:
            if spec.sinks:
                remarks.append("sinks join after the operator, by its lse")
            if spec.page_size and limits.pages(spec):
                remarks.append(f"keys are gathered from their pages first: {limits.pages(spec)[-1 if spec.q_len > 1 else 0]}")
            elif spec.varlen or limits.infer(spec):
                remarks.append("through npu_fusion_attention" + ("" if spec.varlen else f": {limits.infer(spec)[0]}"))
        if spec.varlen:
            remarks.append("lengths are read back to the host, once for tensors that stay as they are: they are needed as lists there")
        return remarks

    def gathered_copies(self, spec: AttentionSpec) -> int:
        by_kernel = bool(operator_reasons(spec))
        gathers = spec.page_size and (spec.rows_differ if by_kernel else bool(limits.pages(spec)))
        return (1 + spec.rows_differ) if gathers else 0                                     # and once more without what is not finite

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if operator_reasons(spec):
            if self._kernel is None:
                self._kernel = self._launcher.make_kernel()
            self.served["by our two-level kernel"] += 1
            return self._kernel.attention(q, k, v, spec, operands)
        if self._operators is None:
            self._operators = Operators(self._launcher.load(), CompressedMask())
        self.served["by the fused operators"] += 1
        return self._operators.attention(q, k, v, spec, operands)

    def communicator(self, base: Communicator, profile: DeviceProfile) -> Communicator | list[str]:
        """Row-parallel products by npu_mm_all_reduce_base over HCCL where its limits allow; everything else as `base` does it."""
        return hccl_communicator(base, profile, self._launcher)

    def tiling(self, spec: AttentionSpec, profile: DeviceProfile) -> TilingReport:
        return TilingReport.of(Chip.of(profile), Problem.of(spec), by_operators=not operator_reasons(spec))


def operator_reasons(spec: AttentionSpec) -> list[str]:
    """What stands against torch_npu's fused operators; [] = they serve the call."""
    return [*limits.both(spec), *(limits.fusion(spec) if limits.infer(spec) or spec.varlen else [])]


backend = AscendBackend
