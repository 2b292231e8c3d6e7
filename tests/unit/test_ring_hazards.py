"""The streamer's real threads under the hazard checker: what orders each access to a slot is told and needed.

Mutants each leave out one synchronization, of the threads or of what is told; clocks are compared, not times,
so each is caught in every run.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S, finishes
from test_streamer import GivesBackEarly, OneSlot, ReadyEarly, Ring, ring

from subspec.errors import StoreError
from subspec.memory.hazards import Event, HazardChecker, HazardError
from subspec.memory.ring_hazards import CONSUMER, PLACE, RingHazards, noting_use
from subspec.memory.streamer import Streamer
from subspec.memory.tiers import PAGE_BYTES


def under(checker: HazardChecker, kind: type[Streamer] = Streamer) -> Callable[..., Streamer]:
    return partial(kind, checker=checker)


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; nobody is told of what a checker finds, so ask again and again."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


# No false alarm


@pytest.mark.parametrize("seed", range(12))
def test_a_sound_streamer_raises_nothing(tmp_path: Path, seed: int) -> None:
    checker = HazardChecker()
    pages, slots, threads = [3, 1, 5, 2, 4], 1 + seed % 4, 1 + seed % 3
    with ring(tmp_path, pages, slots, kind=under(checker), seed=seed, threads=threads) as made:

        def run() -> None:
            for taken in range(5):
                made.sweep()
                for index in range(taken):
                    made.consume(index, release=index < taken - 1)
                made.streamer.rewind()

        def twice() -> None:
            made.sweep()
            made.sweep()

        finishes(run)
        for failing in range(5):
            made.probe.failing.add(f"unit{failing}")
            with pytest.raises(StoreError):
                finishes(twice)
            made.probe.failing.clear()
        finishes(made.sweep)
    assert not checker.hazards
    checker.check()
    assert len(checker._events) < 10 * (slots + threads)  # those of loads long gone are forgotten


# What is told


class Deaf(HazardChecker):
    """Signals of one kind are not recorded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def signal(self, actor: object, event: Event) -> None:
        if isinstance(event, tuple) and event[0] != self.kind:
            super().signal(actor, event)


class Hasty(Deaf):
    """Nobody waits for events of one kind."""

    def signal(self, actor: object, event: Event) -> None:
        HazardChecker.signal(self, actor, event)

    def wait(self, actor: object, event: Event) -> None:
        if isinstance(event, tuple) and event[0] != self.kind:
            super().wait(actor, event)


@pytest.mark.parametrize("fault", [Deaf, Hasty])
@pytest.mark.parametrize("edge", ["free", "ready", "filled"])
def test_every_edge_is_needed(tmp_path: Path, fault: type[Deaf], edge: str) -> None:
    checker = fault(edge)
    first, second = ("unit0", 0), ("unit0", 2 * PAGE_BYTES)
    with ring(tmp_path, [4, 4, 4], 1, kind=under(checker), blocked=(first,)) as made:
        assert made.probe.wait(
            lambda: second in made.probe.reads
        )  # by the other reader than the first part's
        made.unblock()
        with pytest.raises(HazardError):
            made.take(0, 1, 2)
    assert checker.hazards


def as_reader(name: str, *calls: Callable[[], None]) -> None:
    """What a reader of this name does, all of it before the caller goes on."""

    def run() -> None:
        for call in calls:
            call()

    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            run()
        except HazardError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, name=name)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("fault", [Deaf, Hasty])
def test_a_rewound_ring_comes_after_broken_reads(fault: type[Deaf]) -> None:
    def rewound_under(checker: HazardChecker) -> None:
        watch = RingHazards(checker, [0], ["one", "other"])
        as_reader("one", lambda: watch.free(1), lambda: watch.filling(1, 0, 8), watch.idle)
        watch.rewound(3)
        as_reader("other", lambda: watch.free(3), lambda: watch.filling(3, 0, 8))

    rewound_under(HazardChecker())
    with pytest.raises(HazardError, match=r"one writes .*\(load 1\); then other writes .*\(load 3\)"):
        rewound_under(fault("idle"))


def test_a_write_during_a_checksum_is_seen() -> None:
    watch = RingHazards(HazardChecker(), [0], ["one", "other"])
    as_reader("other", lambda: watch.filling(0, 0, 8), lambda: watch.filled(0))
    as_reader("one", lambda: watch.complete(0, 8))
    with pytest.raises(HazardError, match=r"one reads .*\(checksum of load 0\); then other writes"):
        as_reader("other", lambda: watch.filling(1, 0, 8))


