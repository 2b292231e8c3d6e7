"""The weights under a plan: read, rebuilt and placed, then handed out as products.

Substitutes and resident units lie in *near* memory, where the products are computed; behind a device, images
of further units rest in pinned host memory, and the others stay on disk.  Knows nothing of sweeps or drafts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from subspec.engine.loading import Kept, Loader, Progress
from subspec.engine.places import Places
from subspec.memory.arena import map_bytes, place_bytes
from subspec.memory.disk import writable
from subspec.memory.streamer import Unit
from subspec.memory.tiers import PAGE_BYTES, page_aligned
from subspec.models.decoder import RowProduct
from subspec.models.linear import ExactProduct, choose_product
from subspec.planning.parts import largest_matrix
from subspec.planning.plan import Plan
from subspec.store.exact import chunk_matrices, load_chunk, load_layer
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.store.vectors import layer_biases
from subspec.substitute.choice import Choice, Shape, choose_on
from subspec.substitute.exact import UnitProducts
from subspec.substitute.images import starts
from subspec.substitute.layout import Placed, tile_bytes
from subspec.substitute.linear import SubstituteLinear


@dataclass(frozen=True)
class WeightUnit:
    """A layer, or a chunk of the output head: what is streamed whole.

    Attributes:
        name: of its image.
        matrices: in its image's order; ``tiles``: their substitutes; ``biases``: theirs.
        starts: where each matrix's residual starts in its image; empty where images are plain weights.
        memory: its exact weights, if it is resident.
        plain: whether these, or what is streamed of it, are plain weights.
    """

    name: str
    matrices: Sequence[Placed]
    tiles: torch.Tensor
    biases: list[torch.Tensor | None]
    starts: list[int]
    memory: torch.Tensor | None
    plain: bool


class Weights:
    """Everything that a plan keeps, and what there is to stream.

    Args:
        store: the prepared model.
        plan: what to keep where.
        places: where to keep it.
        small: norms and biases by name, on the device.
        slots: near memory that is not in use yet.
        progress: called with (task, done, total).

    Attributes:
        layers, head: the exact units, in order.
        draft_layers: each layer's four substitutes: qkv, o, gate and up, down; ``draft_head``: the head's.
        product: how the target multiplies.
        draft_choice: how the draft multiplies, and why not otherwise, on a CUDA device; elsewhere None.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        places: Places,
        small: dict[str, torch.Tensor],
        slots: Sequence[torch.Tensor],
        progress: Progress | None,
    ) -> None:
        self._store, self._plan, self._near, self._small = store, plan, places.near, small
        self._loader = Loader(store, places, slots[0] if slots else None, progress)
        self._matrices = layer_matrices(store.config)
        self._chunks = head_chunks(store.config, store.dtype.itemsize)
        self._biases = [layer_biases(small, store.config, index) for index in range(store.config.layers)]
        self._largest = largest_matrix(store.config, store.dtype.itemsize)
        self.product = self._choose_product(slots)
        self._products = UnitProducts(self.product, store.dtype, self._scratch())
        self.draft_choice = self._choose_draft_product()
        tiles, self.draft_layers = self._load_substitutes()
        self.draft_head = self._load_draft_head()
        resident = self._loader.resident(self._kept(tiles))
        self.layers = [self._layer_unit(index, part, resident) for index, part in enumerate(tiles)]
        self.head = [self._head_unit(index, resident) for index in range(len(self._chunks))]
        names = [layer_file(index, store.form) for index in plan.host_layers]
        names += [head_file(index, store.form) for index in plan.host_chunks]
        self._images = self._loader.behind(names)

    @property
    def draft_product(self) -> str:
        """How the draft multiplies: the device's way, or ``native`` or ``torch`` on the CPU."""
        if self.draft_choice is not None:
            return self.draft_choice.way.name
        return "native" if self.draft_head.native else "torch"

    def streamed(self) -> list[Unit]:
        """What a sweep streams, in order."""
        names = [unit.name for unit in [*self.layers, *self.head] if unit.memory is None]
        records = self._store.manifest.files
        return [
            Unit(
                name,
                self._store.file(name),
                records[name].n_bytes,
                records[name].crc32,
                self._images.get(name),
            )
            for name in names
        ]

    def products(self, unit: WeightUnit, slot: torch.Tensor | None) -> list[RowProduct]:
        """A unit's exact products; of a streamed one, from its slot, and valid as long as it is held."""
        memory = slot if unit.memory is None else unit.memory
        assert memory is not None
        return self._products.of(memory, unit.plain, unit.starts, unit.tiles, unit.matrices, unit.biases)

    # --- what there is ---

    def _layer_unit(self, index: int, tiles: torch.Tensor, resident: dict[str, torch.Tensor]) -> WeightUnit:
        """A layer."""
        name = layer_file(index, self._store.form)
        plain = self._store.form == "exact" or index in self._plan.plain_layers
        offsets = [] if plain else self._starts(name, len(self._matrices))
        return WeightUnit(
            name, self._matrices, tiles, self._biases[index], offsets, resident.get(name), plain
        )

    def _head_unit(self, index: int, resident: dict[str, torch.Tensor]) -> WeightUnit:
        """A chunk of the output head; its substitute is a part of the draft head's."""
        chunk = self._chunks[index]
        name = head_file(index, self._store.form)
        plain = self._store.form == "exact" or index < self._plan.plain_chunks
        offsets = [] if plain else self._starts(name, 1)
        matrices = chunk_matrices(self._store, chunk)
        return WeightUnit(
            name, matrices, self._chunk_tiles(index), [None], offsets, resident.get(name), plain
        )

    def _chunk_tiles(self, index: int) -> torch.Tensor:
        """The substitute of a chunk of the head."""
        chunk, hidden = self._chunks[index], self._store.config.hidden_size
        return self.draft_head.tiles[tile_bytes(chunk.start, hidden) : tile_bytes(chunk.stop, hidden)]

    def _starts(self, name: str, count: int) -> list[int]:
        """Where the residuals of an image start: from its first page."""
        page = map_bytes(PAGE_BYTES)
        self._store.file(name).read(writable(page), 0)
        return starts(page, count, self._store.manifest.files[name].n_bytes)

    # --- how the target multiplies ---

    def _choose_product(self, slots: Sequence[torch.Tensor]) -> ExactProduct:
        """The start-up check of row-invariance, on this model's shapes, in memory that is not in use yet."""
        hidden = self._store.config.hidden_size
        shapes = [(matrix.n, matrix.k) for matrix in self._matrices]
        biased = [shape for shape, bias in zip(shapes, self._biases[0], strict=True) if bias is not None]
        shapes += [(chunk.stop - chunk.start, hidden) for chunk in self._chunks]
        fits = bool(slots) and len(slots[0]) >= self._largest
        scratch = slots[0] if fits else place_bytes(self._largest, self._near.device)
        return choose_product(shapes, self._store.dtype, scratch, biased)

    def _scratch(self) -> torch.Tensor | None:
        """Memory for the largest weight, if products cannot rebuild weights as they go; in the workspace."""
        if self.product.native or self._store.manifest.codec == "raw":
            return None
        return place_bytes(self._largest, self._near.device)

    def _choose_draft_product(self) -> Choice | None:
        """The start-up choice on a CUDA device, while most of its memory is still free.

        Tiles may be replaced where exact weights are not rebuilt from them.  The head is tried by its chunks.
        """
        if self._near.device.type != "cuda":
            return None
        config, raw = self._store.config, self._store.manifest.codec == "raw"
        chunks = Counter(chunk.stop - chunk.start for chunk in self._chunks)
        shapes = [Shape(matrix.n, matrix.k, config.layers) for matrix in self._matrices]
        shapes += [Shape(rows, config.hidden_size, count) for rows, count in chunks.items()]
        return choose_on(self._near.device, shapes, self._store.dtype, tiles_kept=not raw)

    def _packed(self, layer: SubstituteLinear) -> SubstituteLinear:
        """The layer, multiplying the chosen way."""
        if self.draft_choice is not None:
            layer.pack(self.draft_choice.way, self._store.dtype)
        return layer

    # --- loading ---

    def _load_substitutes(self) -> tuple[list[torch.Tensor], list[list[SubstituteLinear]]]:
        """Read every layer's substitutes: its tiles, and the products with them."""
        layers = self._store.config.layers
        per_layer = page_aligned(sum(tile_bytes(matrix.n, matrix.k) for matrix in self._matrices))
        memory = self._near.bytes("substitutes", per_layer * layers).view(layers, per_layer)
        names = [layer_file(index, "substitute") for index in range(layers)]
        self._loader.load("loading substitutes", list(zip(names, memory, strict=True)))
        products = [
            [
                self._packed(SubstituteLinear(matrix.own_tiles(tiles), matrix.n, matrix.k, bias))
                for matrix, bias in zip(self._matrices, self._biases[index], strict=True)
            ]
            for index, tiles in enumerate(memory)
        ]
        return list(memory), products

    def _load_draft_head(self) -> SubstituteLinear:
        """The head's substitute as one run of tiles, put together from its chunks."""
        hidden, vocabulary = self._store.config.hidden_size, self._store.config.vocab_size
        tiles = self._near.bytes("substitutes", tile_bytes(vocabulary, hidden))
        for index, chunk in enumerate(self._chunks):
            size, offset = tile_bytes(chunk.stop - chunk.start, hidden), tile_bytes(chunk.start, hidden)
            scratch = map_bytes(page_aligned(size))
            self._store.load(head_file(index, "substitute"), scratch)
            tiles[offset : offset + size].copy_(scratch[:size])
        head = SubstituteLinear(tiles[: tile_bytes(vocabulary, hidden)], vocabulary, hidden, None)
        return self._packed(head)

    def _kept(self, tiles: list[torch.Tensor]) -> list[Kept]:
        """The units that stay."""
        store, plan, form = self._store, self._plan, self._store.form
        layers = [
            Kept(
                layer_file(index, form),
                self._matrices,
                tiles[index],
                index in plan.plain_layers,
                partial(load_layer, store, index),
            )
            for index in plan.resident_layers
        ]
        return layers + [
            Kept(
                head_file(index, form),
                chunk_matrices(store, self._chunks[index]),
                self._chunk_tiles(index),
                index < plan.plain_chunks,
                partial(_one_chunk, store, index),
            )
            for index in range(plan.resident_chunks)
        ]


def _one_chunk(store: Store, index: int) -> list[torch.Tensor]:
    """The exact matrix of a chunk of the output head, read and rebuilt in host memory."""
    return [load_chunk(store, index)]
