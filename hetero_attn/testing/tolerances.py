"""How far a result may lie from the fp64 reference: the ONE table of the conformance suites, attention and collectives alike.

Inputs are rounded to the dtype first and the reference computes on the rounded numbers, so the table allows only for what a
kernel itself may lose: its accumulation order, its exp, the rounding of the probabilities, the rounding of the result.
A bound is |actual - expected| <= atol * magnitude + rtol * |expected|; magnitude is 1 unless a case says otherwise.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """rtol and atol of each quantity: `output`, `lse` (natural logarithm, kept in fp32 or fp64), `gradient`."""

    output: tuple[float, float]
    lse: tuple[float, float]
    gradient: tuple[float, float]


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # Nothing is fp64's better: only the order of the sums differs, 2^-53 each over a few thousand terms.
    torch.float64: Tolerance(output=(1e-12, 1e-12), lse=(1e-12, 1e-12), gradient=(1e-11, 1e-11)),
    # 2^-24 a term; a logit near 30 is good to 2e-6, which exp hands on as a relative error, and device exp adds two units more.
    torch.float32: Tolerance(output=(2e-5, 2e-5), lse=(1e-5, 2e-5), gradient=(1e-4, 1e-4)),
    # 2^-11 for the probabilities, 2^-11 for the result; logits and sums are in fp32, so the lse only bears a rounded scale * q.
    torch.float16: Tolerance(output=(2e-3, 2e-3), lse=(2e-3, 2e-3), gradient=(1e-2, 1e-2)),
    # 2^-8 spacing in the same two places, eight times fp16's; gradients round dS as well, before a sum over all rows.
    torch.bfloat16: Tolerance(output=(1.6e-2, 1e-2), lse=(1e-2, 1e-2), gradient=(4e-2, 4e-2)),
}


def mismatch(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, quantity: str = "output", *, magnitude: float = 1.0
) -> str | None:
    """Why `actual` is not `expected` (same shape, any devices), or None where it is within the table's bound for `dtype`.

    Infinities must agree exactly and NaN never does. `magnitude` scales atol: the size of the numbers that were averaged or summed.
    """
    if actual.shape != expected.shape:
        return f"{quantity} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    rtol, atol = getattr(TOLERANCES[dtype], quantity)
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    error = torch.where(got == want, 0.0, (got - want).abs())              # equal infinities would subtract to NaN
    bound = torch.where(want.isfinite(), atol * magnitude + rtol * want.abs(), 0.0)
    wrong = ~(error <= bound)                                              # NaN compares False, hence wrong
    if not wrong.any():
        return None
    worst = int(torch.where(wrong, error.nan_to_num(float("inf")) - bound, -1.0).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    return (
        f"{quantity}: {int(wrong.sum())} of {wrong.numel()} numbers are off, the worst at {index}: {got.flatten()[worst].item():.8g}, "
        f"expected {want.flatten()[worst].item():.8g} ± {bound.flatten()[worst].item():.2g} ({str(dtype).removeprefix('torch.')})"
    )


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, quantity: str = "output", *, magnitude: float = 1.0
) -> None:
    """Raise AssertionError with `mismatch`'s text where the two differ by more than the table allows."""
    complaint = mismatch(actual, expected, dtype, quantity, magnitude=magnitude)
    if complaint:
        raise AssertionError(complaint)
