"""hosts.yaml: the ranks of a plan, each with its profile and device, and the link between them. Strict, like a profile.

    link: {latency_ms: 1, bandwidth_mbps: 300, message_ms: 0.2}     # or measured by `hetero-attn tune` (leave it out)
    ranks:
      - {profile: edge, memory: 3GiB, set: {hardware.memory_gbps: 20, hardware.disk_gbps: 0.5, hardware.fp32_tflops: 0.2}}
      - {profile: v100, device: "cuda:0", host: big}               # ranks of one host share its memory and its disk
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hetero_attn import registry
from hetero_attn.collectives import BASE
from hetero_attn.collectives.cost import LinkModel, from_settings
from hetero_attn.models.config import ModelError
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.quantity import parse_bytes

TOP, RANK = ("ranks", "link"), ("profile", "device", "host", "memory", "set")
LINK = ("latency_ms", "bandwidth_mbps", "message_ms", "crowd_ms", "root_mbps")


@dataclass(frozen=True)
class Host:
    """One rank: its resolved profile, where it runs, bytes of memory it may use (None: all that the device has), and the machine that its
    device is in ('': the one of all ranks that do not say)."""

    profile: DeviceProfile
    device: str
    memory: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Hosts:
    """The ranks in order; link None: nothing is known of it."""

    ranks: tuple[Host, ...]
    link: LinkModel | None = None


def kept_by_communicator(hosts: Hosts) -> tuple[str, int]:
    """Whose communicator these ranks would have, as rank 0's profile prefers them, and the bytes it keeps of each rank's device; ('', 0)
    where it keeps none. Of several hosts it is torch.distributed's."""
    profiles = [each.profile for each in hosts.ranks]
    if len(profiles) == 1 or len({each.name for each in hosts.ranks}) > 1:
        return "", 0
    for name in profiles[0].communicators:
        if name == BASE:
            break
        if all(name in profile.communicators and profile.device == profiles[0].device for profile in profiles):
            kept = registry.find(name).communicator_bytes(profiles[0], len(profiles))
            if kept:
                return name, kept
    return "", 0


def read_hosts(path: str | Path) -> Hosts:
    """Reads the file. Raises ModelError naming file and key, ProfileError for what a profile refuses."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    _keys(path, content, TOP, "the file")
    ranks = content.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise ModelError(f"{path}: ranks is {ranks!r}, expected a list with an entry a rank")
    link = content.get("link")
    return Hosts(tuple(_host(path, number, each) for number, each in enumerate(ranks)), None if link is None else _link(path, link))


def _host(path: str | Path, number: int, given: Any) -> Host:
    where = f"ranks[{number}]"
    _keys(path, given, RANK, where)
    if not isinstance(given.get("profile"), str):
        raise ModelError(f"{path}: {where}.profile is {given.get('profile')!r}, expected a shipped profile's name or a file")
    sets = given.get("set", {})
    if not isinstance(sets, dict):
        raise ModelError(f"{path}: {where}.set is {sets!r}, expected profile keys with values, such as {{hardware.memory_gbps: 20}}")
    name = given["profile"]
    beside = Path(path).parent / name
    assigned = [f"{key}={value}" for key, value in sets.items()]
    profile = load_profile(str(beside) if name.endswith((".yaml", ".yml")) else name, sets=assigned)
    device = given.get("device", profile.device)
    if str(device).partition(":")[0] != profile.device:
        raise ModelError(f"{path}: {where}.device is {device!r}, profile {profile.name!r} is for {profile.device}")
    try:
        memory = None if given.get("memory") is None else parse_bytes(str(given["memory"]))
    except ValueError as error:
        raise ModelError(f"{path}: {where}.memory: {error}") from None
    return Host(profile, str(device), memory, str(given.get("host", "")))


def _link(path: str | Path, given: Any) -> LinkModel:
    _keys(path, given, LINK, "link")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (key.endswith("mbps") and not value):
            raise ModelError(f"{path}: link.{key} is {value!r}, expected a number {'above 0' if key.endswith('mbps') else 'of 0 or more'}")
    if "latency_ms" not in given:
        raise ModelError(f"{path}: link has no latency_ms, one message's way in milliseconds, which decides most")
    return from_settings(given["latency_ms"], given.get("message_ms", 0.0), given.get("crowd_ms", 0.0), given.get("bandwidth_mbps"),
                         given.get("root_mbps") or given.get("bandwidth_mbps"))


def _keys(path: str | Path, given: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        raise ModelError(f"{path}: {where} is {given!r}, expected keys: {', '.join(known)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ModelError(f"{path}: {where} has an unknown key {key!r}; " + (f"did you mean {near[0]}?" if near else
                                                                               f"known are {', '.join(known)}"))
