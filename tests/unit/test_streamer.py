"""The slot ring: the right bytes, in order, never overwritten while in use, whatever the timing.

The checker is a file whose reads poison their target first, dawdle, and note every touch of a slot that the
consumer holds.  Mutants of the streamer, each with one rule broken, show that the checker sees its purpose.
"""

import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S, finishes

from subspec.errors import StoreError
from subspec.memory.arena import map_bytes
from subspec.memory.backend.threads import ThreadBackend
from subspec.memory.disk import ImageFile
from subspec.memory.streamer import Streamer, Unit
from subspec.memory.tiers import PAGE_BYTES
from subspec.memory.timeline import Timeline

POISON = 0xA5


class Probe:
    """What consumer and readers do to the slots: delays them, and notes who touches what."""

    def __init__(self, seed: int = 0, delay_s: float = 0.0005) -> None:
        self.changed = threading.Condition()
        self.violations: list[str] = []
        self.reads: list[tuple[str, int]] = []  # (file, offset) of finished reads
        self.failing: set[str] = set()
        self.failed = 0
        self.blocked: set[tuple[str, int]] = set()
        self._held: tuple[int, int] | None = None
        self._rng = random.Random(seed)
        self._delay_s = delay_s

    def dawdle(self) -> None:
        with self.changed:
            delay_s = self._rng.choice([0.0, 0.0, self._rng.random() * self._delay_s])
        time.sleep(delay_s)

    def touch(self, target: memoryview, who: str) -> None:
        """A reader is about to write, or has written, ``target``."""
        start = torch.frombuffer(target, dtype=torch.uint8).data_ptr()
        with self.changed:
            if self._held is not None and start < self._held[1] and self._held[0] < start + len(target):
                self.violations.append(who)
                self.changed.notify_all()

    @contextmanager
    def holding(self, slot: torch.Tensor) -> Iterator[None]:
        """The consumer uses ``slot``."""
        with self.changed:
            self._held = slot.data_ptr(), slot.data_ptr() + slot.numel()
        try:
            yield
        finally:
            with self.changed:
                self._held = None

    def wait(self, condition: Callable[[], bool]) -> bool:
        with self.changed:
            return self.changed.wait_for(condition, PATIENCE_S)


class ProbedFile(ImageFile):
    """An image whose reads are slow, poison what they will fill, and can fail or stop half-way."""

    def __init__(self, path: Path, probe: Probe) -> None:
        super().__init__(path)
        self._probe = probe

    def read(self, target: memoryview, offset: int) -> None:
        probe, name = self._probe, self.path.name
        probe.touch(target, f"{name} at {offset}")
        target[:] = bytes([POISON]) * len(target)
        probe.dawdle()
        with probe.changed:
            probe.changed.wait_for(lambda: (name, offset) not in probe.blocked, PATIENCE_S)
            if name in probe.failing:
                probe.failed += 1
                probe.changed.notify_all()
                raise StoreError(f"{name} failed")
        super().read(target, offset)
        probe.touch(target, f"{name} at {offset}")
        with probe.changed:
            probe.reads.append((name, offset))
            probe.changed.notify_all()


