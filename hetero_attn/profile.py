"""DeviceProfile: one device as data, and where each of its values came from.

Kernels differ per device and so do the choices around them: which backends in which order, block sizes, time-outs, on-chip sizes. They
stand in a YAML file each, not in code, and are resolved once, in this order (the first that states a value wins):
    --set  >  environment (HETERO_ATTN_SET)  >  the user's tuned overlay  >  the file (and what it extends)  >  the defaults below.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hetero_attn.hardware import Alignments, Hardware, Link
from hetero_attn.overlay import OverlayKey, nested, read_overlay, write_overlay
from hetero_attn.profile_detect import Detect, choose, device_name, present_device, shipped_profiles, unknown_profile
from hetero_attn.profile_fields import Origins, ProfileError, check_fields, leaves, sections, setting
from hetero_attn.profile_overlap import Overlap
from hetero_attn.profile_yaml import Entry, compose, entries, pairs, parse_set, plain, read_text
from hetero_attn.quantity import SIZE_FORM, SIZE_PATTERN

__all__ = ["Alignments", "Detect", "DeviceProfile", "Hardware", "Link", "Overlap", "ProfileError",
           "detect", "load_profile", "save_overlay", "shipped_profiles", "without_overlay"]

BACKEND_NAME = {"pattern": r"[a-z0-9][a-z0-9_-]*", "form": "lower-case letters, digits, _ and -"}
WHOLE_PAGES = ("shared_stage_bytes", "shared_heap_bytes", "symmetric_room_bytes", "symmetric_heap_bytes")     # multiples of 4096
PLACEMENT_PATTERN = r"auto|all-device|[0-9]+(-host-layers)?"
PLACEMENT_FORM = "auto, all-device, or how many layers' KV lie in host memory, as in 20 or 20-host-layers"
NOT_INHERITED = ("name", "verified", "detect")        # a file that extends another is another device, which nobody has verified by it


@dataclass(frozen=True)
class DeviceProfile:
    """One device and how this project uses it. Raises ProfileError for a value that is wrong in itself or beside another.

    Two profiles are equal if their values are; `origins` (key path -> where the value came from) takes no part in that."""

    name: str = setting("Name of the profile; the file's name if it is not stated",
                        pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]*", form="letters, digits, _ . and -")
    device: Literal["cpu", "cuda", "npu"] = setting("torch device type that the model's tensors live on")
    description: str = setting("What the device is, in a line", default="")
    verified: str = setting("On which real device this profile has run, when and with what; 'none' where nobody has", default="none")
    detect: Detect = field(default_factory=Detect, metadata={"doc": "Devices that get this profile by themselves"})
    backends: tuple[str, ...] = setting("Attention backends in order of preference; the first without an objection runs", default=("sdpa",),
                                        **BACKEND_NAME)
    awaits: tuple[str, ...] = setting("Backends this device wants that do not exist yet; shown as absent", default=(), **BACKEND_NAME)
    communicators: tuple[str, ...] = setting("Communicators in order of preference", default=("distributed",), **BACKEND_NAME)
    algorithm: Literal["auto", "native", "one_shot", "two_shot", "star", "ring", "tree", "doubling"] = setting(
        "Algorithm of collectives over torch.distributed: native = its own; auto = chosen for each size of message from the measured link, "
        "native on one host", default="auto")
    codec: Literal["none", "auto", "int8_group32", "int4_group32", "int4_outliers"] = setting(
        "How sums of partial results are packed for the wire: none = as they are; auto = a lossy codec where the measured link gains by it",
        default="none")
    schedule: Literal["plain", "weave", "tiled", "auto"] = setting(
        "How long steps are run: plain = one sum after the other; weave = in parts, one computed while another is summed; tiled = each "
        "row-parallel product in tiles; auto = what costs least by what was measured, plain where nothing was", default="auto")
    strict: bool = setting("Forbid falling through to a backend after the first", default=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("dtype of the model; auto = the checkpoint's", default="auto")
    vocabulary: Literal["sharded", "master"] = setting("Embedding and output head over all ranks, or on rank 0 alone", default="sharded")
    kv_block_size: int = setting("Tokens in one page of the KV cache", default=64, minimum=1)
    prefill_chunk: int = setting("Most tokens of one prefill step; a longer prompt takes several", default=512, minimum=1)
    timeout_s: float = setting("Longest wait inside one collective, seconds", default=30.0, above=0)
    shared_stage_bytes: int = setting("Communicator cpu: one of the two staging buffers of a rank in shared memory, bytes, a multiple of "
                                      "4096; with a chunk of the tensor they are to stay in a core's second-level cache",
                                      default=1 << 19, minimum=4096)
    shared_heap_bytes: int = setting("Communicator cpu: a rank's room for tensors in shared memory, bytes, a multiple of 4096; it "
                                     "grows when a tensor does not fit", default=4 << 20, minimum=4096)
    symmetric_stage_bytes: int = setting("Communicator hopper: the longest all-reduce of two ranks that is one exchange of everything, "
                                         "bytes; of more ranks less", default=1 << 18, minimum=256)
    symmetric_room_bytes: int = setting("Communicator hopper: the largest tensor that a call takes, bytes, a multiple of 4096; so much of "
                                        "a device's memory is kept for tensors that are not symmetric by themselves",
                                        default=64 << 20, minimum=4096)
    symmetric_heap_bytes: int = setting("Communicator hopper: a rank's room for tensors in symmetric memory, bytes, a multiple of 4096",
                                        default=256 << 20, minimum=4096)
    threads_per_rank: int = setting("CPU threads of one rank; 0 = cores divided by the ranks of this host", default=0, minimum=0)
    memory_budget: str | None = setting("Memory of one rank's whole process; weights beyond it are streamed from disk; null = all held",
                                        default=None, pattern=SIZE_PATTERN, form=SIZE_FORM)
    window: int | None = setting("Blocks (attention or MLP of a layer) in the streaming window; null = what is quickest within the budget",
                                 default=None, minimum=1)
    placement: str = setting("Where a layer's KV lives: auto = on the device as far as it fits, else in host memory; all-device; or how "
                             "many layers' KV lie in host memory", default="auto", pattern=PLACEMENT_PATTERN, form=PLACEMENT_FORM,
                             counted="{}-host-layers")
    device_memory: str | None = setting("Memory of one rank's device that weights, activations and KV may take; null = all that is free "
                                        "(on the cpu: no bound)", default=None, pattern=SIZE_PATTERN, form=SIZE_FORM)
    hardware: Hardware = field(default_factory=Hardware, metadata={"doc": "The device's numbers, each with its source beside it"})
    link: Link = field(default_factory=Link, metadata={"doc": "The link between ranks, measured by `hetero-attn tune` into the overlay"})
    overlap: Overlap = field(default_factory=Overlap, metadata={"doc": "Thresholds and sizes of the schedules"})
    origins: Mapping[str, str] = field(default_factory=Origins, compare=False, repr=False)

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "origins", Origins(self.origins))
        if not self.backends:
            raise ProfileError("backends is [], expected at least one; every device runs [sdpa]", key="backends")
        if not self.communicators:
            raise ProfileError("communicators is [], expected at least one; every device runs [distributed]", key="communicators")
        if "reference" in self.backends:
            raise ProfileError("backends names reference, which is never chosen automatically; ask for it by name, as in "
                               "attention(..., backend='reference')", key="backends")
        for name in WHOLE_PAGES:
            if getattr(self, name) % 4096:
                raise ProfileError(f"{name} is {getattr(self, name)}, expected a multiple of 4096", key=name)
        if self.codec not in ("none", "auto") and self.algorithm in ("native", "ring", "tree"):
            raise ProfileError(f"codec is {self.codec} beside algorithm {self.algorithm}, which sends partial sums as they are; expected "
                               "algorithm auto, one_shot, two_shot or star, or codec none", key="codec")
        # Who lists a backend has it: `--set backends=[volta,sdpa]` ends the waiting.
        object.__setattr__(self, "awaits", tuple(name for name in self.awaits if name not in self.backends))
        if self.device != "cuda" and self.detect.cuda_capability is not None:
            raise ProfileError(f"detect.cuda_capability is stated for device {self.device}, expected device cuda",
                               key="detect.cuda_capability")

    def resolved(self) -> list[tuple[str, Any, str]]:
        """(key path, value, origin) of every value: 'built-in', 'v100.yaml:12', 'overlay FILE:3', 'environment HETERO_ATTN_SET', '--set',
        or 'Python' for one that was given to the constructor."""
        rows = []
        for path, leaf in leaves(type(self)).items():
            value = functools.reduce(getattr, path.split("."), self)
            rows.append((path, value, self.origins.get(path) or ("built-in" if value == leaf.default else "Python")))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The values as YAML and JSON hold them (lists for tuples, origins left out); a file with them loads as an equal profile."""
        return nested({path: value for path, value, _ in self.resolved()})


