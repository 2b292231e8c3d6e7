"""Noise keyed by seed and position, and the token that is likeliest under it.

A position's noise is the same whenever and wherever it is asked for: numbers of a counter-based generator,
made Gumbel variables.  Knows nothing of filters or trees.  Source: the Gumbel-max trick (Gumbel 1954;
Maddison et al. 2014); Philox (Salmon et al., SC 2011).
"""

import numpy as np
import torch

from subspec.kernels.choice import greatest_of_row, uniform

_CONTENDERS = 64  # tokens looked at first


def gumbel_noise(seed: int, position: int, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise (V,) in fp32 from a counter-based generator keyed by seed and position."""
    return gumbel(uniform(seed, position, vocabulary))


def gumbel(numbers: np.ndarray) -> torch.Tensor:
    """Standard Gumbel noise in fp32 from uniform numbers (fp64, inside (0, 1)); rises with them."""
    return torch.from_numpy(-np.log(-np.log(numbers))).float()


def likeliest_under_noise(row: torch.Tensor, numbers: np.ndarray) -> int:
    """The argmax of logits (V,) fp32 plus noise, made from uniform numbers (V,) where it may matter.

    A token wins only if its logit with the largest noise of all is above the likeliest token with its own.
    """
    values, tokens = greatest_of_row(row, min(_CONTENDERS, len(row)))
    highest = float(values[0] + gumbel(numbers[tokens[:1].numpy()])[0])
    rounding = 1e-3 + 1e-6 * abs(highest)
    least = highest - rounding - float(gumbel(numbers.max(keepdims=True))[0])
    more = bool(values[-1] >= least)  # than were looked at, perhaps
    tokens = (row >= least).nonzero()[:, 0] if more else tokens[values >= least].sort().values
    if len(tokens) == 0:  # not a number
        return int((row + gumbel(numbers)).argmax())
    return int(tokens[(row[tokens] + gumbel(numbers[tokens.numpy()])).argmax()])
