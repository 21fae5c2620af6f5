"""What torch_npu's fused operators take, as its own documentation states it (the operators' docstrings in torch-npu 2.13.0).

Two operators serve. `npu_fused_infer_attention_score` (here: infer) is the one for inference, with a decode path and pages; it wants fp16
or bf16 and head dimensions of 16s. `npu_fusion_attention` (here: fusion) is documented for training, takes fp32, any head dimension and
packed sequences of any kind, and gives the softmax's maximum and sum in place of an lse. Each function returns what stands against one of
them: value, bound and remedy; an empty list means that the operator takes the call.

NOTE: fusion's documentation says both that key and value have one shape and that value's head dimension may be smaller ("Dk >= Dv"). The
second is taken at its word, as its meta kernel does; wider values go in with q and k padded. M there is 2**20: 20M is printed as 20971520.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import HALF_DTYPES, AttentionSpec, dtype_name

INFER_MAX_HEAD_DIM = 512
FUSION_MAX_HEAD_DIM = 768
MAX_HEADS = 256
MAX_GROUP = 64
MAX_BATCH = 65536
PAGE_STEP, MAX_PAGE = 16, 512               # of decode
MAX_PAGE_ROW = 65535                        # numbers of one token in pages of [blocks, block, Hkv * D]
DECODE_MAX_KEYS, INFER_MAX_LENGTH = 262144, 20 << 20                # S at one query, and at several
MAX_POOL = 2**31 - 1                        # numbers in the key pages together, and in the value pages
FUSION_MAX_LENGTH, FUSION_MAX_BATCH = 1 << 20, 2 << 20
MAX_PACKED_TOKENS, MAX_PACKED_SEQUENCES = 1 << 20, 1024             # of one call; calls.py makes several where there are more


def both(spec: AttentionSpec) -> list[str]:
    """What neither operator expresses."""
    objections = []
    if spec.softcap:
        objections.append(f"softcap is {spec.softcap:g}, the fused operators have none")
    if spec.alibi:
        objections.append("alibi_slopes are given, the fused operators take only a bias of Sq x Skv, rounded to the call's dtype")
    if spec.mask is not None and spec.mask is not torch.bool:
        objections.append(f"attn_mask is {dtype_name(spec.mask)}, the fused operators take boolean masks")
    if spec.q_heads > MAX_HEADS:
        objections.append(f"q has {spec.q_heads} heads, the fused operators take up to {MAX_HEADS}; shard the heads")
    return objections


def infer(spec: AttentionSpec) -> list[str]:
    """Against npu_fused_infer_attention_score for a dense call, or (page_size) for pages as they lie."""
    objections = []
    if spec.dtype not in HALF_DTYPES:
        objections.append(f"dtype is {dtype_name(spec.dtype)}, npu_fused_infer_attention_score has float16 and bfloat16")
    if spec.head_dim % 16 or spec.head_dim > INFER_MAX_HEAD_DIM:
        objections.append(f"head_dim is {spec.head_dim}, npu_fused_infer_attention_score takes multiples of 16 up to {INFER_MAX_HEAD_DIM}")
    if spec.v_head_dim != spec.head_dim:
        objections.append(f"v_head_dim is {spec.v_head_dim}, npu_fused_infer_attention_score wants head_dim's {spec.head_dim}")
    if spec.group_size > MAX_GROUP:
        objections.append(f"{spec.group_size} query heads share a key/value head, npu_fused_infer_attention_score takes up to {MAX_GROUP}")
    if spec.batch > MAX_BATCH:
        objections.append(f"batch is {spec.batch}, npu_fused_infer_attention_score takes up to {MAX_BATCH}")
    longest = max(spec.q_len, spec.kv_len)
    if longest > (DECODE_MAX_KEYS if spec.q_len == 1 else INFER_MAX_LENGTH):
        kind, bound = ("one query", DECODE_MAX_KEYS) if spec.q_len == 1 else ("several queries", INFER_MAX_LENGTH)
        objections.append(f"the sequence is {longest} long, npu_fused_infer_attention_score takes up to {bound} at {kind}")
    return objections


def pages(spec: AttentionSpec) -> list[str]:
    """Against handing pages to npu_fused_infer_attention_score as they lie; they are gathered into packed keys otherwise."""
    objections = infer(spec)
    if spec.q_len > 1:
        # Packed queries (TND) are documented without pages; padded ones would have to be copied out and back.
        return [*objections, f"several queries a sequence (up to {spec.q_len}), the operator reads pages as they lie at one"]
    if spec.page_size % PAGE_STEP or spec.page_size > MAX_PAGE:
        objections.append(f"pages hold {spec.page_size} tokens, the operator's decode takes multiples of {PAGE_STEP} up to {MAX_PAGE}; "
                          "set kv_block_size: 128")
    if spec.kv_heads * spec.head_dim > MAX_PAGE_ROW:
        objections.append(f"a token's keys are {spec.kv_heads * spec.head_dim} numbers, the operator's pages take up to {MAX_PAGE_ROW}")
    if 0 <= spec.window_size[0] < spec.kv_len - 1:
        objections.append(f"window {spec.window_size} over {spec.kv_len} keys, the operator's decode has none; only its keys are copied")
    return objections


def page_pool(pages: torch.Tensor, kv_lens: list[int], page_size: int) -> list[str]:
    """What of the pool itself stands against reading it where it lies. pages [num_blocks, page_size, Hkv, D]."""
    objections = []
    if pages.numel() > MAX_POOL:
        objections.append(f"the pages hold {pages.numel()} numbers, the operator takes up to {MAX_POOL}")
    wanted = sum(-(-length // page_size) for length in kv_lens)
    if pages.shape[0] < wanted:                                     # sequences share pages of a common prefix
        objections.append(f"the sequences have {wanted} blocks, the pool {pages.shape[0]}, and the operator wants as many")
    return objections


def fusion(spec: AttentionSpec) -> list[str]:
    """Against npu_fusion_attention."""
    objections = []
    if spec.dtype not in (*HALF_DTYPES, torch.float32):
        objections.append(f"dtype is {dtype_name(spec.dtype)}, npu_fusion_attention has float32, float16 and bfloat16; cast to float32")
    widest = max(spec.head_dim, spec.v_head_dim)
    if widest > FUSION_MAX_HEAD_DIM:
        objections.append(f"head_dim is {widest}, npu_fusion_attention takes up to {FUSION_MAX_HEAD_DIM}")
    longest = max(spec.q_len, spec.kv_len)
    if longest > FUSION_MAX_LENGTH:
        objections.append(f"the sequence is {longest} long, npu_fusion_attention takes up to {FUSION_MAX_LENGTH}")
    if not spec.varlen and spec.batch > FUSION_MAX_BATCH:
        objections.append(f"batch is {spec.batch}, npu_fusion_attention takes up to {FUSION_MAX_BATCH}; split the batch")
    return objections
