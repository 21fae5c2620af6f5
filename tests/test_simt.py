"""The executor of CUDA sources on the CPU: it runs what is right, and every checker and counter has a fault or a known number to prove it.

The kernels are in tests/cuda/executor.cu. Counts of bank conflicts and sectors are compared with the hardware's rules, worked out here
anew: 32 banks of 4 bytes, phases of 32, 16 and 8 lanes for 4, 8 and 16 bytes, sectors of 32 bytes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import needs_compiler

from hetero_attn.compiler import find_compiler
from hetero_attn.testing.attention_cases import full_grid
from hetero_attn.testing.simt import ORDERS, Program, SimtError, run_ranks

SOURCE = Path(__file__).parent / "cuda" / "executor.cu"
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def plain():
    return Program(SOURCE)


@pytest.fixture(scope="module")
def counted():
    return Program(SOURCE, counted=True)


def reverse(program, *, synchronise=1, stride=1, order=0, threads=128, blocks=3, shared_bytes=None, **options):
    x = torch.randn(blocks, threads)
    out = torch.full_like(x, float("nan"))
    counts = program.launch("reverse", (blocks,), (threads,), [out, x, stride, synchronise], order=order,
                            shared_bytes=4 * (stride * (threads - 1) + 1) if shared_bytes is None else shared_bytes, **options)
    return torch.equal(out, x.flip(1)), counts


@pytest.mark.parametrize("order", [*ORDERS, 4, 17])
def test_a_right_kernel_is_right_in_every_order(plain, counted, order):
    for program in (plain, counted):
        for workers in (1, 2, 5):
            right, counts = reverse(program, order=order, workers=workers, blocks=5, threads=96)
            assert right and counts.instructions["barrier"] == 5


def test_a_missing_barrier_shows(plain, counted):
    """By wrong numbers (NaN, for nobody wrote them) in most orders when plain; as a race, whatever the order, when counted."""
    assert not all(reverse(plain, synchronise=0, order=order)[0] for order in ORDERS)
    for order in ORDERS:
        with pytest.raises(SimtError, match=r"block \(\d, 0, 0\): thread \d+: .* races with thread \d+: no __syncthreads"):
            reverse(counted, synchronise=0, order=order)


def test_a_warp_barrier_orders_its_warp_alone(counted):
    assert reverse(counted, synchronise=2, threads=32)[0]
    with pytest.raises(SimtError, match="no __syncwarp between them"):
        reverse(counted, synchronise=0, threads=32)
    with pytest.raises(SimtError, match="no __syncthreads between them"):
        reverse(counted, synchronise=2, threads=64)


def test_shared_memory_is_poisoned_anew_for_each_block(plain):
    x, out = torch.zeros(4, 64), torch.zeros(4, 64)
    plain.launch("reverse", (4,), (64,), [out, x, 1, 0], shared_bytes=256, order=0)
    assert out.isnan()[:, :32].all()                   # ascending: the first half reads what the second has not written yet


def test_use_beyond_the_dynamic_shared_memory(plain, counted):
    with pytest.raises(SimtError, match=r"byte 508 of the dynamic shared memory was written, of which the launch asked for 508"):
        reverse(plain, shared_bytes=508)
    with pytest.raises(SimtError, match=r"thread 127: byte 511 of the dynamic shared memory, of which the launch asked for 508"):
        reverse(counted, shared_bytes=508)
    with pytest.raises(SimtError, match="asks for 300000 bytes of dynamic shared memory, the executor has 262144"):
        reverse(plain, shared_bytes=300000)


def sums(program, fault=0, threads=64, order=0):
    x = torch.randn(threads)
    out = torch.zeros(threads)
    counts = program.launch("warp_sums", (1,), (threads,), [out, x, fault], order=order)
    return (out - (x.sum() + 1000 * (x > 0).sum())).abs().max().item(), counts


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations_and_reducing_barriers(plain, order):
    error, counts = sums(plain, order=order)
    assert error < 1e-2
    assert counts.instructions["shuffle"] == 10 and counts.instructions["vote"] == 5 and counts.instructions["barrier"] == 4


@pytest.mark.parametrize(("fault", "words"), [
    (1, r"__shfl_xor_sync at executor\.cu:\d+.* waits for thread \d+, which has exited"),
    (2, r"threads diverge at a warp operation: thread \d+ \(__shfl_xor_sync at executor\.cu:\d+\).*thread \d+ \(__shfl_xor_sync"),
    (3, r"threads diverge at a warp operation: .* mask \d+"),
    (4, r"threads diverge at a barrier|deadlock"),
    (5, r"lane 7 is not in its own mask"),
    (7, r"__syncthreads_count at executor\.cu:\d+.* waits for thread 0, which has exited"),
])
@pytest.mark.parametrize("order", ORDERS)
def test_divergence_is_named(plain, fault, words, order):
    with pytest.raises(SimtError, match=words):
        sums(plain, fault, order=order)


def test_a_race_that_no_order_of_lanes_shows(counted):
    """Without the first barrier the later ones still order every read after every write: no race, and the checker must not claim one."""
    assert sums(counted, 6)[0] < 1e-2


def test_threads_without_a_whole_warp(plain):
    with pytest.raises(SimtError, match="the mask names lane 16, the warp has 16"):
        sums(plain, threads=48)


def touched(counted, width, stride, offset=0, in_shared=False, threads=32):
    size = offset + threads * stride + 16
    data = torch.zeros(size + 128, dtype=torch.uint8)
    start = -data.data_ptr() % 128                     # counts depend on where a buffer begins
    out = torch.zeros(size + 128, dtype=torch.uint8)
    out_start = -out.data_ptr() % 128
    counts = counted.launch("touch", (1,), (threads,), [out[out_start:], data[start:], width, stride, offset, int(in_shared)])
    return counts.total("shared" if in_shared else "global", "store", width)


def wavefronts(width, stride, threads=32):
    """(wavefronts, ideal) of a request whose lane l touches bytes l * stride to l * stride + width."""
    lanes = {16: 8, 8: 16}.get(width, 32)
    total = 0
    for first in range(0, threads, lanes):
        banks = [set() for _ in range(32)]
        for lane in range(first, min(first + lanes, threads)):
            for word in range(lane * stride // 4, (lane * stride + width - 1) // 4 + 1):
                banks[word % 32].add(word)
        total += max(map(len, banks))
    return total, -(-threads // lanes)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 17, 32])
def test_bank_conflicts_follow_the_banks(counted, width, factor):
    found = touched(counted, width, width * factor, in_shared=True)
    assert (found.requests, found.bytes) == (1, 32 * width)
    assert (found.wavefronts, found.ideal_wavefronts) == wavefronts(width, width * factor)


def test_known_conflicts(counted):
    assert touched(counted, 4, 128, in_shared=True).conflicts == 31            # every lane in one bank
    assert touched(counted, 4, 4, in_shared=True).conflicts == 0
    assert touched(counted, 8, 16, in_shared=True).conflicts == 2              # two ways in each of two phases
    assert touched(counted, 16, 272, in_shared=True).conflicts == 0            # rows of 256 bytes padded by 16
    assert touched(counted, 16, 256, in_shared=True).conflicts == 28
    assert touched(counted, 2, 2, in_shared=True).conflicts == 0               # two lanes share a word: no conflict


@pytest.mark.parametrize(("width", "stride", "offset", "sectors", "ideal", "lines"), [
    (4, 4, 0, 4, 4, 1), (4, 4, 16, 5, 4, 2), (16, 16, 0, 16, 16, 4), (4, 128, 0, 32, 4, 32), (1, 1, 0, 1, 1, 1), (8, 64, 0, 32, 8, 16),
    (2, 2, 30, 3, 2, 1),
])
def test_global_sectors(counted, width, stride, offset, sectors, ideal, lines):
    found = touched(counted, width, stride, offset)
    assert (found.requests, found.sectors, found.ideal_sectors, found.lines) == (1, sectors, ideal, lines)


@pytest.mark.parametrize("in_shared", [False, True])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_misaligned_accesses_are_faults(counted, width, in_shared):
    with pytest.raises(SimtError, match=f"address is not a multiple of the access's {width} bytes"):
        touched(counted, width, width, width // 2, in_shared)


def test_regions_are_counted_apart(counted):
    halves = {"low": (0, 32 * 128), "high": (32 * 128, 64 * 128), "none": (1, 3)}
    _, counts = reverse(counted, stride=32, blocks=1, threads=64, regions=halves)
    low, high = counts.regions["low", "store"], counts.regions["high", "load"]
    assert (low.requests, low.conflicts, high.requests, high.conflicts) == (1, 31, 1, 31)
    assert counts.regions["none", "store"].requests == 0
    assert counts.total("shared").conflicts == 4 * 31 and counts.total("global", "load", 4).requests == 2


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_spin_on_what_others_write(plain, order):
    ranks, rounds = 4, 5
    values, flags = torch.zeros(2 * ranks, dtype=torch.int32), torch.zeros(ranks, dtype=torch.int32)
    out = torch.zeros(ranks, rounds, 64, dtype=torch.int32)
    run_ranks([lambda flag, rank=rank: plain.launch("meet", (1,), (64,), [values, flags, out, rank, ranks, rounds, -1], order=order,
                                                    cancelled=flag) for rank in range(ranks)])
    expected = torch.tensor([sum(rank * 100 + round_ for rank in range(ranks)) for round_ in range(1, rounds + 1)])
    assert torch.equal(out, expected[None, :, None].expand_as(out).int())


def test_a_rank_that_never_comes_is_waited_for_in_vain(plain):
    values, flags, out = (torch.zeros(200, dtype=torch.int32) for _ in range(3))

    def launch(rank, limit):
        return lambda flag: plain.launch("meet", (1,), (32,), [values, flags, out, rank, 2, 1, 1], time_limit_s=limit, cancelled=flag)

    with pytest.raises(SimtError, match=r"first: meet: block \(0, 0, 0\): thread \d+ \(load_acquire at executor\.cu:\d+\) has waited 1 s"):
        run_ranks([launch(0, 1.0), launch(1, 60.0)], names=["first", "second"])


def test_resident_blocks_wait_for_one_another(plain):
    arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(6, 32, dtype=torch.int32)
    counts = plain.launch("grid_barrier", (6,), (32,), [arrived, out], resident=True)
    assert (out == 6).all() and counts.instructions["atomic"] == 6
    with pytest.raises(SimtError, match="for what nobody wrote"):              # one at a time they cannot
        plain.launch("grid_barrier", (6,), (32,), [arrived.zero_(), out], workers=1, time_limit_s=0.5)


@pytest.mark.parametrize("b_row", [False, True])
def test_mma_multiplies_as_the_ptx_isa_says(plain, b_row):
    A, B, C = torch.randn(4, 8, 4).half(), torch.randn(4, 4, 8).half(), torch.randn(4, 8, 8)         # by quad pair
    lane = torch.arange(32)
    quad, member = lane % 16 // 4, lane % 4 + lane // 16 * 4
    a = A[quad, member].contiguous()
    if b_row:
        columns = torch.arange(4)[None] + lane[:, None] // 16 * 4
        b = B[quad[:, None], (lane % 4)[:, None], columns].contiguous()
    else:
        b = B[quad, :, member].contiguous()
    v = torch.arange(8)[None]
    rows, columns = (lane[:, None] & 1) + (v & 2) + lane[:, None] // 16 * 4, (v & 4) + (lane[:, None] & 2) + (v & 1)
    sums = C[quad[:, None], rows, columns].contiguous()
    counts = plain.launch("one_mma", (1,), (32,), [sums, a, b, int(b_row)])
    want = (C + A.float() @ B.float())[quad[:, None], rows, columns]
    assert (sums - want).abs().max() < 1e-5 and counts.instructions["mma"] == 1


@pytest.mark.parametrize("software", [False, True])
def test_half_precision_rounds_as_torch_does(software):
    """Every half, and floats around every rounding boundary; the fallback for CPUs without the instructions too."""
    program = Program(SOURCE, defines=(("SIMT_SOFTWARE_HALF", 1),) if software else ())
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    exact = halves.float()
    near = [torch.nextafter(exact, torch.tensor(sign * float("inf"))) for sign in (1, -1)]
    middle = (exact[:-1].double() + exact[1:].double()) / 2
    x = torch.cat([exact, *near, middle.float(), torch.randn(10000) * 1e-7, torch.tensor([65519.0, 65520.0, 1e30, -1e30])])
    out, floats = torch.zeros(len(x), dtype=torch.float16), torch.zeros(65536)
    program.launch("convert", (-(-len(x) // 256),), (256,), [out, floats, x, len(x)])
    same = lambda a, b: torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())
    assert same(floats, exact) and same(out, x.half())


OVERRUN = """
import torch
from hetero_attn.testing.simt import Program
data = torch.zeros(512, dtype=torch.uint8)
Program({source!r}, sanitize=True).launch("touch", (1,), (32,), [data, data, 4, 4, {offset}, 0])
print("ran to its end")
"""


@pytest.mark.skipif(not full_grid(), reason="run by `make test-full` (HETERO_ATTN_FULL=1)")
@pytest.mark.parametrize(("offset", "fault"), [(0, False), (512 - 124, True)])
def test_address_sanitizer_sees_a_step_beyond_a_tensor(offset, fault):
    preload = subprocess.run([*find_compiler().command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "LD_PRELOAD": preload.strip(), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OVERRUN.format(source=str(SOURCE), offset=offset)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ("ran to its end" in done.stdout) is not fault, done.stderr[-2000:]
    assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) is fault


def test_arguments_are_checked(plain):
    with pytest.raises(ValueError, match=r"kernel is 'reverze', executor\.cu has reverse, "):
        plain.launch("reverze", (1,), (32,), [])
    with pytest.raises(ValueError, match=r"grid is \(0,\), expected one to three sizes of at least 1"):
        plain.launch("reverse", (0,), (32,), [])
    with pytest.raises(ValueError, match=r"block is \(2048,\): 2048 threads, expected 1 to 1024"):
        plain.launch("reverse", (1,), (2048,), [])
    with pytest.raises(TypeError, match="argument is str, expected a tensor, int, float, bytes or ctypes value"):
        plain.launch("reverse", (1,), (32,), ["x"])


def test_a_source_without_kernels(tmp_path):
    (tmp_path / "empty.cu").write_text("void f() {}")
    with pytest.raises(ValueError, match="expected at least one kernel"):
        Program(tmp_path / "empty.cu").launch("f", (1,), (1,), [])
