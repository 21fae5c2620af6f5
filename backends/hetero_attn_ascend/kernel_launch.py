"""Tables and strides for the two-level kernel, and its launch: dense, packed and paged calls are one kernel with other numbers.

What the fused operators cannot express comes here: softcap, ALiBi, float masks, fp32 pages. Lengths are needed on the host, because tasks
are split over cores by them. NaN in keys that some rows do not see is kept from those rows as in calls.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from hetero_attn.spec import HALF_DTYPES, AttentionSpec, Operands, dtype_name
from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.kernel_tiling import KernelTiling
from hetero_attn_ascend.lengths import on_host
from hetero_attn_ascend.pages import gathered
from hetero_attn_ascend.planner import kernel_tiles
from hetero_attn_ascend.tiling import Problem, even_split
from hetero_attn_ascend.tiling_mask import tiling_mask
from hetero_attn_ascend.visibility import finite, finite_packed

MAX_HEAD_DIM = 256


def unsupported(spec: AttentionSpec) -> list[str]:
    """Why the kernel cannot run a call; [] = it can."""
    reasons = []
    if spec.dtype not in (*HALF_DTYPES, torch.float32):
        reasons.append(f"dtype is {dtype_name(spec.dtype)}, the two-level kernel has float32, float16 and bfloat16; cast to float32")
    if max(spec.head_dim, spec.v_head_dim) > MAX_HEAD_DIM:
        reasons.append(f"head_dim is {max(spec.head_dim, spec.v_head_dim)}, the two-level kernel has up to {MAX_HEAD_DIM}")
    return reasons


@dataclass(frozen=True)
class Sequences:
    """Where each sequence's tokens begin in q (and out) and in k and v, in tokens of their packed axes, and how many there are."""

    q_starts: list[int]
    k_starts: list[int]
    q_lens: list[int]
    kv_lens: list[int]


