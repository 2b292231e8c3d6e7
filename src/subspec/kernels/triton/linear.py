"""The exact product in tiles of 16 rows, on a CUDA device.

Canonical by construction: whatever the number of rows, each is computed in a tile of 16 (missing ones are
zeros), over the columns in one fixed order, accumulated in fp32 and rounded once.  It is what a faster
product is to be compared with (``models/linear.py``).  Knows nothing of where weights come from.
"""

import triton
import triton.language as tl
from torch import Tensor

from subspec.kernels.triton.launch import Launch, dot, rounded

ROW_TILE = tl.constexpr(16)
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
_OUTPUTS = 32
_BLOCK_BYTES = 256  # of a row of the weight in a step


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Launch:
    """X · weightᵀ + bias.

    Args:
        x: (T, K), contiguous.
        weight: (N, K) of x's dtype, contiguous.
        bias: (N,) or None.
        out: (T, N) of x's dtype, written.
    """
    rows, n = out.shape
    return Launch(
        multiply,
        (triton.cdiv(rows, ROW_TILE.value), triton.cdiv(n, _OUTPUTS)),
        {"x": x, "weight": weight, "bias": bias, "out": out, "rows": rows, "n": n, "k": x.shape[1]},
        {"outputs": _OUTPUTS, "columns": _BLOCK_BYTES // x.element_size()},
        OPTIONS,
    )


@triton.jit(do_not_specialize=["rows"])
def multiply(x, weight, bias, out, rows, n, k, outputs: tl.constexpr, columns: tl.constexpr):
    """A tile of rows by ``outputs`` outputs; program (row tile, block of outputs)."""
    row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    output = tl.program_id(1) * outputs + tl.arange(0, outputs)
    x_row, w_row = x + row.to(tl.int64)[:, None] * k, weight + output.to(tl.int64)[:, None] * k
    total = tl.zeros((ROW_TILE, outputs), tl.float32)
    for start in range(0, k, columns):
        column = start + tl.arange(0, columns)[None, :]
        left = tl.load(x_row + column, mask=(row < rows)[:, None] & (column < k), other=0.0)
        right = tl.load(w_row + column, mask=(output < n)[:, None] & (column < k), other=0.0)
        total = dot(left, tl.trans(right), total)
    store_rounded(total, bias, out, row, output, rows, n)


@triton.jit
def store_rounded(total, bias, out, row, output, rows, n):
    """Add the bias, if there is one, and store what lies inside (rows, n), rounded once."""
    if bias is not None:
        total += tl.load(bias + output, mask=output < n, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * n + output[None, :]
    inside = (row < rows)[:, None] & (output < n)[None, :]
    tl.store(at, rounded(total, out.dtype.element_ty), mask=inside)
