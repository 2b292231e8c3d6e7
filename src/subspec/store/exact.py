"""Exact weights from a store's images, whatever codec they are kept in."""

from collections.abc import Iterator

from torch import Tensor

from subspec.memory.arena import map_bytes
from subspec.memory.tiers import page_aligned
from subspec.store.layout import Chunk, head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.substitute.exact import Shape
from subspec.substitute.images import split
from subspec.substitute.layout import tile_bytes
from subspec.substitute.residual import decode_rows


def layer_shapes(store: Store) -> list[Shape]:
    """The matrices of a layer, in order."""
    return [
        Shape(matrix.n, matrix.k, matrix.substitute_offset)
        for matrix in layer_matrices(store.config, store.dtype.itemsize)
    ]


def chunk_shapes(store: Store, chunk: Chunk) -> list[Shape]:
    """The one matrix of a chunk of the output head."""
    return [Shape(chunk.stop - chunk.start, store.config.hidden_size, 0)]


def exact_bytes(store: Store, shapes: list[Shape]) -> int:
    """Bytes of a unit's exact matrices, one after another, in whole pages."""
    return page_aligned(sum(shape.n * shape.k for shape in shapes) * store.dtype.itemsize)


def rebuild(store: Store, image: Tensor, tiles: Tensor, shapes: list[Shape], out: Tensor) -> None:
    """Write a unit's exact matrices to ``out`` (uint8), one after another.

    Args:
        store: says the codec and the dtype.
        image: the unit's exact or residual image.
        tiles: its substitutes.
        shapes: its matrices.
        out: at least ``exact_bytes``.
    """
    if store.manifest.codec == "raw":
        out[: len(image)] = image
        return
    start = 0
    for residual, shape in zip(split(image, len(shapes)), shapes, strict=True):
        size = shape.n * shape.k * store.dtype.itemsize
        weight = out[start : start + size].view(store.dtype).view(shape.n, shape.k)
        own = tiles[shape.substitute_offset :][: tile_bytes(shape.n, shape.k)]
        decode_rows(residual, own, shape.n, shape.k, weight)
        start += size


def load_layer(store: Store, index: int) -> Iterator[Tensor]:
    """The exact matrices (n, k) of a layer, read and rebuilt: views of new memory.

    Raises:
        StoreError: an image is damaged or cannot be read.
    """
    return _load(store, layer_file(index, store.form), layer_file(index, "substitute"), layer_shapes(store))


def load_chunk(store: Store, index: int) -> Tensor:
    """The exact rows (n, k) of a chunk of the output head, new; raises as ``load_layer`` does."""
    chunk = head_chunks(store.config, store.dtype.itemsize)[index]
    names = head_file(index, store.form), head_file(index, "substitute")
    return next(_load(store, *names, chunk_shapes(store, chunk)))


def _load(store: Store, exact: str, substitute: str, shapes: list[Shape]) -> Iterator[Tensor]:
    """The exact matrices of a unit by the names of its two files."""
    memory = map_bytes(exact_bytes(store, shapes))
    rebuild(store, _read(store, exact), _read(store, substitute), shapes, memory)
    start = 0
    for shape in shapes:
        size = shape.n * shape.k * store.dtype.itemsize
        yield memory[start : start + size].view(store.dtype).view(shape.n, shape.k)
        start += size


def _read(store: Store, name: str) -> Tensor:
    """A whole image in new memory."""
    image = map_bytes(store.manifest.files[name].n_bytes)
    store.load(name, image)
    return image