class Ring:
    """Units of random bytes and a streamer over them."""

    def __init__(
        self,
        directory: Path,
        pages: list[int],
        slots: int,
        *,
        kind: Callable[..., Streamer] = Streamer,
        seed: int = 0,
        threads: int = 2,
        request_pages: int = 2,
        damaged: int | None = None,
        failing: int | None = None,
        blocked: tuple[tuple[str, int], ...] = (),
        delay_s: float = 0.0005,
    ) -> None:
        self.probe = Probe(seed, delay_s)
        self.probe.blocked |= set(blocked)
        self.probe.failing |= set() if failing is None else {f"unit{failing}"}
        self.contents = [
            random.Random(f"{seed} {i}").randbytes(size * PAGE_BYTES) for i, size in enumerate(pages)
        ]
        self.files, units = [], []
        for index, content in enumerate(self.contents):
            path = directory / f"unit{index}"
            broken = bytearray(content)
            if index == damaged:
                broken[len(broken) // 2] ^= 1
            path.write_bytes(broken)
            file = ProbedFile(path, self.probe)
            self.files.append(file)
            units.append(Unit(f"unit{index}", file, len(content), zlib.crc32(content)))
        memory = [map_bytes(max(pages) * PAGE_BYTES) for _ in range(slots)]
        self.backend = ThreadBackend()
        request_bytes = request_pages * PAGE_BYTES
        self.streamer = kind(units, memory, self.backend, threads=threads, request_bytes=request_bytes)

    def consume(self, index: int, *, release: bool = True) -> None:
        """Take the next unit, which must be ``index``, use it for a while, and give it back."""
        slot = self.streamer.acquire()
        with self.probe.holding(slot):
            for _ in range(2):
                right = slot.numpy().tobytes() == self.contents[index]  # pytest would explain whole pages
                assert right, f"unit {index} is not what was asked for"
                self.probe.dawdle()
        assert not self.probe.violations
        if release:
            self.streamer.release()

    def take(self, *indices: int) -> None:
        """Consume some units, which must be these, or fail."""

        def run() -> None:
            for index in indices:
                self.consume(index)

        finishes(run)

    def unblock(self) -> None:
        """Let every read go on."""
        with self.probe.changed:
            self.probe.blocked.clear()
            self.probe.changed.notify_all()

    def sweep(self) -> None:
        self.streamer.rewind()
        for index in range(len(self.contents)):
            self.consume(index)

    def close(self) -> None:
        self.unblock()
        self.streamer.close()
        self.backend.close()
        for file in self.files:
            file.close()


@contextmanager
def ring(directory: Path, pages: list[int], slots: int, **choices: Any) -> Iterator[Ring]:
    made = Ring(directory, pages, slots, **choices)
    try:
        yield made
    finally:
        made.close()


# The right bytes, in order


@pytest.mark.parametrize("seed", range(40))
def test_every_sweep_yields_every_unit_in_order(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pages = [rng.randint(1, 7) for _ in range(rng.randint(1, 6))]
    shape = {"threads": rng.randint(1, 4), "request_pages": rng.randint(1, 4)}
    with ring(tmp_path, pages, rng.randint(1, 4), seed=seed, **shape) as made:

        def run() -> None:
            for _ in range(4):
                made.sweep()

        finishes(run)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("units", [1, 2, 5])
def test_units_are_streamed_without_end(tmp_path: Path, units: int, slots: int) -> None:
    with ring(tmp_path, [1] * units, slots, threads=3, delay_s=0.0) as made:
        made.take(*(load % units for load in range(60)))


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_counted_bytes_are_those_consumed_and_those_ahead(
    tmp_path: Path, threads: int, slots: int, sweeps: int
) -> None:
    pages = [3, 1, 5]
    with ring(tmp_path, pages, slots, threads=threads) as made:
        for _ in range(sweeps):
            finishes(made.sweep)
        loaded = [pages[load % 3] for load in range(3 * sweeps + slots)]
        requests = sum(-(-size // 2) for size in loaded)
        assert made.probe.wait(lambda: len(made.probe.reads) == requests)
        made.close()  # joins the readers: what they read is counted now
        assert made.streamer.streamed_bytes == sum(loaded) * PAGE_BYTES


def test_the_next_sweep_loads_while_nobody_asks(tmp_path: Path) -> None:
    with ring(tmp_path, [2, 1, 3], 2) as made:
        finishes(made.sweep)
        ahead = [("unit0", 0), ("unit1", 0)]
        assert made.probe.wait(lambda: all(made.probe.reads.count(read) == 2 for read in ahead))
        assert made.probe.reads.count(("unit2", 0)) == 1  # no slot is free for it
        finishes(made.sweep)


def test_every_read_and_every_wait_is_in_the_timeline(tmp_path: Path) -> None:
    timeline = Timeline()
    with ring(tmp_path, [5, 2], 2, threads=1, blocked=(("unit0", 0),)) as made:
        made.streamer.timeline = timeline
        made.unblock()
        finishes(made.sweep)
        finishes(made.sweep)
        made.close()  # joins the reader: what it read is recorded now
        reads = [event for event in timeline.events() if event.get("cat") == "link: reader 0"]
        found = [(one["name"], one["args"]["offset"], one["args"]["bytes"]) for one in reads]
        parts = [("unit0", 0, 2), ("unit0", 2, 2), ("unit0", 4, 1), ("unit1", 0, 2)] * 3
        pages = [(name, offset * PAGE_BYTES, size * PAGE_BYTES) for name, offset, size in parts]
        assert found == pages[: len(found)]
        assert sum(size for _, _, size in found) == made.streamer.streamed_bytes
        waits = [event for event in timeline.events() if event["name"] == "wait"]
        assert [one["args"]["unit"] for one in waits] == ["unit0", "unit1"] * 2
        assert sum(one["dur"] for one in waits) / 1e6 == pytest.approx(made.streamer.wait_s, abs=1e-5)


# Broken sweeps


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("taken", range(6))
def test_a_sweep_may_be_broken_off_anywhere(tmp_path: Path, taken: int, held: bool, slots: int) -> None:
    with ring(tmp_path, [1, 4, 2, 3, 1], slots, seed=taken) as made:

        def run() -> None:
            for index in range(taken):
                made.consume(index, release=not (held and index == taken - 1))
            made.sweep()
            made.sweep()

        finishes(run)


def test_rewinding_between_sweeps_keeps_what_was_loaded_ahead(tmp_path: Path) -> None:
    with ring(tmp_path, [1, 1, 1], 2) as made:
        finishes(made.sweep)
        assert made.probe.wait(lambda: len(made.probe.reads) == 5)
        made.streamer.rewind()
        made.take(0)
        assert made.probe.wait(lambda: len(made.probe.reads) == 6)
        assert made.probe.reads.count(("unit0", 0)) == 2


def test_rewinding_waits_for_reads_under_way(tmp_path: Path) -> None:
    with ring(tmp_path, [1, 1, 1, 1], 2) as made:
        made.probe.blocked.add(("unit2", 0))
        made.take(0)
        made.take(1)
        rewinding = threading.Thread(target=made.streamer.rewind, daemon=True)
        rewinding.start()
        made.unblock()
        rewinding.join(PATIENCE_S)
        assert not rewinding.is_alive()
        finishes(made.sweep)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("failing", range(4))
def test_a_failed_read_surfaces_and_the_next_sweep_may_work(
    tmp_path: Path, failing: int, slots: int, threads: int
) -> None:
    with ring(tmp_path, [1, 3, 2, 1], slots, threads=threads, failing=failing) as made:
        for _ in range(2):
            reached: list[int] = []

            def run(reached: list[int] = reached) -> None:
                made.streamer.rewind()
                for index in range(4):
                    made.consume(index)
                    reached.append(index)

            with pytest.raises(StoreError, match=f"unit{failing} failed"):
                finishes(run)
            assert len(reached) <= failing
        made.probe.failing.clear()
        finishes(made.sweep)
        finishes(made.sweep)


@pytest.mark.parametrize("damaged", range(3))
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_damage_is_found_at_the_first_read_and_never_used(tmp_path: Path, slots: int, damaged: int) -> None:
    with ring(tmp_path, [3, 2, 4], slots, damaged=damaged) as made:
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"unit{damaged} .*is damaged: its CRC-32 .*--rebuild"):
                finishes(made.sweep)


def test_a_failure_ahead_of_use_is_forgotten_by_rewinding(tmp_path: Path) -> None:
    with ring(tmp_path, [1, 1, 1], 2) as made:
        made.take(0)
        made.probe.failing.add("unit0")
        made.take(1)
        assert made.probe.wait(lambda: made.probe.failed == 1)
        with pytest.raises(StoreError, match="unit0 failed"):
            made.take(2, 0)
        made.probe.failing.clear()
        finishes(made.sweep)


# The end


@pytest.mark.parametrize("threads", [1, 4])
def test_closing_ends_every_reader(tmp_path: Path, threads: int) -> None:
    made = Ring(tmp_path, [4, 4, 4], 2, threads=threads)
    made.take(0)
    readers = {thread for thread in threading.enumerate() if thread.name.startswith("reader")}
    assert len(readers) == threads
    finishes(made.close)
    assert not any(thread.is_alive() for thread in readers)
    finishes(made.close)


def test_closing_while_a_read_is_under_way_waits_for_it(tmp_path: Path) -> None:
    made = Ring(tmp_path, [1, 1, 1], 2, blocked=(("unit1", 0),))
    made.take(0)
    closing = threading.Thread(target=made.streamer.close, daemon=True)
    closing.start()
    with made.probe.changed:
        made.probe.blocked.clear()
        made.probe.changed.notify_all()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert ("unit1", 0) in made.probe.reads
    made.close()


def test_asking_after_the_end_is_an_error(tmp_path: Path) -> None:
    made = Ring(tmp_path, [1, 1, 1], 1)
    made.take(0)
    made.close()
    with pytest.raises(StoreError):
        made.take(1, 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_failure_of_a_reader_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ProbedFile, "read", failing)
    with ring(tmp_path, [1, 1], 1) as made, pytest.raises((MemoryError, StoreError)):
        made.take(0)


# What the checker is for: one broken rule each


class GivesBackEarly(Streamer):
    """Readers do not wait for the consumer's release."""

    def acquire(self) -> torch.Tensor:
        slot = super().acquire()
        super().release()
        return slot

    def release(self) -> None:
        pass


class ReadyEarly(Streamer):
    """A unit counts as there as soon as one reader's parts are."""

    def acquire(self) -> torch.Tensor:
        load = self._loads[self._next]
        self._backend.host_wait(self._slots[load.slot].arrived[1])
        return self._slots[load.slot].memory[: self.units[load.index].n_bytes]


class Unverified(Streamer):
    """Checksums are not compared."""

    def _verify(self, load: Any) -> None:
        pass


class NeverRewinds(Streamer):
    """A broken sweep goes on where it was."""

    def rewind(self) -> None:
        pass


class OneSlot(Streamer):
    """Every load goes to the same slot."""

    def __init__(self, units: Any, slots: Any, backend: Any, **choices: Any) -> None:
        super().__init__(units, [slots[0]] * len(slots), backend, **choices)


@pytest.mark.parametrize("kind", [GivesBackEarly, OneSlot])
def test_a_slot_written_too_early_is_caught(tmp_path: Path, kind: type[Streamer]) -> None:
    blocked = (("unit1", 0), ("unit2", 0))
    with ring(tmp_path, [2, 2, 2], 2, kind=kind, threads=3, blocked=blocked) as made:
        try:
            slot = made.streamer.acquire()
        except StoreError:
            assert kind is OneSlot  # unit 1's poison was in the slot before unit 0 was verified
            return
        with made.probe.holding(slot):
            made.unblock()
            assert made.probe.wait(lambda: bool(made.probe.violations))


def test_a_part_taken_for_the_whole_is_caught(tmp_path: Path) -> None:
    blocked = (("unit0", 0),)
    with (
        ring(tmp_path, [4, 4], 2, kind=ReadyEarly, blocked=blocked) as made,
        pytest.raises(AssertionError, match="not what was asked for"),
    ):
        made.take(0)


def test_unverified_bytes_are_caught(tmp_path: Path) -> None:
    with (
        ring(tmp_path, [2, 2], 2, kind=Unverified, damaged=1) as made,
        pytest.raises(AssertionError, match="unit 1 is not"),
    ):
        finishes(made.sweep)


def test_a_sweep_that_starts_in_the_middle_is_caught(tmp_path: Path) -> None:
    with ring(tmp_path, [2, 2, 2], 2, kind=NeverRewinds) as made:
        made.take(0)
        with pytest.raises(AssertionError, match="unit 0 is not"):
            finishes(made.sweep)
