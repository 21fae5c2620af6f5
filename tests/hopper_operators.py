"""torch's CUDA attention kernels as their documentation describes them, in fp64 on the CPU, with the worst that it leaves open.

The value that a row does not see is multiplied by a weight of 0 (so NaN leaks), a row without keys or with NaN has an lse of +inf, causal
and window are aligned bottom-right in FlashAttention's and top-left in SDPA's.
"""

import torch


class ReferenceOperators:
    """In TorchOperators' place; counts its calls."""

    device = "cpu"

    def __init__(self):
        self.calls = {"dense": 0, "flash": 0}

    def unavailable_reasons(self, index=None):
        return []

    def dense(self, q, k, v, is_causal, scale):
        self.calls["dense"] += 1
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] == v.shape[-1]
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "no kernel takes features that are apart"
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        out, _ = attend(q, k, v, seen.tril() if is_causal else seen, scale, None)
        return out

    def flash(self, q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window):
        """torch's build of FlashAttention: no alibi, no softcap, and pages that it writes wrongly, so none of them is asked of it."""
        self.calls["flash"] += 1
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and all(x.stride(-1) == 1 for x in (q, k, v))
        if cu_q is None:
            out, lse = self.one(*(x.transpose(1, 2) for x in (q, k, v)), is_causal, scale, window)
            return out.transpose(1, 2), lse
        return self.packed(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window)

    def packed(self, q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, slopes=None, softcap=0.0, table=None):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
        if max_q == 1 and q.shape[1] > k.shape[-2] and slopes is None and tuple(window) == (-1, -1):
            assert q.shape[0] == len(cu_q) - 1, f"q {list(q.shape)} cannot be reshaped to one row a sequence"
        outs, lses = [], []
        for b in range(len(cu_q) - 1):
            length = int(cu_k[b + 1] - cu_k[b])
            if table is None:
                own = [x[cu_k[b] : cu_k[b + 1]] for x in (k, v)]
            else:
                assert k.shape[1] % 256 == 0 and table.dtype == torch.int32
                own = [x[table[b, : -(-length // k.shape[1])].long()].flatten(0, 1)[:length] for x in (k, v)]
            assert max_q >= cu_q[b + 1] - cu_q[b] and max_k >= len(own[0])
            slope = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            rows = (x.transpose(0, 1)[None] for x in (q[cu_q[b] : cu_q[b + 1]], *own))
            out, lse = self.one(*rows, is_causal, scale, window, slope, softcap)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    def one(self, q, k, v, is_causal, scale, window, slopes=None, softcap=0.0):
        Sq, Skv = q.shape[2], k.shape[2]
        position, key = torch.arange(Skv - Sq, Skv)[:, None], torch.arange(Skv)
        seen = torch.ones(Sq, Skv, dtype=torch.bool)
        left, right = window[0], 0 if is_causal else window[1]
        if left >= 0:
            seen &= key >= position - left
        if right >= 0:
            seen &= key <= position + right
        bias = None
        if slopes is not None:
            wide = (slopes if slopes.dim() == 2 else slopes[None]).double()[..., None, None]
            bias = wide * key if left < 0 and right == 0 else -wide * (position - key).abs()
        return attend(q, k, v, seen, scale, bias, softcap)


def attend(q, k, v, seen, scale, bias, softcap=0.0):
    """q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D], seen [Sq, Skv] -> out in q's dtype, lse [B, Hq, Sq] fp32."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = scale * q.double() @ wide_k.transpose(-1, -2)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp(min=-1e300) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = weights @ wide_v / torch.where(total == 0, 1.0, total)
    lse = torch.where((total == 0) | total.isnan(), float("inf"), top + total.log())[..., 0]
    return out.to(q.dtype), lse.float()
