"""Exact weights from a store's images, whatever codec they are kept in."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from subspec.memory.arena import map_bytes
from subspec.memory.tiers import page_aligned
from subspec.store.layout import Chunk, head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.substitute.images import split
from subspec.substitute.layout import Placed, tile_bytes
from subspec.substitute.residual import decode_rows


def chunk_matrices(store: Store, chunk: Chunk) -> list[Placed]:
    """The one matrix of a chunk of the output head."""
    return [Placed(chunk.stop - chunk.start, store.config.hidden_size, 0)]


def exact_bytes(store: Store, matrices: Sequence[Placed]) -> int:
    """Bytes of a unit's exact matrices, one after another, in whole pages."""
    return page_aligned(sum(matrix.n * matrix.k for matrix in matrices) * store.dtype.itemsize)


def rebuild(store: Store, image: Tensor, tiles: Tensor, matrices: Sequence[Placed], out: Tensor) -> None:
    """Write a unit's exact matrices to ``out`` (uint8), one after another.

    Args:
        store: says the codec and the dtype.
        image: the unit's exact or residual image.
        tiles: its substitutes.
        matrices: its matrices.
        out: at least ``exact_bytes``.
    """
    if store.manifest.codec == "raw":
        out[: len(image)] = image
        return
    start = 0
    for residual, matrix in zip(split(image, len(matrices)), matrices, strict=True):
        size = matrix.n * matrix.k * store.dtype.itemsize
        weight = out[start : start + size].view(store.dtype).view(matrix.n, matrix.k)
        own = tiles[matrix.substitute_offset :][: tile_bytes(matrix.n, matrix.k)]
        decode_rows(residual, own, matrix.n, weight)
        start += size


def load_layer(store: Store, index: int) -> Iterator[Tensor]:
    """The exact matrices (n, k) of a layer, read and rebuilt: views of new memory.

    Raises:
        StoreError: an image is damaged or cannot be read.
    """
    return _load(
        store, layer_file(index, store.form), layer_file(index, "substitute"), layer_matrices(store.config)
    )


def load_chunk(store: Store, index: int) -> Tensor:
    """The exact rows (n, k) of a chunk of the output head, new; raises as ``load_layer`` does."""
    chunk = head_chunks(store.config, store.dtype.itemsize)[index]
    names = head_file(index, store.form), head_file(index, "substitute")
    return next(_load(store, *names, chunk_matrices(store, chunk)))


def _load(store: Store, exact: str, substitute: str, matrices: Sequence[Placed]) -> Iterator[Tensor]:
    """The exact matrices of a unit by the names of its two files."""
    memory = map_bytes(exact_bytes(store, matrices))
    rebuild(store, read_image(store, exact), read_image(store, substitute), matrices, memory)
    start = 0
    for matrix in matrices:
        size = matrix.n * matrix.k * store.dtype.itemsize
        yield memory[start : start + size].view(store.dtype).view(matrix.n, matrix.k)
        start += size


def read_image(store: Store, name: str) -> Tensor:
    """A whole image (uint8) in new memory, verified; raises as ``load_layer`` does."""
    image = map_bytes(store.manifest.files[name].n_bytes)
    store.load(name, image)
    return image
