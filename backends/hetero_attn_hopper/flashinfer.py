"""The package flashinfer, where it is installed: softcap, and decoding on pages of any size, which flash-attn takes in multiples of 256.

Only what its documents name is used (docs.flashinfer.ai, flashinfer.prefill: single_prefill_with_kv_cache and the wrappers for ragged and
paged KV, layout NHD): grouped heads, causality aligned bottom-right, a left window, softcap of the scaled scores, and an lse in base 2,
which is brought to base e here. It has no slopes of the caller's for ALiBi. Of a row without keys it gives numbers that mean nothing
(flashinfer#4452), so such rows are written over.

A wrapper plans on the host: lengths are read back from the device, once a step and not once a layer as long as the same unwritten tensors
come (torch counts the writes, except of tensors of inference mode). A CUDA graph cannot hold a plan. One dense sequence needs none.
Nothing here has run with the real package (`verified: none`); its signatures are held to by a stand-in.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from hetero_attn.backend import UnsupportedError
from hetero_attn.spec import AttentionSpec
from hetero_attn_hopper.package import Installed

HEAD_DIMS = (64, 128, 256)             # what its kernels are instantiated for, of head dimensions that agree for keys and values
WORKSPACE_BYTES = 128 << 20            # what its documents recommend, for each stream's partial results
NHD, BASE_E, NO_KEYS = "NHD", math.log(2.0), float("inf")


class FlashInferPackage(Installed):
    """module: what to import; tests give another name."""

    name, oldest = "flashinfer", (0, 3, 0)
    needed = ("single_prefill_with_kv_cache", "BatchPrefillWithRaggedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
    wanted = "flashinfer-python {} or later".format(".".join(map(str, oldest)))

    def __init__(self, module: str = "flashinfer") -> None:
        super().__init__(module)
        self._planned: dict[tuple, _Planned] = {}    # by device, stream and kind

    def objections(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if spec.head_dim not in HEAD_DIMS:
            reasons.append(f"head_dim is {spec.head_dim}, flashinfer has {', '.join(map(str, HEAD_DIMS))}")
        if spec.alibi:
            reasons.append("alibi: flashinfer has slopes of its own and takes none")
        if not spec.is_causal and spec.window_size[1] > 0:
            reasons.append(f"the window ends {spec.window_size[1]} keys to the right, flashinfer ends it at the diagonal or nowhere")
        return reasons

    def remarks(self, spec: AttentionSpec) -> list[str]:
        if not spec.varlen:
            return []
        return ["flashinfer reads lengths back from the device, once a step, to plan on the host; a CUDA graph cannot hold that"]

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int,
        max_k: int, is_causal: bool, scale: float, window: tuple[int, int], *, softcap: float, slopes: torch.Tensor | None,
        table: torch.Tensor | None, used: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Package. Raises UnsupportedError under a CUDA graph's capture where it would have to plan."""
        assert slopes is None
        is_causal = is_causal or window[1] == 0
        options = {"causal": is_causal, "sm_scale": scale, "window_left": window[0], "logits_soft_cap": softcap or None}
        if cu_q is None:
            return self._dense(q, k, v, options)
        keys = (cu_q, cu_k) if table is None else (cu_q, used, table)
        facts = (*q.shape[1:], *k.shape[-3:-1], q.dtype, *options.values())
        if table is None:
            planned = self._plan("ragged", q, keys, facts, lambda wrapper: self._plan_ragged(wrapper, q, k, cu_q, cu_k, options))
            out, lse = planned.wrapper.run(q.contiguous(), k.contiguous(), v.contiguous(), return_lse=True)
            lengths = cu_k.diff()
        else:
            planned = self._plan("paged", q, keys, facts, lambda wrapper: self._plan_paged(wrapper, q, k, cu_q, used, table, options))
            out, lse = planned.wrapper.run(q.contiguous(), (k.contiguous(), v.contiguous()), return_lse=True)
            lengths = used
        lse = lse.transpose(0, 1) * BASE_E                                                                        # [Hq, T]
        if planned.blind:
            out, lse = _without_keys(out, lse, _blind_rows(cu_q, lengths, q.shape[0], is_causal))
        return out, lse

    def _dense(self, q, k, v, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, Sq, Hq, D], k, v [B, Skv, Hkv, D] -> (out like q, lse [B, Hq, Sq]). Lengths are known, so nothing is read back."""
        (B, Sq), Skv = q.shape[:2], k.shape[1]
        if B == 1:
            out, lse = self.module.single_prefill_with_kv_cache(*(x[0].contiguous() for x in (q, k, v)), kv_layout=NHD, return_lse=True,
                                                                **options)
        else:
            starts = [torch.arange(0, (B + 1) * length, length, dtype=torch.int32, device="cpu") for length in (Sq, Skv)]
            q, k, v = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (q, k, v))
            facts = (B, Sq, Skv, *q.shape[1:], k.shape[1], q.dtype, *options.values())
            planned = self._plan("dense", q, (), facts, lambda wrapper: self._plan_ragged(wrapper, q, k, *starts, options))
            out, lse = planned.wrapper.run(q, k, v, return_lse=True)
        out, lse = out.view(B, Sq, *out.shape[1:]), lse.view(B, Sq, -1).transpose(1, 2) * BASE_E
        if options["causal"] and Sq > Skv:
            blind = torch.arange(Sq, device=q.device) < Sq - Skv
            return out.masked_fill(blind[None, :, None, None], 0.0), lse.masked_fill(blind, NO_KEYS)
        return out, lse

    # ---- planning: wrapper -> whether some row sees no key -------------------------------------------------------------------------

    def _plan_ragged(self, wrapper: Any, q, k, cu_q, cu_k, options: dict[str, Any]) -> bool:
        """q [Tq, Hq, D], k [Tk, Hkv, D], cu_q, cu_k int32 [B + 1]."""
        starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
        wrapper.plan(_int32(starts_q), _int32(starts_k), q.shape[1], k.shape[1], q.shape[2], q_data_type=q.dtype, kv_data_type=q.dtype,
                     **options)
        return _some_blind(starts_q, [after - before for before, after in pairwise(starts_k)], options["causal"])

    def _plan_paged(self, wrapper: Any, q, k, cu_q, used, table, options: dict[str, Any]) -> bool:
        """k [pages, page, Hkv, D], used int32 [B], table int32 [B, pages a sequence]: of each sequence's row as many entries as it uses."""
        page, starts_q, lengths = k.shape[1], cu_q.tolist(), used.tolist()
        counts = [-(-length // page) for length in lengths]
        places = [row * table.shape[1] + at for row, count in enumerate(counts) for at in range(count)]
        indices = table.reshape(-1)[torch.tensor(places, dtype=torch.int64, device="cpu").to(table.device)]
        # The last page of no pages holds nothing; of others 1 to `page` tokens.
        last = [length - max(count - 1, 0) * page for length, count in zip(lengths, counts)]
        wrapper.plan(_int32(starts_q), _int32([0, *accumulate(counts)]), indices, _int32(last), q.shape[1], k.shape[2], q.shape[2], page,
                     q_data_type=q.dtype, kv_data_type=q.dtype, **options)
        return _some_blind(starts_q, lengths, options["causal"])

    def _plan(self, kind: str, q: torch.Tensor, tensors: Sequence[torch.Tensor], facts: tuple, plan: Callable[[Any], bool]) -> _Planned:
        """The wrapper of this kind, device and stream, planned by plan(wrapper) unless it is for the same tensors and facts already."""
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            words = ("flashinfer plans on the host, which a CUDA graph cannot hold; capture with backend='triton', or install flash-attn "
                     "and use pages of 256 tokens")
            raise UnsupportedError(words, {"hopper": [words]})
        known = self._planned.get((kind, q.device, stream))
        if known is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            if kind == "paged":
                # fa2's kernels put zeros for the values beyond a sequence's end, so what else its last page holds does no harm.
                wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(workspace, NHD, backend="fa2")
            else:
                wrapper = self.module.BatchPrefillWithRaggedKVCacheWrapper(workspace, NHD)
            known = self._planned[kind, q.device, stream] = _Planned(wrapper)
        if not known.is_for(tensors, facts):
            known.forget()
            known.blind = plan(known.wrapper)
            known.keep(tensors, facts)
        return known


class _Planned:
    """A wrapper, and what its plan is for."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.blind = wrapper, False
        self.forget()

    def forget(self) -> None:
        self._tensors, self._facts = None, None

    def keep(self, tensors: Sequence[torch.Tensor], facts: tuple) -> None:
        if not any(each.is_inference() for each in tensors):
            self._tensors, self._facts = [(weakref.ref(each), each._version) for each in tensors], facts

    def is_for(self, tensors: Sequence[torch.Tensor], facts: tuple) -> bool:
        return self._tensors is not None and self._facts == facts and len(tensors) == len(self._tensors) and all(
            known() is each and version == each._version for (known, version), each in zip(self._tensors, tensors))


def _int32(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cpu")


def _some_blind(starts_q: Sequence[int], lengths: Sequence[int], is_causal: bool) -> bool:
    """Whether a row sees no key, by its sequence's lengths."""
    queries = [after - before for before, after in pairwise(starts_q)]
    return any(own and (not keys or (is_causal and own > keys)) for own, keys in zip(queries, lengths))


def _blind_rows(cu_q: torch.Tensor, lengths: torch.Tensor, rows: int, is_causal: bool) -> torch.Tensor:
    """bool [rows]: which packed rows see no key. cu_q [B + 1], lengths [B] of keys."""
    row = torch.arange(rows, device=cu_q.device)
    sequence = torch.searchsorted(cu_q[1:].contiguous(), row, right=True).clamp(max=len(lengths) - 1)
    keys = lengths[sequence]
    return (keys == 0) | (row - cu_q[sequence + 1] + keys < 0) if is_causal else keys == 0


def _without_keys(out: torch.Tensor, lse: torch.Tensor, blind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, D], lse [Hq, T], blind [T]."""
    return out.masked_fill(blind[:, None, None], 0.0), lse.masked_fill(blind, NO_KEYS)
