"""The CPU's own kernels (csrc/cpu): attention and linear in C++, one object per instruction set, compiled on first use.

`instruction_sets` says which there are and which this CPU has, `library` compiles and loads one, `selection` decides which serves,
`self_check` holds those that nobody could run to the portable one, `abi` and `calls` turn tensors into calls. What it cannot do (gradients,
fp64) has a reason here, and the profile's next backend serves it. `sharing` and `communicator` are its collectives in shared memory.
"""

from __future__ import annotations

import threading

import torch
from torch.autograd import forward_ad

from hetero_attn.backend import Backend
from hetero_attn.communicator import Communicator
from hetero_attn.jit import Kernel
from hetero_attn.norm import rms_norm as torch_rms_norm
from hetero_attn.product import linear as torch_linear
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import AttentionSpec, Operands, dtype_name
from hetero_attn_cpu import calls
from hetero_attn_cpu.abi import DTYPES
from hetero_attn_cpu.codec_calls import CodecCalls
from hetero_attn_cpu.instruction_sets import BY_NAME, InstructionSet, asked, of_this_cpu, of_this_family
from hetero_attn_cpu.library import Library, kernel, load
from hetero_attn_cpu.selection import Selected, select
from hetero_attn_cpu.sharing import shared_memory_communicator

MAX_HEAD_DIM = 512
_dispatch_modes, _autocast = torch._C._len_torch_dispatch_stack, torch._C._is_any_autocast_enabled
_transform_level = torch._C._functorch.maybe_current_level
_PLAIN = (torch.Tensor, torch.nn.Parameter)             # a subclass may be tracing, quantised, distributed: torch knows


class CpuBackend(Backend):
    """instruction_set: its name in place of HETERO_ATTN_CPU_INSTRUCTION_SET's and the CPU's best. Constructing compiles nothing."""

    name = "cpu"
    judges_lengths = False

    def __init__(self, instruction_set: str | None = None) -> None:
        self._asked = instruction_set
        self._selected: Selected | None = None
        self._library: Library | None = None
        self._lock = threading.Lock()

    def load(self, each: InstructionSet) -> Library:
        """The object of an instruction set. Raises BuildError. (Tests run the calls elsewhere by another one.)"""
        return load(each)

    def _select(self) -> Selected:
        with self._lock:
            if self._selected is None:
                self._selected = select(self._asked, self.load)
                self._library = self._selected.library
            return self._selected

    def unavailable_reasons(self) -> list[str]:
        return list(self._select().reasons)

    def notes(self) -> list[str]:
        return list(self._select().notes)

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device != "cpu":
            reasons.append(f"device is {spec.device}, these kernels run on the cpu; move the tensors there")
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype is {dtype_name(spec.dtype)}, kernels have {', '.join(map(dtype_name, DTYPES))}; cast to float32")
        for name, value in (("head_dim", spec.head_dim), ("v_head_dim", spec.v_head_dim)):
            if value > MAX_HEAD_DIM:
                reasons.append(f"{name} is {value}, kernels have up to {MAX_HEAD_DIM}; use backend 'sdpa'")
        if spec.needs_grad:
            reasons.append("gradients or a torch.func transform (grad, vmap, jvp) are asked for, kernels have no backward and no batching "
                           "rule; use backend 'sdpa', or torch.no_grad() where no transform is at work")
        return reasons

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return calls.attention(self._library or self._loaded(), q, k, v, spec, operands)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., K], weight [N, K], bias [N] -> [..., N], into `out` when given. fp32 sums in every dtype; the weight is never copied.

        What the kernels do not take (gradients, other devices and dtypes, tracing, columns with gaps) is torch's linear.
        """
        if not _native(x, weight, bias, out):
            return torch_linear(x, weight, bias, out)
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()      # [M, K]: a view where it can be
        y = out
        if out is None or out.dim() != 2 or out.stride(1) != 1:
            y = torch.empty((rows.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)          # [M, N]
        calls.linear(self._library or self._loaded(), rows, weight, bias, y)
        if out is None:
            return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
        return out if y is out else out.copy_(y.view(out.shape))

    def communicator(self, base: Communicator, profile: DeviceProfile) -> Communicator | list[str]:
        """Collectives in shared memory for ranks on one host; or why these ranks cannot have them. All ranks call it together."""
        return shared_memory_communicator(base, profile, self._loaded().shared)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
        """hetero_attn.norm.rms_norm, to the same order of rounding: one call where torch makes eight, which is what a decode step feels."""
        if not _plain(x.dtype, x, weight) or weight.shape != x.shape[-1:] or not x.numel() or weight.stride(0) != 1:
            return torch_rms_norm(x, weight, eps, weight_offset)
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
        return calls.rms_norm(self._library or self._loaded(), rows, weight, eps, weight_offset).view(x.shape)

    def codec_kernels(self, device: str) -> CodecCalls | None:
        """Packing for the wire in native code, for tensors on the CPU."""
        return self._loaded().codec if device == "cpu" else None

    def kernels(self) -> list[Kernel]:
        """One a set of this processor family. Raises InstructionSetError where the environment names one that cannot be."""
        used = asked(self._asked) or of_this_cpu()[0]
        here = {used} if used.verified else {used, BY_NAME["portable"]}                  # an unverified one is checked against it
        return [kernel(each, used_here=each in here) for each in of_this_family()]

    def _loaded(self) -> Library:
        selected = self._select()
        if selected.library is None:
            raise RuntimeError(f"backend 'cpu' does not run here: {'; '.join(selected.reasons)}")
        return selected.library


def _plain(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether the kernels may read these tensors: plain CPU tensors of one dtype, and nobody traces or differentiates."""
    if dtype not in DTYPES or torch.compiler.is_compiling() or _dispatch_modes() or _autocast() or _transform_level() is not None:
        return False
    grad = torch.is_grad_enabled()
    for each in tensors:
        if each is None:
            continue
        if type(each) not in _PLAIN or each.dtype != dtype or not each.is_cpu or each.layout is not torch.strided or each.is_neg():
            return False
        if grad and each.requires_grad:
            return False
    return forward_ad._current_level < 0


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> bool:
    """Whether the kernels take this product: plain tensors that fit together."""
    if not _plain(x.dtype, x, weight, bias, out) or weight.dim() != 2 or not x.dim():
        return False
    N, K = weight.shape
    if x.shape[-1] != K or not x.numel() or not N or weight.stride(1) != 1:
        return False                                     # shapes for torch to refuse, nothing to do, or columns with gaps
    if bias is not None and (bias.shape != (N,) or bias.stride(0) != 1):
        return False
    return out is None or out.shape == (*x.shape[:-1], N)


backend = CpuBackend
