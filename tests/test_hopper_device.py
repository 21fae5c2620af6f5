"""What of CUDA's device can be tried without one: what it says, how ranks fall back together, and how a launch reaches the driver.

The driver is a library of a few lines that writes down what it is called with, as the C prototypes of the CUDA Driver API have it.
"""

import ctypes
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from hetero_attn_hopper import HopperBackend, abi, driver, symmetric
from hetero_attn_hopper.cuda import CudaDevice
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.memory import SymmetricMemory
from hetero_attn_hopper.telling import on_all_ranks, told_by_all
from native import needs_compiler

from hetero_attn.compiler import find_compiler
from hetero_attn.testing.rank_threads import on_threads

DRIVER = r"""
#include <cstdio>
#include <cstring>
typedef int CUresult; typedef int CUdevice; typedef struct C* CUcontext; typedef struct M* CUmodule; typedef struct F* CUfunction;
typedef struct S* CUstream;
static char diary[4096]; static CUcontext current;
#define NOTE(...) snprintf(diary + strlen(diary), sizeof diary - strlen(diary), __VA_ARGS__)
extern "C" {
const char* read_diary() { return diary; }
CUresult cuGetErrorString(CUresult code, const char** text) { *text = code == 701 ? "too many resources" : "unknown"; return 0; }
CUresult cuCtxGetCurrent(CUcontext* context) { *context = current; return 0; }
CUresult cuDeviceGet(CUdevice* device, int index) { *device = index + 40; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  NOTE("retain %d; ", device); *context = (CUcontext)0x77; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context; NOTE("current %p; ", (void*)context); return 0; }
CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* state, unsigned long long* number, void** graph, void** before, size_t* count) {
  *state = (long)stream == 7; *number = 5000000000; return graph || before || count ? 1 : 0; }
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  *value = attribute == 97 && device == 41 ? 232448 : -1; return 0; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  NOTE("load %.6s; ", (const char*)image); *module = (CUmodule)0x1234567890; return 0; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  NOTE("find %s in %p; ", name, (void*)module); *function = (CUfunction)0x9876543210; return 0; }
CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) { NOTE("set %d %d; ", attribute, value); return 0; }
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void** arguments, void** extra) {
  NOTE("launch %p %u %u %u / %u %u %u, %u B, stream %p, %.5s, extra %p; ", (void*)function, gx, gy, gz, bx, by, bz, shared, (void*)stream,
       (const char*)arguments[0], (void*)extra);
  return bx > 1024 ? 701 : 0; }
}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A driver that keeps a diary -> what reads it."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    made = tmp_path / "libcuda.so.1"
    subprocess.run([*find_compiler().command, "-shared", "-fPIC", "-o", str(made), str(tmp_path / "driver.cpp")], check=True)
    monkeypatch.setattr(driver, "LIBRARIES", (str(made),))
    driver.library.cache_clear()
    read = ctypes.CDLL(str(made)).read_diary
    read.restype = ctypes.c_char_p
    yield lambda: read().decode()
    driver.library.cache_clear()


@needs_compiler
def test_a_launch_reaches_the_driver_as_it_was_asked(stand_in):
    driver.make_current(1)
    driver.make_current(1)                               # once is enough
    function = driver.load(b"\x7fELF..cubin", "hopper_one_shot", 100 << 10)
    function.launch((8,), (512,), 4096, 0xABCDEF0123, b"bytes of a call")
    assert driver.most_shared_bytes(1) == 232448
    assert driver.capture_number(7) == 5_000_000_000 and driver.capture_number(8) == 0
    assert stand_in() == ("retain 41; current 0x77; load \x7fELF..; find hopper_one_shot in 0x1234567890; set 8 102400; "
                          "launch 0x9876543210 8 1 1 / 512 1 1, 4096 B, stream 0xabcdef0123, bytes, extra (nil); ")
    with pytest.raises(driver.DriverError, match=r"cuLaunchKernel hopper_one_shot, grid \[8\], block \[2048\], 4096 B shared: too many "
                                                 r"resources \(code 701\)"):
        function.launch((8,), (2048,), 4096, 0, b"bytes")


def test_without_a_driver_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARIES", ("libno-such-driver.so.1",))
    driver.library.cache_clear()
    with pytest.raises(driver.DriverError, match=r"the CUDA driver \(libno-such-driver.so.1\) does not load; install the GPU's driver"):
        driver.load(b"", "f", 0)
    driver.library.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_device_and_the_communicator_say_so():
    assert all("has no CUDA" in reason or "sees no CUDA device" in reason for reason in CudaDevice().unavailable_reasons())
    made = on_threads(lambda base: HopperBackend().communicator(base, _profile()), 2)
    assert made[0].result == made[1].result and made[0].result[0].startswith("rank 0: torch ")
    assert any("device is cpu, these kernels run on cuda" in reason for reason in made[0].result)


def _profile():
    from hetero_attn.profile import load_profile

    return load_profile("h100")


def test_ranks_that_do_not_reach_one_another_say_which(monkeypatch):
    fact = lambda index, host="a": {"host": host, "host_name": f"node-{host}", "name": f"GPU-{index}", "index": index, "capability": [9, 0]}
    device = CudaDevice()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    assert "rank 1 is on node-b and this one on node-a" in device.objections([fact(0), fact(0, "b")], 0)[0]
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: other != 2)
    assert device.objections([fact(0), fact(1)], 0) == []
    assert "GPU 0 does not reach the memory of rank 2's GPU 2 (no NVLink, no PCIe peer access" in device.objections(
        [fact(0), fact(1), fact(2)], 0)[0]
    assert device.objections([fact(0), fact(0)], 0) == []              # two ranks on one GPU


def test_a_peers_gpu_is_found_by_its_uuid(monkeypatch):
    """Each rank with a CUDA_VISIBLE_DEVICES of its own: every GPU is number 0 to the rank that has it."""
    fact = lambda uuid, index=0: {"host": "a", "host_name": "a", "name": uuid, "index": index, "capability": [9, 0]}
    asked = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: asked.append((one, other)) or False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=("GPU-x", "GPU-y")[index]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert CudaDevice().objections([fact("GPU-x"), fact("GPU-y")], 0) == [] and asked == []     # not this process's to ask
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "rank 1's GPU 1" in CudaDevice().objections([fact("GPU-x"), fact("GPU-y")], 0)[0] and asked == [(0, 1)]


def test_a_tensor_within_an_allocation_is_found_by_its_offset():
    own = torch.zeros(64, dtype=torch.uint8)
    base = SimpleNamespace(rank=1, world_size=2)
    handle = SimpleNamespace(rank=1, world_size=2, offset=16, buffer_ptrs=[4096, own.data_ptr() - 16])
    assert symmetric.buffers_of(handle, own, base) == [4112, own.data_ptr()]
    older = SimpleNamespace(rank=1, world_size=2, buffer_ptrs=[4096, own.data_ptr()])                 # torch before there were offsets
    assert symmetric.buffers_of(older, own, base) == [4096, own.data_ptr()]
    for wrong, words in (({"offset": 0}, "its buffer of rank 1 is at"), ({"rank": 0}, "it takes this for rank 0 of 2"),
                         ({"world_size": 4}, "it takes this for rank 1 of 4")):
        with pytest.raises(RuntimeError, match=words):
            symmetric.buffers_of(SimpleNamespace(**vars(handle) | wrong), own, base)


@pytest.mark.parametrize("refused", [None, "meet", "enter"])
def test_the_group_of_torchs_memory_ends_with_the_communicator_or_with_the_way(monkeypatch, refused):
    ended, groups = [], []
    own = {rank: torch.ones(1024, dtype=torch.uint8) for rank in range(2)}

    def rendezvous(tensor, name):
        rank = 0 if tensor is own[0] else 1
        if refused == "meet" and rank:
            raise RuntimeError("no peer access")
        return SimpleNamespace(rank=rank, world_size=2, multicast_ptr=0, buffer_ptrs=[own[0].data_ptr(), own[1].data_ptr()])

    def new_group(backend, timeout):
        if refused == "enter" and ranks.own:
            raise RuntimeError("no peer access")
        groups.append(SimpleNamespace(group_name=str(len(groups)), backend=backend))
        return groups[-1]

    made_by = SimpleNamespace(rendezvous=rendezvous)
    monkeypatch.setattr(symmetric, "_cleared", lambda own, layout: own)
    monkeypatch.setattr(symmetric, "_memory", lambda own, buffers, *_: SymmetricMemory(own, buffers, 0, "torch's", None, None, 0))
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", made_by)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", made_by, raising=False)
    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)

    ranks = threading.local()
    made_by.empty = lambda size, dtype, device: own[ranks.own]

    def by_torch(base):
        ranks.own = base.rank
        memory = symmetric.by_torch(base, Layout(256, 256, 256), overlapping=False)
        before = len(ended)
        base.barrier()
        memory.close()
        memory.close()
        return before

    outcomes = on_threads(by_torch, 2)
    if refused:
        assert all("torch's symmetric memory: rank 1: RuntimeError: no peer access" in each.text for each in outcomes)
    else:
        assert [each.result for each in outcomes] == [0, 0]
    assert len(groups) == (1 if refused == "enter" else 2) and sorted(map(id, ended)) == sorted(map(id, groups))


def test_ipc_gives_every_receiver_a_share_of_its_own(monkeypatch):
    """torch counts down one reference a share, so that ranks which use one twice would free what others still read."""
    shares, opened = [], []

    class Storage:
        def __init__(self, rank):
            self.rank = rank

        def _share_cuda_(self):
            shares.append(self.rank)
            return 0, b"handle", 64, 0, f"counter {self.rank} {len(shares)}".encode(), 0, b"event", True

        def data_ptr(self):
            return 1000 + self.rank

    class Own:
        def __init__(self, rank):
            self.storage = Storage(rank)

        def untyped_storage(self):
            return self.storage

    def open_one(index, handle, size, offset, counter, *_):
        opened.append(counter)
        return Storage(int(counter.split()[1]))

    ranks = threading.local()
    monkeypatch.setattr(symmetric, "_cleared", lambda own, layout: Own(ranks.own))
    monkeypatch.setattr(symmetric, "_memory", lambda own, buffers, *_: buffers)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_one, raising=False)

    def run(base):
        ranks.own = base.rank
        return symmetric.by_ipc(base, Layout(256, 256, 256), overlapping=False)

    assert [outcome.result for outcome in on_threads(run, 3)] == [[1000, 1001, 1002]] * 3
    assert len(shares) == 6 and len(set(opened)) == 6


def test_memory_falls_to_the_next_way_on_every_rank_or_on_none(monkeypatch):
    layout = Layout(256, 256, 256)

    def refused(base, layout, overlapping):
        on_all_ranks(base, "torch's symmetric memory", lambda: 1 // (1 - base.rank) if base.rank else 1)

    served = lambda base, layout, overlapping: SimpleNamespace(how="CUDA IPC")
    monkeypatch.setattr(symmetric, "by_torch", refused)
    monkeypatch.setattr(symmetric, "by_ipc", served)
    made = on_threads(lambda base: symmetric.make(base, layout, overlapping=True).how, 2)
    assert [outcome.result for outcome in made] == ["CUDA IPC", "CUDA IPC"]
    monkeypatch.setattr(symmetric, "by_ipc", lambda base, layout, overlapping: on_all_ranks(base, "CUDA IPC", lambda: 1 // base.rank))
    made = on_threads(lambda base: symmetric.make(base, layout, overlapping=True), 2)
    words = "torch's symmetric memory: rank 1: ZeroDivisionError: integer division or modulo by zero; CUDA IPC: rank 0: ZeroDivisionError"
    assert all(outcome.error == "RuntimeError" and outcome.text.startswith(words) for outcome in made)
    assert [outcome.result for outcome in on_threads(lambda base: told_by_all(base, {"rank": base.rank}), 3)] == [
        [{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_layouts_and_their_bounds():
    layout = Layout(4096, 8192, 1 << 16)
    assert layout.staging_at % 256 == 0 and layout.room_at == layout.staging_at + 2 * 4096 and layout.size == layout.heap_at + (1 << 16)
    for wrong in ((0, 256, 256), (256, 100, 256), (256, 256, -256)):
        with pytest.raises(ValueError, match="expected a multiple of 256 above 0"):
            Layout(*wrong)
    assert abi.CALL_BYTES == 272
