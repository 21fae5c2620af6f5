"""Attention in Triton for any GPU that Triton serves: NVIDIA from Ampere on, AMD, one source for prefill, decode and pages.

`tiling` cuts a call in pure Python, `tuning` measures tiles where asked to (`tuned_tiles` keeps them), `calls` turns tensors into launches,
`launching` puts them on the device, and the kernels are `attention_kernel`, `combine_kernel`, `norm_kernel` and `codec_kernel`. A launcher
may be another's: tests run the same kernels on the CPU by Triton's interpreter. Nothing imports triton before it is needed.
"""

from __future__ import annotations

import torch

from hetero_attn.backend import LaunchedBackend, withdrawn
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import HALF_DTYPES, AttentionSpec, Operands, dtype_name
from hetero_attn_triton import calls, norm_calls, tiling
from hetero_attn_triton.codec_calls import CodecCalls
from hetero_attn_triton.launching import DoesNotCompile, GpuLauncher, Launcher, TooLarge
from hetero_attn_triton.tiling import MAX_HEAD_DIM, Demand, Device, Plan, Tile

DTYPES = (*HALF_DTYPES, torch.float32)


class TritonBackend(LaunchedBackend):
    """launcher: what runs the kernels, Triton's own compiler by default."""

    name = "triton"
    judges_lengths = False

    def __init__(self, launcher: Launcher | None = None) -> None:
        super().__init__(launcher or GpuLauncher())
        self._refused: dict[tuple[Device, Demand], frozenset[Tile]] = {}       # tiles that a device turned out not to hold
        self._uncompiled: dict[tuple, str] = {}                       # kind of call -> the compiler's words, see _kind

    def probe(self, index: int | None = None) -> list[str]:
        """A small real call on a prefill's tile: why it did not work, [] = it did. Compiling takes seconds the first time."""
        try:
            device = self.launcher.device if index is None else f"{self.launcher.device}:{index}"
            ones = torch.ones(1, 1, 128, 128, dtype=torch.float16, device=device)
            spec = AttentionSpec(self.launcher.device, torch.float16, 1, 1, 1, 128, 128, 128, 128, is_causal=True, device_index=index)
            out, _ = self.attention(ones, ones, ones, spec, Operands())
            if not torch.equal(out, ones):
                return [f"a small call gave {out.flatten()[0].item()} and not 1; please report it with `hetero-attn doctor --json`"]
        except Exception as error:
            return [f"a small call failed: {type(error).__name__}: {' '.join(str(error).split())}; triton needs a C compiler (CC) too"]
        return []

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != self.launcher.device:
            reasons.append(f"device is {spec.device}, these kernels run on {self.launcher.device}; move the tensors there")
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype is {dtype_name(spec.dtype)}, kernel has {', '.join(map(dtype_name, DTYPES))}; cast to float32")
        for name, value in (("head_dim", spec.head_dim), ("v_head_dim", spec.v_head_dim)):
            if value > MAX_HEAD_DIM:
                reasons.append(f"{name} is {value}, kernel has up to {MAX_HEAD_DIM}; use backend 'sdpa'")
        if spec.needs_grad:
            reasons.append("gradients are needed, kernel has no backward; use backend 'sdpa', or torch.no_grad() if they are not")
        if self._uncompiled and (words := self._uncompiled.get(_kind(spec))):
            reasons.append(f"Triton did not compile this kind of call here ({words}); use backend 'sdpa', or another triton")
        return reasons

    def notes(self) -> list[str]:
        if self.launcher.tuned(torch.device(self.launcher.device)):
            return []
        return ["tiles are as planned; `python -m hetero_attn_triton.tuning` measures which are quickest on this device"]

    def tiling(self, spec: AttentionSpec, profile: DeviceProfile) -> Plan:
        """By the profile's numbers; on the device itself the driver's count."""
        return tiling.plan(spec, Device.of(profile.hardware))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raises DoesNotCompile once for a kind of call; from then on the backend objects to that kind, and another is chosen."""
        hardware, tuned = self.launcher.hardware(q.device), self.launcher.tuned(q.device)
        demand = hardware, Demand.of(spec)
        while True:
            plan = tiling.plan(spec, hardware, tuned, self._refused.get(demand, frozenset()))
            try:
                return calls.attention(self.launcher, plan, q, k, v, spec, operands)
            except DoesNotCompile as error:
                if isinstance(error, TooLarge):
                    self._refused[demand] = self._refused.get(demand, frozenset()) | {plan.tile}
                    if set(tiling.candidates(spec, hardware)) - self._refused[demand]:
                        continue
                self._uncompiled[_kind(spec)] = str(error)
                withdrawn()
                raise

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
        return norm_calls.norm(self.launcher, x, weight, eps, weight_offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """residual [T, C] += x [T, C] in place, then its norm: one pass over memory. See norm_calls.add_norm."""
        return norm_calls.add_norm(self.launcher, x, residual, weight, eps, weight_offset, post_weight)

    def codec_kernels(self, device: str) -> CodecCalls | None:
        return CodecCalls(self.launcher) if device == self.launcher.device else None


def _kind(spec: AttentionSpec) -> tuple:
    """What decides which kernel is compiled for a call, and for which device, lengths apart."""
    left, right = spec.window_size
    return (spec.device_index, tiling.shape_class(spec), spec.head_dim, spec.v_head_dim, spec.dtype, spec.is_causal, left >= 0, right >= 0,
            bool(spec.softcap), bool(spec.alibi), spec.mask, spec.varlen, spec.page_size, spec.group_size)


backend = TritonBackend
