"""The draft's head and embedding: exact where it matters and may be read, the substitute's elsewhere."""

from typing import cast

import torch

from subspec.engine.draft_ends import MARGIN, RIVALS, DraftEmbedding, DraftHead
from subspec.store.rows import EmbeddingRows
from subspec.substitute.linear import SubstituteLinear

V, C = 30, 32


class Table:
    """An exact head in memory; notes what is looked up."""

    def __init__(self) -> None:
        self.weight = torch.randn(V, C).bfloat16()
        self.looked_up: list[int] = []
        self.known: set[int] = set(range(V))

    def lookup(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        self.lookup_head(tokens, out)

    def cached(self, tokens: torch.Tensor, out: torch.Tensor, *, head: bool = False) -> torch.Tensor:
        there = torch.tensor([token in self.known for token in tokens.tolist()], dtype=torch.bool)
        out[there] = self.weight[tokens[there]]
        return there

    def lookup_head(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        self.looked_up += tokens.tolist()
        out.copy_(self.weight[tokens])


def written(
    x: torch.Tensor, approximate: torch.Tensor, table: Table, *, in_gap: bool = False
) -> torch.Tensor:
    """Logits of a head whose substitute says ``approximate``."""
    head = DraftHead(
        cast("SubstituteLinear", lambda _, out: out.copy_(approximate)), cast("EmbeddingRows", table)
    )
    out = torch.empty_like(approximate)
    head(x, out, in_gap=in_gap)
    return out


def test_rivals_are_exact_and_nothing_else_is_touched() -> None:
    table, x = Table(), torch.randn(40, C).bfloat16()
    exact = (x.float() @ table.weight.float().T).bfloat16()
    # No two alike in a row, also in bf16.
    steps = torch.tensor([0.25, 0.5, 1.25])[torch.randint(0, 3, (40, V))].cumsum(1)
    approximate = torch.stack([row[torch.randperm(V)] for row in steps]).bfloat16()
    out = written(x, approximate, table)
    refined = 0
    for row in range(40):
        order = approximate[row].argsort(descending=True, stable=True)[:RIVALS].tolist()
        rivals = [t for t in order if approximate[row, t] >= approximate[row, order[0]] - MARGIN]
        rivals = rivals if len(rivals) > 1 else []
        others = [t for t in range(V) if t not in order]
        assert torch.equal(out[row, others], approximate[row, others])
        kept = [token for token in order if token not in rivals]
        assert torch.equal(out[row, kept], approximate[row, kept])
        torch.testing.assert_close(out[row, rivals], exact[row, rivals], rtol=1e-2, atol=1e-2)
        refined += len(rivals)
    assert refined == len(table.looked_up) > 20


def test_a_first_without_rivals_needs_no_row() -> None:
    table, x = Table(), torch.randn(3, C).bfloat16()
    approximate = torch.zeros(3, V).bfloat16()
    approximate[:, 7] = 2 * MARGIN
    assert torch.equal(written(x, approximate, table), approximate)
    assert table.looked_up == []


def test_fewer_tokens_than_rivals() -> None:
    table, x = Table(), torch.randn(2, C).bfloat16()
    for vocabulary in (1, 2):
        out = written(x, torch.zeros(2, vocabulary).bfloat16(), table)
        assert out.shape == (2, vocabulary)


def test_in_a_gap_rivals_are_exact_where_all_of_them_are_cached() -> None:
    table, x = Table(), torch.randn(3, C).bfloat16()
    approximate = torch.zeros(3, V).bfloat16()
    for row, rivals in enumerate([(1, 2), (2, 3), (4, 5)]):
        approximate[row, list(rivals)] = 2 * MARGIN
    table.known = {1, 2, 4}
    out = written(x, approximate, table, in_gap=True)
    exact = (x.float() @ table.weight.float().T).bfloat16()
    torch.testing.assert_close(out[0, [1, 2]], exact[0, [1, 2]], rtol=1e-2, atol=1e-2)
    assert torch.equal(out[1:], approximate[1:])
    assert table.looked_up == [], "nothing is read in a gap"


def test_an_embedding_is_exact_where_it_may_be_read() -> None:
    table, stand_in = Table(), torch.randn(V, C).bfloat16()

    class Substitute:
        def rows(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return stand_in[indices].to(dtype)

    table.known = {3, 5}
    tokens, out = torch.tensor([3, 4, 5, 4]), torch.empty(4, C).bfloat16()
    embedding = DraftEmbedding(cast("EmbeddingRows", table), cast("SubstituteLinear", Substitute()))
    embedding(tokens, out, in_gap=True)
    assert torch.equal(out[[0, 2]], table.weight[[3, 5]])
    assert torch.equal(out[[1, 3]], stand_in[[4, 4]])
    assert table.looked_up == []
    embedding(tokens, out, in_gap=False)
    assert torch.equal(out, table.weight[tokens])
    untied = DraftEmbedding(cast("EmbeddingRows", table), None)
    untied(tokens, out.zero_(), in_gap=True)
    assert torch.equal(out, table.weight[tokens]), "no substitute stands in: they are read"
