"""The draft's first and last steps on the CPU, which need single rows of tables that are mostly on disk.

The output head is 4-bit, but for the few tokens that compete for the first place: a substitute moves a logit
by a quarter or so, which decides between tokens that lie close.  Their exact rows are looked up, most often
in the cache: the same rows are looked up as embeddings once a token is drafted.

In a sweep's gap a read is avoided where it can be: the link is busy, and a row would wait behind all that the
sweep has asked for.  Then the 4-bit head stands in for rows that the cache lacks; where embeddings and head
are not tied, no substitute of an embedding exists, and it is read.
"""

from typing import Protocol

import torch

from subspec.kernels.choice import greatest
from subspec.store.rows import EmbeddingRows
from subspec.store.table import EmbeddingTable
from subspec.substitute.linear import SubstituteLinear

RIVALS = 4  # most tokens of a row that are computed exactly
MARGIN = 1.0  # below the largest logit: three standard deviations of what a substitute moves a difference


class DraftEnd(Protocol):
    """Writes what one end of a draft makes of tokens, or of hidden states, to ``out``."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, in_gap: bool) -> None:
        """``in_gap``: whether a sweep waits meanwhile."""
        ...


def draft_ends(
    rows: EmbeddingRows | EmbeddingTable, head: SubstituteLinear, *, tied: bool
) -> tuple[DraftEnd, DraftEnd]:
    """A draft's embedding and head: where the table is in a device's memory, that and the 4-bit head."""
    if isinstance(rows, EmbeddingRows):
        return DraftEmbedding(rows, head if tied else None), DraftHead(head, rows)

    def embed(x: torch.Tensor, out: torch.Tensor, *, in_gap: bool) -> None:
        del in_gap
        rows.lookup(x, out)

    def write_logits(x: torch.Tensor, out: torch.Tensor, *, in_gap: bool) -> None:
        del in_gap
        head(x, out)

    return embed, write_logits


class DraftEmbedding:
    """``embedding(tokens, out)`` writes embeddings, exact ones where they may be read.

    Args:
        rows: has the exact rows.
        substitute: the output head's, if it is the embedding too.
    """

    def __init__(self, rows: EmbeddingRows, substitute: SubstituteLinear | None) -> None:
        self._rows, self._substitute = rows, substitute

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, in_gap: bool) -> None:
        """Write the embeddings of tokens ``x`` (T,) to ``out`` (T, C).

        Raises:
            StoreError: a row cannot be read, or is damaged.
        """
        if not in_gap or self._substitute is None:
            self._rows.lookup(x, out)
            return
        missing = ~self._rows.cached(x, out)
        if missing.any():
            out[missing] = self._substitute.rows(x[missing], out.dtype)


class DraftHead:
    """``head(x, out)`` writes logits.

    Args:
        substitute: C → V.
        rows: has the exact rows.
    """

    def __init__(self, substitute: SubstituteLinear, rows: EmbeddingRows) -> None:
        self._substitute, self._rows = substitute, rows

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, in_gap: bool) -> None:
        """Write the logits of normed hidden states x (T, C) to ``out`` (T, V), in the model's dtype.

        Raises:
            StoreError: a row of the head cannot be read.
        """
        self._substitute(x, out)
        values, tokens = greatest(out, min(RIVALS, out.shape[1]))  # (T, RIVALS), falling
        close = values >= values[:, :1] - MARGIN
        close[:, 0] = close[:, 1:].any(1)  # a first without rivals stays as it is
        rows, places = close.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        rivals = tokens[rows, places]
        weights = torch.empty((len(rows), x.shape[1]), dtype=x.dtype)
        if in_gap:
            there = self._rows.cached(rivals, weights, head=True)
            whole = torch.ones(len(x), dtype=torch.bool)
            whole[rows[~there]] = False  # rivals are compared all exactly, or as they are
            kept = whole[rows]
            rows, rivals, weights = rows[kept], rivals[kept], weights[kept]
        else:
            self._rows.lookup_head(rivals, weights)
        out[rows, rivals] = (x[rows].float() * weights.float()).sum(1).to(out.dtype)
