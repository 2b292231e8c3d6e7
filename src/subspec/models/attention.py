"""Position-ordered attention over index lists.

Each query row reduces over its own keys in position order, whatever slots they sit in: first the committed
prefix, then the row's ancestors in the tree and itself, by depth.  That makes a row's bits independent of
the tree around it, of where the cache put its nodes, and of the other rows of the call.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix: torch.Tensor,
    paths: torch.Tensor,
    path_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of each row over the slots [0 … prefix) followed by its path.

    Args:
        q: (T, H, D) queries.
        k: (Hkv, S, D) keys of one layer by slot; ``v`` alike.
        v: see ``k``.
        prefix: (T,) int32, how many leading slots each row sees.
        paths: (T, P) int32, further slots, in position order; P may be 0.
        path_lens: (T,) int32, how many of them count.
        scale: factor on the products of queries and keys.

    Returns:
        (T, H, D).  One query a call: torch's attention of several rows rounds differently (docs/method.md).
    """
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        path = paths[row, : int(path_lens[row])].long()
        slots = torch.cat([torch.arange(int(prefix[row])), path])
        keys, values = k[:, slots], v[:, slots]  # (Hkv, n, D)
        one = q[row][None, :, None]  # (1, H, 1, D)
        out[row] = scaled_dot_product_attention(one, keys[None], values[None], scale=scale, enable_gqa=True)[
            0, :, 0
        ]
    return out
