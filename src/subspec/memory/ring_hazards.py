"""What the threads of a slot ring do to its memory, told to a hazard checker.

The streamer calls one method at each point where threads meet or touch a slot.  ``Unwatched`` is what it
calls in earnest: nothing happens.  ``RingHazards`` passes on who reads and writes which bytes, and the edges
that the ring's rules promise: a reader starts on a slot after its release, a load is complete after each of
its parts, the consumer acquires a load after it was made ready, a rewound ring starts after every read under
way.  Events belong to loads, not slots, so that an edge cannot come from the wrong round.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from subspec.memory.hazards import HazardChecker

PLACE = "memory"  # places are addresses, so that slots that overlap are seen to
CONSUMER = "consumer"
In = TypeVar("In")
Out = TypeVar("Out")


class Unwatched:
    """A ring that nobody watches."""

    def free(self, load: int) -> None:
        """A reader found the load's slot given back."""

    def filling(self, load: int, offset: int, size: int) -> None:
        """A reader is about to write a part of the slot."""

    def filled(self, load: int) -> None:
        """A reader has written its part, and will say so."""

    def complete(self, load: int, n_bytes: int) -> None:
        """A reader found every part of the load there, and may look at them."""

    def ready(self, load: int) -> None:
        """A reader is about to make the load ready."""

    def idle(self) -> None:
        """A reader is done with its request, however it went."""

    def acquired(self, load: int, n_bytes: int) -> None:
        """The consumer found the load ready."""

    def released(self, load: int) -> None:
        """The consumer is about to give the load's slot back."""

    def rewound(self, load: int) -> None:
        """The consumer found every reader idle; the ring starts again at ``load``."""


class RingHazards(Unwatched):
    """Tells ``checker``.  Readers are known by their threads' names, the consumer as ``CONSUMER``.

    Args:
        checker: raises in the thread whose access conflicts, and again in the consumer.
        slots: address of each slot.
        readers: names of the reader threads.
    """

    def __init__(self, checker: HazardChecker, slots: Sequence[int], readers: Sequence[str]) -> None:
        self._checker, self._slots, self._readers = checker, list(slots), list(readers)

    def free(self, load: int) -> None:
        """Edge from the release of the load that held the slot, or from the rewinding of the ring."""
        self._checker.wait(_me(), ("free", load - len(self._slots)))

    def filling(self, load: int, offset: int, size: int) -> None:
        """The write."""
        start = self._slots[load % len(self._slots)] + offset
        self._checker.write(_me(), PLACE, start, start + size, f"load {load}")

    def filled(self, load: int) -> None:
        """Record of this reader's parts."""
        self._checker.signal(_me(), ("filled", load, _me()))

    def complete(self, load: int, n_bytes: int) -> None:
        """Edges from every reader's parts, and the checksum's read."""
        for reader in self._readers:
            self._checker.wait(_me(), ("filled", load, reader))
            self._checker.forget(("filled", load, reader))
        start = self._slots[load % len(self._slots)]
        self._checker.read(_me(), PLACE, start, start + n_bytes, f"checksum of load {load}")

    def ready(self, load: int) -> None:
        """Record of the whole load."""
        self._checker.signal(_me(), ("ready", load))
        self._checker.forget(("free", load - len(self._slots)))

    def idle(self) -> None:
        """Record of all that the reader did."""
        self._checker.signal(_me(), ("idle", _me()))

    def acquired(self, load: int, n_bytes: int) -> None:
        """Edge from the load's completion, and the consumer's read; raises what any thread has found."""
        self._checker.wait(CONSUMER, ("ready", load))
        self._checker.forget(("ready", load))
        start = self._slots[load % len(self._slots)]
        self._checker.read(CONSUMER, PLACE, start, start + n_bytes, f"load {load}")
        self._checker.check()

    def released(self, load: int) -> None:
        """Record of the consumer's use."""
        self._checker.signal(CONSUMER, ("free", load))

    def rewound(self, load: int) -> None:
        """Edges from every reader; every slot is free.  Raises what any thread has found."""
        for reader in self._readers:
            self._checker.wait(CONSUMER, ("idle", reader))
        for earlier in range(load - len(self._slots), load):
            self._checker.signal(CONSUMER, ("free", earlier))
        self._checker.check()


def noting_use(
    checker: HazardChecker, address: int, n_bytes: int, work: Callable[[In], Out]
) -> Callable[[In], Out]:
    """``work``, which reads a slot's bytes: each call is noted as the consumer's read, before and after."""

    def noted(argument: In) -> Out:
        checker.read(CONSUMER, PLACE, address, address + n_bytes, "a product")
        result = work(argument)
        checker.read(CONSUMER, PLACE, address, address + n_bytes, "a product")
        return result

    return noted


def _me() -> str:
    """The actor of the calling reader thread."""
    return threading.current_thread().name
