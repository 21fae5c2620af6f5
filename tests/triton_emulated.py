"""triton-emulated: the triton backend on CPU tensors, its kernels run by Triton's interpreter. For tests; never chosen automatically.

Import it only in a process that has TRITON_INTERPRET=1 since its start. Four of the interpreter's habits are mended, because they are not
the device's: it multiplies bf16 as if its bits were integers, rounds fp32 to bf16 towards zero, loses bits of subnormal bf16 that it makes
fp32, and fuses no multiply-add.
"""

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hetero_attn_triton import TritonBackend
from hetero_attn_triton.launching import kernels
from hetero_attn_triton.tiling import Device, Tile

from hetero_attn import registry

NAME = "triton-emulated"
DEVICE = Device(units=6, shared_memory_bytes=100 << 10)


class SmallTiles(dict):
    """As if these had been measured to be quickest, whatever the call: small cases then have several blocks, and splits."""

    def get(self, shape_class, default=None):
        return Tile(32, 32, 4, 1) if shape_class.endswith("half") else Tile(16, 32, 4, 1)


def mend_the_interpreter() -> None:
    """Once a process. Raises RuntimeError where the interpreter is not on."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1, and must be before triton is imported")
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "mended", False):
        return
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def widened(x):
        bits = x.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, *rest):
        return original_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(rounded_to_bf16(source.data), to.scalar)
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return widened(source)                                  # its own makes subnormal numbers smaller
        return original_cast(self, source, to)

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return handle(exact.astype(z.data.dtype), z.dtype.scalar)

    patched: set[frozenset[int]] = set()

    def call(self, *args, **kwargs):
        languages = frozenset(id(each) for each in self.fn.__globals__.values() if each in (tl, tl.core))
        if id(tl) not in languages and languages not in patched:    # the launch itself has patched tl; a patch of tl.core alone stays
            interpreter._patch_lang(self.fn)
            patched.add(languages)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call                 # its own goes through the whole language at every call
    if os.environ.get("HETERO_ATTN_FULL", "0") in ("", "0"):        # integer overflow is looked for in the full run: it takes a third
        interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    builder.create_dot, builder.cast_impl, builder.create_fma, builder.mended = create_dot, cast_impl, create_fma, True
    for name in ("create_fp_trunc", "create_fp_ext", "create_si_to_fp", "create_ui_to_fp"):          # they are bound to the old cast
        setattr(builder, name, lambda self, source, to: self.cast_impl(source, to))


def rounded_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16 nearest to it, ties to even, as every device rounds; uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


class InterpretedLauncher:
    """tiles: taken as measured. Keeps the last launches, newest last."""

    device = "cpu"
    probes = False

    def __init__(self, tiles: dict[str, Tile] | None = None, kernels_: dict[str, Any] | None = None) -> None:
        mend_the_interpreter()
        self._tiles, self._kernels = SmallTiles() if tiles is None else tiles, kernels_ or kernels()
        self.launches: list[tuple[str, int, dict[str, Any]]] = []

    def unavailable_reasons(self, index=None) -> list[str]:
        return []

    def hardware(self, device: torch.device) -> Device:
        return DEVICE

    def tuned(self, device: torch.device) -> dict[str, Tile]:
        return self._tiles

    def launch(self, kernel, programs, arguments, constants, warps, stages, device, *, exact=False) -> None:
        self.launches = [*self.launches[-9:], (kernel, programs, constants)]
        with np.errstate(all="ignore"):
            self._kernels[kernel][(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages)


@contextmanager
def triton_emulated(launcher: InterpretedLauncher | None = None, name: str = NAME):
    """Registers the backend for the block; gives its launcher, which keeps what was launched."""
    launcher = launcher or InterpretedLauncher()
    with registry.register(name, lambda: TritonBackend(launcher)):
        yield launcher
