"""Bad arguments of attention() and attention_varlen(): each gets a ValueError or TypeError that names the argument, what it was and
what was expected. They are a property of the call, not of a backend, so every one is tried with the backend chosen
automatically and by name.
"""

import re

import pytest
import torch

from hetero_attn import UnknownBackendError, attention, attention_varlen

B, Hq, Hkv, Sq, Skv, D = 2, 4, 2, 3, 5, 8


def dense(**changes):
    """A good dense call's arguments, with changes."""
    return {"q": torch.ones(B, Hq, Sq, D), "k": torch.ones(B, Hkv, Skv, D), "v": torch.ones(B, Hkv, Skv, D), **changes}


def cumulative(*starts, dtype=torch.int32):
    return torch.tensor(starts, dtype=dtype)


def packed(**changes):
    """A good varlen call's arguments: lengths 1 and 2 over keys of 2 and 3."""
    good = {"q": torch.ones(3, Hq, D), "k": torch.ones(5, Hkv, D), "v": torch.ones(5, Hkv, D), "cu_seqlens_q": cumulative(0, 1, 3),
            "cu_seqlens_k": cumulative(0, 2, 5), "max_seqlen_q": 2, "max_seqlen_k": 3}
    return good | changes


def paged(**changes):
    """A good paged call's arguments: pages of 4, lengths 2 and 7."""
    pages = torch.ones(6, 4, Hkv, D)
    good = packed(k=pages, v=pages.clone(), cu_seqlens_k=None, max_seqlen_k=7)
    return good | {"block_table": torch.tensor([[3, -1], [0, 5]], dtype=torch.int32), "seqused_k": cumulative(2, 7)} | changes


