"""What a call costs beyond the kernel. `make bench-dispatch` holds the figures to 10 us; here a regression of three times would show."""

import importlib.util
from pathlib import Path


def test_dispatch_is_cheap():
    path = Path(__file__).parents[1] / "benchmarks" / "dispatch.py"
    spec = importlib.util.spec_from_file_location("dispatch_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = benchmark.measure()
    assert len(results) == 4
    assert max(results.values()) < 3 * benchmark.BOUND_US, results
