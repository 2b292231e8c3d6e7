"""Products with a substitute, and the choice of their kernel.

The draft's linear layers: the decoder asks for ``x @ W.T + bias`` and gets it from the 4-bit tiles, without a
second copy of the weights.  With a native library the product is W4A8 (``substitute_linear_reference`` says
exactly what that is); without one the tiles are dequantized a few rows at a time and multiplied by torch;
a CUDA device has kernels that do the same (``device_products``), or may take another way (``choice``).
The two differ by the rounding of activations to 8 bits, about 0.6 % of a result, which a draft can bear.
The target never comes here.

Knows nothing of how codes were chosen, where the tiles' memory comes from, or which layer this is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from subspec.kernels.lowbit import lowbit_kernels
from subspec.substitute.device_products import Tiles, Way
from subspec.substitute.layout import (
    GROUP,
    TILE_ROWS,
    check_rows,
    dequantize,
    dequantize_rows,
    groups,
    tile_bytes,
    unpack,
)

TINY = 2.0**-100
_CHUNK = 1 << 18  # weights dequantized at a time by the fallback: a workspace of 6 MB


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8, symmetrically per group of 64.  Reference.

    A group's scale is its largest magnitude / 127, its codes ``round_half_even(x * (127 / largest))``; a
    group below 2^-100 has scale 0 and codes 0, one with an infinity or NaN has scale NaN and codes 0.

    Args:
        x: (T, K); missing columns of the last group count as zeros.

    Returns:
        codes (T, G, 64) int8 and scales (T, G) fp32.
    """
    grouped = F.pad(x.float(), (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    largest = grouped.abs().amax(-1)
    finite = grouped.isfinite().all(-1)
    used = finite & (largest >= TINY)
    factor = torch.where(
        used, torch.full_like(largest, 127) / largest, 0.0
    )  # `127 / largest` would round twice
    codes = torch.where(finite[..., None], grouped, 0.0) * factor[..., None]
    scales = torch.where(used, largest / 127, 0.0).masked_fill(~finite, torch.nan)
    return codes.round().to(torch.int8), scales


def substitute_linear_reference(
    x: Tensor, tiles: Tensor, n: int, k: int, bias: Tensor | None = None
) -> Tensor:
    """What the W4A8 product computes, slowly: the rounded activations times the substitute.

    With codes q, scales s and mids m of the weight, and codes xq and scales xs of the activations, by group::

        y = Σ_g (s · xs) · Σ q · xq  +  Σ_g (m - 8 s) · (xs · Σ xq)  +  bias

    in fp32, the sums over a group in exact integers, with one rounding of y to x's dtype.  (The codes are
    unsigned: with the exact Σ x in the second term their mean of 8 would double the error.)  A row of x with
    an infinity or NaN gives a row of NaN.

    Args:
        x: (T, k) bf16, fp16 or fp32.
        tiles: substitute of an (n, k) weight.
        n: output features.
        k: input features.
        bias: (n,) or None.

    Returns:
        (T, n) in x's dtype.
    """
    codes, scales, mids = unpack(tiles, n, k)
    q = F.pad(codes, (0, -k % GROUP), value=8).view(n, groups(k), GROUP)
    xq, xs = quantize_activations(x)
    inner = torch.einsum("tgi,ngi->tng", xq.double(), q.double()).float()  # exact: at most 64 * 15 * 127
    sums = xs * xq.sum(-1, dtype=torch.int32).float()
    s, m = scales.float(), mids.float()
    y = ((s * xs[:, None]) * inner).sum(-1) + ((m - 8 * s) * sums[:, None]).sum(-1)  # (T, n)
    return (y if bias is None else y + bias.float()).to(x.dtype)


class SubstituteLinear:
    """A linear layer over a substitute: ``layer(x)`` is ``x @ W.T + bias`` with 4-bit W.

    Args:
        tiles: (tile_bytes(n, k),) uint8, contiguous, at a multiple of 64 bytes on the CPU; held as a view.
        n: output features.
        k: input features.
        bias: (n,) in the model's dtype, or None.

    Attributes:
        native: whether the products are W4A8 by a native kernel.
        native_bias: the bias as these take it, (n,) fp32, or None.
    """

    def __init__(self, tiles: Tensor, n: int, k: int, bias: Tensor | None = None) -> None:
        if tiles.dtype != torch.uint8 or tiles.numel() != tile_bytes(n, k) or not tiles.is_contiguous():
            raise ValueError(
                f"a {n} x {k} substitute is {tile_bytes(n, k)} contiguous bytes, not {tuple(tiles.shape)}"
            )
        self.tiles, self.n, self.k, self.bias = tiles, n, k, bias
        self._kernels = lowbit_kernels() if tiles.device.type == "cpu" else None
        self._address = 0 if self._kernels is None else tiles.data_ptr()
        self.native_bias = None if bias is None else bias.float().contiguous()
        self.native = self._kernels is not None
        self._device_product = Tiles().pack(tiles, n, k) if tiles.device.type == "cuda" else None

    def pack(self, way: Way, dtype: torch.dtype) -> None:
        """On a device: from now on, multiply another way, in ``dtype``.

        The way may put its form of the weight into the tiles' memory: nothing else may need them any more.
        """
        assert self.tiles.device.type == "cuda"
        self._device_product = way.pack(self.tiles, self.n, self.k, dtype)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply.

        Args:
            x: (T, k) with unit stride in its last dimension, in the model's dtype.
            out: (T, n) to write to, contiguous.

        Returns:
            (T, n), ``out`` if given, else new.
        """
        if out is None:
            out = torch.empty(x.shape[0], self.n, dtype=x.dtype, device=x.device)
        if self._device_product is not None:
            self._device_product(x, self.bias, out)
            return out
        if self._kernels is None:
            return self._chunked(x, out)
        self._kernels.product(
            x if x.stride(1) == 1 else x.contiguous(),
            self._address,
            self.n,
            self.native_bias,
            out,
        )
        return out

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantized output rows (len(indices), k), new; indices int64, 0 to n - 1.

        Reads embedding rows from the substitute of a tied head.

        Raises:
            IndexError: an index is out of range.
        """
        if self._kernels is None:
            return dequantize_rows(self.tiles, self.n, self.k, indices, dtype)
        check_rows(indices, self.n)
        out = torch.empty(len(indices), self.k, dtype=dtype)
        self._kernels.values(self._address, out, rows=indices.contiguous())
        return out

    def _chunked(self, x: Tensor, out: Tensor) -> Tensor:
        """The fallback: dequantize some stripes of 16 rows at a time, and let torch multiply."""
        stripe_bytes = tile_bytes(1, self.k)
        step = max(1, _CHUNK // (groups(self.k) * GROUP * TILE_ROWS)) * TILE_ROWS
        for first in range(0, self.n, step):
            last = min(first + step, self.n)
            part = self.tiles[first // TILE_ROWS * stripe_bytes : -(-last // TILE_ROWS) * stripe_bytes]
            bias = None if self.bias is None else self.bias[first:last]
            out[:, first:last] = F.linear(x, dequantize(part, last - first, self.k, x.dtype), bias)
        return out
