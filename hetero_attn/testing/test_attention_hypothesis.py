"""Property-based cases: hypothesis draws an AttentionCase from the whole feature space, so that pairs nobody listed are tried.

The property is the suite's own check against the fp64 reference, so a shrunk failure prints a case that can be added to the
grid. Draws are reproducible by default; HETERO_ATTN_FULL=1 draws more of them and anew each time.
"""

import pytest
import torch

from hetero_attn.backend import UnsupportedError
from hetero_attn.testing import attention
from hetero_attn.testing.attention_cases import full_grid
from hetero_attn.testing.cases import BIASES, MASKS, AttentionCase
from hetero_attn.testing.memory import MEMORIES

hypothesis = pytest.importorskip("hypothesis", reason="the property-based suite needs hypothesis")
st = hypothesis.strategies

TARGETS = [(backend, device) for backend in attention.selected_backends() for device in attention.devices_of(backend)]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALF_WINDOW = st.one_of(st.just(-1), st.integers(0, 60))
SETTINGS = hypothesis.settings(
    max_examples=3000 if full_grid() else 120, deadline=None, derandomize=not full_grid(), database=None, print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


@st.composite
def options(draw) -> dict:
    """The fields that dense and varlen cases share."""
    kv_heads = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((64, 32, 16, 128, 80, 8, 1, 33)))
    sinks = draw(st.sampled_from((None, *FLOATS)))
    return {
        "dtype": draw(st.sampled_from(FLOATS)),
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.sampled_from((1, 2, 4))),
        "head_dim": head_dim,
        "v_head_dim": draw(st.sampled_from((head_dim, head_dim, 64, 24))),
        "is_causal": draw(st.booleans()),
        "window_size": draw(st.one_of(st.just((-1, -1)), st.tuples(HALF_WINDOW, HALF_WINDOW))),
        "softcap": draw(st.sampled_from((None, None, 0.0, 1.0, 30.0))),
        "scale": draw(st.sampled_from((None, None, 0.0, -0.2, 0.3))),
        "alibi": draw(st.sampled_from((0, 0, 1, 2))),
        "sinks": sinks,
        "sink_values": draw(st.sampled_from(("normal", "-inf", "large"))) if sinks else "normal",
        "memory": draw(st.sampled_from(MEMORIES)),
        "lse": draw(st.sampled_from(("offered", "never"))),
    }


@st.composite
def dense_cases(draw) -> AttentionCase:
    lengths = st.one_of(st.integers(0, 6), st.integers(7, 80))
    mask = draw(st.sampled_from(("",) * 4 + MASKS + BIASES))
    shared = draw(options())
    mask_dtype = draw(st.sampled_from(FLOATS))
    if mask == "bias min" and mask_dtype == torch.float16:
        shared |= {"scale": 0.0, "alibi": 0}            # fp32 holds scores beside -65504 to 2^-8 only: take them out
    gradients = draw(st.sampled_from(((), (), ("q", "k", "v"), ("k",))))
    return AttentionCase(
        "dense", batch=draw(st.integers(0, 3)), q_len=draw(lengths), kv_len=draw(lengths), layout=draw(st.sampled_from(("bhsd", "bshd"))),
        mask=mask, mask_dtype=mask_dtype, mask_axes=draw(st.sampled_from(("bhqk", "11qk", "b11k", "1hqk", "b1q1", "1h1k"))),
        gradients=gradients, poison=_poison(draw, shared, not mask and not gradients), **shared,
    )


@st.composite
def varlen_cases(draw) -> AttentionCase:
    length = st.one_of(st.integers(0, 3), st.integers(4, 70))
    sequences = tuple(draw(st.lists(st.tuples(length, length), max_size=5)))
    page_size = draw(st.sampled_from((0, 0, 1, 4, 7, 16, 64)))
    shared = draw(options())
    gradients = () if page_size else draw(st.sampled_from(((), (), ("q", "k", "v"))))
    return AttentionCase(
        "varlen", sequences=sequences, page_size=page_size, slack=draw(st.sampled_from((0, 0, 40))), gradients=gradients,
        poison=_poison(draw, shared, not gradients, page_size or len(sequences) > 1), **shared,
    )


def _poison(draw, shared: dict, allowed: bool, further_keys_excluded: bool = False) -> str:
    excluded = shared["is_causal"] or shared["window_size"] != (-1, -1) or further_keys_excluded
    return draw(st.sampled_from(("", "nan", "inf"))) if allowed and excluded else ""


def check(case: AttentionCase, backend: str, device: str) -> None:
    try:
        attention.check(case, backend, device)
    except UnsupportedError:
        hypothesis.event(f"{backend} objects")      # a narrow backend objects to most draws: no reason to reject them all


@pytest.mark.parametrize(("backend", "device"), TARGETS, ids=[f"{backend}-{device}" for backend, device in TARGETS])
@SETTINGS
@hypothesis.given(case=dense_cases())
def test_dense(case, backend, device):
    check(case, backend, device)


@pytest.mark.parametrize(("backend", "device"), TARGETS, ids=[f"{backend}-{device}" for backend, device in TARGETS])
@SETTINGS
@hypothesis.given(case=varlen_cases())
def test_varlen(case, backend, device):
    check(case, backend, device)
