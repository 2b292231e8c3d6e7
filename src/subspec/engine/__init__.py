"""The composition root: store, memory, decoder and method meet here, and only here.

Builds everything that a plan names, then offers the two passes that decoding is made of: ``target``, one
sweep of the exact weights through the slot ring, and ``draft``, one pass over the substitutes.  Both only
launch: on a device the host is ahead, and what a pass computes is there once the host has waited for it.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import torch

from subspec.engine.draft_ends import draft_ends
from subspec.engine.host_view import HostView
from subspec.engine.loading import Progress
from subspec.engine.places import Places
from subspec.engine.weights import Weights, WeightUnit
from subspec.memory import hazards
from subspec.memory.backend import Backend
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.threads import ThreadBackend
from subspec.memory.schedule import Gap, Schedule, Step
from subspec.memory.streamer import REQUEST_BYTES, Streamer
from subspec.memory.timeline import Timeline
from subspec.models.decoder import Decoder, LayerProducts, Rows, WholeLayer, finished
from subspec.models.kv_cache import KVCache
from subspec.models.kv_ledger import KVLedger, LedgeredPass
from subspec.models.operations import operations
from subspec.planning.plan import Plan
from subspec.store.layout import head_chunks
from subspec.store.reader import Store
from subspec.store.vectors import FINAL_NORM, layer_norms
from subspec.substitute.fused import draft_layer

__all__ = ["Counters", "Engine", "Progress"]

CAPTURED = 16  # passes kept: of each way of sampling two; the oldest goes first


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
        checker, ledger: of accesses to the slots and of exact cache entries, if ``SUBSPEC_HAZARDS`` asks.
        exchange: what host and device tell each other; None where there is no device.
        timeline: where passes and reads are recorded at present; set by ``trace``.

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
        self._sweeps = 0
        self._captured: dict[object, Callable[[], object]] = {}
        self.timeline: Timeline | None = None
        self._hidden_now = torch.empty(0)  # of the sweep under way, and how many layers it has done
        self._layers_done = 0
        small = store.small_tensors()
        checksums = small.pop("embedding.crc32")
        self._small = {name: value.to(self._backend.device) for name, value in small.items()}
        self.rows = self.places.embedding(store, checksums)
        self.cache = KVCache(self.config, plan.cache_slots, store.dtype, self.places.near)
        norms = [layer_norms(self._small, index) for index in range(self.config.layers)]
        self.decoder = Decoder(self.config, norms, self.cache)
        self._ops = operations(self._backend.device)
        slots = self.places.slots()
        self.weights = Weights(store, plan, self.places, self._small, slots, progress)
        self._draft_layers = [
            draft_layer(products, setting)
            for products, setting in zip(self.weights.draft_layers, self.decoder.settings, strict=True)
        ]
        self._draft_embedding, self._draft_head = draft_ends(
            self.rows, self.weights.draft_head, tied=self.config.tied_embeddings
        )
        self._chunks = head_chunks(self.config, store.dtype.itemsize)
        streamed = self.weights.streamed()
        staging, self.exchange = self.places.staging(), self.places.exchange()
        self.places.pin()
        streamer = None
        if streamed:  # it copies from pinned memory at once
            size = len(staging[0]) if staging else REQUEST_BYTES
            streamer = Streamer(
                streamed, slots, self._backend, staging=staging, request_bytes=size, paranoid=paranoid
            )
        self.schedule = Schedule(self._backend, streamer)

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
        self._sweeps += 1
        start = time.perf_counter()
        hidden = self._embedded(rows)
        self._hidden_now, self._layers_done = hidden, 0
        wanted = hidden[-1:] if last_only else hidden
        logits = self._logits(len(wanted))
        ledger = self._entered(rows, exact=True)
        steps = [
            self._step(unit, partial(self._exact_layer, index, unit, hidden, rows, ledger))
            for index, unit in enumerate(self.weights.layers)
        ]
        normed = torch.empty_like(wanted)
        norm = Step("norm", lambda _: normed.copy_(self._normed(wanted)), streamed=False)
        head = [
            self._step(unit, partial(self._exact_chunk, unit, normed, logits[:, chunk.start : chunk.stop]))
            for unit, chunk in zip(self.weights.head, self._chunks, strict=True)
        ]
        self.schedule.sweep([*steps, norm, *head], gap)
        self._hidden_now = torch.empty(0)  # nobody looks at it any more, and a prompt's is large
        if self.timeline is not None:
            self.timeline.span("sweep", "sweep", start, time.perf_counter(), rows=len(rows))
        return logits  # (T, V)

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V); keys and values written for all rows."""
        return finished(self.draft_steps(rows))

    def draft_steps(self, rows: Rows, *, last_only: bool = False) -> Generator[None, None, torch.Tensor]:
        """``draft`` in pieces: yields after each layer, returns the logits, or those of the last row."""
        start = time.perf_counter()
        hidden, schedule = self._hidden(len(rows)), self.schedule
        self.run(lambda: self._draft_embedding(rows.tokens, hidden, in_gap=schedule.in_gap), "embedding")
        ledger = self._entered(rows, exact=False)
        for index, layer in enumerate(self._draft_layers):
            self.run(partial(self._layer, index, layer, hidden, rows, ledger), "draft layer")
            in_gap = schedule.in_gap
            yield
            if in_gap and not schedule.in_gap:  # the sweep has ended meanwhile: what follows is no gap's
                start = time.perf_counter()
        wanted = hidden[-1:] if last_only else hidden
        logits = self._logits(len(wanted))
        self.run(lambda: self._draft_head(self._normed(wanted), logits, in_gap=schedule.in_gap), "draft head")
        if self.timeline is not None and not schedule.in_gap:
            self.timeline.span("draft", "draft", start, time.perf_counter(), rows=len(rows))
        return logits  # (T, V)

    @property
    def swept(self) -> float:
        """Share of the layers that the sweep under way has done."""
        return self._layers_done / self.config.layers

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
        hidden, first = self._hidden_now[numbers], self._layers_done
        ledger = self._entered(rows, exact=False)
        for index in range(first, self.config.layers):
            self.run(partial(self._layer, index, self._draft_layers[index], hidden, rows, ledger), "preview")
            yield
        logits = self._logits(len(rows))
        self.run(lambda: self._draft_head(self._normed(hidden), logits, in_gap=False), "preview head")
        return logits

    def capture_level(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        """Make ``draft_level`` of a key cheap; runs the pass some times, or never, if the key is new.

        Args:
            rows: the same tensors for the same key, whatever is in them.
            then: computes in place with what lies at fixed addresses; does the same thing for the same key.
            key: of what is captured once and replayed.
        """
        if key not in self._captured:
            if len(self._captured) >= CAPTURED:
                self._captured.pop(next(iter(self._captured)))
            self._captured[key] = self._backend.capture(partial(self._draft_level, rows, then))

    def draft_level(self, key: object) -> None:
        """The whole draft pass that was captured under a key, and its ``then`` with the logits."""
        self.run(self._captured[key], "draft")

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
        self._backend.launch(self._backend.compute, work, note=note)

    def settle(self) -> None:
        """Wait for a device to finish what was done outside of launches, such as the making of tensors."""
        self._backend.settle()

    def trace(self, timeline: Timeline | None) -> None:
        """Record passes, layers, waits and reads in ``timeline`` from now on; None ends it."""
        self.timeline = self.schedule.timeline = timeline
        if self.schedule.streamer is not None:
            self.schedule.streamer.timeline = timeline

    def counters(self) -> Counters:
        """Totals since the engine was built."""
        streamer, gap_s = self.schedule.streamer, self.schedule.gap_s
        if streamer is None:
            return Counters(self._sweeps, 0, 0.0, 0.0, 0.0)
        return Counters(self._sweeps, streamer.streamed_bytes, streamer.busy_s, streamer.wait_s, gap_s)

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

    # --- what passes are made of ---

    def _uploaded(self, values: torch.Tensor) -> torch.Tensor:
        """Host values where passes compute."""
        return values if self.exchange is None else self.exchange.sent(values)

    def _embedded(self, rows: Rows) -> torch.Tensor:
        """The rows' embeddings (T, C), launched."""
        hidden = self._hidden(len(rows))
        self.run(lambda: self.rows.lookup(rows.tokens, hidden), "embedding")
        return hidden

    def _draft_level(self, rows: Rows, then: Callable[[torch.Tensor], object]) -> None:
        """A draft pass without launches: the compute stream's own work."""
        hidden, ledger = self._hidden(len(rows)), self._entered(rows, exact=False)
        self.rows.lookup(rows.tokens, hidden)
        for index, layer in enumerate(self._draft_layers):
            self._layer(index, layer, hidden, rows, ledger)
        logits = self._logits(len(rows))
        self._draft_head(self._normed(hidden), logits, in_gap=False)
        then(logits)

    def _hidden(self, rows: int) -> torch.Tensor:
        """Memory for hidden states (T, C)."""
        shape, device = (rows, self.config.hidden_size), self._backend.device
        return torch.empty(shape, dtype=self.store.dtype, device=device)

    def _entered(self, rows: Rows, *, exact: bool) -> LedgeredPass | None:
        """A pass's entry in the ledger, if there is one."""
        return None if self.ledger is None else LedgeredPass(self.ledger, rows, exact=exact)

    def _logits(self, rows: int) -> torch.Tensor:
        """Memory for logits (T, V)."""
        shape, device = (rows, self.config.vocab_size), self._backend.device
        return torch.empty(shape, dtype=self.store.dtype, device=device)

    def _step(self, unit: WeightUnit, work: Callable[[torch.Tensor | None], object]) -> Step:
        """A unit's part of a sweep."""
        return Step(unit.name, work, streamed=unit.memory is None)

    def _exact_layer(
        self,
        index: int,
        unit: WeightUnit,
        hidden: torch.Tensor,
        rows: Rows,
        ledger: LedgeredPass | None,
        slot: torch.Tensor | None,
    ) -> None:
        """A layer of a sweep."""
        self._layer(index, LayerProducts(*self.weights.products(unit, slot)), hidden, rows, ledger)
        self._layers_done = index + 1

    def _layer(
        self,
        index: int,
        layer: LayerProducts | WholeLayer,
        hidden: torch.Tensor,
        rows: Rows,
        ledger: LedgeredPass | None,
    ) -> None:
        """A layer of a pass, added into ``hidden``."""
        self.decoder.layer(index, layer, hidden, rows, self.plan.prefill_rows)
        if ledger is not None:
            ledger.layer(index)

    def _exact_chunk(
        self, unit: WeightUnit, normed: torch.Tensor, logits: torch.Tensor, slot: torch.Tensor | None
    ) -> None:
        """A chunk of the output head of a sweep."""
        (product,) = self.weights.products(unit, slot)
        logits.copy_(product(normed))

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, (T, C)."""
        return self._ops.rms_norm(hidden, self._small[FINAL_NORM], self.config.rms_norm_eps)
