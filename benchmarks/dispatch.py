"""What a call of attention() costs beyond the kernel: python benchmarks/dispatch.py [--json]

A decode loop whose kv_len grows by one each step, so that every step is a shape never seen before, and a loop over the layers of
one step, where shapes repeat; for packed, paged calls both together, as a decoder makes them (a new length every 16 layers), with the
check of the lengths' and the block table's values that CPU tensors get. The kernel is a backend that does nothing, so all that is timed
is the project's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import hetero_attn
from hetero_attn import registry
from hetero_attn.backend import Backend

BOUND_US = 10.0
LAYERS = 16


class Idle(Backend):
    """Gives its input back: stands for a kernel, so that only the way to it is timed."""

    name = "idle"
    judges_lengths = False

    def unsupported_reasons(self, spec):
        return []

    def attention(self, q, k, v, spec, operands):
        return q, None


def timed(call, keys, repeats: int = 7) -> float:
    """Median over `repeats` of the mean CPU time of a call, in microseconds (this thread's: what else runs does not count)."""
    means = []
    for _ in range(repeats):
        start = time.thread_time()
        for key in keys:
            call(key)
        means.append((time.thread_time() - start) / len(keys) * 1e6)
    return statistics.median(means)


def measure() -> dict[str, float]:
    """Microseconds a call, for each way of calling."""
    cache = torch.zeros(1, 8, 9000, 128)
    q = torch.zeros(1, 32, 1, 128)
    views = [cache[:, :, :length] for length in range(1000, 9000)]
    op = torch.ops.hetero_attn.attention.default
    profile = hetero_attn.load_profile("cpu", sets=["backends=[idle]"])
    results = {}
    with registry.register("idle", Idle), hetero_attn.use_profile(profile), torch.inference_mode():
        results["growing kv_len"] = timed(lambda kv: hetero_attn.attention(q, kv, kv, is_causal=True), views)
        results["same shape again"] = timed(lambda _: hetero_attn.attention(q, views[0], views[0], is_causal=True), range(8000))
        results["growing kv_len, through torch.library"] = timed(
            lambda kv: op(q, kv, kv, None, None, None, True, None, (-1, -1), None, False, "bhsd", None), views
        )
        pages = torch.zeros(600, 16, 8, 128)
        starts, table = torch.tensor([0, 1], dtype=torch.int32), torch.arange(600, dtype=torch.int32)[None]
        steps = [(length, torch.tensor([length], dtype=torch.int32)) for length in range(1000, 1500)]
        lengths = [step for step in steps for _layer in range(LAYERS)]
        packed = torch.zeros(1, 32, 128)
        results["varlen, paged, growing kv_len, 16 layers"] = timed(
            lambda kv_len: hetero_attn.attention_varlen(
                packed, pages, pages, starts, None, 1, kv_len[0], block_table=table, seqused_k=kv_len[1], is_causal=True
            ),
            lengths,
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    if arguments.json:
        print(json.dumps({"us": results, "bound_us": BOUND_US}))
    else:
        for name, microseconds in results.items():
            print(f"{name:<40} {microseconds:6.2f} us  (bound {BOUND_US:g})")
    return 0 if max(results.values()) <= BOUND_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
