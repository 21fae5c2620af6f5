"""The index maps of the Volta kernels: every lane and every value, against the hardware's definition, and every bank.

Three descriptions are held together: the PTX ISA's (worked out here), relayout.py's, and what fragments.cuh computes when it runs.
"""

import re
from pathlib import Path

import pytest
import torch
from hetero_attn_volta import abi
from hetero_attn_volta import relayout as maps
from hetero_attn_volta.tiling import VARIANTS
from native import needs_compiler

from hetero_attn.jit import csrc_dir
from hetero_attn.testing.simt import Program

SOURCE = Path(__file__).parent / "cuda" / "relayout.cu"
LANES = range(32)
ORDERS = {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}          # a lane's sums of one row, as its weights lie in shared memory


def quarter(lane):
    """(first row, first column) of the quarter of a 16 x 16 tile that the lane's quad pair owns, and the lane's place among its eight."""
    quad = lane % 16 // 4
    return 8 * (quad & 1), 8 * (quad >> 1), lane % 4 + 4 * (lane // 16)


@pytest.mark.parametrize("lane", LANES)
def test_fragments_are_the_ptx_isas(lane):
    """mma.m8n8k4: row-major A and column-major B hold one row or column a lane; row-major B four columns of row lane % 4; sums as below."""
    row, column, place = quarter(lane)
    assert maps.a_row(lane) == row + place
    assert maps.b_key(lane) == column + place
    assert maps.b_feature(lane) == column + 4 * (lane // 16)
    for e in range(8):
        assert maps.sum_row(lane, e) == row + (lane & 1) + (e & 2) + 4 * (lane // 16)
        assert maps.sum_column(lane, e) == column + (e & 4) + (lane & 2) + (e & 1)


def test_the_four_quarters_make_a_tile():
    assert len({(maps.sum_row(lane, e), maps.sum_column(lane, e)) for lane in LANES for e in range(8)}) == 256


@pytest.mark.parametrize("keys", [32, 64])
def test_renumbering_is_a_permutation_that_both_sides_use(keys):
    assert sorted(map(maps.position_of, range(keys))) == list(range(keys))
    for lane in LANES:
        for tile in range(keys // 16):
            for order in ORDERS.values():
                for place, e in enumerate(order):
                    assert maps.position_of(16 * tile + maps.sum_column(lane, e)) == maps.weight_position(lane, tile) + place
        for step in range(keys // 4):
            assert maps.position_of(maps.key_at(lane, step)) == 4 * step + lane % 4


@pytest.mark.parametrize(("keys", "features"), [(32, 32), (64, 64), (32, 128)])
def test_weights_go_through_shared_memory_into_the_second_product(keys, features):
    """A whole warp in integers: sums stored as weights, read as operand A, times V read in the new order, is the plain product."""
    random = torch.Generator().manual_seed(keys + features)
    weights, values = torch.randint(-9, 9, (16, keys), generator=random), torch.randint(-9, 9, (keys, features), generator=random)
    shared = torch.full((16, keys), 1000)
    for lane in LANES:
        for tile in range(keys // 16):
            for v1, order in ORDERS.items():
                for place, e in enumerate(order):
                    row, at = maps.sum_row(lane, 2 * v1), maps.weight_position(lane, tile) + place
                    assert shared[row, at] == 1000               # nobody else stored there
                    shared[row, at] = weights[maps.sum_row(lane, e), 16 * tile + maps.sum_column(lane, e)]
    out = torch.zeros(16, features, dtype=torch.long)
    for step in range(keys // 4):
        for f in range(features // 16):
            A = {lane: shared[maps.a_row(lane), 4 * step : 4 * step + 4] for lane in LANES}
            B = {lane: values[maps.key_at(lane, step), 16 * f + maps.b_feature(lane) :][:4] for lane in LANES}
            for quad in range(4):                                # the hardware's step of one quad pair
                lanes = [4 * quad + i % 4 + 16 * (i // 4) for i in range(8)]
                a = torch.stack([A[lane] for lane in lanes])                                            # [8, 4]
                b = torch.stack([torch.cat([B[lanes[k]], B[lanes[k + 4]]]) for k in range(4)])          # [4, 8]
                row, column, _ = quarter(4 * quad)
                out[row : row + 8, 16 * f + column : 16 * f + column + 8] += a @ b
    assert torch.equal(out, weights @ values)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_bank_is_asked_twice(variant):
    """Every 8-byte access of the main loop takes its two passes and no more."""
    threads = variant.threads if variant.kernel == "forward" else 32
    accesses = maps.main_loop_accesses(variant.head_dim, variant.keys, threads, variant.parts)
    for what, each in accesses.items():
        assert each and {maps.wavefronts(addresses, 8) for addresses in each} == {2}, what


def test_other_layouts_do_conflict():
    """The controls: without padding everything does; padded by 4 and in the keys' own order, V does."""
    row = 2 * 64
    assert maps.wavefronts([maps.b_key(lane) * row for lane in LANES], 8) == 16
    assert maps.wavefronts([maps.a_row(lane) * row for lane in LANES], 8) == 16
    row = 2 * (64 + maps.PAD)
    assert maps.wavefronts([(lane & 3) * row + 2 * maps.b_feature(lane) for lane in LANES], 8) == 4
    assert maps.wavefronts([maps.key_at(lane, 0) * row + 2 * maps.b_feature(lane) for lane in LANES], 8) == 2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_staging_moves_every_piece_once(variant):
    threads, features = (variant.threads if variant.kernel == "forward" else 32), variant.head_dim // variant.parts
    pieces = [maps.staged_place(thread, i, features, threads)
              for i in range(variant.keys * features // 8 // threads) for thread in range(threads)]
    assert sorted(pieces) == [(row, feature) for row in range(variant.keys) for feature in range(0, features, 8)]


@needs_compiler
def test_the_kernels_compute_the_same_maps():
    found = torch.full((32, 128), -1, dtype=torch.int32)
    Program(SOURCE).launch("maps", (1,), (32,), [found])
    for lane in LANES:
        expected = [maps.a_row(lane), maps.b_key(lane), maps.b_feature(lane), maps.sum_row(lane, 0), maps.sum_row(lane, 2),
                    *(maps.sum_column(lane, e) for e in range(8)), *(maps.weight_position(lane, t) for t in range(4)),
                    *(maps.key_at(lane, step) for step in range(16))]
        assert found[lane, : len(expected)].tolist() == expected


@needs_compiler
def test_a_call_is_packed_as_call_h_lays_it_out():
    sizes = torch.zeros(4, dtype=torch.int32)
    Program(SOURCE).launch("layout", (1,), (1,), [sizes])
    pointers = 8 * sum(kind == "pointer" for _, kind, _ in abi.CALL)
    integers = pointers + 8 * sum(count for _, kind, count in abi.CALL if kind == "int64")
    assert sizes.tolist() == [abi.CALL_BYTES, pointers, integers, abi.CALL_BYTES - 4]
    text = re.sub(r"//[^\n]*", "", (csrc_dir() / "volta" / "call.h").read_text())
    body = re.search(r"struct Call \{(.*?)\};", text, re.DOTALL).group(1)
    names = [re.sub(r"\W", "", re.sub(r"\[\d+\]", "", name)) for line in body.split(";") if line.strip()
             for name in re.sub(r"^\s*(const )?(unsigned short|long long|float|int|void)", "", line).split(",")]
    assert names == [name for name, _, _ in abi.CALL]
    with pytest.raises(ValueError, match=r"call has fields \['colour'\]"):
        abi.pack({"colour": 1})
