"""Ranks on several hosts: who says that the network between them may be trusted, and do all of them know the same secret?

What ranks send one another is not encrypted and whoever reaches the port can join, so every command that may span hosts asks for
--trust-network there, before it opens a connection, and for HETERO_ATTN_TOKEN's knowledge right after the ranks have met.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from hetero_attn.cli.errors import CommandError

if TYPE_CHECKING:
    from hetero_attn.communicator import Communicator

HELP = ("ranks on several hosts: tensors travel unencrypted, whoever reaches the port can join (HETERO_ATTN_TOKEN; docs/network.md)")


def add_trust(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option --trust-network."""
    parser.add_argument("--trust-network", action="store_true", help=HELP)


def need_trust(trusted: bool, command: str) -> None:
    """Raises CommandError where ranks are on several hosts and nobody said that the network between them is to be trusted."""
    from hetero_attn.collectives import rendezvous

    env = rendezvous.world()
    if env.world_size > 1 and not rendezvous.on_one_host(env) and not trusted:
        raise CommandError(f"the ranks meet at {os.environ.get('MASTER_ADDR', '?')}, which is not this host alone: what they send is not "
                           f"encrypted and whoever reaches the port can join; give {command} --trust-network where that is right, set "
                           "HETERO_ATTN_TOKEN on every rank against wrong peers, and see docs/network.md for ssh and WireGuard")


def ask_for_token(communicator: Communicator) -> None:
    """Every rank asks every other whether it knows HETERO_ATTN_TOKEN. Raises CommunicatorError naming who does not."""
    from hetero_attn.parallel.challenge import challenge

    challenge(communicator, os.environ.get("HETERO_ATTN_TOKEN") or None)
