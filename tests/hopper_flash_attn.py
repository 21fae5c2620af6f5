"""In place of the package flash-attn: two functions with their documented signatures (flash_attn_interface.py, 2.8), in fp64 on the CPU.

As there, head counts may differ, causal and window are bottom-right, causal ALiBi adds slope * key to every row alike (which moves the lse
by row), and a longest query of 1 with grouped heads takes q for one row a sequence.
"""

import torch
from hopper_operators import ReferenceOperators

__version__ = "2.8.3"
CALLS = []


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    deterministic=False, return_attn_probs=False):
    CALLS.append(("dense", softcap, alibi_slopes is not None, False))
    _checked(q, k, v, dropout_p, alibi_slopes)
    out, lse = ReferenceOperators().one(*(x.transpose(1, 2) for x in (q, k, v)), causal, softmax_scale, window_size, alibi_slopes, softcap)
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
                           window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
                           block_table=None):
    CALLS.append(("packed", softcap, alibi_slopes is not None, block_table is not None))
    _checked(q, k, v, dropout_p, alibi_slopes)
    out, lse = ReferenceOperators().packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
                                           window_size, alibi_slopes, softcap, block_table)
    return (out, lse, None) if return_attn_probs else out


def _checked(q, k, v, dropout_p, slopes):
    assert q.dtype in (torch.float16, torch.bfloat16) and all(x.stride(-1) == 1 for x in (q, k, v)) and dropout_p == 0.0
    assert slopes is None or (slopes.dtype == torch.float32 and slopes.is_contiguous())
