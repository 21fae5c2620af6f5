"""From a profile to where each cache's layers lie: the rank's memory figures, the placement of every new cache, and the way out when it
does not fit.

Ranks place for themselves: a placement changes nothing that travels between them, so unlike devices may hold unlike numbers of layers.
What they share, once, when the model is loaded, is how many tokens each could hold, so that rank 0 refuses a request before any work.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetero_attn.models.budget import activation_bytes
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.gathering import copies_here
from hetero_attn.parallel.offload import DeviceAccount, Traffic, allocated_bytes
from hetero_attn.parallel.pinned import pinned_bytes, pinned_share
from hetero_attn.parallel.placement import (
    ALL_DEVICE,
    AUTO,
    BUFFERS,
    HOST_SHARE,
    DeviceMemoryError,
    Figures,
    Placement,
    most_layer_bytes,
    parse,
    place,
    shown,
)
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.quantity import parse_bytes

# Of a device, beside tensors: context, libraries' workspaces, what the allocator cannot use. On the CPU that is the host's affair.
RESERVE = {"cpu": 0, "cuda": 900 << 20, "npu": 900 << 20}
SITE = "placement"
REPORTED = ("host_layers", "device_bytes", "host_bytes", "fetched", "stored", "crossed", "device_memory", "device_peak")


@dataclass
class Placing:
    """How one rank places its caches. copies: of a layer's KV that attention gathers (gathering.py). last: the placement of the newest
    cache. ranks: of every rank, blocks of a cache with all KV on the device and most blocks (-1: no bound), for one sequence; by how much
    either is less for each further one; and tokens a block. () where no rank has a bound."""

    asked: str | int = AUTO
    limit: int | None = None
    profile: DeviceProfile | None = None
    host_profile: DeviceProfile | None = None
    account: DeviceAccount = field(default_factory=DeviceAccount)
    ranks: tuple[tuple[int, int, int, int, int], ...] = ()
    last: Placement | None = None
    traffic: Traffic = field(default_factory=Traffic)
    copies: int = 0
    host_room: int | None = None

    def figures(self, decoder, sequences: int) -> Figures:
        """The rank's device: what it may use, its weights, and a step's activations."""
        weights, device = weight_bytes(decoder), decoder.device
        head = bool(len(decoder.lm_head.own)) or decoder.vocabulary == "sharded"
        chunk = min(self.profile.prefill_chunk if self.profile else 512, decoder.config.context_length)
        activations = activation_bytes(decoder.config, decoder.partition, chunk, sequences, decoder.dtype, head=head)
        total = self.limit
        if device.type != "cpu":
            there = free_bytes(device) + weights + self.account.held - weights_held(self.account, weights)
            total = there if total is None else min(total, there)
        return Figures(total, weights, activations, RESERVE.get(device.type, 0))

    def of_cache(self, decoder, num_blocks: int, max_sequences: int) -> dict[str, Any]:
        """What a PagedCache of so many blocks is told of where its layers lie. Raises DeviceMemoryError."""
        return {"placement": self.place(decoder, num_blocks, max_sequences), "account": self.account, "windows": decoder.config.windows,
                "host_profile": self.host_profile, "traffic": self.traffic}

    def place(self, decoder, num_blocks: int, max_sequences: int) -> Placement:
        """The placement of a cache of so many blocks. Raises DeviceMemoryError with the command that shows what would fit."""
        figures = self.figures(decoder, max_sequences)
        room = None if figures.room is None else figures.room - (self.account.held - weights_held(self.account, figures.weights))
        try:
            found = place(decoder.config.layers, layer_bytes(decoder, num_blocks), room, self.asked, self.host_room,
                          host_layer_bytes(decoder, num_blocks), self.copies)
        except DeviceMemoryError as error:
            raise self.refusal(decoder, f"{error} ({figures})", num_blocks * decoder.kv_block_size) from None
        self.last = found
        return found

    def tokens(self, sequences: int) -> tuple[int | None, int | None]:
        """(most tokens of a cache, those with all KV on every device), of up to `sequences` sequences, that every rank can hold."""
        bounds = []
        for column in (1, 0):
            # blocks beside the part of one that each sequence may waste (PagedCache.blocks_for), the last of them all but full
            free = [(rank[column] - sequences - (sequences - 1) * rank[2 + column], rank[4]) for rank in self.ranks if rank[column] >= 0]
            each = [(blocks + 1) * size - 1 if blocks >= 0 else 0 for blocks, size in free]
            bounds.append(min(each) if each else None)
        return bounds[0], bounds[1]

    def sequences(self, tokens: int, at_most: int) -> int:
        """How many sequences to run together, up to at_most, the longest of so many tokens: as many as leave room for it on every device,
        else in memory; 0 where it fits no cache. Each further sequence takes activations and part of a block."""
        for column in (1, 0):
            for count in range(at_most, 0, -1):
                bound = self.tokens(count)[column]
                if bound is None or tokens <= bound:
                    return count
        return 0

    def refusal(self, decoder, reason: str, tokens: int) -> DeviceMemoryError:
        """The error for tokens that do not fit, with what to do."""
        size = decoder.communicator.world_size
        command = plan_command(decoder.config.path, self.profile, size, tokens, self.limit, self.asked)
        return DeviceMemoryError(f"rank {decoder.communicator.rank}: {reason}; what would fit, and with how many layers' KV in host "
                                 f"memory: {command}")


def plan_command(path: Path, profile: DeviceProfile | None, world_size: int, tokens: int, limit: int | None = None,
                 asked: str | int = AUTO) -> str:
    """The `hetero-attn plan` that shows where this model's KV could lie."""
    words = ["hetero-attn", "plan", str(path)]
    if profile is not None:
        words += ["--profile", profile.name]
    if world_size > 1:
        words += ["--tp", str(world_size)]
    words += ["--context", str(tokens)]
    if limit is not None:
        words += ["--device-memory", f"{limit >> 20}MiB" if limit % (1 << 20) == 0 else f"{limit}B"]
    if asked == ALL_DEVICE:
        words += ["--placement", AUTO]
    return shlex.join(words)


