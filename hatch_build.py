"""What a wheel carries besides the sources: with HETERO_ATTN_PREBUILD=1 the native kernels, compiled here.

Otherwise this does nothing and the wheel stays pure: it compiles on the user's machine on first use. Prebuilt objects lie where
hetero_attn/jit.py looks first, each with a manifest; C ABI and ctypes, so one wheel serves every Python, hence py3-none. The platform tag
is plain linux_*: it promises this machine's glibc or newer (no manylinux). An object that does not load at the user's is passed over.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "hetero_attn/csrc/prebuilt"


class PrebuiltKernels(BuildHookInterface):
    """Runs `hetero-attn build` over everything that the checkout's backends declare. It imports torch: build with --no-build-isolation."""

    def initialize(self, version, build_data):
        if os.environ.get("HETERO_ATTN_PREBUILD", "") in ("", "0") or version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory(prefix="hetero-attn-prebuild-")
        root, folder = Path(self.root), Path(self._folder.name)
        kernels = [kernel for kernel in self._build(root, folder) if Path(kernel["root"]) == (root / "csrc").resolve()]
        if not kernels:
            self.app.display_warning("HETERO_ATTN_PREBUILD is set, and no backend declares a kernel of csrc/: the wheel stays pure")
            return
        for kernel in kernels:
            made = Path(kernel["path"])
            manifest = folder / kernel["name"] / (kernel["digest"] + ".json")
            for file in (made, manifest):
                build_data["force_include"][str(file)] = f"{FOLDER}/{kernel['name']}/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version, build_data, artifact_path):
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _build(self, root: Path, folder: Path) -> list[dict]:
        """Every declared kernel, compiled into `folder`: the rows of `hetero-attn build --json`. Its errors go to stderr."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "backends")])}
        # the checkout's own backends: the building environment may have others installed, whose sources lie elsewhere
        names = [path.name.removeprefix("hetero_attn_") for path in sorted((root / "backends").glob("hetero_attn_*"))]
        command = [sys.executable, "-m", "hetero_attn", "build", "--arch", "all", "--into", str(folder), "--json", "--backend", *names]
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError("HETERO_ATTN_PREBUILD is set, and the kernels could not be built (see above); they need a C++ compiler, and "
                               "torch and NVRTC 12 in this environment (pip install '.[dev]'; pip wheel --no-build-isolation)")
        return json.loads(done.stdout)["kernels"]
