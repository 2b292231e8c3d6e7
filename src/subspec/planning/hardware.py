"""What a plan rests on: the sizes of a store's units, and how fast they come and compute on this machine."""

import statistics
import time
from collections.abc import Callable

import torch

from subspec.kernels.native import kernels
from subspec.memory.arena import map_bytes
from subspec.memory.disk import measure_read
from subspec.memory.streamer import REQUEST_BYTES, THREADS
from subspec.memory.tiers import page_aligned
from subspec.models.linear import ExactProduct
from subspec.planning.cost import Images, SweepCosts
from subspec.store.exact import chunk_matrices, exact_bytes, read_image, rebuild
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.substitute.exact import UnitProducts, scratch_bytes

READ_BYTES = 96 << 20
ROUNDS = 3


def stored_images(store: Store) -> Images:
    """Sizes of a store's units."""
    chunks = head_chunks(store.config, store.dtype.itemsize)
    files, form = store.manifest.files, store.form
    rebuilt = store.manifest.codec == "residual"
    shapes = [
        (shape.n, shape.k) for shape in [*layer_matrices(store.config), *chunk_matrices(store, chunks[0])]
    ]
    return Images(
        layers=tuple(files[layer_file(index, form)].n_bytes for index in range(store.config.layers)),
        chunks=tuple(files[head_file(index, form)].n_bytes for index in range(len(chunks))),
        plain_layer=exact_bytes(store, layer_matrices(store.config)),
        plain_chunks=tuple(exact_bytes(store, chunk_matrices(store, chunk)) for chunk in chunks),
        rebuilt=rebuilt,
        scratch=page_aligned(scratch_bytes(shapes, store.dtype.itemsize)) if rebuilt else 0,
    )


def measure_costs(store: Store) -> SweepCosts:
    """The costs of a sweep over a residual store, from a short trial on its first layer.

    Reads that layer and about 100 MB more: a fraction of a second on a fast disk.  Holds three layers' memory
    while it runs, before anything else of the model is held.  Without native kernels nothing is tried:
    rebuilding is then slow beyond question.

    Raises:
        StoreError: an image is damaged or cannot be read.
    """
    if kernels().library is None:
        return SweepCosts()
    shapes = layer_matrices(store.config)
    image, tiles = (read_image(store, layer_file(0, form)) for form in (store.form, "substitute"))
    plain = map_bytes(exact_bytes(store, shapes))
    rebuild(store, image, tiles, shapes, plain)
    products = UnitProducts(ExactProduct("native", native=True), store.dtype, None)
    rows = [torch.zeros((1, shape.k), dtype=store.dtype) for shape in shapes]
    none = [None] * len(shapes)

    def run(memory: torch.Tensor, is_plain: bool) -> None:
        for one, x in zip(products.of(memory, is_plain, tiles, shapes, none), rows, strict=True):
            one(x)

    times = [(_timed(lambda: run(plain, True)), _timed(lambda: run(image, False))) for _ in range(ROUNDS)]
    plain_s, rebuilt_s = (statistics.median(column) for column in zip(*times, strict=True))
    link = measure_read(store.images(), THREADS, REQUEST_BYTES, READ_BYTES)
    return SweepCosts(link.bytes_per_s, plain_s / len(plain), rebuilt_s / len(plain))


def _timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
