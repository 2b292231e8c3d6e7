"""A CUDA backend that dawdles: what is not ordered by events meets on it, and shows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subspec.memory.backend import Stream
from subspec.memory.backend.cuda import CudaBackend

CYCLES = 10_000_000  # 5 to 10 ms


class SlowBackend(CudaBackend):
    """Sleeps on the device before each copy (``copies``), or before each launch on ``compute`` (``work``)."""

    def __init__(self, *, copies: bool, work: bool) -> None:
        super().__init__()
        self._slow_copies, self._slow_work = copies, work

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:
        if self._slow_copies:
            super().launch(stream, sleep)
        super().copy(stream, target, source, note)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        note: str = "",
    ) -> None:
        if self._slow_work and stream is self.compute:
            super().launch(stream, sleep)
        super().launch(stream, work)


def sleep() -> Any:
    """Occupy the current stream."""
    return torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
