"""What CPU-GPU cooperation makes of a plan: layers on either side, host memory, the largest context, and the time of prompt and token.

Predictions from rates, not measurements. Decoding reads weights and the device's KV at the device's rate, the host's KV at what the host's
memory gives all its ranks at once, and pays the bus twice a host layer for q, k, v and o. A prompt runs in chunks: each attends over what
the chunks before it left, on the device, and host layers' KV crosses the bus beside that, so the longer of the two counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.gathering import copies_planned
from hetero_attn.models.hosts import Host
from hetero_attn.parallel.offload import allocated_bytes
from hetero_attn.parallel.pinned import pinned_bytes, pinned_share
from hetero_attn.parallel.placement import ALL_DEVICE, AUTO, HOST_SHARE, DeviceMemoryError, Placement, most_layer_bytes, parse, place
from hetero_attn.parallel.sharding import Partition
from hetero_attn.quantity import parse_bytes

REACHED = 0.6                   # of a matrix rate on paper that products of a prefill reach; the cpu backend: 0.6 to 1
HOST_REACHED = 0.75             # of the host's memory rate that decoding reads at; the cpu backend: docs/measured/cpu_attention.md
HOST_RATES = ("bus_gbps", "host_memory_gbps")
CROSSING_S = 25e-6              # of one copy of a few rows over the bus, launch and wait: a round figure
ATTENTION_REACHED = 0.5         # of a matrix rate on paper that attention of a long prompt reaches: a round figure

Number = Callable[[Host, str, str], float]           # a number of a host's profile, or a ModelError that asks for it


@dataclass(frozen=True)
class Pace:
    """Seconds of one decoded token by part, on the slowest rank."""

    device_s: float
    host_s: float
    bus_s: float
    reduce_s: float

    @property
    def total_s(self) -> float:
        return self.device_s + self.host_s + self.bus_s + self.reduce_s


@dataclass(frozen=True)
class HostShare:
    """A host: its ranks, bytes of KV that they put into its memory, and what it has (None: not known)."""

    name: str
    ranks: tuple[int, ...]
    bytes: int
    memory: int | None


@dataclass(frozen=True)
class Cooperation:
    """The plan at `context` tokens. largest_…: tokens that memory holds with all KV on the devices, and with cooperation, by `bound`."""

    context: int
    placements: tuple[Placement, ...]
    hosts: tuple[HostShare, ...]
    largest_on_devices: int
    largest: int
    bound: str                                      # device | host
    token: Pace | None                              # None: a rate is missing
    token_on_devices: Pace                          # at the largest context that the devices hold, or this one if they do
    prefill_s: float | None                         # None: the device's matrix rate, or one of those that are missing, is not known
    prefill_device_s: float | None
    prefill_bus_s: float | None
    missing: tuple[str, ...] = ()                   # values of the profiles without which there are no times


def cooperates(host: Host) -> bool:
    """Whether the rank's device has a memory of its own, which host memory can relieve."""
    return host.profile.device != "cpu" or host.profile.device_memory is not None


def device_memory(host: Host) -> int | None:
    """Bytes that the profile allows of the device; None: it does not say."""
    return None if host.profile.device_memory is None else parse_bytes(host.profile.device_memory)


