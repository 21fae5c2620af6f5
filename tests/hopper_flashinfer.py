"""In place of the package flashinfer: what its documents name of flashinfer.prefill, with their signatures, in fp64 on the CPU.

Where the documents leave it open the worst is taken: rows without keys give numbers that mean nothing, a plan is for the very numbers it
was made with, head dimensions and data types are what a kernel is compiled for.
"""

import math
from itertools import pairwise

import torch
from hopper_operators import ReferenceOperators

__version__ = "0.6.4"
CALLS, PLANS = [], []


def single_prefill_with_kv_cache(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None,
                                 causal=False, kv_layout="NHD", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None,
                                 window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend="auto", return_lse=False):
    CALLS.append("single")
    assert kv_layout == "NHD" and custom_mask is None and pos_encoding_mode == "NONE"
    out, lse = _one(q, k, v, causal, sm_scale, window_left, logits_soft_cap)
    return (out, lse) if return_lse else out


class _Wrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() >= 128 << 20 and kv_layout == "NHD"
        self._plan = None

    def _keep(self, *indptrs, **options):
        assert all(each.dtype == torch.int32 and each.device.type == "cpu" and each[0] == 0 for each in indptrs)
        PLANS.append(options)
        self._plan = options | {"indptrs": [each.tolist() for each in indptrs]}

    def _checked(self, q):
        plan = self._plan
        assert q.is_contiguous() and q.shape == (plan["indptrs"][0][-1], plan["heads"][0], plan["head_dim"])
        assert q.dtype == plan["dtype"] and plan["head_dim"] in (64, 128, 256)
        return plan

    def _rows(self, q, keys_of):
        plan, outs, lses = self._checked(q), [], []
        starts = plan["indptrs"][0]
        for row, (begin, end) in enumerate(pairwise(starts)):
            k, v = keys_of(row)
            out, lse = _one(q[begin:end], k, v, plan["causal"], plan["scale"], plan["window_left"], plan["cap"])
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None,
             packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, window_left=-1,
             logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None):
        self._keep(qo_indptr, kv_indptr, heads=(num_qo_heads, num_kv_heads), head_dim=head_dim_qk, causal=causal, window_left=window_left,
                   cap=logits_soft_cap, scale=sm_scale, dtype=q_data_type, kind="ragged")

    def run(self, q, k, v, *args, out=None, lse=None, return_lse=False):
        CALLS.append("ragged")
        starts = self._plan["indptrs"][1]
        assert k.shape == v.shape == (starts[-1], self._plan["heads"][1], q.shape[-1]) and k.is_contiguous() and v.is_contiguous()
        out, lse = self._rows(q, lambda row: [x[starts[row] : starts[row + 1]] for x in (k, v)])
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size,
             head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
             use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
             q_data_type="float16", kv_data_type=None, non_blocking=True):
        assert paged_kv_indices.dtype == paged_kv_last_page_len.dtype == torch.int32
        assert paged_kv_indices.numel() == paged_kv_indptr[-1] and paged_kv_last_page_len.numel() == len(qo_indptr) - 1
        self._keep(qo_indptr, paged_kv_indptr, heads=(num_qo_heads, num_kv_heads), head_dim=head_dim_qk, causal=causal,
                   window_left=window_left, cap=logits_soft_cap, scale=sm_scale, dtype=q_data_type, kind="paged", page=page_size,
                   indices=paged_kv_indices.tolist(), last=paged_kv_last_page_len.tolist())

    def run(self, q, paged_kv_cache, *args, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False):
        CALLS.append("paged")
        plan, (k, v) = self._plan, paged_kv_cache
        assert k.shape == v.shape and k.shape[1:] == (plan["page"], plan["heads"][1], q.shape[-1]) and k.is_contiguous()
        starts = plan["indptrs"][1]

        def keys_of(row):
            pages = plan["indices"][starts[row] : starts[row + 1]]
            length = max(len(pages) - 1, 0) * plan["page"] + plan["last"][row]
            assert 0 <= plan["last"][row] <= plan["page"] and (plan["last"][row] > 0) == bool(pages)
            return [x[pages].flatten(0, 1)[:length] for x in (k, v)]

        out, lse = self._rows(q, keys_of)
        return (out, lse) if return_lse else out


def _one(q, k, v, causal, scale, window_left, cap):
    """q [Sq, Hq, D], k, v [Skv, Hkv, D] -> out, lse [Sq, Hq] in base 2."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16) and scale > 0
    out, lse = ReferenceOperators().one(*(x.transpose(0, 1)[None] for x in (q, k, v)), causal, scale, (window_left, -1), None, cap or 0.0)
    out, lse = out[0].transpose(0, 1).clone(), lse[0].transpose(0, 1) / math.log(2)
    without = torch.arange(len(q)) < (len(q) - len(k) if causal else 0 if len(k) else len(q))
    out[without], lse[without] = 7.0, -50_000.0
    return out, lse
