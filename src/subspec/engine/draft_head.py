"""The draft's output head on the CPU: 4-bit, but for the few tokens that compete for the first place.

A substitute moves a logit by a quarter or so, which decides between tokens that lie close.  Their exact rows
are looked up, most often in the cache: the same rows are looked up as embeddings once a token is drafted.
"""

import torch

from subspec.store.rows import EmbeddingRows
from subspec.substitute.linear import SubstituteLinear

RIVALS = 4  # most tokens of a row that are computed exactly
MARGIN = 1.0  # below the largest logit: three standard deviations of what a substitute moves a difference


class DraftHead:
    """``head(x, out)`` writes logits.

    Args:
        substitute: C → V.
        rows: has the exact rows.
    """

    def __init__(self, substitute: SubstituteLinear, rows: EmbeddingRows) -> None:
        self._substitute, self._rows = substitute, rows

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits of normed hidden states x (T, C) to ``out`` (T, V), in the model's dtype.

        Raises:
            StoreError: a row of the head cannot be read.
        """
        self._substitute(x, out)
        values, tokens = out.topk(min(RIVALS, out.shape[1]))  # (T, RIVALS), falling
        close = values >= values[:, :1] - MARGIN
        close[:, 0] = close[:, 1:].any(1)  # a first without rivals stays as it is
        rows, places = close.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        rivals = tokens[rows, places]
        weights = torch.empty((len(rows), x.shape[1]), dtype=x.dtype)
        self._rows.lookup_head(rivals, weights)
        out[rows, rivals] = (x[rows].float() * weights.float()).sum(1).to(out.dtype)
