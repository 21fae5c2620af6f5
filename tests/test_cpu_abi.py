"""backends/hetero_attn_cpu/abi.py describes the structs of csrc/cpu/abi.h: fields, types, offsets and sizes, and the object agrees."""

import ctypes
import re

import pytest
from hetero_attn_cpu import abi

from hetero_attn import registry
from hetero_attn.jit import csrc_dir

HEADER = re.sub(r"//[^\n]*", "", (csrc_dir() / "cpu" / "abi.h").read_text())
C_TYPES = {"int32_t": ("int32", ctypes.c_int32), "int64_t": ("int64", ctypes.c_int64), "float": ("float", ctypes.c_float)}


def struct_of_header(name: str) -> tuple[list, type[ctypes.Structure]]:
    """The fields of a struct in abi.h in abi.py's terms, and the struct as the C compiler lays it out."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", HEADER, re.S)[1]
    table, fields = [], []
    for statement in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)\s*(.*)", statement, re.S).groups()
        for each in map(str.strip, names.split(",")):
            pointer, field, count = re.fullmatch(r"(\*?)\s*(\w+)(?:\[(\d+)\])?", each).groups()
            word, c_type = ("pointer", ctypes.c_void_p) if pointer or kind == "HaParallel" else C_TYPES[kind]
            table.append((field, word, int(count or 1)))
            fields.append((field, c_type * int(count) if count else c_type))
    return table, type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(("name", "table", "size"), [
    ("HaAttention", abi.ATTENTION, abi.ATTENTION_BYTES), ("HaLinear", abi.LINEAR, abi.LINEAR_BYTES)], ids=["attention", "linear"])
def test_structs_are_the_header_s(name, table, size):
    found, layout = struct_of_header(name)
    assert found == list(table)
    values = {field: [7 * i + j for j in range(count)] if count > 1 else 7 * i for i, (field, _, count) in enumerate(table)}
    packed = abi.repacked(table, values)
    assert len(packed) == size == ctypes.sizeof(layout)
    seen = layout.from_buffer_copy(packed)               # every value lies where C looks for it
    for field, expected in values.items():
        value = getattr(seen, field)
        assert (list(value) if isinstance(expected, list) else value or 0) == expected, field
    assert abi.fields_of(table, packed) == values


def test_constants_are_the_header_s():
    assert abi.ABI_VERSION == int(re.search(r"ABI_VERSION (\d+)", HEADER)[1])
    codes = {word: int(code) for word, code in re.findall(r"HA_(\w+) = (\d)", HEADER)}
    words = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "float64": "F64"}
    assert {str(dtype)[6:]: code for dtype, code in abi.MASK_DTYPES.items()} == {t: codes[w] for t, w in words.items()}


def test_a_built_object_agrees():
    """The loader compares, and refuses an object of other sizes."""
    from hetero_attn_cpu.library import Library

    from hetero_attn.jit import BuildError

    backend = registry.get("cpu")
    if backend.unavailable_reasons():
        pytest.skip("; ".join(backend.unavailable_reasons()))
    object_ = ctypes.CDLL(str(next(kernel for kernel in backend.kernels() if kernel.used_here).find()))
    each = backend._library.instruction_set
    assert Library(object_, each, 0).instruction_set is each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abi, "LINEAR_BYTES", abi.LINEAR_BYTES + 8)
        with pytest.raises(BuildError, match=r"struct sizes are \[.*\], expected \["):
            Library(object_, each, 0)


def test_only_the_interface_is_exported():
    """Several objects live in one process: a function of one must not be bound to another's."""
    import shutil
    import subprocess

    backend = registry.get("cpu")
    if backend.unavailable_reasons() or not shutil.which("nm"):
        pytest.skip("no object, or no nm")
    path = next(kernel for kernel in backend.kernels() if kernel.used_here).find()
    lines = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines}
    assert {"hetero_attn_cpu_attention", "hetero_attn_cpu_linear"} <= names
    assert all(name.startswith("hetero_attn_cpu_") for name in names), names
    assert not [line for line in lines if line.split()[-2] == "u"]
