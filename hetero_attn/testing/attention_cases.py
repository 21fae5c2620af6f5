"""The grid: which cases every attention backend runs.

The reduced grid (default) takes one feature at a time, then the pairs that have a history of going wrong together: causality
with unequal lengths, masks with rows that see nothing, softcap with a mask, sinks with empty rows, pages with short sequences.
HETERO_ATTN_FULL=1 adds the whole product of features, shapes and dtypes. Names start with the area, so that `-k window` selects.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from hetero_attn.testing.cases import AttentionCase

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WINDOWS = ((0, 0), (7, -1), (-1, 7), (3, 5), (0, -1), (-1, 0), (100, 100), (2, 0))
HEAD_DIMS = ((32, 32), (64, 64), (80, 80), (128, 128), (256, 256), (72, 72), (96, 96), (40, 40), (1, 1), (13, 13),
             (64, 32), (64, 128), (192, 128), (32, 1), (40, 72))
HEADS = ((1, 1), (4, 4), (8, 2), (4, 1), (6, 3), (7, 1), (40, 8))
LENGTHS = ((1, 1), (2, 3), (3, 2), (1, 64), (1, 127), (63, 63), (64, 65), (65, 64), (127, 128), (128, 129), (129, 127), (17, 131),
           (131, 17), (0, 5), (5, 0), (0, 0), (1, 0), (128, 1))
ALL_KINDS = ((5, 5), (1, 37), (0, 7), (33, 20), (7, 0), (0, 0), (16, 16))       # every way a sequence can be empty or unequal
PREFILL = ((13, 13), (64, 64), (3, 3))
DECODE = ((1, 5), (1, 64), (1, 33), (1, 1))
SEQUENCES = {"mixed": ALL_KINDS, "prefill": PREFILL, "decode": DECODE}

VARLEN_FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": (6, -1)},
    "softcap": {"is_causal": True, "softcap": 3.0},
    "alibi": {"is_causal": True, "alibi": 1},
    "alibi-per-sequence": {"is_causal": True, "alibi": 2},
    "sinks": {"is_causal": True, "sinks": torch.float32},
    "everything": {"is_causal": True, "window_size": (9, 4), "softcap": 5.0, "alibi": 2, "sinks": torch.bfloat16, "scale": 0.2},
}
DENSE_FEATURES = VARLEN_FEATURES | {
    "two-sided": {"window_size": (3, 5)},
    "bool-mask": {"mask": "random"},
    "empty-rows": {"mask": "empty rows"},
    "padding": {"mask": "padding", "mask_axes": "b11k", "is_causal": True},
    "bias": {"mask": "bias"},
    "bias-inf": {"mask": "bias -inf", "is_causal": True},
    "bias-min": {"mask": "bias min", "mask_axes": "b1qk", "is_causal": True},
    "softcap-mask": {"softcap": 2.0, "mask": "bias", "sinks": torch.float32},
    "bshd": {"layout": "bshd", "is_causal": True},
    "masked-everything": {"is_causal": True, "window_size": (20, 4), "softcap": 5.0, "alibi": 2, "mask": "bias -inf",
                          "sinks": torch.float16, "scale": 0.2, "layout": "bshd"},
}


def full_grid() -> bool:
    """Whether HETERO_ATTN_FULL asks for the whole product."""
    return os.environ.get("HETERO_ATTN_FULL", "") not in ("", "0")


def plain_cases() -> list[AttentionCase]:
    """One small call without features, in each dtype: what a backend must run somewhere to be tested at all."""
    dtypes = DTYPES | {"fp64": torch.float64}
    return [AttentionCase(f"plain-{short}", dtype, q_heads=4, kv_heads=4) for short, dtype in dtypes.items()]


def attention_cases(full: bool | None = None) -> list[AttentionCase]:
    """The grid in a stable order, each name once; `full` overrides HETERO_ATTN_FULL."""
    cases = plain_cases()
    for short, dtype in DTYPES.items():
        cases += [replace(case, name=f"{case.name}-{short}", dtype=dtype) for case in _reduced()]
    for case in _reduced():         # fp64: the devices that have it are few, so one case of each feature is enough
        if case.name in ("causal-5x49", "mask-empty rows-bhqk", "sinks-large-bfloat16-49x5", "gradients-qkv-causal", "paged-16-causal"):
            cases.append(replace(case, name=f"{case.name}-fp64", dtype=torch.float64))
    if full if full is not None else full_grid():
        cases += _product()
    return cases


def _reduced() -> Iterator[AttentionCase]:
    """The reduced grid in fp32."""
    for area in (_shapes, _positions, _scores, _masks, _memory, _numbers, _poison, _varlen, _paged, _gradients):
        yield from area()


def _shapes() -> Iterator[AttentionCase]:
    for head_dim, v_head_dim in HEAD_DIMS:
        yield AttentionCase(f"head_dim-{head_dim}-{v_head_dim}", q_len=19, kv_len=23, head_dim=head_dim, v_head_dim=v_head_dim)
    for q_heads, kv_heads in HEADS:
        yield AttentionCase(f"heads-{q_heads}-{kv_heads}", q_len=17, kv_len=29, q_heads=q_heads, kv_heads=kv_heads, is_causal=True)
    for (q_len, kv_len), is_causal in product(LENGTHS, (False, True)):
        name = f"{'causal' if is_causal else 'lengths'}-{q_len}x{kv_len}"
        yield AttentionCase(name, batch=1, q_len=q_len, kv_len=kv_len, q_heads=2, kv_heads=1, is_causal=is_causal)
    yield AttentionCase("lengths-1x1-heads-4-4", q_len=1, kv_len=1, kv_heads=4)         # the result equals v: it must not be v
    yield AttentionCase("batch-0", batch=0)
    yield AttentionCase("batch-0-causal-bshd", batch=0, is_causal=True, layout="bshd", lse="always")
    yield AttentionCase("batch-5", batch=5, q_len=3, kv_len=7)
    yield AttentionCase("long-kv", batch=1, q_len=2, kv_len=1031, q_heads=2, kv_heads=1, is_causal=True)
    for lse, is_causal in product(("always", "never"), (False, True)):
        yield AttentionCase(f"lse-{lse}{'-causal' * is_causal}", q_len=11, kv_len=13, lse=lse, is_causal=is_causal)


def _positions() -> Iterator[AttentionCase]:
    for q_len, kv_len in ((37, 37), (5, 49), (49, 5)):
        yield AttentionCase(f"causal-{q_len}x{kv_len}", q_len=q_len, kv_len=kv_len, is_causal=True)
        for (left, right), is_causal in product(WINDOWS, (False, True)):
            name = f"window-{left},{right}{'-causal' * is_causal}-{q_len}x{kv_len}"
            yield AttentionCase(name, q_len=q_len, kv_len=kv_len, window_size=(left, right), is_causal=is_causal, lse="always")
        for alibi, is_causal in product((1, 2), (False, True)):
            name = f"alibi-{'per-head' if alibi == 1 else 'per-batch'}{'-causal' * is_causal}-{q_len}x{kv_len}"
            yield AttentionCase(name, q_len=q_len, kv_len=kv_len, alibi=alibi, is_causal=is_causal)
    yield AttentionCase("window-across-blocks", batch=1, q_len=130, kv_len=130, window_size=(64, 0), q_heads=2, kv_heads=1)
    yield AttentionCase("window-decode", q_len=1, kv_len=131, window_size=(16, -1), is_causal=True)
    yield AttentionCase("alibi-heads-6-3", q_heads=6, kv_heads=3, alibi=1, is_causal=True)
    yield AttentionCase("alibi-window-softcap", alibi=2, window_size=(8, 3), softcap=2.0)


def _scores() -> Iterator[AttentionCase]:
    for softcap in (0.0, 1.5, 50.0):
        yield AttentionCase(f"softcap-{softcap:g}", softcap=softcap)
    yield AttentionCase("softcap-causal", softcap=1.5, is_causal=True, q_len=7)
    yield AttentionCase("softcap-bias", softcap=1.5, mask="bias")
    yield AttentionCase("softcap-bool-mask", softcap=1.5, mask="empty rows")
    yield AttentionCase("softcap-alibi", softcap=1.5, alibi=1)
    yield AttentionCase("softcap-sinks", softcap=1.5, sinks=torch.float32)
    yield AttentionCase("softcap-sinks-large", softcap=1.5, sinks=torch.bfloat16, sink_values="large", lse="always")
    yield AttentionCase("softcap-negative-scale", softcap=1.5, scale=-0.7)
    for scale in (0.0, -0.3, 1.0, 0.05):
        yield AttentionCase(f"scale-{scale:g}", scale=scale, q_len=9)
        for q_len in (9, 37):           # a kernel that scales after masking makes NaN of 0 * -inf, and +inf of -1 * -inf
            yield AttentionCase(f"scale-{scale:g}-causal-{q_len}", scale=scale, q_len=q_len, is_causal=True)
        yield AttentionCase(f"scale-{scale:g}-varlen", scale=scale, sequences=PREFILL, is_causal=True)
        yield AttentionCase(f"scale-{scale:g}-mask", scale=scale, q_len=9, mask="bias -inf")
        yield AttentionCase(f"scale-{scale:g}-sinks-alibi-causal", scale=scale, q_len=9, sinks=torch.float32, alibi=1, is_causal=True)
    for dtype, (q_len, kv_len) in product((torch.float32, torch.float16, torch.bfloat16, torch.float64), ((37, 37), (49, 5))):
        for values in ("normal", "-inf", "large"):
            name = f"sinks-{values}-{str(dtype)[6:]}-{q_len}x{kv_len}"
            yield AttentionCase(name, q_len=q_len, kv_len=kv_len, sinks=dtype, sink_values=values, is_causal=q_len > kv_len, lse="always")
    yield AttentionCase("sinks-window", sinks=torch.float32, window_size=(4, 0))
    yield AttentionCase("sinks-no-keys", sinks=torch.float32, kv_len=0, lse="always")
    yield AttentionCase("sinks-decode", sinks=torch.bfloat16, q_len=1, is_causal=True, scale=0.4)
    yield AttentionCase("everything", **DENSE_FEATURES["masked-everything"])
    yield AttentionCase("everything-49x5", q_len=49, kv_len=5, lse="always", **DENSE_FEATURES["masked-everything"])


def _masks() -> Iterator[AttentionCase]:
    for mask, axes in product(("random", "empty rows"), ("bhqk", "11qk", "b11k", "1h1k", "b1q1", "qk", "1111")):
        if mask == "random" or "q" in axes or "b" in axes:
            yield AttentionCase(f"mask-{mask}-{axes}", mask=mask, mask_axes=axes)
    yield AttentionCase("mask-nothing", mask="nothing", lse="always")
    yield AttentionCase("mask-nothing-sinks", mask="nothing", sinks=torch.float32, lse="always")
    yield AttentionCase("mask-empty rows-sinks", mask="empty rows", sinks=torch.float32, lse="always")
    for is_causal, q_len in product((False, True), (37, 1, 11)):
        yield AttentionCase(f"mask-padding{'-causal' * is_causal}-{q_len}", q_len=q_len, mask="padding", mask_axes="b11k",
                            is_causal=is_causal, batch=3)
    yield AttentionCase("mask-random-causal-5x49", mask="random", is_causal=True, q_len=5, kv_len=49)
    yield AttentionCase("mask-random-causal-49x5", mask="random", is_causal=True, q_len=49, kv_len=5, lse="always")
    yield AttentionCase("mask-random-window", mask="random", window_size=(4, 6), lse="always")
    yield AttentionCase("mask-random-alibi", mask="random", alibi=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for mask in ("bias", "bias -inf"):
            yield AttentionCase(f"mask-{mask}-{str(dtype)[6:]}", mask=mask, mask_dtype=dtype, lse="always")
    for axes in ("11qk", "b11k", "1h1k", "b1q1", "qk", "1hqk"):
        yield AttentionCase(f"mask-bias-{axes}", mask="bias", mask_axes=axes)
        yield AttentionCase(f"mask-bias -inf-{axes}", mask="bias -inf", mask_axes=axes)
    yield AttentionCase("mask-bias -inf-sinks", mask="bias -inf", sinks=torch.float32, lse="always")
    yield AttentionCase("mask-bias -inf-causal-49x5", mask="bias -inf", is_causal=True, q_len=49, kv_len=5, lse="always")
    yield AttentionCase("mask-bias-window-alibi", mask="bias", window_size=(9, -1), alibi=1)
    # A row full of finfo.min is an average over the keys that causality and window leave. fp16's -65504 still leaves fp32 a
    # grain of 2^-8 for the scores, which no kernel can help: scale 0 takes the scores out.
    for dtype, is_causal in product((torch.float32, torch.bfloat16), (False, True)):
        yield AttentionCase(f"mask-min{'-causal' * is_causal}-{str(dtype)[6:]}", mask="bias min", mask_dtype=dtype, is_causal=is_causal)
    yield AttentionCase("mask-min-float16", mask="bias min", mask_dtype=torch.float16, scale=0.0)
    yield AttentionCase("mask-min-b1qk-window-causal", mask="bias min", mask_axes="b1qk", window_size=(5, -1), is_causal=True)
    yield AttentionCase("mask-min-b11k", mask="bias min", mask_axes="b11k", mask_dtype=torch.bfloat16, is_causal=True)
    yield AttentionCase("mask-min-sinks", mask="bias min", sinks=torch.float32)


def _memory() -> Iterator[AttentionCase]:
    yield AttentionCase("layout-bshd", layout="bshd", q_len=9)
    yield AttentionCase("layout-bshd-mask", layout="bshd", q_len=9, mask="random", alibi=2, lse="always")
    yield AttentionCase("layout-bshd-causal-decode", layout="bshd", q_len=1, is_causal=True)
    for memory, layout in product(("transposed", "sliced", "interleaved", "unaligned", "expanded"), ("bhsd", "bshd")):
        yield AttentionCase(f"memory-{memory}-{layout}", memory=memory, layout=layout, q_len=23, is_causal=True)
        yield AttentionCase(f"memory-{memory}-{layout}-operands", memory=memory, layout=layout, q_len=23, alibi=2, mask="bias",
                            sinks=torch.float32)
        yield AttentionCase(f"memory-{memory}-{layout}-decode", memory=memory, layout=layout, q_len=1, mask="random", mask_axes="b11k")
    for q_len, layout in product((23, 1), ("bhsd", "bshd")):
        yield AttentionCase(f"memory-mixed-{layout}-{q_len}x23", memory="mixed", layout=layout, q_len=q_len, kv_len=23, kv_heads=4)
    yield AttentionCase("varlen-memory-mixed", memory="mixed", sequences=PREFILL, kv_heads=4, is_causal=True)
    yield AttentionCase("paged-memory-mixed", memory="mixed", sequences=ALL_KINDS, page_size=16, kv_heads=4, is_causal=True)
    for memory in ("sliced", "interleaved", "unaligned", "transposed"):
        yield AttentionCase(f"memory-{memory}-head_dim-40", memory=memory, q_len=23, head_dim=40, v_head_dim=72)


def _numbers() -> Iterator[AttentionCase]:
    for is_causal in (False, True):
        tail = "-causal" * is_causal
        yield AttentionCase(f"numbers-logits-of-1e4{tail}", contents="integers", scale=1.0, is_causal=is_causal, lse="always")
        yield AttentionCase(f"numbers-identical-keys{tail}", contents="identical keys", is_causal=is_causal)
        yield AttentionCase(f"numbers-one-hot{tail}", contents="one-hot", scale=1.0, is_causal=is_causal)
        yield AttentionCase(f"numbers-large-values{tail}", contents="large values", is_causal=is_causal)
    yield AttentionCase("numbers-logits-of-1e4-bias", contents="integers", scale=1.0, mask="bias -inf")
    yield AttentionCase("numbers-logits-of-1e4-sinks", contents="integers", scale=1.0, sinks=torch.float32, sink_values="large")


def _poison() -> Iterator[AttentionCase]:
    for poison in ("nan", "inf"):
        for q_len, kv_len in ((37, 37), (5, 131), (70, 70)):
            name = f"poison-{poison}-{q_len}x{kv_len}"
            yield AttentionCase(f"{name}-causal", poison=poison, q_len=q_len, kv_len=kv_len, is_causal=True)
            yield AttentionCase(f"{name}-window", poison=poison, q_len=q_len, kv_len=kv_len, window_size=(4, 2), lse="always")
        yield AttentionCase(f"poison-{poison}-beyond-window", poison=poison, q_len=3, kv_len=65, window_size=(2, 0))
        yield AttentionCase(f"poison-{poison}-49x5", poison=poison, q_len=49, kv_len=5, is_causal=True, lse="always")
        yield AttentionCase(f"poison-{poison}-everything", poison=poison, layout="bshd", **VARLEN_FEATURES["everything"])
        yield AttentionCase(f"poison-{poison}-varlen", poison=poison, sequences=PREFILL)
        yield AttentionCase(f"poison-{poison}-varlen-causal", poison=poison, sequences=ALL_KINDS, is_causal=True, lse="always")
        yield AttentionCase(f"poison-{poison}-varlen-everything", poison=poison, sequences=PREFILL, **VARLEN_FEATURES["everything"])
        for page_size, sequences in product((1, 3, 16, 128), (ALL_KINDS, DECODE)):
            tail = "decode" if sequences is DECODE else "mixed"
            yield AttentionCase(f"poison-{poison}-paged-{page_size}-{tail}", poison=poison, sequences=sequences, page_size=page_size)
        yield AttentionCase(f"poison-{poison}-paged-causal", poison=poison, sequences=ALL_KINDS, page_size=16, is_causal=True, slack=9)


def _varlen() -> Iterator[AttentionCase]:
    for (label, sequences), (feature, options) in product(SEQUENCES.items(), VARLEN_FEATURES.items()):
        lse = "always" if label == "mixed" else "offered"
        yield AttentionCase(f"varlen-{label}-{feature}", sequences=sequences, lse=lse, **options)
    yield AttentionCase("varlen-slack", sequences=ALL_KINDS, slack=50, is_causal=True)
    yield AttentionCase("varlen-all-empty", sequences=((0, 0), (0, 0)), lse="always")
    yield AttentionCase("varlen-no-queries", sequences=((0, 5), (0, 9)), is_causal=True)
    yield AttentionCase("varlen-no-keys", sequences=((5, 0), (3, 0)), lse="always", sinks=torch.float32)
    yield AttentionCase("varlen-no-sequences", sequences=(), lse="always")
    yield AttentionCase("varlen-one", sequences=((65, 65),), is_causal=True)
    for q_heads, kv_heads in HEADS:
        yield AttentionCase(f"varlen-heads-{q_heads}-{kv_heads}", sequences=DECODE, q_heads=q_heads, kv_heads=kv_heads)
    for head_dim, v_head_dim in ((32, 32), (128, 128), (80, 80), (192, 128), (13, 13), (256, 256)):
        yield AttentionCase(f"varlen-head_dim-{head_dim}-{v_head_dim}", sequences=((5, 9), (7, 7)), is_causal=True, head_dim=head_dim,
                            v_head_dim=v_head_dim)
    for memory in ("transposed", "sliced", "interleaved", "unaligned", "expanded"):
        yield AttentionCase(f"varlen-memory-{memory}", sequences=PREFILL, memory=memory, is_causal=True, alibi=2)


def _paged() -> Iterator[AttentionCase]:
    for page_size, (label, sequences) in product((1, 3, 16, 128), SEQUENCES.items()):
        yield AttentionCase(f"paged-{page_size}-{label}", sequences=sequences, page_size=page_size, is_causal=label != "mixed")
    for feature, options in VARLEN_FEATURES.items():
        yield AttentionCase(f"paged-16-{feature}", sequences=ALL_KINDS, page_size=16, lse="always", **options)
        yield AttentionCase(f"paged-16-{feature}-decode", sequences=DECODE, page_size=16, slack=2, **options)
    for page_size in (32, 64):                          # what profiles ask for
        yield AttentionCase(f"paged-{page_size}", sequences=((1, 130), (3, 64), (7, 7)), page_size=page_size, is_causal=True)
    yield AttentionCase("paged-slack", sequences=ALL_KINDS, page_size=3, slack=50, is_causal=True)
    yield AttentionCase("paged-exactly-full", sequences=((1, 16), (1, 32), (16, 48)), page_size=16, is_causal=True)
    yield AttentionCase("paged-all-empty", sequences=((1, 0), (2, 0), (0, 0)), page_size=16, lse="always")
    yield AttentionCase("paged-no-sequences", sequences=(), page_size=16)
    yield AttentionCase("paged-heads-8-1", sequences=DECODE, page_size=16, q_heads=8, kv_heads=1)
    yield AttentionCase("paged-head_dim-192-128", sequences=DECODE, page_size=16, head_dim=192, v_head_dim=128)
    for memory in ("transposed", "sliced", "interleaved", "unaligned", "expanded"):
        yield AttentionCase(f"paged-memory-{memory}", sequences=ALL_KINDS, page_size=16, memory=memory, is_causal=True, alibi=1)


def _gradients() -> Iterator[AttentionCase]:
    qkv = ("q", "k", "v")
    small = {"q_len": 13, "kv_len": 17}
    for feature, options in DENSE_FEATURES.items():
        yield AttentionCase(f"gradients-qkv-{feature}", gradients=qkv, **small, **options)
    yield AttentionCase("gradients-q-only", gradients=("q",), **small, is_causal=True)
    yield AttentionCase("gradients-v-only", gradients=("v",), **small, is_causal=True)
    yield AttentionCase("gradients-empty-rows", gradients=qkv, q_len=17, kv_len=13, is_causal=True)
    yield AttentionCase("gradients-no-keys", gradients=qkv, q_len=5, kv_len=0)
    for memory in ("transposed", "sliced", "interleaved", "unaligned", "expanded"):
        yield AttentionCase(f"gradients-memory-{memory}", gradients=qkv, memory=memory, **small, is_causal=True)
    for mask in ("random", "bias"):
        yield AttentionCase(f"gradients-memory-transposed-{mask}", gradients=qkv, mask=mask, memory="transposed", **small)
    yield AttentionCase("gradients-bias", gradients=("attn_mask",), mask="bias", **small)
    yield AttentionCase("gradients-bias-broadcast", gradients=(*qkv, "attn_mask"), mask="bias -inf", mask_axes="1hqk", **small)
    yield AttentionCase("gradients-mask-min", gradients=qkv, mask="bias min", lse="never", **small)
    yield AttentionCase("gradients-sinks", gradients=("sinks",), sinks=torch.float32, **small)
    yield AttentionCase("gradients-sinks-empty-rows", gradients=(*qkv, "sinks"), sinks=torch.float32, q_len=17, kv_len=13, is_causal=True)
    yield AttentionCase("gradients-alibi", gradients=("alibi_slopes",), alibi=1, **small, is_causal=True)
    yield AttentionCase("gradients-alibi-per-batch", gradients=(*qkv, "alibi_slopes"), alibi=2, **small)
    for feature in ("plain", "causal", "everything"):
        yield AttentionCase(f"gradients-varlen-{feature}", gradients=qkv, sequences=ALL_KINDS, **VARLEN_FEATURES[feature])
    yield AttentionCase("gradients-paged", gradients=qkv, sequences=ALL_KINDS, page_size=3, is_causal=True)


def _product() -> Iterator[AttentionCase]:
    """The whole product: every feature with every shape, in every dtype."""
    lengths = ((1, 65), (37, 37), (5, 131), (49, 5), (64, 128), (129, 127))
    dims = ((32, 32), (64, 64), (72, 72), (128, 128), (256, 256), (192, 128))
    heads = ((4, 4), (8, 2), (4, 1))
    for (short, dtype), (D, Dv), (q_heads, kv_heads) in product(DTYPES.items(), dims, heads):
        shape = {"dtype": dtype, "head_dim": D, "v_head_dim": Dv, "q_heads": q_heads, "kv_heads": kv_heads}
        for (feature, options), (q_len, kv_len) in product(DENSE_FEATURES.items(), lengths):
            name = f"product-{feature}-{q_len}x{kv_len}-{D}-{Dv}-{q_heads}-{kv_heads}-{short}"
            yield AttentionCase(name, q_len=q_len, kv_len=kv_len, **shape, **options)
        for (feature, options), (label, sequences), page_size in product(VARLEN_FEATURES.items(), SEQUENCES.items(), (0, 1, 16)):
            name = f"product-varlen-{feature}-{label}-{page_size}-{D}-{Dv}-{q_heads}-{kv_heads}-{short}"
            yield AttentionCase(name, sequences=sequences, page_size=page_size, **shape, **options)
    memories = ("sliced", "interleaved", "unaligned")
    for (short, dtype), memory, (feature, options) in product(DTYPES.items(), memories, DENSE_FEATURES.items()):
        yield AttentionCase(f"product-{feature}-{memory}-{short}", dtype=dtype, memory=memory, q_len=5, kv_len=131, **options)
