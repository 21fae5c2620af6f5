"""What a communicator must do: the object that holds a group of ranks, its topology and its buffers.

Three operations are asked of whoever writes one (all_reduce, all_gather, broadcast); the rest is composed of them here, slow but
right, and may be overridden one by one as a device learns to do better. A communicator that wraps another (`base`, the
torch.distributed one) inherits whatever it does not override. Every rank must call the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetero_attn.collective_arguments import (
    NormArguments,
    check_all_gather,
    check_all_reduce,
    check_broadcast,
    check_reduce_scatter,
    check_tensor,
)
from hetero_attn.norm import rms_norm
from hetero_attn.product import linear


class CommunicatorError(RuntimeError):
    """A collective failed or timed out. The text names this rank, the operation (site, shape) and the ranks that are missing.

    The communicator is broken from then on: each later call raises the first error again. `.rank` is the rank that raises,
    `.operation` what it was doing, `.missing` the ranks that did not answer ([] when all are alive, only out of step).
    """

    def __init__(self, message: str, *, rank: int | None = None, operation: str = "", missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rank = rank
        self.operation = operation
        self.missing = list(missing)


class Handle:
    """What start_…() returns. This one holds a result that is there already; asynchronous communicators subclass it."""

    def __init__(self, result: Any = None) -> None:
        self._result = result

    def wait(self) -> Any:
        """The operation's result, as its synchronous form returns it. May be called any number of times.

        On a CPU it returns when the result is there. On a device it orders the calling stream after the operation and
        does not stop the host. Raises CommunicatorError when the operation failed. A handle may also be dropped unwaited.
        """
        return self._result

    def when_over(self, call: Callable[[], None]) -> bool:
        """(optional) Have `call` called, on whatever thread, as soon as an operation is over that the host does to its end: True. This
        default: False, wait() stops nobody who could not be stopped, and nothing is called."""
        return False


def shard_rows(total: int, rank: int, world_size: int) -> slice:
    """The rows of `total` that `rank` owns: contiguous, in rank order; the first total % world_size ranks have one more."""
    base, extra = divmod(total, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def shard_counts(world_size: int, total: int) -> list[int]:
    """How many of `total` rows each rank owns, in rank order."""
    base, extra = divmod(total, world_size)
    return [base + (rank < extra) for rank in range(world_size)]


class Communicator:
    """A group of ranks and the collectives among them.

    Tensors may have any dtype (any with a sum, where one is taken), any shape (empty ones too) and any strides; ranks' shapes
    agree unless an operation says otherwise. 16-bit floats are summed in fp32 and rounded once. After a collective every rank holds the
    SAME BITS, on every run: schedules and greedy decoding rely on it. Inputs are written only where "in place" is said.
    One thread calls a communicator; `site` ("layers.3.o_proj") names the place in the model, for errors and calibration.
    TypeError/ValueError name a wrong argument before anything is sent; CommunicatorError is everything after that.
    """

    def __init__(self, rank: int, world_size: int, *, device: torch.device | str = "cpu", base: Communicator | None = None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)                # where empty() allocates
        self.base = base
        # A backend's own linear, with Backend.linear's signature; the decoder puts its profile's here.
        self.linear: Callable[..., torch.Tensor] = linear
        self.timeout_s: float = float("inf") if base is None else base.timeout_s       # the longest a collective waits for a peer
        self.failure: CommunicatorError | None = None     # the first failure of any collective; the group is broken from then on
        self.wrapper_doing: Callable[[], str] | None = None   # what a wrapper is at, in words, for ranks that ask; '' = no call of its own

    @property
    def codecs(self) -> Any | None:
        """(optional) What packs partial sums for the wire (hetero_attn.collectives.codec.Codecs), whose `calibration` a model sets and
        whose `traffic` counts; None where nothing does."""
        return None if self.base is None else self.base.codecs

    # ---- who owns what -------------------------------------------------------------------------------------------------

    def rows(self, total: int) -> slice:
        """This rank's slice of `total` rows (tokens); may be empty when total < world_size. No communication."""
        return shard_rows(total, self.rank, self.world_size)

    def row_counts(self, total: int) -> list[int]:
        """How many of `total` rows each rank owns, in rank order."""
        return shard_counts(self.world_size, total)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """(optional) An uninitialised tensor that collectives take without copying (symmetric or shared memory)."""
        if self.base is not None:
            return self.base.empty(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    # ---- the three to write --------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        """Sum x over all ranks IN PLACE and return it. x of any shape; non-contiguous x is written where it lies."""
        return self._below("all_reduce").all_reduce(x, site=site)

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        """Concatenate every rank's x along `dim`, in rank order: a new tensor on every rank.

        Ranks' shapes may differ in `dim` (0 too). `sizes`, the extent of `dim` at every rank, saves the exchange of sizes
        where the caller knows them (row_counts); all ranks must then pass the same list.
        """
        return self._below("all_gather").all_gather(x, dim, sizes=sizes, site=site)

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        """Write rank src's x into x IN PLACE on every rank and return it. Shapes and dtypes agree."""
        return self._below("broadcast").broadcast(x, src, site=site)

    # ---- composed; override what a device does better -------------------------------------------------------------------

    def barrier(self, *, site: str = "") -> None:
        """Return when every rank has called it."""
        if self.base is not None:
            self.base.barrier(site=site)
        else:
            self.all_reduce(torch.zeros(1, dtype=torch.int64, device=self.device), site=site)

    def await_signal(self, src: int = 0, *, site: str = "") -> None:
        """Rank src returns at once; the others return once src has called it, however long that takes.

        For ranks that idle between requests. Unlike a collective it is bounded by src's life and not by the time-out:
        a rank waits as long as src lives, and raises CommunicatorError once it does not.
        """
        if self.base is not None:
            self.base.await_signal(src, site=site)
        else:
            self.broadcast(torch.zeros(1, dtype=torch.int64, device=self.device), src, site=site)

    def reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        """Sum x [T, ...] over all ranks; returns this rank's rows(T) of the sum, a new tensor. x is not written."""
        check_reduce_scatter(x)
        if self.base is not None:
            return self.base.reduce_scatter(x, site=site)
        return self.all_reduce(x.clone(), site=site)[self.rows(x.shape[0])].clone()

    def linear_all_reduce(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, site: str
    ) -> torch.Tensor:
        """The row-parallel linear: x [..., K_local] @ weight [C, K_local].T summed over ranks, plus bias [C]; returns [..., C].

        The bias counts ONCE: rank 0's joins the sum, what other ranks pass is ignored. So row-parallel layers may keep
        their bias on rank 0 only, or on every rank. K_local may differ between ranks and may be 0.
        """
        return self.all_reduce(self._partial(x, weight, bias), site=site)

    def fused_linear_reasons(self, dtype: torch.dtype) -> list[str] | None:
        """(optional) Whether linear_all_reduce of `dtype` is one operator here, which overlaps product and sum by itself: [] = it is, from
        some rows on; reasons = this device has such an operator, and they stand against it; None = it has none. Every rank's alike."""
        return None

    def _partial(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """This rank's summand of linear_all_reduce, made where the all-reduce takes it without a copy."""
        check_tensor("linear_all_reduce", "x", x)
        check_tensor("linear_all_reduce", "weight", weight)
        if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"linear_all_reduce: x {list(x.shape)} and weight {list(weight.shape)}, expected x [..., K] and weight [C, K]")
        out = self.empty((*x.shape[:-1], weight.shape[0]), x.dtype)                                    # [..., C]
        self.linear(x, weight, bias if self.rank == 0 else None, out=out)
        return out

    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        residual_shard: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        site: str,
        weight_offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """TokenWeave's fused step: all-reduce, residual add and RMSNorm, where each rank normalises only its own rows.

        x [T, C] is every rank's partial sum; residual_shard [rows(T), C] lives on the owning rank alone and is updated
        IN PLACE; weight, post_weight [C]. Returns (normed [T, C] in x's dtype, residual_shard). With y = the sum of x:

            y = rms_norm(y, post_weight)        if post_weight is given (Gemma 2 normalises the sum before the add)
            residual_shard += y[rows(T)]
            normed = rms_norm(residual, weight) gathered over ranks

        Both norms follow hetero_attn.norm.rms_norm with the same eps and weight_offset (1 is Gemma's 1 + weight, in
        Gemma's order of rounding; 0 is Llama's). T may be smaller than world_size. x is working space: its content is
        unspecified afterwards. An unfused communicator rounds y to x's dtype before the add, a fused one need not.
        """
        return self.reduce_add_norm(self.checked_norm(NormArguments(x, residual_shard, weight, eps, site, weight_offset, post_weight)))

    def reduce_add_norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        """(optional) all_reduce_rms_norm of arguments that have been checked: the one to override."""
        shard = self.reduce_scatter(call.x, site=call.site)                                    # [rows(T), C]
        normed = add_and_norm(shard, call.residual_shard, call.weight, call.eps, call.weight_offset, call.post_weight)
        return self.all_gather(normed, sizes=self.row_counts(call.x.shape[0]), site=call.site), call.residual_shard

    # ---- asynchronous forms ---------------------------------------------------------------------------------------------
    # start_X(…).wait() gives what X(…) gives. Until then do not touch the tensors handed over. Any number may be in
    # flight; all ranks start them in the same order, and may wait for them in any. (optional) override start().

    def start(self, operation: str, *args: Any, **options: Any) -> Handle:
        """Begin the method named `operation`. This default has no one to do it meanwhile, and does it at once."""
        return Handle(getattr(self, operation)(*args, **options))

    def start_all_reduce(self, x: torch.Tensor, *, site: str = "") -> Handle:
        return self.start("all_reduce", x, site=site)

    def start_reduce_scatter(self, x: torch.Tensor, *, site: str = "") -> Handle:
        return self.start("reduce_scatter", x, site=site)

    def start_all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> Handle:
        return self.start("all_gather", x, dim, sizes=sizes, site=site)

    def start_broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> Handle:
        return self.start("broadcast", x, src, site=site)

    def start_linear_all_reduce(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, site: str
    ) -> Handle:
        """The product is made now, by the calling thread or stream; the sum is what goes on meanwhile."""
        return self.start("all_reduce", self._partial(x, weight, bias), site=site)

    def start_barrier(self, *, site: str = "") -> Handle:
        return self.start("barrier", site=site)

    def start_all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        residual_shard: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        site: str,
        weight_offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> Handle:
        options = {"site": site, "weight_offset": weight_offset, "post_weight": post_weight}
        return self.start("all_reduce_rms_norm", x, residual_shard, weight, eps, **options)

    # ---- the device's units ---------------------------------------------------------------------------------------------

    @property
    def cta_choices(self) -> tuple[int, ...]:
        """(optional) Numbers of CTAs, one a unit of the device, that a started sum may run on, smallest first; the same on every rank.
        () = sums take none of the units that compute."""
        return () if self.base is None else self.base.cta_choices

    def use_ctas(self, attention: int | None = None, mlp: int | None = None) -> None:
        """(optional) From now on started sums after an attention, and after an MLP, run on so many CTAs; None = as before. All ranks say
        the same, between the same calls. Raises ValueError for a number that cannot be."""
        if self.base is not None:
            self.base.use_ctas(attention, mlp)

    def ctas_beside(self, site: str) -> int:
        """(optional) On how many CTAs a sum started at a site of the model runs; 0 where sums have none."""
        return 0 if self.base is None else self.base.ctas_beside(site)

    # ---- the end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the group. Never hangs; may be called twice, and after an error. A wrapper closes what it wraps."""
        if self.base is not None:
            self.base.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}, device={str(self.device)!r})"

    # ---- for those who write one ----------------------------------------------------------------------------------------

    def checked_norm(self, call: NormArguments) -> NormArguments:
        """The arguments of all_reduce_rms_norm, if they are what it takes on this rank. Raises TypeError or ValueError, before anything
        is sent."""
        x = call.x
        if isinstance(x, torch.Tensor) and x.dim() != 2:
            raise ValueError(f"all_reduce_rms_norm: x is {list(x.shape)}, expected [T, C]")
        own = self.rows(x.shape[0]) if isinstance(x, torch.Tensor) else slice(0, 0)
        call.check(own.stop - own.start, f"rank {self.rank} of {self.world_size}")
        return call

    # A wrapper that carries collectives by a way of its own keeps one order, one error and one thread with its base by these four.

    def busy(self) -> bool:
        """Whether started operations are unfinished, so that a synchronous one must queue behind them by in_background()."""
        return self.base is not None and self.base.busy()

    def in_background(self, call: Callable[[], Any]) -> Handle:
        """Run `call` after everything that was started before it, on the group's communication thread. This default does it now."""
        return Handle(call()) if self.base is None else self.base.in_background(call)

    def raise_if_broken(self) -> None:
        """Raise the first failure again, as a new CommunicatorError; or one that says that the communicator has been closed."""
        if self.base is not None:
            self.base.raise_if_broken()
        elif self.failure is not None:
            raise self.failure

    def fail(self, text: str, error: Exception, began: float) -> CommunicatorError:
        """The error to raise for a failed operation, and the end of this group: who is missing is asked for and said.

        text: the operation ("all_reduce of x [4, 8] float32 at layers.0.o_proj"). error: what went wrong; its first line is kept.
        began: time.monotonic() when the operation began. Of several failures the first is returned each time.
        """
        if self.base is not None:
            return self.base.fail(text, error, began)
        if self.failure is None:
            message = f"rank {self.rank} of {self.world_size}: {text} failed [{error}]"
            self.failure = CommunicatorError(message, rank=self.rank, operation=text)
        return self.failure

    def _below(self, operation: str) -> Communicator:
        if self.base is None:
            raise NotImplementedError(f"{type(self).__name__} wraps no other communicator, so it must define {operation}()")
        return self.base


def add_and_norm(
    shard: torch.Tensor,
    residual_shard: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
    post_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The row-local middle of all_reduce_rms_norm: shard, residual_shard [R, C]; updates residual_shard, returns normed [R, C]."""
    if post_weight is not None:
        shard = rms_norm(shard, post_weight, eps, weight_offset)
    residual_shard.add_(shard)
    return rms_norm(residual_shard, weight, eps, weight_offset).to(shard.dtype)


class SoloCommunicator(Communicator):
    """A world of one: nothing is sent, everything is checked, and no torch.distributed is needed."""

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        super().__init__(0, 1, device=device)

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        check_all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        check_all_gather(x, dim, sizes, 0, 1)
        return x.clone(memory_format=torch.contiguous_format)

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        check_broadcast(x, src, 1)
        return x

    def reduce_add_norm(self, call: NormArguments) -> tuple[torch.Tensor, torch.Tensor]:
        return add_and_norm(call.x, call.residual_shard, call.weight, call.eps, call.weight_offset, call.post_weight), call.residual_shard
