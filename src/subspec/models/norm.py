"""Root-mean-square normalisation."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """X · rsqrt(mean(x²) + eps) · weight over the last dimension.

    Args:
        x: (..., C).
        weight: (C,), same dtype.
        eps: added to the mean square.

    Returns:
        (..., C) in x's dtype: computed in fp32, rounded once.  Source: Zhang and Sennrich 2019.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)
