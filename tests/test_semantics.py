"""Small truths about attention that do not come from the reference: they hold the reference itself.

`by_hand` is softmax attention in plain Python floats and loops, written from the design's text alone; literal cases carry
numbers worked out on paper; torch's own SDPA agrees where it means the same, and is shown to differ where it does not.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from hetero_attn import attention, attention_varlen

INF = float("inf")


def by_hand(q, k, v, *, scale=None, is_causal=False, window=(-1, -1), softcap=0.0, slopes=None, mask=None, sinks=None):
    """Nested lists q [B][Hq][Sq][D], k [B][Hkv][Skv][D], v [B][Hkv][Skv][Dv], slopes [B][Hq], mask [B][Hq][Sq][Skv] of bools or
    floats, sinks [Hq] -> out [B][Hq][Sq][Dv], lse [B][Hq][Sq]."""
    out, lse = [], []
    for b in range(len(q)):
        out.append([])
        lse.append([])
        for h in range(len(q[b])):
            kv = h // (len(q[b]) // len(k[b]))              # neighbours share: query heads 0, 1 read key head 0, and so on
            keys, values = k[b][kv], v[b][kv]
            out[b].append([])
            lse[b].append([])
            for i, row in enumerate(q[b][h]):
                stand = i + len(keys) - len(q[b][h])
                seen = {}
                for j, key in enumerate(keys):
                    s = sum(x * y for x, y in zip(row, key)) * (1 / math.sqrt(len(row)) if scale is None else scale)
                    if softcap:
                        s = softcap * math.tanh(s / softcap)
                    if slopes is not None:
                        s -= slopes[b][h] * abs(stand - j)
                    allowed = not (is_causal and j > stand)
                    allowed = allowed and not (window[0] >= 0 and j < stand - window[0]) and not (window[1] >= 0 and j > stand + window[1])
                    if mask is not None and isinstance(mask[b][h][i][j], bool):
                        allowed = allowed and mask[b][h][i][j]
                    elif mask is not None:
                        s += mask[b][h][i][j]
                    if allowed and s > -INF:
                        seen[j] = s
                logits = [*seen.values(), *([sinks[h]] if sinks is not None and sinks[h] > -INF else [])]
                top = max(logits, default=0.0)
                total = sum(math.exp(s - top) for s in logits)
                weights = {j: math.exp(s - top) / total for j, s in seen.items()}
                out[b][h].append([sum(w * values[j][c] for j, w in weights.items()) for c in range(len(v[b][kv][0]) if values else 0)])
                lse[b][h].append(top + math.log(total) if logits else -INF)
    return out, lse


def numbers(rng, *shape):
    return [numbers(rng, *shape[1:]) for _ in range(shape[0])] if shape else rng.gauss(0, 1)


def tensor(nested):
    return torch.tensor(nested, dtype=torch.float64)


def bools(rng, share, *shape):
    return [bools(rng, share, *shape[1:]) for _ in range(shape[0])] if shape else rng.random() < share


FEATURES = {
    "plain": {},
    "scale": {"scale": 0.37},
    "scale-0": {"scale": 0.0},
    "scale-negative": {"scale": -0.8, "is_causal": True},
    "causal": {"is_causal": True},
    "window-0-0": {"window": (0, 0)},
    "window-left": {"window": (1, -1)},
    "window-right": {"window": (-1, 1)},
    "window-both": {"window": (2, 1)},
    "window-causal": {"window": (1, 3), "is_causal": True},
    "softcap": {"softcap": 0.7},
    "softcap-scale": {"softcap": 1.3, "scale": 2.0},
    "alibi": {"slopes": True},
    "alibi-causal-softcap": {"slopes": True, "is_causal": True, "softcap": 0.5},
    "bool-mask": {"mask": "bool"},
    "bool-mask-causal-window": {"mask": "bool", "is_causal": True, "window": (2, -1)},
    "float-mask": {"mask": "float"},
    "float-mask-infinite": {"mask": "-inf"},
    "float-mask-softcap-alibi": {"mask": "-inf", "softcap": 0.9, "slopes": True},
    "sinks": {"sinks": True},
    "sinks-causal-softcap-scale": {"sinks": True, "is_causal": True, "softcap": 0.6, "scale": 1.7},
    "sinks-bool-mask": {"sinks": True, "mask": "bool"},
    "everything": {"sinks": True, "mask": "-inf", "slopes": True, "softcap": 1.1, "window": (3, 2), "is_causal": True, "scale": 0.9},
}


@pytest.mark.parametrize("lengths", [(1, 1), (4, 4), (2, 5), (5, 2), (3, 0), (1, 6)], ids=lambda lengths: f"{lengths[0]}x{lengths[1]}")
@pytest.mark.parametrize("feature", FEATURES)
def test_reference_is_what_loops_of_python_floats_compute(feature, lengths):
    Sq, Skv = lengths
    B, Hq, Hkv, D, Dv = 2, 4, 2, 3, 2
    rng = random.Random(f"{feature} {lengths}")
    options = dict(FEATURES[feature])
    q, k, v = numbers(rng, B, Hq, Sq, D), numbers(rng, B, Hkv, Skv, D), numbers(rng, B, Hkv, Skv, Dv)
    if "slopes" in options:                                     # exact in fp32, which is the slopes' dtype
        options["slopes"] = [[rng.randrange(1, 16) / 16 for _ in range(Hq)] for _ in range(B)]
    if "sinks" in options:
        options["sinks"] = [rng.gauss(0, 1), -INF, rng.gauss(0, 3), 2.0]
    if "mask" in options:
        kind = options["mask"]
        options["mask"] = bools(rng, 0.6, B, Hq, Sq, Skv) if kind == "bool" else numbers(rng, B, Hq, Sq, Skv)
        if kind == "-inf":
            options["mask"] = [[[[-INF if rng.random() < 0.5 else s for s in row] for row in h] for h in b] for b in options["mask"]]
    want, want_lse = by_hand(q, k, v, **options)

    shapes = {"q": (B, Hq, Sq, D), "k": (B, Hkv, Skv, D), "v": (B, Hkv, Skv, Dv), "mask": (B, Hq, Sq, Skv)}
    call = {name: tensor(x).reshape(shapes[name]) for name, x in (("q", q), ("k", k), ("v", v))}
    call |= {name: options[name] for name in ("scale", "is_causal", "softcap") if name in options}
    if "window" in options:
        call["window_size"] = options["window"]
    if "slopes" in options:
        call["alibi_slopes"] = torch.tensor(options["slopes"])
    if "sinks" in options:
        call["sinks"] = tensor(options["sinks"])
    if "mask" in options:
        call["attn_mask"] = torch.tensor(options["mask"]).reshape(shapes["mask"]) if kind == "bool" else \
            tensor(options["mask"]).reshape(shapes["mask"])
    out, lse = attention(**call, return_lse=True, backend="reference")
    if Skv:
        torch.testing.assert_close(out, tensor(want), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(out, torch.zeros(B, Hq, Sq, Dv, dtype=torch.float64))
    torch.testing.assert_close(lse, tensor(want_lse), rtol=1e-12, atol=1e-12)


def one_head(rows):
    """[S][D] -> [1, 1, S, D] fp64."""
    return tensor(rows)[None, None]


ZEROS = one_head([[0.0], [0.0], [0.0]])                         # three keys or queries of head_dim 1: all scores are 0
STEPS = one_head([[1.0], [2.0], [4.0]])                         # values that tell every average from every other


def column(out):
    return out.flatten().tolist()


@pytest.mark.parametrize(("q", "options", "want"), [
    (ZEROS, {}, [7 / 3, 7 / 3, 7 / 3]),
    (ZEROS, {"is_causal": True}, [1.0, 1.5, 7 / 3]),
    (ZEROS[:, :, :1], {"is_causal": True}, [7 / 3]),            # one query over three keys stands at the last: it sees all
    (ZEROS[:, :, :2], {"is_causal": True}, [1.5, 7 / 3]),       # top-left alignment would give [1.0, 1.5]
    (ZEROS, {"window_size": (1, 0)}, [1.0, 1.5, 3.0]),
    (ZEROS, {"window_size": (0, 0)}, [1.0, 2.0, 4.0]),
    (ZEROS, {"window_size": (0, 1)}, [1.5, 3.0, 4.0]),
    (ZEROS, {"window_size": (0, 1), "is_causal": True}, [1.0, 2.0, 4.0]),
    (ZEROS[:, :, :1], {"window_size": (1, 0)}, [3.0]),
    (torch.cat([ZEROS, ZEROS[:, :, :2]], dim=2), {"is_causal": True}, [0.0, 0.0, 1.0, 1.5, 7 / 3]),     # five queries, three keys
    (ZEROS, {"sinks": tensor([0.0])}, [7 / 4, 7 / 4, 7 / 4]),   # the sink takes a quarter and brings no value
    (ZEROS, {"sinks": tensor([math.log(3)]), "is_causal": True}, [1 / 4, 3 / 5, 7 / 6]),
    (ZEROS, {"sinks": tensor([0.0]), "scale": 9.0, "softcap": 1e-3}, [7 / 4, 7 / 4, 7 / 4]),
    (ZEROS, {"attn_mask": torch.tensor([True, False, True])[None]}, [2.5, 2.5, 2.5]),                   # True = attend
    (ZEROS, {"attn_mask": tensor([0.0, math.log(2), -INF])[None]}, [5 / 3, 5 / 3, 5 / 3]),              # weights 1/3, 2/3, 0
    (ZEROS, {"attn_mask": torch.tensor([[True], [False], [True]])}, [7 / 3, 0.0, 7 / 3]),
    (ZEROS, {"attn_mask": torch.full((3, 3), torch.finfo(torch.float32).min)}, [7 / 3, 7 / 3, 7 / 3]),  # a number: an average
    (ZEROS, {"attn_mask": torch.full((3, 3), torch.finfo(torch.float32).min), "is_causal": True}, [1.0, 1.5, 7 / 3]),
    (ZEROS, {"alibi_slopes": torch.tensor([math.log(2)])}, [12 / 7, 2.25, 3.0]),                        # weights halve a step away
])
def test_worked_out_on_paper(q, options, want):
    out = attention(q, ZEROS, STEPS, **options, backend="reference")
    assert column(out) == pytest.approx(want, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("options", "want"), [
    ({}, [math.log(3)] * 3),                                                                            # natural log
    ({"is_causal": True}, [0.0, math.log(2), math.log(3)]),
    ({"sinks": tensor([math.log(5)]), "is_causal": True}, [math.log(6), math.log(7), math.log(8)]),
    ({"attn_mask": torch.tensor([[True], [False], [True]])}, [math.log(3), -INF, math.log(3)]),
    ({"attn_mask": torch.tensor([[True], [False], [True]]), "sinks": tensor([2.5])},
     [math.log(3 + math.exp(2.5)), 2.5, math.log(3 + math.exp(2.5))]),                                  # an empty row: the sink's logit
    ({"attn_mask": torch.full((3, 3), 7.0)}, [7 + math.log(3)] * 3),
])
def test_lse_worked_out_on_paper(options, want):
    _, lse = attention(ZEROS, ZEROS, STEPS, **options, return_lse=True, backend="reference")
    assert lse.dtype == torch.float64 and column(lse) == pytest.approx(want, rel=1e-12)


def test_order_of_scale_softcap_alibi_mask():
    """One key at distance 1 and one at 0: every step of the order shows in the difference of two logits."""
    q, k = one_head([[3.0]]), one_head([[2.0], [-1.0]])
    capped = [0.8 * math.tanh(0.5 * 6 / 0.8) - 0.25 + 0.1, 0.8 * math.tanh(0.5 * -3 / 0.8) + 0.4]
    share = math.exp(capped[0]) / (math.exp(capped[0]) + math.exp(capped[1]))
    out, lse = attention(q, k, one_head([[1.0], [0.0]]), scale=0.5, softcap=0.8, alibi_slopes=torch.tensor([0.25]),
                         attn_mask=tensor([[0.1, 0.4]]), return_lse=True, backend="reference")
    assert out.item() == pytest.approx(share, rel=1e-12)
    assert lse.item() == pytest.approx(math.log(math.exp(capped[0]) + math.exp(capped[1])), rel=1e-12)


def test_query_heads_of_a_group_are_neighbours():
    """Heads 0, 1 read key head 0; heads 2, 3 read key head 1."""
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    out = attention(torch.zeros(1, 4, 1, 1), torch.zeros(1, 2, 1, 1), v, backend="reference")
    assert column(out) == [10.0, 10.0, 20.0, 20.0]


def test_bshd_is_bhsd_transposed():
    q, k, v = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3), torch.randn(2, 2, 7, 6)
    mask = torch.randn(2, 4, 5, 7)
    want, want_lse = attention(q, k, v, attn_mask=mask, is_causal=True, return_lse=True, backend="reference")
    out, lse = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=True, return_lse=True,
                         layout="bshd", backend="reference")
    assert torch.equal(out, want.transpose(1, 2)) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("page_size", [0, 1, 2, 5])
def test_varlen_is_one_dense_call_a_sequence(page_size):
    """Packed and paged alike: pages laid out backwards here, the table says where they are."""
    lengths, Hq, Hkv, D = [(2, 4), (3, 1), (0, 2), (1, 7), (2, 0)], 4, 2, 3
    q, k, v = (torch.randn(sum(pair[side] for pair in lengths), heads, D) for side, heads in ((0, Hq), (1, Hkv), (1, Hkv)))
    slopes, sinks = torch.rand(len(lengths), Hq), torch.randn(Hq)
    starts = [torch.tensor([0] + [pair[side] for pair in lengths]).cumsum(0).int() for side in (0, 1)]
    where = {"cu_seqlens_k": starts[1]}
    keys, values = k, v
    if page_size:
        blocks = [-(-kv // page_size) for _, kv in lengths]
        table = torch.full((len(lengths), max(blocks) + 1), -9, dtype=torch.int32)
        keys, values = torch.full((2, sum(blocks), page_size, Hkv, D), float("nan"))
        free = list(range(sum(blocks)))
        for b, (_, kv) in enumerate(lengths):
            for block in range(blocks[b]):
                table[b, block] = free.pop()
                first = starts[1][b] + block * page_size
                count = min(page_size, kv - block * page_size)
                keys[table[b, block], :count] = k[first : first + count]
                values[table[b, block], :count] = v[first : first + count]
        where = {"cu_seqlens_k": None, "block_table": table, "seqused_k": torch.tensor([kv for _, kv in lengths]).int()}
    out, lse = attention_varlen(q, keys, values, starts[0], max_seqlen_q=3, max_seqlen_k=7, is_causal=True, window_size=(4, -1),
                                alibi_slopes=slopes, sinks=sinks, return_lse=True, backend="reference", **where)
    assert out.shape == q.shape and lse.shape == (Hq, q.shape[0])
    for b in range(len(lengths)):
        rows, cols = slice(*starts[0][b : b + 2].tolist()), slice(*starts[1][b : b + 2].tolist())
        want, want_lse = attention(*(x.transpose(0, 1)[None] for x in (q[rows], k[cols], v[cols])), is_causal=True, window_size=(4, -1),
                                   alibi_slopes=slopes[b], sinks=sinks, return_lse=True, backend="reference")
        torch.testing.assert_close(out[rows], want[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, rows], want_lse[0])


@pytest.mark.parametrize("feature", ["plain", "scale", "causal", "gqa", "bool-mask", "float-mask"])
def test_torch_sdpa_agrees_where_it_means_the_same(feature):
    torch.manual_seed(0)
    kv_heads = 2 if feature == "gqa" else 4
    q, k, v = (torch.randn(2, heads, 6, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    mask = {"bool-mask": torch.rand(2, 1, 6, 6) < 0.7, "float-mask": torch.randn(2, 4, 6, 6, dtype=torch.float64)}.get(feature)
    if feature == "bool-mask":
        mask[..., 0] = True
    scale = 0.3 if feature == "scale" else None
    want = F.scaled_dot_product_attention(q, k, v, mask, is_causal=feature == "causal", scale=scale, enable_gqa=feature == "gqa")
    out = attention(q, k, v, attn_mask=mask, is_causal=feature == "causal", scale=scale, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_torch_is_causal_is_top_left_and_ours_is_bottom_right():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (3, 7, 7))
    out = attention(q, k, v, is_causal=True, backend="reference")
    bottom_right = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bottom_right), rtol=1e-12, atol=1e-12)
    assert (out - F.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() > 0.1


@pytest.mark.parametrize("lengths", [(3, 4), (4, 2)], ids=["3x4", "4x2"])
def test_gradients_are_those_of_finite_differences(lengths):
    torch.manual_seed(0)
    Sq, Skv = lengths
    q, k, v, mask = (torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
                     for shape in ((2, Sq, 3), (1, Skv, 3), (1, Skv, 2), (2, Sq, Skv)))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, mask, sinks):
        return attention(q, k, v, attn_mask=mask, sinks=sinks, is_causal=True, softcap=1.5, window_size=(2, -1),
                         alibi_slopes=torch.tensor([0.25, 0.5]), backend="reference")

    assert torch.autograd.gradcheck(call, (q, k, v, mask, sinks))


def test_lse_has_no_gradient():
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    out, lse = attention(q, q, q, return_lse=True, backend="reference")
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize(("dtype", "lse_dtype"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                                  (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_result_has_q_dtype_and_lse_has_fp32_or_fp64(dtype, lse_dtype):
    q, k, v = torch.randn(2, 4, 3, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype), torch.randn(2, 2, 5, 6).to(dtype)
    out, lse = attention(q, k, v, return_lse=True, backend="reference")
    assert (out.shape, out.dtype) == ((2, 4, 3, 6), dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 3), lse_dtype)
