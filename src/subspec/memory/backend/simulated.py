"""A backend that tries orders: streams are queues, and a seed says whose operation runs next, and when.

A call only queues.  It, and later calls and waits, then step the simulation: one operation of one stream at a
time, on the caller's thread, so that a seed always gives the same run.  Each seed has its own habits: which
streams starve, how far the caller runs ahead, whether all happens as early or as late as it can.  Copies are
cut in pieces that other streams' operations come between, and begin by spoiling their target: who looks too
early sees NaN, or −1.

The work of a host stream is one operation; while it waits, device streams alone go on.  That suffices, since
neither it nor a device stream ever waits for a host stream.  Must be called from one thread, with no lock
held that the work of a host stream takes.  Knows nothing of units, slots or models.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from subspec.memory.backend import Event, Stream

POISON = 0xFF  # NaN in bf16, fp16 and fp32; −1 in integers
MAX_PIECES = 4


class DeadlockError(RuntimeError):
    """A wait can never end: a bug, never a user's mistake."""


@dataclass(eq=False)
class _Record:
    """One record of an event: on which stream, and whether that got there."""

    event: str
    stream: "_Stream"
    reached: bool = False

    def reach(self) -> None:
        """The stream is there."""
        self.reached = True


@dataclass
class _Operation:
    """What a stream runs in one go, once ``after`` is reached."""

    note: str
    run: Callable[[], object]
    after: _Record | None = None


class _Stream(Stream):
    """Operations yet to run; of two streams, a strict run prefers that of higher rank."""

    def __init__(self, name: str, *, host: bool, rank: float) -> None:
        super().__init__(name, host=host)
        self.rank = rank
        self.queue: deque[_Operation] = deque()

    def runnable(self) -> bool:
        """Whether there is a next operation, and it need not wait."""
        if not self.queue:
            return False
        after = self.queue[0].after
        return after is None or after.reached


