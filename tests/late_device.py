"""A device whose work is done as late as its streams allow: a kernel runs when an event behind it is waited for, and not before.

For tests of codec/on_device.py on CPU tensors. Memory is poisoned when it is handed out, so whoever reads what nobody has waited for reads
that. `main` is the calling stream; a lane is a stream of its own, as hetero_attn.collectives.lane.Lane describes it.
"""

from collections import deque

import torch

from hetero_attn.collectives.codec.on_device import DevicePath

CPU = torch.device("cpu")
POISON = 0xA5


class Stream:
    """Work in order; `reach(n)`: the first n have been done when it returns."""

    def __init__(self):
        self.queue, self.begun, self.done = deque(), 0, 0

    def begin(self, work):
        self.queue.append(work)
        self.begun += 1
        return self.begun

    def reach(self, number):
        while self.done < number:
            self.done += 1
            self.queue.popleft()()

    def drain(self):
        self.reach(self.begun)


class Mark:
    def __init__(self, stream, number, main):
        self.stream, self.number, self.main = stream, number, main

    def wait(self):
        self.main.begin(self.synchronize)

    def synchronize(self):
        self.stream.reach(self.number)


class LateLane:
    """keeps_order: False is the fault of a lane that does not begin behind the calling stream."""

    def __init__(self, main, keeps_order=True):
        self.main, self.stream, self.keeps_order = main, Stream(), keeps_order

    def start(self, work, after=()):
        before = self.main.begun if self.keeps_order else 0

        def run():
            self.main.reach(before)
            for mark in after:
                mark.synchronize()
            work()

        return Mark(self.stream, self.stream.begin(run), self.main)

    def keep(self, tensor):
        return tensor


class LateKernels:
    """Codec kernels on `main`. at_once: an unpacking is done before the call returns, as torch's own operations on its result need it."""

    def __init__(self, kernels, main, at_once):
        self.kernels, self.main, self.at_once = kernels, main, at_once

    def _pack(self, name, *arguments):
        told = torch.full((), -77)
        self.main.begin(lambda: told.fill_(int(getattr(self.kernels, name)(*arguments))))
        return told

    def _unpack(self, name, *arguments):
        self.main.begin(lambda: getattr(self.kernels, name)(*arguments))
        if self.at_once:
            self.main.drain()

    def pack_groups(self, *arguments):
        return self._pack("pack_groups", *arguments)

    def pack_features(self, *arguments):
        return self._pack("pack_features", *arguments)

    def unpack_groups(self, *arguments):
        self._unpack("unpack_groups", *arguments)

    def unpack_features(self, *arguments):
        self._unpack("unpack_features", *arguments)


class LatePath(DevicePath):
    def __init__(self, kernels, traffic, *, at_once=True, keeps_order=True):
        self.main = Stream()
        down, up = LateLane(self.main, keeps_order), LateLane(self.main)
        super().__init__(LateKernels(kernels, self.main, at_once), "late", CPU, traffic, down=down, up=up)

    def objection(self, codec, dtype):
        return None                                  # the proof reads at once, without waiting: it is for kernels, not for order

    def host_memory(self, nbytes):
        return super().host_memory(nbytes).fill_(POISON)

    def device_memory(self, nbytes):
        return super().device_memory(nbytes).fill_(POISON)
