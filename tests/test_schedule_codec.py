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

from hetero_attn.parallel.schedule_choice import Auto, Places  # noqa: E402
from hetero_attn.parallel.schedule_cost import from_settings  # noqa: E402

# As make_schedule() measured them for two ranks of auto_on_a_link(256, ...) on links(2, rate, 0), 2 cores AMD Zen 4, 2026-11-26, other work
# beside: milliseconds at 32, 128 and 256 rows. hidden 256 and FFN 512 at 20 Mbit/s; hidden 128 and FFN 32768 at 2 Gbit/s.
MEASURED = {
    "20 Mbit/s": {
        "attention_inner": (0.4336, 0.7308, 1.114), "attention_product": (0.09886, 0.2872, 0.4393), "mlp_inner": (0.2504, 0.7276, 1.492),
        "mlp_product": (0.1445, 0.352, 0.6085), "sum": (17.4, 59.9, 111.1), "coded_sum": (13.29, 37.38, 74.66),
    },
    "2 Gbit/s": {
        "attention_inner": (0.3928, 0.4967, 0.8339), "attention_product": (0.1027, 0.139, 0.2263), "mlp_inner": (23.86, 120.7, 251.4),
        "mlp_product": (7.105, 27.63, 56.16), "sum": (6.115, 5.325, 8.306), "coded_sum": (6.07, 8.169, 6.982),
    },
}


@pytest.mark.ranks
@pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")
def test_coded_sums_are_taken_on_a_slow_link_and_left_on_a_fast_one():
    with links(2, 20, 0, via="switch") as network:
        slow = network.run(auto_on_a_link, (256, 256, 512))
    assert [found["coded"] for found in slow] == [True, True] and slow[0]["cut"] == slow[1]["cut"], slow
    assert slow[0]["sites"] and slow[0]["bits"] < 10                 # what was summed went through the codec,
    assert TOLERANCE < slow[0]["apart"] < 0.5, slow                  # which shows, and does not hurt
    with links(2, 2000, 0, via="switch") as network:
        fast = network.run(auto_on_a_link, (256, 128, 32768))
    assert [found["coded"] for found in fast] == [False, False] and not fast[0]["sites"], fast
    assert fast[0]["apart"] <= TOLERANCE


@pytest.mark.parametrize("link, coded", [("20 Mbit/s", True), ("2 Gbit/s", False)])
@pytest.mark.parametrize("efficiency", [0.0, 1.0])
def test_the_same_from_what_such_links_measured(link, coded, efficiency):
    """Whatever part of an overlap's gain is real: coded sums save a third of the slow link's step, and 1 % of the fast one's."""
    settings = [f"{name} {rows} {ms}" for name, each in MEASURED[link].items() for rows, ms in zip((32, 128, 256), each)]
    said = []
    auto = Auto(Places(shard_tokens=16, min_tokens=64, alignment=8), from_settings(settings, 5.0, efficiency), use_codec=said.append)
    auto.cut([256], [256])
    assert said == [coded]
