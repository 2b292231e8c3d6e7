"""The exact products of a unit: of plain weights, or of weights kept as substitute and residual.

With the native kernels a few rows at a time are rebuilt and multiplied while they are in the cache: there is
no full-size copy of the weight.  Without them the whole weight is rebuilt into scratch memory, so that the
product has the very shape that was found row-invariant.  Either way the result has the bits of the product
with the plain weight.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from subspec.kernels.native import kernels
from subspec.kernels.residual import residual_kernels
from subspec.models.decoder import RowProduct
from subspec.models.linear import ExactProduct
from subspec.substitute.images import split
from subspec.substitute.layout import tile_bytes
from subspec.substitute.residual import decode_rows

_BLOCK_ROWS = 64  # that a thread of the native kernel rebuilds at once, unless they are above
_BLOCK_BYTES = 512 * 1024


def scratch_bytes(shapes: Iterable[tuple[int, int]], itemsize: int) -> int:
    """Memory that products take which rebuild weights of these shapes (N, K), beside its arguments."""
    if kernels().library is None:
        return max(n * k for n, k in shapes) * itemsize
    widest = max(k for _, k in shapes) * itemsize
    return torch.get_num_threads() * max(16 * widest, min(_BLOCK_ROWS * widest, _BLOCK_BYTES))


@dataclass(frozen=True)
class Shape:
    """One matrix (n, k) of a unit, and where its substitute starts in the unit's, in bytes."""

    n: int
    k: int
    substitute_offset: int


class UnitProducts:
    """Hands out a unit's exact products, whatever form its weights are in.

    Args:
        product: how the target multiplies.
        dtype: of the weights.
        scratch: uint8 memory for the largest weight, where ``product`` is not native and weights are rebuilt.
    """

    def __init__(self, product: ExactProduct, dtype: torch.dtype, scratch: Tensor | None) -> None:
        self._product, self._dtype, self._scratch = product, dtype, scratch

    def of(
        self,
        memory: Tensor,
        plain: bool,
        tiles: Tensor,
        shapes: Sequence[Shape],
        biases: Sequence[Tensor | None],
    ) -> list[RowProduct]:
        """The products with a unit's matrices, (T, K) → (T, N), valid as long as ``memory`` is.

        Args:
            memory: the plain weights one after another, or the unit's residual image; uint8.
            plain: which.
            tiles: the unit's substitutes.
            shapes: its matrices.
            biases: theirs.
        """
        if not plain:
            residuals = split(memory, len(shapes))
            return [
                partial(self._rebuilt, residual, tiles[shape.substitute_offset :], shape, bias)
                for residual, shape, bias in zip(residuals, shapes, biases, strict=True)
            ]
        products: list[RowProduct] = []
        start = 0
        for shape, bias in zip(shapes, biases, strict=True):
            size = shape.n * shape.k * self._dtype.itemsize
            weight = memory[start : start + size].view(self._dtype).view(shape.n, shape.k)
            products.append(partial(self._plain, weight, bias))
            start += size
        return products

    def _plain(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The product with a plain weight."""
        return self._product(x, weight, bias)

    def _rebuilt(
        self, residual: Tensor, tiles: Tensor, shape: Shape, bias: Tensor | None, x: Tensor
    ) -> Tensor:
        """The product with a weight that is rebuilt for it."""
        own = tiles[: tile_bytes(shape.n, shape.k)]
        native = residual_kernels()
        if self._product.native and native is not None:
            return native.linear(x, residual, own, shape.n, bias)
        assert self._scratch is not None
        size = shape.n * shape.k * self._dtype.itemsize
        weight = self._scratch[:size].view(self._dtype).view(shape.n, shape.k)
        return self._product(x, decode_rows(residual, own, shape.n, shape.k, weight), bias)
