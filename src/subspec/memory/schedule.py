"""A sweep's schedule: each step's unit comes, the compute stream uses it, its slot goes back.

While the next unit is not there, and the compute stream has run out of work, the *gap* is filled: a little
drafting at a time, as long as there is some.  So the link never waits for a draft longer than a piece of it
takes.  Knows nothing of what steps compute.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from subspec.memory.backend import Backend
from subspec.memory.streamer import Streamer
from subspec.memory.timeline import Timeline

Gap = Callable[[], bool]


@dataclass(frozen=True)
class Step:
    """One unit's part of a sweep.

    Attributes:
        name: for traces.
        work: computes with the unit's bytes, a slot, or with None where it does not stream; enqueues only.
        streamed: whether it takes the stream's next unit.
        writes: what it writes that other streams or the host read.
    """

    name: str
    work: Callable[[torch.Tensor | None], object]
    streamed: bool
    writes: Sequence[torch.Tensor] = ()


class Schedule:
    """Runs sweeps on a backend.

    Args:
        backend: runs what is launched.
        streamer: brings the units; None where none streams.

    Attributes:
        gap_s: seconds spent in gaps that were filled; ``in_gap``: whether one is being filled.
        timeline: gets a span for each step and gap, while it is set.
    """

    def __init__(self, backend: Backend, streamer: Streamer | None) -> None:
        self.backend, self.streamer = backend, streamer
        self._caught_up = backend.event("compute caught up")
        self.gap_s, self.in_gap = 0.0, False
        self.timeline: Timeline | None = None

    def sweep(self, steps: Iterable[Step], gap: Gap | None = None) -> None:
        """Launch all steps in order.

        Args:
            steps: the streamed ones are all of the streamer's units, in order.
            gap: launches a little work that writes nothing the steps use; False if there is none.

        Raises:
            StoreError: the stream broke; the next sweep starts afresh.
        """
        if self.streamer is not None:
            self.streamer.rewind()
        for step in steps:
            if not step.streamed or self.streamer is None:
                self._launch(step, None)
                continue
            self.fill_gap(gap)
            self._launch(step, self.streamer.acquire())
            self.streamer.release()

    def fill_gap(self, gap: Gap | None) -> None:
        """Draft until the next unit is there; the host runs at most one piece ahead of the compute stream."""
        if gap is None or self.streamer is None or self.streamer.ready():
            return
        start, self.in_gap = time.perf_counter(), True
        try:
            while True:
                self.backend.record(self._caught_up, self.backend.compute)
                if not self.backend.done(self._caught_up):
                    self.backend.host_wait(self._caught_up)
                    if self.streamer.ready():
                        break
                if not gap() or self.streamer.ready():
                    break
        finally:
            self.in_gap = False
        end = time.perf_counter()
        self.gap_s += end - start
        if self.timeline is not None:
            self.timeline.span("gaps", "drafting", start, end)

    def _launch(self, step: Step, slot: torch.Tensor | None) -> None:
        """Launch one step."""
        start = time.perf_counter()
        self.backend.launch(
            self.backend.compute,
            partial(step.work, slot),
            reads=() if slot is None else (slot,),
            writes=step.writes,
            note=step.name,
        )
        if self.timeline is not None:
            end = time.perf_counter()
            self.timeline.span("sweep", step.name, start, end, streamed=step.streamed)
