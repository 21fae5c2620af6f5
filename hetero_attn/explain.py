"""explain(): what every backend says of a call, whether its device is here or not, and which one would run it.

Two questions are kept apart: can the backend express the call (judged from the spec alone), and does the backend run on this
machine (its availability). So a laptop can tell what a V100 would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hetero_attn import registry
from hetero_attn.arguments import check_lengths, dense_spec, varlen_spec
from hetero_attn.backend import UnsupportedError
from hetero_attn.ops import differentiates
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import AttentionSpec, dtype_name


@dataclass(frozen=True, slots=True)
class Judgment:
    """One backend's view of one call."""

    backend: str
    listed: bool                            # in the profile's list
    unsupported: tuple[str, ...]            # why it cannot express the call; () = it can
    unavailable: tuple[str, ...]            # why it does not run on this machine; () = it does
    remarks: tuple[str, ...]
    absent: bool = False                    # no such package here: nothing could be judged


@dataclass(frozen=True, slots=True)
class Explanation:
    """Prints as a table; to_dict() for programs."""

    spec: AttentionSpec
    profile: str
    chosen: str | None                      # the backend that would run the call on this machine, or on the profile's device
    asked: str | None                       # the backend that was asked for by name
    refusal: str | None                     # why nothing runs it
    device_here: bool
    notes: tuple[str, ...]
    judgments: tuple[Judgment, ...]

    def to_dict(self) -> dict:
        return {
            "call": str(self.spec), "profile": self.profile, "device": self.spec.device, "device_here": self.device_here,
            "asked": self.asked, "chosen": self.chosen, "refusal": self.refusal, "notes": list(self.notes),
            "backends": [
                {
                    "name": j.backend, "listed": j.listed, "absent": j.absent, "supported": not j.unsupported and not j.absent,
                    "unsupported_reasons": list(j.unsupported), "available": not j.unavailable,
                    "unavailable_reasons": list(j.unavailable), "remarks": list(j.remarks),
                }
                for j in self.judgments
            ],
        }

    def __str__(self) -> str:
        width = max([len("attention"), *(len(j.backend) for j in self.judgments)])
        rows = [("attention", str(self.spec)), ("profile", self.profile + (f", backend {self.asked!r} by name" if self.asked else ""))]
        if not self.device_here:
            rows.append(("device", f"no {self.spec.device} device on this machine: judged all the same"))
        rows += [("note", note) for note in self.notes]
        for judgment in self.judgments:
            lines = _lines(judgment, self.chosen)
            rows += [(judgment.backend if i == 0 else "", line) for i, line in enumerate(lines)]
        rows.append(("choice", self.chosen if self.chosen else f"none: {self.refusal}"))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _lines(judgment: Judgment, chosen: str | None) -> list[str]:
    if judgment.absent:
        return [f"absent: {reason}" for reason in judgment.unavailable]
    lines = [f"cannot: {reason}" for reason in judgment.unsupported] or ["runs this call"]
    lines += [f"here: unavailable: {reason}" for reason in judgment.unavailable]
    lines += [f"remark: {remark}" for remark in judgment.remarks]
    if not judgment.listed:
        lines[0] += "  (not in the profile's list: by name only)"
    return lines


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, window_size: Sequence[int] = (-1, -1), softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None, return_lse: bool = False, layout: str = "bhsd",
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
    block_table: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None, backend: str | None = None,
) -> Explanation:
    """Judge the call attention(q, k, v, …) by every backend, without running it; with cu_seqlens_q, attention_varlen's call.

    Shapes as in attention() and attention_varlen(); tensors on the meta device do, and cost no memory. Raises ValueError or
    TypeError for arguments that do not fit together, UnknownBackendError for a name nothing answers to.
    """
    inputs = (q, k, v, attn_mask, alibi_slopes, sinks)
    needs_grad = differentiates(*inputs)
    if cu_seqlens_q is None:
        spec = dense_spec(
            q, k, v, attn_mask, is_causal, scale, window_size, softcap, alibi_slopes, sinks, return_lse, layout, needs_grad
        )
    else:
        spec = varlen_spec(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, window_size,
            softcap, alibi_slopes, sinks, return_lse, needs_grad,
        )
        if spec.device == "cpu":
            check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k)
    if spec.device == "meta":                   # tensors without memory stand for tensors on the profile's device
        spec = replace(spec, device=registry.current_profile("meta").device)
    return explain_spec(spec, backend=backend)


def explain_spec(spec: AttentionSpec, profile: DeviceProfile | None = None, backend: str | None = None) -> Explanation:
    """explain() for a spec, which may be of a device that is not here. Raises UnknownBackendError."""
    profile = profile or registry.current_profile(spec.device, spec.device_index)
    asked = registry.chosen_name(backend)
    chosen, refusal = None, None
    try:
        if asked is not None:
            registry.select(spec, asked)
            chosen = asked
        else:
            chosen = registry.first_without_objection(spec, profile, quiet=True).name
    except UnsupportedError as error:
        refusal = str(error).splitlines()[0]
    known = registry.names()
    order = [*profile.backends, *(name for name in profile.awaits if name not in profile.backends)]
    order += [name for name in known if name not in order]
    return Explanation(
        spec=spec, profile=_title(profile), chosen=chosen, asked=asked, refusal=refusal, device_here=device_here(spec.device),
        notes=tuple(notes(spec, profile)), judgments=tuple(_judge(name, spec, profile) for name in order),
    )


def _judge(name: str, spec: AttentionSpec, profile: DeviceProfile) -> Judgment:
    backend = registry.find(name)
    listed = name in profile.backends
    unavailable = tuple(registry.unavailable(backend, spec.device_index))
    if name not in registry.names():
        return Judgment(name, listed, (), unavailable, (), absent=True)
    unsupported = list(backend.unsupported_reasons(spec))
    if profile.strict and listed and name != profile.backends[0]:
        unsupported.append("excluded by strict: true")
    remarks = () if unsupported else tuple(backend.remarks(spec))
    return Judgment(name, listed, tuple(unsupported), unavailable, remarks)


def notes(spec: AttentionSpec, profile: DeviceProfile) -> list[str]:
    """What the device's own numbers say of the call, whatever the backend; [] = nothing."""
    rate = {torch.bfloat16: profile.hardware.bf16_tflops, torch.float16: profile.hardware.fp16_tflops}.get(spec.dtype)
    if rate == 0:
        other = "float16" if spec.dtype == torch.bfloat16 else "bfloat16"
        return [f"dtype is {dtype_name(spec.dtype)}, {profile.name} multiplies it without matrix units; cast to {other}"]
    return []


def _title(profile: DeviceProfile) -> str:
    strict = ", strict" if profile.strict else ""
    return f"{profile.name} (backends: {', '.join(profile.backends)}{strict}; verified: {profile.verified})"


def device_here(device: str) -> bool:
    """Whether a device of this torch type is on this machine. Never imports a vendor's package."""
    if device in ("cpu", "meta"):
        return True
    module = getattr(torch, device, None)
    return bool(module is not None and getattr(module, "is_available", lambda: False)())
