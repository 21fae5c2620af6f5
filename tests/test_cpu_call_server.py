"""The conformance cases on kernels that cannot run in this process: NEON under an emulator, and every set under AddressSanitizer and UBSan.

Run by `make test-full`: compiling with sanitizers takes minutes. NEON wants `apt install g++-aarch64-linux-gnu qemu-user`.
"""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from cpu_call_server import CallServer, ServedBackend, build_call_server
from hetero_attn_cpu.instruction_sets import of_this_cpu

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.jit import compiler_reason
from hetero_attn.product import linear
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.tolerances import mismatch

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fopenmp")
CASES = [case for case in attention_cases(full=False) if not case.gradients and case.dtype != torch.float64]
MATRICES = ((1, 70, 96), (2, 33, 64), (4, 8, 257), (5, 65, 129), (33, 17, 40), (70, 130, 512), (1, 1, 1))
pytestmark = [pytest.mark.full, pytest.mark.skipif(not full_grid(), reason="run by `make test-full` (HETERO_ATTN_FULL=1)")]


@contextmanager
def serving(command, environment=None):
    server = CallServer(command, environment)
    try:
        with registry.register("cpu-served", lambda: ServedBackend(server)):
            yield registry.get("cpu-served")
    finally:
        code = server.close()
    assert code == 0, "the program ended with a fault that no call showed"


def hold_to(cases, backend) -> None:
    """Every case, and linear in every dtype; a line for each that is broken."""
    broken, checked = [], 0
    for case in cases:
        try:
            check(case, "cpu-served")
            checked += 1
        except UnsupportedError:
            continue
        except AssertionError as error:
            broken.append(str(error))
            if "the program stopped" in str(error):
                break
    assert not broken, f"{len(broken)} of {len(cases)} cases:\n" + "\n".join(broken[:3])
    assert checked > len(cases) // 2
    for M, N, K in MATRICES:
        random = torch.Generator().manual_seed(N)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, weight, bias = (torch.randn(size, generator=random).to(dtype) for size in ((M, K), (N, K), (N,)))
            want = linear(x.double(), weight.double(), bias.double())
            complaint = mismatch(backend.linear(x, weight, bias), want, dtype, magnitude=K**0.5)
            assert complaint is None, f"linear {M}x{K} by {N}x{K}: {complaint}"


def sanitizer_reason() -> str | None:
    if compiler_reason():
        return compiler_reason()
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return None if os.path.isabs(found) else "g++ has no libasan (install libasan of its version)"


needs_sanitizers = pytest.mark.skipif(bool(shutil.which("g++") is None or sanitizer_reason()), reason="g++ with libasan is not here")


@needs_sanitizers
@pytest.mark.parametrize("instruction_set", [each.name for each in of_this_cpu()])
def test_all_cases_under_sanitizers(instruction_set):
    program = build_call_server(instruction_set, "g++", SANITIZED)
    with serving([program]) as backend:
        hold_to(CASES, backend)


@needs_sanitizers
def test_the_sanitizers_see_a_byte_too_many(monkeypatch):
    """A region sent one byte short stands for a kernel that reads one byte too far."""
    import cpu_call_server

    regions = cpu_call_server.attention_regions
    monkeypatch.setattr(cpu_call_server, "attention_regions", lambda f: {n: (s - (n == "k"), w) for n, (s, w) in regions(f).items()})
    server = CallServer([build_call_server(of_this_cpu()[-1].name, "g++", SANITIZED)])
    q = torch.ones(1, 2, 5, 64)
    with registry.register("cpu-served", lambda: ServedBackend(server)), pytest.raises(AssertionError, match="READ of size"):
        from hetero_attn import attention

        attention(q, q, q, backend="cpu-served")


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross-compiler (apt install g++-aarch64-linux-gnu)")
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no emulator (apt install qemu-user)")
def test_neon_under_an_emulator():
    program = build_call_server("neon", "aarch64-linux-gnu-g++", ("-static",))
    with serving(["qemu-aarch64", str(program)]) as backend:
        hold_to(CASES, backend)
