"""torch's own scaled_dot_product_attention: the backend every profile ends in, and the small one to copy.

Three routes, in files of their own: `fused` (torch's SDPA kernels), `composed` (plain torch in fp32, for what those kernels
cannot express), and `ragged` (packed and paged sequences, one dense problem each). `dense` cuts a call into chunks of query
rows, so that masks stay small and keys that no row of a chunk can see are never touched. Needs nothing but torch.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from hetero_attn.backend import Backend
from hetero_attn.spec import FLOAT_DTYPES, HALF_DTYPES, AttentionSpec, dtype_name
from hetero_attn_sdpa.dense import dense_attention
from hetero_attn_sdpa.fused import fused_objections
from hetero_attn_sdpa.ragged import ragged_attention

DEVICES = ("cpu", "cuda", "npu", "mps", "xpu")


class SdpaBackend(Backend):
    name = "sdpa"
    judges_lengths = False

    def unavailable_reasons(self) -> list[str]:
        return _probe()

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.device not in DEVICES:
            reasons.append(f"device is {spec.device}, torch's SDPA serves {', '.join(DEVICES)}; move the tensors to one of them")
        if spec.dtype not in FLOAT_DTYPES:
            reasons.append(f"dtype is {dtype_name(spec.dtype)}, SDPA has {', '.join(map(dtype_name, FLOAT_DTYPES))}; cast first")
        if spec.dtype == torch.float64 and spec.device in ("npu", "mps"):
            reasons.append(f"dtype is float64, {spec.device} devices have none; cast to float32")
        return reasons

    def remarks(self, spec: AttentionSpec) -> list[str]:
        remarks = [f"composed in torch, not fused: {objection}" for objection in fused_objections(spec)]
        if spec.varlen and spec.batch > 1:
            remarks.append(f"{spec.batch} packed sequences run one after another")
        if spec.page_size:
            remarks.append("pages are gathered into contiguous keys and values first")
        return remarks

    def gathered_copies(self, spec: AttentionSpec) -> int:
        if not spec.page_size:
            return 0
        cleaned = spec.rows_differ and spec.device != "cpu"                                 # of NaN, without a look (dense.py)
        widened = fused_objections(spec) and spec.dtype in HALF_DTYPES                      # to fp32, twice the size
        return 1 + bool(cleaned) + 2 * bool(widened)

    def attention(self, q, k, v, spec, operands):
        route = ragged_attention if spec.varlen else dense_attention
        return route(q, k, v, spec, operands)


@cache
def _probe() -> list[str]:
    """A tiny real call, once: "available" means that it worked."""
    try:
        tiny = torch.ones(1, 1, 2, 8)
        out = F.scaled_dot_product_attention(tiny, tiny, tiny)
    except Exception as error:
        return [f"a tiny call of torch's scaled_dot_product_attention failed: {type(error).__name__}: {error}; reinstall torch"]
    return [] if torch.equal(out, tiny) else ["a tiny call of torch's scaled_dot_product_attention gave wrong numbers; reinstall torch"]


backend = SdpaBackend