def test_a_use_after_the_release_is_seen(tmp_path: Path) -> None:
    checker = HazardChecker(collect=True)
    with ring(tmp_path, [2, 2, 2], 1, kind=under(checker)) as made:
        slot = made.streamer.acquire()
        used = noting_use(checker, slot.data_ptr(), len(slot), str)
        assert used(1) == "1"
        made.streamer.release()
        used(1)
        made.take(1)
    assert {CONSUMER} in [{one.first.actor, one.second.actor} & {CONSUMER} for one in checker.hazards]


def test_a_hazard_ahead_of_use_outlives_rewinding(tmp_path: Path) -> None:
    checker = HazardChecker()
    with ring(tmp_path, [1, 1, 1], 2, kind=under(checker)) as made:
        made.take(0)
        checker.write("a", PLACE, 0, 1)
        with pytest.raises(HazardError):
            checker.write("b", PLACE, 0, 1)
        with pytest.raises(HazardError, match="a writes"):
            finishes(made.streamer.rewind)


# What the threads do


class NeverWaitsForRelease(Streamer):
    """Readers go on to the next load whether or not its slot was given back."""

    def _is_free(self, load: int) -> bool:
        return True


class NeverWaitsForReaders(Streamer):
    """The consumer takes a slot as it is."""

    def acquire(self) -> torch.Tensor:
        load = self._released
        slot = self.slots[load % len(self.slots)][: self.units[load % len(self.units)].n_bytes]
        self._watch.acquired(load, len(slot))
        return slot


def consumes(made: Ring, checker: HazardChecker) -> None:
    """Take two units as they come, noting the use of each; whatever that raises is not the point."""
    try:
        for _ in range(2):
            slot = made.streamer.acquire()
            made.unblock()
            assert becomes(lambda: len(made.probe.reads) >= 2 or bool(checker.hazards))
            checker.read(CONSUMER, PLACE, slot.data_ptr(), slot.data_ptr() + len(slot))
            made.streamer.release()
    except (HazardError, StoreError):
        made.unblock()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [NeverWaitsForRelease, GivesBackEarly, OneSlot, NeverWaitsForReaders])
def test_a_missing_wait_is_caught(tmp_path: Path, kind: type[Streamer], threads: int) -> None:
    checker = HazardChecker()
    blocked = (("unit0", 0),) if kind is NeverWaitsForReaders else ()
    slots = 2 if kind is OneSlot else 1
    with ring(tmp_path, [2, 2], slots, kind=under(checker, kind), threads=threads, blocked=blocked) as made:
        if blocked:
            assert becomes(lambda: bool(checker._accesses))
        finishes(lambda: consumes(made, checker))
        assert becomes(lambda: bool(checker.hazards))


def test_a_part_taken_for_the_whole_is_a_hazard(tmp_path: Path) -> None:
    checker = HazardChecker()
    blocked = (("unit0", 2 * PAGE_BYTES),)
    with ring(tmp_path, [4, 4], 2, kind=under(checker, ReadyEarly), blocked=blocked) as made:
        with pytest.raises((HazardError, AssertionError)):
            made.take(0)
        made.unblock()
        assert becomes(lambda: bool(checker.hazards))


class RewindsEarly(Streamer):
    """Rewinding does not wait for reads under way."""

    def rewind(self) -> None:
        with self._changed:
            sweeps = -(-self._released // len(self.units))
            for earlier in range(sweeps * len(self.units) - len(self.slots), sweeps * len(self.units)):
                self._watch.released(earlier)
            self._begin(sweeps * len(self.units))
            self._changed.notify_all()


def test_a_rewinding_that_does_not_wait_is_caught(tmp_path: Path) -> None:
    checker = HazardChecker()
    with ring(tmp_path, [1, 1, 1], 1, kind=under(checker, RewindsEarly), blocked=(("unit1", 0),)) as made:
        made.take(0)
        stuck = "load 1"
        assert becomes(lambda: any(one.note == stuck for one in checker._accesses[PLACE]))
        made.streamer.rewind()
        with pytest.raises(HazardError, match=stuck):
            made.take(0)
