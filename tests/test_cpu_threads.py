"""Threads of the cpu kernels: torch's own, never others; and the same bits whatever their number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetero_attn import attention, attention_varlen, registry
from hetero_attn.testing.ranks import on_ranks

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def cpu():
    backend = registry.get("cpu")
    if backend.unavailable_reasons():
        pytest.skip("; ".join(backend.unavailable_reasons()))
    return backend


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len", "heads"), [
    (1, 3000, (4, 1)), (1, 3000, (2, 2)), (3, 700, (6, 2)), (300, 300, (4, 2)), (33, 4500, (2, 1))], ids=str)
def test_attention_has_the_same_bits(q_len, kv_len, heads, dtype, threads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=random).to(dtype) for h, n in ((heads[0], q_len), (heads[1], kv_len), (heads[1], kv_len)))
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found += [attention(q, k, v, is_causal=True, return_lse=True, backend="cpu") for _ in range(3)]
    assert all(torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1]) for out, lse in found)


def test_a_sequence_has_the_same_bits_whatever_it_is_packed_with(threads):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(40, 4, 64, generator=random), torch.randn(3000, 2, 64, generator=random)
    starts = lambda *lens: torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    call = lambda q, k, a, b: attention_varlen(q, k, k, starts(*a), starts(*b), 40, 3000, is_causal=True, backend="cpu")
    threads(3)
    packed = call(q, k, (1, 30, 9), (1500, 900, 600))
    assert torch.equal(packed[:1], call(q[:1], k[:1500], (1,), (1500,)))
    assert torch.equal(packed[1:31], call(q[1:31], k[1500:2400], (30,), (900,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 32, 130])
def test_linear_has_the_same_bits(M, dtype, threads, cpu):
    random = torch.Generator().manual_seed(M)
    x, weight = (torch.randn(size, generator=random).to(dtype) for size in ((M, 300), (513, 300)))
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found += [cpu.linear(x, weight) for _ in range(3)]
    assert all(torch.equal(y, found[0]) for y in found)


PROGRAM = """
import os, re, torch
from hetero_attn import attention, registry
count = lambda: len(os.listdir('/proc/self/task'))
torch.set_num_threads(NUMBER)
big = torch.randn(600, 600)
for _ in range(3): big @ big; (big + 1).exp(); torch.randn(64, 4, 99, 32).softmax(-1)          # torch has its threads now
q, k = torch.randn(2, 8, 200, 64), torch.randn(2, 2, 900, 64)
cpu = registry.get('cpu')
assert cpu.unavailable_reasons() == []
big @ big
before = count()
for n in (1, 2, 200):
    for _ in range(3):
        attention(q[:, :, :n], k, k, backend='cpu'); cpu.linear(big[:n], big)
        (big + 1).exp(); big @ big
assert cpu._library.parallel
runtimes = {os.path.realpath(p) for p in re.findall(r'(/\\S*/lib(?:gomp|omp|iomp5)\\S*)', open('/proc/self/maps').read())}
print(before, count(), len(runtimes), torch.get_num_threads())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc shows threads and libraries on Linux alone")
@pytest.mark.parametrize("number", [1, 2, 4])
def test_no_thread_beyond_torch_s_and_one_openmp_runtime(number):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}
    program = PROGRAM.replace("NUMBER", str(number))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    before, after, runtimes, threads = map(int, done.stdout.split())
    assert threads == number and after <= before, f"{before} threads became {after}"
    assert runtimes == 1


def count_threads(communicator):
    """In a rank: threads before and after the kernels' calls, with torch on one thread."""
    backend = registry.get("cpu")
    assert backend.unavailable_reasons() == []
    torch.set_num_threads(1)
    q, k = torch.randn(1, 8, 200, 64), torch.randn(1, 2, 900, 64)
    count = lambda: len(os.listdir("/proc/self/task"))
    before = count()
    for n in (1, 200):
        attention(q[:, :, :n], k, k, backend="cpu")
        backend.linear(q[0, 0, :n], k[0, 0])
    return before, count()


@pytest.mark.ranks
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc shows threads on Linux alone")
def test_ranks_with_one_thread_each_start_none():
    for outcome in on_ranks(count_threads, world_size=2):
        assert outcome.result is not None, outcome.traceback
        before, after = outcome.result
        assert after <= before