def layer_bytes(host: Host, partition: Partition, config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """K and V of one layer of a rank's cache for one sequence of so many tokens."""
    blocks = tokens // host.profile.kv_block_size + 1
    return 2 * allocated_bytes(blocks * host.profile.kv_block_size * token_bytes(partition, config, dtype) // 2, host.profile.device)


def token_bytes(partition: Partition, config: ModelConfig, dtype: torch.dtype) -> int:
    """K and V of one token in one layer of a rank."""
    return 2 * len(partition.kv_heads) * config.head_dim * dtype.itemsize


def host_room(host: Host, together: int) -> int | None:
    """Bytes of host memory for one of `together` ranks of a host; None: not known."""
    gib = host.profile.hardware.host_memory_gib
    return None if gib is None else int(gib * 2**30 * HOST_SHARE) // together


def placed(host: Host, partition: Partition, config: ModelConfig, dtype: torch.dtype, context: int, room: int, together: int) -> Placement:
    """A rank's placement; room: of its device for KV. Raises ModelError with the context that would do."""
    asked = parse(host.profile.placement)
    try:
        each = layer_bytes(host, partition, config, dtype, context)
        pinned = each if host.profile.device == "cpu" else 2 * pinned_bytes(each // 2, host.profile.device)
        return place(config.layers, each, room, asked, host_room(host, together), pinned,
                     copies_planned(config, partition, dtype, host.profile))
    except ValueError as error:                                          # no placement of this model, whatever the context
        raise ModelError(str(error)) from None
    except DeviceMemoryError as error:
        held = most_tokens(host, partition, config, dtype, room, together, asked)
        raise ModelError(f"rank {partition.rank} ({host.profile.name}) cannot hold {context} tokens: {error}; the largest context is {held}"
                         ) from None


def most_tokens(
    host: Host, partition: Partition, config: ModelConfig, dtype: torch.dtype, room: int, together: int | None, asked: str | int = AUTO
) -> int:
    """Tokens of one sequence that a rank's memory holds. together: ranks in its host; None: host memory has no end."""
    host_bytes = None if together is None else host_room(host, together)
    most = most_layer_bytes(config.layers, room, asked, host_bytes and pinned_share(host_bytes, host.profile.device),
                            copies_planned(config, partition, dtype, host.profile))
    block = host.profile.kv_block_size * token_bytes(partition, config, dtype)
    tokens = max(0, most // block - 1) * host.profile.kv_block_size
    while tokens > 0 and layer_bytes(host, partition, config, dtype, tokens) > most:                 # huge pages round up
        tokens -= host.profile.kv_block_size
    return tokens


def cooperation(
    ranks: Sequence, config: ModelConfig, dtype: torch.dtype, context: int, number: Number, reduce_s: Callable[[int], float],
) -> Cooperation | None:
    """The plan of RankPlans; None where no rank's device has a memory of its own. reduce_s: seconds of all sums of a pass over so many
    rows."""
    own = [rank for rank in ranks if rank.placement is not None]
    if not own:
        return None
    together = sharing([rank.host for rank in ranks])

    def largest(asked: str | int, *, endless: bool = False) -> int:
        return min(most_tokens(rank.host, rank.partition, config, dtype, rank.memory - rank.beside_cache - rank.weights,
                               None if endless else together[rank.host.name], asked) for rank in own)

    def slowest(placements: Sequence[Placement], tokens: int) -> Pace:
        return max((pace(rank, placement, config, dtype, tokens, number, reduce_s(1), together)
                    for rank, placement in zip(own, placements)), key=lambda each: each.total_s)

    most, on_devices, placements = largest(AUTO), largest(ALL_DEVICE), [rank.placement for rank in own]
    absent = tuple(dict.fromkeys(name for rank in own for name in missing(rank.host, rank.placement)))
    prompts = [[chunk_s(rank, config, dtype, past, count, reduce_s, together) for past, count in chunks(rank.host, context)]
               for rank in own]
    on_device = all(device is not None for prompt in prompts for device, _ in prompt)
    return Cooperation(
        context=context, placements=tuple(placements), hosts=tuple(_hosts(own)), largest_on_devices=on_devices, largest=most,
        bound="host" if most < largest(AUTO, endless=True) else "device", token=None if absent else slowest(placements, context),
        token_on_devices=slowest([Placement(config.layers)] * len(own), min(context, on_devices)),
        prefill_s=max(sum(map(max, prompt)) for prompt in prompts) if on_device and not absent else None,
        prefill_device_s=max(sum(device for device, _ in prompt) for prompt in prompts) if on_device else None,
        prefill_bus_s=None if absent else max(sum(bus for _, bus in prompt) for prompt in prompts), missing=absent,
    )


def missing(host: Host, placement: Placement) -> tuple[str, ...]:
    """Of the rates that layers on the host need, those that the profile does not say. Memory can be planned without them."""
    return tuple(f"hardware.{name}" for name in HOST_RATES if placement.host and getattr(host.profile.hardware, name) is None)


def sharing(hosts: Sequence[Host]) -> dict[str, int]:
    """Of each host by name, how many ranks go through its memory: those that may place KV there, and those of a named host's processors."""
    return Counter(host.name for host in hosts if cooperates(host) or on_shared_processors(host))


def on_shared_processors(host: Host) -> bool:
    """Whether the rank's device is the processors of a host with a name, which it then shares with that host's other ranks."""
    return host.profile.device == "cpu" and bool(host.name)


def _hosts(ranks: Sequence):
    for name in dict.fromkeys(rank.host.name for rank in ranks):
        here = [rank for rank in ranks if rank.host.name == name]
        gib = here[0].host.profile.hardware.host_memory_gib
        yield HostShare(name, tuple(rank.partition.rank for rank in here), sum(rank.placement.host_bytes for rank in here),
                        None if gib is None else int(gib * 2**30))


def pace(rank, placement: Placement, config: ModelConfig, dtype: torch.dtype, context: int, number: Number, reduce_s: float,
         together: dict[str, int]) -> Pace:
    """Seconds of a token that sees `context` keys."""
    host, each = rank.host, token_bytes(rank.partition, config, dtype)
    device_rate = number(host, "memory_gbps", "memory bandwidth, GB/s") * 1e9
    device_s = rank.compute_s + sum(seen(config, layer, context) for layer in placement.device) * each / device_rate
    host_s = bus_s = 0.0
    if placement.host:
        host_rate = number(host, "host_memory_gbps", "bandwidth of the host's memory, GB/s") * 1e9 * HOST_REACHED / together[host.name]
        bus = number(host, "bus_gbps", "copies between host and device, GB/s") * 1e9
        host_s = sum(seen(config, layer, context) for layer in placement.host) * each / host_rate
        rows = 2 * len(rank.partition.q_heads) * config.head_dim * dtype.itemsize + each                       # q and o, k and v
        bus_s = len(placement.host) * (2 * CROSSING_S + rows / bus)
    return Pace(device_s, host_s, bus_s, reduce_s)


def seen(config: ModelConfig, layer: int, keys: int) -> int:
    """Keys of `keys` that the newest token sees in a layer."""
    window = config.windows[layer]
    return keys if window is None else min(keys, window)


def chunks(host: Host, context: int) -> list[tuple[int, int]]:
    """(tokens before, tokens of) each chunk of a prompt."""
    size = host.profile.prefill_chunk
    return [(past, min(size, context - past)) for past in range(0, context, size)]


def chunk_s(rank, config: ModelConfig, dtype: torch.dtype, past: int, count: int, reduce_s: Callable[[int], float],
            together: dict[str, int]) -> tuple[float | None, float | None]:
    """(device, bus) seconds of one chunk: products, attention and sums; and the host layers' KV on its way, the longer direction, at the
    bus' rate or this rank's share of the host memory's, whichever is less. None: not known."""
    hardware, each = rank.host.profile.hardware, token_bytes(rank.partition, config, dtype)
    rate = {torch.bfloat16: hardware.bf16_tflops, torch.float16: hardware.fp16_tflops}.get(dtype) or hardware.fp32_tflops
    device_s = None
    if rate:
        pairs = sum(seen(config, layer, past + count // 2) * count for layer in range(config.layers))
        products = 2 * count * rank.weights / dtype.itemsize / (rate * 1e12 * REACHED)
        attention = 4 * pairs * len(rank.partition.q_heads) * config.head_dim / (rate * 1e12 * ATTENTION_REACHED)
        device_s = max(products, rank.compute_s) + attention + reduce_s(count)
    if not rank.placement.host:
        return device_s, 0.0
    if missing(rank.host, rank.placement):
        return device_s, None
    bus = min(hardware.bus_gbps, HOST_REACHED * hardware.host_memory_gbps / together[rank.host.name]) * 1e9
    moved = sum(max(seen(config, layer, past), count) for layer in rank.placement.host) * each
    return device_s, moved / bus
