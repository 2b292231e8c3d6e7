"""Position-ordered attention over index lists, on a CUDA device.

The twin of ``attend_reference`` in ``models/attention.py``.  A program has one query row and one key head;
the query heads that share it are the rows of its matrix products.  It goes over the row's keys in position
order, the prefix and then the path as one sequence, in blocks of a length that head size and dtype alone
decide.  So a row's bits depend on neither the other rows, nor the slots of its path, nor the grid.  Knows
nothing of caches.
"""

import triton
import triton.language as tl
from torch import Tensor

from subspec.kernels.triton.launch import Launch, block, dot, rounded

MAX_HEAD_DIM = 256
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
_BLOCK_BYTES = 16384  # of keys in a block: two stages of keys and values fit every device since sm_80
_MOST_KEYS = 64
_LOG2_E = 1.4426950408889634


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Tensor,
    paths: Tensor,
    path_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Launch:
    """Attention of each row over the slots [0 … prefix) followed by its path; a row without keys gives zeros.

    Args:
        q: (T, H, D) queries, contiguous; D at most 256.
        k: (Hkv, S, D), heads may lie apart; ``v`` alike.
        v: see ``k``.
        prefix: (T,) int32, how many leading slots each row sees; read on the device.
        paths: (T, P) int32, further slots, in position order; P may be 0.
        path_lens: (T,) int32, how many of them count.
        scale: factor on the products of queries and keys.
        out: (T, H, D), written.
    """
    rows, heads, dim = q.shape
    kv_heads, group = k.shape[0], heads // k.shape[0]
    width = block(dim)
    return Launch(
        attend_row,
        (rows, kv_heads),
        {
            "q": q, "k": k, "v": v, "prefix": prefix, "paths": paths, "path_lens": path_lens, "out": out,
            "k_stride": k.stride(0), "v_stride": v.stride(0), "capacity": paths.shape[1],
            "factor": scale * _LOG2_E,
        },
        {
            "heads": heads, "group": group, "dim": dim, "group_block": block(group), "dim_block": width,
            "key_block": min(_MOST_KEYS, _BLOCK_BYTES // (width * q.element_size())),
        },
        OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def attend_row(
    q,
    k,
    v,
    prefix,
    paths,
    path_lens,
    out,
    k_stride,
    v_stride,
    capacity,
    factor,
    heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    group_block: tl.constexpr,
    dim_block: tl.constexpr,
    key_block: tl.constexpr,
):
    """One row's queries of one key head; program (row, key head)."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, group_block)[:, None], tl.arange(0, dim_block)[None, :]
    inside = (head < group) & (column < dim)
    at = (row * heads + kv_head * group + head) * dim + column
    queries = tl.load(q + at, mask=inside, other=0.0)  # (group, D)
    leading, path = tl.load(prefix + row), paths + row * capacity
    count = leading + tl.load(path_lens + row)

    top = tl.full((group_block,), float("-inf"), tl.float32)
    weight = tl.zeros((group_block,), tl.float32)
    mixed = tl.zeros((group_block, dim_block), tl.float32)
    for start in range(0, count, key_block):
        position = start + tl.arange(0, key_block)
        seen = position < count
        from_path = tl.load(path + (position - leading), mask=seen & (position >= leading), other=0)
        slot = tl.where(position < leading, position, from_path).to(tl.int64)
        cell = slot[:, None] * dim + column
        full = seen[:, None] & (column < dim)
        keys = tl.load(k + kv_head * k_stride + cell, mask=full, other=0.0)
        values = tl.load(v + kv_head * v_stride + cell, mask=full, other=0.0)
        scores = dot(queries, tl.trans(keys), tl.zeros((group_block, key_block), tl.float32)) * factor
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        fading, share = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
        weight = weight * fading + tl.sum(share, axis=1)
        mixed = dot(rounded(share, values.dtype), values, mixed * fading[:, None])
        top = higher
    mixed = mixed / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out + at, rounded(mixed, out.dtype.element_ty), mask=inside)
