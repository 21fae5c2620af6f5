"""The suite must catch faults: each backend below is right but for one seeded mistake, the kind that real kernels have had.

`Honest` is a third implementation of the semantics (vectorised, beside the reference and sdpa); it must pass the fp32
grid, so that whatever the suite says about a faulty subclass is the fault's doing. A fault must be caught by the cases of its own area.
"""

import re
from dataclasses import replace

import pytest
import torch

from hetero_attn import registry
from hetero_attn.backend import Backend
from hetero_attn.testing import attention
from hetero_attn.testing.attention_cases import attention_cases
from hetero_attn.testing.tolerances import mismatch

INF = float("inf")
NAN = float("nan")
FP32 = [case for case in attention_cases(full=False) if case.dtype == torch.float32]


class Honest(Backend):
    """The semantics in small steps, each of which one fault replaces."""

    name = "honest"
    judges_lengths = False

    def unsupported_reasons(self, spec):
        return []

    def attention(self, q, k, v, spec, operands):
        if not spec.varlen:
            return self.dense(q, k, v, spec, operands.attn_mask, operands.alibi_slopes, operands.sinks)
        starts = operands.cu_seqlens_q.tolist()
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
        lse = torch.zeros(q.shape[1], q.shape[0], dtype=self.arithmetic(q))
        for b in range(spec.batch):
            rows = slice(starts[b], starts[b + 1])
            slopes = operands.alibi_slopes
            slopes = self.sequence_slopes(slopes, b) if slopes is not None and slopes.dim() == 2 else slopes
            keys, values = self.keys_of(b, k, v, spec, operands)
            part = (x.transpose(0, 1)[None] for x in (q[rows], keys, values))
            own, own_lse = self.dense(*part, spec, None, slopes, operands.sinks)
            out = torch.cat([out[: rows.start], own[0].transpose(0, 1), out[rows.stop :]])
            if spec.return_lse:
                lse[:, rows] = own_lse[0]
        return out, lse if spec.return_lse else None

    def keys_of(self, b, k, v, spec, operands):
        if not spec.page_size:
            start, end = operands.cu_seqlens_k[b : b + 2].tolist()
            return k[start:end], v[start:end]
        length = self.length(int(operands.seqused_k[b]), spec)
        pages = self.pages(operands.block_table[b, : -(-length // spec.page_size)].long(), k.shape[0])
        return k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]

    def length(self, length, spec):
        return length

    def pages(self, table, num_blocks):
        return table

    def sequence_slopes(self, slopes, b):
        return slopes[b]

    def dense(self, q, k, v, spec, mask, slopes, sinks):
        (Sq, Skv), group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
        dtype = self.arithmetic(q)
        keys, values = self.over_groups(k.to(dtype), group), self.over_groups(v.to(dtype), group)
        ahead = torch.arange(Skv)[None] - self.positions(Sq, Skv)[:, None]                       # [Sq, Skv]
        scores = self.scale(spec) * (q.to(dtype) @ keys.transpose(-1, -2))                       # [B, Hq, Sq, Skv]
        bias = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else None
        alibi = None if slopes is None else self.alibi(slopes.to(dtype)[..., None, None], ahead)
        scores = self.shaped(scores, spec, bias, alibi)
        sees = self.sees(ahead, spec).expand(scores.shape)
        if mask is not None and mask.dtype == torch.bool:
            sees = sees & self.bool_mask(mask)
        scores = torch.where(sees, scores, -INF)
        sink = None if sinks is None else self.sink(sinks.to(dtype), spec)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights, lse = self.softmax(scores, sink, sees)
        out = self.weighted_sum(weights, values, sees)
        return self.result(out.to(q.dtype), q, k, v), self.lse(lse, spec) if spec.return_lse else None

    def arithmetic(self, q):
        return torch.float64 if q.dtype == torch.float64 else torch.float32

    def over_groups(self, x, group):
        return x.repeat_interleave(group, dim=1)

    def positions(self, Sq, Skv):
        return torch.arange(Sq) + Skv - Sq

    def scale(self, spec):
        return spec.scale

    def alibi(self, slopes, ahead):
        return -slopes * ahead.abs()

    def shaped(self, scores, spec, bias, alibi):
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        for further in (alibi, bias):
            scores = scores if further is None else scores + further
        return scores

    def sees(self, ahead, spec):
        left, right = self.window(spec)
        sees = torch.ones_like(ahead, dtype=torch.bool)
        sees = sees & (ahead <= 0) if spec.is_causal else sees
        sees = sees & (ahead >= -left) if left >= 0 else sees
        return sees & (ahead <= right) if right >= 0 else sees

    def window(self, spec):
        return spec.window_size

    def bool_mask(self, mask):
        return mask

    def sink(self, sinks, spec):
        return sinks

    def softmax(self, scores, sink, sees):
        logits = scores if sink is None else torch.cat([scores, sink], dim=-1)
        top = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else torch.full((*scores.shape[:3], 1), -INF)
        top = torch.where(top == -INF, 0.0, top)
        total = (logits - top).exp().sum(-1, keepdim=True)
        weights = (scores - top).exp() / torch.where(total == 0, 1.0, total)
        return weights, (top + total.log())[..., 0].detach()

    def weighted_sum(self, weights, v, sees):
        unseen_stays_out = torch.where(v.isfinite(), v, 0.0)
        out = weights @ unseen_stays_out
        touched = (sees & ~v.isfinite().all(-1)[:, :, None]).any(-1, keepdim=True)
        return out.masked_fill(touched, float("nan")) if touched.any() else out

    def lse(self, lse, spec):
        return lse.to(torch.float64 if spec.dtype == torch.float64 else torch.float32)

    def result(self, out, q, k, v):
        return out


def honest(name):
    """The honest step of that name, for a fault to call."""
    return getattr(Honest, name)


def grain(dtype):
    """Rounds through a coarser dtype on the way."""
    return lambda self, out, q, k, v: out.to(dtype).to(q.dtype)


def written_input(self, q, k, v, spec, operands):
    out = honest("attention")(self, q, k, v, spec, operands)
    with torch.no_grad():
        q.mul_(spec.scale) if q.numel() and not q.requires_grad else None
    return out


def noisy(self, out, q, k, v):
    self.calls = getattr(self, "calls", 0) + 1
    return out * (1 + 1e-6 * self.calls)


def reused(self, out, q, k, v):
    self.buffer = getattr(self, "buffer", out)
    return self.buffer.copy_(out) if self.buffer.shape == out.shape and self.buffer.dtype == out.dtype else out


def average_where_empty(self, scores, sink, sees):
    weights, lse = honest("softmax")(self, scores, sink, sees)
    return torch.where(sees.any(-1, keepdim=True), weights, 1 / max(1, scores.shape[-1])), lse


def nan_where_empty(self, scores, sink, sees):
    weights, lse = honest("softmax")(self, scores, sink, sees)
    return torch.where(sees.any(-1, keepdim=True), weights, float("nan")), lse


def min_is_minus_infinity(self, scores, spec, bias, alibi):
    bias = None if bias is None else torch.where(bias < -1e4, -INF, bias)
    return honest("shaped")(self, scores, spec, bias, alibi)


def mask_in_bf16(self, scores, spec, bias, alibi):
    return honest("shaped")(self, scores, spec, None if bias is None else bias.bfloat16().to(bias.dtype), alibi)


def cap_after_mask(self, scores, spec, bias, alibi):
    for further in (alibi, bias):
        scores = scores if further is None else scores + further
    return spec.softcap * torch.tanh(scores / spec.softcap) if spec.softcap else scores


def without_top(self, scores, sink, sees):
    total = scores.exp().sum(-1, keepdim=True) + (0.0 if sink is None else sink.exp())
    return scores.exp() / torch.where(total == 0, 1.0, total), total.log()[..., 0].detach()


def sink_with_a_value(self, scores, sink, sees):
    weights, lse = honest("softmax")(self, scores, sink, sees)
    left = 0.0 if sink is None or not weights.shape[-1] else (1 - weights.sum(-1, keepdim=True)) / weights.shape[-1]
    return weights + left, lse


def sink_left_out_of_lse(self, scores, sink, sees):
    return honest("softmax")(self, scores, sink, sees)[0], honest("softmax")(self, scores, None, sees)[1]


def pages_through_the_whole_table(self, b, k, v, spec, operands):
    length = int(operands.seqused_k[b])
    pages = operands.block_table[b].long().clamp(0, k.shape[0] - 1)
    keys, values = k[pages].flatten(0, 1), v[pages].flatten(0, 1)
    beyond = torch.where(keys[length:].isfinite(), 0.0, keys[length:])      # "masked" by a weight that is zero times NaN
    return keys[:length], values[:length] + 0 * beyond.sum()


# name: (a word of the cases that must catch it, the step it replaces, the fault)
FAULTS = {
    "causal and window aligned top-left": ("causal", "positions", lambda self, Sq, Skv: torch.arange(Sq)),
    "causal excludes the diagonal": ("causal", "sees", lambda self, ahead, spec: honest("sees")(self, ahead + spec.is_causal, spec)),
    "window one short on the left": ("window", "window", lambda self, spec: (max(spec.window_size[0] - 1, -1), spec.window_size[1])),
    "window one long on the right": ("window", "window", lambda self, spec: (spec.window_size[0], spec.window_size[1] + 1)),
    "window 0 taken for unlimited": ("window-0", "window", lambda self, spec: tuple(w or -1 for w in spec.window_size)),
    "an unlimited right side taken for 0": ("window", "window", lambda self, spec: (spec.window_size[0], max(0, spec.window_size[1]))),
    "bool mask inverted": ("mask-random", "bool_mask", lambda self, mask: ~mask),
    "bool mask of the first batch row for all": ("padding", "bool_mask", lambda self, mask: mask[:1]),
    "bool mask of the first head for all": ("mask-random", "bool_mask", lambda self, mask: mask[:, :1]),
    "finfo.min taken for -inf": ("mask-min", "shaped", min_is_minus_infinity),
    "float mask rounded to bf16": ("mask-bias", "shaped", mask_in_bf16),
    "softcap applied after mask and alibi": ("softcap", "shaped", cap_after_mask),
    "softcap forgotten": ("softcap", "shaped", lambda self, scores, spec, bias, alibi: honest("shaped")(
        self, scores, replace(spec, softcap=0.0), bias, alibi)),
    "softcap forgotten where no lse is asked for": ("softcap", "shaped", lambda self, scores, spec, bias, alibi: honest("shaped")(
        self, scores, spec if spec.return_lse else replace(spec, softcap=0.0), bias, alibi)),
    "alibi with the wrong sign": ("alibi", "alibi", lambda self, slopes, ahead: slopes * ahead.abs()),
    "alibi without the absolute value": ("alibi", "alibi", lambda self, slopes, ahead: slopes * ahead),
    "alibi slopes of the first batch row for all": ("alibi", "alibi", lambda self, slopes, ahead: -(
        slopes[:1] if slopes.dim() == 4 else slopes) * ahead.abs()),
    "alibi slopes of the first sequence for all": ("varlen", "sequence_slopes", lambda self, slopes, b: slopes[0]),
    "sinks scaled": ("sinks", "sink", lambda self, sinks, spec: sinks * spec.scale),
    "sinks capped": ("sinks", "sink", lambda self, sinks, spec: spec.softcap * torch.tanh(sinks / spec.softcap) if spec.softcap else sinks),
    "sinks carry an average of the values": ("sinks", "softmax", sink_with_a_value),
    "sinks left out of the lse": ("sinks", "softmax", sink_left_out_of_lse),
    "sinks detached from the graph": ("gradients-sinks", "sink", lambda self, sinks, spec: sinks.detach()),
    "GQA heads interleaved": ("heads", "over_groups", lambda self, x, group: x.repeat(1, group, 1, 1)),
    "default scale although one was given": ("scale", "scale", lambda self, spec: spec.head_dim**-0.5),
    "scale 0 taken for none": ("scale-0", "scale", lambda self, spec: spec.scale or spec.head_dim**-0.5),
    "scale by the values' head_dim": ("head_dim", "scale", lambda self, spec: spec.scale * (spec.head_dim / spec.v_head_dim) ** 0.5),
    "lse in base 2": ("lse", "lse", lambda self, lse, spec: lse.float() * 1.442695),
    "lse of an empty row is 0": ("causal", "lse", lambda self, lse, spec: lse.float().nan_to_num(neginf=0.0)),
    "lse in the dtype of q": ("lse", "lse", lambda self, lse, spec: lse.to(torch.float16)),
    "an empty row is the average": ("empty", "softmax", average_where_empty),
    "an empty row is NaN": ("empty", "softmax", nan_where_empty),
    "softmax without the row's maximum": ("numbers", "softmax", without_top),
    "NaN of excluded values times zero": ("poison", "weighted_sum", lambda self, weights, v, sees: weights @ v),
    "keys of the neighbouring sequence": ("varlen", "keys_of", lambda self, b, k, v, spec, operands: (
        (k[operands.cu_seqlens_k[0] :], v[operands.cu_seqlens_k[0] :]) if not spec.page_size else honest("keys_of")(
            self, b, k, v, spec, operands))),
    "block table off by one page": ("paged", "pages", lambda self, table, num_blocks: (table + 1) % num_blocks),
    "block table ignored": ("paged", "pages", lambda self, table, num_blocks: torch.arange(len(table))),
    "reads a whole last page": ("paged", "length", lambda self, length, spec: -(-length // spec.page_size) * spec.page_size),
    "touches table entries beyond the length": ("poison", "keys_of", lambda self, b, k, v, spec, operands: (
        pages_through_the_whole_table if spec.page_size else honest("keys_of"))(self, b, k, v, spec, operands)),
    "a length short by one": ("paged", "length", lambda self, length, spec: max(0, length - 1)),
    "writes an input": ("plain", "attention", written_input),
    "returns other bits each time": ("plain", "result", noisy),
    "returns the same buffer each time": ("plain", "result", reused),
    "returns a view of v": ("lengths-1x1-heads-4-4", "result", lambda self, out, q, k, v: v if out.shape == v.shape else out),
    "accumulates in bf16": ("head_dim", "result", grain(torch.bfloat16)),
    "returns another dtype": ("plain", "result", lambda self, out, q, k, v: out.to(torch.float32 if q.dtype != torch.float32 else
                                                                                           torch.float64)),
    "no gradient for the keys": ("gradients", "over_groups", lambda self, x, group: honest("over_groups")(self, x.detach(), group)),
    "a gradient twice as large": ("gradients", "result", lambda self, out, q, k, v: 2 * out - out.detach()),
    "no autograd at all": ("gradients", "result", lambda self, out, q, k, v: out.detach()),
    "assumes unit stride": ("memory-interleaved", "attention", lambda self, q, k, v, spec, operands: honest("attention")(
        self, torch.as_strided(q, q.shape, (*q.stride()[:-1], 1), q.storage_offset()), k, v, spec, operands)),
    "walks v with the strides of k": ("memory-mixed", "attention", lambda self, q, k, v, spec, operands: honest("attention")(
        self, q, k, torch.as_strided(v, v.shape, k.stride(), v.storage_offset()) if v.shape == k.shape else v, spec, operands)),
    "walks k with the strides of q": ("memory-mixed", "attention", lambda self, q, k, v, spec, operands: honest("attention")(
        self, q, torch.as_strided(k, k.shape, q.stride(), k.storage_offset()) if k.shape == q.shape else k, v, spec, operands)),
    "has room for 16 heads": ("heads", "over_groups", lambda self, x, group: honest("over_groups")(
        self, x, group) * (torch.arange(x.shape[1] * group) < 16)[:, None, None]),
    "assumes the mask is contiguous": ("memory-interleaved", "bool_mask", lambda self, mask: torch.as_strided(
        mask, mask.shape, torch.empty(mask.shape).stride(), mask.storage_offset())),
}


def complaint_about(case, faulty) -> str | None:
    """The suite's complaint about `faulty` on the case, an exception included; None where it passes."""
    with registry.register("seeded", faulty):
        try:
            attention.check(case, "seeded")
        except Exception as complaint:
            return str(complaint)
    return None


@pytest.mark.parametrize("case", FP32, ids=[case.name for case in FP32])
def test_honest_backend_passes(case):
    assert complaint_about(case, Honest) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_in_its_area(fault):
    area, step, seeded = FAULTS[fault]
    assert hasattr(Honest, step), f"{step} is no step of Honest: the fault would replace nothing"
    faulty = type("Faulty", (Honest,), {step: seeded})
    candidates = [case for case in FP32 if area in case.name]
    assert candidates, f"no case is named for {area!r}"
    assert any(complaint_about(case, faulty) for case in candidates), f"none of {len(candidates)} cases notices: {fault}"


def test_a_broken_promise_about_lengths_is_caught():
    """A backend that says it does not judge lengths, and does."""
    from hetero_attn.testing.test_attention import test_backend_keeps_its_promise_not_to_judge_lengths as promise

    class Liar(Honest):
        def unsupported_reasons(self, spec):
            return [f"kv_len is {spec.kv_len}, at most 1000"] if spec.kv_len > 1000 else []

    with registry.register("seeded", Liar), pytest.raises(AssertionError, match="grew into"):
        promise("seeded", "cpu")


def test_a_backend_that_objects_to_everything_is_caught():
    from hetero_attn.testing.test_attention import test_backend_is_available_and_runs_something as runs_something

    class Idle(Honest):
        def unsupported_reasons(self, spec):
            return ["not today"]

    with registry.register("seeded", Idle), pytest.raises(AssertionError, match="objects to every plain call"):
        runs_something("seeded", "cpu")


@pytest.mark.parametrize(("actual", "expected", "complaint"), [
    ([1.0, 2.0], [1.0, 2.0], None),
    ([1.0, 2.0 + 5e-5], [1.0, 2.0], None),                      # within 2e-5 + 2e-5 * 2
    ([1.0, 2.0 + 7e-5], [1.0, 2.0], r"1 of 2 numbers are off, the worst at \[1\]"),
    ([-INF, INF], [-INF, INF], None),
    ([INF, 0.0], [-INF, 0.0], "the worst at .0.: inf, expected -inf"),
    ([-1e30, 0.0], [-INF, 0.0], "expected -inf"),
    ([1.0, INF], [1.0, 2.0], "inf, expected 2"),
    ([1.0, NAN], [1.0, 2.0], "nan, expected 2"),
    ([NAN, 2.0], [NAN, 2.0], "nan"),                            # the reference has no NaN to agree with
    ([1.0], [1.0, 2.0], r"shape \[1\], expected \[2\]"),
])
def test_mismatch_sees_what_differs(actual, expected, complaint):
    found = mismatch(torch.tensor(actual), torch.tensor(expected, dtype=torch.float64), torch.float32)
    assert (found is None) if complaint is None else re.search(complaint, found), found


def test_magnitude_scales_the_absolute_tolerance_only():
    near, zero = torch.tensor([1e-3]), torch.tensor([0.0])
    assert mismatch(near, zero, torch.float32) and mismatch(near, zero, torch.float32, magnitude=100.0) is None
