"""An emulated network between ranks of this host: every rank in a network namespace of its own, behind a link of a given rate and delay.

    with links(ranks=4, rate_mbit=300, delay_ms=1) as network:
        results = network.run(function, args)            # one process per rank, under torchrun's environment
        print(prove(network))                            # what the links measure to be

emulator.py is what callers see, settings.py what they ask for; namespaces.py makes and removes; guard.py is the process beside; switch.cpp
(compiled by build.py) and wired.py are the two ways of carrying packets; program.py runs the ranks; prove.py measures.
benchmarks/links.py is the command.
Ranks share this host's processors: where others use them too, a program that puts itself under os.SCHED_RR measures the links and not them.
Standard library only: any program can be put behind these links, and nothing here waits for torch.
"""

from links.command import LinksError
from links.emulator import Network, links
from links.namespaces import sweep, unavailable
from links.program import Ended, RankError
from links.prove import prove

__all__ = ["Ended", "LinksError", "Network", "RankError", "links", "prove", "sweep", "unavailable"]
