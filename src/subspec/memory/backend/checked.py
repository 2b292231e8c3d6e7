"""Wraps a backend and tells a hazard checker what its streams and the host do, and what orders them.

Actors are the streams, and each Python thread that is no stream's.  Of a device stream all is told at the
call, since it does what it is told in that order; the caller's clock joins the stream's, since no stream is
ahead of its caller.  Of a host stream all is told as its work does it, in its turn: the work is the actor.
Places are byte addresses, so that views of one storage that overlap are seen to.  An event is a place too:
its record is a write of whoever calls, a wait for it a read.  Unordered, the wait would be for this record or
for an earlier one, as it happens.

An event costs the memory of one clock, however often it is recorded.  Calls on one device stream, or on one
event, must come from one thread at a time.  Knows nothing of units, slots or models.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from subspec.memory.backend import Backend, Event, Stream
from subspec.memory.hazards import HazardChecker

PLACE = "memory"


class _Record:
    """One record of an event: what the checker knows it by, until nobody may still wait for it."""

    def __init__(self, stream: Stream) -> None:
        self.host = stream.host
        self.holders = 2 if stream.host else 1  # the event, and the turn of a host stream in which it is told


class _Event(Event):
    """The wrapped backend's event, and its newest record."""

    def __init__(self, name: str, inner: Event) -> None:
        super().__init__(name)
        self.inner = inner
        self.newest: _Record | None = None

    def __str__(self) -> str:
        return f"event {self.name}"


