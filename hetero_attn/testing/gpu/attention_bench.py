"""Attention against torch's SDPA and compiled FlexAttention: prefill in TFLOP/s, decode in GB/s, with their shares of the ceilings.

Bars: prefill by our Triton kernel at least as fast as compiled FlexAttention; what the profile chooses at least as fast as SDPA; a decode
step at 80 % of the copy's bandwidth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.ops import attention
from hetero_attn.spec import dtype_name
from hetero_attn.testing.gpu.ceilings import Ceilings, attention_flop, decode_bytes, narrow_dtype
from hetero_attn.testing.gpu.clock import medians
from hetero_attn.testing.gpu.outcome import Figure, Outcome, judged

log = logging.getLogger("hetero_attn")
FLEX_BAR, SDPA_BAR, DECODE_BAR = 1.0, 1.0, 0.8
SDPA, FLEX, CHOSEN = "torch SDPA", "FlexAttention", "chosen"


@dataclass(frozen=True)
class Shape:
    """One call, in narrow_dtype(). Lengths are tokens."""

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    softcap: float = 0.0
    masked: bool = False               # by a boolean tensor [q_len, kv_len] that every head shares, with holes in it

    @property
    def is_causal(self) -> bool:
        return self.q_len > 1 and not self.masked


PREFILL = (
    Shape("prefill 1K", 8, 32, 8, 1024, 1024, 128), Shape("prefill 4K", 2, 32, 8, 4096, 4096, 128),
    Shape("prefill 16K", 1, 32, 8, 16384, 16384, 128), Shape("prefill 4K, D 64", 2, 32, 32, 4096, 4096, 64),
    Shape("prefill 4K, D 256", 1, 16, 8, 4096, 4096, 256), Shape("prefill 2K, mask", 1, 32, 8, 2048, 2048, 128, masked=True),
    Shape("prefill 4K, softcap", 2, 32, 8, 4096, 4096, 128, 30.0),
)
DECODE = (
    Shape("decode 1 x 32K", 1, 32, 8, 1, 32768, 128), Shape("decode 8 x 8K", 8, 32, 8, 1, 8192, 128),
    Shape("decode 64 x 2K", 64, 32, 8, 1, 2048, 128), Shape("decode 16 x 8K, MHA", 16, 16, 16, 1, 8192, 128),
)
REHEARSAL = {
    "prefill": (Shape("prefill 128", 1, 4, 2, 128, 128, 64), Shape("prefill 64, mask", 1, 4, 2, 64, 64, 64, masked=True)),
    "decode": (Shape("decode 1 x 512", 1, 4, 2, 1, 512, 64),),
}


def ours(device: torch.device, names: list[str] | None = None) -> list[str]:
    """The available backends that may be timed, in the registry's order."""
    found = [name for name in registry.names() if name != "reference" and not registry.unavailable(registry.get(name))]
    return [name for name in found if names is None or name in names]


def contenders(shape: Shape, device: torch.device, flex: bool) -> dict[str, Callable[[], object]]:
    """What is put to the clock for a shape: our backends that take the call, the automatic choice, SDPA and FlexAttention."""
    heads = ((shape.q_heads, shape.q_len), (shape.kv_heads, shape.kv_len), (shape.kv_heads, shape.kv_len))
    dtype = narrow_dtype(device)
    q, k, v = (torch.randn(shape.batch, count, length, shape.head_dim, dtype=dtype, device=device) for count, length in heads)
    mask = None
    if shape.masked:
        mask = torch.rand(1, 1, shape.q_len, shape.kv_len, device=device) < 0.9
        mask[..., 0] = True
    options = {"is_causal": shape.is_causal, "softcap": shape.softcap or None, "attn_mask": mask}
    made: dict[str, Callable[[], object]] = {}
    for name in ours(device):
        try:
            attention(q, k, v, backend=name, **options)
        except UnsupportedError:        # anything else is its figure: medians() has its words
            continue
        except Exception as error:
            log.debug("%s: %s", name, error)
        made[name] = lambda name=name: attention(q, k, v, backend=name, **options)
    made[CHOSEN] = lambda: attention(q, k, v, **options)
    if not shape.softcap:
        made[SDPA] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=shape.is_causal,
                                                            enable_gqa=shape.q_heads != shape.kv_heads)
    if flex and not shape.masked and device.type == "cuda":
        made[FLEX] = Flex(q, k, v, shape)
    return made


