"""The slot ring: brings the units of a sweep into a few fixed slots, in order, ahead of their use.

The units form a cycle: after the last one of a sweep comes the first one of the next, so that the next
sweep's first units load while the draft runs.  Reader threads fill slot ``i % slots`` with the ``i``-th
load as soon as the load that held the slot was released.  The consumer calls ``acquire`` and ``release``
once a unit, in order.

Two rules keep it free of races: a reader touches a slot only between its release and its next ``ready``; the
consumer reads it only between ``acquire`` and ``release``.  Knows nothing of what the bytes mean.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from subspec.errors import StoreError
from subspec.memory.disk import ImageFile, check_crc32, writable
from subspec.memory.hazards import HazardChecker
from subspec.memory.ring_hazards import RingHazards, Unwatched
from subspec.memory.timeline import Timeline

REQUEST_BYTES = 8 << 20
THREADS = 2


@dataclass(frozen=True)
class Unit:
    """One run of bytes that is streamed whole: a page-aligned image file, with the CRC-32 of its bytes."""

    name: str
    file: ImageFile
    n_bytes: int
    crc32: int


class Streamer:
    """Streams ``units`` cyclically through ``slots``.

    Args:
        units: at least one; each file holds exactly its unit's bytes.
        slots: page-aligned uint8 tensors, each as large as the largest unit.
        threads: reader threads.
        request_bytes: size of one read.
        paranoid: verify a unit's checksum every time it is read, not only the first time.
        checker: is told of every access to the slots and of what orders it.

    Attributes:
        streamed_bytes, wait_s: bytes read, and seconds that the consumer waited, since it was made.
        timeline: gets a span for each read that ends and for each wait, while it is set.

    Checksums are verified by the reader thread that completes a unit.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        slots: Sequence[torch.Tensor],
        *,
        threads: int = THREADS,
        request_bytes: int = REQUEST_BYTES,
        paranoid: bool = False,
        checker: HazardChecker | None = None,
    ) -> None:
        if not units or not slots:
            raise ValueError(f"{len(units)} units cannot stream through {len(slots)} slots")
        self.units = list(units)
        self.slots = list(slots)
        self._views = [writable(slot) for slot in slots]
        self._request_bytes = request_bytes
        self._verified = [False] * len(units)
        self._paranoid = paranoid
        self._changed = threading.Condition()
        self._begin(0)
        self._in_flight = 0
        self._closed = False
        self.streamed_bytes = 0
        self.wait_s = 0.0  # that `acquire` blocked
        self.busy_s = 0.0  # that at least one read was under way
        self._busy_since = 0.0
        self.timeline: Timeline | None = None
        names = [f"reader {index}" for index in range(threads)]
        self._watch = Unwatched()
        if checker is not None:
            self._watch = RingHazards(checker, [slot.data_ptr() for slot in slots], names)
        self._threads = [threading.Thread(target=self._read_loop, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def _begin(self, load: int) -> None:
        """Forget every load and start again at load number ``load``."""
        self._loading = load  # the load that requests are taken from
        self._offset = 0  # where its next request starts
        self._released = load  # loads whose slot has been given back; also the next load to consume
        self._missing: dict[int, int] = {}  # load → bytes not yet there
        self._ready: set[int] = set()
        self._error: Exception | None = None

    def acquire(self) -> torch.Tensor:
        """The next unit's bytes: a view of its slot, valid until ``release``.  Blocks until they are there.

        Raises:
            StoreError: reading failed before the unit was there, its checksum is wrong, or ``close`` was
                called.
        """
        start = time.perf_counter()
        with self._changed:
            load = self._released
            while load not in self._ready and self._error is None and not self._closed:
                self._changed.wait()
            if load not in self._ready:
                raise self._error or StoreError("the model is closed")
        end, unit = time.perf_counter(), self.units[load % len(self.units)]
        self.wait_s += end - start
        if self.timeline is not None:
            self.timeline.span("sweep", "wait", start, end, unit=unit.name)
        self._watch.acquired(load, unit.n_bytes)
        return self.slots[load % len(self.slots)][: unit.n_bytes]

    def ready(self) -> bool:
        """Whether ``acquire`` would return, or raise, at once."""
        with self._changed:
            return self._released in self._ready or self._error is not None or self._closed

    def release(self) -> None:
        """Give the acquired slot back to the readers."""
        with self._changed:
            self._watch.released(self._released)
            self._ready.discard(self._released)
            self._released += 1
            self._changed.notify_all()

    def rewind(self) -> None:
        """Make the first unit the next one, after a sweep that was broken off or failed; else do nothing."""
        with self._changed:
            if self._released % len(self.units) == 0 and self._error is None:
                return
            self._error = StoreError("the sweep was broken off")  # keeps the readers from taking more
            while self._in_flight:
                self._changed.wait()
            sweeps = -(-self._released // len(self.units))
            self._watch.rewound(sweeps * len(self.units))
            self._begin(sweeps * len(self.units))
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the readers.  The slots are the caller's; the files are closed by their owner."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_loop(self) -> None:
        """A reader thread: take a request, fill its part of the slot, until closed."""
        while (request := self._next_request()) is not None:
            load, offset, size = request
            unit = self.units[load % len(self.units)]
            try:
                self._watch.filling(load, offset, size)
                start = time.perf_counter()
                unit.file.read(self._views[load % len(self.slots)][offset : offset + size], offset)
                if (timeline := self.timeline) is not None:
                    track, end = f"link: {threading.current_thread().name}", time.perf_counter()
                    timeline.span(track, unit.name, start, end, offset=offset, bytes=size)
                self._finish(load, size)
            except Exception as error:  # noqa: BLE001 - whatever a reader meets, the sweep must hear of it
                with self._changed:
                    self._error = self._error or error
            finally:
                with self._changed:
                    self._watch.idle()
                    self._in_flight -= 1
                    if not self._in_flight:
                        self.busy_s += time.perf_counter() - self._busy_since
                    self._changed.notify_all()

    def _next_request(self) -> tuple[int, int, int] | None:
        """(load, offset, bytes) of the next read, once a slot is free for it; None when closed."""
        with self._changed:
            while not self._closed:
                load, offset = self._loading, self._offset
                if self._error is None and self._is_free(load):
                    n_bytes = self.units[load % len(self.units)].n_bytes
                    size = min(self._request_bytes, n_bytes - offset)
                    self._missing.setdefault(load, n_bytes)
                    self._offset += size
                    if self._offset == n_bytes:
                        self._loading, self._offset = load + 1, 0
                    if not self._in_flight:
                        self._busy_since = time.perf_counter()
                    self._in_flight += 1
                    return load, offset, size
                self._changed.wait()
            return None

    def _is_free(self, load: int) -> bool:
        """Whether the slot of the next load to read was given back."""
        if load >= self._released + len(self.slots):
            return False
        self._watch.free(load)
        return True

    def _finish(self, load: int, size: int) -> None:
        """Note that ``size`` bytes of a load are there; the thread that completes it makes it ready."""
        with self._changed:
            self._watch.filled(load)
            self.streamed_bytes += size
            self._missing[load] -= size
            if self._missing[load]:
                return
            del self._missing[load]
        index = load % len(self.units)
        self._watch.complete(load, self.units[index].n_bytes)
        if self._paranoid or not self._verified[index]:
            self._verify(index, self._views[load % len(self.slots)])
        with self._changed:
            self._watch.ready(load)
            self._ready.add(load)

    def _verify(self, index: int, view: memoryview) -> None:
        """Compare a unit's bytes with its checksum.

        Raises:
            StoreError: they differ.
        """
        unit = self.units[index]
        check_crc32(view[: unit.n_bytes], unit.crc32, unit.file.path)
        self._verified[index] = True
