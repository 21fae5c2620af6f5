"""`schedule: auto` with `codec: auto` where it decides: on a link so slow that a step gains by coded sums, and on one where it does not.

On emulated links (root) everything is real, from the measurement at load time to the tokens; elsewhere the same decision is made from what
such links measured.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "benchmarks", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from links import links, unavailable  # noqa: E402
from schedule_models import TOLERANCE, auto_on_a_link  # noqa: E402


@pytest.mark.ranks
@pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")
def test_coded_sums_are_taken_on_a_slow_link_and_left_on_a_fast_one():
    with links(2, 20, 0, via="switch") as network:
        slow = network.run(auto_on_a_link, (256, 256, 512))
    assert [found["coded"] for found in slow] == [True, True] and slow[0]["cut"] == slow[1]["cut"], slow
    assert slow[0]["sites"] and slow[0]["bits"] < 10                 # what was summed went through the codec,
    assert TOLERANCE < slow[0]["apart"] < 0.5, slow                  # which shows, and does not hurt
    with links(2, 2000, 0, via="switch") as network:
        fast = network.run(auto_on_a_link, (256, 512, 2048))
    assert [found["coded"] for found in fast] == [False, False] and not fast[0]["sites"], fast
    assert fast[0]["apart"] <= TOLERANCE
