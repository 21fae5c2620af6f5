"""What a call of attention asks for, without its tensors.

Every choice in this project (which backend, which tile, which split) is made from an AttentionSpec, so every
choice can be tested and explained on a machine that has neither the device nor the memory for the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

LAYOUTS = ("bhsd", "bshd")
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16: the spelling of command lines, profiles and errors."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One attention call. Lengths are tokens; `varlen` calls pack their sequences along one axis.

    For a varlen call q_len and kv_len are max_seqlen_q and max_seqlen_k, and total_q is the packed length Tq;
    for a dense one total_q is batch * q_len. `page_size` is the paged cache's block size, 0 when not paged.
    """

    device: str                                     # torch device type: cpu, cuda, npu
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    is_causal: bool = False
    scale: float = 1.0
    window_size: tuple[int, int] = (-1, -1)         # inclusive, -1 = unlimited, aligned bottom-right
    softcap: float = 0.0                            # 0 = off
    alibi: int = 0                                  # 0 = none, 1 = slopes [Hq], 2 = slopes [B, Hq]
    mask: torch.dtype | None = None                 # dtype of attn_mask; torch.bool means True = attend
    sinks: bool = False
    return_lse: bool = False
    layout: str = "bhsd"                            # how the caller holds q, k, v: a hint for the output's memory
    needs_grad: bool = False                        # torch must see through the call: gradients, torch.func, forward AD
    varlen: bool = False
    total_q: int = 0
    page_size: int = 0
    device_index: int | None = None                 # which device of its type: a process may have unlike ones; None = the current one

    def __post_init__(self) -> None:
        if self.kv_heads <= 0 or self.q_heads % self.kv_heads:
            raise ValueError(
                f"q has {self.q_heads} heads and k has {self.kv_heads}: expected the query heads to be a multiple of the "
                f"key/value heads (grouped-query attention)"
            )

    def at(self, batch: int, q_len: int, kv_len: int, total_q: int) -> AttentionSpec:
        """This spec at other lengths (dataclasses.replace costs four times as much, and decode loops do this at every step)."""
        return AttentionSpec(
            self.device, self.dtype, batch, self.q_heads, self.kv_heads, q_len, kv_len, self.head_dim, self.v_head_dim, self.is_causal,
            self.scale, self.window_size, self.softcap, self.alibi, self.mask, self.sinks, self.return_lse, self.layout,
            self.needs_grad, self.varlen, total_q, self.page_size, self.device_index,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def windowed(self) -> bool:
        return self.window_size != (-1, -1)

    @property
    def rows_differ(self) -> bool:
        """Whether two query rows of one head may see different keys by their position alone."""
        return self.q_len > 1 and (self.is_causal or self.windowed)

    def features(self) -> list[str]:
        """The features the call uses, in the words of the signature: for errors and tables."""
        named = [
            ("causal", self.is_causal),
            (f"window {self.window_size}", self.windowed),
            (f"softcap {self.softcap:g}", bool(self.softcap)),
            ("alibi", bool(self.alibi)),
            ("bool mask" if self.mask is torch.bool else f"{dtype_name(self.mask)} mask" if self.mask else "", bool(self.mask)),
            ("sinks", self.sinks),
            ("lse", self.return_lse),
            ("varlen", self.varlen),
            (f"pages of {self.page_size}", bool(self.page_size)),
            ("gradients", self.needs_grad),
        ]
        return [name for name, used in named if used]

    def __str__(self) -> str:
        q_shape = [self.batch, self.q_heads, self.q_len, self.head_dim]
        kv_shape = [self.batch, self.kv_heads, self.kv_len, self.head_dim]
        v_part = f"  v_head_dim {self.v_head_dim}" if self.v_head_dim != self.head_dim else ""
        return "  ".join([f"q {q_shape}", f"kv {kv_shape}{v_part}", dtype_name(self.dtype), *self.features(), self.place])

    @property
    def place(self) -> str:
        """'cuda', or 'cuda:1' for a device that is not the first."""
        return f"{self.device}:{self.device_index}" if self.device_index else self.device


class Operands(NamedTuple):
    """A call's further tensors; None where the call has none.

    attn_mask [B|1, Hq|1, Sq|1, Skv|1] bool or float; alibi_slopes [Hq] or [B, Hq]; sinks [Hq];
    cu_seqlens_q, cu_seqlens_k [B+1] int32; block_table [B, max_blocks] int32; seqused_k [B] int32.
    """

    attn_mask: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
