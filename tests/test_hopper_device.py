"""What of CUDA's device can be tried without one: what it says, how ranks fall back together, and how a launch reaches the driver.

The driver is a library of a few lines that writes down what it is called with, as the C prototypes of the CUDA Driver API have it.
"""

import ctypes
import subprocess
from types import SimpleNamespace

import pytest
import torch
from hetero_attn_hopper import HopperBackend, abi, driver, symmetric
from hetero_attn_hopper.cuda import CudaDevice
from hetero_attn_hopper.layout import Layout
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
    assert "rank 1 is on node-b and this one on node-a" in device.objections([fact(0), fact(0, "b")], 0)[0]
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: other != 2)
    assert device.objections([fact(0), fact(1)], 0) == []
    assert "GPU 0 does not reach the memory of rank 2's GPU 2 (no NVLink, no PCIe peer access" in device.objections(
        [fact(0), fact(1), fact(2)], 0)[0]
    assert device.objections([fact(0), fact(0)], 0) == []              # two ranks on one GPU


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
