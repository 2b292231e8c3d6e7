"""The composition root: store, memory, decoder and method meet here, and only here.

Builds everything that a plan names, then offers the two passes that decoding is made of: ``target``, one
sweep of the exact weights through the slot ring, and ``draft``, one pass over the substitutes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from subspec.memory.arena import Arena, map_bytes
from subspec.memory.streamer import Streamer
from subspec.memory.tiers import MemoryBudget, page_aligned
from subspec.models.decoder import Decoder, LayerNorms, LayerProducts, Rows
from subspec.models.kv_cache import KVCache
from subspec.models.linear import ExactProduct, choose_product
from subspec.models.operations import operations
from subspec.planning.plan import Plan
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices, layer_tensor
from subspec.store.reader import Store
from subspec.store.rows import EmbeddingRows
from subspec.substitute.layout import tile_bytes
from subspec.substitute.linear import SubstituteLinear

Progress = Callable[[str, int, int], None]
LOAD_THREADS = 2


@dataclass(frozen=True)
class Counters:
    """Running totals of an engine: sweeps begun, bytes streamed, seconds that sweeps waited for the link."""

    sweeps: int
    streamed_bytes: int
    wait_s: float


class Engine:
    """A model under a plan.  Not thread-safe: one text at a time."""

    def __init__(self, store: Store, plan: Plan, progress: Progress | None = None) -> None:
        self.store, self.plan, self.config = store, plan, store.config
        self.budget = MemoryBudget(plan.budget_bytes)
        self._arena = Arena(self.budget)
        self._sweeps = 0
        self._streamer: Streamer | None = None
        self.budget.take("workspace", plan.parts["workspace"])
        self.budget.take("norms_biases", plan.parts["norms_biases"])
        small = store.small_tensors()
        self.rows = EmbeddingRows(store, small.pop("embedding.crc32"), plan.cache_rows, self._arena)
        self._small = small
        self._matrices = layer_matrices(self.config, store.dtype.itemsize)
        self._chunks = head_chunks(self.config, store.dtype.itemsize)
        self._biases = [self._layer_biases(index) for index in range(self.config.layers)]
        self.cache = KVCache(self.config, plan.cache_slots, store.dtype, self._arena)
        self.decoder = Decoder(
            self.config, [self._norms(index) for index in range(self.config.layers)], self.cache
        )
        slots = [self._arena.bytes("slots", plan.slot_bytes) for _ in range(plan.slots)]
        self.product = self._choose_product(slots)
        self._draft_layers, self._draft_head = self._load_substitutes(progress)
        self._resident, self._resident_chunks = self._load_resident(progress)
        names = [layer_file(i, "exact") for i in range(self.config.layers) if i not in self._resident]
        names += [head_file(i, "exact") for i in range(len(self._chunks)) if i not in self._resident_chunks]
        if names:
            self._streamer = Streamer([store.unit(name) for name in names], slots)

    # --- the two passes ---

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        """One sweep: exact logits (T, V), or (1, V) of the last row; keys and values written for all rows.

        Raises:
            StoreError: the stream broke; the next sweep starts afresh.
        """
        self._sweeps += 1
        if self._streamer is not None:
            self._streamer.rewind()
        hidden = self.decoder.forward(
            _Sweep(self), self.rows.lookup(rows.tokens), rows, self.plan.prefill_rows
        )
        wanted = self._normed(hidden[-1:] if last_only else hidden)
        logits = torch.empty((wanted.shape[0], self.config.vocab_size), dtype=self.store.dtype)
        for index, chunk in enumerate(self._chunks):
            memory = self._acquire(self._resident_chunks.get(index))
            weight = self._matrix(memory, chunk.stop - chunk.start, self.config.hidden_size)
            logits[:, chunk.start : chunk.stop] = self.product(wanted, weight, None)
            self._release(index in self._resident_chunks)
        return logits  # (T, V)

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V); keys and values written for all rows."""
        hidden = self.decoder.forward(
            self._draft_layers, self.rows.lookup(rows.tokens), rows, self.plan.prefill_rows
        )
        return self._draft_head(self._normed(hidden))

    def move(self, sources: list[int], start: int) -> None:
        """Move cache slots ``sources`` to ``start`` and on."""
        self.cache.move(sources, start)

    def counters(self) -> Counters:
        """Totals since the engine was built."""
        if self._streamer is None:
            return Counters(self._sweeps, 0, 0.0)
        return Counters(self._sweeps, self._streamer.streamed_bytes, self._streamer.wait_s)

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
        return choose_product(shapes, self.store.dtype, slots[0] if slots else map_bytes(largest))

    def _load_substitutes(self, progress: Progress | None) -> tuple["_Draft", SubstituteLinear]:
        """Read every substitute into memory."""
        per_layer = page_aligned(sum(tile_bytes(matrix.n, matrix.k) for matrix in self._matrices))
        memory = self._arena.bytes("substitutes", per_layer * self.config.layers).view(
            self.config.layers, per_layer
        )
        names = [layer_file(index, "substitute") for index in range(self.config.layers)]
        self._load_all("loading substitutes", list(zip(names, memory, strict=True)), progress)
        layers = []
        for index, tiles in enumerate(memory):
            weights = [
                SubstituteLinear(tiles[m.substitute_offset :][: tile_bytes(m.n, m.k)], m.n, m.k, bias)
                for m, bias in zip(self._matrices, self._biases[index], strict=True)
            ]
            layers.append(LayerProducts(*weights))
        return _Draft(layers), self._load_draft_head()

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

    def _load_resident(
        self, progress: Progress | None
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Read the exact images that stay: by layer, and by head chunk."""
        layers, chunks = self.plan.resident_layers, range(self.plan.resident_chunks)
        names = [layer_file(i, "exact") for i in layers] + [head_file(i, "exact") for i in chunks]
        sizes = [self.store.manifest.files[name].n_bytes for name in names]
        if not names:
            return {}, {}
        memory = torch.split(self._arena.bytes("resident", sum(sizes)), sizes)
        self._load_all("loading resident layers", list(zip(names, memory, strict=True)), progress)
        return dict(zip(layers, memory, strict=False)), dict(zip(chunks, memory[len(layers) :], strict=True))

    def _load_all(self, task: str, jobs: list[tuple[str, torch.Tensor]], progress: Progress | None) -> None:
        """Load images into memory with a few threads."""
        with ThreadPoolExecutor(LOAD_THREADS) as pool:
            for done, _ in enumerate(pool.map(lambda job: self.store.load(*job), jobs), start=1):
                if progress is not None:
                    progress(task, done, len(jobs))

    # --- one sweep ---

    def _acquire(self, resident: torch.Tensor | None) -> torch.Tensor:
        """A unit's bytes: the resident ones, or the next of the stream."""
        if resident is not None:
            return resident
        assert self._streamer is not None
        return self._streamer.acquire()

    def _release(self, resident: bool) -> None:
        """Give a streamed unit's slot back."""
        if not resident and self._streamer is not None:
            self._streamer.release()

    def _matrix(self, memory: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The first n·k weights in ``memory``, a view (N, K)."""
        return memory[: n * k * self.store.dtype.itemsize].view(self.store.dtype).view(n, k)

    def _exact_layer(self, index: int, memory: torch.Tensor) -> LayerProducts:
        """A layer's products over its exact image."""
        products = []
        for matrix, bias in zip(self._matrices, self._biases[index], strict=True):
            weight = self._matrix(memory[matrix.exact_offset :], matrix.n, matrix.k)
            products.append(lambda x, weight=weight, bias=bias: self.product(x, weight, bias))
        return LayerProducts(*products)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, (T, C)."""
        return operations().rms_norm(hidden, self._small["model.norm.weight"], self.config.rms_norm_eps)


class _Sweep:
    """The exact layers, in order, streamed or resident."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def layers(self) -> Iterator[LayerProducts]:
        """One sweep over the layers; a broken sweep leaves its slot to the next one's ``rewind``."""
        engine = self._engine
        for index in range(engine.config.layers):
            resident = engine._resident.get(index)
            yield engine._exact_layer(index, engine._acquire(resident))
            engine._release(resident is not None)


class _Draft:
    """The low-bit layers."""

    def __init__(self, products: list[LayerProducts]) -> None:
        self._products = products

    def layers(self) -> Iterator[LayerProducts]:
        """One pass."""
        return iter(self._products)
