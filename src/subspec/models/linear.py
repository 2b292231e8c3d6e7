"""The exact product, canonical: a row's result must not depend on the other rows of the call.

The native kernel, and the device's own, are so by construction.  Torch's product is so only from some number
of rows up, or for calls of one fixed row count; which, depends on the library build, the processor and the
shape.  So the start-up check tries the model's own shapes and picks the smallest safe way (docs/method.md);
``subspec doctor`` shows what it found.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from subspec.errors import ModelError
from subspec.kernels import device, exact
from subspec.kernels.native import kernels

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_LEAST_ROWS = (1, 2, 4, 8, 16)
_FIXED_ROWS = (16, 32, 64)
_MOST_ROWS = 256  # of one call of torch's: what the check has not seen is not made
_CHECK_ROWS = 257  # of the long call that the short ones are compared with
_CHECK_CALLS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 128, 256)
_CHECK_BLOCK = 256  # rows of random weights, repeated: what may differ is the path taken, not the values


@dataclass(frozen=True)
class ExactProduct:
    """x · weightᵀ + bias with rows independent of each other.

    Attributes:
        name: the way: ``native``, ``torch, at least N rows`` or ``torch, N rows a call``.
        least_rows: shorter calls are padded with zero rows to this many; longer ones are cut.
        rows_a_call: if set, every call has exactly this many rows.
        native: by the CPU's kernel; ``tiled``: by the device's, in tiles of a fixed number of rows.
    """

    name: str
    least_rows: int = 1
    rows_a_call: int | None = None
    native: bool = False
    tiled: bool = False

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(T, K) times (N, K) transposed, plus (N,): (T, N) in x's dtype."""
        if self.native:
            return exact.linear(x, weight, bias)
        if self.tiled:
            return device.exact_linear(x, weight, bias)
        least, most = self.rows_a_call or self.least_rows, self.rows_a_call or _MOST_ROWS
        tiles = [F.linear(_padded(tile, least), weight, bias) for tile in torch.split(x, most)]
        return (torch.cat(tiles) if len(tiles) > 1 else tiles[0])[: x.shape[0]]


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """X with zero rows added up to ``rows``."""
    return x if x.shape[0] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


def choose_product(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    scratch: torch.Tensor,
    biased: Iterable[tuple[int, int]] = (),
) -> ExactProduct:
    """The first way that is row-invariant on every shape, fastest first.

    On a device only calls of one fixed row count are tried: from some number of rows up means another kernel
    there.  If none passes, it is the device's own kernel, row-invariant by construction.

    Args:
        shapes: (N, K) of the model's weights; of the head, its chunks.
        dtype: of weights and rows.
        scratch: uint8 memory of at least the largest weight, where products are computed; overwritten.
        biased: of the shapes, those that come with a bias.

    Raises:
        ModelError: no way passes on this build of torch and this processor.
    """
    distinct = [(shape, False) for shape in sorted(set(shapes))] + [(shape, True) for shape in set(biased)]
    ways = [ExactProduct(f"torch, {rows} rows a call", rows_a_call=rows) for rows in _FIXED_ROWS]
    if scratch.device.type == "cpu":
        least = [ExactProduct(f"torch, at least {rows} rows", least_rows=rows) for rows in _LEAST_ROWS]
        native = [ExactProduct("native", native=True)] if kernels().library is not None else []
        ways = [*native, *least, *ways]
    else:
        ways.append(ExactProduct("device, 16 rows a tile", tiled=True))
    for way in ways:
        if all(row_invariant(way, shape, dtype, scratch, biased=has) for shape, has in distinct):
            return way
    raise ModelError(
        f"no exact product is row-invariant in {dtype} on this processor with torch {torch.__version__} "
        f"(tried {', '.join(way.name for way in ways)}): install a C++ compiler and run: "
        "python -m subspec.kernels.build"
    )


def row_invariant(
    way: ExactProduct, shape: tuple[int, int], dtype: torch.dtype, scratch: torch.Tensor, *, biased: bool
) -> bool:
    """Whether calls of many row counts, at shifted places, give the bits of one long call.

    Every sum cancels: the second half of each row and weight is the first half in another order, one of them
    negated.  What is left is rounding alone, so that any other order of summation shows in nearly every
    result; of ordinary sums in bf16, one in a thousand would.  A bias of zeros hides none of that.  A finding
    on this build, processor and thread count.
    """
    n, k = shape
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(k // 2, generator=generator)

    def mirrored(rows: int, sign: float) -> torch.Tensor:
        first = torch.randn((rows, k - k // 2), generator=generator)
        return torch.cat([first, sign * first[:, half]], dim=1).to(dtype)

    weight = scratch[: n * k * dtype.itemsize].view(dtype).view(n, k)
    block, x = mirrored(min(n, _CHECK_BLOCK), 1.0), mirrored(_CHECK_ROWS, -1.0).to(scratch.device)
    for part in torch.split(weight, len(block)):
        part.copy_(block[: len(part)])
    bias = torch.zeros(n, dtype=dtype, device=scratch.device) if biased else None
    whole = way(x, weight, bias)
    for rows in _CHECK_CALLS:
        start = (3 * rows) % (_CHECK_ROWS - rows + 1)
        if not torch.equal(way(x[start : start + rows], weight, bias), whole[start : start + rows]):
            return False
    return True