class Flex:
    """torch's compiled FlexAttention for one call, compiled for its sizes on the first of the calls that warm up."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> None:
        self._operands, self._shape, self._compiled = (q, k, v), shape, None

    def __call__(self) -> torch.Tensor:
        if self._compiled is None:
            self._compiled = self._made()
        return self._compiled()

    def _made(self) -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()           # after a few shapes it would stop compiling, and time the eager road
        shape, mask, cap = self._shape, None, None
        if shape.is_causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.q_len, shape.kv_len, device=self._operands[0].device)
        if shape.softcap:
            cap = lambda score, b, h, i, j: shape.softcap * torch.tanh(score / shape.softcap)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(*self._operands, score_mod=cap, block_mask=mask, enable_gqa=shape.q_heads != shape.kv_heads)


def prefill(device: torch.device, ceilings: Ceilings, quick: bool) -> Outcome:
    """TFLOP/s of every contender, and the two bars."""
    shapes = PREFILL[:2] if quick else PREFILL
    return _prefill(device, ceilings, shapes if device.type == "cuda" else REHEARSAL["prefill"], 5 if quick else 20)


def _prefill(device: torch.device, ceilings: Ceilings, shapes: tuple[Shape, ...], rounds: int) -> Outcome:
    figures, missing, table = [], [], [("shape", "contender", "ms", "TFLOP/s", "of the matrix rate")]
    for shape in shapes:
        found = medians(contenders(shape, device, True), device, rounds)
        flop = attention_flop(shape.batch, shape.q_heads, shape.q_len, shape.kv_len, shape.head_dim, shape.is_causal)
        for name, seconds in found.items():
            if isinstance(seconds, str):
                table.append((shape.name, name, seconds, "", ""))
            else:
                rate = flop / seconds / 1e12
                table.append((shape.name, name, f"{1e3 * seconds:.3f}", f"{rate:.1f}", f"{100 * ceilings.of_rate(rate):.0f} %"))
        held, lacking = ratios(shape.name, found, bars(shape, device))
        figures, missing = figures + held, missing + lacking
    return judged(f"{len(shapes)} shapes, {dtype_name(narrow_dtype(device))}, medians of {rounds}", figures, table, missing)


def decode(device: torch.device, ceilings: Ceilings, quick: bool) -> Outcome:
    """GB/s of keys and values of every contender; the bar is for our choice."""
    shapes = (DECODE[:2] if quick else DECODE) if device.type == "cuda" else REHEARSAL["decode"]
    rounds = 10 if quick else 40
    figures, missing, table = [], [], [("shape", "contender", "us", "GB/s", "of the copy", "us with the host")]
    for shape in shapes:
        put = contenders(shape, device, not quick)
        found, with_host = medians(put, device, rounds), medians(put, device, rounds, behind=False)
        size = decode_bytes(shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim, 2)
        for name, seconds in found.items():
            if isinstance(seconds, str):
                table.append((shape.name, name, seconds, "", "", ""))
                continue
            rate = size / seconds / 1e9
            table.append((shape.name, name, f"{1e6 * seconds:.1f}", f"{rate:.0f}", f"{100 * ceilings.of_bandwidth(rate):.0f} %",
                          f"{1e6 * with_host[name]:.1f}" if isinstance(with_host[name], float) else with_host[name]))
            if name in (CHOSEN, "triton"):
                figures.append(Figure(f"{shape.name}, {name}, of the copy's bandwidth", ceilings.of_bandwidth(rate), "", DECODE_BAR))
        for name in (CHOSEN, "triton") if needs_triton(device) else (CHOSEN,):
            if not isinstance(found.get(name), float):
                missing.append(f"{shape.name}, {name}: bar not measured: {found.get(name, 'it does not take the call')}")
        held, lacking = ratios(shape.name, found, [bar for bar in bars(shape, device) if bar[1] == SDPA])
        figures, missing = figures + held, missing + lacking
    text = f"{len(shapes)} shapes, {dtype_name(narrow_dtype(device))}, medians of {rounds}, of the device alone"
    return judged(text, figures, table, missing)


def needs_triton(device: torch.device) -> bool:
    """Whether the Triton backend must run here: any ROCm device, and CUDA from compute capability 8.0 on."""
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0))


def bars(shape: Shape, device: torch.device) -> list[tuple[str, str, float]]:
    """(mine, other, bar) of a shape: each must be measured, whatever keeps one of the two from running."""
    made = [("triton", FLEX, FLEX_BAR)] if needs_triton(device) and not shape.masked else []
    return made + ([] if shape.softcap else [(CHOSEN, SDPA, SDPA_BAR)])


def ratios(shape: str, found: dict[str, float | str], wanted: list[tuple[str, str, float]]) -> tuple[list[Figure], list[str]]:
    """How many times as fast mine is as the other, for every bar; and a line for each bar of which a side did not run."""
    made, missing = [], []
    for mine, other, bar in wanted:
        pair = [found.get(name, "it was not put to the clock") for name in (mine, other)]
        if all(isinstance(seconds, float) for seconds in pair):
            made.append(Figure(f"{shape}: {mine} over {other}", pair[1] / pair[0], "x", bar))
        else:
            words = "; ".join(f"{name}: {text}" for name, text in zip((mine, other), pair) if isinstance(text, str))
            missing.append(f"{shape}: {mine} over {other}: bar not measured: {words}")
    return made, missing
