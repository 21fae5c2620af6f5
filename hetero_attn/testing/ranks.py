"""Real ranks for tests: a function runs with a communicator in every rank, and what each returned or raised comes back.

Nothing here is faked: ranks are processes under torchrun's environment. Importing torch costs seconds a rank, so a suite starts one set
of ranks per world size and does all its work in it. A watchdog ends ranks that hang.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hetero_attn.collectives import BASE, init_communicator
from hetero_attn.collectives.algorithms import NAMES
from hetero_attn.communicator import Communicator, SoloCommunicator
from hetero_attn.parallel.launch import run_ranks
from hetero_attn.profile import load_profile

VARIABLE = "HETERO_ATTN_TEST_COMMUNICATORS"
DEVICE_VARIABLE = "HETERO_ATTN_TEST_DEVICE"


class Outcome(NamedTuple):
    """What one rank's function did: its result, or the exception's type name, text and traceback."""

    result: Any = None
    error: str = ""
    text: str = ""
    traceback: str = ""


def on_ranks(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    world_size: int = 2,
    *,
    communicator: str = BASE,
    collective_timeout_s: float = 30.0,
    timeout_s: float = 240.0,
) -> list[Outcome]:
    """fn(communicator, *args) in `world_size` ranks -> their outcomes in rank order. fn is a top-level function.

    communicator: 'distributed', 'distributed-<algorithm>' or the backend whose communicator is asked for.
    Raises RankFailure when a rank dies or time is up.
    """
    return run_ranks(_in_rank, (fn, tuple(args), communicator, collective_timeout_s), world_size, timeout_s=timeout_s)


def make_communicator(name: str, timeout_s: float = 30.0) -> Communicator:
    """The communicator of that name and nothing else, in a rank. Raises CommunicatorError with the reasons against it.

    'distributed-star' is the one over torch.distributed with every collective by that algorithm; likewise the others' names.
    Tensors live on the CPU, or on HETERO_ATTN_TEST_DEVICE.
    """
    name, _, algorithm = name.partition("-") if name.startswith(f"{BASE}-") else (name, "", "")
    profile = dataclasses.replace(load_profile("cpu"), communicators=(name,), algorithm=algorithm or "auto")
    return init_communicator(profile, timeout_s=timeout_s, device=os.environ.get(DEVICE_VARIABLE) or None)


def communicators() -> list[str]:
    """What the suite runs: HETERO_ATTN_TEST_COMMUNICATORS, else the solo one, torch.distributed's own collectives and each algorithm over
    it, and every backend of this machine that has a communicator."""
    if os.environ.get(VARIABLE):
        return [name.strip() for name in os.environ[VARIABLE].split(",") if name.strip()]
    from hetero_attn import registry
    from hetero_attn.backend import Backend

    having = [name for name in registry.names() if type(registry.get(name)).communicator is not Backend.communicator]
    own = [name for name in having if not registry.unavailable(registry.get(name))]
    return ["solo", BASE, *(f"{BASE}-{algorithm}" for algorithm in NAMES), *own]


def alone(fn: Callable[..., Any], args: Sequence[Any] = ()) -> list[Outcome]:
    """fn in this process with a world of one."""
    with SoloCommunicator() as communicator:
        return [_outcome(fn, communicator, args)]


def _in_rank(fn: Callable[..., Any], args: Sequence[Any], name: str, timeout_s: float) -> Outcome:
    try:
        communicator = make_communicator(name, timeout_s)
    except Exception as error:
        return Outcome(error=type(error).__name__, text=str(error), traceback=traceback.format_exc())
    with communicator:
        return _outcome(fn, communicator, args)


def _outcome(fn: Callable[..., Any], communicator: Communicator, args: Sequence[Any]) -> Outcome:
    try:
        return Outcome(result=fn(communicator, *args))
    except Exception as error:
        return Outcome(error=type(error).__name__, text=str(error), traceback=traceback.format_exc())
