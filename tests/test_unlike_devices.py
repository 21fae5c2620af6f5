"""A process with unlike GPUs: choice, reasons and profile are about the device that the tensors are on, whichever is current.

torch.cuda's questions are answered by two stand-in boards; the backends' own looks at them are the real ones, up to the probe.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hetero_attn_hopper import HopperBackend
from hetero_attn_hopper.cuda import CudaDevice
from hetero_attn_hopper.operators import TorchOperators
from hetero_attn_triton import TritonBackend, _kind
from hetero_attn_triton.launching import DoesNotCompile, GpuLauncher
from hetero_attn_triton.tiling import Device
from hetero_attn_volta.launching import CudaLauncher

from hetero_attn import registry
from hetero_attn.arguments import dense_spec
from hetero_attn.backend import AbsentBackend, UnsupportedError
from hetero_attn.spec import AttentionSpec

BOARDS = (("NVIDIA A100-SXM4-80GB", (8, 0)), ("Tesla V100-SXM2-32GB", (7, 0)))
SPEC = AttentionSpec("cuda", torch.float16, 1, 8, 2, 64, 64, 128, 128, is_causal=True)


class Operators(TorchOperators):
    def __init__(self):
        self.probed = []

    def probe(self, index=None):
        self.probed.append(index)
        return []


class Triton(TritonBackend):
    def __init__(self):
        super().__init__(GpuLauncher())
        self.probed = []

    def probe(self, index=None):
        self.probed.append(index)
        return []


@pytest.fixture(params=[0, 1], ids=["A100 current", "V100 current"])
def boards(request, monkeypatch):
    """(hopper, triton) on a machine with both boards, one of them current."""
    pytest.importorskip("triton", reason="triton is not installed")
    index = lambda device: request.param if device is None else device if isinstance(device, int) else torch.device(device).index
    answers = {"is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: request.param,
               "get_device_name": lambda device=None: BOARDS[index(device)][0],
               "get_device_capability": lambda device=None: BOARDS[index(device)][1]}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr("hetero_attn_hopper.cuda.nvrtc_reason", lambda: None)
    monkeypatch.setattr(registry, "_device_profiles", {})
    return HopperBackend(Operators()), Triton()


def test_reasons_are_of_the_tensors_device(boards):
    for backend in boards:
        own = registry.objections(backend, replace(SPEC, device_index=0))
        other = registry.objections(backend, replace(SPEC, device_index=1))
        assert own == [] and len(other) == 1 and "device has compute capability 7.0, " in other[0]
    hopper, triton = boards
    for _ in range(2):                               # each device is tried once
        registry.unavailable(triton, 0)
        registry.unavailable(hopper, 0)
    assert triton.probed == hopper.operators.probed == [0]


def test_without_an_index_it_is_the_current_device(boards):
    current = torch.cuda.current_device()
    for backend in boards:
        assert bool(registry.unavailable(backend)) == (current == 1)
        assert registry.objections(backend, SPEC) == registry.unavailable(backend)


def test_the_choice_goes_by_the_tensors_device(boards, monkeypatch):
    """By profiles, too: each board has its own, and sdpa takes what Volta's board is left."""
    hopper, triton = boards
    monkeypatch.setattr(registry, "_instances", {"hopper": hopper, "triton": triton})
    registry._instances["volta"] = AbsentBackend("volta", "not under test")
    assert registry.current_profile("cuda", 0).name == "a100" and registry.current_profile("cuda", 1).name == "v100"
    assert registry.select(replace(SPEC, device_index=0)).name == "hopper" and registry.select(replace(SPEC, device_index=1)).name == "sdpa"
    with pytest.raises(UnsupportedError, match=r"cuda:1\n.*compute capability 7.0"):
        registry.select(replace(SPEC, device_index=1), "triton")
    registry.select(replace(SPEC, device_index=0), "triton")


def test_volta_asks_whether_torch_is_built_for_the_tensors_device(boards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    launcher = CudaLauncher()
    said = ["; ".join(launcher.unavailable_reasons(index)) for index in (0, 1)]
    assert ["torch is built for CUDA 13.0 without sm_70" in each for each in said] == [False, True]


def test_the_communicator_asks_of_its_ranks_device(boards):
    for index, words in ((0, ""), (1, "")):
        assert "".join(CudaDevice().unavailable_reasons(index)) == words         # the collectives' kernels serve from 7.0 on
    assert CudaDevice.arch(0) == "sm_80" and CudaDevice.arch(1) == "sm_70"


def test_what_one_device_turned_out_not_to_take_is_its_own(monkeypatch):
    backend = TritonBackend(SimpleNamespace(device="cuda", hardware=lambda device: Device(108, 166912), tuned=lambda device: {}))

    def fails(*_):
        raise DoesNotCompile("PTXASError: no")

    monkeypatch.setattr("hetero_attn_triton.calls.attention", fails)
    q = torch.empty(1, 8, 64, 128, dtype=torch.float16)
    with pytest.raises(DoesNotCompile):
        backend.attention(q, q, q, replace(SPEC, device_index=1), None)
    assert backend.unsupported_reasons(replace(SPEC, device_index=0)) == []
    assert "Triton did not compile this kind of call here" in backend.unsupported_reasons(replace(SPEC, device_index=1))[0]
    assert _kind(replace(SPEC, device_index=1)) != _kind(SPEC)


def test_a_spec_knows_its_device():
    x = torch.empty(1, 2, 3, 16, device="cpu")
    call = (None, False, None, (-1, -1), None, None, None, False, "bhsd", False)
    assert dense_spec(x, x, x, *call).device_index is None and str(dense_spec(x, x, x, *call)).endswith("cpu")
    there = replace(SPEC, device_index=1)
    assert there.at(2, 1, 9, 2).device_index == 1 and str(there).endswith("cuda:1") and str(replace(SPEC, device_index=0)).endswith("cuda")
