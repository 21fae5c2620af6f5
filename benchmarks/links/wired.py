"""The same network by the kernel alone, where it has sch_netem: veth pairs into a bridge, tc tbf at both ends, netem for the delay.

The bridge has a namespace of its own. A packet waits in the sender's interface for the sender's rate, then, in the bridge's end of the
receiver's pair, for the delay and the receiver's rate: the receiver's port sees it when it has left the sender's, as in switch.cpp.
Bursts are small (two packets), for nothing behind a token bucket smooths what it lets through at once.
"""

from __future__ import annotations

import json

from links.command import command
from links.settings import Settings


def extra(names: list[str]) -> list[str]:
    """The namespace of the bridge, beside those of the ranks."""
    return [f"{names[0].rpartition('-')[0]}-bridge"]


def rate(interface: str, bits_per_s: int, burst: int, limit: int) -> list[str]:
    """tc's words for a port of that rate. burst, limit: bytes let through at once, and waiting at most."""
    return ["qdisc", "add", "dev", interface, "root", "handle", "1:", "tbf", "rate", f"{bits_per_s}bit", "burst", str(burst),
            "limit", str(limit)]


def delay(interface: str, delay_ms: float, packets: int) -> list[str]:
    """tc's words for the delay inside such a port. packets: how many may be under way or waiting."""
    return ["qdisc", "add", "dev", interface, "parent", "1:1", "handle", "10:", "netem", "delay", f"{delay_ms * 1e3:.0f}us",
            "limit", str(packets)]


def join(names: list[str], interface: str) -> None:
    """A bridge, and for each rank a pair of interfaces: `interface` in its namespace, port<rank> at the bridge."""
    (bridge,) = extra(names)
    lines = ["link add bridge0 type bridge", "link set bridge0 up"]
    for rank, name in enumerate(names):
        lines += [f"link add port{rank} type veth peer name {interface} netns {name}", f"link set port{rank} master bridge0 mtu 65000",
                  f"link set port{rank} up"]
    command("ip", "-n", bridge, "-batch", "-", text="\n".join(lines) + "\n")


def receiving_port(names: list[str], rank: int, settings: Settings) -> None:
    """Rate, delay and finite queue of what goes to this rank."""
    waiting = settings.queue_bytes((settings.queue_ms + settings.delay_ms) / 1e3)
    words = [rate(f"port{rank}", settings.bits_per_s, 2 * settings.mtu + 100, waiting)]
    if settings.delay_ms:
        words.append(delay(f"port{rank}", settings.delay_ms, max(1000, waiting // 500)))
    for each in words:
        command("ip", "netns", "exec", extra(names)[0], "tc", *each)


def counters(names: list[str], interface: str) -> dict:
    """Packets, bytes and drops of every port, as the bridge's kernel counted them."""
    (bridge,) = extra(names)
    links = {each["ifname"]: each["stats64"] for each in json.loads(command("ip", "-n", bridge, "-j", "-s", "link"))}

    def dropped(namespace: str, device: str) -> int:
        shown = json.loads(command("ip", "netns", "exec", namespace, "tc", "-j", "-s", "qdisc", "show", "dev", device))
        return sum(each.get("drops", 0) for each in shown if each.get("root"))

    ports = []
    for rank, name in enumerate(names):
        given, got = links[f"port{rank}"]["rx"], links[f"port{rank}"]["tx"]
        ports.append({
            "sent_packets": given["packets"], "sent_bytes": given["bytes"],
            "received_packets": got["packets"], "received_bytes": got["bytes"],
            "dropped_sending": dropped(name, interface), "dropped_receiving": dropped(bridge, f"port{rank}"),
        })
    return {"ports": ports}
