"""Exact weights from a store's images, whatever codec they are kept in."""

from collections.abc import Sequence

from torch import Tensor

from subspec.memory.arena import map_bytes
from subspec.memory.tiers import page_aligned
from subspec.store.layout import Chunk, head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.substitute.images import plain_matrices, split, starts
from subspec.substitute.layout import Placed
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
    weights = plain_matrices(out, matrices, store.dtype)
    residuals = split(image, starts(image, len(matrices), len(image)))
    for residual, matrix, weight in zip(residuals, matrices, weights, strict=True):
        decode_rows(residual, matrix.own_tiles(tiles), matrix.n, weight)


def load_layer(store: Store, index: int) -> list[Tensor]:
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
    return _load(store, *names, chunk_matrices(store, chunk))[0]


def _load(store: Store, exact: str, substitute: str, matrices: Sequence[Placed]) -> list[Tensor]:
    """The exact matrices of a unit by the names of its two files."""
    memory = map_bytes(exact_bytes(store, matrices))
    rebuild(store, read_image(store, exact), read_image(store, substitute), matrices, memory)
    return plain_matrices(memory, matrices, store.dtype)


def read_image(store: Store, name: str) -> Tensor:
    """A whole image (uint8) in new memory, verified; raises as ``load_layer`` does."""
    image = map_bytes(store.manifest.files[name].n_bytes)
    store.load(name, image)
    return image
