"""What the low-bit codecs mean, in plain torch: the bytes that native kernels must write and the values that they must read from them.

group32: groups of 32 values in a row share a scale, taken from the group itself. A scale is bf16: its eight bits are enough, since q is
taken with the scale as rounded, and its exponent reaches as far as any value's, where fp16 would overflow in silence.
features: every feature of a sender has a scale and a mean that all ranks know, a row may have a factor, and outliers travel as bf16.
Sums are the caller's; what a value is after the wire does not depend on who unpacks it, nor by which code.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.codec.features import FeatureTable

GROUP = 32
LARGEST = {4: 7, 8: 127}                             # bits -> the largest q of a dynamic scale
LOWEST, HIGHEST = -8, 7                              # of a static scale, which a value may exceed
SMALLEST_SCALE = 2.0**-126                           # below it a reciprocal overflows, and some machines flush: such groups are zeros
BF16_LARGEST = torch.finfo(torch.bfloat16).max
STEPS_MOST = 1e38                                    # a value that is more scales off its mean than this: its row factor stays finite


def nibbles_size(count: int) -> int:
    """Bytes of `count` INT4 values."""
    return count // GROUP * (GROUP // 2) + (count % GROUP + 1) // 2


def groups_size(count: int, bits: int) -> int:
    """Bytes of `count` values in groups: a bf16 scale a group, then the q of all."""
    return 2 * -(-count // GROUP) + (count if bits == 8 else nibbles_size(count))


def features_size(first: int, count: int, table: FeatureTable) -> int:
    """Bytes of `count` values from `first` on: the outliers' bf16, the rows' bf16 factors, then the q of the rest."""
    outliers = table.outliers_in(first, count)
    return 2 * outliers + 2 * table.rows_in(first, count) + nibbles_size(count - outliers)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """q int8 [n] in -8..7 -> uint8 [nibbles_size(n)].

    Byte j of a group holds value j in its low half and value j + 16 in its high half, so that vectors need no shuffle; in the last
    group, of n values, byte j holds j and j + (n + 1) // 2.
    """
    whole = q.numel() // GROUP * GROUP
    blocks = [q[:whole].view(-1, 2, GROUP // 2)]                                               # [groups, halves, 16]
    if whole < q.numel():
        tail = q[whole:]
        blocks.append(torch.cat([tail, tail.new_zeros(tail.numel() % 2)]).view(1, 2, -1))
    return torch.cat([((block[:, 0] & 15) | (block[:, 1] << 4)).flatten() for block in blocks]).view(torch.uint8)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """What pack_nibbles made of q int8 [count] -> q."""
    def halves(block: torch.Tensor) -> torch.Tensor:
        block = block.to(torch.int16)
        return torch.stack([((half & 15) ^ 8) - 8 for half in (block, block >> 4)], dim=-2).to(torch.int8).flatten()

    whole = count // GROUP * (GROUP // 2)
    tail = packed[whole:]
    return torch.cat([halves(packed[:whole].view(-1, GROUP // 2)), halves(tail.view(1, tail.numel()))])[:count]


class TorchKernels:
    """The codecs' kernels as backend.Backend.codec_kernels() describes them, for every CPU tensor and without a compiler."""

    def pack_groups(self, values: torch.Tensor, bits: int, body: torch.Tensor) -> bool:
        """values [n] of fp32, bf16 or fp16 -> body uint8 [groups_size(n, bits)]; False, and no such bytes, where one is not finite."""
        x, count = values.float(), values.numel()
        if not bool(x.isfinite().all()):
            return False
        groups = torch.cat([x, x.new_zeros(-count % GROUP)]).view(-1, GROUP)                   # [G, 32]
        scale = (groups.abs().amax(1) / x.new_tensor(LARGEST[bits])).to(torch.bfloat16)        # [G]
        scale[scale < SMALLEST_SCALE] = 0
        divisor = torch.where(scale > 0, scale.float(), torch.inf)[:, None]
        q = (groups / divisor).round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8).flatten()[:count]
        edge = 2 * scale.numel()
        body[:edge] = scale.view(torch.uint8)
        body[edge:] = pack_nibbles(q) if bits == 4 else q.view(torch.uint8)
        return True

    def unpack_groups(self, body: torch.Tensor, bits: int, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        count = out.numel()
        edge = 2 * -(-count // GROUP)
        scale = body[:edge].clone().view(torch.bfloat16).float().repeat_interleave(GROUP)[:count]
        q = unpack_nibbles(body[edge:], count) if bits == 4 else body[edge:].view(torch.int8)
        _put(out, q.float() * scale, accumulate)

    def pack_features(self, values: torch.Tensor, first: int, table: FeatureTable, body: torch.Tensor) -> int:
        """values [n], from `first` of the flattened tensor on, -> body uint8 [features_size]; the number of values that saturated.

        -1, and no such bytes, where a value is not finite.
        """
        x = values.float()
        if not bool(x.isfinite().all()):
            return -1
        feature, outlier = table.features_of(first, x.numel())
        wide = x[outlier]
        kept = wide.clamp(-BF16_LARGEST, BF16_LARGEST).to(torch.bfloat16)                      # what rounds to Inf is not to become it
        steps = (x - table.mean[feature]) / table.scale[feature]
        factors, row = x.new_empty(table.rows_in(first, x.numel()), dtype=torch.bfloat16), table.rows_of(first, x.numel())
        if factors.numel():
            largest = x.new_zeros(factors.numel()).scatter_reduce(0, row, steps.abs(), "amax").clamp(max=STEPS_MOST)
            factors = (largest / x.new_tensor(HIGHEST)).to(torch.bfloat16)
            factors[factors < SMALLEST_SCALE] = 0
            steps = steps / torch.where(factors > 0, factors.float(), torch.inf)[row]
        rounded = steps[~outlier].round()
        q = rounded.clamp(LOWEST, HIGHEST)
        edge = 2 * (kept.numel() + factors.numel())
        body[:edge] = torch.cat([kept, factors]).view(torch.uint8)
        body[edge:] = pack_nibbles(q.to(torch.int8))
        return int((rounded != q).sum() + wide.to(torch.bfloat16).isinf().sum())

    def unpack_features(self, body: torch.Tensor, first: int, table: FeatureTable, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        feature, outlier = table.features_of(first, out.numel())
        wide, rows = int(outlier.sum()), table.rows_in(first, out.numel())
        edge = 2 * (wide + rows)
        known = body[:edge].clone().view(torch.bfloat16).float()                               # outliers, then factors
        step = table.step[feature] * known[wide:][table.rows_of(first, out.numel())] if rows else table.step[feature]
        found = torch.empty_like(out)
        found[outlier] = known[:wide]
        rest = ~outlier
        found[rest] = unpack_nibbles(body[edge:], out.numel() - wide).float() * step[rest] + table.mean[feature[rest]]
        _put(out, found, accumulate)


def _put(out: torch.Tensor, found: torch.Tensor, accumulate: bool) -> None:
    if accumulate:
        out += found
    else:
        out.copy_(found)
