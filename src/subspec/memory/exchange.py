"""Small things between host and device: row descriptions and noise go up, a step's result comes back.

They pass through one pinned buffer each way, used as a ring: a region is written again once the copy out of
it is done.  All copies are on the compute stream, in order with what uses them.  ``read`` is the one place
where the host waits for a value of the device; ``begin_read`` lets it look at one later, without stopping
the stream.  Knows nothing of what the values mean.
"""

from collections import deque
from dataclasses import dataclass

import torch

from subspec.memory.backend import Backend, Event

ALIGNMENT = 64


@dataclass(frozen=True)
class Pending:
    """A value on its way to the host: ``Exchange.take`` gives it."""

    value: torch.Tensor
    there: Event


class Ring:
    """A pinned buffer that is handed out region by region, oldest first again.

    Args:
        backend: runs the copies.
        memory: pinned uint8.
    """

    def __init__(self, backend: Backend, memory: torch.Tensor) -> None:
        self._backend, self._memory = backend, memory
        self._next = 0
        self._used: deque[tuple[int, int, Event]] = deque()  # start, stop, when it may be written again
        self._spare: list[Event] = []
        self._made = 0

    def region(self, n_bytes: int) -> tuple[torch.Tensor, Event]:
        """Memory for a copy, and the event to record on the stream when the copy was enqueued.

        Waits for the copies out of, or into, what was there.

        Raises:
            ValueError: the buffer is smaller than that.
        """
        size = -(-n_bytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._memory):
            raise ValueError(f"{n_bytes} bytes at once do not fit a buffer of {len(self._memory)}")
        if self._next + size > len(self._memory):
            self._next = 0
        start, stop = self._next, self._next + size
        while self._used and any(low < stop and start < high for low, high, _ in self._used):
            _, _, event = self._used.popleft()
            self._backend.host_wait(event)
            self._spare.append(event)
        event = self._spare.pop() if self._spare else self._event()
        self._used.append((start, stop, event))
        self._next = stop
        return self._memory[start : start + n_bytes], event

    def _event(self) -> Event:
        """A new event."""
        self._made += 1
        return self._backend.event(f"exchange {self._made}")


class Exchange:
    """The two rings of a device.

    Args:
        backend: runs the copies.
        up: pinned uint8 host memory, at least twice the largest thing that is sent; ``down``: likewise, of
            what is read.
        down: see ``up``.

    Attributes:
        blocking_reads: how often ``read`` was called.
    """

    def __init__(self, backend: Backend, up: torch.Tensor, down: torch.Tensor) -> None:
        self._backend = backend
        self._up, self._down = Ring(backend, up), Ring(backend, down)
        self.blocking_reads = 0

    def send(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Copy host ``values`` to ``target`` on the device, both contiguous; they may change at once."""
        assert target.shape == values.shape
        assert target.dtype is values.dtype
        if not values.numel():
            return
        region, event = self._up.region(values.numel() * values.element_size())
        staged = region.view(values.dtype).view(values.shape)
        self._backend.touch(writes=[region], note="upload")
        staged.copy_(values)
        self._backend.copy(self._backend.compute, target, staged, "upload")
        self._backend.record(event, self._backend.compute)

    def sent(self, values: torch.Tensor) -> torch.Tensor:
        """Host ``values`` on the device, a new tensor."""
        target = torch.empty(values.shape, dtype=values.dtype, device=self._backend.device)
        self.send(target, values)
        return target

    def begin_read(self, source: torch.Tensor) -> Pending:
        """Let a value of the device come to the host, without waiting for it."""
        region, event = self._down.region(source.numel() * source.element_size())
        value = region.view(source.dtype).view(source.shape)
        self._backend.copy(self._backend.compute, value, source, "read back")
        self._backend.record(event, self._backend.compute)
        return Pending(value, event)

    def take(self, pending: Pending) -> torch.Tensor:
        """The value, once it is there: a copy of its own."""
        self._backend.host_wait(pending.there)
        self._backend.touch(reads=[pending.value], note="read back")
        return pending.value.clone()

    def read(self, source: torch.Tensor) -> torch.Tensor:
        """Wait for a value of the device: what a step's decisions rest on."""
        self.blocking_reads += 1
        return self.take(self.begin_read(source))
