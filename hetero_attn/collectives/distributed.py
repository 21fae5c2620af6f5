"""The communicator over torch.distributed: gloo for CPU tensors, NCCL or HCCL for device tensors, gloo with host staging otherwise.

Its operations, each checked and turned into a plan. exchange.py says what travels, runner.py when, and what becomes of a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hetero_attn.collective_arguments import NormArguments, check_all_gather, check_all_reduce, check_broadcast, check_reduce_scatter
from hetero_attn.collectives.choice import Choice
from hetero_attn.collectives.codec import Codecs
from hetero_attn.collectives.exchange import Exchange, Steps
from hetero_attn.collectives.plans import Plan, plan, text_of
from hetero_attn.collectives.runner import PlanRunner
from hetero_attn.collectives.wire import Wire


class DistributedCommunicator(PlanRunner):
    """All collectives over one torch.distributed group that spans the world. Made by init_communicator(), which joins the ranks.

    group: the process group (None = the default one), serving CPU tensors by gloo and, where `native` names a device type,
    that device's tensors too; other devices' tensors are staged through host memory. store: shared by all ranks, for the roll
    call; store_rank: the rank that serves it, None for torchrun's agent. timeout_s: the longest a collective waits for a peer.
    leave(): called by close(), destroys what the maker created. choice: which algorithm serves a call, the same on every rank
    (None: torch.distributed's own); it may be replaced between calls, on all ranks together.

    On NCCL and HCCL sums are the library's own, which may round 16-bit floats at every hop; there the library's watchdog
    bounds the waits and ends the process, since the host does not wait for a device's collectives.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        *,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        native: str = "cpu",
        timeout_s: float = 60.0,
        leave: Callable[[], None] = lambda: None,
        store_rank: int | None = None,
        choice: Choice | None = None,
    ) -> None:
        exchange = Exchange(rank, world_size, group, native, choice)
        super().__init__(exchange, store, device=device, timeout_s=timeout_s, leave=leave, store_rank=store_rank)

    @property
    def choice(self) -> Choice:
        """What picks the algorithm and codec of a call."""
        return self._exchange.choice

    @choice.setter
    def choice(self, choice: Choice) -> None:
        self._exchange.choice = choice

    @property
    def codecs(self) -> Codecs:
        return self._exchange.codecs

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that the algorithms over point-to-point messages have handed to torch.distributed, headers of codecs included."""
        return self._exchange.wire.bytes_sent

    # ---- operations: check and describe, then steps ------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        return self._run(self._plan_all_reduce(x, site=site))

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        return self._run(self._plan_all_gather(x, dim, sizes=sizes, site=site))

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        return self._run(self._plan_broadcast(x, src, site=site))

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        return self._run(self._plan_reduce_scatter(x, site=site))

    def barrier(self, *, site: str = "") -> None:
        self._run(self._plan_barrier(site=site))

    def reduce_add_norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(self._plan_norm(call))

    def planned(self, operation: str, *args: Any, **options: Any) -> Plan:
        return getattr(self, f"_plan_{operation}")(*args, **options)

    def _plan_all_reduce(self, x: torch.Tensor, *, site: str = "", name: str = "all_reduce") -> Plan:
        check_all_reduce(x, operation=name)
        single = self._exchange.is_single("all_reduce", x, site, x.nbytes)
        return plan(text_of(name, x, site), self._exchange.all_reduce(x, site), single, (x,), coded=self._coded("all_reduce", x, site))

    def _plan_barrier(self, *, site: str = "") -> Plan:
        return self._plan_all_reduce(torch.zeros(1, dtype=torch.int64), site=site, name="barrier")

    def _plan_all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> Plan:
        dim = check_all_gather(x, dim, sizes, self.rank, self.world_size)
        single = False
        if sizes is not None:
            total = x.nbytes // x.shape[dim] * sum(sizes) if x.numel() else 0
            single = bool(total) and self._exchange.is_single("all_gather", x, site, total)
        return plan(text_of("all_gather", x, site), self._exchange.all_gather(x, dim, sizes, site), single, (x,))

    def _plan_broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> Plan:
        check_broadcast(x, src, self.world_size)
        single = self._exchange.is_single("broadcast", x, site, x.nbytes)
        return plan(text_of(f"broadcast from rank {src}", x, site), self._exchange.broadcast(x, src, site), single, (x,))

    def _plan_reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> Plan:
        check_reduce_scatter(x)
        single = self._exchange.is_single("reduce_scatter", x, site, x.nbytes)
        return plan(text_of("reduce_scatter", x, site), self._exchange.reduce_scatter(x, site), single, (x,),
                    coded=self._coded("reduce_scatter", x, site))

    def _plan_all_reduce_rms_norm(self, *args: Any, **options: Any) -> Plan:
        return self._plan_norm(self.checked_norm(NormArguments(*args, **options)))

    def _plan_norm(self, call: NormArguments) -> Plan:
        return plan(text_of("all_reduce_rms_norm", call.x, call.site), self._exchange.all_reduce_rms_norm(call), False,
                    tuple(call.tensors.values()), coded=self._coded("reduce_scatter", call.x, call.site))

    def _coded(self, operation: str, x: torch.Tensor, site: str) -> bool:
        """Only a device library's calls are asked: the others run on the thread, or to their ends, whatever they are."""
        return self._exchange.is_native(x) and self._exchange.is_coded(operation, x, site)

    def run_steps(self, text: str, steps: Callable[[Wire], Steps]) -> Any:
        """Run steps over this group's point-to-point messages, in order with its other calls; all ranks together. Errors name `text`."""
        return self._run(plan(text, steps(self._exchange.wire), False, ()))
