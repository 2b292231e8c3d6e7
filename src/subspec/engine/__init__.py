"""The composition root: store, memory, decoder and method meet here, and only here.

Builds everything that a plan names, then offers the two passes that decoding is made of: ``target``, one
sweep of the exact weights through the slot ring, and ``draft``, one pass over the substitutes.  Both only
launch: on a device the host is ahead, and what a pass computes is there once the host has waited for it.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import torch

from subspec.engine.arithmetic import Arithmetic
from subspec.engine.drafter import Drafter
from subspec.engine.host_view import HostView
from subspec.engine.loading import Progress
from subspec.engine.places import Places
from subspec.engine.sweeper import Sweeper
from subspec.engine.weights import Weights
from subspec.memory import hazards
from subspec.memory.backend import Backend
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.threads import ThreadBackend
from subspec.memory.schedule import Gap, Schedule
from subspec.memory.streamer import REQUEST_BYTES, Streamer
from subspec.memory.timeline import Timeline
from subspec.models.decoder import Rows, finished
from subspec.models.kv_cache import KVCache
from subspec.models.kv_ledger import KVLedger
from subspec.planning.plan import Plan
from subspec.store.reader import Store

__all__ = ["Counters", "Engine", "Progress"]


@dataclass(frozen=True)
class Counters:
    """Running totals of an engine.

    Attributes:
        sweeps: begun.
        streamed_bytes: that came over the link; ``link_s``: seconds that it was busy.
        wait_s: seconds that sweeps waited for the link; ``gap_s``: that they filled with drafting instead.
    """

    sweeps: int
    streamed_bytes: int
    link_s: float
    wait_s: float
    gap_s: float


class Engine:
    """A model under a plan.  Not thread-safe: one text at a time.

    Args:
        store: the prepared model; closed with the engine.
        plan: what to keep where.
        progress: called with (task, done, total) while loading.
        paranoid: verify checksums on every read.
        backend: what runs it, closed with the engine; default: the CPU's threads.

    Attributes:
        places: its memory, and the budgets of that.
        weights, cache, rows: all of the exact ones and substitutes, keys and values, the embedding.
        schedule: what sweeps run on.
        checker, ledger: of accesses to the slots and of exact cache entries, if ``SUBSPEC_HAZARDS`` asks.
        exchange: what host and device tell each other; None where there is no device.
        drafter: makes the draft passes, and has their layers.

    Raises:
        StoreError: an image is damaged or cannot be read.
        PinningError: the driver does not lock the memory behind a device.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        progress: Progress | None = None,
        *,
        paranoid: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self.store, self.plan, self.config = store, plan, store.config
        checked = hazards.wanted()
        self.checker = hazards.HazardChecker() if checked else None
        on_cpu = backend is None or backend.device.type == "cpu"  # what a device's rows say, only it knows
        self.ledger = KVLedger(self.config.layers, plan.cache_slots) if checked and on_cpu else None
        self._backend = backend or ThreadBackend()
        if self.checker is not None:
            self._backend = CheckedBackend(self._backend, self.checker)
        self.places = Places(plan, self._backend)
        small = store.small_tensors()
        checksums = small.pop("embedding.crc32")
        self._small = {name: value.to(self._backend.device) for name, value in small.items()}
        self.rows = self.places.embedding(store, checksums)
        self.cache = KVCache(self.config, plan.cache_slots, store.dtype, self.places.near)
        self._arithmetic = Arithmetic(
            self.config, self._small, self.cache, self._backend, self.ledger, plan.prefill_rows
        )
        slots = self.places.slots()
        self.weights = Weights(store, plan, self.places, self._small, slots, progress)
        staging, self.exchange = self.places.staging(), self.places.exchange()
        self.places.pin()  # all that lies near has been written by now, and a streamer copies at once
        self.schedule = Schedule(self._backend, self._streamer(slots, staging, paranoid))
        self._sweeper = Sweeper(self._arithmetic, self.weights, self.rows, self.schedule)
        self.drafter = Drafter(self._arithmetic, self.weights, self.rows, self.schedule)

    def _streamer(
        self, slots: list[torch.Tensor], staging: list[torch.Tensor], paranoid: bool
    ) -> Streamer | None:
        """What brings the units that are not resident; None where all are."""
        units = self.weights.streamed()
        if not units:
            return None
        size = len(staging[0]) if staging else REQUEST_BYTES
        return Streamer(units, slots, self._backend, staging=staging, request_bytes=size, paranoid=paranoid)

    # --- the two passes ---

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """One sweep: exact logits (T, V), or (1, V) of the last row; keys and values written for all rows.

        Args:
            rows: what it computes.
            last_only: whether only the last row's logits are wanted.
            gap: called again and again while the next unit is not there yet, until it returns False: a
                little work that writes none of the rows' slots.

        Raises:
            StoreError: the stream broke; the next sweep starts afresh.
        """
        return self._sweeper.sweep(rows, last_only=last_only, gap=gap)

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V); keys and values written for all rows."""
        return finished(self.draft_steps(rows))

    def draft_steps(self, rows: Rows, *, last_only: bool = False) -> Generator[None, None, torch.Tensor]:
        """``draft`` in pieces: yields after each layer, returns the logits, or those of the last row."""
        return self.drafter.steps(rows, last_only=last_only)

    @property
    def swept(self) -> float:
        """Share of the layers that the sweep under way has done."""
        return self._sweeper.layers_done / self.config.layers

    def preview_steps(self, numbers: list[int], rows: Rows) -> Generator[None, None, torch.Tensor]:
        """What the sweep under way will say of some of its rows, by substitutes for the layers to come.

        Args:
            numbers: which of its rows.
            rows: the same tokens at the same positions, with slots of their own; each sees what the sweep has
                left behind, and the others of these rows.

        Yields:
            After each layer; returns logits (len(numbers), V), for which the head's rivals are read from
            disk even in a gap: that is what makes the last preview nearly certain.
        """
        hidden = self._sweeper.hidden[numbers]
        return (yield from self.drafter.preview_steps(hidden, self._sweeper.layers_done, rows))

    def capture_level(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        """Make ``draft_level`` of a key cheap: if the key is new, the pass may run some times.

        Args:
            rows: the same tensors for the same key, whatever is in them.
            then: computes in place with what lies at fixed addresses; does the same thing for the same key.
            key: of what is captured once and replayed.
        """
        self.drafter.capture(rows, then, key)

    def draft_level(self, key: object) -> None:
        """The whole draft pass that was captured under a key, and its ``then`` with the logits."""
        self.drafter.replay(key)

    @property
    def eager(self) -> str | None:
        """Why draft passes on a device are launched kernel by kernel; None where they are replayed."""
        return self._backend.eager

    @property
    def sweep_bytes(self) -> tuple[int, int]:
        """Bytes that a sweep streams, and of those, how many fit the slots."""
        return self.plan.streamed_bytes, self.plan.slots * self.plan.slot_bytes

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """Move cache slots ``sources`` to ``start`` and on; the last ``drafts`` of them are a draft's."""
        self.relocate(sources, list(range(start, start + len(sources))), drafts)

    def relocate(self, sources: list[int], targets: list[int], drafts: int = 0) -> None:
        """Move each cache slot of ``sources`` to its one of ``targets``, all at once; slots may be in both.

        Args:
            sources: slots, the last ``drafts`` of them a draft's.
            targets: distinct slots.
            drafts: how many are a draft's.
        """
        if self.ledger is not None:
            self.run(partial(self.ledger.moved, sources, targets, drafts), "commit")
        moved = [pair for pair in zip(sources, targets, strict=True) if pair[0] != pair[1]]
        if moved:
            origin, target = (self._uploaded(torch.tensor(column)) for column in zip(*moved, strict=True))
            self.run(partial(self.cache.move, origin, target), "commit")

    def upload(self, rows: Rows) -> Rows:
        """The same rows where passes compute."""
        return rows.mapped(self._uploaded)

    def on_host(self) -> "Engine | HostView":
        """The passes with rows and logits on the host; the engine itself where there is no device."""
        return self if self.exchange is None else HostView(self)

    def run(self, work: Callable[[], object], note: str) -> None:
        """Launch ``work`` on the compute stream; it computes in place with what passes left there."""
        self._arithmetic.launch(work, note)

    def settle(self) -> None:
        """Wait for a device to finish what was done outside of launches, such as the making of tensors."""
        self._backend.settle()

    @property
    def timeline(self) -> Timeline | None:
        """Where passes and reads are recorded at present."""
        return self.schedule.timeline

    def trace(self, timeline: Timeline | None) -> None:
        """Record passes, layers, waits and reads in ``timeline`` from now on; None ends it."""
        self.schedule.timeline = timeline
        if self.schedule.streamer is not None:
            self.schedule.streamer.timeline = timeline

    def counters(self) -> Counters:
        """Totals since the engine was built."""
        streamer, gap_s = self.schedule.streamer, self.schedule.gap_s
        if streamer is None:
            return Counters(self._sweeper.sweeps, 0, 0.0, 0.0, 0.0)
        return Counters(
            self._sweeper.sweeps, streamer.streamed_bytes, streamer.busy_s, streamer.wait_s, gap_s
        )

    def close(self) -> None:
        """Stop the readers, give the memory behind a device back, and close the store."""
        try:
            if self.schedule.streamer is not None:
                self.schedule.streamer.close()
            self._backend.close()
        finally:
            self.rows.close()
            self.store.close()
            self.places.close()

    def _uploaded(self, values: torch.Tensor) -> torch.Tensor:
        """Host values where passes compute."""
        return values if self.exchange is None else self.exchange.sent(values)
