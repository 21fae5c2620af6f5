"""FlashAttention for V100 (csrc/volta): m8n8k4 tensor cores, a shared-memory layout without conversions, split-KV decoding.

`tiling` chooses the variant in pure Python, `relayout` is the twin of the kernels' index maps, `calls` turns tensors into launches and
`launching` puts them on the device. A launcher may be another's: tests run the same kernels on the CPU by csrc/simt's executor.
"""

from __future__ import annotations

import torch

from hetero_attn.backend import LaunchedBackend
from hetero_attn.cubin import Cubin
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec, Operands, dtype_name
from hetero_attn_volta import calls
from hetero_attn_volta.kernels import cubins
from hetero_attn_volta.launching import CudaLauncher, Launcher
from hetero_attn_volta.tiling import MAX_HEAD_DIM, Plan, plan

ARCH = "sm_70"


class VoltaBackend(LaunchedBackend):
    """launcher: what runs the kernels, CuPy's by default."""

    name = "volta"
    judges_lengths = False

    def __init__(self, launcher: Launcher | None = None) -> None:
        super().__init__(launcher or CudaLauncher())
        self.hardware = load_profile("v100").hardware

    def probe(self, index: int | None = None) -> list[str]:
        """A tiny real call, prefill and decode: why it did not work, [] = it did."""
        try:
            device = self.launcher.device if index is None else f"{self.launcher.device}:{index}"
            ones = torch.ones(1, 1, 40, 32, dtype=torch.float16, device=device)
            for q_len in (40, 1):
                spec = AttentionSpec(self.launcher.device, torch.float16, 1, 1, 1, q_len, 40, 32, 32)
                out, _ = self.attention(ones[:, :, :q_len], ones, ones, spec, Operands())
                if not torch.equal(out, ones[:, :, :q_len]):
                    return [f"a tiny call gave {out.flatten()[0].item()} and not 1; please report it with `hetero-attn doctor --json`"]
        except Exception as error:
            return [f"a tiny call failed: {type(error).__name__}: {' '.join(str(error).split())}"]
        return []

    def notes(self) -> list[str]:
        if self.launcher.device != "cuda" or torch.cuda.get_device_capability() == (7, 0):
            return []
        return ["kernels are made for Volta (compute capability 7.0): on this device m8n8k4 is emulated by other instructions, and slow"]

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != self.launcher.device:
            reasons.append(f"device is {spec.device}, these kernels run on {self.launcher.device}; move the tensors there")
        if spec.dtype == torch.bfloat16:
            reasons.append("dtype is bfloat16, kernel has float16 only (Volta has no bf16 tensor cores); cast to float16")
        elif spec.dtype != torch.float16:
            reasons.append(f"dtype is {dtype_name(spec.dtype)}, kernel has float16 only; cast to float16, or use backend 'sdpa'")
        for name, value in (("head_dim", spec.head_dim), ("v_head_dim", spec.v_head_dim)):
            if value > MAX_HEAD_DIM:
                reasons.append(f"{name} is {value}, kernel has up to {MAX_HEAD_DIM}; use backend 'sdpa'")
        if spec.needs_grad:
            reasons.append("gradients are needed, kernel has no backward; use backend 'sdpa', or torch.no_grad() if they are not")
        return reasons

    def plan(self, spec: AttentionSpec) -> Plan:
        """What a call that it supports is launched as."""
        return plan(spec, self.hardware)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return calls.attention(self.launcher, self.plan(spec), q, k, v, spec, operands)

    def kernels(self) -> list[Cubin]:
        """Cubins for sm_70: used where a Volta is. Making them takes NVRTC 12, no device."""
        here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (7, 0)
        return cubins(ARCH, used_here=here)


backend = VoltaBackend
