"""hetero-attn plan's arithmetic: who gets what of a model, what that takes of memory, and how long tokens take. No device is touched.

Rates come from profiles (hardware.*), the link from a measurement or a file, sizes from the checkpoint's headers, so a plan can be made on
any machine for any other. A number that is needed and that nobody has given is asked for by name, never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hetero_attn.collectives.choice import NARROW, PLAIN, WIDE
from hetero_attn.collectives.link import codec_costs
from hetero_attn.collectives.tuning import Survey, codecs_of, from_profile
from hetero_attn.communicator import Communicator
from hetero_attn.models.budget import activation_bytes, cache_bytes
from hetero_attn.models.config import DTYPES, ModelConfig, ModelError
from hetero_attn.models.config_only import open_sizes
from hetero_attn.models.cooperation import (
    REACHED,
    Cooperation,
    cooperates,
    cooperation,
    device_memory,
    layer_bytes,
    missing,
    on_shared_processors,
    pace,
    placed,
    sharing,
)
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.hosts import Host, Hosts, kept_by_communicator, read_hosts
from hetero_attn.models.placing import RESERVE
from hetero_attn.models.weights import Checkpoint
from hetero_attn.parallel.partition import Speed, shares, uneven
from hetero_attn.parallel.placement import BUFFERS, Placement
from hetero_attn.parallel.sharding import Partition
from hetero_attn.quantity import shown_bytes

# Python, torch and its libraries: on the CPU measured, else a round figure for the device's own part.
PROCESS = {"cpu": 270 << 20, "cuda": 900 << 20, "npu": 900 << 20}
WINDOW_BLOCKS = 2               # of the streaming window, while a rank streams
PROMPT = 128                    # tokens of the prompt that the first token's time is for

__all__ = ["Host", "Hosts", "ModelPlan", "RankPlan", "plan_model", "read_hosts", "split_for"]


@dataclass(frozen=True)
class RankPlan:
    """One rank: its part, bytes by part on its device, and seconds of a token. memory: bytes it may use. streamed: read for every token."""

    host: Host
    partition: Partition
    weights: int
    held: int
    streamed: int
    cache: int
    activations: int
    window: int
    process: int
    memory: int
    compute_s: float
    disk_s: float
    placement: Placement | None = None              # of the KV cache, where the device has a memory of its own; cache: the device's part
    communicator: int = 0                           # what the communicator keeps of the device

    @property
    def beside_cache(self) -> int:
        """What is there whatever lies in the cache, weights apart."""
        return self.process + self.communicator + self.activations

    @property
    def total(self) -> int:
        return self.beside_cache + self.held + self.window + self.cache


@dataclass(frozen=True)
class ModelPlan:
    """The whole: ranks, largest context, seconds of a first token (a prompt of PROMPT tokens) and of each further one, and remarks.

    algorithm, codec: of a token's sums; rank 0's profile says what may be chosen, as it does when the ranks run.
    """

    ranks: tuple[RankPlan, ...]
    context: int
    largest_context: int
    first_token_s: float
    token_s: float | None                           # None: a profile lacks a rate, see cooperation.missing
    reduce_s: float                                 # of token_s, all sums between ranks
    alone_s: float | None                           # a token on the best rank by itself; None where it cannot
    algorithm: str
    codec: str
    remarks: tuple[str, ...]
    cooperation: Cooperation | None = None
    communicator: str = ""                          # whose it is, where it keeps memory of the device


def split_for(path: str | Path, hosts: Hosts, vocabulary: str) -> tuple[Partition, ...]:
    """Every rank's part of the model for these hosts. Raises ModelError."""
    return tuple(each.partition for each in plan_model(path, hosts, vocabulary=vocabulary).ranks)


