"""Communicator.empty() in symmetric memory: places given back when no tensor's storage refers to them any more.

Ranks' heaps need not agree: what a call needs to know of the others' places it is told in the kernel. A place that a collective has used on
another stream is handed out again behind that collective (`after`), what was handed out on one stream to another only behind that one
(`streams`), and what was handed out under a CUDA graph's capture only under captures, because a replay uses it again.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from hetero_attn_hopper.layout import aligned


class Place(NamedTuple):
    """Bytes of the heap, from `start` on. after: the collective that used them last (lane.Mark), None = no one need wait. streams: on which
    they were handed out before, so that whoever had them may still use them there."""

    start: int
    size: int
    after: Any = None
    streams: frozenset[Any] = frozenset()


def later(a: Any, b: Any) -> Any:
    """Of two marks the one that stands for both: collectives of a communicator follow one another on the device."""
    if a is None or b is None:
        return a or b
    return a if a.number > b.number else b


class _Given(weakref.ref):
    """A place handed out: dies with the object that holds it, and knows what to give back. asked: bytes that the tensor has."""

    __slots__ = ("after", "asked", "captured", "heap", "size", "start", "streams")


class Heap:
    """Free places of the bytes begin to end of symmetric memory."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self._free = {False: [Place(begin, end - begin)], True: []}            # by whether it is for captures alone
        self._given: dict[int, _Given] = {}
        self._starts: list[int] = []
        self._returned: deque[_Given] = deque()      # by the collector, in any thread and at any time
        self._lock = threading.RLock()

    def take(self, nbytes: int, hold: Callable[[int, int], Any], *, captured: bool = False,
             stream: Any = None) -> tuple[Any, Place] | None:
        """A place of nbytes: (what hold(start, nbytes) made to hold it, the place); None where there is no room. The holder is weakly
        referable and lives as long as the memory is used. stream: where it is going to be used; None = by collectives alone."""
        size = aligned(nbytes)
        with self._lock:
            while self._returned:
                self._give_back(self._returned.popleft())
            for kind in ((True, False) if captured else (False,)):
                free = self._free[kind]
                index = next((i for i, place in enumerate(free) if place.size >= size), None)
                if index is None:
                    continue
                place = free.pop(index)
                if place.size > size:
                    free.insert(index, Place(place.start + size, place.size - size, place.after, place.streams))
                holder = hold(place.start, nbytes)
                given = _Given(holder, _collected)
                given.heap, given.start, given.size, given.asked = self, place.start, size, nbytes
                given.after, given.captured = place.after, captured
                given.streams = place.streams if stream is None else frozenset((stream,))       # which waits for those before
                self._given[place.start] = given
                bisect.insort(self._starts, place.start)
                return holder, Place(place.start, size, place.after, place.streams)
        return None

    def holds(self, offset: int, nbytes: int, padded: int) -> bool:
        """Whether [offset, offset + nbytes) lies in one place that is handed out, and what follows up to offset + padded is no tensor's."""
        place = self._place_of(offset)
        if place is None or offset + nbytes > place.start + place.asked:
            return False
        return padded == nbytes or (offset + nbytes == place.start + place.asked and offset + padded <= place.start + place.size)

    def used(self, offset: int, after: Any) -> None:
        """A collective that `after` stands for has used the place at this offset."""
        place = self._place_of(offset)
        if place is not None:
            place.after = after

    def _place_of(self, offset: int) -> _Given | None:
        index = bisect.bisect(self._starts, offset) - 1
        if index < 0:
            return None
        place = self._given.get(self._starts[index])
        return place if place is not None and offset < place.start + place.size else None

    def _give_back(self, given: _Given) -> None:
        del self._given[given.start]
        self._starts.remove(given.start)
        free = self._free[given.captured]
        place = Place(given.start, given.size, given.after, given.streams)
        index = bisect.bisect(free, place.start, key=lambda each: each.start)
        free.insert(index, place)
        for left in (index, index - 1):
            if 0 <= left < len(free) - 1:
                a, b = free[left], free[left + 1]
                if a.start + a.size == b.start:
                    free[left : left + 2] = [Place(a.start, a.size + b.size, later(a.after, b.after), a.streams | b.streams)]


def _collected(given: _Given) -> None:
    given.heap._returned.append(given)
