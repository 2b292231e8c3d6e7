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
from subspec.planning.cost import EXPECTED_ROWS, Images, SweepCosts
from subspec.store.exact import chunk_matrices, exact_bytes, read_image, rebuild
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.substitute.exact import UnitProducts, scratch_bytes
from subspec.substitute.images import starts

# Read first: after an idle moment a disk, or a limit on it, may run ahead for a while.  Then read and timed.
SETTLING_BYTES, READ_BYTES = 256 << 20, 128 << 20
SETTLING_SWEEPS, READ_SWEEPS = 4, 2  # at most so many times what a sweep streams if nothing is resident
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

    Reads that layer and about 400 MB more, or six times what a sweep streams if that is less: a fraction of a
    second on a fast disk.  Holds three layers' memory while it runs, before anything else of the model is
    held.  Without native kernels nothing is tried: rebuilding is then slow beyond question.

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
    none = [None] * len(shapes)
    offsets = starts(image, len(shapes), len(image))

    def run(memory: torch.Tensor, is_plain: bool, rows: int = 1) -> None:
        made = products.of(memory, is_plain, offsets, tiles, shapes, none)
        for one, shape in zip(made, shapes, strict=True):
            one(torch.zeros((rows, shape.k), dtype=store.dtype))

    trials = (
        lambda: run(plain, True),
        lambda: run(image, False),
        lambda: run(plain, True, EXPECTED_ROWS),
    )
    times = [[_timed(trial) for trial in trials] for _ in range(ROUNDS)]
    plain_s, rebuilt_s, rows_s = (statistics.median(column) for column in zip(*times, strict=True))
    row_s = max(rows_s - plain_s, 0.0) / (EXPECTED_ROWS - 1)
    size = len(plain)
    return SweepCosts(_link_bytes_per_s(store), plain_s / size, rebuilt_s / size, row_s / size)


def _link_bytes_per_s(store: Store) -> float:
    """How fast a sweep's images come once the disk has settled."""
    images, sizes = store.images(), stored_images(store)
    sweep_bytes = sum(sizes.layers + sizes.chunks)
    settling = min(SETTLING_BYTES, SETTLING_SWEEPS * sweep_bytes)
    timed = min(READ_BYTES, READ_SWEEPS * sweep_bytes)
    measure_read(images, THREADS, REQUEST_BYTES, settling)
    return measure_read(images, THREADS, REQUEST_BYTES, timed).bytes_per_s


def _timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
