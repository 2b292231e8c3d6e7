"""An engine of the toy model of ``toy_hashes`` that the real steps of ``Ahead`` run.

A row folds the entries of exactly the slots that it attends to.  An entry says by its last bit whether a
draft wrote it: the exact model minds, the draft does not, and so guesses as the exact model does but for some
hashes.  All is launched in place, as the engine does.
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from toy import PART, MemoryFile
from toy_hashes import (
    DISAGREEMENT,
    DRAFT,
    EVEN,
    EXACT,
    MASK,
    POSITION,
    TOKEN,
    VOCABULARY,
    WORD_PLACES,
    Truth,
    Words,
    digest,
    logits_of,
    mixed,
    words_of,
)

from subspec.memory.arena import Arena
from subspec.memory.backend import Backend
from subspec.memory.exchange import ALIGNMENT, Exchange
from subspec.memory.schedule import Gap, Schedule, Step
from subspec.memory.streamer import STAGING_BUFFERS, Streamer, Unit
from subspec.memory.tiers import MemoryBudget
from subspec.models.config import ModelConfig
from subspec.models.decoder import Rows, finished
from subspec.models.kv_cache import KVCache
from subspec.models.kv_ledger import KVLedger, LedgeredPass
from subspec.speculation.levels import Shape, summary_size


class GivenUpError(Exception):
    """A text that somebody gives up."""


@dataclass(frozen=True)
class Memory:
    """Where the layers are.

    Attributes:
        layers: by layer "file", "image" or "resident", at least one of them not resident.
        slots: of the ring; ``parts``: most parts of a unit.
        staged: whether readers fill staging buffers, or slots; ``threads``: readers.
        spare: regions that the exchange's buffers have above the least.
        warm_ups: how often a pass runs before it is captured.
    """

    layers: tuple[str, ...]
    slots: int
    parts: int = 2
    staged: bool = True
    threads: int = 1
    spare: int = 0
    warm_ups: int = 0


class ToyEngine:
    """``DevicePasses`` of the toy; see ``Engine``, whose launches these are.

    Args:
        memory: where the layers are.
        shape: of trees; ``context``: of texts.
        backend: runs it.
        breaks: called before each layer of a sweep with (sweep, layer), and before each piece of a gap with
            (sweep, −1): may raise.
    """

    def __init__(
        self, memory: Memory, shape: Shape, context: int, backend: Backend, breaks: Callable[[int, int], None]
    ) -> None:
        self.memory, self.backend, self.breaks = memory, backend, breaks
        self._build_layers()
        n_layers = len(memory.layers)
        config = SimpleNamespace(layers=n_layers, kv_heads=1, head_dim=1)
        arena = Arena(MemoryBudget(1 << 20, "--memory"))
        slots = context + shape.slots
        self.cache = KVCache(cast(ModelConfig, config), slots, torch.int64, arena)
        self.ledger = KVLedger(n_layers, slots)
        self.schedule = Schedule(backend, self.streamer)
        seeds = 4 * (2 + shape.nodes * (3 + 2 * shape.candidates + shape.depth + 1))
        results = 4 * (summary_size(shape) + shape.verified * VOCABULARY)
        self.exchange: Exchange | None = Exchange(backend, self._pinned(seeds), self._pinned(results))
        self.sweeps = -1
        self.counts: Counter[str] = Counter()
        self.captured: dict[object, Callable[[], object]] = {}

    def _build_layers(self) -> None:
        """Units, slots and readers; what the draft holds of each layer is its digest."""
        memory, rng = self.memory, random.Random(repr(self.memory))
        contents = [rng.randbytes(rng.randint(1, memory.parts) * PART) for _ in memory.layers]
        loaded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        self.resident = [
            one if where == "resident" else None for one, where in zip(loaded, memory.layers, strict=True)
        ]
        self.digests = [digest(one) for one in loaded]
        self.truth = Truth([int(one) for one in self.digests])
        self.files = [MemoryFile(f"layer {index}", content) for index, content in enumerate(contents)]
        units = [
            Unit(
                str(file.path),
                file,
                len(one),
                zlib.crc32(file.content),
                one if where == "image" else None,
            )
            for file, one, where in zip(self.files, loaded, memory.layers, strict=True)
            if where != "resident"
        ]
        n_buffers = STAGING_BUFFERS * memory.threads if memory.staged else 0
        self.streamer = Streamer(
            units,
            [torch.zeros(memory.parts * PART, dtype=torch.uint8) for _ in range(memory.slots)],
            self.backend,
            staging=[torch.zeros(PART, dtype=torch.uint8) for _ in range(n_buffers)],
            threads=memory.threads,
            request_bytes=PART,
        )

    def _pinned(self, largest: int) -> torch.Tensor:
        """A buffer of an exchange."""
        regions = 2 * -(-largest // ALIGNMENT) + self.memory.spare
        return torch.zeros(regions * ALIGNMENT, dtype=torch.uint8)

    # --- the passes ---

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """One sweep: logits (T, V) or (1, V)."""
        self.sweeps += 1
        hidden, weights = self._embedded(rows)
        logits = torch.empty(1 if last_only else len(rows), VOCABULARY)
        ledger = LedgeredPass(self.ledger, rows, exact=True)

        def steps() -> Iterator[Step]:
            for index, here in enumerate(self.resident):
                self.breaks(self.sweeps, index)
                work = partial(self._exact_layer, index, hidden, weights, rows, ledger)
                yield Step(f"layer {index}", work, streamed=here is None)
            yield Step("head", lambda _: self._head(hidden, logits, 0), streamed=False)

        def piece() -> bool:
            assert gap is not None
            self.breaks(self.sweeps, -1)
            return gap()

        self.schedule.sweep(steps(), None if gap is None else piece)
        return logits

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes."""
        return finished(self.draft_steps(rows))

    def draft_steps(self, rows: Rows) -> Generator[None, None, torch.Tensor]:
        """``draft`` a layer at a time."""
        self.counts["gap passes begun"] += 1
        hidden, weights = self._embedded(rows)
        ledger = LedgeredPass(self.ledger, rows, exact=False)
        for index in range(len(self.digests)):
            self.run(partial(self._draft_layer, index, hidden, weights, rows, ledger), f"draft layer {index}")
            yield
        logits = torch.empty(len(rows), VOCABULARY)
        self.run(lambda: self._head(hidden, logits, DISAGREEMENT), "draft head")
        self.counts["gap passes finished"] += 1
        return logits

    def capture_level(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        """See ``DevicePasses``."""
        if key not in self.captured:
            work = partial(self._draft_level, rows, then)
            self.captured[key] = self.backend.capture(work)
            for _ in range(self.memory.warm_ups):
                self.run(work, "warm-up")

    def draft_level(self, key: object) -> None:
        """See ``DevicePasses``."""
        self.run(self.captured[key], "draft")

    def relocate(self, sources: list[int], targets: list[int], drafts: int = 0) -> None:
        """Move cache slots; the last ``drafts`` of the sources are a draft's."""
        self.run(partial(self.ledger.moved, sources, targets, drafts), "commit")
        moved = [pair for pair in zip(sources, targets, strict=True) if pair[0] != pair[1]]
        if moved:
            origin, target = (self._uploaded(torch.tensor(column)) for column in zip(*moved, strict=True))
            self.run(partial(self.cache.move, origin, target), "move")

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """``relocate`` to ``start`` and on."""
        self.relocate(sources, list(range(start, start + len(sources))), drafts)

    def upload(self, rows: Rows) -> Rows:
        """Rows where passes compute."""
        return rows.mapped(self._uploaded)

    def _uploaded(self, values: torch.Tensor) -> torch.Tensor:
        """Host values where passes compute."""
        assert self.exchange is not None
        return self.exchange.sent(values)

    def run(self, work: Callable[[], object], note: str) -> None:
        """Launch ``work``."""
        self.counts[note] += 1
        self.backend.launch(self.backend.compute, work, note=note)

    def counters(self) -> Any:
        """Nobody's decisions rest on seconds here."""
        return SimpleNamespace(wait_s=0.0, gap_s=0.0)

    def close(self) -> None:
        """Let all that was launched run."""
        self.streamer.close()
        self.backend.close()

    # --- what they are made of ---

    def _embedded(self, rows: Rows) -> tuple[torch.Tensor, Words]:
        """Memory for rows' hashes (T,), and for what they multiply each slot by (T, S); launched."""
        hidden = torch.empty(len(rows), dtype=torch.int64)
        weights = np.empty((len(rows), self.cache.slots), dtype=np.uint64)
        self.run(partial(self._embed, rows, hidden, weights), "embedding")
        return hidden, weights

    def _embed(self, rows: Rows, hidden: torch.Tensor, weights: Words) -> None:
        """Hash tokens and positions, and find out what is attended to."""
        tokens, positions = rows.tokens.numpy(), rows.positions.numpy()
        words = tokens.astype(np.uint64) * np.uint64(TOKEN)
        words += positions.astype(np.uint64) * np.uint64(POSITION) + np.uint64(1)
        words_of(hidden)[:] = mixed(words)
        weights.fill(0)
        lengths = zip(rows.prefix.tolist(), rows.paths.tolist(), rows.path_lens.tolist(), strict=True)
        for row, (prefix, path, length) in enumerate(lengths):
            weights[row, :prefix] = WORD_PLACES[:prefix]
            for step, slot in enumerate(path[:length]):
                weights[row, slot : slot + 1] += WORD_PLACES[prefix + step]

    def _exact_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        weights: Words,
        rows: Rows,
        ledger: LedgeredPass,
        slot: torch.Tensor | None,
    ) -> None:
        """A layer of a sweep."""
        memory = self.resident[index] if slot is None else slot
        assert memory is not None
        self._layer(index, digest(memory), EXACT, hidden, weights, rows)
        ledger.layer(index)

    def _draft_layer(
        self, index: int, hidden: torch.Tensor, weights: Words, rows: Rows, ledger: LedgeredPass
    ) -> None:
        """A layer of a draft."""
        self._layer(index, self.digests[index], DRAFT, hidden, weights, rows)
        ledger.layer(index)

    def _layer(
        self, index: int, unit: np.uint64, writer: int, hidden: torch.Tensor, weights: Words, rows: Rows
    ) -> None:
        """Write the rows' entries, then fold what they attend to into their hashes."""
        keys, values = (words_of(part)[0, :, 0] for part in self.cache.layer(index))
        words, slots = words_of(hidden), rows.slots.numpy()
        entry = mixed(words ^ unit) & np.uint64(EVEN)
        keys[slots] = entry | np.uint64(writer)
        values[slots] = (mixed(entry) & np.uint64(EVEN)) | np.uint64(writer)
        minded = np.uint64(MASK if writer == EXACT else EVEN)
        seen = (keys & minded) * np.uint64(3) + (values & minded)
        words[:] = mixed(words + weights @ seen)

    def _draft_level(self, rows: Rows, then: Callable[[torch.Tensor], object]) -> None:
        """A whole draft pass, as one piece of work."""
        hidden = torch.empty(len(rows), dtype=torch.int64)
        weights = np.empty((len(rows), self.cache.slots), dtype=np.uint64)
        ledger = LedgeredPass(self.ledger, rows, exact=False)
        self._embed(rows, hidden, weights)
        for index in range(len(self.digests)):
            self._draft_layer(index, hidden, weights, rows, ledger)
        logits = torch.empty(len(rows), VOCABULARY)
        self._head(hidden, logits, DISAGREEMENT)
        then(logits)

    def _head(self, hidden: torch.Tensor, logits: torch.Tensor, disagreement: int) -> None:
        """Logits of the last rows' hashes."""
        logits.numpy()[:] = logits_of(words_of(hidden)[-len(logits) :], disagreement)
