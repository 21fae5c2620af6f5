"""A survey and the choice that follows from it, in words: what `hetero-attn tune` prints, for a person or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetero_attn.collectives.algorithms import OPERATIONS
from hetero_attn.collectives.choice import NARROW, PLAIN, WIDE, Route
from hetero_attn.collectives.cost import CANDIDATES, as_settings
from hetero_attn.collectives.tuning import SIZES, Survey


def as_json(found: Survey, **allowed: str) -> dict[str, Any]:
    """The link's numbers and, for each operation, dtype and size, what was predicted, what was measured (float32), and the choice."""
    rows = []
    for operation in OPERATIONS:
        for kind in (WIDE, NARROW):
            for nbytes in SIZES:
                routes = {"/".join(route): route for route in found.candidates(operation, kind, **allowed)}
                predicted = {name: round(found.predicted(operation, route, nbytes, kind) * 1e3, 4) for name, route in routes.items()}
                measured = {name: found.measured(operation, route, nbytes) for name, route in routes.items() if kind == WIDE}
                rows.append({
                    "operation": operation, "dtypes": kind, "bytes": nbytes, "predicted_ms": predicted,
                    "measured_ms": {name: round(seconds * 1e3, 4) for name, seconds in measured.items() if seconds},
                    "choice": found.best(operation, nbytes, kind, **allowed)._asdict(),
                })
    codecs = {name: {"bits": 32 * cost.ratio, "ns_per_value": 4e9 * cost.byte_s, "call_us": 1e6 * cost.call_s}
              for name, cost in found.codecs.items()}
    return {"world_size": found.world_size, "hosts": list(found.hosts), "link": as_settings(found.link), "codecs": codecs, "rows": rows}


def as_text(found: Survey, *, sizes: Sequence[int] = SIZES[::2], operations: Sequence[str] = OPERATIONS, **allowed: str) -> str:
    """How the choice was made, for a person: a table an operation, milliseconds predicted (and measured) for each algorithm."""
    numbers = as_settings(found.link)
    rate = {name: f"{numbers[name]:g} Mbit/s" if name in numbers else "too fast to tell" for name in ("bandwidth_mbps", "root_mbps")}
    lines = [
        f"{found.world_size} ranks on {_hosts(found.hosts)}",
        f"latency {numbers['latency_ms']:g} ms, a rank's link {rate['bandwidth_mbps']}, into one rank {rate['root_mbps']}, "
        f"a message {numbers['message_ms']:g} ms, and {numbers['crowd_ms']:g} ms for each of all ranks' messages",
        *(f"codec {name}: {32 * cost.ratio:.2f} bits a value; packing or unpacking takes {1e6 * cost.call_s:.0f} us and "
          f"{4e9 * cost.byte_s:.2f} ns a value" for name, cost in found.codecs.items()),
        "float32; milliseconds as the model predicts them, [measured] where a run was timed; > marks the choice: the least of measured,",
        "or predicted times what the runs of the same algorithm beside it were off by",
    ]
    for operation in operations:
        names = CANDIDATES[operation]
        lines += ["", f"{operation:<14} " + "".join(f"{name:>19}" for name in names)]
        for nbytes in sizes:
            chosen = found.best(operation, nbytes, **allowed)
            cells = [_cell(found, operation, Route(name), nbytes, chosen) for name in names]
            coded = f"   > {chosen.algorithm} with {chosen.codec}" if chosen.codec != PLAIN else ""
            lines.append(f"{_size(nbytes):<14} " + "".join(f"{cell:>19}" for cell in cells) + coded)
    return "\n".join(lines)


def _cell(found: Survey, operation: str, route: Route, nbytes: int, chosen: Route) -> str:
    seconds = found.measured(operation, route, nbytes)
    mark = ">" if route == chosen else ""
    return f"{mark}{found.predicted(operation, route, nbytes) * 1e3:.3g}" + (f" [{seconds * 1e3:.3g}]" if seconds else "")


def _size(nbytes: int) -> str:
    return f"{nbytes} B" if nbytes < 1024 else f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"


def _hosts(hosts: Sequence[str]) -> str:
    counts = {host: list(hosts).count(host) for host in dict.fromkeys(hosts)}
    return ", ".join(host if count == 1 else f"{host} ({count})" for host, count in counts.items())
