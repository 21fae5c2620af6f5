"""torch's own attention kernels on CUDA as this backend calls them: cuDNN's and FlashAttention's. Tests put others with the same meaning
here.

What is known of FlashAttention's (aten::_flash_attention_forward, wrapped by torch.nn.attention.varlen): causal and window are aligned
bottom-right; a row that sees no key, and one whose scores hold NaN, has an lse of +inf; the score of what a row does not see is replaced,
so that NaN in its key does no harm, but its value is multiplied by a weight of 0, which NaN survives. torch compiles it without ALiBi and
softcap, and decoding on pages writes wrong rows (pytorch#194167): none of these is asked of it. Never run on a device from here so far.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

OLDEST_CAPABILITY = (8, 0)
CUDNN_CAPABILITY = (9, 0)


class TorchOperators:
    """The real ones."""

    device = "cuda"

    def unavailable_reasons(self, index: int | None = None) -> list[str]:
        """Of a device by its number, None = the current one."""
        if torch.version.hip:
            return ["torch is a ROCm build; its kernels are served by backend 'sdpa'"]
        if torch.version.cuda is None:
            return [f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"]
        if not torch.cuda.is_available():
            return ["torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"]
        if (capability := torch.cuda.get_device_capability(index)) < OLDEST_CAPABILITY:
            return ["device has compute capability {}.{}, torch's FlashAttention needs 8.0; use backend 'sdpa'".format(*capability)]
        if not torch.backends.cuda.is_flash_attention_available():
            return ["this torch is built without FlashAttention; use backend 'sdpa'"]
        return self.probe(index)

    def probe(self, index: int | None = None) -> list[str]:
        """A tiny real causal call of each kernel, whose last key is NaN: only the last row may show it."""
        device = self.device if index is None else f"{self.device}:{index}"
        ones = torch.ones(1, 64, 2, 64, dtype=torch.bfloat16, device=device)                   # [B, S, H, D]
        keys = ones.clone()
        keys[:, -1] = float("nan")
        try:
            out, _ = self.flash(ones, keys, ones, None, None, 64, 64, True, 0.125, (-1, -1))
            dense = self.dense(*(x.transpose(1, 2) for x in (ones, keys, ones)), True, 0.125).transpose(1, 2)
        except Exception as error:
            return [f"a tiny call of torch's FlashAttention failed: {type(error).__name__}: {str(error).splitlines()[0]}"]
        right = all(torch.equal(each[:, :-1], ones[:, :-1]) and bool(each[:, -1].isnan().all()) for each in (out, dense))
        return [] if right else ["a tiny causal call gave wrong numbers, or rows that NaN in a key they do not see has reached"]

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float) -> torch.Tensor:
        """q [B, Hq, S, D], k, v [B, Hkv, ·, D] -> [B, Hq, S, D], by cuDNN's kernel where it takes the call, else FlashAttention's.
        is_causal is torch's (top-left)."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of the kernels that were not asked for
            return F.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int,
        max_k: int, is_causal: bool, scale: float, window: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, S, Hq, D], or packed [T, Hq, D] with cu_q; k, v likewise -> (out like q, lse [B, Hq, S] or [Hq, T])."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, is_causal, False, scale=scale, window_size_left=window[0], window_size_right=window[1])
        return out, lse