def plan_model(path: str | Path, hosts: Hosts, *, context: int | None = None, vocabulary: str | None = None) -> ModelPlan:
    """The plan of a checkpoint for these hosts. context: tokens the cache holds (default 2048, or the model's). Raises ModelError."""
    config, checkpoint, remarks = open_sizes(Path(path))
    first = hosts.ranks[0].profile
    dtype = DTYPES[first.dtype] if first.dtype != "auto" else config.dtype or checkpoint.dtype
    vocabulary = vocabulary or first.vocabulary
    if context is not None and context > config.context_length:
        remarks = (*remarks, f"the model's own context is {config.context_length} tokens, fewer than the {context} that were asked for")
    context = min(context or 2048, config.context_length)
    if len(hosts.ranks) > config.q_heads:
        raise ModelError(f"{len(hosts.ranks)} ranks are more than the model's {config.q_heads} query heads; leave some out")
    total = sum(map(checkpoint.bytes_of, _shards(config, checkpoint, None, 0, 1, "master", layers_only=True)))
    together, disks, (communicator, kept) = sharing(hosts.ranks), _disks(hosts.ranks), kept_by_communicator(hosts)
    speeds = [_speed(host, disk, config, checkpoint, dtype, context, vocabulary, rank, len(hosts.ranks), together, kept)
              for rank, (host, disk) in enumerate(zip(hosts.ranks, disks))]
    try:
        parts = shares(total, speeds)
        partitions = uneven([max(part, 1e-9) for part in parts], q_heads=config.q_heads, kv_heads=config.kv_heads,
                            ffn=config.intermediate_size, vocab=config.vocab_size, vocabulary=vocabulary)
    except ValueError as error:
        raise ModelError(str(error)) from None
    ranks = tuple(_rank(host, partition, config, checkpoint, dtype, context, together, disk, kept)
                  for host, partition, disk in zip(hosts.ranks, partitions, disks))
    link = _survey(hosts)
    reduce_s, algorithm, codec = _sums(hosts, link, config, dtype, 1)
    prefill_reduce_s, *_ = _sums(hosts, link, config, dtype, PROMPT)
    found = cooperation(ranks, config, dtype, context, _number, lambda rows: _sums(hosts, link, config, dtype, rows)[0])
    token = max(max(each.compute_s + reduce_s, each.disk_s) for each in ranks)
    if found is not None:
        token = None if found.token is None else max(token, found.token.total_s)
    first_token = max(max(_prefill_s(each, dtype, together) + prefill_reduce_s, each.disk_s) for each in ranks)
    alone = _alone(hosts, config, checkpoint, dtype, context)
    return ModelPlan(ranks, context, _largest_context(ranks, config, dtype, found), first_token, token, reduce_s, alone, algorithm, codec,
                     (*remarks, *_remarks(link, ranks, token, reduce_s, alone, codec)), found, communicator)


def _shards(config, checkpoint: Checkpoint, partition: Partition | None, rank: int, world_size: int, vocabulary: str, *, layers_only=False):
    decoder = Decoder(config, Communicator(rank, world_size, device="meta"), dtype=torch.float32, device="meta", vocabulary=vocabulary,
                      partition=partition)
    found = list(decoder.shards(set(checkpoint.entries)))
    return [shard for shard in found if ".layers." in shard.name] if layers_only else found


def _number(host: Host, name: str, what: str) -> float:
    value = getattr(host.profile.hardware, name)
    if value is None:
        raise ModelError(f"profile {host.profile.name!r} does not say hardware.{name} ({what}), which a plan needs; give it with "
                         f"--set hardware.{name}=NUMBER, or under `set` in hosts.yaml")
    return value


def _bandwidth(host: Host, together: dict[str, int]) -> float:
    """Bytes/s that the rank goes through its device's memory with; processors that ranks share have no more of it for two than for one."""
    return _number(host, "memory_gbps", "memory bandwidth, GB/s") * 1e9 / _sharers(host, together)


def _sharers(host: Host, together: dict[str, int]) -> int:
    """How many ranks the device's rates are shared by."""
    return together[host.name] if on_shared_processors(host) else 1


def _memory(host: Host, together: dict[str, int]) -> int:
    """Bytes that the rank may use: what was said of it, else its device's, which the ranks of a named host's processors share."""
    allowed = device_memory(host)
    if allowed is not None:
        return allowed if host.memory is None else min(allowed, host.memory)
    return host.memory if host.memory is not None else int(
        _number(host, "memory_gib", "device memory, GiB") * 2**30 / _sharers(host, together))


def _disk(host: Host) -> float:
    """Bytes a second of the disk that a rank may stream from, 0: none."""
    return 0.0 if cooperates(host) else (host.profile.hardware.disk_gbps or 0.0) * 1e9


def _disks(hosts: Sequence[Host]) -> list[float]:
    """Each rank's share of its disk: ranks of one named host that may stream read at the same time, and the disk gives no more for that."""
    readers = Counter(host.name for host in hosts if _disk(host))
    return [_disk(host) / (readers[host.name] if _disk(host) and host.name else 1) for host in hosts]


def _speed(
    host: Host, disk: float, config: ModelConfig, checkpoint: Checkpoint, dtype, context, vocabulary, rank, world_size, together, kept: int,
) -> Speed:
    """What an even share would leave of the rank's memory for weights: a start that the split then improves on."""
    try:
        even = Partition.of(rank, world_size, q_heads=config.q_heads, kv_heads=config.kv_heads, ffn=config.intermediate_size,
                            vocab=config.vocab_size, vocabulary=vocabulary)
    except ValueError as error:
        raise ModelError(str(error)) from None
    fixed = _fixed(host, even, config, dtype, context) + kept
    window = _window(config, checkpoint, even) if disk else 0
    vocab = 0 if disk else 2 * len(even.vocab) * config.hidden_size * dtype.itemsize
    return Speed(_bandwidth(host, together), max(0, _memory(host, together) - fixed - window - vocab), disk)