def check_placement(profile: DeviceProfile, config: ModelConfig, *, streams: bool) -> tuple[str | int, int | None]:
    """(placement, bytes of the device) that the profile asks for. Raises ModelError where the model cannot have it."""
    asked, limit = parse(profile.placement), None if profile.device_memory is None else parse_bytes(profile.device_memory)
    if isinstance(asked, int) and asked > config.layers:
        raise ModelError(f"placement is {shown(asked)}, the model has {config.layers} layers")
    if streams and (limit is not None or isinstance(asked, int)):
        raise ModelError("a memory budget (or window) streams weights and keeps the KV cache with them in host memory: leave placement and "
                         "device memory out, or the budget")
    return asked, limit


def may_offload(profile: DeviceProfile) -> bool:
    """Whether a cache may put layers' KV into host memory by this profile."""
    asked = parse(profile.placement)
    bounded = profile.device_memory is not None or profile.device != "cpu"
    return asked > 0 if isinstance(asked, int) else asked == AUTO and bounded


def make_placing(decoder, profile: DeviceProfile, asked: str | int, limit: int | None) -> Placing:
    """The placing of a loaded decoder. All ranks call this together. Raises DeviceMemoryError, on every rank, where one's weights alone are
    too much."""
    device = decoder.device
    host_profile = None if device.type == "cpu" else load_profile("cpu")
    account = DeviceAccount(limit, weight_bytes(decoder) if limit is not None else 0)
    found = Placing(asked, limit, profile, host_profile, account)
    together = ranks_of_this_host(decoder.communicator)                          # and all ranks' weights are where they will be
    figures = found.figures(decoder, 1)
    room, problem = figures.room, None
    found.host_room = host_room(available_bytes(), together, device.type, room, asked, decoder.config.layers)
    if room is not None and room <= 0:
        problem = found.refusal(decoder, f"nothing of the device's memory is left for KV: {figures}", decoder.config.context_length)
    active, blocks, layers = room is not None or bool(isinstance(asked, int) and asked), [-1, -1, 0, 0], decoder.config.layers
    if active:
        host = None if found.host_room is None else pinned_share(found.host_room, device.type)
        found.copies = copies_here(decoder)
        most = [most_layer_bytes(layers, room, how, host, found.copies) for how in (ALL_DEVICE, asked)]
        logits = found.figures(decoder, 2).activations - figures.activations                      # of a sequence more
        blocks = [-1 if each is None else blocks_in(decoder, each) for each in most]
        blocks += [-(-logits // (layer_bytes(decoder, 1) * slots)) for slots in (layers, min(layers, BUFFERS))]
    communicator = decoder.communicator
    own = torch.tensor([[int(active), int(problem is not None), *blocks, decoder.kv_block_size]], dtype=torch.int64,
                       device=communicator.device)
    if communicator.world_size > 1:
        own = communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE)                        # [ranks, 7]
    every = own.tolist()
    if any(row[1] for row in every):
        raise problem or DeviceMemoryError(f"rank {[row[1] for row in every].index(1)} has no device memory left for KV")
    found.ranks = tuple(tuple(row[2:]) for row in every) if any(row[0] for row in every) else ()
    return found


def gather_placements(model) -> list[dict[str, Any]]:
    """Every rank's newest placement and what was copied, [] where nothing bounds any rank. All ranks call it together."""
    placing, communicator = model.placing, model.communicator
    if placing is None or not placing.ranks:
        return []
    last = placing.last or Placement(model.config.layers)
    numbers = [len(last.host), last.device_bytes, last.host_bytes, placing.traffic.fetched, placing.traffic.stored, placing.traffic.crossed,
               placing.limit or 0, placing.account.peak]
    own = torch.tensor([numbers], dtype=torch.int64, device=communicator.device)
    if communicator.world_size > 1:
        own = communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE)
    return [dict(zip(REPORTED, row)) | {"layers": model.config.layers} for row in own.tolist()]


