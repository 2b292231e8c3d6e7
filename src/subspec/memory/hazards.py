"""A happens-before checker over byte intervals: are conflicting accesses ordered, whatever the timing?

Threads, streams and the host are *actors*.  What orders them is told by ``signal`` and ``wait``, what they do
to memory by ``read`` and ``write``; an access that conflicts with an earlier one and is not ordered after it
is a ``Hazard``, in every run, also where the clock on the wall would have hidden it.  Used by tests, and
behind ``SUBSPEC_HAZARDS=1``; knows nothing of what the bytes mean, and imports no torch.

Source: vector clocks (Mattern 1989; Fidge 1988) with one time stamp an access, as in FastTrack (Flanagan and
    Freund, PLDI 2009).
"""

import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace

SWITCH = "SUBSPEC_HAZARDS"
Actor = Hashable
Event = Hashable
Clock = dict[Actor, int]


def wanted() -> bool:
    """Whether the environment switches checks on: ``SUBSPEC_HAZARDS`` is set, and neither empty nor 0."""
    return os.environ.get(SWITCH, "") not in ("", "0")


@dataclass(frozen=True)
class Access:
    """Who did what, where.

    Attributes:
        actor: who.
        writes: a write, or a read.
        place: the memory's name; ``start``, ``stop``: its bytes.
        note: what for, if the caller said so.
        time: the actor's own time.
    """

    actor: Actor
    writes: bool
    place: Hashable
    start: int
    stop: int
    note: str
    time: int

    def __str__(self) -> str:
        what = "writes" if self.writes else "reads"
        purpose = f" ({self.note})" if self.note else ""
        return f"{self.actor} {what} {self.place}[{self.start}:{self.stop}]{purpose}"

    def continues(self, other: "Access") -> bool:
        """Whether it and an access that it touches or adjoins are one, cut in two or overlapping."""
        return (
            self.time == other.time
            and self.writes == other.writes
            and self.actor == other.actor
            and self.note == other.note
        )

    def without(self, start: int, stop: int) -> "list[Access]":
        """What remains of it outside ``start`` … ``stop`` − 1."""
        parts = [(self.start, min(self.stop, start)), (max(self.start, stop), self.stop)]
        return [replace(self, start=low, stop=high) for low, high in parts if low < high]


@dataclass(frozen=True)
class Hazard:
    """Two conflicting accesses that nothing orders; ``first`` is the one that was reported first."""

    first: Access
    second: Access

    def __str__(self) -> str:
        return f"nothing orders two accesses: {self.first}; then {self.second}"


class HazardError(RuntimeError):
    """A hazard was found: a bug, never a user's mistake."""

    def __init__(self, hazard: Hazard) -> None:
        super().__init__(str(hazard))
        self.hazard = hazard


class HazardChecker:
    """Vector clocks of actors, and the accesses that a later one may still conflict with.  Thread-safe.

    An actor's calls are its program order; a stream's are made by the host when it enqueues the work, after
    ``signal(host, e)`` and ``wait(stream, e)`` for what the host knows.

    Args:
        collect: note hazards in ``hazards`` only, instead of raising the first one as well.

    Attributes:
        hazards: met so far.
        collect: as given; may be set later on.
    """

    def __init__(self, *, collect: bool = False) -> None:
        self.hazards: list[Hazard] = []
        self.collect = collect
        self._clocks: dict[Actor, Clock] = {}
        self._events: dict[Event, Clock] = {}
        self._accesses: dict[Hashable, list[Access]] = {}
        self._lock = threading.Lock()

    def signal(self, actor: Actor, event: Event) -> None:
        """Record ``event``: all that ``actor`` did or waited for so far.  A newer record takes its place."""
        with self._lock:
            clock = self._clock(actor)
            self._events[event] = dict(clock)
            clock[actor] += 1

    def wait(self, actor: Actor, event: Event) -> None:
        """What ``actor`` does from now on comes after the newest record of ``event``; if none, nothing."""
        with self._lock:
            clock = self._clock(actor)
            for other, time in self._events.get(event, {}).items():
                clock[other] = max(clock.get(other, 0), time)

    def forget(self, event: Event) -> None:
        """Nobody will wait for this record of ``event`` any more; frees its memory."""
        with self._lock:
            self._events.pop(event, None)

    def read(self, actor: Actor, place: Hashable, start: int, stop: int, note: str = "") -> None:
        """``actor`` reads bytes ``start`` … ``stop`` − 1 of ``place``, from now until its next ``signal``.

        Raises:
            HazardError: somebody's write is not ordered before it.
        """
        self._access(actor, False, place, start, stop, note)

    def write(self, actor: Actor, place: Hashable, start: int, stop: int, note: str = "") -> None:
        """``actor`` writes bytes ``start`` … ``stop`` − 1 of ``place``, from now until its next ``signal``.

        Raises:
            HazardError: somebody's read or write is not ordered before it.
        """
        self._access(actor, True, place, start, stop, note)

    def check(self) -> None:
        """Raise the first hazard that any thread has met so far, unless they are only collected."""
        if self.hazards and not self.collect:
            raise HazardError(self.hazards[0])

    def _clock(self, actor: Actor) -> Clock:
        """An actor's clock; its own time starts at 1, so that nobody knows of it before it signals."""
        return self._clocks.setdefault(actor, {actor: 1})

    def _access(self, actor: Actor, writes: bool, place: Hashable, start: int, stop: int, note: str) -> None:
        """Compare an access with those remembered, and remember it."""
        if start >= stop:
            return
        with self._lock:
            clock = self._clock(actor)
            new = Access(actor, writes, place, start, stop, note, clock[actor])
            near: list[Access] = []  # what it touches or adjoins
            far: list[Access] = []
            for old in self._accesses.get(place, ()):
                (near if old.start <= stop and start <= old.stop else far).append(old)
            conflicts = [
                Hazard(old, new)
                for old in near
                if (old.start < stop and start < old.stop)
                and (writes or old.writes)
                and old.time > clock.get(old.actor, 0)
            ]
            self._accesses[place] = far + _remembered(new, near, clock)
            self.hazards += conflicts
        if conflicts and not self.collect:
            raise HazardError(conflicts[0])


def _remembered(new: Access, near: list[Access], clock: Clock) -> list[Access]:
    """``new``, and what it does not dominate of ``near``, the accesses that it touches or adjoins.

    Whoever comes after ``new`` comes after what it is ordered after; who does not, conflicts with ``new``
    itself.  So a write replaces all before it, and a read replaces the reads that it is ordered after.

    Args:
        new: the access.
        near: earlier ones of the same place.
        clock: of its actor.
    """
    start, stop = new.start, new.stop
    kept: list[Access] = []
    for old in near:
        if old.continues(new):
            new = replace(new, start=min(new.start, old.start), stop=max(new.stop, old.stop))
        elif new.writes or (not old.writes and old.time <= clock.get(old.actor, 0)):
            kept += old.without(start, stop)
        else:
            kept.append(old)
    return [*kept, new]
