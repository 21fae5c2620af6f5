"""Who died? Asked only after a collective has failed, answered through the rendezvous store, which outlives any one rank.

A failed collective knows that somebody did not come, not who: gloo names an address, and in a ring the neighbour that complains is
often a survivor. So every rank keeps one sleeping thread that answers when asked what its rank is doing. A killed, stopped or
unreachable rank cannot answer; a rank that is alive in the wrong place says where, which shows calls that are out of step.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

GRACE_S = 2.0                                        # how long a survivor may take to answer
POLL_S = 0.01
# A wait that runs into its time-out writes a warning to stderr from C++, so the thread sleeps for as good as ever.
FOREVER = timedelta(days=30)
STOP = b"stop"


class RollCall:
    """This rank's answering thread, and the question to the others.

    `store` is a torch.distributed store shared by all ranks, cloned so that a sleeping wait blocks nobody. `doing()` and `finished()` are
    called in the thread: what this rank is at, in words, and how many collectives it has finished. Keys: ask/<target>/<n> holds where
    the reply belongs.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, doing: Callable[[], str], finished: Callable[[], int] = lambda: 0
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._doing, self._finished = doing, finished
        self._store = store.clone()
        self._listening = store.clone()
        self._closed = False
        self._thread = threading.Thread(target=self._answer, name="hetero-attn-roll-call", daemon=True)
        self._thread.start()

    def ask(self, ranks: list[int] | None = None, grace_s: float = GRACE_S) -> dict[int, str]:
        """What the ranks (default: all others) say they are doing; those that do not answer within grace_s are left out.

        Raises RuntimeError (torch's DistError) when the store itself is gone.
        """
        return {rank: doing for rank, (doing, _) in self._replies(ranks, grace_s).items()}

    def await_finished(self, calls: int, limit_s: float) -> bool:
        """Wait until every other rank has finished `calls` collectives, or has come here itself; False where one has not within limit_s."""
        deadline = time.monotonic() + limit_s
        waiting = {rank for rank in range(self.world_size) if rank != self.rank}
        try:
            self._store.set(f"finished/{self.rank}", b"1")
            asked = time.monotonic() + 20 * POLL_S   # most ranks come to their end together, and need not be asked
            while True:
                waiting = {rank for rank in waiting if not self._store.check([f"finished/{rank}"])}
                now = time.monotonic()
                if waiting and now > asked:
                    replies = self._replies(sorted(waiting), min(GRACE_S, max(deadline - now, POLL_S)))
                    waiting -= {rank for rank, (_, finished) in replies.items() if finished >= calls}
                    asked = time.monotonic() + 20 * POLL_S
                if not waiting or now > deadline:
                    return not waiting
                time.sleep(POLL_S / 10)
        except RuntimeError:                         # the store is gone, and who served it
            return False

    def _replies(self, ranks: list[int] | None, grace_s: float) -> dict[int, tuple[str, int]]:
        targets = [rank for rank in (range(self.world_size) if ranks is None else ranks) if rank != self.rank]
        replies = f"reply/{self.rank}/{self._store.add(f'asks/{self.rank}', 1)}"
        for target in targets:
            self._store.set(f"ask/{target}/{self._store.add(f'asked/{target}', 1)}", replies)
        answers: dict[int, tuple[str, int]] = {}
        deadline = time.monotonic() + grace_s
        while len(answers) < len(targets) and time.monotonic() < deadline:
            for target in targets:
                if target not in answers and self._store.check([f"{replies}/{target}"]):
                    answers[target] = tuple(json.loads(self._store.get(f"{replies}/{target}")))
                    self._store.delete_key(f"{replies}/{target}")
            time.sleep(POLL_S)
        return answers

    def left(self) -> list[int]:
        """The ranks that closed their communicator in good order."""
        return [rank for rank in range(self.world_size) if self._store.check([f"left/{rank}"])]

    def close(self) -> None:
        """Leave: tell the others, end the thread. Returns within a second or two even when the store is gone."""
        if self._closed:
            return
        self._closed = True
        try:
            self._store.set(f"left/{self.rank}", b"1")
            self._store.set(f"ask/{self.rank}/{self._store.add(f'asked/{self.rank}', 1)}", STOP)
        except RuntimeError:
            return                                   # the store went first: the thread has ended on the same error
        self._thread.join(GRACE_S)

    def _answer(self) -> None:
        turn = 0
        while True:
            turn += 1
            key = f"ask/{self.rank}/{turn}"
            try:
                self._listening.wait([key], FOREVER)
                replies = self._listening.get(key)
                self._listening.delete_key(key)
                if replies == STOP:
                    return
                self._listening.set(f"{replies.decode()}/{self.rank}", json.dumps([self._doing(), self._finished()]))
            except RuntimeError:                     # the store is gone: nobody is left to ask
                return