def load_profile(profile: str | os.PathLike | DeviceProfile | None = None, *, sets: Iterable[str] = (),
                 device: torch.device | str | None = None, world_size: int = 1, model: str | None = None) -> DeviceProfile:
    """The resolved profile of a device.

    profile: the name of a shipped one, the path of a YAML file, or None: HETERO_ATTN_PROFILE, else the one that fits `device` (None: the
    best of this machine). A DeviceProfile is taken as resolved already, and only `sets` is laid over it.
    sets: 'key.path=value' assignments, as --set gives them; the last of two equal keys wins. world_size, model: whose tuned overlay to use.
    Raises ProfileError, in one line, for an unknown name or key, a wrong value (with file and line) or a damaged overlay."""
    known = leaves(DeviceProfile)
    sets = [sets] if isinstance(sets, str) else list(sets)
    if isinstance(profile, DeviceProfile):
        values = {path: Entry(value, origin) for path, value, origin in profile.resolved()}
        return _build(values | dict(parse_set(text, known) for text in sets), profile.name)
    profile = profile if profile is not None else os.environ.get("HETERO_ATTN_PROFILE") or None
    path = _find(profile if profile is not None else detect(device))
    values = _read_file(path, _label(path))
    assigned: dict[str, Entry] = {}
    for text in filter(str.strip, os.environ.get("HETERO_ATTN_SET", "").split(";")):
        assigned |= [parse_set(text.strip(), known, "environment HETERO_ATTN_SET")]
    assigned |= [parse_set(text, known) for text in sets]
    here = _device_here(values, device)
    if here is not None:
        for key in OverlayKey(values["name"].value, here, world_size, model).generalisations():
            values |= read_overlay(key, known)
    return _build(values | assigned, _label(path))


