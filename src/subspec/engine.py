"""The composition root: store, memory, decoder and method meet here, and only here.

Builds everything that a plan names, then offers the two passes that decoding is made of: ``target``, one
sweep of the exact weights through the slot ring, and ``draft``, one pass over the substitutes.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from subspec.memory import hazards
from subspec.memory.arena import Arena, map_bytes
from subspec.memory.ring_hazards import noting_use
from subspec.memory.streamer import Streamer
from subspec.memory.tiers import MemoryBudget, page_aligned
from subspec.memory.timeline import Timeline
from subspec.models.decoder import (
    Decoder,
    LayerNorms,
    LayerProducts,
    LayerSource,
    RowProduct,
    Rows,
    WholeLayer,
    finished,
)
from subspec.models.kv_cache import KVCache
from subspec.models.kv_ledger import KVLedger, LedgeredLayers
from subspec.models.linear import ExactProduct, choose_product
from subspec.models.operations import operations
from subspec.planning.plan import Plan
from subspec.store.exact import chunk_matrices, exact_bytes, rebuild
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices, layer_tensor
from subspec.store.reader import Store
from subspec.store.rows import EmbeddingRows
from subspec.substitute.exact import UnitProducts
from subspec.substitute.fused import draft_layer
from subspec.substitute.layout import Placed, tile_bytes
from subspec.substitute.linear import SubstituteLinear

Progress = Callable[[str, int, int], None]
LOAD_THREADS = 2


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


@dataclass(frozen=True)
class _Unit:
    """A layer, or a chunk of the output head: what is streamed whole.

    Attributes:
        name: of its image.
        matrices: in its image's order; ``tiles``: their substitutes; ``biases``: theirs.
        stays: whether it is resident; ``stays_plain``: as plain weights.
    """

    name: str
    matrices: Sequence[Placed]
    tiles: torch.Tensor
    biases: list[torch.Tensor | None]
    stays: bool
    stays_plain: bool


class Engine:
    """A model under a plan.  Not thread-safe: one text at a time.

    Args:
        store: the prepared model; closed with the engine.
        plan: what to keep where.
        progress: called with (task, done, total) while loading.
        paranoid: verify checksums on every read.

    Attributes:
        checker, ledger: of accesses to the slots and of exact cache entries, if ``SUBSPEC_HAZARDS`` asks.
        timeline: where passes and reads are recorded at present; set by ``trace``.
    """

    def __init__(
        self, store: Store, plan: Plan, progress: Progress | None = None, *, paranoid: bool = False
    ) -> None:
        self.store, self.plan, self.config = store, plan, store.config
        self.budget = MemoryBudget(plan.budget_bytes)
        self._arena = Arena(self.budget)
        self._sweeps = 0
        self._gap: Callable[[], bool] | None = None
        self._gap_s, self._in_gap = 0.0, False
        self.timeline: Timeline | None = None
        self._streamer: Streamer | None = None
        self.budget.take("workspace", plan.parts["workspace"])
        self.budget.take("norms_biases", plan.parts["norms_biases"])
        small = store.small_tensors()
        checked = hazards.wanted()
        self.checker = hazards.HazardChecker() if checked else None
        self.ledger = KVLedger(self.config.layers, plan.cache_slots) if checked else None
        self.rows = EmbeddingRows(store, small.pop("embedding.crc32"), plan.cache_rows, self._arena)
        self._small = small
        self._matrices = layer_matrices(self.config)
        self._chunks = head_chunks(self.config, store.dtype.itemsize)
        self._biases = [self._layer_biases(index) for index in range(self.config.layers)]
        self.cache = KVCache(self.config, plan.cache_slots, store.dtype, self._arena)
        self.decoder = Decoder(
            self.config, [self._norms(index) for index in range(self.config.layers)], self.cache
        )
        slots = [self._arena.bytes("slots", plan.slot_bytes) for _ in range(plan.slots)]
        self.product = self._choose_product(slots)
        self._products = UnitProducts(self.product, store.dtype, self._scratch())
        self._draft_layers, self._draft_head, tiles = self._load_substitutes(progress)
        self._layers = [self._layer_unit(index, part) for index, part in enumerate(tiles)]
        self._head = [self._head_unit(index) for index in range(len(self._chunks))]
        self._resident = self._load_resident(slots, progress)
        streamed = [unit.name for unit in [*self._layers, *self._head] if not unit.stays]
        if streamed:
            units = [store.unit(name) for name in streamed]
            self._streamer = Streamer(units, slots, paranoid=paranoid, checker=self.checker)

    # --- the two passes ---

    def target(self, rows: Rows, *, last_only: bool, gap: Callable[[], bool] | None = None) -> torch.Tensor:
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
        self._gap, self._in_gap = gap, False  # a gap that raised left it set
        start = time.perf_counter()
        if self._streamer is not None:
            self._streamer.rewind()
        layers = self._checked(_Sweep(self), rows, exact=True)
        hidden = self.decoder.forward(layers, self.rows.lookup(rows.tokens), rows, self.plan.prefill_rows)
        wanted = self._normed(hidden[-1:] if last_only else hidden)
        logits = torch.empty((wanted.shape[0], self.config.vocab_size), dtype=self.store.dtype)
        for chunk, unit in zip(self._chunks, self._head, strict=True):
            (product,) = self._acquire(unit)
            logits[:, chunk.start : chunk.stop] = product(wanted)
            self._release(unit)
        if self.timeline is not None:
            self.timeline.span("sweep", "sweep", start, time.perf_counter(), rows=len(rows.tokens))
        return logits  # (T, V)

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V); keys and values written for all rows."""
        return finished(self.draft_steps(rows))

    def draft_steps(self, rows: Rows) -> Generator[None, None, torch.Tensor]:
        """``draft`` in pieces: yields after each layer, returns the logits."""
        start = time.perf_counter()
        hidden = self.rows.lookup(rows.tokens)
        layers = self._checked(self._draft_layers, rows, exact=False)
        yield from self.decoder.steps(layers, hidden, rows, self.plan.prefill_rows)
        logits = self._draft_head(self._normed(hidden))
        if self.timeline is not None and not self._in_gap:
            self.timeline.span("draft", "draft", start, time.perf_counter(), rows=len(rows.tokens))
        return logits  # (T, V)

    @property
    def sweep_bytes(self) -> tuple[int, int]:
        """Bytes that a sweep streams, and of those, how many fit the slots."""
        return self.plan.streamed_bytes, self.plan.slots * self.plan.slot_bytes

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """Move cache slots ``sources`` to ``start`` and on; the last ``drafts`` of them are a draft's."""
        if self.ledger is not None:
            self.ledger.moved(sources, start, drafts)
        self.cache.move(sources, start)

    def trace(self, timeline: Timeline | None) -> None:
        """Record passes, layers, waits and reads in ``timeline`` from now on; None ends it."""
        self.timeline = timeline
        if self._streamer is not None:
            self._streamer.timeline = timeline

    def counters(self) -> Counters:
        """Totals since the engine was built."""
        if self._streamer is None:
            return Counters(self._sweeps, 0, 0.0, 0.0, 0.0)
        streamer = self._streamer
        return Counters(self._sweeps, streamer.streamed_bytes, streamer.busy_s, streamer.wait_s, self._gap_s)

    def close(self) -> None:
        """Stop the readers and close the store."""
        if self._streamer is not None:
            self._streamer.close()
        self.rows.close()
        self.store.close()

    # --- building ---

    def _norms(self, index: int) -> LayerNorms:
        """The norm gains of a layer."""
        return LayerNorms(
            attention=self._small[layer_tensor(index, "input_layernorm")],
            mlp=self._small[layer_tensor(index, "post_attention_layernorm")],
            q=self._small.get(layer_tensor(index, "self_attn.q_norm")),
            k=self._small.get(layer_tensor(index, "self_attn.k_norm")),
        )

    def _layer_biases(self, index: int) -> list[torch.Tensor | None]:
        """The bias of each fused matrix of a layer, where it has one."""
        found = []
        for matrix in self._matrices:
            parts = [self._small.get(layer_tensor(index, part, "bias")) for part in matrix.parts]
            known = [part for part in parts if part is not None]
            found.append(torch.cat(known) if known else None)
        return found

    def _choose_product(self, slots: list[torch.Tensor]) -> ExactProduct:
        """The start-up check of row-invariance, on this model's shapes, in memory that is not in use yet."""
        hidden, itemsize = self.config.hidden_size, self.store.dtype.itemsize
        shapes = [(matrix.n, matrix.k) for matrix in self._matrices] + [(self._chunks[0].stop, hidden)]
        largest = page_aligned(max(n * k for n, k in shapes) * itemsize)
        fits = bool(slots) and len(slots[0]) >= largest
        return choose_product(shapes, self.store.dtype, slots[0] if fits else map_bytes(largest))

    def _scratch(self) -> torch.Tensor | None:
        """Memory for the largest weight, if products cannot rebuild weights as they go; in the workspace."""
        if self.product.native or self.store.manifest.codec == "raw":
            return None
        shapes = [*self._matrices, *chunk_matrices(self.store, self._chunks[0])]
        return map_bytes(page_aligned(max(shape.n * shape.k for shape in shapes) * self.store.dtype.itemsize))

    def _load_substitutes(
        self, progress: Progress | None
    ) -> tuple["_Draft", SubstituteLinear, list[torch.Tensor]]:
        """Read every substitute into memory: the draft's layers, its head, and each layer's tiles."""
        per_layer = page_aligned(sum(tile_bytes(matrix.n, matrix.k) for matrix in self._matrices))
        memory = self._arena.bytes("substitutes", per_layer * self.config.layers).view(
            self.config.layers, per_layer
        )
        names = [layer_file(index, "substitute") for index in range(self.config.layers)]
        self._load_all("loading substitutes", list(zip(names, memory, strict=True)), progress)
        layers = []
        for index, tiles in enumerate(memory):
            weights = [
                SubstituteLinear(m.own_tiles(tiles), m.n, m.k, bias)
                for m, bias in zip(self._matrices, self._biases[index], strict=True)
            ]
            layers.append(draft_layer(weights, self.decoder.settings[index]))
        return _Draft(layers), self._load_draft_head(), list(memory)

    def _load_draft_head(self) -> SubstituteLinear:
        """The head's substitute as one run of tiles, put together from its chunks."""
        hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
        tiles = self._arena.bytes("substitutes", tile_bytes(vocabulary, hidden))
        for index, chunk in enumerate(self._chunks):
            size, offset = tile_bytes(chunk.stop - chunk.start, hidden), tile_bytes(chunk.start, hidden)
            scratch = map_bytes(page_aligned(size))
            self.store.load(head_file(index, "substitute"), scratch)
            tiles[offset : offset + size] = scratch[:size]
        return SubstituteLinear(tiles[: tile_bytes(vocabulary, hidden)], vocabulary, hidden, None)

    def _layer_unit(self, index: int, tiles: torch.Tensor) -> _Unit:
        """A layer."""
        name, plan = layer_file(index, self.store.form), self.plan
        stays, stays_plain = index in plan.resident_layers, index in plan.plain_layers
        return _Unit(name, self._matrices, tiles, self._biases[index], stays, stays_plain)

    def _head_unit(self, index: int) -> _Unit:
        """A chunk of the output head; its substitute is a part of the draft head's."""
        chunk, hidden = self._chunks[index], self.config.hidden_size
        tiles = self._draft_head.tiles[tile_bytes(chunk.start, hidden) : tile_bytes(chunk.stop, hidden)]
        name, plan = head_file(index, self.store.form), self.plan
        stays, stays_plain = index < plan.resident_chunks, index < plan.plain_chunks
        return _Unit(name, chunk_matrices(self.store, chunk), tiles, [None], stays, stays_plain)

    def _load_resident(self, slots: list[torch.Tensor], progress: Progress | None) -> dict[str, torch.Tensor]:
        """Read the images that stay, and rebuild those that stay as plain weights; by name."""
        kept = [unit for unit in [*self._layers, *self._head] if unit.stays]
        if not kept:
            return {}
        images = self.store.manifest.files
        sizes = [
            exact_bytes(self.store, unit.matrices) if unit.stays_plain else images[unit.name].n_bytes
            for unit in kept
        ]
        memory = torch.split(self._arena.bytes("resident", sum(sizes)), sizes)
        places = list(zip(kept, memory, strict=True))
        rebuilt = [pair for pair in places if pair[0].stays_plain and self.store.form == "residual"]
        for done, (unit, place) in enumerate(rebuilt, start=1):
            image = slots[0] if slots else map_bytes(images[unit.name].n_bytes)
            image = image[: images[unit.name].n_bytes]
            self.store.load(unit.name, image)
            rebuild(self.store, image, unit.tiles, unit.matrices, place)
            if progress is not None:
                progress("rebuilding resident layers", done, len(rebuilt))
        ready = {unit.name for unit, _ in rebuilt}
        as_stored = [(unit.name, place) for unit, place in places if unit.name not in ready]
        self._load_all("loading resident layers", as_stored, progress)
        return {unit.name: place for unit, place in places}

    def _load_all(self, task: str, jobs: list[tuple[str, torch.Tensor]], progress: Progress | None) -> None:
        """Load images into memory with a few threads."""
        with ThreadPoolExecutor(LOAD_THREADS) as pool:
            for done, _ in enumerate(pool.map(lambda job: self.store.load(*job), jobs), start=1):
                if progress is not None:
                    progress(task, done, len(jobs))

    # --- one sweep ---

    def _acquire(self, unit: _Unit) -> list[RowProduct]:
        """A unit's products: of the resident one, or of the next of the stream; valid until ``_release``."""
        if unit.stays:
            memory, plain = self._resident[unit.name], unit.stays_plain
        else:
            memory, plain = self._next_streamed(), self.store.form == "exact"
        self._began_s = time.perf_counter()
        products = self._products.of(memory, plain, unit.tiles, unit.matrices, unit.biases)
        if self.checker is None or unit.stays:
            return products
        return [noting_use(self.checker, memory.data_ptr(), len(memory), one) for one in products]

    def _next_streamed(self) -> torch.Tensor:
        """The stream's next unit; until it is there, the gap is filled."""
        assert self._streamer is not None
        if self._gap is not None and not self._streamer.ready():
            start, self._in_gap = time.perf_counter(), True
            while self._gap() and not self._streamer.ready():
                pass
            end, self._in_gap = time.perf_counter(), False
            self._gap_s += end - start
            if self.timeline is not None:
                self.timeline.span("gaps", "drafting", start, end)
        return self._streamer.acquire()

    def _release(self, unit: _Unit) -> None:
        """Give a streamed unit's slot back."""
        if self.timeline is not None:
            end = time.perf_counter()
            self.timeline.span("sweep", unit.name, self._began_s, end, streamed=not unit.stays)
        if not unit.stays and self._streamer is not None:
            self._streamer.release()

    def _checked(self, layers: LayerSource, rows: Rows, *, exact: bool) -> LayerSource:
        """A pass's layers, entered in the ledger if there is one."""
        return layers if self.ledger is None else LedgeredLayers(layers, self.ledger, rows, exact=exact)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, (T, C)."""
        return operations().rms_norm(hidden, self._small["model.norm.weight"], self.config.rms_norm_eps)


class _Sweep:
    """The exact layers, in order, streamed or resident."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def layers(self) -> Iterator[LayerProducts]:
        """One sweep over the layers; a broken sweep leaves its slot to the next one's ``rewind``."""
        for unit in self._engine._layers:
            yield LayerProducts(*self._engine._acquire(unit))
            self._engine._release(unit)


class _Draft:
    """The low-bit layers."""

    def __init__(self, layers: list[LayerProducts | WholeLayer]) -> None:
        self._layers = layers

    def layers(self) -> Iterator[LayerProducts | WholeLayer]:
        """One pass."""
        return iter(self._layers)
