"""The slot ring: brings the units of a sweep into a few fixed slots, in order, ahead of their use.

The units form a cycle: after the last one of a sweep comes the first one of the next, so that the next
sweep's first units load while the draft runs.  Load ``i`` goes to slot ``i % slots``, and begins as soon as
the load that held the slot was released.  The consumer calls ``acquire`` and ``release`` once a unit.

A unit comes from a file, by reader threads: straight into the slot where slots lie in host memory, else
through pinned staging buffers and the copy stream.  Or it comes from pinned host memory, by the copy stream
alone.  What keeps this free of races is two-way: a slot is written once *free*, recorded on the compute
stream at its release, is reached; and read once every part has *arrived* and is *copied*.  A staging buffer
is written once it is *emptied*.

The schedule runs on whatever ``backend`` is given.  Knows nothing of what the bytes mean.
"""

import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from subspec.errors import StoreError
from subspec.memory.backend import Backend, Event, Stream
from subspec.memory.checksum import joined
from subspec.memory.disk import ImageFile, require_crc32, writable
from subspec.memory.timeline import Timeline

REQUEST_BYTES = 8 << 20
THREADS = 2
STAGING_BUFFERS = 2  # a reader: one is filled while the other one empties


@dataclass(frozen=True)
class Unit:
    """One run of bytes that is streamed whole.

    Attributes:
        name: for messages and traces.
        file: the page-aligned file that holds exactly these bytes.
        n_bytes: how many.
        crc32: their CRC-32.
        image: (n_bytes,) uint8, pinned host memory that holds them, verified: then nothing is read.
    """

    name: str
    file: ImageFile
    n_bytes: int
    crc32: int
    image: torch.Tensor | None = None


@dataclass
class _Load:
    """One unit on its way into one slot, or there.

    Attributes:
        index: of the unit; ``slot``: of the slot.
        parts: CRC-32 and bytes of each part, as they are read; None where it is not wanted.
        dropped: nobody wants it any more: parts that were not read yet will not be.
        error: what a reader met.
    """

    index: int
    slot: int
    parts: list[tuple[int, int]] | None
    dropped: bool = False
    error: Exception | None = None


@dataclass
class _Reader:
    """A reader thread.

    Attributes:
        stream: the thread.
        buffers: its staging buffers with the events that say when they are empty; none: it reads into slots.
        turn: which buffer is next; the thread's own.
    """

    stream: Stream
    buffers: list[tuple[torch.Tensor, Event]] = field(default_factory=list)
    turn: int = 0


@dataclass(frozen=True)
class _Slot:
    """A slot and its events.

    Attributes:
        memory: uint8.
        free: on the compute stream: what used it is done.
        arrived: on each reader: its parts are read, and their copies enqueued.
        copied: on the copy stream: what each reader enqueued is there.
    """

    memory: torch.Tensor
    free: Event
    arrived: list[Event]
    copied: list[Event]


