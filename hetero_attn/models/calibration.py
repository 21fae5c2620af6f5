"""Calibration of a model for the codec int4_outliers: run text through it under TP, watch the partial sums, keep their ranges.

Every o_proj and down_proj is watched where its summand is handed to the communicator, so what is measured is what will travel, rank 0's
bias included. Loading looks for the result under the same key (profile, device, number of ranks, model) and gives it to the communicator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hetero_attn.collectives.codec import CALIBRATED, EXACT_SITES
from hetero_attn.collectives.codec.calibration import (
    BY_RANK,
    Calibration,
    CalibrationError,
    SiteRanges,
    calibration_path,
    fingerprint,
    from_bytes,
    read,
    total_range,
)
from hetero_attn.collectives.codec.features import outliers_of
from hetero_attn.collectives.codec.measure import MovingRange
from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.weights import Checkpoint
from hetero_attn.overlay import OverlayKey
from hetero_attn.profile import DeviceProfile
from hetero_attn.profile_detect import device_name, present_device

SITE = "calibration"
CODECS_WITH = (CALIBRATED, "auto")                   # a profile's codec that looks for a calibration
log = logging.getLogger("hetero_attn")


class RangeObserver(Communicator):
    """Wraps a communicator, and keeps the moving ranges of every sum's summand (this rank's) and of the sum."""

    def __init__(self, base: Communicator) -> None:
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self.summands: dict[str, MovingRange] = {}
        self.sums: dict[str, MovingRange] = {}

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        """Sum as the base does. Raises ModelError where the model's values are not finite."""
        if site in EXACT_SITES or not x.is_floating_point():
            return self.base.all_reduce(x, site=site)
        trouble = self._watch(self.summands, site, x)
        self.base.all_reduce(x, site=site)           # what is not finite on one rank is so in the sum: every rank ends here, none waits
        trouble = trouble or self._watch(self.sums, site, x)
        if trouble:
            raise ModelError(trouble)
        return x

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        return self.all_reduce(x.clone(), site=site)[self.rows(x.shape[0])].clone()

    def _watch(self, ranges: dict[str, MovingRange], site: str, x: torch.Tensor) -> str:
        """Take x's rows in; what is wrong with them, '' if nothing is."""
        try:
            ranges.setdefault(site, MovingRange()).update(x)
        except ValueError as error:
            return f"rank {self.rank} at {site}: {error}; the model cannot be calibrated in this dtype, try --dtype float32"
        return ""

    def gathered(self) -> dict[str, SiteRanges]:
        """Every rank's numbers, on every rank. All ranks call it after the same calls."""
        sites = list(self.summands)
        if not sites:
            return {}
        own = torch.stack([torch.stack([getattr(self.summands[site], part) for part in BY_RANK]) for site in sites])
        every = self.base.all_gather(own[None], sizes=[1] * self.world_size, site=SITE)                # [N, sites, 4, E]
        found = {}
        for place, site in enumerate(sites):
            by_rank = [every[:, place, part].contiguous() for part in range(len(BY_RANK))]             # [N, E] each
            of_sum = [getattr(self.sums[site], part) for part in BY_RANK]                              # [E] each
            found[site] = SiteRanges(*by_rank, *of_sum, outliers_of(total_range(*by_rank[:2])))
        return found


def measure_ranges(model, chunks: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None) -> dict[str, SiteRanges]:
    """Run each chunk of token ids through the model, by itself; what its sites need. All ranks call it with the same chunks, or, under
    vocabulary 'master', with as many tokens: only rank 0 looks at them.

    model: loaded with a new RangeObserver as its communicator. progress(done, total) after each chunk.
    """
    observer = model.communicator
    if not isinstance(observer, RangeObserver):
        raise TypeError(f"measure_ranges: the model's communicator is {observer!r}, expected a RangeObserver")
    unseen = model.vocabulary == "master" and observer.rank > 0
    for done, chunk in enumerate(chunks, 1):
        cache = model.new_cache(len(chunk), 1)
        step = cache.step([cache.add_sequence()], [len(chunk)], None if unseen else torch.tensor(chunk), last_only=True)
        model(step, cache)
        if progress is not None:
            progress(done, len(chunks))
    return observer.gathered()