META = torch.device("meta")
# (what is wrong, the call's arguments, the error, words its text must hold; a tuple is a shape, found as "1, 2, 3")
BAD_DENSE = [
    ("q-of-rank-3", dense(q=torch.ones(Hq, Sq, D)), ValueError, ["q", (Hq, Sq, D), "B, H, S, D"]),
    ("k-of-rank-5", dense(k=torch.ones(1, B, Hkv, Skv, D)), ValueError, ["k", (1, B, Hkv, Skv, D), "B, H, S, D"]),
    ("v-of-rank-2", dense(v=torch.ones(Skv, D), layout="bshd"), ValueError, ["v", (Skv, D), "B, S, H, D"]),
    ("batch-of-k", dense(k=torch.ones(3, Hkv, Skv, D)), ValueError, ["batch", "k", "3", "2"]),
    ("batch-of-v", dense(v=torch.ones(1, Hkv, Skv, D)), ValueError, ["batch", "v", "1", "2"]),
    ("heads-of-v", dense(v=torch.ones(B, 1, Skv, D)), ValueError, ["v", (B, 1, Skv, D)]),
    ("length-of-v", dense(v=torch.ones(B, Hkv, 4, D)), ValueError, ["v", (B, Hkv, 4, D)]),
    ("head-dim-of-k", dense(k=torch.ones(B, Hkv, Skv, 16)), ValueError, ["k", "16", "8"]),
    ("head-dim-0", dense(q=torch.ones(B, Hq, Sq, 0), k=torch.ones(B, Hkv, Skv, 0)), ValueError, ["q", (B, Hq, Sq, 0), "at least 1"]),
    ("grouping", dense(k=torch.ones(B, 3, Skv, D), v=torch.ones(B, 3, Skv, D)), ValueError, ["q", "4", "k", "3", "multiple"]),
    ("more-kv-heads", dense(k=torch.ones(B, 8, Skv, D), v=torch.ones(B, 8, Skv, D)), ValueError, ["4", "8", "multiple"]),
    ("no-kv-heads", dense(k=torch.ones(B, 0, Skv, D), v=torch.ones(B, 0, Skv, D)), ValueError, ["0", "multiple"]),
    ("bshd-read-as-bhsd", dense(layout="bshd"), ValueError, []),
    ("dtype-of-k", dense(k=torch.ones(B, Hkv, Skv, D).half()), TypeError, ["k", "float16", "float32"]),
    ("dtype-of-v", dense(v=torch.ones(B, Hkv, Skv, D).bfloat16()), TypeError, ["v", "bfloat16", "float32"]),
    ("integer-q", dense(q=torch.ones(B, Hq, Sq, D).int()), TypeError, ["q", "int32", "float32"]),
    ("complex-q", dense(q=torch.ones(B, Hq, Sq, D).cfloat()), TypeError, ["q", "complex64", "float32"]),
    ("device-of-v", dense(v=torch.ones(B, Hkv, Skv, D, device=META)), ValueError, ["v", "meta", "cpu"]),
    ("q-is-a-list", dense(q=[1.0]), TypeError, ["q", "list", "Tensor"]),
    ("k-is-none", dense(k=None), TypeError, ["k", "NoneType", "Tensor"]),
    ("softcap-negative", dense(softcap=-30.0), ValueError, ["softcap", "-30", "0"]),
    ("softcap-nan", dense(softcap=float("nan")), ValueError, ["softcap", "nan"]),
    ("window-minus-2", dense(window_size=(-2, 0)), ValueError, ["window_size", "-2, 0", "-1"]),
    ("window-right-minus-3", dense(window_size=(0, -3)), ValueError, ["window_size", "0, -3", "-1"]),
    ("window-is-a-number", dense(window_size=4), ValueError, ["window_size", "4", "left, right"]),
    ("window-of-three", dense(window_size=(1, 2, 3)), ValueError, ["window_size", "1, 2, 3"]),
    ("layout-unknown", dense(layout="sbhd"), ValueError, ["layout", "sbhd", "bhsd", "bshd"]),
    ("scale-nan", dense(scale=float("nan")), ValueError, ["scale", "nan"]),
    ("scale-infinite", dense(scale=float("inf")), ValueError, ["scale", "inf"]),
    ("mask-shape", dense(attn_mask=torch.ones(B, Hq, Sq, 6).bool()), ValueError, ["attn_mask", (B, Hq, Sq, 6), (B, Hq, Sq, Skv)]),
    ("mask-batch", dense(attn_mask=torch.ones(3, 1, Sq, Skv)), ValueError, ["attn_mask", (3, 1, Sq, Skv), (B, Hq, Sq, Skv)]),
    ("mask-kv-heads", dense(attn_mask=torch.ones(B, Hkv, Sq, Skv)), ValueError, ["attn_mask", (B, Hkv, Sq, Skv), (B, Hq, Sq, Skv)]),
    ("mask-rank-5", dense(attn_mask=torch.ones(1, B, Hq, Sq, Skv)), ValueError, ["attn_mask", (1, B, Hq, Sq, Skv)]),
    ("mask-as-transformers-2d", dense(attn_mask=torch.ones(B, Skv)), ValueError, ["attn_mask", (B, Skv), (B, Hq, Sq, Skv)]),
    ("mask-int64", dense(attn_mask=torch.ones(Sq, Skv).long()), TypeError, ["attn_mask", "int64", "bool"]),
    ("mask-uint8", dense(attn_mask=torch.ones(Sq, Skv).byte()), TypeError, ["attn_mask", "uint8", "bool"]),
    ("mask-device", dense(attn_mask=torch.ones(Sq, Skv, device=META)), ValueError, ["attn_mask", "meta", "cpu"]),
    ("mask-is-a-list", dense(attn_mask=[[True]]), TypeError, ["attn_mask", "list"]),
    ("slopes-of-kv-heads", dense(alibi_slopes=torch.ones(Hkv)), ValueError, ["alibi_slopes", "2", "4"]),
    ("slopes-of-other-batch", dense(alibi_slopes=torch.ones(3, Hq)), ValueError, ["alibi_slopes", (3, Hq), (B, Hq)]),
    ("slopes-scalar", dense(alibi_slopes=torch.tensor(0.5)), ValueError, ["alibi_slopes", "Hq"]),
    ("slopes-half", dense(alibi_slopes=torch.ones(Hq).half()), TypeError, ["alibi_slopes", "float16", "float32"]),
    ("slopes-double", dense(alibi_slopes=torch.ones(Hq).double()), TypeError, ["alibi_slopes", "float64", "float32"]),
    ("slopes-device", dense(alibi_slopes=torch.ones(Hq, device=META)), ValueError, ["alibi_slopes", "meta", "cpu"]),
    ("sinks-of-kv-heads", dense(sinks=torch.ones(Hkv)), ValueError, ["sinks", "2", "4"]),
    ("sinks-rank-2", dense(sinks=torch.ones(B, Hq)), ValueError, ["sinks", (B, Hq), "4"]),
    ("sinks-integer", dense(sinks=torch.ones(Hq).int()), TypeError, ["sinks", "int32", "float"]),
    ("sinks-device", dense(sinks=torch.ones(Hq, device=META)), ValueError, ["sinks", "meta", "cpu"]),
    ("sinks-a-number", dense(sinks=1.0), TypeError, ["sinks", "float", "Tensor"]),
]
BAD_VARLEN = [
    ("q-dense", packed(q=torch.ones(1, 3, Hq, D)), ValueError, ["q", (1, 3, Hq, D), "Tq, Hq, D"]),
    ("k-dense", packed(k=torch.ones(1, 5, Hkv, D)), ValueError, ["k", (1, 5, Hkv, D), "Tk, Hkv, D"]),
    ("v-shorter", packed(v=torch.ones(4, Hkv, D)), ValueError, ["v", (4, Hkv, D)]),
    ("grouping", packed(k=torch.ones(5, 3, D), v=torch.ones(5, 3, D)), ValueError, ["4", "3", "multiple"]),
    ("head-dim", packed(k=torch.ones(5, Hkv, 4)), ValueError, ["k", "4", "8"]),
    ("dtype-of-v", packed(v=torch.ones(5, Hkv, D).half()), TypeError, ["v", "float16", "float32"]),
    ("cu-q-int64", packed(cu_seqlens_q=cumulative(0, 1, 3, dtype=torch.int64)), TypeError, ["cu_seqlens_q", "int64", "int32"]),
    ("cu-k-int64", packed(cu_seqlens_k=cumulative(0, 2, 5, dtype=torch.int64)), TypeError, ["cu_seqlens_k", "int64", "int32"]),
    ("cu-q-float", packed(cu_seqlens_q=cumulative(0, 1, 3, dtype=torch.float32)), TypeError, ["cu_seqlens_q", "float32", "int32"]),
    ("cu-q-a-list", packed(cu_seqlens_q=[0, 1, 3]), TypeError, ["cu_seqlens_q", "list", "int32"]),
    ("cu-q-falls", packed(cu_seqlens_q=cumulative(0, 2, 1, 3), cu_seqlens_k=cumulative(0, 1, 2, 5)), ValueError,
     ["cu_seqlens_q", (0, 2, 1, 3), "never fall"]),
    ("cu-k-falls", packed(cu_seqlens_q=cumulative(0, 1, 2, 3), cu_seqlens_k=cumulative(0, 4, 2, 5), max_seqlen_k=5), ValueError,
     ["cu_seqlens_k", (0, 4, 2, 5), "never fall"]),
    ("cu-q-starts-at-1", packed(cu_seqlens_q=cumulative(1, 2, 3)), ValueError, ["cu_seqlens_q", "1", "0"]),
    ("cu-q-ends-early", packed(cu_seqlens_q=cumulative(0, 1, 2)), ValueError, ["cu_seqlens_q", "2", "3"]),
    ("cu-k-ends-late", packed(cu_seqlens_k=cumulative(0, 2, 6), max_seqlen_k=9), ValueError, ["cu_seqlens_k", "6", "5"]),
    ("cu-k-starts-at-2", packed(cu_seqlens_k=cumulative(2, 3, 5)), ValueError, ["cu_seqlens_k", "2", "0"]),
    ("cu-of-other-batch", packed(cu_seqlens_k=cumulative(0, 1, 2, 5)), ValueError, ["cu_seqlens_k", "4", "3"]),
    ("cu-q-rank-2", packed(cu_seqlens_q=cumulative(0, 1, 3)[None]), ValueError, ["cu_seqlens_q", (1, 3), "B+1"]),
    ("cu-q-empty", packed(cu_seqlens_q=cumulative()), ValueError, ["cu_seqlens_q", "0", "B+1"]),
    ("cu-q-device", packed(cu_seqlens_q=torch.zeros(3, dtype=torch.int32, device=META)), ValueError, ["cu_seqlens_q", "meta", "cpu"]),
    ("cu-k-missing", packed(cu_seqlens_k=None), ValueError, ["cu_seqlens_k", "None", "B+1"]),
    ("max-q-small", packed(max_seqlen_q=1), ValueError, ["max_seqlen_q", "1", "2"]),
    ("max-k-small", packed(max_seqlen_k=2), ValueError, ["max_seqlen_k", "2", "3"]),
    ("max-q-negative", packed(max_seqlen_q=-1), ValueError, ["max_seqlen_q", "-1", "0"]),
    ("max-k-float", packed(max_seqlen_k=3.5), ValueError, ["max_seqlen_k", "3.5", "integer"]),
    ("seqused-without-table", packed(seqused_k=cumulative(2, 3)), ValueError, ["seqused_k", "block_table"]),
    ("table-without-seqused", paged(seqused_k=None), ValueError, ["seqused_k", "None", "block_table"]),
    ("table-with-cu-k", paged(cu_seqlens_k=cumulative(0, 2, 9)), ValueError, ["cu_seqlens_k", "block_table", "None"]),
    ("table-with-packed-k", paged(k=torch.ones(5, Hkv, D)), ValueError, ["k", (5, Hkv, D), "block_size"]),
    ("pages-of-v", paged(v=torch.ones(6, 3, Hkv, D)), ValueError, ["v", (6, 3, Hkv, D), "block_size"]),
    ("pages-of-0", paged(k=torch.ones(6, 0, Hkv, D), v=torch.ones(6, 0, Hkv, D)), ValueError, ["k", (6, 0, Hkv, D), "at least 1"]),
    ("seqused-beyond-table", paged(seqused_k=cumulative(2, 9), max_seqlen_k=9), ValueError, ["seqused_k", "9", "8", "block_table"]),
    ("seqused-negative", paged(seqused_k=cumulative(-1, 7)), ValueError, ["seqused_k", "-1", "0"]),
    ("seqused-int64", paged(seqused_k=cumulative(2, 7, dtype=torch.int64)), TypeError, ["seqused_k", "int64", "int32"]),
    ("seqused-of-other-batch", paged(seqused_k=cumulative(2, 7, 1)), ValueError, ["seqused_k", "3", "2"]),
    ("max-k-below-seqused", paged(max_seqlen_k=6), ValueError, ["max_seqlen_k", "6", "7"]),
    ("table-int64", paged(block_table=torch.zeros(2, 2, dtype=torch.int64)), TypeError, ["block_table", "int64", "int32"]),
    ("table-rank-1", paged(block_table=torch.zeros(2, dtype=torch.int32)), ValueError, ["block_table", "2", "max_blocks"]),
    ("table-of-other-batch", paged(block_table=torch.zeros(3, 2, dtype=torch.int32)), ValueError, ["block_table", (3, 2)]),
    ("table-names-no-page", paged(block_table=torch.tensor([[3, 0], [0, 6]], dtype=torch.int32)), ValueError, ["block_table", "5"]),
    ("table-names-page-minus-1", paged(block_table=torch.tensor([[-1, 0], [0, 5]], dtype=torch.int32)), ValueError, ["block_table", "5"]),
    ("slopes-of-other-batch", packed(alibi_slopes=torch.ones(3, Hq)), ValueError, ["alibi_slopes", (3, Hq), (B, Hq)]),
    ("sinks-of-kv-heads", packed(sinks=torch.ones(Hkv)), ValueError, ["sinks", "2", "4"]),
    ("softcap-negative", packed(softcap=-1.0), ValueError, ["softcap", "-1", "0"]),
    ("window-minus-2", packed(window_size=(-2, 0)), ValueError, ["window_size", "-2, 0", "-1"]),
]
CHOICES = pytest.mark.parametrize("backend", [None, "reference", "sdpa"])


