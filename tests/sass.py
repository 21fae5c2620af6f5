"""What is in a cubin, read without a disassembler: its kernels and the opcodes of their instructions.

A cubin is an ELF file; a kernel's code is the section .text.<name>. Since Volta an instruction takes 16 bytes, and its opcode is the lowest
12 bits. The opcodes named here were compared with nvdisasm 12.8 (tests/test_volta_cubins.py repeats that where one is installed).
"""

import re
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

HMMA_884, LOAD_GLOBAL, LOAD_SHARED, STORE_SHARED, BARRIER = 0x236, 0x381, 0x984, 0x388, 0xB1D
LOAD_LOCAL, STORE_LOCAL = 0x983, 0x387
INSTRUCTION_BYTES = 16


def sections(cubin: bytes) -> dict[str, bytes]:
    """Section name -> content. Raises ValueError for what is no 64-bit ELF."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    offset, = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = cubin[headers[names_at][4] :]
    named = {names[header[0] :].split(b"\0", 1)[0].decode(): header for header in headers}
    return {name: cubin[start : start + length] for name, (_, kind, _, _, start, length) in named.items() if kind != 8}


def opcodes(cubin: bytes) -> dict[str, list[int]]:
    """Kernel -> the opcode of each of its instructions, in order."""
    found = {}
    for name, code in sections(cubin).items():
        if name.startswith(".text."):
            starts = range(0, len(code), INSTRUCTION_BYTES)
            found[name.removeprefix(".text.")] = [struct.unpack_from("<Q", code, at)[0] & 0xFFF for at in starts]
    return found


def nvdisasm() -> str | None:
    """A disassembler that may be there: on PATH, or the one that triton carries (newer ones refuse sm_70)."""
    spec = find_spec("triton")
    places = (spec.submodule_search_locations or ()) if spec else ()
    carried = [Path(place) / "backends" / "nvidia" / "bin" / "nvdisasm" for place in places]
    return next((str(path) for path in carried if path.exists()), None) or shutil.which("nvdisasm")


_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_BACK = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


def listed(text: str) -> tuple[list[str], list[list[str]]]:
    """Of nvdisasm's listing (-c): the opcodes in order, and those of each loop, from a label to a branch back to it."""
    opcodes, labels, spans = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            if (back := _BACK.search(line)) and back[1] in labels:
                spans.append((labels[back[1]], len(opcodes) + 1))
            opcodes.append(instruction[1])
    return opcodes, [opcodes[begin:end] for begin, end in spans]
