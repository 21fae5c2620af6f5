"""What may go on beside computing does: no sum here is over before the task that is to be computed beside it has begun."""

import threading
from itertools import count

import pytest
import torch

from hetero_attn.collectives.background import CommunicationThread
from hetero_attn.communicator import CommunicatorError, SoloCommunicator
from hetero_attn.parallel.schedule import Block, SumNorm, run_blocks
from hetero_attn.parallel.schedule_order import COMMUNICATION, COMPUTE, Cut, needs, order

BLOCKS, ROWS, WIDTH, LIMIT_S = 4, 24, 8, 5.0
CUTS = {
    "two parts": Cut.at(ROWS, [12]), "three parts": Cut.at(ROWS, [8, 16]), "unequal parts": Cut.at(ROWS, [3]),
    "tiles": Cut.at(ROWS, (), [[6, 12, 18]]), "tiles in parts": Cut.at(ROWS, [12], [[6], [20]]),
    "pieces at the ends": Cut(Cut.at(ROWS, [12]).tiles, (2, 4, 6), (6, 4, 2)),
}


class Awaited(SoloCommunicator):
    """Started operations run on a thread, the n-th of them not to its end before the task beside it has begun. beside: n -> the number of
    compute tasks that have begun then; 0: nothing can be computed meanwhile."""

    def __init__(self, beside):
        super().__init__()
        self.beside, self.begun, self.changed = beside, 0, threading.Condition()
        self.thread, self.started = CommunicationThread("test"), count()

    def start(self, operation, *args, **options):
        number = next(self.started)

        def call():
            with self.changed:
                if not self.changed.wait_for(lambda: self.begun >= self.beside[number], LIMIT_S):
                    raise CommunicatorError(f"operation {number} stood alone: {self.begun} tasks have begun, not {self.beside[number]}")
            return getattr(self, operation)(*args, **options)

        return self.thread.submit(call)

    def begin(self):
        with self.changed:
            self.begun += 1
            self.changed.notify_all()


def beside(cut):
    """For each operation, in order: how many compute tasks have begun when the next one after it has; 0 where that one needs it, or what
    comes behind it in its lane."""
    tasks = list(order(BLOCKS, cut))
    operations = [task for task in tasks if task.lane == COMMUNICATION]
    found = []
    for number, operation in enumerate(operations):
        at = tasks.index(operation)
        following = next((task for task in tasks[at:] if task.lane == COMPUTE), None)
        waits = following is None or any(operations.index(each) >= number for each in needs(following, cut))
        found.append(0 if waits else sum(task.lane == COMPUTE for task in tasks[: tasks.index(following) + 1]))
    return found


def run(cut, communicator, begin=lambda: None):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(2, WIDTH, WIDTH, generator=generator) for _ in range(BLOCKS)]
    hidden, norm = torch.randn(ROWS, WIDTH, generator=generator), SumNorm(torch.ones(WIDTH), 1e-5)

    def times(weight):
        def call(x, context=None):
            begin()
            return x @ weight
        return call

    blocks = [Block(f"{place}", times(first), times(second), norm) for place, (first, second) in enumerate(weights)]
    contexts = dict.fromkeys((*cut.parts, *cut.entering[0]))

    def embed(rows, lane):
        return lane.start("embed", 0, "all_reduce", hidden[rows.start : rows.stop].clone())

    return run_blocks(blocks, lambda x: x, embed, contexts, cut, communicator)


@pytest.mark.parametrize("name", CUTS)
def test_every_sum_that_can_has_something_computed_beside_it(name):
    cut = CUTS[name]
    expected = beside(cut)
    # of several parts the first embedding and the last sum stand alone, of one part the embedding and each block's last sum
    assert expected.count(0) == (2 if len(cut.parts) > 1 else 1 + BLOCKS)
    communicator = Awaited(expected)
    found = run(cut, communicator, communicator.begin)
    assert next(communicator.started) == len(expected), "an operation was not started but done at once"
    torch.testing.assert_close(found, run(Cut.at(ROWS), SoloCommunicator()))
    assert communicator.thread.close(1)


def test_a_schedule_that_waits_at_once_is_caught(monkeypatch):
    monkeypatch.setattr(f"{__name__}.LIMIT_S", 0.05)
    communicator = Awaited(beside(CUTS["two parts"]))
    start = communicator.start
    monkeypatch.setattr(communicator, "start", lambda *args, **options: [handle := start(*args, **options), handle.wait()][0])
    with pytest.raises(CommunicatorError, match="stood alone"):
        run(CUTS["two parts"], communicator, communicator.begin)
    assert communicator.thread.close(1)
