"""Tensors to launches: strides, operands, output and workspace of one call, and one or two kernels.

q, k and v go as they lie, by their strides, whatever the layout; nothing of their size is copied. Only small operands are brought into the
form that the kernel reads: contiguous tables, a mask in fp64 as fp32.
"""

from __future__ import annotations

import math

import torch

from hetero_attn.spec import HALF_DTYPES, AttentionSpec, Operands
from hetero_attn_triton.launching import Launcher
from hetero_attn_triton.tiling import LEAST, MAX_SPLITS, Plan

LOG2E = 1.4426950408889634
LARGEST, SMALLEST = 3.4028234663852886e38, 2.0**-126                # fp32's: what a scale or cap beyond becomes
FARTHEST = 1 << 30                                                  # a window beyond any length
ALIGNED = 8                                                         # numbers in 16 bytes of a 16-bit dtype
COMBINE_CHUNK = 16                                                  # splits that the combining kernel reads at once


def attention(
    launcher: Launcher, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backend.attention() by a plan: shapes as there. out is dense in the layout the caller holds; lse is contiguous."""
    if q.is_neg() or k.is_neg() or v.is_neg():       # lazily negated views: their memory holds the other sign
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    device, Hq, Dv = q.device, spec.q_heads, spec.v_head_dim
    if spec.varlen:
        Tq = q.shape[0]
        out = torch.empty((Tq, Hq, Dv), dtype=q.dtype, device=device)
        lse = torch.empty((Hq, Tq), dtype=torch.float32, device=device) if spec.return_lse else None
        strides, lse_strides, tokens = _packed_strides(q, k, v, out, spec), (0, Tq), Tq
    else:
        B, _, Sq, _ = q.shape
        out = torch.empty((B, Sq, Hq, Dv) if spec.layout == "bshd" else (B, Hq, Sq, Dv), dtype=q.dtype, device=device)
        out = out.transpose(1, 2) if spec.layout == "bshd" else out
        lse = torch.empty((B, Hq, Sq), dtype=torch.float32, device=device) if spec.return_lse else None
        strides, lse_strides, tokens = (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3]), (Hq * Sq, Sq), B * Sq
    if not out.numel():
        return out, lse
    rows, split = tokens * Hq, plan.splits > 1
    partial = (None, None, None)
    if split:
        partial = (torch.empty((plan.splits, rows, Dv), dtype=torch.float32, device=device),
                   *(torch.empty((plan.splits, rows), dtype=torch.float32, device=device) for _ in range(2)))
    mask, mask_kind, mask_strides = _mask(operands.attn_mask)
    slopes, slope_batch = operands.alibi_slopes, 0
    if slopes is not None:
        slopes = slopes.resolve_neg().contiguous()
        slope_batch = Hq if slopes.dim() == 2 else 0
    sinks = None if operands.sinks is None else _readable(operands.sinks)
    cu_q, cu_k, table, lengths = (None if x is None else x.contiguous() for x in (
        operands.cu_seqlens_q, operands.cu_seqlens_k, operands.block_table, operands.seqused_k))
    scale, plain = _scale(spec, mask_kind)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    softcap = min(max(spec.softcap, SMALLEST), LARGEST) if spec.softcap else 1.0
    in_units, unit, v_unit = _units(strides)
    tile = plan.tile
    shared = {"PLAIN": plain, "HAS_SINKS": sinks is not None, "HAS_LSE": lse is not None, "BLOCK_V": plan.v_dim}
    launcher.launch(
        "attention", plan.programs,
        (q, k, v, out, lse, slopes, sinks, mask, cu_q, cu_k, table, lengths, *partial, *in_units, *mask_strides, slope_batch,
         0 if table is None else table.stride(0), *lse_strides, spec.q_len, spec.kv_len, plan.tiles, plan.splits, rows,
         min(left, FARTHEST), min(right, FARTHEST), scale, softcap),
        {**shared, "HEAD_DIM": spec.head_dim, "V_HEAD_DIM": Dv, "UNIT": unit, "V_UNIT": v_unit,
         "GROUP": spec.group_size, "HEADS": plan.heads, "KV_HEADS": spec.kv_heads, "VARLEN": spec.varlen, "PAGE_SIZE": spec.page_size,
         "SPLIT": split, "GUARD": spec.rows_differ, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
         "HAS_SOFTCAP": bool(spec.softcap), "HAS_ALIBI": slopes is not None, "MASK_KIND": mask_kind,
         "WIDE": _wide(strides, mask_strides, plan, spec.kv_len),
         "PADDED_D": plan.dim != spec.head_dim, "PADDED_V": plan.v_dim != Dv, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
         "BLOCK_D": plan.dim, "CAREFUL": LEAST},
        tile.warps, tile.stages, device,
    )
    if split:
        launcher.launch(
            "combine", rows,
            (*partial, out, lse, sinks, *strides[-3:], *lse_strides, tokens if spec.varlen else spec.q_len, plan.splits, rows, Dv),
            {**shared, "Q_HEADS": Hq, "BLOCK_S": MAX_SPLITS, "CHUNK": COMBINE_CHUNK}, 4, 1, device,
        )
    return out, lse


def _packed_strides(q, k, v, out, spec: AttentionSpec) -> tuple[int, ...]:
    """Strides in the kernel's order (batch or page, head, token, feature) of packed or paged tensors."""
    def one(x: torch.Tensor, paged: bool = False) -> tuple[int, ...]:
        page, (token, head, feature) = (x.stride(0), x.stride()[1:]) if paged else (0, x.stride())
        return page, head, token, feature

    paged = bool(spec.page_size)
    return (*one(q), *one(k, paged), *one(v, paged), *one(out)[:3])


def _units(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """The strides as the kernel takes them, and the units of q's and k's and of v's and out's: 8 where 8 divides them all and 16 does not.

    Multiples of 16 Triton sees by itself, and a product less leaves it a register. Feature strides stay: the kernel is compiled for 1."""
    q, k, v, out = strides[:3], strides[4:7], strides[8:11], strides[12:]
    unit, v_unit = (ALIGNED if math.gcd(*both) % (2 * ALIGNED) == ALIGNED else 1 for both in ((*q, *k), (*v, *out)))
    shrink = lambda part, by: tuple(each // by for each in part)
    return (*shrink(q, unit), strides[3], *shrink(k, unit), strides[7], *shrink(v, v_unit), strides[11], *shrink(out, v_unit)), unit, v_unit


def _mask(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int, tuple[int, ...]]:
    """The mask as the kernel reads it, 1 for bool and 2 for float, and its strides with 0 for broadcast axes."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    if mask.dtype == torch.bool:
        mask, kind = mask.view(torch.uint8), 1
    else:
        mask, kind = _readable(mask), 2
    return mask, kind, tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """A float operand in a dtype that the kernel widens by itself, and without a lazy sign; [Hq] operands come out contiguous."""
    x = x if x.dtype in (*HALF_DTYPES, torch.float32) else x.float()
    x = x.resolve_neg()
    return x.contiguous() if x.dim() == 1 else x


def _scale(spec: AttentionSpec, mask_kind: int) -> tuple[float, bool]:
    """The factor that the kernel is given, and whether it may work in powers of 2 (PLAIN, see attention_kernel.py)."""
    plain = SMALLEST < spec.scale * LOG2E < LARGEST and not (spec.softcap or spec.alibi or mask_kind == 2)
    if plain:
        return spec.scale * LOG2E, True
    return math.copysign(min(abs(spec.scale), LARGEST), spec.scale), False


def _wide(strides: tuple[int, ...], mask_strides: tuple[int, ...], plan: Plan, kv_len: int) -> bool:
    """Whether a block's keys, a tile's part of the mask, or a single stride, is more than 32-bit offsets reach."""
    _, head, row, key = mask_strides
    mask = plan.heads * head + plan.tile.rows * row + (kv_len + plan.tile.keys) * key
    q_feature, (k_key, k_feature), (v_key, v_feature) = strides[3], strides[6:8], strides[10:12]
    keys = plan.tile.keys * max(k_key, v_key) + max(plan.dim * k_feature, plan.v_dim * v_feature)
    return max(keys, mask, plan.dim * q_feature, *strides) >= 1 << 31
