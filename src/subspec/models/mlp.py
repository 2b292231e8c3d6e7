"""The gated feed-forward's activation."""

import torch


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    Args:
        gate_up: (T, 2F): the gate's F columns, then the up projection's.

    Returns:
        (T, F) in the input's dtype: computed in fp32, rounded once.  Row by row: torch's exponential takes
        another path in a vector's tail, so that its bits depend on how many elements are in the call.
    """
    rows = []
    for row in gate_up:
        gate, up = row.float().chunk(2)
        rows.append((torch.nn.functional.silu(gate) * up).to(gate_up.dtype))
    return torch.stack(rows)  # (T, F)
