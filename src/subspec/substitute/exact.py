"""The exact products of a unit: of plain weights, or of weights kept as substitute and residual.

With the native kernels a few rows at a time are rebuilt and multiplied while they are in the cache: there is
no full-size copy of the weight.  Without them, and on a device, the whole weight is rebuilt into scratch
memory, so that the product has the very shape that was found row-invariant.  Either way the result has the
bits of the product with the plain weight.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from subspec.kernels import device
from subspec.kernels.native import kernels
from subspec.kernels.residual import residual_kernels
from subspec.models.decoder import RowProduct
from subspec.models.linear import ExactProduct
from subspec.substitute.images import plain_matrices, split
from subspec.substitute.layout import Placed
from subspec.substitute.residual import decode_rows

_BLOCK_ROWS = 64  # that a thread of the native kernel rebuilds at once, unless they are above
_BLOCK_BYTES = 512 * 1024


def scratch_bytes(shapes: Iterable[tuple[int, int]], itemsize: int) -> int:
    """Memory that products take which rebuild weights of these shapes (N, K), beside its arguments."""
    if kernels().library is None:
        return max(n * k for n, k in shapes) * itemsize
    widest = max(k for _, k in shapes) * itemsize
    return torch.get_num_threads() * max(16 * widest, min(_BLOCK_ROWS * widest, _BLOCK_BYTES))


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
        starts: Sequence[int],
        tiles: Tensor,
        matrices: Sequence[Placed],
        biases: Sequence[Tensor | None],
    ) -> list[RowProduct]:
        """The products with a unit's matrices, (T, K) → (T, N), valid as long as ``memory`` is.

        Args:
            memory: the plain weights one after another, or the unit's residual image; uint8.
            plain: which.
            starts: where each residual starts in an image.
            tiles: the unit's substitutes.
            matrices: its matrices.
            biases: theirs.
        """
        if not plain:
            residuals = split(memory, starts)
            return [
                partial(self._rebuilt, residual, matrix.own_tiles(tiles), matrix, bias)
                for residual, matrix, bias in zip(residuals, matrices, biases, strict=True)
            ]
        weights = plain_matrices(memory, matrices, self._dtype)
        return [partial(self._plain, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def _plain(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The product with a plain weight."""
        return self._product(x, weight, bias)

    def _rebuilt(
        self, residual: Tensor, tiles: Tensor, matrix: Placed, bias: Tensor | None, x: Tensor
    ) -> Tensor:
        """The product with a weight that is rebuilt for it."""
        native = residual_kernels()
        if self._product.native and native is not None:
            return native.linear(x, residual, tiles, matrix.n, bias)
        assert self._scratch is not None
        (weight,) = plain_matrices(self._scratch, [matrix], self._dtype)
        if weight.device.type == "cuda":
            device.decode_residual(residual, tiles, matrix.n, matrix.k, weight)
        else:
            decode_rows(residual, tiles, matrix.n, weight)
        return self._product(x, weight, bias)