class CheckedBackend:
    """``backend``, with every access and every edge told to ``checker``.

    A hazard raises where it is met, also in the work of a host stream; in case that work kept it to itself,
    it raises again at the next ``host_wait`` and at ``close``.

    Args:
        backend: does the work.
        checker: compares; one that collects raises nothing.
    """

    def __init__(self, backend: Backend, checker: HazardChecker) -> None:
        self._inner, self._checker = backend, checker
        self.device = backend.device
        self.compute = backend.compute
        self._actors: dict[Stream, str] = {}
        self._names: set[str] = set()
        self._lock = threading.Lock()  # of names and of records' holders
        self._local = threading.local()
        self._actors[self.compute] = self._unique(self.compute.name)

    @property
    def eager(self) -> str | None:
        """As the wrapped backend."""
        return self._inner.eager

    def stream(self, name: str, *, host: bool = False) -> Stream:
        """A new stream, and actor."""
        stream = self._inner.stream(name, host=host)
        self._actors[stream] = self._unique(name)
        return stream

    def event(self, name: str) -> Event:
        """A new event."""
        return _Event(name, self._inner.event(name))

    def record(self, event: Event, stream: Stream) -> None:
        """Tell of all that the stream did so far."""
        assert isinstance(event, _Event)
        self._checker.write(self._me(), event, 0, 1, "record")
        record, before = _Record(stream), event.newest
        self._in_turn(stream, lambda actor: self._signal(actor, record))
        self._inner.record(event.inner, stream)
        event.newest = record  # only now: who asks meanwhile is told less than the wrapped event may promise
        if before is not None:
            self._drop(before)

    def wait(self, stream: Stream, event: Event) -> None:
        """Tell of the edge from the newest record.

        Raises:
            AssertionError: a device stream would wait for a host stream.
        """
        assert isinstance(event, _Event)
        self._checker.read(self._me(), event, 0, 1, "wait")
        record = event.newest
        assert record is None or stream.host or not record.host, f"{stream.name} waits for {event.name}"
        if record is not None:
            self._hold(record)
        self._inner.wait(stream, event.inner)
        if record is not None:
            self._in_turn(stream, lambda actor: self._join(actor, record))

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:
        """Tell of the read and of the write."""
        assert not stream.host, f"{stream.name} is a thread: it copies by itself"
        self._in_turn(stream, lambda actor: self._access(actor, [source], [target], note))
        self._inner.copy(stream, target, source, note)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        note: str = "",
    ) -> None:
        """Tell of what is read and written; of a host stream, the work itself does."""
        if not stream.host:
            self._in_turn(stream, lambda actor: self._access(actor, reads, writes, note))
            self._inner.launch(stream, work, reads=reads, writes=writes, note=note)
            return
        assert not reads, f"{note}: on a thread the work itself says what it reads"
        assert not writes, f"{note}: on a thread the work itself says what it writes"
        self._in_turn(stream, lambda actor: self._work_as(actor, work), note)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """As the wrapped backend does; whoever launches the result says its accesses."""
        return self._inner.capture(work)

    def host_wait(self, event: Event) -> None:
        """Wait, then tell of the edge to the caller.

        Raises:
            HazardError: the first hazard that any thread has met so far.
        """
        assert isinstance(event, _Event)
        self._checker.read(self._me(), event, 0, 1, "wait")
        record = event.newest
        self._inner.host_wait(event.inner)
        if record is not None:
            self._checker.wait(self._me(), record)
        self._checker.check()

    def done(self, event: Event) -> bool:
        """Whether the newest record is reached: no edge."""
        assert isinstance(event, _Event)
        return self._inner.done(event.inner)

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), note: str = ""
    ) -> None:
        """Tell of the caller's accesses."""
        self._access(self._me(), reads, writes, note)
        self._inner.touch(reads=reads, writes=writes, note=note)

    def settle(self) -> None:
        """As the wrapped backend does; orders nothing that the verbs do."""
        self._inner.settle()

    def close(self) -> None:
        """Run what was launched.

        Raises:
            HazardError: the first hazard that any thread has met.
        """
        self._inner.close()
        self._checker.check()

    def _in_turn(self, stream: Stream, tell: Callable[[str], object], note: str = "") -> None:
        """Tell what the caller knows by now, then ``tell(actor)``: a device stream's at once."""
        edge, actor = object(), self._actors[stream]
        self._checker.signal(self._me(), edge)

        def turn() -> None:
            self._checker.wait(actor, edge)
            self._checker.forget(edge)
            tell(actor)

        if stream.host:
            self._inner.launch(stream, turn, note=note)
        else:
            turn()

    def _work_as(self, actor: str, work: Callable[[], object]) -> None:
        """Run a host stream's work; its thread may be one that does other streams' work as well."""
        before = getattr(self._local, "actor", None)
        self._local.actor = actor
        try:
            work()
        finally:
            self._local.actor = before

    def _me(self) -> str:
        """The actor whose code is running."""
        actor: str | None = getattr(self._local, "actor", None)
        if actor is None:
            self._local.actor = actor = self._unique(threading.current_thread().name)
        return actor

    def _unique(self, name: str) -> str:
        """A name for an actor: two of one name would be taken for one."""
        with self._lock:
            count, unique = 1, name
            while unique in self._names:
                count += 1
                unique = f"{name} ({count})"
            self._names.add(unique)
        return unique

    def _access(
        self, actor: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], note: str
    ) -> None:
        """Tell of bytes read, then of bytes written."""
        for tensor in reads:
            self._checker.read(actor, PLACE, *_interval(tensor), note)
        for tensor in writes:
            self._checker.write(actor, PLACE, *_interval(tensor), note)

    def _hold(self, record: _Record) -> None:
        """Somebody will need a record in its turn, when the event may have a newer one."""
        with self._lock:
            record.holders += 1

    def _drop(self, record: _Record) -> None:
        """Somebody needs a record no more; after the last, the checker forgets it."""
        with self._lock:
            record.holders -= 1
            unneeded = not record.holders
        if unneeded:
            self._checker.forget(record)

    def _signal(self, actor: str, record: _Record) -> None:
        """The stream is at a record."""
        self._checker.signal(actor, record)
        if record.host:
            self._drop(record)

    def _join(self, actor: str, record: _Record) -> None:
        """The stream goes on after a record, and needs it no more."""
        self._checker.wait(actor, record)
        self._drop(record)


def _interval(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last + 1 address of a contiguous tensor."""
    assert tensor.is_contiguous(), "accesses are told of contiguous memory"
    start = tensor.data_ptr()
    return start, start + tensor.nbytes
