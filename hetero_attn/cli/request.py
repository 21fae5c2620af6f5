"""What `hetero-attn generate` was asked for, checked before any rank starts or any weight is read.

Ranks take seconds to start and a failing one takes the others with it, so all that can be known beforehand is found here, in one
process: the directory and its headers, the tokenizer, the tensor-parallel size, the profile, the backend, every prompt's length.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hetero_attn import registry
from hetero_attn.cli.errors import CommandError
from hetero_attn.communicator import Communicator
from hetero_attn.models import restart
from hetero_attn.models.calibration import CALIBRATED, find_calibration
from hetero_attn.models.config import DTYPES, ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.generate import CACHE_TOKENS, MAX_BATCH, generation_config, new_token_limit, prompt_ids
from hetero_attn.models.load import open_model, own_partition
from hetero_attn.models.placing import check_placement, may_offload
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.shard_folder import rank_folder
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.models.weights import Checkpoint
from hetero_attn.parallel.placement import parse, shown
from hetero_attn.parallel.sharding import Partition
from hetero_attn.parallel.trace_file import objection, settled
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.profile_detect import present_device
from hetero_attn.quantity import parse_bytes
from hetero_attn.spec import AttentionSpec

LONGEST_TIMEOUT_S = 1_000_000       # torch's store counts 32-bit milliseconds
CUTTING = ("weave", "tiled")         # schedules that would do nothing on one rank
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Request:
    """A checked command line. Plain values only: it is sent to ranks. prompts is () for a conversation, and where rank 0 has them."""

    model: Path
    prompts: tuple[str, ...]
    params: SamplingParams
    profile: DeviceProfile
    tp: int
    backend: str | None             # by name; None: the profile decides
    runs_on: str                    # the backend that serves the model's attention
    dtype: torch.dtype
    device: str | None
    vocabulary: str
    chat: bool
    system: str | None
    json: bool
    stream: bool
    echo: bool
    interactive: bool               # a conversation with whoever is at standard input
    bar: bool | None
    cache_tokens: int | None        # the longest that the prompts and their texts can get; None where rank 0 alone knows
    cache_sequences: int
    restart: Path | None            # where the tokens are written down, so that a restart goes on with them
    trust_network: bool
    trace: Path | None = None       # where rank 0 writes what ran when


def checked(args, world_size: int, *, rank: int = 0) -> Request:
    """The Request of parsed arguments for `world_size` ranks, of which only rank 0 reads the prompts.

    Raises CommandError, ModelError, ProfileError, UnknownBackendError, UnsupportedError.
    """
    if args.echo and (args.json or args.chat):
        raise CommandError("--echo prints prompts before their text: leave it out with --json and --chat")
    if args.system is not None and not args.chat:
        raise CommandError("--system is the first message of a conversation: give --chat too")
    folder = rank_folder(args.model, rank, world_size)
    config, checkpoint = open_model(folder)
    if args.schedule in CUTTING and world_size == 1:
        raise CommandError(f"--schedule {args.schedule} cuts steps for the sums between ranks, and one rank sums nothing: give --tp N "
                           "with N above 1, or leave it out")
    profile = load_profile(args.profile, sets=_sets(args), device=args.device, world_size=world_size, model=Path(args.model).resolve().name)
    device = present_device(args.device if args.device is not None else profile.device)
    check_placement(profile, config, streams=profile.memory_budget is not None or profile.window is not None)
    if profile.codec == CALIBRATED and world_size > 1 and rank == 0:
        find_calibration(profile, config, world_size, device)
    if device.type != profile.device:
        raise CommandError(f"--device is {args.device}, profile {profile.name!r} is for {profile.device}; leave one of the two out")
    vocabulary = args.vocabulary or (checkpoint.manifest or profile).vocabulary
    dtype = _dtype(args.dtype or profile.dtype, config, checkpoint)
    partition = own_partition(checkpoint, rank, world_size, vocabulary)
    check_weights(config, checkpoint, rank, world_size, vocabulary, partition)
    tokenizer = Tokenizer.from_dir(folder) if rank == 0 else None            # a worker's folder has none
    params = _params(args, folder)
    sources = _sources(args, rank)
    prompts = tuple(text if kind == "text" else _read(text) for kind, text in sources) if rank == 0 else ()
    request = Request(
        model=Path(args.model), prompts=prompts, params=params, profile=profile, tp=world_size, backend=args.backend,
        runs_on=_backend(args.backend, config, world_size, dtype, device, profile), dtype=dtype, device=args.device, vocabulary=vocabulary,
        chat=args.chat, system=args.system, json=args.json, stream=not (args.no_stream or args.json), echo=args.echo,
        interactive=not sources,
        bar=True if args.progress else None, cache_tokens=None, cache_sequences=1,
        restart=_restart_file(args, bool(sources) or rank > 0), trust_network=args.trust_network,
        trace=_trace(args, world_size, rank, profile),
    )
    ids = [prompt_ids(prompt, config, tokenizer, name) for prompt, name in zip(as_prompts(request, tokenizer), _names(prompts))]
    if ids:
        needs = [len(each) + new_token_limit(each, params, config) for each in ids]
        request = replace(request, cache_tokens=max([*needs, min(sum(needs), CACHE_TOKENS)]), cache_sequences=min(len(ids), MAX_BATCH))
    if request.interactive and rank == 0:
        tokenizer.chat([*opening(request), {"role": "user", "content": "?"}])
    return request


def _trace(args, world_size: int, rank: int, profile: DeviceProfile) -> Path | None:
    """The file for --trace, which rank 0 writes and need not exist elsewhere. Raises CommandError."""
    if args.trace is None:
        return None
    if world_size == 1 and not may_offload(profile):
        raise CommandError("--trace shows computing beside communicating and copying, and one rank does neither here: give --tp N with N "
                           "above 1, or let layers' KV lie in host memory (--placement N, --device-memory SIZE)")
    if rank == 0 and (reason := objection(args.trace)) is not None:
        raise CommandError(f"--trace is {args.trace}, {reason}")
    return settled(args.trace)


def opening(request: Request) -> list[dict[str, str]]:
    """The messages a conversation begins with."""
    return [] if request.system is None else [{"role": "system", "content": request.system}]


def as_prompts(request: Request, tokenizer: Tokenizer) -> list[str | list[int]]:
    """The prompts as generate takes them; under --chat each is one user turn, rendered by the template (which writes its own BOS)."""
    if not request.chat:
        return list(request.prompts)
    turns = [[*opening(request), {"role": "user", "content": prompt}] for prompt in request.prompts]
    return [tokenizer.encode(tokenizer.chat(turn), add_special_tokens=False) for turn in turns]


def _restart_file(args, prompted: bool) -> Path | None:
    """The file for --restart: the same one in every start of one run. Raises CommandError for a conversation."""
    if not args.restart:
        return None
    if not prompted:
        raise CommandError("--restart goes on with the text of prompts: give --prompt, a conversation is not written down")
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if "RANK" in os.environ and run_id in ("", "none"):
        raise CommandError("--restart under torchrun needs a name for the run, the same in every start: give torchrun --rdzv-id NAME")
    name = hashlib.sha256(run_id.encode()).hexdigest()[:16] if run_id else secrets.token_hex(8)
    return restart.folder() / f"{name}.jsonl"


def _names(prompts: Sequence[str]) -> list[str]:
    return ["the prompt"] if len(prompts) == 1 else [f"prompt {number} of {len(prompts)}" for number in range(1, len(prompts) + 1)]


def _sets(args) -> list[str]:
    """--set and the options that are profile values by another name."""
    sets = list(args.set)
    if args.memory_budget is not None:
        try:
            parse_bytes(args.memory_budget)
        except ValueError as error:
            raise CommandError(f"--memory-budget: {error}") from None
        sets.append(f"memory_budget={args.memory_budget.strip()}")
    if args.window is not None:
        if args.window < 1:
            raise CommandError(f"--window is {args.window}, expected at least 1 block")
        sets.append(f"window={args.window}")
    sets += placement_sets(args.placement, args.device_memory)
    if args.schedule is not None:
        sets.append(f"schedule={args.schedule}")
    if args.timeout is not None:
        if not 0 < args.timeout <= LONGEST_TIMEOUT_S:
            raise CommandError(f"--timeout is {args.timeout:g}, expected seconds: above 0, at most {LONGEST_TIMEOUT_S}")
        sets.append(f"timeout_s={args.timeout:f}")                # YAML takes 1e-05 for a string
    return sets


def placement_sets(placement: str | None, device_memory: str | None) -> list[str]:
    """--placement and --device-memory as profile settings. Raises CommandError."""
    sets = []
    if placement is not None:
        try:
            sets.append(f"placement={shown(parse(placement))}")
        except ValueError as error:
            raise CommandError(f"--placement: {error}") from None
    if device_memory is not None:
        try:
            parse_bytes(device_memory)
        except ValueError as error:
            raise CommandError(f"--device-memory: {error}") from None
        sets.append(f"device_memory={device_memory.strip()}")
    return sets


def _params(args, folder: Path) -> SamplingParams:
    given = {name: getattr(args, name) for name in SAMPLING}
    stored = generation_config(folder)
    try:
        SamplingParams.from_generation_config(stored)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{folder}/generation_config.json: {error}") from None
    try:
        params = SamplingParams.from_generation_config(stored, **given, stop=tuple(args.stop), ignore_eos=args.ignore_eos)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    return params if params.seed is not None else replace(params, seed=secrets.randbits(31))


def _sources(args, rank: int) -> list[tuple[str, str]]:
    """('text', prompt) or ('file', name) in the order given; [] for a conversation, and where rank 0 has them. Raises CommandError."""
    sources = list(args.prompts)
    if not sources and not args.chat and rank == 0:
        raise CommandError("no prompt: give --prompt TEXT, --prompt-file FILE, - for standard input, or --chat")
    if sources.count(("file", "-")) > 1:
        raise CommandError("standard input (-) is asked for twice, it can be read once")
    return sources


def _read(name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = "standard input" if name == "-" else name
        raise CommandError(f"prompt file {shown} is not UTF-8 text (byte {error.start} is {content[error.start]:#04x})") from None
    except OSError as error:
        raise CommandError(f"prompt file {name} cannot be read: {error.strerror}") from None


def _dtype(name: str, config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    return (config.dtype or checkpoint.dtype) if name == "auto" else DTYPES[name]


def check_weights(
    config: ModelConfig, checkpoint: Checkpoint, rank: int, world_size: int, vocabulary: str, partition: Partition | None
) -> None:
    """Every tensor the rank needs is in the checkpoint, in its shape and a usable dtype, and can be cut for this many ranks."""
    shape = Decoder(config, Communicator(rank, world_size, device="meta"), dtype=torch.float32, device="meta", vocabulary=vocabulary,
                    partition=partition)
    checkpoint.check(shape.shards(set(checkpoint.entries)))


def _backend(name: str | None, config: ModelConfig, world_size: int, dtype, device: torch.device, profile: DeviceProfile) -> str:
    """The backend that will serve the model's attention. Raises UnknownBackendError, UnsupportedError with every reason."""
    name = registry.chosen_name(name)
    partition = Decoder(config, Communicator(0, world_size, device="meta"), dtype=dtype, device="meta").partition
    with registry.use_profile(profile):
        for window in dict.fromkeys(config.windows):
            spec = AttentionSpec(
                device=device.type, dtype=dtype, batch=1, q_heads=len(partition.q_heads), kv_heads=len(partition.kv_heads),
                q_len=min(profile.prefill_chunk, config.context_length), kv_len=config.context_length, head_dim=config.head_dim,
                v_head_dim=config.head_dim, is_causal=True, scale=config.attention_scale,
                window_size=(-1, -1) if window is None else (window - 1, -1), softcap=config.attention_softcap, varlen=True,
                total_q=min(profile.prefill_chunk, config.context_length), page_size=profile.kv_block_size,
            )
            chosen = registry.select(spec, name).backend.name
    return chosen
