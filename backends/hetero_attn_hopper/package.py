"""The package flash-attn, where it is installed: softcap, ALiBi and decoding on pages, which torch's build lacks.

Only documented keyword arguments of flash_attn_func and flash_attn_varlen_func are used (github.com/Dao-AILab/flash-attention,
flash_attn_interface.py, 2.6.3 and later: softcap since 2.6.0, an unpadded lse [H, T] of packed calls). Causal calls with ALiBi get the same
bias by column in every row, which softmax does not see but the lse does: so no lse is asked for with it. The package is looked for once,
when a call first needs it. Nothing here has run with the real package (`verified: none`); its signatures are held to by a stand-in.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

OLDEST = (2, 6, 3)
NAMES = ("flash_attn_func", "flash_attn_varlen_func")
WANTED = "flash-attn {} or later, below 3".format(".".join(map(str, OLDEST)))


class FlashAttnPackage:
    """module: what to import; tests give another name."""

    def __init__(self, module: str = "flash_attn") -> None:
        self._name, self._module, self._reasons = module, None, None

    def reasons(self) -> list[str]:
        """Why the package does not serve; [] = it does."""
        if self._reasons is None:
            self._reasons = self._find()
        return list(self._reasons)

    def _find(self) -> list[str]:
        try:
            module = importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            if error.name == self._name:
                return [f"install {WANTED}"]
            return [f"flash-attn does not import ({error}); install it anew"]
        except Exception as error:                   # built for another torch or CUDA: an undefined symbol, usually
            return [f"flash-attn does not import ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); build it for this torch"]
        version = str(getattr(module, "__version__", "unknown"))
        found = tuple(map(int, re.match(r"(\d+)\.(\d+)\.(\d+)", version).groups())) if re.match(r"\d+\.\d+\.\d+", version) else ()
        if not OLDEST <= found < (3,) or not all(callable(getattr(module, name, None)) for name in NAMES):
            return [f"flash-attn is {version}, install {WANTED}"]
        self._module = module
        return []

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int,
        max_k: int, is_causal: bool, scale: float, window: tuple[int, int], *, softcap: float, slopes: torch.Tensor | None,
        table: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As TorchOperators.flash, and softcap (0.0 = none), slopes fp32 [Hq] or [B, Hq], table int32 [B, pages a sequence] for k, v
        [pages, page, Hkv, D]. The lse is None with slopes."""
        assert not self.reasons(), self.reasons()
        options: dict[str, Any] = {
            "dropout_p": 0.0, "softmax_scale": scale, "causal": is_causal, "window_size": window, "softcap": softcap,
            "alibi_slopes": slopes, "return_attn_probs": True,
        }
        if cu_q is None:
            out, lse, *_ = self._module.flash_attn_func(q, k, v, **options)
        else:
            paged = {} if table is None else {"block_table": table.contiguous()}
            out, lse, *_ = self._module.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options, **paged)
        return out, None if slopes is not None else lse
