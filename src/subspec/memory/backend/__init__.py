"""The seam between the schedule and what runs it: six verbs, waits of the host, and captured work.

``stream``, ``event``, ``record``, ``wait``, ``copy``, ``launch`` mean what they mean in CUDA.  Whoever moves
or computes bytes speaks through them alone, so that one schedule runs on a GPU (``cuda``), on the CPU's
threads (``threads``), and in a simulation that tries orders a machine would rarely show (``simulated``);
``checked`` wraps any of them and proves the accesses ordered.

Rules that all implementations keep:

- A *device stream* runs its operations one after another, in the order of the calls; the caller may be far
  ahead.  Arguments must stay valid, and what ``work`` reads unchanged, until it ran.
- A *host stream* is a worker thread.  Its work may call the verbs itself, and ``host_wait`` for events that
  were recorded on device streams; never for those of host streams.
- ``record`` marks the place that its stream has reached: a wait is for the newest record at the time of the
  call that asks for it.  A wait for an event that was never recorded waits for nothing.
- A device stream cannot wait for an event of a host stream: the host does, then goes on.
- Work on a device stream must not raise; work on a host stream must catch what it raises.

Knows nothing of units, slots or models.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Stream:
    """Operations that run one after another.

    Attributes:
        name: for traces and messages; unique in its backend.
        host: whether it is a worker thread; else it is the device's.
    """

    def __init__(self, name: str, *, host: bool) -> None:
        self.name, self.host = name, host


class Event:
    """A place in a stream that can be waited for; recorded again and again."""

    def __init__(self, name: str) -> None:
        self.name = name


class Backend(Protocol):
    """What the schedule runs on.

    Attributes:
        device: where slots and computed values live.
        compute: the device stream that layers and drafts run on.
    """

    device: torch.device
    compute: Stream

    @property
    def eager(self) -> str | None:
        """Why ``capture`` makes nothing cheaper; None if it does."""
        ...

    def stream(self, name: str, *, host: bool = False) -> Stream:
        """A new device stream, or a new worker thread."""
        ...

    def event(self, name: str) -> Event:
        """A new event, never recorded."""
        ...

    def record(self, event: Event, stream: Stream) -> None:
        """Mark the place that ``stream`` has reached; replaces the event's earlier record."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What ``stream`` runs from now on comes after the event's newest record."""
        ...

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:
        """Copy contiguous bytes of one dtype and shape on a device stream; host memory must be pinned."""
        ...

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        note: str = "",
    ) -> None:
        """Run ``work`` on a stream.

        Args:
            stream: a device stream, or a worker thread.
            work: computes in place; on a device stream it only enqueues.
            reads: memory that it reads, contiguous, as far as other streams or the host write it; on a host
                stream the work itself says so, with ``touch``.
            writes: memory that it writes, likewise.
            note: what for.
        """
        ...

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Make ``work`` cheap to launch on ``compute`` again and again; returns what to launch instead.

        On a GPU, its kernels are written down once and replayed as they are.  So what ``work`` does may
        depend on the contents of device memory, and on nothing else: it reads and writes preallocated device
        tensors that outlive it, at the same addresses each time; it neither uses a value of the host that
        changes, nor reads one back, nor touches host memory, nor calls these verbs.  Tensors that it makes
        hold intermediate values only: nobody reads them afterwards.

        ``work`` runs on ``compute`` any number of times, also none, before this returns: capture while its
        outputs may be overwritten.  Whoever launches the result says its accesses, as for ``work`` itself.
        """
        ...

    def host_wait(self, event: Event) -> None:
        """Block the caller, the host or a host stream's work, until the newest record is reached."""
        ...

    def done(self, event: Event) -> bool:
        """Whether ``host_wait`` would return at once.  Orders nothing: wait before touching."""
        ...

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), note: str = ""
    ) -> None:
        """The calling thread itself is about to read or write memory that streams use: only said."""
        ...

    def settle(self) -> None:
        """Wait until a device has done all that it was given, also outside of these verbs."""
        ...

    def close(self) -> None:
        """End the worker threads once what was launched has run; a second call does nothing."""
        ...
