"""What a backend must say and do. Copy backends/hetero_attn_sdpa to write one; docs/add_a_backend.md walks through it.

A backend objects in words, not booleans: an empty list of reasons means that the call runs. Reasons carry the value
that was asked, the bound that stands against it, and what to do, because they are all that the user gets to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hetero_attn.norm import rms_norm
from hetero_attn.product import linear
from hetero_attn.spec import AttentionSpec, Operands

if TYPE_CHECKING:
    from hetero_attn.communicator import Communicator
    from hetero_attn.cubin import Cubin
    from hetero_attn.jit import Kernel
    from hetero_attn.profile import DeviceProfile


class UnsupportedError(RuntimeError):
    """No backend that was asked may run this call. The text holds every reason; `.reasons` maps backend name to its list."""

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.reasons = {name: list(lines) for name, lines in (reasons or {}).items()}


class Backend:
    """A hardware family's implementations. Import cupy, triton, torch_npu and the like inside __init__, never at module level.

    A package `hetero_attn_<name>` exposes the attribute `backend`: a callable without arguments that returns an instance.
    """

    name: str = ""

    # (optional) False promises that unsupported_reasons() never looks at batch, q_len, kv_len or total_q beyond
    # "is it 0", "is it 1" and "is q_len less than, equal to or more than kv_len". Then one decision serves a whole decode
    # loop while the cache grows; the conformance suite holds a backend to the promise.
    judges_lengths: bool = True

    def unavailable_reasons(self) -> list[str]:
        """Why nothing of this backend runs on this machine (driver, architecture, compiler, a failed probe); [] = it does.

        Compute it once and keep it. "Available" means that a tiny real call worked, not that an import did.
        """
        return []

    def unavailable_on(self, index: int) -> list[str]:
        """(optional) The same of one device of the type that spec.device names, by its number: to override where a machine may have unlike
        ones, since unavailable_reasons() looks at the device that is current. This default is unavailable_reasons().
        """
        return self.unavailable_reasons()

    def communicator_unavailable_reasons(self) -> list[str]:
        """(optional) Why communicator() cannot be asked on this machine; [] = it can. To override where it needs other things than
        attention does; this default is unavailable_reasons().
        """
        return self.unavailable_reasons()

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        """Why this call cannot run here; [] = it runs. Cheap, touches no tensor, and answers without the device too."""
        raise NotImplementedError(f"backend {self.name!r} must say what it supports")

    def remarks(self, spec: AttentionSpec) -> list[str]:
        """(optional) What the user should know about a call that runs: a slow route, for example. Shown by explain."""
        return []

    def gathered_copies(self, spec: AttentionSpec) -> int:
        """(optional) How many times a paged call holds all K and V that its pages hold once more, at most; 0 = pages are read where they
        lie. Placement leaves so much of the device's memory free. Asked for calls that the backend takes; answers without the device.
        """
        return 0

    def tiling(self, spec: AttentionSpec, profile: DeviceProfile) -> Any | None:
        """(optional) How its own kernel would cut the call on the profile's device: an object that prints (str) and has to_dict(), or None
        where there is nothing to tell. Shown by `hetero-attn explain --tiling`. Raises ValueError for a call that no tiling fits."""
        return None

    def notes(self) -> list[str]:
        """(optional) What the user should know of this backend on this machine, whatever the call: which of its kernels serve, and
        what they have been verified on. Asked only where it is available; shown by `hetero-attn doctor`.
        """
        return []

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a call for which both lists of reasons are empty.

        Dense: q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] as views with any strides, whatever spec.layout;
        returns out [B, Hq, Sq, Dv] in q's dtype and lse [B, Hq, Sq] in fp32 (fp64 for fp64), or None unless spec.return_lse.
        Varlen: q [Tq, Hq, D]; k, v [Tk, Hkv, D] or pages [num_blocks, page_size, Hkv, D]; out [Tq, Hq, Dv], lse [Hq, Tq].
        Arguments have been checked. Inputs are never written. The semantics are hetero_attn/reference.py's, to the letter.
        """
        raise NotImplementedError(f"backend {self.name!r} has no attention")

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(optional) x [..., K], weight [N, K], bias [N] -> [..., N], into `out` when given. The decoder's products run on the first
        backend of the profile that is available and defines one; this default is torch's.
        """
        return linear(x, weight, bias, out)

    def codec_kernels(self, device: str) -> Any | None:
        """(optional) What packs partial sums for the wire, for tensors on a device type; None = nothing. Asked only where the backend is
        available. An object with the four methods of hetero_attn.collectives.codec.definition.TorchKernels, which is their meaning:
        the same bytes, and the same fp32 values from them, to the bit, since the ranks of a group may differ in backend. Tensors are
        contiguous; a payload's bytes may lie at any address. On a device all four are enqueued on the calling stream, and what a pack
        function tells may be a tensor of one element there, which the caller reads when the bytes have come: no call waits for the device.

            pack_groups(values [n], bits, body) -> bool                     False where a value is NaN or Inf
            unpack_groups(body, bits, out fp32 [n], accumulate)             written, or added to
            pack_features(values [n], first, table, body) -> int            how many values saturated; negative where one is NaN or Inf
            unpack_features(body, first, table, out fp32 [n], accumulate)
        """
        return None

    def kernels(self) -> list[Kernel] | list[Cubin]:
        """(optional) Every native kernel of this backend that a compiler for this processor family can build, whether or not this machine
        will use it: `used_here` says that, `arch` is the label ('avx2'). `hetero-attn build` and prebuilt wheels go by this list, so it
        touches no device and compiles nothing. At run time a backend calls Kernel.load() and turns a BuildError into a reason.
        """
        return []

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
        """(optional) x [..., C], weight [C] -> [..., C] in x's dtype, as hetero_attn.norm.rms_norm defines it, orders of rounding included.

        The decoder's norms run on the first backend of the profile that is available and defines one; this default is plain torch.
        """
        return rms_norm(x, weight, eps, weight_offset)

    def communicator(self, base: Communicator, profile: DeviceProfile) -> Communicator | list[str]:
        """(optional) A communicator that wraps `base`, the torch.distributed one; or the reasons why there is none."""
        return [f"backend {self.name!r} has no communicator of its own"]

    def communicator_bytes(self, profile: DeviceProfile, world_size: int) -> int:
        """(optional) Device memory that each rank's communicator() keeps to itself as long as it lives, in bytes, by rank 0's profile; 0
        where there is none to be had. Asked where the device may be absent: `hetero-attn plan` counts it.
        """
        return 0


withdrawals = 0                        # moves when a backend stops taking what it took; the registry's choices are void by then


def withdrawn() -> None:
    """Call it where a backend has learned by trying that its unsupported_reasons() were too few, and has more from now on."""
    global withdrawals
    withdrawals += 1


class AbsentBackend(Backend):
    """Stands in for a backend whose package is missing or fails to import: a reason instead of a crash."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def unavailable_reasons(self) -> list[str]:
        return [self._reason]

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return []


class LaunchedBackend(Backend):
    """A backend whose kernels `launcher` starts: there where the launcher has no reasons and, if it `probes`, a small real call works. Each
    device is asked once."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self._reasons: dict[int | None, list[str]] = {}      # by device, None = the current one

    def unavailable_reasons(self) -> list[str]:
        return self.unavailable_on(None)

    def unavailable_on(self, index: int | None) -> list[str]:
        if index not in self._reasons:
            self._reasons[index] = self.launcher.unavailable_reasons(index) or (self.probe(index) if self.launcher.probes else [])
        return list(self._reasons[index])

    def probe(self, index: int | None = None) -> list[str]:
        """A small real call: why it did not work, [] = it did."""
        return []