class Streamer:
    """Streams ``units`` cyclically through ``slots``.

    Args:
        units: at least one.
        slots: page-aligned uint8 tensors, each as large as the largest unit.
        backend: runs it; stays the caller's.
        staging: pinned uint8 host buffers of ``request_bytes`` for units that come from files,
            ``STAGING_BUFFERS`` a reader; none: readers write to the slots themselves.
        threads: reader threads.
        request_bytes: size of one read.
        paranoid: verify a unit's checksum every time it is read, not only the first time.

    Attributes:
        streamed_bytes: bytes that came into slots; ``read_bytes``: of those, bytes that were read from files.
        wait_s: seconds that the consumer was blocked; ``busy_s``: that at least one read was under way.
        timeline: gets a span for each read that ends and for each wait, while it is set.

    Parts are summed by the reader that reads them; a unit's checksum is compared when it is acquired.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        slots: Sequence[torch.Tensor],
        backend: Backend,
        *,
        staging: Sequence[torch.Tensor] = (),
        threads: int = THREADS,
        request_bytes: int = REQUEST_BYTES,
        paranoid: bool = False,
    ) -> None:
        if not units or not slots:
            raise ValueError(f"{len(units)} units cannot stream through {len(slots)} slots")
        self.units, self._backend = list(units), backend
        self._request_bytes, self._paranoid = request_bytes, paranoid
        self._verified = [False] * len(units)
        copies = bool(staging) or any(unit.image is not None for unit in units)
        self._copies = backend.stream("copies") if copies else backend.compute
        reads = any(unit.image is None for unit in units)
        self._readers = [self._reader(number, staging) for number in range(threads if reads else 0)]
        self._slots = [self._slot(number, memory) for number, memory in enumerate(slots)]
        self._requests = 0  # so far: they go to the readers in turn
        self._closed = False
        self._counting = threading.Lock()
        self._in_flight, self._busy_since = 0, 0.0
        self.streamed_bytes = self.read_bytes = 0
        self.wait_s = self.busy_s = 0.0
        self.timeline: Timeline | None = None
        self._begin(0)

    def _reader(self, number: int, staging: Sequence[torch.Tensor]) -> _Reader:
        """A reader thread, with its share of the staging buffers."""
        own = staging[number * STAGING_BUFFERS : (number + 1) * STAGING_BUFFERS]
        buffers = [
            (buffer, self._backend.event(f"reader {number} emptied {turn}"))
            for turn, buffer in enumerate(own)
        ]
        return _Reader(self._backend.stream(f"reader {number}", host=True), buffers)

    def _slot(self, number: int, memory: torch.Tensor) -> _Slot:
        """A slot with its events."""
        event = self._backend.event
        arrived = [event(f"slot {number} arrived {reader}") for reader in range(len(self._readers))]
        copied = [event(f"slot {number} copied {reader}") for reader in range(max(len(self._readers), 1))]
        return _Slot(memory, event(f"slot {number} free"), arrived, copied)

    def _begin(self, number: int) -> None:
        """Start the loads from ``number`` on that there are slots for."""
        self._next = number  # the next load to consume
        self._loads = {one: self._start(one) for one in range(number, number + len(self._slots))}

    # --- the consumer ---

    def acquire(self) -> torch.Tensor:
        """The next unit's bytes: a view of its slot, valid for the compute stream until ``release``.

        Blocks until they have arrived, or are on their way on the copy stream; the compute stream waits for
        the rest.

        Raises:
            StoreError: reading failed before the unit was there, its checksum is wrong, or ``close`` was
                called.
        """
        start = time.perf_counter()
        load = self._loads[self._next]
        slot, unit = self._slots[load.slot], self.units[load.index]
        for event in slot.arrived:
            self._backend.host_wait(event)
        end = time.perf_counter()
        self.wait_s += end - start
        if self.timeline is not None:
            self.timeline.span("sweep", "wait", start, end, unit=unit.name)
        if self._closed:
            raise StoreError("the model is closed")
        self._verify(load)
        for event in slot.copied:
            self._backend.wait(self._backend.compute, event)
        return slot.memory[: unit.n_bytes]

    def ready(self) -> bool:
        """Whether the next unit is in its slot, or ``acquire`` would raise at once."""
        load = self._loads[self._next]
        slot = self._slots[load.slot]
        return self._closed or all(map(self._backend.done, (*slot.arrived, *slot.copied)))

    def release(self) -> None:
        """Give the acquired slot back, for when what the compute stream was given so far is done."""
        load = self._loads.pop(self._next)
        self._backend.record(self._slots[load.slot].free, self._backend.compute)
        ahead = self._next + len(self._slots)
        self._next += 1
        self._loads[ahead] = self._start(ahead)

    def rewind(self) -> None:
        """Make the first unit the next one, after a sweep that was broken off or failed; else do nothing."""
        if self._next % len(self.units) == 0 and not any(load.error for load in self._loads.values()):
            return
        self._drop()
        for slot in self._slots:
            for event in slot.copied:
                self._backend.wait(self._backend.compute, event)
            self._backend.record(slot.free, self._backend.compute)
        self._begin(-(-self._next // len(self.units)) * len(self.units))

    def close(self) -> None:
        """Let the reads under way end, and begin no others.  Slots, files and backend are the caller's."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        """Wait until nothing is being read."""
        for load in self._loads.values():
            load.dropped = True
        for slot in self._slots:
            for event in slot.arrived:
                self._backend.host_wait(event)

    def _verify(self, load: _Load) -> None:
        """Raise what went wrong with a load whose parts have arrived.

        Raises:
            StoreError: a read failed, or the checksum differs.
        """
        unit = self.units[load.index]
        if load.error is None and load.parts is not None:
            try:
                require_crc32(joined(load.parts), unit.crc32, unit.file.path)
                self._verified[load.index] = True
            except StoreError as error:
                load.error = error
        if load.error is not None:
            raise load.error

    # --- loads ---

    def _start(self, number: int) -> _Load:
        """Begin a load: its slot was given back."""
        index, place = number % len(self.units), number % len(self._slots)
        unit, slot, backend = self.units[index], self._slots[place], self._backend
        if unit.image is not None:
            load = _Load(index, place, None)
            backend.wait(self._copies, slot.free)
            backend.copy(self._copies, slot.memory[: unit.n_bytes], unit.image, f"load {number}")
            backend.record(slot.copied[0], self._copies)
            with self._counting:
                self.streamed_bytes += unit.n_bytes
            return load
        sizes = [
            (offset, min(self._request_bytes, unit.n_bytes - offset))
            for offset in range(0, unit.n_bytes, self._request_bytes)
        ]
        summed = self._paranoid or not self._verified[index]
        load = _Load(index, place, [(0, size) for _, size in sizes] if summed else None)
        for part, (offset, size) in enumerate(sizes):
            turn = self._requests % len(self._readers)
            work = partial(self._read, load, part, offset, size, turn)
            backend.launch(self._readers[turn].stream, work, note=f"load {number}")
            self._requests += 1
        for reader, event in zip(self._readers, slot.arrived, strict=True):
            backend.record(event, reader.stream)
        return load

    def _read(self, load: _Load, part: int, offset: int, size: int, turn: int) -> None:
        """A reader's work: bring one part of a load, unless nobody wants it any more."""
        if load.dropped or load.error is not None or self._closed:
            return
        reader, memory = self._readers[turn], self._slots[load.slot].memory[offset : offset + size]
        try:
            if not reader.buffers:
                self._backend.host_wait(self._slots[load.slot].free)
                self._fill(load, part, offset, memory, reader)
            else:
                buffer, emptied = reader.buffers[reader.turn]
                reader.turn = (reader.turn + 1) % len(reader.buffers)
                self._backend.host_wait(emptied)
                self._fill(load, part, offset, buffer[:size], reader)
                self._backend.wait(self._copies, self._slots[load.slot].free)
                self._backend.copy(self._copies, memory, buffer[:size], f"part {part}")
                self._backend.record(emptied, self._copies)
                self._backend.record(self._slots[load.slot].copied[turn], self._copies)
        except Exception as error:  # noqa: BLE001 - whatever a reader meets, the sweep must hear of it
            load.error = error

    def _fill(self, load: _Load, part: int, offset: int, memory: torch.Tensor, reader: _Reader) -> None:
        """Read a part into host memory, and sum it if its checksum is to be compared."""
        unit, view = self.units[load.index], writable(memory)
        self._backend.touch(writes=[memory], note=f"{unit.name} at {offset}")
        start = self._count(begins=True)
        try:
            unit.file.read(view, offset)
        finally:
            end = self._count(begins=False)
        with self._counting:
            self.streamed_bytes += len(view)
            self.read_bytes += len(view)
        if (timeline := self.timeline) is not None:
            track = f"link: {reader.stream.name}"
            timeline.span(track, unit.name, start, end, offset=offset, bytes=len(view))
        if load.parts is not None:
            load.parts[part] = zlib.crc32(view), len(view)

    def _count(self, *, begins: bool) -> float:
        """A read begins or ends: what time it is; keeps ``busy_s``."""
        now = time.perf_counter()
        with self._counting:
            if begins and not self._in_flight:
                self._busy_since = now
            self._in_flight += 1 if begins else -1
            if not self._in_flight:
                self.busy_s += now - self._busy_since
        return now