def _fixed(host: Host, partition: Partition, config: ModelConfig, dtype: torch.dtype, context: int) -> int:
    cache = cache_bytes(config, partition, context, 1, host.profile.kv_block_size, dtype)
    if cooperates(host):
        cache = min(cache, BUFFERS * layer_bytes(host, partition, config, dtype, context))
    chunk = min(host.profile.prefill_chunk, config.context_length)             # as Placing.figures has it, whatever is asked for
    return _process(host) + cache + activation_bytes(config, partition, chunk, 1, dtype, head=bool(len(partition.vocab)))


def _process(host: Host) -> int:
    """What a rank takes of its device beside tensors."""
    return (RESERVE if cooperates(host) else PROCESS)[host.profile.device]


def _window(config: ModelConfig, checkpoint: Checkpoint, partition: Partition) -> int:
    """Bytes of a window of WINDOW_BLOCKS: the attention and the MLP slice of a layer."""
    own = _shards(config, checkpoint, partition, partition.rank, partition.world_size, partition.vocabulary, layers_only=True)
    return sum(checkpoint.bytes_of(shard) for shard in own) // config.layers * WINDOW_BLOCKS // 2


def _rank(
    host: Host, partition: Partition, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, context: int,
    together: dict[str, int], disk: float, kept: int = 0,
) -> RankPlan:
    """disk: bytes a second, of this rank's share. kept: bytes of the device that the communicator keeps."""
    every = _shards(config, checkpoint, partition, partition.rank, partition.world_size, partition.vocabulary)
    weights = sum(checkpoint.bytes_of(shard) for shard in every)
    table = sum(checkpoint.bytes_of(shard) for shard in every if shard.name == "model.embed_tokens.weight")
    cache = cache_bytes(config, partition, context, 1, host.profile.kv_block_size, dtype)
    chunk = min(host.profile.prefill_chunk, config.context_length)             # as Placing.figures has it, whatever is asked for
    activations = activation_bytes(config, partition, chunk, 1, dtype, head=bool(len(partition.vocab)))
    memory, process, placement = _memory(host, together), _process(host), None
    if cooperates(host):
        weights, table = ((sum(shard.into.numel() for shard in each) * dtype.itemsize) for each in          # cast as they are loaded
                          (every, [shard for shard in every if shard.name == "model.embed_tokens.weight"]))
        room = memory - process - kept - activations - weights
        if room > 0:
            placement = placed(host, partition, config, dtype, context, room, together[host.name])
        cache = placement.device_bytes if placement else 0
    room = memory - process - kept - cache - activations
    # A token goes through one row of the table and all of the head, where they are not one.
    used = weights - (0 if config.tied_embeddings else table)
    window = streamed = 0
    held = weights
    if weights > room:
        if not disk:
            raise ModelError(f"rank {partition.rank} ({host.profile.name}) would hold {shown_bytes(weights)} of weights and has room for "
                             f"{shown_bytes(max(room, 0))}; add ranks or memory, shorten --context, or give its disk's rate "
                             "(hardware.disk_gbps) to stream them")
        window = _window(config, checkpoint, partition)
        if window > room:
            raise ModelError(f"rank {partition.rank} ({host.profile.name}) has {shown_bytes(memory)}; the least that works is "
                             f"{shown_bytes(memory - room + window)}: its process, cache and activations, and a window of two blocks")
        held = room - window
        streamed = max(0, used - held)
    experts = config.experts_per_token / config.experts if config.experts else 1.0
    compute = used * experts / _bandwidth(host, together)
    return RankPlan(host, partition, weights, held, streamed, cache, activations, window, process, memory, compute,
                    streamed / disk if disk else 0.0, placement, kept)


def _prefill_s(rank: RankPlan, dtype: torch.dtype, together: dict[str, int]) -> float:
    """PROMPT tokens: bound by arithmetic where a rate is known, and at least once through the weights."""
    hardware = rank.host.profile.hardware
    rate = {torch.bfloat16: hardware.bf16_tflops, torch.float16: hardware.fp16_tflops}.get(dtype) or hardware.fp32_tflops
    operations = 2 * PROMPT * rank.weights / dtype.itemsize * _sharers(rank.host, together)
    return max(rank.compute_s, operations / (rate * 1e12 * REACHED) if rate else 0.0)


