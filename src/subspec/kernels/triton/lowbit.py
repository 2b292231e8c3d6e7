"""The product with a 4-bit substitute, on a CUDA device.

The twin of a product with ``dequantize`` in ``substitute/layout.py``, which has the layout: each weight
becomes exactly the value that it stands for, in the rows' dtype; sums are in fp32, over the groups in order,
rounded once.  Rows are computed in tiles of 16, as in ``linear``.  Knows nothing of how codes are chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspec.kernels.triton.launch import Launch, dot, rounded
from subspec.kernels.triton.linear import ROW_TILE, store_rounded
from subspec.kernels.triton.residual import GROUP, TILE_ROWS

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
_GROUPS = 4  # a step: with three stages, enough bytes on the way even for a few thousand outputs
_LINES = tl.constexpr(8)
TILE_WORDS = tl.constexpr(144)  # of 4 bytes
TILE_HALVES = tl.constexpr(288)  # of 2 bytes
SCALE_HALVES = tl.constexpr(256)  # where a tile's scales and mids start
MID_HALVES = tl.constexpr(272)


def lowbit_linear(x: Tensor, tiles: Tensor, n: int, k: int, bias: Tensor | None, out: Tensor) -> Launch:
    """X · Wᵀ + bias, with W the (n, k) weight that a substitute stands for.

    Args:
        x: (T, k), contiguous.
        tiles: (bytes,) uint8 on a multiple of 4 bytes, contiguous: the substitute.
        n: the weight's rows.
        k: its columns.
        bias: (n,), or None.
        out: (T, n) of x's dtype, written.
    """
    rows = x.shape[0]
    return Launch(
        multiply_codes,
        (triton.cdiv(rows, ROW_TILE.value), triton.cdiv(n, TILE_ROWS.value)),
        {
            "x": x, "words": tiles.view(torch.int32), "halves": tiles.view(torch.bfloat16), "bias": bias,
            "out": out, "rows": rows, "n": n, "k": k,
        },
        {"step": _GROUPS},
        OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def multiply_codes(x, words, halves, bias, out, rows, n, k, step: tl.constexpr):
    """A tile of rows by a stripe of tiles, ``step`` of them at a time; program (row tile, stripe)."""
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    output = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x_row = x + row.to(tl.int64)[:, None] * k
    groups = tl.cdiv(k, GROUP)
    first = tl.program_id(1).to(tl.int64) * groups
    total = tl.zeros((ROW_TILE, TILE_ROWS), tl.float32)
    for start in range(0, groups, step):
        column = start * GROUP + tl.arange(0, step * GROUP)[None, :]
        left = tl.load(x_row + column, mask=(row < rows)[:, None] & (column < k), other=0.0)
        right = _values(words, halves, first, start, groups, step).to(left.dtype)
        total = dot(left, tl.trans(right), total)
    store_rounded(total, bias, out, row, output, rows, n)


@triton.jit
def _values(words, halves, first, start, groups, step: tl.constexpr):
    """What tiles start … start + step − 1 of a stripe stand for: (16, 64 · step) bf16, 0 beyond its end."""
    row = tl.arange(0, TILE_ROWS)[:, None]
    line = tl.arange(0, step * _LINES)[None, :]
    tile = start + line // _LINES  # the tile of each line of codes
    place = first + tile
    inside = tile < groups
    packed = tl.load(words + place * TILE_WORDS + line % _LINES * TILE_ROWS + row, mask=inside, other=0)
    ends = halves + place * TILE_HALVES + row
    scale = tl.load(ends + SCALE_HALVES, mask=inside, other=0.0).to(tl.float32)  # (16, lines)
    mid = tl.load(ends + MID_HALVES, mask=inside, other=0.0).to(tl.float32)
    # A word has the codes of columns 8 t + j in its bytes' low nibbles, of 8 t + 4 + j in the high ones.
    column = tl.arange(0, 8)
    shift = (column & 3) * 8 + (column >> 2) * 4
    code = packed[:, :, None] >> shift[None, None, :] & 15  # (16, lines, 8)
    # 2^23 + code, by its bits: cheaper than a conversion, and exact.
    signed = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    value = signed * scale[:, :, None] + mid[:, :, None]
    return tl.reshape(rounded(value, tl.bfloat16), (TILE_ROWS, step * GROUP))
