"""What captures a call and replays it: torch.cuda's graphs on a GPU, and elsewhere a stand-in that makes the call anew.

Both have one method, captured(call) -> (the call's result, replay). After replay() that result's own tensors hold what the call gives on
what its inputs hold by then. So everything around a graph runs on a CPU as well, and nothing there is said of graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

WARM_UP = 3                            # what is compiled or allocated on first use is so before the capture
Call = Callable[[], tuple[torch.Tensor, ...]]


class Seam(Protocol):
    words: str                         # for the page

    def captured(self, call: Call) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        """call: gives the same tensors from the same inputs. Raises what the capture raises."""


class CudaGraph:
    """torch.cuda.CUDAGraph. Replays go to the stream that is current then."""

    words = "captured once as a CUDA graph"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def captured(self, call: Call) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = call()
        return results, graph.replay


class Repeated:
    """No graph: each replay makes the call again and puts what it gives into the first results."""

    words = "no graph, the calls made again"

    def captured(self, call: Call) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        for _ in range(WARM_UP):
            call()
        results = call()

        def replay() -> None:
            for kept, new in zip(results, call()):
                kept.copy_(new)

        return results, replay


def seam_of(device: torch.device) -> Any:
    """The seam of a device."""
    return CudaGraph(device) if device.type == "cuda" else Repeated()
