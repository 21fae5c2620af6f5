"""Imports fall one way, and importing the package stays light.

Read from the source, so that a lazy import inside a function is seen too; `if TYPE_CHECKING` imports are not imports.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of the project: itself and what stands on a lower floor.
FLOORS = [
    {"spec", "environment", "profile_fields", "hardware", "profile_yaml", "profile_detect", "profile", "profile_overlap", "overlay",
     "profile_schema", "norm", "product", "collective_arguments", "host_memory", "quantity",
     "in_flight"},
    {"backend", "communicator", "jit", "cubin", "artifacts", "compiler"},
    {"reference"},
    {"registry"},
    {"arguments", "ops", "library", "explain", "collectives"},
    {"parallel"},
    {"models"},
    {"integrations", "cli", "testing", "__main__"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
BACKENDS_MAY_IMPORT = {"spec", "profile", "backend", "communicator", "jit", "cubin", "artifacts", "environment", "norm", "product",
                       "collective_arguments", "in_flight"}


def imported_parts(path: Path) -> set[str]:
    """The parts of hetero_attn ('spec', 'models', …) and the backend packages that a source file imports, wherever in the file."""
    tree = ast.parse(path.read_text())
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden.update(id(inner) for inner in ast.walk(node))
    parts = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "hetero_attn":
                names = [f"hetero_attn.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import; the project writes full names"
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "hetero_attn" and len(pieces) > 1:
                parts.add(pieces[1])
            elif pieces[0].startswith("hetero_attn_"):
                parts.add(pieces[0])
    return parts


def part_of(path: Path) -> str:
    pieces = path.relative_to(ROOT / "hetero_attn").parts
    return pieces[0].removesuffix(".py")


SOURCES = sorted((ROOT / "hetero_attn").rglob("*.py"))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py" or p.parent.name != "hetero_attn"], ids=str)
def test_imports_fall_one_way(path):
    own = part_of(path)
    assert own in FLOOR_OF, f"{path.name}: give {own!r} a floor in this test's table"
    for part in imported_parts(path):
        assert not part.startswith("hetero_attn_"), f"{path}: the core imports the backend package {part}"
        if part in FLOOR_OF:                                  # names such as `attention` come from the face, above every floor but the last
            assert FLOOR_OF[part] <= FLOOR_OF[own], f"{path}: {own} (floor {FLOOR_OF[own]}) imports {part} (floor {FLOOR_OF[part]})"


@pytest.mark.parametrize("path", sorted((ROOT / "backends").rglob("*.py")), ids=str)
def test_a_backend_imports_the_contract_only(path):
    package = path.relative_to(ROOT / "backends").parts[0]
    for part in imported_parts(path):
        assert part in BACKENDS_MAY_IMPORT or part == package, f"{path} imports {part}; a backend may import {sorted(BACKENDS_MAY_IMPORT)}"


def test_the_check_sees_a_fault(tmp_path):
    faulty = tmp_path / "faulty.py"
    faulty.write_text("def f():\n    from hetero_attn.models import decoder\n    import hetero_attn_sdpa\n")
    assert imported_parts(faulty) == {"models", "hetero_attn_sdpa"}


def test_import_is_light():
    heavy = ["triton", "cupy", "torch_npu", "transformers", "tokenizers", "safetensors", "hypothesis", "hetero_attn_sdpa"]
    program = f"import sys, hetero_attn; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment())
    assert result.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
