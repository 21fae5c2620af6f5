"""The cpu kernels in a process of their own (csrc/cpu/call_server.cpp): under an emulator, or with sanitizers, as a backend like any other.

What memory a call may touch is computed here from the packed struct alone, apart from the kernels; each tensor is sent as just those bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import subprocess
import tempfile
from itertools import accumulate
from pathlib import Path

import numpy
from hetero_attn_cpu import CpuBackend, abi
from hetero_attn_cpu.instruction_sets import BY_NAME
from hetero_attn_cpu.library import FLAGS, SOURCES
from hetero_attn_cpu.selection import Selected

from hetero_attn.artifacts import Artifacts, cache_folder
from hetero_attn.jit import BASE_FLAGS, Kernel

ITEM_BYTES = {0: 0, 1: 4, 2: 2, 3: 2, 4: 1, 5: 8}               # by HaDtype


def build_call_server(instruction_set: str, compiler: str, flags: tuple[str, ...]) -> Path:
    """The program for an instruction set, compiled once and then kept in the cache of kernels. Raises CalledProcessError."""
    sources = (*SOURCES, "cpu/call_server.cpp")
    described = Kernel(f"cpu-server-{instruction_set}", sources, flags=(*FLAGS, *BY_NAME[instruction_set].flags, *flags),
                       abi_version=abi.ABI_VERSION)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = f"{described.digest}-{hashlib.sha256(compiler.encode() + version).hexdigest()[:16]}"

    def write(scratch: Path):
        flags = [flag for flag in (*BASE_FLAGS, *described.flags) if flag not in ("-fvisibility=hidden", "-fPIC")]
        parts = [(str(described.root / source), str(scratch / f"{i}.o")) for i, source in enumerate(sources)]
        running = [subprocess.Popen([compiler, *flags, "-c", source, "-o", part], stderr=subprocess.PIPE) for source, part in parts]
        for each in running:
            words = each.communicate()[1]
            assert each.returncode == 0, words.decode()
        made = scratch / "call_server"
        subprocess.run([compiler, *flags, *(part for _, part in parts), "-o", str(made)], check=True)
        return made, {"flags": " ".join(flags)}

    made = Artifacts(cache_folder()).make(described.name, key, write)
    made.chmod(0o700)
    return made


class CallServer:
    """Stands where a Library does: attention() and linear() of packed structs, run by the program. Raises AssertionError if it stops."""

    parallel = 0

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment)

    def close(self) -> int:
        """End the program; its exit code."""
        self._process.stdin.close()
        return self._process.wait(timeout=60)

    def attention(self, packed: bytes) -> None:
        self._run(0, abi.ATTENTION, packed, attention_regions(abi.fields_of(abi.ATTENTION, packed)))

    def linear(self, packed: bytes) -> None:
        self._run(1, abi.LINEAR, packed, linear_regions(abi.fields_of(abi.LINEAR, packed)))

    def _run(self, kind: int, table: tuple, packed: bytes, regions: dict[str, tuple[int, bool]]) -> None:
        fields, offsets = abi.fields_of(table, packed), offsets_of(table)
        present = [(name, fields[name], size, written) for name, (size, written) in regions.items() if fields[name]]
        request = [struct.pack("=2q", kind, len(present)), packed]
        for name, address, size, written in present:
            request += [struct.pack("=4q", offsets[name], size, address % 64, written), ctypes.string_at(address, size)]
        try:
            self._process.stdin.write(b"".join(request))
            self._process.stdin.flush()
            status = struct.unpack("=q", self._receive(8))[0]
            assert status == 0, f"status {status}"
            for _, address, size, written in present:
                if written:
                    ctypes.memmove(address, self._receive(size), size)
        except BrokenPipeError:
            self._stopped()

    def _receive(self, size: int) -> bytes:
        found = self._process.stdout.read(size)
        return found if len(found) == size else self._stopped()

    def _stopped(self):
        code = self._process.wait(timeout=60)
        self._said.seek(0)
        raise AssertionError(f"the program stopped with exit code {code}:\n{self._said.read().decode(errors='replace')[:6000]}")


class ServedBackend(CpuBackend):
    """The cpu backend with its kernels in a CallServer."""

    def __init__(self, server: CallServer) -> None:
        super().__init__()
        self._library, self._selected = server, Selected(server)


def offsets_of(table: tuple) -> dict[str, int]:
    """Byte offset of every field of a struct table."""
    sizes = [struct.calcsize(abi.format_of((field,))) for field in table]
    return dict(zip((name for name, _, _ in table), accumulate(sizes, initial=0)))


def extent(counts: tuple[int, ...], strides: list[int]) -> int:
    """How many elements lie from the first to the last of a strided tensor, both included."""
    return 0 if 0 in counts else sum((count - 1) * stride for count, stride in zip(counts, strides)) + 1


def attention_regions(f: dict) -> dict[str, tuple[int, bool]]:
    """Pointer field -> (bytes that the call may touch from there on, whether it writes them)."""
    B, Hq, Hkv, D, Dv, Sq, Skv = (f[name] for name in ("batch", "q_heads", "kv_heads", "head_dim", "v_head_dim", "q_len", "kv_len"))
    item, regions, keys = ITEM_BYTES[f["dtype"]], {}, (B, Hkv, Skv)
    outer = B
    if f["cu_q"]:
        outer, Sq = 1, int(_int32(f["cu_q"], B + 1)[-1])
        regions |= {"cu_q": (4 * (B + 1), False), "cu_k": (4 * (B + 1), False)}
        if f["block_table"]:
            used = [-(-int(n) // f["page_size"]) for n in _int32(f["seqused_k"], B)]
            rows = [f["block_table"] + 4 * b * f["table_stride"] for b in range(B)]
            pages = max((int(_int32(row, n).max()) + 1 for row, n in zip(rows, used) if n), default=0)
            ends = [b * f["table_stride"] + n for b, n in enumerate(used) if n]
            regions |= {"block_table": (4 * max(ends, default=0), False), "seqused_k": (4 * B, False)}
            keys = (pages, Hkv, f["page_size"])
        else:
            keys = (1, Hkv, int(_int32(f["cu_k"], B + 1)[-1]))
    regions |= {
        "q": (item * extent((outer, Hq, Sq, D), f["q_stride"]), False), "out": (item * extent((outer, Hq, Sq, Dv), f["out_stride"]), True),
        "k": (item * extent((*keys, D), f["k_stride"]), False), "v": (item * extent((*keys, Dv), f["v_stride"]), False),
        "lse": (4 * extent((outer, Hq, Sq), f["lse_stride"]), True),
        "mask": (ITEM_BYTES[f["mask_dtype"]] * extent((B, Hq, Sq, Skv), f["mask_stride"]), False),
        "slopes": (4 * extent((B, Hq), f["slopes_stride"]), False), "sinks": (4 * Hq, False),
    }
    return regions


def linear_regions(f: dict) -> dict[str, tuple[int, bool]]:
    item, M, N, K = ITEM_BYTES[f["dtype"]], f["m"], f["n"], f["k"]
    return {"x": (item * extent((M, K), [f["x_stride"], 1]), False), "weight": (item * extent((N, K), [f["weight_stride"], 1]), False),
            "bias": (item * N, False), "y": (item * extent((M, N), [f["y_stride"], 1]), True)}


def _int32(address: int, count: int) -> numpy.ndarray:
    return numpy.frombuffer(ctypes.string_at(address, 4 * count), dtype=numpy.int32)
