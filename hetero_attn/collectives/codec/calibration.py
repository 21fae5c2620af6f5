"""What a calibration holds, and its file: for every site the ranges and scales of each rank's partial sums and of their total, by feature.

The ranges (measure.py) choose the outliers; the scales are what values are packed with. The file is safetensors and lies beside the overlay
of the same key. Rank 0's file counts: the others get it over the wire, as bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hetero_attn.collectives.codec.features import FeatureTable, outliers_of, symmetric_scale
from hetero_attn.overlay import OverlayKey

FORMAT = "hetero-attn calibration 1"
BY_RANK, OF_SUM = ("lowest", "highest", "scale", "mean"), ("sum_lowest", "sum_highest", "sum_scale", "sum_mean")
PARTS = (*BY_RANK, *OF_SUM, "outliers")


class CalibrationError(ValueError):
    """A calibration that cannot be used. One line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class SiteRanges:
    """One site. lowest, highest, scale, mean: fp32 [N, E], a row a rank; sum_…, the same of the sum: fp32 [E]; outliers: int32 [k],
    ascending."""

    lowest: torch.Tensor
    highest: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    sum_lowest: torch.Tensor
    sum_highest: torch.Tensor
    sum_scale: torch.Tensor
    sum_mean: torch.Tensor
    outliers: torch.Tensor

    @property
    def ranges(self) -> torch.Tensor:
        """R_j = Σ_i 2·max(|min_ij|, |max_ij|), fp32 [E]."""
        return total_range(self.lowest, self.highest)

    @classmethod
    def symmetric(cls, lowest: torch.Tensor, highest: torch.Tensor, sum_lowest: torch.Tensor, sum_highest: torch.Tensor) -> SiteRanges:
        """The paper's scales, symmetric about 0, and the outlier set that the ranges call for."""
        scale, sum_scale = symmetric_scale(lowest, highest), symmetric_scale(sum_lowest, sum_highest)
        return cls(lowest, highest, scale, torch.zeros_like(scale), sum_lowest, sum_highest, sum_scale, torch.zeros_like(sum_scale),
                   outliers_of(total_range(lowest, highest)))

    def tables(self, row_factors: bool = True) -> tuple[list[FeatureTable], FeatureTable]:
        """The table of each sender, and that of sums."""
        senders = [FeatureTable(scale, mean, self.outliers, row_factors=row_factors) for scale, mean in zip(self.scale, self.mean)]
        return senders, FeatureTable(self.sum_scale, self.sum_mean, self.outliers, row_factors=row_factors)


def total_range(lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """lowest, highest [N, E] -> R_j = Σ_i 2·max(|min_ij|, |max_ij|) [E]."""
    return 2 * torch.maximum(lowest.abs(), highest.abs()).sum(0)


@dataclass(frozen=True)
class Calibration:
    """The sites of one model at one number of ranks; facts: how it was measured (model, fingerprint, date, text, chunks, ...).

    row_factors: rows travel with a factor each; without, scales are to be such that values fit them (SiteRanges.symmetric), and what does
    not saturates.
    """

    world_size: int
    sites: Mapping[str, SiteRanges]
    facts: Mapping[str, Any] = field(default_factory=dict)
    row_factors: bool = True
    _tables: dict[str, tuple[list[FeatureTable], FeatureTable]] = field(default_factory=dict, repr=False, compare=False)

    def tables(self, site: str, width: int, world_size: int) -> tuple[list[FeatureTable], FeatureTable]:
        """What OutlierCoding needs at a site, made once. Raises CalibrationError for what was not calibrated so."""
        if world_size != self.world_size:
            raise CalibrationError(f"the calibration is of {self.world_size} ranks, these are {world_size}")
        if site not in self.sites:
            some = ", ".join(list(self.sites)[:3])
            raise CalibrationError(f"site {site!r} was not calibrated ({len(self.sites)} sites are: {some}, …); use codec int4_group32 or "
                                   "none for calls outside the model")
        found = self._tables.get(site)
        if found is None:
            found = self._tables[site] = self.sites[site].tables(self.row_factors)
        if found[1].features != width:
            raise CalibrationError(f"{site} was calibrated with {found[1].features} features, the tensor's rows have {width}")
        return found

    def to_bytes(self) -> bytes:
        """The file's content; from_bytes() makes an equal calibration of it on any rank."""
        tensors = {f"{site}.{part}": getattr(ranges, part).contiguous() for site, ranges in self.sites.items() for part in PARTS}
        facts = json.dumps({"world_size": self.world_size, "row_factors": self.row_factors, "sites": list(self.sites), **self.facts})
        return save(tensors, metadata={"format": FORMAT, "facts": facts})

    def write(self, path: Path) -> None:
        """Replace the file in one step: a reader, or a crash, sees the old one or the new one. OSError where it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def calibration_path(key: OverlayKey) -> Path:
    """The calibration's file: beside the overlay of this key, under the same name."""
    return key.path().with_suffix(".safetensors")


def from_bytes(content: bytes) -> Calibration:
    """What to_bytes() wrote. Raises CalibrationError for anything else."""
    with tempfile.TemporaryDirectory() as folder:                      # the format's own reader gives metadata from files alone
        path = Path(folder) / "calibration.safetensors"
        path.write_bytes(content)
        return read(path)


def read(path: Path) -> Calibration:
    """The calibration in a file. Raises CalibrationError, in one line, for a damaged one or another format."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CalibrationError(f"{path} is {metadata.get('format')!r}, expected {FORMAT!r}; calibrate again")
            facts = json.loads(metadata["facts"])
            world_size, names, row_factors = (facts.pop(name) for name in ("world_size", "sites", "row_factors"))
            sites = {name: SiteRanges(*(opened.get_tensor(f"{name}.{part}") for part in PARTS)) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path} is no calibration ({type(error).__name__}: {error}); delete it and calibrate again") from None
    for name, ranges in sites.items():
        _check(path, name, ranges, world_size)
    return Calibration(world_size, sites, facts, bool(row_factors))


def _check(path: Path, name: str, ranges: SiteRanges, world_size: int) -> None:
    width = ranges.sum_lowest.numel()
    shapes = [tuple(getattr(ranges, part).shape) for part in (*BY_RANK, *OF_SUM)]
    try:
        if shapes != [(world_size, width)] * len(BY_RANK) + [(width,)] * len(OF_SUM):
            raise ValueError(f"shapes {shapes} for {world_size} ranks")
        ranges.tables()
    except (ValueError, RuntimeError) as error:
        raise CalibrationError(f"{path}: {name} is damaged ({error}); delete it and calibrate again") from None


def fingerprint(config: Mapping[str, Any] | bytes, tensors: Sequence[torch.Tensor] = ()) -> str:
    """A short digest of what the ranges depend on: a calibration of one model is not to be used for another of the same name."""
    digest = hashlib.sha256(config if isinstance(config, bytes) else json.dumps(config, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
