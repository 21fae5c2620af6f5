"""Which keys a chunk of query rows sees, as index arithmetic and as a bias; and how NaN in unseen keys is kept out.

SDPA multiplies a masked key's value by a weight of zero, and 0 * NaN is NaN. So where rows differ in what they see, keys and
values that are not finite are zeroed first and the rows that do see them are set to NaN afterwards.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import AttentionSpec


def key_range(spec: AttentionSpec, first_row: int, last_row: int, q_len: int, kv_len: int) -> tuple[int, int]:
    """[start, end) of the keys that at least one of the rows first_row..last_row (inclusive) can see by position."""
    shift = kv_len - q_len
    left, right = spec.window_size
    start, end = 0, kv_len
    if left >= 0:
        start = max(0, first_row + shift - left)
    if right >= 0:
        end = min(end, last_row + shift + right + 1)
    if spec.is_causal:
        end = min(end, last_row + shift + 1)
    return start, max(start, end)


def row_bounds(spec: AttentionSpec, q_len: int, kv_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last visible key of every row, int64 [Sq] each; equal where a row sees nothing."""
    position = torch.arange(kv_len - q_len, kv_len, device=device)
    left, right = spec.window_size
    first = (position - left).clamp(0, kv_len) if left >= 0 else torch.zeros_like(position)
    last = torch.full_like(position, kv_len)
    if right >= 0:
        last = torch.minimum(last, position + right + 1)
    if spec.is_causal:
        last = torch.minimum(last, position + 1)
    return first, torch.maximum(first, last.clamp_min(0))


def chunk_bias(
    spec: AttentionSpec, rows: tuple[int, int], keys: tuple[int, int], shift: int, mask: torch.Tensor | None,
    slopes: torch.Tensor | None, device: torch.device, dtype: torch.dtype,
) -> torch.Tensor | None:
    """What is added to (float) or allowed among (bool) the scores of rows [a, b) and keys [c, d); None = nothing.

    shift is Skv - Sq; mask is [B|1, Hq|1, Sq|1, Skv|1]; slopes [Hq] or [B, Hq]. A float bias comes in `dtype`.
    """
    visible = None
    position = torch.arange(rows[0] + shift, rows[1] + shift, device=device)[:, None]
    key = torch.arange(keys[0], keys[1], device=device)
    left, right = spec.window_size
    conditions = []
    # A condition that holds for the whole chunk is left out: most chunks inside a window or below the diagonal need no mask.
    if spec.is_causal and keys[1] - 1 > rows[0] + shift:
        conditions.append(key <= position)
    if left >= 0 and keys[0] < rows[1] - 1 + shift - left:
        conditions.append(key >= position - left)
    if right >= 0 and keys[1] - 1 > rows[0] + shift + right:
        conditions.append(key <= position + right)
    for condition in conditions:
        visible = condition if visible is None else visible & condition

    bias = None
    if mask is not None:
        mask = mask[:, :, rows[0] : rows[1]] if mask.shape[2] != 1 else mask
        mask = mask[..., keys[0] : keys[1]] if mask.shape[3] != 1 else mask
        if mask.dtype == torch.bool:
            visible = mask if visible is None else visible & mask
        else:
            bias = mask.to(dtype)
    if slopes is not None:
        distance = (position - key).abs().to(dtype)                                     # [rows, keys]
        alibi = -slopes.to(dtype)[..., None, None] * distance                           # [Hq | B, Hq, rows, keys]
        alibi = alibi[None] if alibi.dim() == 3 else alibi
        bias = alibi if bias is None else bias + alibi
    if bias is None or visible is None:
        return visible if bias is None else bias
    return torch.where(visible, bias, float("-inf"))


def tainted_rows(spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor, q_len: int, q_heads: int) -> torch.Tensor:
    """bool [B, Hq, Sq]: the rows that see a key or a value that is not finite."""
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))                                # [B, Hkv, Skv]
    before = torch.nn.functional.pad(bad.cumsum(-1), (1, 0))                            # bad keys before each position
    first, last = row_bounds(spec, q_len, k.shape[2], k.device)
    seen = before.index_select(-1, last) - before.index_select(-1, first)               # [B, Hkv, Sq]
    return (seen > 0).repeat_interleave(q_heads // k.shape[1], dim=1)


def surely_finite(k: torch.Tensor, v: torch.Tensor) -> bool:
    """One cheap pass on the CPU: a sum is finite only if every term is. May say False of large finite values, never True of NaN."""
    return bool(k.sum(dtype=torch.float32).isfinite() & v.sum(dtype=torch.float32).isfinite())
