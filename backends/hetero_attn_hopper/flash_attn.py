"""The package flash-attn, where it is installed: softcap, ALiBi and decoding on pages, which torch's build lacks.

Only documented keyword arguments of flash_attn_func and flash_attn_varlen_func are used (github.com/Dao-AILab/flash-attention,
flash_attn_interface.py, 2.6.3 and later: softcap since 2.6.0, an unpadded lse [H, T] of packed calls). Causal calls with ALiBi get the same
bias by column in every row, which softmax does not see but the lse does: so no lse is asked for with it. Nothing here has run with the real
package (`verified: none`); its signatures are held to by a stand-in.
"""

from __future__ import annotations

from typing import Any

import torch

from hetero_attn.spec import AttentionSpec
from hetero_attn_hopper.package import Installed

PAGE_STEP = 256


class FlashAttnPackage(Installed):
    """module: what to import; tests give another name."""

    name, oldest, below = "flash-attn", (2, 6, 3), (3,)
    needed = ("flash_attn_func", "flash_attn_varlen_func")
    wanted = "flash-attn {} or later, below 3".format(".".join(map(str, oldest)))

    def __init__(self, module: str = "flash_attn") -> None:
        super().__init__(module)

    def objections(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.alibi and (spec.return_lse or spec.sinks):
            asked = "an lse is asked for" if spec.return_lse else "sinks need the lse"
            reasons.append(f"alibi, and {asked}: flash-attn's is shifted by row in causal calls")
        if spec.page_size % PAGE_STEP:
            reasons.append(f"pages hold {spec.page_size} tokens, flash-attn takes multiples of {PAGE_STEP}; set kv_block_size")
        return reasons

    def remarks(self, spec: AttentionSpec) -> list[str]:
        return []

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int,
        max_k: int, is_causal: bool, scale: float, window: tuple[int, int], *, softcap: float, slopes: torch.Tensor | None,
        table: torch.Tensor | None, used: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Package. used is not looked at: of pages the differences of cu_k are the lengths."""
        options: dict[str, Any] = {
            "dropout_p": 0.0, "softmax_scale": scale, "causal": is_causal, "window_size": window, "softcap": softcap,
            "alibi_slopes": slopes, "return_attn_probs": True,
        }
        if cu_q is None:
            out, lse, *_ = self.module.flash_attn_func(q, k, v, **options)
        else:
            paged = {} if table is None else {"block_table": table.contiguous()}
            out, lse, *_ = self.module.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options, **paged)
        return out, None if slopes is not None else lse
