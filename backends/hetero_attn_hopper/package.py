"""Packages of attention kernels that somebody may have installed: what all of them are asked, and which one serves a call.

A package is looked for once, when a call first needs it. It says why it is not here (reasons) and why it does not express a call
(objections); the first without either serves. flash-attn stands before flashinfer, because it reads lengths on the device: it does not wait
for the device and a CUDA graph may hold it, and flashinfer plans on the host.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hetero_attn.spec import AttentionSpec

Version = tuple[int, ...]


class Package(Protocol):
    """name: in words to the user."""

    name: str

    def reasons(self) -> list[str]:
        """Why it is not here; [] = it is."""

    def objections(self, spec: AttentionSpec) -> list[str]:
        """Why it does not express a call that attention.needs_package() says is a package's; [] = it does."""

    def remarks(self, spec: AttentionSpec) -> list[str]:
        """What the user should know of a call that it serves."""

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int,
        max_k: int, is_causal: bool, scale: float, window: tuple[int, int], *, softcap: float, slopes: torch.Tensor | None,
        table: torch.Tensor | None, used: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As TorchOperators.flash, and softcap (0.0 = none), slopes fp32 [Hq] or [B, Hq]; table int32 [B, pages a sequence] and used int32
        [B], the lengths, for k, v [pages, page, Hkv, D]. Rows that see no key are 0 with an lse of +inf. No lse is given with slopes."""


class Installed:
    """The look at a module. module: what to import; tests give another name."""

    name, wanted = "", ""
    oldest: Version = ()
    below: Version = (1 << 30,)
    needed: tuple[str, ...] = ()

    def __init__(self, module: str) -> None:
        self._name, self._module, self._reasons = module, None, None

    @property
    def module(self) -> Any:
        """The module, once reasons() has found it."""
        assert not self.reasons(), self.reasons()
        return self._module

    def reasons(self) -> list[str]:
        if self._reasons is None:
            self._reasons = self._find()
        return list(self._reasons)

    def _find(self) -> list[str]:
        try:
            module = importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            if error.name == self._name:
                return [f"install {self.wanted}"]
            return [f"{self.name} does not import ({error}); install it anew"]
        except Exception as error:                   # built for another torch or CUDA: an undefined symbol, usually
            words = (str(error).splitlines() or [""])[0]
            return [f"{self.name} does not import ({type(error).__name__}: {words}); build it for this torch"]
        version = str(getattr(module, "__version__", "unknown"))
        found = tuple(map(int, re.match(r"(\d+)\.(\d+)\.(\d+)", version).groups())) if re.match(r"\d+\.\d+\.\d+", version) else ()
        if not self.oldest <= found < self.below or not all(callable(getattr(module, name, None)) for name in self.needed):
            return [f"{self.name} is {version}, install {self.wanted}"]
        self._module = module
        return []


def serving(packages: Sequence[Package], spec: AttentionSpec) -> Package | None:
    """The first that is here and expresses the call."""
    return next((each for each in packages if not each.reasons() and not each.objections(spec)), None)
