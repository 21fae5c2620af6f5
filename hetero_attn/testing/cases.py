"""An attention call as data: a frozen description from which the tensors are generated, seeded by the description itself.

A case makes two things. `call()` is what a backend gets: the asked layout, memory, pages, poison. `exact_calls()` is what the
fp64 reference gets: the same rounded numbers, contiguous, unpoisoned, one dense call a sequence, so that varlen, paging and
strides are judged by the dense definition and by nothing that shares their code. Randomness is a CPU generator: every device
sees the same numbers.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import torch

from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.memory import MEMORIES, placed

GARBAGE_BLOCKS = (-1, 2**31 - 1, -(2**31), 10**6)       # what a table may hold beyond a sequence's length
MASKS = ("random", "empty rows", "nothing", "padding")  # bool masks
BIASES = ("bias", "bias -inf", "bias min")              # float masks
CONTENTS = ("normal", "integers", "identical keys", "one-hot", "large values")


@dataclass(frozen=True)
class AttentionCase:
    """One call of attention (sequences is None) or attention_varlen (sequences holds each one's (q_len, kv_len))."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 2
    q_len: int = 37
    kv_len: int = 37
    sequences: tuple[tuple[int, int], ...] | None = None
    page_size: int = 0                                  # varlen only; 0 = packed keys
    slack: int = 0                                      # how much larger than needed max_seqlen_q and max_seqlen_k are
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int = 0                                 # 0 = head_dim
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float | None = None
    scale: float | None = None
    alibi: int = 0                                      # 1 = slopes [Hq], 2 = slopes [B, Hq]
    sinks: torch.dtype | None = None
    sink_values: str = "normal"                         # normal, -inf (every second head), large (exp overflows)
    mask: str = ""                                      # one of MASKS or BIASES
    mask_axes: str = "bhqk"                             # a 1 for a broadcast axis: b11k; fewer letters for fewer axes: qk
    mask_dtype: torch.dtype = torch.float32             # of BIASES
    layout: str = "bhsd"
    memory: str = "contiguous"                          # of every tensor in the call, see memory.py
    contents: str = "normal"
    poison: str = ""                                    # nan or inf: written into keys and values that some rows must not touch
    lse: str = "offered"                                # always, never, or offered (where the backend has it); tried without it too
    gradients: tuple[str, ...] = ()                     # arguments that require a gradient

    def __post_init__(self) -> None:
        dense_only = bool(self.mask) or self.layout != "bhsd"
        wrong = [
            (self.varlen and dense_only, "attention_varlen has neither mask nor layout"),
            (self.page_size and not self.varlen, "pages need sequences"),
            (self.poison and self.mask, "under a mask K and V must be finite"),
            (self.poison and not (self.is_causal or self.window_size != (-1, -1) or self.page_size or len(self.sequences or ()) > 1),
             "no key is excluded, poison would reach every row"),
            (self.poison and self.gradients, "poisoned rows have no gradient to compare"),
            (self.mask not in ("", *MASKS, *BIASES), f"mask is {self.mask!r}"),
            (self.contents not in CONTENTS, f"contents are {self.contents!r}"),
            (self.memory not in MEMORIES, f"memory is {self.memory!r}"),
            (self.poison not in ("", "nan", "inf"), f"poison is {self.poison!r}"),
            (self.lse not in ("always", "never", "offered"), f"lse is {self.lse!r}"),
        ]
        for is_wrong, why in wrong:
            if is_wrong:
                raise ValueError(f"case {self.name!r}: {why}")
        if not self.v_head_dim:
            object.__setattr__(self, "v_head_dim", self.head_dim)

    @property
    def varlen(self) -> bool:
        return self.sequences is not None

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(q_len, kv_len) of every sequence, dense calls included."""
        return ((self.q_len, self.kv_len),) * self.batch if self.sequences is None else self.sequences

    @property
    def magnitude(self) -> float:
        """The size of the values that are averaged: what an absolute tolerance is a share of."""
        return 1e4 if self.contents == "large values" else 1.0

    def describe(self) -> str:
        """An expression that rebuilds this case, for a failure's report."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        kept = [f for f in changed if f.name != "v_head_dim" or self.v_head_dim != self.head_dim]
        return f"AttentionCase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in kept)})"

    def spec(self, device: str = "cpu", *, return_lse: bool = False) -> AttentionSpec:
        """The spec that hetero_attn derives from `call(device)`."""
        q_lens, kv_lens = [q for q, _ in self.lengths], [kv for _, kv in self.lengths]
        return AttentionSpec(
            device=torch.device(device).type, dtype=self.dtype, batch=len(self.lengths), q_heads=self.q_heads, kv_heads=self.kv_heads,
            q_len=max(q_lens, default=0) + self.slack if self.varlen else self.q_len,
            kv_len=max(kv_lens, default=0) + self.slack if self.varlen else self.kv_len,
            head_dim=self.head_dim, v_head_dim=self.v_head_dim, is_causal=self.is_causal,
            scale=1 / math.sqrt(self.head_dim) if self.scale is None else self.scale, window_size=self.window_size,
            softcap=self.softcap or 0.0, alibi=self.alibi, sinks=self.sinks is not None, return_lse=return_lse, layout=self.layout,
            mask=None if not self.mask else torch.bool if self.mask in MASKS else self.mask_dtype,
            needs_grad=bool(self.gradients), varlen=self.varlen, total_q=sum(q_lens), page_size=self.page_size,
        )

    def options(self) -> dict:
        """The keyword arguments that hold no tensor and mean the same in every form of the call."""
        return {"is_causal": self.is_causal, "scale": self.scale, "window_size": self.window_size, "softcap": self.softcap}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Contiguous CPU tensors, to be copied, not written: q, k, v packed as [T, H, D] plus the operands the case has."""
        return _numbers(self)

    def call(self, device: str = "cpu") -> dict:
        """Keyword arguments of hetero_attn.attention, or of attention_varlen, as the backend is to get them."""
        numbers = dict(self.numbers())
        if self.poison and self.lengths:
            poisoned = torch.cat([self.poisoned_keys(b) for b in range(len(self.lengths))])         # [Tk]
            for name in ("k", "v"):
                numbers[name] = numbers[name].clone()
                numbers[name][poisoned] = float(self.poison)
        tables = {} if not self.varlen else self._tables()
        for name in ("k", "v") if self.page_size else ():
            numbers[name] = self._paged(numbers[name], tables["block_table"])
        for name in ("q", "k", "v") if not self.varlen else ():
            x = numbers[name].unflatten(0, (self.batch, self.q_len if name == "q" else self.kv_len))          # [B, S, H, D]
            numbers[name] = x if self.layout == "bshd" else x.transpose(1, 2).contiguous()
        if self.page_size:
            tables["block_table"] = self._with_garbage(tables["block_table"])
        tensors = {name: placed(x, self.memory, device, _head_axis(self, name), name) for name, x in (numbers | tables).items()}
        for name in self.gradients:
            tensors[name].requires_grad_()
        lengths = {"layout": self.layout}
        if self.varlen:
            lengths = {"max_seqlen_q": max((q for q, _ in self.lengths), default=0) + self.slack,
                       "max_seqlen_k": max((kv for _, kv in self.lengths), default=0) + self.slack}
            tensors.setdefault("cu_seqlens_k", None)
        return {**tensors, **lengths, **self.options()}

    def exact_calls(self, numbers: dict[str, torch.Tensor]) -> Iterator[dict]:
        """Keyword arguments of dense attention calls in fp64: one for a dense case, one a sequence for a varlen case."""
        if not self.varlen:
            shaped = {name: numbers[name].unflatten(0, (self.batch, length)).transpose(1, 2)
                      for name, length in (("q", self.q_len), ("k", self.kv_len), ("v", self.kv_len))}
            yield {**numbers, **shaped, **self.options()}
            return
        q_start = k_start = 0
        for b, (q_len, kv_len) in enumerate(self.lengths):
            part = {"q": numbers["q"][q_start : q_start + q_len].transpose(0, 1)[None]}
            part |= {name: numbers[name][k_start : k_start + kv_len].transpose(0, 1)[None] for name in ("k", "v")}
            if self.alibi == 2:
                part["alibi_slopes"] = numbers["alibi_slopes"][b]
            yield {**numbers, **part, **self.options()}
            q_start, k_start = q_start + q_len, k_start + kv_len

    def visible(self, b: int) -> torch.Tensor:
        """Which keys causality and window let the rows of sequence b see: bool [q_len, kv_len]."""
        q_len, kv_len = self.lengths[b]
        ahead = torch.arange(kv_len)[None] - (torch.arange(q_len)[:, None] + kv_len - q_len)      # key position minus row position
        left, right = self.window_size
        sees = torch.ones(q_len, kv_len, dtype=torch.bool)
        sees &= ahead <= (0 if self.is_causal else kv_len + q_len)
        sees &= ahead >= (-left if left >= 0 else -(kv_len + q_len))
        return sees & (ahead <= (right if right >= 0 else kv_len + q_len))

    def poisoned_keys(self, b: int) -> torch.Tensor:
        """Which keys of sequence b hold poison: bool [kv_len]. Rows that see one are not compared; all others must not notice."""
        q_len, kv_len = self.lengths[b]
        poisoned = torch.zeros(kv_len, dtype=torch.bool)
        if self.varlen and b == 1:
            poisoned[:] = True                          # the neighbours of a wholly poisoned sequence must not notice
        elif kv_len and (self.is_causal or self.window_size[1] >= 0):
            poisoned[-1] = True
            poisoned[max(0, kv_len - 1 - q_len // 3)] = True        # the diagonal of a late row: all earlier ones are spared
            poisoned[0] = 0 <= self.window_size[0] < kv_len // 3
        elif kv_len and self.window_size[0] >= 0:
            poisoned[0] = True
        return poisoned

    def untouched_rows(self) -> torch.Tensor:
        """Which rows see no poison and are therefore compared: bool [Tq]."""
        if not self.poison:
            return torch.ones(sum(q for q, _ in self.lengths), dtype=torch.bool)
        rows = [~(self.visible(b) & self.poisoned_keys(b)).any(-1) for b in range(len(self.lengths))]
        return torch.cat(rows) if rows else torch.ones(0, dtype=torch.bool)

    def packed_keys(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages [num_blocks, page_size, ...] back to [Tk, ...]: how a gradient of pages is compared."""
        if not self.page_size:
            return pages
        table = self._tables()["block_table"].long()
        rows = [pages[table[b]].flatten(0, 1)[:kv_len] for b, (_, kv_len) in enumerate(self.lengths)]
        return torch.cat(rows) if rows else pages.flatten(0, 1)[:0]

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{purpose} of {self.describe()}".encode()))

    def _tables(self) -> dict[str, torch.Tensor]:
        q_lens, kv_lens = [q for q, _ in self.lengths], [kv for _, kv in self.lengths]
        cumulative: Callable = lambda lens: torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if not self.page_size:
            return {"cu_seqlens_q": cumulative(q_lens), "cu_seqlens_k": cumulative(kv_lens)}
        blocks = [-(-kv // self.page_size) for kv in kv_lens]
        order = torch.randperm(sum(blocks) + 3, generator=self._generator("pages")).to(torch.int32)  # three pages belong to nobody
        table = torch.zeros(len(blocks), max(blocks, default=0) + 1 + self.slack, dtype=torch.int32)
        for b, count in enumerate(blocks):
            table[b, :count] = order[sum(blocks[:b]) : sum(blocks[:b]) + count]
        return {"cu_seqlens_q": cumulative(q_lens), "block_table": table, "seqused_k": torch.tensor(kv_lens, dtype=torch.int32)}

    def _paged(self, packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[Tk, H, D] -> pages [num_blocks, page_size, H, D]; slots beyond a length hold poison, or a number that shows."""
        blocks = sum(-(-kv // self.page_size) for _, kv in self.lengths) + 3
        pages = torch.full((blocks, self.page_size, *packed.shape[1:]), float(self.poison or 1e3), dtype=packed.dtype)
        start = 0
        for b, (_, kv_len) in enumerate(self.lengths):
            positions = torch.arange(kv_len)
            pages[table[b, positions // self.page_size].long(), positions % self.page_size] = packed[start : start + kv_len]
            start += kv_len
        return pages

    def _with_garbage(self, table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        for b, (_, kv_len) in enumerate(self.lengths):
            unused = table[b, -(-kv_len // self.page_size) :]
            unused[:] = torch.tensor(GARBAGE_BLOCKS, dtype=torch.int32).repeat(len(unused) // 4 + 1)[: len(unused)]
        return table


def _head_axis(case: AttentionCase, name: str) -> int | None:
    """Which axis of q, k or v, as the call holds it, is the heads': the one that expanded memory may repeat."""
    if name not in ("q", "k", "v"):
        return None
    return (2 if case.page_size and name != "q" else 1) if case.varlen else {"bhsd": 1, "bshd": 2}[case.layout]


@lru_cache(maxsize=256)
def _numbers(case: AttentionCase) -> dict[str, torch.Tensor]:
    random = case._generator("numbers")
    normal: Callable = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    tokens_q, tokens_k = (sum(lens) for lens in zip(*case.lengths)) if case.lengths else (0, 0)
    q = normal(tokens_q, case.q_heads, case.head_dim)
    k = normal(tokens_k, case.kv_heads, case.head_dim)
    v = normal(tokens_k, case.kv_heads, case.v_head_dim)
    match case.contents:
        case "integers":                # products and their sums are integers below 2^24, hence exact in fp32, up to 1e4 and beyond
            q, k = (torch.randint(-16, 17, x.shape, generator=random).double() for x in (q, k))
        case "identical keys":          # every weight is equal: an average
            k = k[:1].expand_as(k).clone() if tokens_k else k
        case "one-hot":                 # one key far above all others
            q, k = 8 * torch.eye(case.head_dim, dtype=torch.float64)[torch.arange(tokens_q) * 7 % case.head_dim][:, None].expand_as(q), \
                8 * torch.eye(case.head_dim, dtype=torch.float64)[torch.arange(tokens_k) % case.head_dim][:, None].expand_as(k)
        case "large values":
            v = (v * case.magnitude).clamp(-5e4, 5e4)
    if case.memory == "expanded":       # stride 0 along the heads: the numbers must repeat, too
        q, k, v = (x[:, :1].expand_as(x) for x in (q, k, v))
    numbers = {"q": q.to(case.dtype).contiguous(), "k": k.to(case.dtype).contiguous(), "v": v.to(case.dtype).contiguous()}
    if case.alibi:
        shape = (case.q_heads,) if case.alibi == 1 else (len(case.lengths), case.q_heads)
        numbers["alibi_slopes"] = 0.02 + 0.6 * torch.rand(shape, generator=random)
    if case.sinks is not None:
        sinks = normal(case.q_heads)
        if case.sink_values == "-inf":
            sinks[::2] = float("-inf")
        elif case.sink_values == "large":
            sinks[::2] = 200.0
        numbers["sinks"] = sinks.to(case.sinks)
    if case.mask:
        numbers["attn_mask"] = _mask(case, random)
    return numbers


def _mask(case: AttentionCase, random: torch.Generator) -> torch.Tensor:
    """A mask of the case's kind over its axes; every third row is one that sees nothing, or only finfo.min."""
    sizes = {"b": case.batch, "h": case.q_heads, "q": case.q_len, "k": case.kv_len, "1": 1}
    shape = [sizes[axis] for axis in case.mask_axes]
    keep = torch.rand(shape, generator=random) < 0.7
    if case.mask == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    if case.mask == "padding":          # left padding, as a batch of unequal prompts has it, longer in later rows of the batch
        most = [max(1, sizes[axis]) for axis in "bhq"]              # what is left out of the axes must have a last one to be taken
        seen = (torch.arange(case.kv_len) >= 5 * torch.arange(most[0])[:, None])[:, None, None].expand(*most, case.kv_len)
        axes = tuple(slice(0, sizes[letter]) for letter in case.mask_axes)
        return seen[(-1,) * (4 - len(axes)) + axes].clone()
    thirds = torch.zeros(shape, dtype=torch.bool)
    row_axis = case.mask_axes.find("q") if "q" in case.mask_axes else case.mask_axes.find("b")
    if row_axis >= 0:
        thirds.movedim(row_axis, 0)[1::3] = True
    if case.mask in MASKS:
        return keep & ~thirds if case.mask == "empty rows" else keep
    bias = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
    if case.contents == "integers":     # exact beside a logit of 1e4 in fp32
        bias = (64 * bias).round() / 64
    bias = bias.to(case.mask_dtype)
    if case.mask == "bias":
        return bias
    low = float("-inf") if case.mask == "bias -inf" else torch.finfo(case.mask_dtype).min
    return bias.masked_fill(~keep | thirds, low)
