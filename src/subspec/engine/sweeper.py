"""Sweeps: the layers' exact weights, and the output head's, over some rows, as the schedule brings them."""

import time
from collections.abc import Callable
from functools import partial

import torch

from subspec.engine.arithmetic import Arithmetic
from subspec.engine.weights import Weights, WeightUnit
from subspec.memory.schedule import Gap, Schedule, Step
from subspec.models.decoder import LayerProducts, Rows
from subspec.models.kv_ledger import LedgeredPass
from subspec.store.rows import EmbeddingRows
from subspec.store.table import EmbeddingTable


class Sweeper:
    """Makes sweeps, one at a time.

    Args:
        arithmetic: of layers and norms.
        weights: the exact ones.
        embedding: of tokens.
        schedule: what a sweep runs on.

    Attributes:
        sweeps: how many were begun.
        hidden: (T, C) of the sweep under way, as far as it is; empty while there is none.
        layers_done: by it, or by the last one.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        weights: Weights,
        embedding: EmbeddingRows | EmbeddingTable,
        schedule: Schedule,
    ) -> None:
        self._arithmetic, self._weights, self._embedding = arithmetic, weights, embedding
        self._schedule = schedule
        self.sweeps = self.layers_done = 0
        self.hidden = torch.empty(0)

    def sweep(self, rows: Rows, *, last_only: bool, gap: Gap | None) -> torch.Tensor:
        """See ``Engine.target``."""
        self.sweeps += 1
        start = time.perf_counter()
        hidden = self._arithmetic.hidden(len(rows))
        self._arithmetic.launch(lambda: self._embedding.lookup(rows.tokens, hidden), "embedding")
        self.hidden, self.layers_done = hidden, 0
        wanted = hidden[-1:] if last_only else hidden
        logits, normed = self._arithmetic.logits(len(wanted)), torch.empty_like(wanted)
        norm = Step("norm", lambda _: normed.copy_(self._arithmetic.normed(wanted)), streamed=False)
        steps = [*self._layer_steps(hidden, rows), norm, *self._head_steps(normed, logits)]
        try:
            self._schedule.sweep(steps, gap)
        finally:
            self.hidden = torch.empty(0)  # nobody looks at it any more, and a prompt's is large
        if (timeline := self._schedule.timeline) is not None:
            timeline.span("sweep", "sweep", start, time.perf_counter(), rows=len(rows))
        return logits  # (T, V)

    def _layer_steps(self, hidden: torch.Tensor, rows: Rows) -> list[Step]:
        """Every layer over ``rows``, added into ``hidden``."""
        entry = self._arithmetic.entered(rows, exact=True)
        return [
            _step(unit, partial(self._layer, index, unit, hidden, rows, entry))
            for index, unit in enumerate(self._weights.layers)
        ]

    def _head_steps(self, normed: torch.Tensor, logits: torch.Tensor) -> list[Step]:
        """Every chunk of the output head, written to its columns of ``logits``."""
        head = self._weights.head
        columns = torch.split(logits, [unit.matrices[0].n for unit in head], dim=1)
        return [
            _step(unit, partial(self._chunk, unit, normed, own))
            for unit, own in zip(head, columns, strict=True)
        ]

    def _layer(
        self,
        index: int,
        unit: WeightUnit,
        hidden: torch.Tensor,
        rows: Rows,
        entry: LedgeredPass | None,
        slot: torch.Tensor | None,
    ) -> None:
        """A layer with what is in its slot."""
        products = LayerProducts(*self._weights.products(unit, slot))
        self._arithmetic.layer(index, products, hidden, rows, entry)
        self.layers_done = index + 1

    def _chunk(
        self, unit: WeightUnit, normed: torch.Tensor, logits: torch.Tensor, slot: torch.Tensor | None
    ) -> None:
        """A chunk of the output head with what is in its slot."""
        (product,) = self._weights.products(unit, slot)
        logits.copy_(product(normed))


def _step(unit: WeightUnit, work: Callable[[torch.Tensor | None], object]) -> Step:
    """A unit's part of a sweep."""
    return Step(unit.name, work, streamed=unit.memory is None)
