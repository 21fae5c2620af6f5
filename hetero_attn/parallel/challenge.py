"""Do all ranks know the same secret? Asked right after they have met, before a prompt or a weight is used.

Whoever can reach the rendezvous port can join a group; the challenge catches a peer of another run and a stranger who does not know the
token. Every rank sends a fresh random number and answers everybody's with a keyed digest (HMAC-SHA-256), so the token itself never travels.
It is NO encryption and no protection of what follows: tensors travel in the clear (docs/network.md: ssh and WireGuard).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import torch

from hetero_attn.communicator import Communicator, CommunicatorError

SITE = "challenge"
BYTES = 32


def answer(token: str, nonce: bytes, rank: int, asker: int) -> bytes:
    """Rank's answer to the asker's nonce. Both ranks enter, so that no answer can be sent back to whoever gave it."""
    return hmac.new(token.encode(), nonce + f"hetero_attn {rank} to {asker}".encode(), hashlib.sha256).digest()


def challenge(communicator: Communicator, token: str | None) -> None:
    """All ranks call it together; without a token anywhere it asks nothing. Raises CommunicatorError naming who does not know it."""
    if communicator.world_size == 1:
        return
    world, own = communicator.world_size, communicator.rank
    nonce = secrets.token_bytes(BYTES)
    nonces = _gather(communicator, [bytes([token is not None]) + nonce])                     # [N][1 + 32]
    have = [rank for rank, (each,) in enumerate(nonces) if each[0]]
    if not have:
        return
    mine = [answer(token, asked[1:], own, asker) if token is not None else bytes(BYTES) for asker, (asked,) in enumerate(nonces)]
    answers = _gather(communicator, mine)                                                    # [N][N][32]
    if token is None:
        raise CommunicatorError(
            f"rank {own} of {world}: rank {', '.join(map(str, have))} asks for a token and this rank has none; set HETERO_ATTN_TOKEN to "
            "the same secret on every rank", rank=own, operation=SITE)
    wrong = [rank for rank in range(world) if not hmac.compare_digest(answers[rank][own], answer(token, nonce, rank, own))]
    if wrong:
        raise CommunicatorError(
            f"rank {own} of {world}: rank {', '.join(map(str, wrong))} does not know the token; set HETERO_ATTN_TOKEN to the same secret "
            "on every rank, or look who else reaches the rendezvous port", rank=own, operation=SITE)


def _gather(communicator: Communicator, rows: list[bytes]) -> list[list[bytes]]:
    """Every rank's rows, all of one length, in rank order."""
    own = torch.tensor([list(row) for row in rows], dtype=torch.uint8, device=communicator.device)[None]       # [1, rows, bytes]
    every = communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE)
    return [[bytes(row) for row in rank] for rank in every.tolist()]