def chunks_of(ids: Sequence[int], chunks: int, chunk_tokens: int, begin: int | None) -> list[list[int]]:
    """Up to `chunks` runs of chunk_tokens ids, spread evenly over a text; each begins with `begin` (the tokenizer's BOS) if given."""
    body = chunk_tokens - (begin is not None)
    whole = len(ids) // body
    places = [place * whole // min(chunks, whole) for place in range(min(chunks, whole))]
    return [([] if begin is None else [begin]) + list(ids[place * body : (place + 1) * body]) for place in places]


# ---- finding it again ---------------------------------------------------------------------------------------------------------


def key_of(profile: DeviceProfile, model: str | Path, world_size: int, device: torch.device | str | None = None) -> OverlayKey:
    """Under what a model's calibration is kept. Raises ProfileError if the device is absent."""
    here = device_name(present_device(device if device is not None else profile.device))
    return OverlayKey(profile.name, here, world_size, Path(model).resolve().name)


def model_fingerprint(path: str | Path) -> str:
    """A digest of the model's config.json and its final norm's weights: other weights under the same name are another model."""
    path = Path(path)
    entry = Checkpoint(path).entries.get("model.norm.weight")
    tensors = []
    if entry is not None:
        with safe_open(entry.file, framework="pt") as opened:
            tensors.append(opened.get_tensor("model.norm.weight"))
    return fingerprint((path / "config.json").read_bytes(), tensors)


def find_calibration(profile: DeviceProfile, config: ModelConfig, world_size: int, device: torch.device | str | None = None) -> Calibration:
    """The calibration of this model for this many ranks. Raises ModelError, saying what to run, where there is none that fits."""
    path = calibration_path(key_of(profile, config.path, world_size, device))
    command = f"hetero-attn calibrate {config.path} --text FILE --tp {world_size} --profile {profile.name}"
    if not path.exists():
        raise ModelError(f"codec is {CALIBRATED}, and {config.path.resolve().name} has no calibration for {world_size} ranks ({path} does "
                         f"not exist); run {command}, or take codec int4_group32, which needs none")
    try:
        found = read(path)
    except CalibrationError as error:
        raise ModelError(str(error)) from None
    sites = {f"layers.{layer}.{name}" for layer in range(config.layers) for name in ("o_proj", "down_proj")}
    fits = found.world_size == world_size and sites <= set(found.sites) and found.facts.get("fingerprint") == model_fingerprint(config.path)
    if not fits or any(found.sites[site].sum_lowest.numel() != config.hidden_size for site in sites):
        raise ModelError(f"{path} was measured on another model of that name; run {command}")
    return found


def calibration_for_show(profile: DeviceProfile, model: Path, world_size: int, device: str | None = None) -> Calibration | None:
    """What share_calibration() would give the ranks of this model; None under a codec without one, and under auto where there is none."""
    if profile.codec not in CODECS_WITH:
        return None
    try:
        return find_calibration(profile, ModelConfig.from_dir(model), world_size, device)
    except ModelError:
        if profile.codec == CALIBRATED:
            raise
        return None


def share_calibration(
    profile: DeviceProfile, config: ModelConfig, communicator: Communicator, device: torch.device | str | None = None
) -> None:
    """Give the communicator rank 0's calibration, where rank 0's profile asks for one. All ranks call it together.

    Raises ModelError, on every rank alike, where the profile names int4_outliers and there is no calibration that fits.
    """
    if communicator.codecs is None or communicator.world_size == 1:
        return
    content, trouble = b"", ""
    if communicator.rank == 0 and profile.codec in CODECS_WITH:
        try:
            content = find_calibration(profile, config, communicator.world_size, device).to_bytes()
        except Exception as error:                   # whatever it is, the others are waiting to hear
            if profile.codec == CALIBRATED:
                trouble = str(error) or type(error).__name__
            else:
                log.info("no calibrated codec: %s", error)
    head = communicator.broadcast(torch.tensor([bool(trouble), len(trouble.encode() or content)]), site=SITE)
    if not int(head[1]):
        return
    told = _tell(communicator, trouble.encode() or content, int(head[1]))
    if int(head[0]):
        raise ModelError(told.decode())
    communicator.codecs.take(from_bytes(told))


def _tell(communicator: Communicator, content: bytes, length: int) -> bytes:
    payload = torch.empty(length, dtype=torch.uint8)
    if communicator.rank == 0:
        payload = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return communicator.broadcast(payload, site=SITE).numpy().tobytes()


def summary(calibration: Calibration) -> list[dict[str, Any]]:
    """A row a site: the median and the largest R_j, how many features are outliers, what share is beyond twice the median, bits a value.

    Bits are of whole rows, without the status byte of a message.
    """
    rows, row_bits = [], 16 if calibration.row_factors else 0
    for site, ranges in calibration.sites.items():
        spread, kept = ranges.ranges, ranges.outliers.numel()
        features, median = spread.numel(), spread.median().item()
        rows.append({
            "site": site, "features": features, "median_range": median, "largest_range": spread.max().item(), "outliers": kept,
            "beyond_twice_median": (spread > 2 * median).float().mean().item(),
            "outlier_features": ranges.outliers.tolist(), "bits_per_value": 4 + (12 * kept + row_bits) / features if features else 0.0,
        })
    return rows
