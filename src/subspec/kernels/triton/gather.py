"""Rows of an embedding table, on a CUDA device.

The twin of ``table[tokens]``.  The table may lie in pinned host memory: then a program reads its row over the
bus, and nothing but the rows asked for moves.  Knows nothing of tokens' meaning.
"""

import triton
import triton.language as tl
from torch import Tensor

from subspec.kernels.triton.launch import Launch

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_PART = 1024


def gather_rows(table: Tensor, tokens: Tensor, out: Tensor) -> Launch:
    """Copy rows, bit for bit.

    Args:
        table: (V, C), contiguous, on the device or in pinned host memory.
        tokens: (T,) int32 or int64, 0 to V - 1, not checked; read on the device.
        out: (T, C) of the table's dtype, written.
    """
    rows, width = out.shape
    return Launch(
        copy_part,
        (rows, triton.cdiv(width, _PART)),
        {"out": out, "table": table, "tokens": tokens, "width": width},
        {"part": _PART},
        OPTIONS,
    )


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def copy_part(out, table, tokens, width, part: tl.constexpr):
    """``part`` columns of a row; program (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(tokens + row).to(tl.int64) * width
    column = tl.program_id(1) * part + tl.arange(0, part)
    inside = column < width
    tl.store(out + row * width + column, tl.load(table + source + column, mask=inside), mask=inside)
