"""volta-emulated: the volta backend on CPU tensors, its kernels run by csrc/simt's executor. For tests; never chosen automatically."""

from contextlib import contextmanager

from hetero_attn_volta import VoltaBackend

from hetero_attn import registry
from hetero_attn.testing.simt import SimtLauncher

NAME = "volta-emulated"


@contextmanager
def volta_emulated(launcher: SimtLauncher | None = None, name: str = NAME):
    """Registers the backend for the block; gives its launcher, which keeps what was launched."""
    launcher = launcher or SimtLauncher()
    with registry.register(name, lambda: VoltaBackend(launcher)):
        yield launcher
