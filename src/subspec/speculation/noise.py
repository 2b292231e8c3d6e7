"""Noise keyed by seed and position, and the token that is likeliest under it.

A position's noise is the same whenever and wherever it is asked for: numbers of a counter-based generator,
made Gumbel variables.  Knows nothing of filters or trees.  Source: the Gumbel-max trick (Gumbel 1954;
Maddison et al. 2014); Philox (Salmon et al., SC 2011).
"""

import numpy as np
import torch


def gumbel_noise(seed: int, position: int, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise (V,) in fp32 from a counter-based generator keyed by seed and position."""
    return gumbel(uniform_numbers(seed, position, vocabulary))


def gumbel(uniform: np.ndarray) -> torch.Tensor:
    """Standard Gumbel noise in fp32 from uniform numbers (fp64, inside (0, 1)); rises with them."""
    return torch.from_numpy(-np.log(-np.log(uniform))).float()


def uniform_numbers(seed: int, position: int, vocabulary: int) -> np.ndarray:
    """What a position's noise is made from: fp64 (V,), strictly inside (0, 1)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))
    return np.minimum(generator.random(vocabulary) + 2.0**-54, 1 - 2.0**-53)


def likeliest_under_noise(row: torch.Tensor, uniform: np.ndarray) -> int:
    """The argmax of logits (V,) plus noise, of which only what may matter is computed.

    A token wins only if its logit with the largest noise of all is above the likeliest token with its own.
    """
    first = int(row.argmax())
    highest = float(row[first] + gumbel(uniform[[first]])[0])
    rounding = 1e-3 + 1e-6 * abs(highest)
    contenders = (row >= highest - rounding - float(gumbel(uniform.max(keepdims=True))[0])).nonzero()[:, 0]
    if len(contenders) == 0:  # not a number
        return int((row + gumbel(uniform)).argmax())
    return int(contenders[(row[contenders] + gumbel(uniform[contenders.numpy()])).argmax()])
