"""The collected module: communicator x world size x case. The ranks run once per communicator and world size; each test reads its line."""

import pytest

from hetero_attn.testing.collective_behaviour import BEHAVIOURS
from hetero_attn.testing.collective_cases import CASES, FULL, WORLD_SIZES
from hetero_attn.testing.collectives import run_suite
from hetero_attn.testing.ranks import communicators


def world_sizes(name):
    """Of the algorithms over torch.distributed the quick grid runs one size, an odd one: tests/test_algorithms.py has the others."""
    return (1,) if name == "solo" else (3,) if name.startswith("distributed-") and not FULL else WORLD_SIZES


GROUPS = [(name, size) for name in communicators() for size in world_sizes(name)]
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(("communicator", "world_size"), GROUPS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", [*(case.name for case in CASES), *BEHAVIOURS])
def test_communicator(communicator, world_size, name):
    try:
        complaints = run_suite(communicator, world_size)
    except LookupError as reasons:
        pytest.skip(str(reasons))
    assert complaints[name] is None, f"{communicator}, {world_size} ranks: {complaints[name]}"
