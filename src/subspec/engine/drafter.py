"""Drafts: the layers' substitutes, and the output head's, over some rows, in pieces or captured whole."""

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch

from subspec.engine.arithmetic import Arithmetic
from subspec.engine.draft_ends import draft_ends
from subspec.engine.weights import Weights
from subspec.memory.schedule import Schedule
from subspec.models.decoder import Rows
from subspec.store.rows import EmbeddingRows
from subspec.store.table import EmbeddingTable
from subspec.substitute.fused import draft_layer

CAPTURED = 16  # passes kept: of each way of sampling two; the oldest goes first


class Drafter:
    """Makes draft passes; they may lie in the gaps of a sweep.

    Args:
        arithmetic: of layers and norms.
        weights: has the substitutes.
        embedding: of tokens.
        schedule: knows whether there is a gap; its backend captures.

    Attributes:
        layers: each over its substitutes.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        weights: Weights,
        embedding: EmbeddingRows | EmbeddingTable,
        schedule: Schedule,
    ) -> None:
        self._arithmetic, self._schedule = arithmetic, schedule
        self.layers = [
            draft_layer(products, setting)
            for products, setting in zip(weights.draft_layers, arithmetic.settings, strict=True)
        ]
        self._embed, self._head = draft_ends(
            embedding, weights.draft_head, tied=arithmetic.config.tied_embeddings
        )
        self._captured: dict[object, Callable[[], object]] = {}

    def steps(self, rows: Rows, *, last_only: bool) -> Generator[None, None, torch.Tensor]:
        """See ``Engine.draft_steps``."""
        start = time.perf_counter()
        hidden, schedule = self._arithmetic.hidden(len(rows)), self._schedule
        self._arithmetic.launch(lambda: self._embed(rows.tokens, hidden, in_gap=schedule.in_gap), "embedding")
        for layer in self._over(hidden, rows):
            self._arithmetic.launch(layer, "draft layer")
            in_gap = schedule.in_gap
            yield
            if in_gap and not schedule.in_gap:  # the sweep has ended meanwhile: what follows is no gap's
                start = time.perf_counter()
        wanted = hidden[-1:] if last_only else hidden
        logits = self._arithmetic.logits(len(wanted))
        self._arithmetic.launch(
            lambda: self._head(self._arithmetic.normed(wanted), logits, in_gap=schedule.in_gap), "draft head"
        )
        if schedule.timeline is not None and not schedule.in_gap:
            schedule.timeline.span("draft", "draft", start, time.perf_counter(), rows=len(rows))
        return logits  # (T, V)

    def preview_steps(
        self, hidden: torch.Tensor, first: int, rows: Rows
    ) -> Generator[None, None, torch.Tensor]:
        """See ``Engine.preview_steps``: the layers from ``first`` on, added into hidden states (T, C).

        The head's rivals are read from disk even in a gap.
        """
        for layer in self._over(hidden, rows, first):
            self._arithmetic.launch(layer, "preview")
            yield
        logits = self._arithmetic.logits(len(rows))
        self._arithmetic.launch(
            lambda: self._head(self._arithmetic.normed(hidden), logits, in_gap=False), "preview head"
        )
        return logits  # (T, V)

    def capture(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        """See ``Engine.capture_level``."""
        if key not in self._captured:
            if len(self._captured) >= CAPTURED:
                self._captured.pop(next(iter(self._captured)))
            self._captured[key] = self._schedule.backend.capture(partial(self._level, rows, then))

    def replay(self, key: object) -> None:
        """See ``Engine.draft_level``."""
        self._arithmetic.launch(self._captured[key], "draft")

    def _over(self, hidden: torch.Tensor, rows: Rows, first: int = 0) -> Iterator[Callable[[], object]]:
        """The layers from ``first`` on, added into ``hidden``, each to be called before the next one."""
        entry = self._arithmetic.entered(rows, exact=False)
        for index, layer in enumerate(self.layers[first:], first):
            yield partial(self._arithmetic.layer, index, layer, hidden, rows, entry)

    def _level(self, rows: Rows, then: Callable[[torch.Tensor], object]) -> None:
        """A draft pass without launches: the compute stream's own work."""
        hidden = self._arithmetic.hidden(len(rows))
        self._embed(rows.tokens, hidden, in_gap=False)
        for layer in self._over(hidden, rows):
            layer()
        logits = self._arithmetic.logits(len(rows))
        self._head(self._arithmetic.normed(hidden), logits, in_gap=False)
        then(logits)
