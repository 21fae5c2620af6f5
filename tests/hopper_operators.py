"""torch's CUDA attention kernels as their documentation describes them, in fp64 on the CPU, with the worst that it leaves open.

What a row does not see is multiplied by a weight of 0 (so NaN leaks), a row without keys has an lse of +inf, causal and window are aligned
bottom-right in FlashAttention's and top-left in SDPA's.
"""

import torch


class ReferenceOperators:
    """In TorchOperators' place; counts its calls."""

    device = "cpu"

    def __init__(self):
        self.calls = {"dense": 0, "flash": 0}

    def unavailable_reasons(self):
        return []

    def dense(self, q, k, v, is_causal, scale):
        self.calls["dense"] += 1
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] == v.shape[-1]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        out, _ = attend(q, k, v, seen.tril() if is_causal else seen, scale, None)
        return out

    def flash(self, q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, slopes, lengths, table):
        self.calls["flash"] += 1
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and all(x.stride(-1) == 1 for x in (q, k, v))
        assert slopes is None or (slopes.dtype == torch.float32 and slopes.is_contiguous())
        if cu_q is None:
            out, lse = self.one(*(x.transpose(1, 2) for x in (q, k, v)), is_causal, scale, window, slopes)
            return out.transpose(1, 2), lse
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
        outs, lses = [], []
        for b in range(len(cu_q) - 1):
            if table is None:
                own = [x[cu_k[b] : cu_k[b + 1]] for x in (k, v)]
            else:
                assert k.shape[1] % 256 == 0
                own = [x[table[b, : -(-int(lengths[b]) // k.shape[1])].long()].flatten(0, 1)[: lengths[b]] for x in (k, v)]
            assert max_q >= cu_q[b + 1] - cu_q[b] and max_k >= len(own[0])
            slope = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            out, lse = self.one(*(x.transpose(0, 1)[None] for x in (q[cu_q[b] : cu_q[b + 1]], *own)), is_causal, scale, window, slope)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    def one(self, q, k, v, is_causal, scale, window, slopes):
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
            bias = -(slopes if slopes.dim() == 2 else slopes[None]).double()[..., None, None] * (position - key).abs()
        return attend(q, k, v, seen, scale, bias)


def attend(q, k, v, seen, scale, bias):
    """q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D], seen [Sq, Skv] -> out in q's dtype, lse [B, Hq, Sq] fp32."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = scale * q.double() @ wide_k.transpose(-1, -2)
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp(min=-1e300) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = weights @ wide_v / torch.where(total == 0, 1.0, total)
    lse = torch.where(total == 0, float("inf"), top + total.log())[..., 0]
    return out.to(q.dtype), lse.float()
