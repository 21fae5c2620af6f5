"""Ranks that tell one another something before they decide together: a few bytes of JSON over the base, while a communicator is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from hetero_attn.communicator import Communicator, CommunicatorError


def told_by_all(base: Communicator, said: Any) -> list[Any]:
    """Every rank's words, in rank order. Nothing is unpickled from the wire. Raises CommunicatorError."""
    own = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device="cpu")
    lengths = base.all_gather(torch.tensor([own.numel()], device="cpu"), sizes=[1] * base.world_size).tolist()
    joined = bytes(base.all_gather(own, sizes=lengths).tolist())
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [json.loads(joined[start : start + length]) for start, length in zip(starts, lengths)]


def on_all_ranks(base: Communicator, what: str, step: Callable[[], Any]) -> Any:
    """step(), if it works on every rank; where it does not on one, RuntimeError on all of them with that rank's words."""
    made, trouble = None, ""
    try:
        made = step()
    except CommunicatorError:
        raise                                        # a rank is lost: nobody will be told anything
    except Exception as error:
        trouble = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    failed = {rank: each for rank, each in enumerate(told_by_all(base, trouble)) if each}
    if failed:
        ranks = ", ".join(map(str, failed))
        raise RuntimeError(f"{what}: rank {ranks}: {next(iter(failed.values()))}")
    return made