def without_overlay(profile: DeviceProfile, section: str) -> DeviceProfile:
    """The profile with what the user's tuned overlay says of a section taken back: the shipped file of its name, or what is built in."""
    known, path = leaves(DeviceProfile), shipped_profiles().get(profile.name)
    below = {} if path is None else _read_file(path, path.name)
    values = {key: Entry(value, origin) for key, value, origin in profile.resolved()}
    for key, entry in list(values.items()):
        if key.startswith(section + ".") and entry.origin.startswith("overlay "):
            values[key] = below.get(key, Entry(known[key].default, "built-in"))
    return _build(values, profile.name)


def detect(device: torch.device | str | None = None) -> str:
    """The name of the shipped profile for a device of this machine (None: the best there is: cuda, npu if torch_npu is loaded, else cpu).

    Raises ProfileError if torch does not see the device, or no shipped profile is for its kind."""
    found = present_device(device)
    if found.type == "cpu":
        return "cpu"
    capability = "{}.{}".format(*torch.cuda.get_device_capability(found)) if found.type == "cuda" else None
    return choose(found.type, device_name(found), capability, _detect_sections())


def save_overlay(profile: DeviceProfile, values: Mapping[str, Any], *, device: torch.device | str | None = None,
                 world_size: int | None = None, model: str | None = None, notes: Mapping[str, str] | None = None) -> Path:
    """Write measured values (key path -> value) into the user's overlay of this profile and device, and return the file's path.

    device: where it was measured (None: the first of the profile's type). world_size or model None: the values hold for any.
    notes: key path -> how it was measured. Raises ProfileError if the device is absent or a value is none of the profile's."""
    here = device_name(present_device(device if device is not None else profile.device))
    return write_overlay(OverlayKey(profile.name, here, world_size, model), values, leaves(DeviceProfile), notes)


