"""The native kernels of the low-bit codecs against the definition, byte for byte.

The functions are built alone, once for each instruction set of this CPU, so that all of them are compared and not just the one that serves
here.
"""

import codec_cases
import pytest
from codec_cases import BITS, COMMON, SHARES
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.collectives.codec.definition import TorchKernels
from hetero_attn.jit import Kernel, compiler_reason


def native_sets():
    from hetero_attn_cpu.instruction_sets import of_this_cpu

    return of_this_cpu()


@pytest.fixture(scope="module", params=native_sets(), ids=lambda each: each.name)
def native(request):
    if compiler_reason() is not None:
        pytest.skip(compiler_reason())
    from hetero_attn_cpu.codec_calls import CodecCalls
    from hetero_attn_cpu.library import FLAGS

    kernel = Kernel(f"codec-{request.param.name}", ("cpu/codec.cpp",), flags=(*FLAGS, *request.param.flags), abi_version=1)
    return CodecCalls(kernel.try_load() or kernel.load())


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 400), bits=BITS, **COMMON)
def test_native_groups_are_the_definition(native, **case):
    codec_cases.groups(native, **case)


@settings(max_examples=80, deadline=None)
@given(
    features=st.one_of(st.integers(1, 200), st.sampled_from([2047, 2048, 2049, 5000])), first=st.integers(0, 12000),
    count=st.one_of(st.integers(0, 600), st.integers(0, 9000)), share=SHARES, **COMMON,
)
def test_native_features_are_the_definition(native, **case):
    codec_cases.features(native, **case)


def test_without_a_native_backend_torch_packs(monkeypatch):
    from hetero_attn.collectives import codec

    monkeypatch.setenv("HETERO_ATTN_SET", "backends=[sdpa]")
    codec.device_kernels.cache_clear()
    try:
        assert type(codec.kernels("cpu")) is TorchKernels
    finally:
        codec.device_kernels.cache_clear()