def assert_says(error: Exception, words: list) -> None:
    for word in words:
        wanted = ", ".join(map(str, word)) if isinstance(word, tuple) else word
        pattern = re.escape(wanted) if isinstance(word, tuple) or not wanted.isalnum() else rf"\b{re.escape(wanted)}"
        assert re.search(pattern, str(error)), f"{wanted!r} is not in: {error}"


@CHOICES
@pytest.mark.parametrize(("arguments", "error", "words"), [row[1:] for row in BAD_DENSE], ids=[row[0] for row in BAD_DENSE])
def test_attention_names_what_is_wrong(arguments, error, words, backend):
    with pytest.raises(error) as raised:
        attention(**arguments, backend=backend)
    assert type(raised.value) is error, f"{type(raised.value).__name__}: {raised.value}"
    assert_says(raised.value, words)


@CHOICES
@pytest.mark.parametrize(("arguments", "error", "words"), [row[1:] for row in BAD_VARLEN], ids=[row[0] for row in BAD_VARLEN])
def test_attention_varlen_names_what_is_wrong(arguments, error, words, backend):
    with pytest.raises(error) as raised:
        attention_varlen(**arguments, backend=backend)
    assert type(raised.value) is error, f"{type(raised.value).__name__}: {raised.value}"
    assert_says(raised.value, words)