class TwoLevelKernel:
    """chip: whose buffers and cores the blocks are planned for. upcast: products in fp32 whatever the dtype (the interpreter's bf16
    products are wrong). kernel: () -> the Triton kernel; tests may hand in another. options: a plan -> the compiler's options for its
    launch, which other compilers and the interpreter do not take."""

    def __init__(self, chip: Chip, *, upcast: Callable[[torch.dtype], bool] = lambda dtype: False,
                 kernel: Callable[[], Any] | None = None, options: Callable[[KernelTiling], dict[str, Any]] = lambda plan: {}) -> None:
        self._chip, self._upcast, self._options = chip, upcast, options
        self._kernel = kernel or _import_kernel
        self._masks: dict[tuple[torch.device, int], torch.Tensor] = {}

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Backend.attention, for a spec that unsupported() has nothing against."""
        Hq, Dv = spec.q_heads, v.shape[-1]
        if spec.varlen:
            starts = on_host(operands.cu_seqlens_q)
            q_lens = [b - a for a, b in pairwise(starts)]
            if spec.page_size and not spec.rows_differ:
                sequences = Sequences(starts[:-1], [0] * len(q_lens), q_lens, on_host(operands.seqused_k))
            else:
                if spec.page_size:              # rows that see different keys: the guard against NaN wants them packed
                    k, v, k_starts = gathered(k, v, operands.block_table, on_host(operands.seqused_k), spec.page_size)
                    spec = replace(spec, page_size=0)
                else:
                    k_starts = on_host(operands.cu_seqlens_k)
                sequences = Sequences(starts[:-1], k_starts[:-1], q_lens, [b - a for a, b in pairwise(k_starts)])
            out, lse = q.new_zeros(q.shape[0], Hq, Dv), q.new_full((Hq, q.shape[0]), float("-inf"), dtype=torch.float32)
        else:
            B, Sq, Skv = q.shape[0], q.shape[2], k.shape[2]
            sequences = Sequences([0] * B, [0] * B, [Sq] * B, [Skv] * B)
            out, lse = q.new_zeros(B, Hq, Sq, Dv), q.new_full((B, Hq, Sq), float("-inf"), dtype=torch.float32)
        if out.numel():
            tainted = None
            if spec.rows_differ and k.numel() and not spec.varlen:
                k, v, tainted = finite(spec, k, v, q.shape[2], Hq)
            elif spec.rows_differ and k.numel():
                pieces = [(q0, q0 + n, k0, k0 + m) for q0, n, k0, m in
                          zip(sequences.q_starts, sequences.q_lens, sequences.k_starts, sequences.kv_lens)]
                k, v, tainted = finite_packed(spec, q, k, v, pieces)
            self._launch(q, k, v, out, lse, spec, operands, sequences)
            if tainted is not None:
                rows = tainted if not spec.varlen else tainted.T                                    # as lse lies
                lse = lse.masked_fill(rows, float("nan"))
                out = out.masked_fill(tainted[..., None], float("nan"))
        return out, lse if spec.return_lse else None

    def _launch(self, q, k, v, out, lse, spec: AttentionSpec, operands: Operands, sequences: Sequences) -> None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        dense, paged = not spec.varlen, bool(spec.page_size)
        rows_axis, heads_axis = (2, 1) if dense else (0, 1)
        k_key, k_head = (2, 1) if dense else (1, 2) if paged else (0, 1)
        longest = max(sequences.q_lens)
        folded = longest == 1 and spec.group_size > 1 and min(sequences.q_lens) == 1
        problem = Problem(
            batch=len(sequences.q_lens), kv_heads=spec.kv_heads, heads=spec.kv_heads if folded else spec.q_heads,
            rows=spec.group_size if folded else longest, kv_len=max(sequences.kv_lens, default=0), head_dim=q.shape[-1],
            v_head_dim=v.shape[-1], element=q.element_size(), left=spec.window_size[0],
            right=0 if spec.is_causal else spec.window_size[1], folded=folded,
        )
        plan = kernel_tiles(self._chip, problem)
        block_m, block_n = plan.block_m, plan.block_n
        tasks, core_starts = self._tasks(problem, sequences, block_m, block_n)
        mask = self._mask(q.device, plan.mask_side)
        attn_mask, mask_kind, mask_strides = _mask_of(operands.attn_mask, folded)
        slopes = operands.alibi_slopes
        lens = [spec.group_size if folded else n for n in sequences.q_lens]
        starts = lambda x, tokens, axis: [(b * x.stride(0) if dense else 0) + token * x.stride(axis) for b, token in enumerate(tokens)]
        no_starts = [0] * len(lens)                     # pages are found by the block table
        # Two copies to the device, not one a table.
        tasks, core_starts, q_lens, kv_lens = _on(q.device, torch.int32, tasks, core_starts, lens, sequences.kv_lens)
        q_bases, k_bases, v_bases, o_bases, lse_bases = _on(
            q.device, torch.int64, starts(q, sequences.q_starts, rows_axis), no_starts if paged else starts(k, sequences.k_starts, k_key),
            no_starts if paged else starts(v, sequences.k_starts, k_key), starts(out, sequences.q_starts, rows_axis),
            [b * lse.stride(0) if dense else start for b, start in enumerate(sequences.q_starts)],
        )
        nothing = mask
        if operands.attn_mask is not None and folded:
            mask_strides = (mask_strides[0], mask_strides[1], mask_strides[1], mask_strides[3])
        self._kernel()[(len(core_starts) - 1,)](
            q, k, v, out, lse,
            nothing if slopes is None else slopes.float().contiguous(),
            nothing if operands.sinks is None else operands.sinks.float().contiguous(),
            nothing if attn_mask is None else attn_mask, mask, operands.block_table.contiguous() if paged else nothing,
            tasks, core_starts, q_bases, k_bases, v_bases, o_bases, lse_bases, q_lens, kv_lens,
            q.stride(heads_axis), q.stride(heads_axis) if folded else q.stride(rows_axis), k.stride(k_head), k.stride(k_key),
            v.stride(k_head), v.stride(k_key), out.stride(heads_axis), out.stride(heads_axis) if folded else out.stride(rows_axis),
            lse.stride(1) if dense else lse.stride(0), (lse.stride(1) if dense else lse.stride(0)) if folded else lse.stride(-1),
            k.stride(0) if paged else 0, v.stride(0) if paged else 0, max(spec.page_size, 1),
            operands.block_table.shape[1] if paged else 0,
            slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0, int(folded), *mask_strides, int(not folded),
            spec.group_size, spec.group_size if folded else 1, mask.shape[0], problem.left, problem.right, spec.scale, spec.softcap,
            q.shape[-1], v.shape[-1],
            HAS_LEFT=problem.left >= 0, HAS_RIGHT=problem.right >= 0 and not folded, HAS_SOFTCAP=bool(spec.softcap),
            HAS_ALIBI=slopes is not None, HAS_SINKS=operands.sinks is not None, MASK_KIND=mask_kind, PAGED=paged,
            UPCAST=self._upcast(q.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=plan.padded_k, BLOCK_V=plan.padded_v,
            **self._options(plan),
        )

    def _tasks(self, problem: Problem, sequences: Sequences, block_m: int, block_n: int) -> tuple[list[int], list[int]]:
        """[n * 3]: (sequence, task head, first row) of every task, core by core; and [cores + 1]: at which task each core begins."""
        every, weights = [], []
        for b, (q_len, kv_len) in enumerate(zip(sequences.q_lens, sequences.kv_lens)):
            rows = problem.rows if problem.folded else q_len
            for head in range(problem.heads):
                for first in range(0, rows, block_m):
                    every.append((b, head, first))
                    last = kv_len if problem.right < 0 or problem.folded else min(kv_len, first + block_m + kv_len - rows + problem.right)
                    weights.append(-(-max(last, 0) // block_n))
        split = [core for core in even_split(weights, self._chip.cores) if core]
        ends = [0]
        for core in split:
            ends.append(ends[-1] + len(core))
        return [number for core in split for index in core for number in every[index]], ends

    def _mask(self, device: torch.device, size: int) -> torch.Tensor:
        key = (device, size)
        if key not in self._masks:
            self._masks[key] = tiling_mask(size, torch.int8, device)
        return self._masks[key]


def _on(device: torch.device, dtype: torch.dtype, *tables: list[int]) -> tuple[torch.Tensor, ...]:
    """The tables as parts of one tensor on the device."""
    return torch.tensor([number for table in tables for number in table], dtype=dtype).to(device).split([len(table) for table in tables])


def _mask_of(mask: torch.Tensor | None, folded: bool) -> tuple[torch.Tensor | None, int, tuple[int, int, int, int]]:
    """The mask as the kernel reads it, 1 for bool and 2 for float, and its strides with 0 for broadcast axes."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    kind = 1 if mask.dtype == torch.bool else 2
    mask = mask.view(torch.int8) if kind == 1 else mask if mask.dtype in (torch.float32, torch.float16, torch.bfloat16) else mask.float()
    return mask, kind, tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


def _import_kernel() -> Any:
    from hetero_attn_ascend.two_level_kernel import two_level_attention

    return two_level_attention