def _sums(hosts: Hosts, link: Survey | None, config: ModelConfig, dtype: torch.dtype, rows: int) -> tuple[float, str, str]:
    """Seconds of all sums of a pass over `rows` tokens, and the route that rank 0's profile lets them take. Without a link: 0 and ''."""
    if link is None:
        return 0.0, "", PLAIN
    profile, nbytes, kind = hosts.ranks[0].profile, rows * config.hidden_size * dtype.itemsize, NARROW if dtype.itemsize == 2 else WIDE
    codec = PLAIN if profile.codec == "auto" and profile.algorithm != "auto" else profile.codec          # as tuning.settle has it
    route = link.best("all_reduce", nbytes, kind, algorithm=profile.algorithm, codec=codec)
    each = link.expected("all_reduce", route, nbytes, kind)
    return each * (2 * config.layers + 1), *route                        # and the embedding's, or its broadcast


def _survey(hosts: Hosts) -> Survey | None:
    """The link that was given, else what `hetero-attn tune` measured for rank 0's profile; None where there is neither, or one rank.

    A codec's share of the wire is known, what it takes of a processor is timed on this machine: the one thing here that runs.
    """
    profile, ranks = hosts.ranks[0].profile, len(hosts.ranks)
    if ranks == 1:
        return None
    if hosts.link is not None:
        found = Survey(ranks, (), hosts.link)
    else:
        try:
            found = from_profile(profile.link, ranks)
        except ValueError as error:
            raise ModelError(f"the overlay's link measurements are damaged ({error}); run hetero-attn tune --tp {ranks} again") from None
    return found and replace(found, codecs=codec_costs(0, ranks, codecs_of(profile.codec)))


def _largest_context(ranks: Sequence[RankPlan], config: ModelConfig, dtype: torch.dtype, shared: Cooperation | None) -> int:
    """Tokens of one sequence that every rank's cache can hold beside the rest; streaming ranks may give up what they hold."""
    found = config.context_length if shared is None else min(config.context_length, shared.largest)
    for rank in ranks:
        if rank.placement is not None:
            continue
        free = rank.memory - rank.total + rank.cache + (rank.held if rank.streamed else 0)
        each = 2 * config.layers * len(rank.partition.kv_heads) * config.head_dim * dtype.itemsize
        found = min(found, max(0, free // each - rank.host.profile.kv_block_size))
    return found


def _alone(hosts: Hosts, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, context: int) -> float | None:
    """A token on the best of these ranks with the whole model, None where none can."""
    whole = Partition.of(0, 1, q_heads=config.q_heads, kv_heads=config.kv_heads, ffn=config.intermediate_size, vocab=config.vocab_size)
    times = []
    for host in hosts.ranks:
        try:
            rank = _rank(host, whole, config, checkpoint, dtype, context, {host.name: 1}, _disk(host))
        except ModelError:
            continue
        if rank.placement and missing(host, rank.placement):
            continue
        own = pace(rank, rank.placement, config, dtype, context, _number, 0.0, {host.name: 1}).total_s if rank.placement else rank.compute_s
        times.append(max(own, rank.disk_s))
    return min(times, default=None)


def _remarks(link: Survey | None, ranks: Sequence[RankPlan], token: float | None, reduce_s: float, alone: float | None, codec: str):
    if len(ranks) > 1 and link is None:
        yield ("the link is not known, so sums between ranks are left out: measure it with hetero-attn tune, or give link: in hosts.yaml "
               "or --link")
    if token is None:
        return
    slow = max(ranks, key=lambda each: max(each.disk_s, each.compute_s))
    reading = slow.disk_s > slow.compute_s + reduce_s
    if len(ranks) > 1 and alone is not None and alone <= token:
        yield (f"tensor parallelism is the wrong choice here: one rank alone takes {alone * 1e3:.3g} ms a token, {len(ranks)} ranks take "
               f"{token * 1e3:.3g} ms, of which {reduce_s * 1e3:.3g} ms are sums over the link")
    elif reduce_s > 0.5 * token and not reading:
        hint = "a quicker link" if codec != PLAIN else "a codec (codec: auto) or a quicker link"
        yield f"the link takes {reduce_s / token:.0%} of a token's time: {hint} gains most"
    if reading:
        yield (f"rank {slow.partition.rank}'s disk sets the pace: {slow.disk_s:.3g} s of reading a token; memory or a quicker disk gains "
               "most")
        sharing_it = [str(each.partition.rank) for each in ranks if each.streamed and each.host.name and each.host.name == slow.host.name]
        if len(sharing_it) > 1:
            yield (f"ranks {', '.join(sharing_it)} are on one host and share its disk's {slow.host.profile.hardware.disk_gbps:g} GB/s: put "
                   "them on several if there are several (--per-host, or host: in hosts.yaml)")