@CHOICES
@pytest.mark.parametrize(("function", "arguments"), [(attention, dense), (attention_varlen, packed), (attention_varlen, paged)])
def test_the_calls_that_the_bad_ones_are_changed_from_are_good(function, arguments, backend):
    out = function(**arguments(), backend=backend)
    assert out.shape == arguments()["q"].shape and torch.equal(out, torch.ones_like(out))


def test_a_good_call_does_not_hide_a_later_bad_one():
    """Decisions are remembered by shape; lengths are values, and are looked at every time."""
    attention_varlen(**packed())
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        attention_varlen(**packed(cu_seqlens_q=cumulative(0, 1, 2)))
    attention_varlen(**paged())
    with pytest.raises(ValueError, match="seqused_k"):
        attention_varlen(**paged(seqused_k=cumulative(2, 9), max_seqlen_k=7))


def test_there_is_no_dropout():
    with pytest.raises(TypeError, match="dropout_p"):
        attention(**dense(), dropout_p=0.1)
    with pytest.raises(TypeError, match="dropout_p"):
        attention_varlen(**packed(), dropout_p=0.1)


@pytest.mark.parametrize("option", ["attn_mask", "layout"])
def test_varlen_has_neither_mask_nor_layout(option):
    with pytest.raises(TypeError, match=option):
        attention_varlen(**packed(), **{option: None})


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        attention(*dense().values(), None)


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(UnknownBackendError, match=r"'sdpaa'.*reference.*sdpa|'sdpaa'.*sdpa.*reference"):
        attention(**dense(), backend="sdpaa")
