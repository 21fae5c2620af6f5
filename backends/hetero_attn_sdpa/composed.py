"""The composed route: attention in plain torch with fp32 (fp64) arithmetic, for one chunk of query rows at a time.

Slower than a fused kernel, but it expresses everything the project defines, has gradients, and runs on any torch device.
The query heads of a group are folded into rows, so grouped keys and values are multiplied without being repeated.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import AttentionSpec

NEG_INF = float("-inf")


def composed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, bias: torch.Tensor | None, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] all in the arithmetic dtype; bias (bool: True = attend; or float)
    broadcastable to [B, Hq, Sq, Skv]; sinks [Hq] -> out [B, Hq, Sq, Dv], lse [B, Hq, Sq], both in the arithmetic dtype.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Skv = k.shape[1], k.shape[2]
    folded = (B, Hkv, (Hq // Hkv) * Sq)
    scores = torch.matmul(q.reshape(*folded, D) * spec.scale, k.transpose(-1, -2)).view(B, Hq, Sq, Skv)
    # Without gradients each step overwrites the last one's memory: these passes are bound by the caches, not by arithmetic.
    if spec.softcap and spec.needs_grad:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    elif spec.softcap:
        scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if bias is not None:
        if bias.dtype == torch.bool:
            scores = torch.where(bias, scores, NEG_INF) if spec.needs_grad else scores.masked_fill_(~bias, NEG_INF)
        else:
            scores = scores + bias
    top = scores.detach().amax(-1)                                      # [B, Hq, Sq]; -inf where nothing is seen
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[None, :, None]
        top = torch.maximum(top, sinks.detach())
    top = torch.where(top == NEG_INF, 0.0, top)                         # an empty row: exp(-inf - 0) = 0, in the gradient too
    weights = torch.exp(scores - top[..., None]) if spec.needs_grad else scores.sub_(top[..., None]).exp_()
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    weights = weights.reshape(*folded, Skv)                             # (a copy where a transposed mask has lent its strides)
    out = torch.matmul(weights, v).view(B, Hq, Sq, v.shape[-1])
    return out / torch.where(total == 0, 1.0, total)[..., None], top + total.detach().log()
