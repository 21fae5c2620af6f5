"""RMSNorm, alone and behind a residual add, one program a row: the orders of rounding are hetero_attn/norm.py's.

A row is read once: it stays in registers between the sum of its squares and its scaling, so both kernels are bound by memory.
"""

import triton
import triton.language as tl


@triton.jit
def _scaled(x, W, columns, inside, width, eps, weight_offset, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """x fp32 [BLOCK], one row -> its norm times the weight, in `dtype`."""
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:                                                      # Gemma: weight in fp32, then round
        return (normed * (weight + weight_offset)).to(dtype)
    return (weight * normed.to(dtype).to(tl.float32)).to(dtype)     # Llama: round, then weight


@triton.jit
def rms_norm_kernel(X, W, OUT, x_row, width, eps, weight_offset, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """X [rows, width] with rows x_row apart, W [width], OUT [rows, width] dense. BLOCK >= width."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    normed = _scaled(x, W, columns, inside, width, eps, weight_offset, OFFSET, OUT.dtype.element_ty)
    tl.store(OUT + row * width + columns, normed, mask=inside)


@triton.jit
def add_rms_norm_kernel(
    X, RESIDUAL, W, POST, OUT, x_row, residual_row, width, eps, weight_offset,
    OFFSET: tl.constexpr, HAS_POST: tl.constexpr, BLOCK: tl.constexpr,
):
    """residual += x (or its norm by POST), written back; OUT = rms_norm(residual). Shapes as in rms_norm_kernel."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row * x_row + columns, mask=inside, other=0.0)
    if HAS_POST:
        x = _scaled(x.to(tl.float32), POST, columns, inside, width, eps, weight_offset, OFFSET, X.dtype.element_ty)
    residual = tl.load(RESIDUAL + row * residual_row + columns, mask=inside, other=0.0)
    total = (residual.to(tl.float32) + x.to(tl.float32)).to(RESIDUAL.dtype.element_ty)
    tl.store(RESIDUAL + row * residual_row + columns, total, mask=inside)
    normed = _scaled(total.to(tl.float32), W, columns, inside, width, eps, weight_offset, OFFSET, OUT.dtype.element_ty)
    tl.store(OUT + row * width + columns, normed, mask=inside)
