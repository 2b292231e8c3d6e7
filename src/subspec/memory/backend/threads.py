"""The backend of a CPU: streams are threads, the compute stream is the caller's own.

What is launched on the compute stream runs at once, so that nothing is slower than a plain call.  Other
streams, device or host, are a worker thread and a queue each.
"""

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from subspec.memory.backend import Event, Stream


class _Stream(Stream):
    """A queue and the thread that empties it; the compute stream has neither."""

    def __init__(self, name: str, *, host: bool) -> None:
        super().__init__(name, host=host)
        self.queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        """Run what is queued, until told to end."""
        while (work := self.queue.get()) is not None:
            work()


class _Event(Event):
    """How often it was recorded, and which record is reached."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.recorded = self.reached = 0


class ThreadBackend:
    """Threads for streams.  Thread-safe.

    Attributes:
        device: the CPU.
        compute: runs what is launched at once, on the caller's thread.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.compute = Stream("compute", host=False)
        self.eager: str | None = "nothing to capture on a CPU"
        self._streams: list[_Stream] = []
        self._changed = threading.Condition()

    def stream(self, name: str, *, host: bool = False) -> Stream:
        """A new stream: a thread."""
        self._streams.append(_Stream(name, host=host))
        return self._streams[-1]

    def event(self, name: str) -> Event:
        """A new event."""
        return _Event(name)

    def record(self, event: Event, stream: Stream) -> None:
        """Count the record now, reach it in the stream's turn."""
        assert isinstance(event, _Event)
        with self._changed:
            event.recorded += 1
            record = event.recorded
        self._enqueue(stream, lambda: self._reach(event, record))

    def wait(self, stream: Stream, event: Event) -> None:
        """Block the stream in its turn; the compute stream at once."""
        assert isinstance(event, _Event)
        record = event.recorded
        self._enqueue(stream, lambda: self._await(event, record))

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:  # noqa: ARG002
        """Copy in the stream's turn; releases the GIL."""
        self._enqueue(stream, lambda: target.copy_(source))

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),  # noqa: ARG002
        writes: Sequence[torch.Tensor] = (),  # noqa: ARG002
        note: str = "",  # noqa: ARG002
    ) -> None:
        """Run in the stream's turn."""
        self._enqueue(stream, work)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work itself: a call costs a thread nothing."""
        return work

    def host_wait(self, event: Event) -> None:
        """Block the caller."""
        assert isinstance(event, _Event)
        self._await(event, event.recorded)

    def done(self, event: Event) -> bool:
        """Whether the newest record is reached."""
        assert isinstance(event, _Event)
        return event.reached >= event.recorded

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), note: str = ""
    ) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Nothing to wait for: outside of the verbs everything is done at once."""

    def close(self) -> None:
        """End the threads."""
        for stream in self._streams:
            stream.queue.put(None)
        for stream in self._streams:
            stream.thread.join()
        self._streams = []

    def _enqueue(self, stream: Stream, work: Callable[[], object]) -> None:
        """Run now on the compute stream, else in turn."""
        if isinstance(stream, _Stream):
            stream.queue.put(work)
        else:
            work()

    def _reach(self, event: _Event, record: int) -> None:
        """A record's turn has come."""
        with self._changed:
            event.reached = max(event.reached, record)
            self._changed.notify_all()

    def _await(self, event: _Event, record: int) -> None:
        """Block until a record is reached."""
        with self._changed:
            while event.reached < record:
                self._changed.wait()