@functools.cache
def _detect_sections() -> dict[str, tuple[str, Detect]]:
    profiles = {name: _build(_read_file(path, path.name), path.name) for name, path in shipped_profiles().items()}
    return {name: (profile.device, profile.detect) for name, profile in profiles.items()}


def _device_here(values: Mapping[str, Entry], device: torch.device | str | None) -> str | None:
    """The name of the device that the profile would run on here; None if this machine has none, so that nothing was measured on it."""
    kind = values["device"].value
    try:
        return device_name(present_device(device if str(device).partition(":")[0] == kind else kind))
    except ProfileError:
        return None


def _find(profile: str | os.PathLike, beside: Path | None = None) -> Path:
    """A shipped name or a path -> the file; a relative path is looked up beside the file that names it, if one does."""
    text = os.fspath(profile)
    shipped = shipped_profiles()
    if isinstance(profile, str) and text in shipped:
        return shipped[text]
    if isinstance(profile, str) and not text.endswith((".yaml", ".yml")) and os.sep not in text:
        raise ProfileError(unknown_profile(text, shipped))
    path = Path(text).expanduser()
    path = beside / path if beside is not None else path
    if not path.is_file():
        raise ProfileError(f"profile file {path} does not exist; shipped profiles are {', '.join(shipped)}")
    return path


def _label(path: Path) -> str:
    """How a file is named in errors and origins: a shipped one by its name, the user's own by the path given."""
    return path.name if path in shipped_profiles().values() else str(path)


def _read_file(path: Path, label: str, chain: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """The values of a file laid over those of the one it extends; `name` and `device` are always among them."""
    root = compose(read_text(path, label), label)
    values = entries(root, leaves(DeviceProfile), label, also=("extends",))
    for key, line, node in pairs(root, label):
        if key == "extends":
            where = f"{label}:{line}"
            base = plain(node, where, "extends", "the name of a profile or the path of one")
            if not isinstance(base, str):
                raise ProfileError(f"{where}: extends is {base!r}, expected the name of a profile or the path of one", key="extends")
            try:
                found = _find(base, path.parent)
            except ProfileError as error:
                raise ProfileError(f"{where}: extends: {error}", key="extends") from None
            chain = (*chain, path.resolve())
            if found.resolve() in chain:
                circle = " -> ".join(p.name for p in (*chain, found))
                raise ProfileError(f"{where}: extends goes in a circle: {circle}", key="extends")
            inherited = _read_file(found, _label(found), chain)
            values = {k: v for k, v in inherited.items() if k.partition(".")[0] not in NOT_INHERITED} | values
    if "device" not in values:
        expected = leaves(DeviceProfile)["device"].expected()
        raise ProfileError(f"{label}: device is missing, expected {expected}; or say `extends: PROFILE`", key="device")
    values.setdefault("name", Entry(path.stem, f"{label} (its name)"))
    return values


def _build(values: Mapping[str, Entry], label: str) -> DeviceProfile:
    """The profile of checked values. What is wrong only beside another value is reported at the origin of the value complained of."""
    origins = {path: values[path].origin if path in values else "built-in" for path in leaves(DeviceProfile)}
    try:
        profile = _construct(DeviceProfile, values)
    except ProfileError as error:
        raise ProfileError(f"{values[error.key].origin if error.key in values else label}: {error}", key=error.key) from None
    return dataclasses.replace(profile, origins=origins)


def _construct(cls: type, values: Mapping[str, Entry], prefix: str = "") -> Any:
    given = {name: _construct(nested_cls, values, f"{prefix}{name}.") for name, nested_cls in sections(cls).items()}
    for f in dataclasses.fields(cls):
        if prefix + f.name in values:
            given[f.name] = values[prefix + f.name].value
    return cls(**given)