def weight_bytes(decoder) -> int:
    """What the rank's parameters and buffers take on its device."""
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in (*decoder.parameters(), *decoder.buffers())
            if tensor.device.type != "meta"}
    return sum(held.values())


def weights_held(account: DeviceAccount, weights: int) -> int:
    """Of the account, what is weights."""
    return weights if account.limit is not None else 0


def layer_bytes(decoder, num_blocks: int) -> int:
    """K and V of one layer in a cache of so many blocks."""
    one = num_blocks * decoder.kv_block_size * len(decoder.partition.kv_heads) * decoder.config.head_dim * decoder.dtype.itemsize
    return 2 * allocated_bytes(one, decoder.device.type)


def host_layer_bytes(decoder, num_blocks: int) -> int:
    """What the same takes in host memory."""
    kind = decoder.device.type
    return layer_bytes(decoder, num_blocks) if kind == "cpu" else 2 * pinned_bytes(layer_bytes(decoder, num_blocks) // 2, kind)


def blocks_in(decoder, layer_bytes: int) -> int:
    """Blocks of a cache whose K and V may take layer_bytes a layer."""
    one = decoder.kv_block_size * len(decoder.partition.kv_heads) * decoder.config.head_dim * decoder.dtype.itemsize
    blocks = layer_bytes // (2 * one)
    while blocks > 0 and 2 * allocated_bytes(blocks * one, decoder.device.type) > layer_bytes:       # huge pages round up
        blocks -= 1 + (2 * allocated_bytes(blocks * one, decoder.device.type) - layer_bytes) // (2 * one)
    return blocks


def free_bytes(device: torch.device) -> int:
    """Of an accelerator, what torch could still allocate."""
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def available_bytes() -> int | None:
    """Host memory that could be had without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return None


def host_room(available: int | None, together: int, device: str, room: int | None, asked: str | int, layers: int) -> int | None:
    """Host memory that one of `together` ranks of a host may fill with KV. On the CPU the "device" is a part of the same memory: its room
    is taken off, and where it has no bound, the placement's own share of the KV."""
    if available is None:
        return None
    share = int(available * HOST_SHARE) // together
    if device != "cpu":
        return share
    if room is not None:
        return max(0, share - max(0, room))
    host = asked if isinstance(asked, int) else 0                                # auto keeps all on a device without bounds
    return share * host // (layers + min(host, BUFFERS))


def ranks_of_this_host(communicator) -> int:
    """How many of the ranks share this host's memory. All ranks call it together, and come out of it together."""
    named = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if communicator.world_size == 1:
        return named
    try:
        boot = int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:15], 16)     # the same in all of its containers
    except (OSError, ValueError):
        boot = -1 - communicator.rank
    own = torch.tensor([[boot]], dtype=torch.int64, device=communicator.device)
    every = communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE)                          # [ranks, 1]
    return max(named, every.flatten().tolist().count(boot))
