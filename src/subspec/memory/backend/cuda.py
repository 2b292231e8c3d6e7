"""The backend of a CUDA device: each verb is one call of ``torch.cuda``, and host streams are threads.

Nothing here decides anything.  Memory stays where it is: whoever owns a tensor keeps it for as long as a
stream may use it, so that nothing is recorded with the allocator and addresses can be captured in graphs.
A record is a CUDA event of its own, so that a later record does not move what an earlier wait is for.

``compute`` is no default stream, and waits for none: what was enqueued elsewhere, such as the filling of new
tensors, must be finished (``torch.cuda.synchronize``) before work here reads it.  Importing this module
touches no device; making a ``CudaBackend`` does.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from subspec.errors import OptionError
from subspec.memory.backend import Event, Stream
from subspec.memory.backend.threads import ThreadBackend

SWITCH = "SUBSPEC_GRAPHS"
WARM_UPS = 3  # libraries choose kernels and take their workspaces in the first calls, which no graph may


class _DeviceStream(Stream):
    """A CUDA stream.

    Torch has 32 of them a device and gives them out in turns: a thirty-third would be the first again.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(name, host=False)
        self.cuda = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Event(Event):
    """The newest record: of a CUDA event, or, on a host stream, of a thread's; neither before the first."""

    def __init__(self, name: str, thread: Event) -> None:
        super().__init__(name)
        self.thread = thread
        self.newest: torch.cuda.Event | Event | None = None


class CudaBackend:
    """Streams and events of one CUDA device; threads for host streams.  Thread-safe, but for ``capture``.

    Args:
        index: of the device.

    Attributes:
        device: the CUDA device.
        compute: a CUDA stream other than the default one, which could not be captured.
        eager: why captured work is launched kernel by kernel; None where it is replayed as a graph.

    Raises:
        OptionError: there is no such device, or torch cannot use it.
    """

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise OptionError(
                f"torch {torch.__version__} finds no CUDA device: use --device cpu, or install a driver and "
                "a CUDA build of torch (`subspec doctor` shows what is found)"
            )
        if not 0 <= index < torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise OptionError(f"there is no CUDA device {index}: torch finds {count}, counted from 0")
        self.device = torch.device("cuda", index)
        self._threads = ThreadBackend()
        self._compute = _DeviceStream("compute", self.device)
        self.compute: Stream = self._compute
        self._device_streams = [self._compute]
        self.eager = f"{SWITCH}=0" if os.environ.get(SWITCH) == "0" else None
        self._pool: Any = None  # memory of all graphs' intermediate values, from the first capture on

    def stream(self, name: str, *, host: bool = False) -> Stream:
        """A new CUDA stream, or a new thread."""
        if host:
            return self._threads.stream(name, host=True)
        self._device_streams.append(_DeviceStream(name, self.device))
        return self._device_streams[-1]

    def event(self, name: str) -> Event:
        """A new event."""
        return _Event(name, self._threads.event(name))

    def record(self, event: Event, stream: Stream) -> None:
        """Record on the CUDA stream, or in the thread's turn."""
        assert isinstance(event, _Event)
        if isinstance(stream, _DeviceStream):
            # blocking: a host that waits sleeps instead of spinning
            mark = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            mark.record(stream.cuda)
            event.newest = mark
        else:
            self._threads.record(event.thread, stream)
            event.newest = event.thread

    def wait(self, stream: Stream, event: Event) -> None:
        """Let the CUDA stream wait, or the thread in its turn; nothing for an event never recorded."""
        assert isinstance(event, _Event)
        newest = event.newest
        if isinstance(stream, _DeviceStream):
            assert not isinstance(newest, Event), f"{stream.name} cannot wait for the host's {event.name}"
            if newest is not None:
                stream.cuda.wait_event(newest)
        elif isinstance(newest, Event):
            self._threads.wait(stream, newest)
        elif newest is not None:
            self._threads.launch(stream, newest.synchronize)

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:  # noqa: ARG002
        """Copy without blocking.

        Host memory must be pinned in one piece: a copy from two regions that were registered apart fails.
        """
        assert isinstance(stream, _DeviceStream)
        assert target.is_cuda or _is_pinned(target)
        assert source.is_cuda or _is_pinned(source)
        with torch.cuda.stream(stream.cuda):
            target.copy_(source, non_blocking=True)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),  # noqa: ARG002
        writes: Sequence[torch.Tensor] = (),  # noqa: ARG002
        note: str = "",  # noqa: ARG002
    ) -> None:
        """Run at once with the CUDA stream as the current one, or in the thread's turn."""
        if isinstance(stream, _DeviceStream):
            with torch.cuda.stream(stream.cuda):
                work()
        else:
            self._threads.launch(stream, work)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of ``work``; ``work`` runs a few times on ``compute`` first.

        Waits for the device.  All graphs share the memory of their intermediate values, as only one of them
        runs at a time.  Other threads may use the device meanwhile; one capture at a time.  Where
        ``SUBSPEC_GRAPHS=0`` forbids it, or it fails, ``work`` itself is launched; ``eager`` says why.
        """
        if self.eager is not None:
            return work
        with torch.cuda.stream(self._compute.cuda):
            for _ in range(WARM_UPS):
                work()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._compute.cuda, capture_error_mode="thread_local"
            ):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.eager = f"capturing failed: {error}"
            return work
        return graph.replay

    def host_wait(self, event: Event) -> None:
        """Block the caller; releases the GIL."""
        assert isinstance(event, _Event)
        newest = event.newest
        if isinstance(newest, Event):
            self._threads.host_wait(newest)
        elif newest is not None:
            newest.synchronize()

    def done(self, event: Event) -> bool:
        """Whether the newest record is reached."""
        assert isinstance(event, _Event)
        newest = event.newest
        if isinstance(newest, Event):
            return self._threads.done(newest)
        return newest is None or bool(newest.query())  # type: ignore[no-untyped-call]

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), note: str = ""
    ) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Wait for the whole device."""
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """End the threads, then let the device finish."""
        self._threads.close()
        for stream in self._device_streams:
            stream.cuda.synchronize()
        self._device_streams = []


def _is_pinned(host: torch.Tensor) -> bool:
    """Whether the driver knows the tensor's first byte as page-locked, by whatever way it became so.

    Torch asks the driver (``cudaPointerGetAttributes``, about a microsecond), not its own allocator: memory
    that ``cudaHostRegister`` locked counts, in every release that this package takes.
    """
    return host.is_pinned()
