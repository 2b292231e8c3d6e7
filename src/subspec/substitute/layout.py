"""The code layout of a 4-bit substitute: the same bytes on disk, in memory and under the product kernel.

A substitute stands for a weight of N rows (output features) and K columns (input features).  Every run of 64
columns of a row is a *group*; it has a scale s and a mid m, both bf16, and each of its weights a code q from
0 to 15.  The weight's value is::

    bf16((q - 8) * s + m)        product exact in fp32, one rounding of the sum to fp32, one to bf16

so every device computes the same value; models in another dtype convert that bf16 value.

N is padded to a multiple of 16 and K to a multiple of 64.  Padding codes are 8; padding rows have s = m = 0
(their values are 0), padding columns share the s and m of their row's last group and are never read as
values: a product must take zeros for the activations there.

The bytes are a sequence of tiles in the order ``[ceil(N / 16)][ceil(K / 64)]``, without gaps; the first one
lies at a multiple of 64 bytes.  A tile holds 16 rows by 64 columns in 576 bytes:

====================  ================================================================================
bytes 0 to 511        8 lines of 64 bytes.  Byte ``64 t + 4 r + j`` (line t = 0..7, row r = 0..15,
                      j = 0..3) has the code of column ``8 t + j`` in its low nibble and that of column
                      ``8 t + 4 + j`` in its high nibble.
bytes 512 to 543      16 scales, bf16, little endian: one a row
bytes 544 to 575      16 mids, bf16, little endian: one a row
====================  ================================================================================

The functions here are the reference; the fast twins of ``dequantize`` and ``dequantize_rows`` are in
``kernels.lowbit``.  Knows nothing of how codes are chosen, nor of products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64
TILE_ROWS = 16
CODE_BYTES = TILE_ROWS * GROUP // 2
TILE_BYTES = CODE_BYTES + 2 * 2 * TILE_ROWS


@dataclass(frozen=True)
class Placed:
    """A weight (n, k) among others, and the byte where its substitute starts in theirs."""

    n: int
    k: int
    substitute_offset: int

    def own_tiles(self, tiles: Tensor) -> Tensor:
        """Its substitute among theirs, a view."""
        return tiles[self.substitute_offset :][: tile_bytes(self.n, self.k)]


def groups(k: int) -> int:
    """Groups in a row of k columns."""
    return -(-k // GROUP)


def tile_bytes(n: int, k: int) -> int:
    """Bytes of the substitute of an (n, k) weight."""
    return -(-n // TILE_ROWS) * groups(k) * TILE_BYTES


def pack(codes: Tensor, scales: Tensor, mids: Tensor) -> Tensor:
    """Lay codes, scales and mids out as tiles.

    Args:
        codes: (N, K) uint8, 0 to 15.
        scales: (N, ceil(K / 64)) bf16.
        mids: like scales.

    Returns:
        (tile_bytes(N, K),) uint8, a new tensor.
    """
    n, k = codes.shape
    g, missing_rows = groups(k), -n % TILE_ROWS
    codes = F.pad(codes, (0, -k % GROUP, 0, missing_rows), value=8)
    halves = codes.view(-1, TILE_ROWS, g, 8, 2, 4)  # (N/16, row, G, line, half, j)
    lines = halves[..., 0, :] | halves[..., 1, :] << 4  # (N/16, row, G, line, j)
    lines = lines.permute(0, 2, 3, 1, 4).reshape(-1, g, CODE_BYTES)
    ends = [_by_tile(F.pad(part.bfloat16(), (0, 0, 0, missing_rows))) for part in (scales, mids)]
    return torch.cat([lines, *ends], dim=-1).flatten()


def _by_tile(part: Tensor) -> Tensor:
    """Scales or mids (padded N, G) as the bytes of each tile, (N/16, G, 32)."""
    return part.view(-1, TILE_ROWS, part.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def unpack(tiles: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack``: codes (n, k) uint8, scales and mids (n, ceil(k / 64)) bf16, new tensors."""
    g = groups(k)
    tiles = tiles.view(-1, g, TILE_BYTES)
    lines = tiles[..., :CODE_BYTES].reshape(-1, g, 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    codes = torch.stack([lines & 15, lines >> 4], dim=-2)  # (N/16, row, G, line, half, j)
    codes = codes.reshape(-1, g * GROUP)[:n, :k].contiguous()
    ends = tiles[..., CODE_BYTES:].contiguous().view(torch.bfloat16).view(-1, g, 2, TILE_ROWS)
    scales, mids = (ends[:, :, i].transpose(1, 2).reshape(-1, g)[:n].contiguous() for i in (0, 1))
    return codes, scales, mids


def values(codes: Tensor, scales: Tensor, mids: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that codes stand for: (N, K) in ``dtype``."""
    k = codes.shape[1]
    scale, mid = (part.float().repeat_interleave(GROUP, dim=1)[:, :k] for part in (scales, mids))
    return ((codes.float() - 8) * scale + mid).bfloat16().to(dtype)


def dequantize(tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The weights that tiles stand for: (n, k) in ``dtype``, a new tensor.  Reference."""
    return values(*unpack(tiles, n, k), dtype)


def dequantize_rows(tiles: Tensor, n: int, k: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some output rows of ``dequantize``: (len(rows), k) in ``dtype``, a new tensor.  Reference.

    Args:
        tiles: the substitute of an (n, k) weight.
        n: its rows.
        k: its columns.
        rows: int64 row numbers, 0 to n - 1, in any order and repeated at will.
        dtype: of the result.

    Raises:
        IndexError: a row number is out of range.
    """
    check_rows(rows, n)
    stripes = tiles.view(-1, groups(k) * TILE_BYTES)[rows // TILE_ROWS]
    codes, scales, mids = unpack(stripes, stripes.shape[0] * TILE_ROWS, k)
    mine = torch.arange(len(rows), device=rows.device) * TILE_ROWS + rows % TILE_ROWS
    return values(codes[mine], scales[mine], mids[mine], dtype)


def check_rows(rows: Tensor, n: int) -> None:
    """Raise IndexError unless all row numbers lie in 0 to n - 1."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < n:
        raise IndexError(
            f"row numbers reach from {int(rows.min())} to {int(rows.max())}; the substitute has {n} rows"
        )
