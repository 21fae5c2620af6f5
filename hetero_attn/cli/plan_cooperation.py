"""What hetero-attn plan says of CPU-GPU cooperation: where the layers' KV lies, what contexts that makes possible, and at what price."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hetero_attn.models.cooperation import Cooperation
from hetero_attn.parallel.placement import ranges
from hetero_attn.quantity import shown_bytes, shown_seconds


def facts(shared: Cooperation) -> dict[str, Any]:
    """Cooperation for --json: bytes, tokens and seconds. Placements stand with the ranks."""
    found = {name: value for name, value in asdict(shared).items() if name != "placements"}
    for name in ("token", "token_on_devices"):
        if found[name] is not None:
            found[name]["total_s"] = getattr(shared, name).total_s
    return found


def text(shared: Cooperation) -> list[str]:
    """Cooperation in lines."""
    lines, alike = [""], {}
    for rank, placement in enumerate(shared.placements):
        alike.setdefault(placement.host, []).append(rank)
    for ranks in alike.values():
        first = shared.placements[ranks[0]]
        gathered = first.copies and f"; {shown_bytes(first.copies * first.layer_bytes)} are for attention, which gathers pages there"
        lines.append(f"at {shared.context} tokens, rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}: " + (
            f"{len(first.device)} of {first.layers} layers' KV on the device, {len(first.host)} on the host ({first}); "
            f"{shown_bytes(first.buffers * first.layer_bytes)} of the device are buffers"
            if first.host else f"all {first.layers} layers' KV fit on the device") + (gathered or ""))
    for host in shared.hosts:
        if host.bytes:
            has = "memory that nobody stated (hardware.host_memory_gib)" if host.memory is None else shown_bytes(host.memory)
            name = f" of {host.name}" if host.name else ""
            lines.append(f"host memory{name}: {shown_bytes(host.bytes)} for {len(host.ranks)} ranks, of {has}")
    bound = "" if shared.largest == shared.largest_on_devices else f" ({shared.bound} memory is the bound)"
    alone = f"{shared.largest_on_devices} tokens with all KV on the devices"
    lines.append(f"largest context: {alone}, {shared.largest} with cooperation{bound}")
    if shared.missing:
        lines.append(f"predicted times are not known: give {' and '.join(shared.missing)} (GB/s), with --set {shared.missing[0]}=NUMBER or "
                     "under `set` in hosts.yaml")
        return lines
    token = shared.token
    parts = [("device", token.device_s), ("host's attention", token.host_s), ("bus", token.bus_s), ("sums", token.reduce_s)]
    line = f"predicted, at {shared.context} tokens: {shown_seconds(token.total_s)} a decoded token (" + ", ".join(
        f"{name} {shown_seconds(seconds)}" for name, seconds in parts if seconds) + ")"
    if shared.largest_on_devices < shared.context:
        line += f"; {shown_seconds(shared.token_on_devices.total_s)} at the {shared.largest_on_devices} that the devices hold alone"
    lines.append(line)
    if shared.prefill_s is not None:
        beside = f", bus {shown_seconds(shared.prefill_bus_s)} beside it" if shared.prefill_bus_s else ""
        lines.append(f"predicted, its prompt: {shown_seconds(shared.prefill_s)} (device {shown_seconds(shared.prefill_device_s)}{beside})")
    return lines
