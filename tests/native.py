"""A native kernel of a few lines and a compiler that keeps a diary, for the tests of what builds and carries kernels."""

from pathlib import Path

import pytest

from hetero_attn.jit import Kernel, compiler_reason, find_compiler

HEADER = "#define ANSWER 42\n"
SOURCE = '#include "inner/answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
needs_compiler = pytest.mark.skipif(compiler_reason() is not None, reason=compiler_reason() or "")


def write_sources(root: Path) -> Path:
    """csrc-like folder: tiny.cpp, which includes inner/answer.h."""
    (root / "inner").mkdir(parents=True)
    (root / "tiny.cpp").write_text(SOURCE)
    (root / "inner" / "answer.h").write_text(HEADER)
    return root


def tiny_kernel(root: Path, **changes) -> Kernel:
    """A kernel with one function, int answer(void) = 42; it compiles in a moment."""
    return Kernel(**{"name": "tiny", "sources": ["tiny.cpp"], "abi_version": 1, "root": root} | changes)


class DiaryCompiler:
    """The machine's compiler behind a script that notes each compilation in `diary`, and while `held` exists does not come back."""

    def __init__(self, folder: Path):
        self.path, self._diary, self.held = folder / "diary-c++", folder / "diary", folder / "held"
        real = " ".join(find_compiler().command)
        self.path.write_text(f"""#!/bin/sh
case "$*" in *--version*|*-dumpmachine*) exec {real} "$@";; esac
echo "$@" >> {self._diary}
while [ -e {self.held} ]; do sleep 0.05; done
exec {real} "$@"
""")
        self.path.chmod(0o755)

    def steps(self) -> list[str]:
        """'compile' or 'link' for each time it was called."""
        if not self._diary.exists():
            return []
        return ["link" if " -shared " in line else "compile" for line in self._diary.read_text().splitlines()]