class _Event(Event):
    """Its newest record is all that a wait looks at."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.newest: _Record | None = None


class SimulatedBackend:
    """Streams simulated in CPU memory, in an order that ``seed`` decides.  Not thread-safe.

    Attributes:
        device: the CPU.
        compute: a queue like any other.
        trace: the operations that ran so far, in order: (stream, what).
    """

    def __init__(self, seed: int) -> None:
        self._random = random = Random(seed)
        self._late = random.random() < 0.25  # run only what a wait needs
        ahead = random.choice((0.0, 0.2, 0.5, 0.9, 1.0))
        self._ahead = 0.0 if self._late else ahead  # chance of each further step in a call
        self._strict = random.choice((0.0, 0.9, 1.0))  # chance that rank decides
        self._streams: list[_Stream] = []
        self._running: list[_Stream] = []  # whose operation is under way, innermost last
        self.trace: list[tuple[str, str]] = []
        self.device = torch.device("cpu")
        self.eager: str | None = "a simulation has nothing to capture"
        self.compute: Stream = self.stream("compute")

    def stream(self, name: str, *, host: bool = False) -> Stream:
        """A new queue."""
        self._streams.append(_Stream(name, host=host, rank=self._random.random()))
        return self._streams[-1]

    def event(self, name: str) -> Event:
        """A new event."""
        return _Event(name)

    def record(self, event: Event, stream: Stream) -> None:
        """Replace the event's record now, reach it in the stream's turn."""
        assert isinstance(event, _Event)
        assert isinstance(stream, _Stream)
        event.newest = record = _Record(event.name, stream)
        self._enqueue(stream, f"record {event.name}", record.reach)
        self._run_ahead()

    def wait(self, stream: Stream, event: Event) -> None:
        """Hold the stream, in its turn, until the record that is the newest now.

        Raises:
            AssertionError: a device stream would wait for a host stream.
        """
        assert isinstance(event, _Event)
        if (record := event.newest) is not None:
            waits_for_host = record.stream.host and not stream.host
            assert not waits_for_host, (
                f"{stream.name} waits for {event.name} of {record.stream.name}, a thread"
            )
            self._enqueue(stream, f"wait {event.name}", lambda: None, record)
        self._run_ahead()

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:
        """Spoil the target, then copy a piece at a time, each in the stream's turn."""
        assert not stream.host, f"{stream.name} is a thread: it copies by itself"
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        to, of = _bytes(target), _bytes(source)
        n_bytes = len(to)
        cuts = sorted(self._random.randrange(n_bytes + 1) for _ in range(self._random.randrange(MAX_PIECES)))
        self._enqueue(stream, f"spoil {note}", lambda: to.fill_(POISON))
        for start, stop in zip([0, *cuts], [*cuts, n_bytes], strict=True):
            self._enqueue(stream, f"copy {note}", _piece(to[start:stop], of[start:stop]))
        self._run_ahead()

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),  # noqa: ARG002
        writes: Sequence[torch.Tensor] = (),  # noqa: ARG002
        note: str = "",
    ) -> None:
        """Run in the stream's turn; what it raises, whoever stepped the simulation gets."""
        self._enqueue(stream, f"launch {note}", work)
        self._run_ahead()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work itself: what it does is simulated as it is launched."""
        return work

    def host_wait(self, event: Event) -> None:
        """Step the simulation until the newest record is reached.

        Raises:
            DeadlockError: it never will be: the work of a host stream waits for a host stream.
        """
        assert isinstance(event, _Event)
        if (record := event.newest) is None:
            return
        if not self._may_run(record.stream):
            raise self._deadlock(f"{event.name} of {record.stream.name}")
        while not record.reached:
            self._step_towards(record)
        self._run_ahead()

    def done(self, event: Event) -> bool:
        """Whether the newest record is reached; may step the simulation towards it first."""
        assert isinstance(event, _Event)
        self._run_ahead()
        record = event.newest
        if record is not None and not record.reached and self._random.random() < 0.5:
            for _ in range(self._random.randint(1, 4)):
                if not record.reached and self._may_run(record.stream):
                    self._step_towards(record)
        return record is None or record.reached

    def touch(
        self,
        *,
        reads: Sequence[torch.Tensor] = (),  # noqa: ARG002
        writes: Sequence[torch.Tensor] = (),  # noqa: ARG002
        note: str = "",  # noqa: ARG002
    ) -> None:
        """May step the simulation, as every call."""
        self._run_ahead()

    def drain(self) -> None:
        """Run all that was launched: a wait is for what was launched before it, so that it ends."""
        while runnable := self._runnable():
            self._run(self._choose(runnable))

    def settle(self) -> None:
        """Run all that was launched."""
        self.drain()

    def close(self) -> None:
        """Run all that was launched."""
        self.drain()

    def _enqueue(
        self, stream: Stream, note: str, run: Callable[[], object], after: _Record | None = None
    ) -> None:
        """Put an operation at a stream's end."""
        assert isinstance(stream, _Stream)
        stream.queue.append(_Operation(note.rstrip(), run, after))

    def _may_run(self, stream: Stream) -> bool:
        """Whether stepping may reach a stream: while an operation of a host stream is under way, no other."""
        return not (self._running and stream.host)

    def _runnable(self) -> list[_Stream]:
        """Streams whose next operation can run."""
        return [stream for stream in self._streams if self._may_run(stream) and stream.runnable()]

    def _choose(self, runnable: list[_Stream]) -> _Stream:
        """By rank, or by lot."""
        if self._random.random() < self._strict:
            return max(runnable, key=lambda stream: stream.rank)
        return self._random.choice(runnable)

    def _run_ahead(self) -> None:
        """A call was made: the streams run on for as long as the seed says.

        Raises:
            AssertionError: a device stream's work called; by now that would mean something else.
        """
        for running in self._running[-1:]:
            assert running.host, f"work on {running.name} calls the backend"
        while self._random.random() < self._ahead and (runnable := self._runnable()):
            self._run(self._choose(runnable))

    def _step_towards(self, record: _Record) -> None:
        """Run an operation; in a late run, one that ``record`` needs."""
        self._run(self._needed(record) if self._late else self._choose(self._runnable()))

    def _needed(self, record: _Record) -> _Stream:
        """The stream whose next operation must run before ``record`` can be reached."""
        stream = record.stream
        while (after := stream.queue[0].after) is not None and not after.reached:
            stream = after.stream
        return stream

    def _run(self, stream: _Stream) -> None:
        """Run a stream's next operation."""
        operation = stream.queue.popleft()
        self.trace.append((stream.name, operation.note))
        self._running.append(stream)
        try:
            operation.run()
        finally:
            self._running.pop()

    def _deadlock(self, awaited: str) -> DeadlockError:
        """What each stream waits for."""
        lines = [f"{awaited} is awaited, and never comes"]
        lines += [f"{running.name} is at work" for running in self._running]
        for stream in self._streams:
            after = stream.queue[0].after if stream.queue else None
            waits = f"waits for {after.event} of {after.stream.name}" if after else "has work"
            lines.append(f"{stream.name} {waits if stream.queue else 'is idle'}")
        return DeadlockError("; ".join(lines))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes: a view."""
    assert tensor.is_contiguous(), "copies are of contiguous memory"
    return tensor.view(-1).view(torch.uint8)


def _piece(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    """The copy of one piece, made when called."""
    return lambda: target.copy_(source)
