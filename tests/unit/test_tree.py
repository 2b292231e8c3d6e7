"""The draft tree: its rows, its best part, and the target's walk through it, against brute force."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.models.decoder import Rows
from subspec.speculation.draft import TreeShape, grow
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import row_numbers, walk

VOCABULARY = 6
relaxed = settings(deadline=None, max_examples=80)


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Any tree whose siblings differ and whose children never score above their parents; ties are common."""
    base = draw(st.integers(1, 50))
    tree = DraftTree.rooted(draw(st.integers(0, VOCABULARY - 1)), base)
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.integers(0, len(tree) - 1))
        taken = {tree.tokens[node] for node in range(len(tree)) if tree.parents[node] == parent}
        free = [token for token in range(VOCABULARY) if token not in taken]
        if free:
            tree.add(
                draw(st.sampled_from(free)),
                parent,
                tree.scores[parent] - draw(st.sampled_from([0, 0, 0.5, 3])),
            )
    return tree


def ancestors(tree: DraftTree, node: int) -> list[int]:
    """Root first, the node last, by following parents."""
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


@relaxed
@given(trees())
def test_paths_depths_and_slots_follow_the_parents(tree: DraftTree) -> None:
    for node in range(len(tree)):
        path = ancestors(tree, node)
        assert tree.paths[node] == path
        assert tree.depths[node] == len(path) - 1
        assert tree.path_tokens(node) == [tree.tokens[i] for i in path[1:]]
        assert tree.slot(node) == tree.base + node
        assert tree.parents[node] < node


@relaxed
@given(trees(), st.integers(1, 30))
def test_the_best_nodes_are_a_tree_and_no_better_one_is_left_out(tree: DraftTree, count: int) -> None:
    best = tree.best(count)
    assert best[0] == 0
    assert best == sorted(set(best))
    assert len(best) == min(count, len(tree))
    assert all(tree.parents[node] in best for node in best[1:])
    left = [tree.scores[node] for node in range(len(tree)) if node not in best]
    assert not left or max(left) <= min(tree.scores[node] for node in best)


@relaxed
@given(trees(), st.randoms(use_true_random=False))
def test_each_row_sees_the_prefix_its_ancestors_and_itself(tree: DraftTree, rng: random.Random) -> None:
    nodes = sorted(rng.sample(range(len(tree)), rng.randint(1, len(tree))))
    rows = tree.rows(nodes)
    assert rows.tokens.tolist() == [tree.tokens[node] for node in nodes]
    for row, node in enumerate(nodes):
        seen = rows.paths[row, : int(rows.path_lens[row])].tolist()
        assert seen == [tree.base + i for i in ancestors(tree, node)]
        assert int(rows.prefix[row]) == tree.base
        assert int(rows.positions[row]) == tree.base + tree.depths[node]
        assert int(rows.slots[row]) == seen[-1] == tree.base + node
    for tensor in (rows.positions, rows.slots, rows.prefix, rows.paths, rows.path_lens):
        assert tensor.dtype == torch.int32


def oracle(tree: DraftTree, nodes: list[int], logits: torch.Tensor) -> tuple[list[int], list[int]]:
    """The longest verified path all of whose tokens are the target's own, by trying every node."""
    own = {node: int(logits[row].argmax()) for row, node in enumerate(nodes)}
    agreed = [
        ancestors(tree, node)
        for node in nodes
        if all(own[tree.parents[i]] == tree.tokens[i] for i in ancestors(tree, node)[1:])
    ]
    path = max(agreed, key=len)
    assert sum(len(other) == len(path) for other in agreed) == 1
    return path, [own[node] for node in path]


@relaxed
@given(trees(), st.integers(1, 30), st.integers(0, 1 << 30), st.booleans())
def test_the_walk_is_the_longest_path_that_the_target_agrees_with(
    tree: DraftTree, count: int, seed: int, friendly: bool
) -> None:
    nodes = tree.best(count)
    logits = torch.randn((len(nodes), VOCABULARY), generator=torch.Generator().manual_seed(seed))
    if friendly:  # the target likes the first child of every node
        for row, node in enumerate(nodes):
            child = next((i for i in nodes if tree.parents[i] == node), None)
            if child is not None:
                logits[row, tree.tokens[child]] = 9.0
    asked: list[tuple[int, list[int]]] = []

    def choose(row: int, position: int, path: Sequence[int]) -> int:
        asked.append((position, list(path)))
        return int(logits[row].argmax())

    result = walk(tree, row_numbers(nodes), choose)
    path, tokens = oracle(tree, nodes, logits)
    assert result.nodes == path
    assert result.tokens == tokens
    assert asked == [(tree.base + 1 + depth, tokens[:depth]) for depth in range(len(tokens))]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.9, seed=5, top_k=5)])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_grown_tree_has_its_shape_and_every_row_its_context(
    depth: int, width: int, params: SamplingParams
) -> None:
    vocabulary = 12
    generator = torch.Generator().manual_seed(depth * 10 + width)
    tree, forwarded = DraftTree.rooted(3, 20), 0

    def draft(rows: Rows) -> torch.Tensor:
        nonlocal forwarded
        count = len(rows)
        forwarded += count
        return torch.randn((count, vocabulary), generator=generator)

    shape = TreeShape(depth, width, 8)
    grow(tree, draft, Sampler(params, [3]), shape)
    assert len(tree) <= shape.drafted
    assert max(tree.depths) == depth
    assert forwarded == len(tree) - sum(level == depth for level in tree.depths)
    for level in range(1, depth + 1):
        assert 1 <= sum(found == level for found in tree.depths) <= width
    for node in range(1, len(tree)):
        assert tree.scores[node] <= tree.scores[tree.parents[node]]
    children = [(tree.parents[node], tree.tokens[node]) for node in range(1, len(tree))]
    assert len(set(children)) == len(children)


def test_a_growing_tree_keeps_the_likeliest_guesses() -> None:
    """Two levels, width two, probabilities by hand: 0.6 and 0.3 below the root, then 0.9 and 0.8."""
    tree = DraftTree.rooted(0, 4)
    answers = [
        torch.tensor([[0.6, 0.3, 0.1]]).log(),
        torch.tensor([[0.45, 0.45, 0.1], [0.05, 0.05, 0.9]]).log(),
    ]
    grow(tree, lambda rows: answers.pop(0), Sampler(SamplingParams(), [0]), TreeShape(2, 2, 9))
    assert tree.tokens == [0, 0, 1, 0, 1] or sorted(tree.tokens[3:]) == [0, 2]
    ranked = sorted((0.6 * 0.45, 0.6 * 0.45, 0.3 * 0.9), reverse=True)[:2]
    assert [round(float(torch.tensor(score).exp()), 3) for score in tree.scores[3:]] == [
        round(value, 3) for value in ranked
    ]


def test_unlikely_nodes_are_left_out_with_all_below_them() -> None:
    tree = DraftTree.rooted(5, 3)
    likely = tree.add(7, 0, math.log(0.5))
    doubtful = tree.add(8, likely, math.log(0.05))
    unlikely = tree.add(9, 0, math.log(0.03))
    below = tree.add(10, unlikely, math.log(0.02))
    assert tree.best(9, 0.04) == [0, likely, doubtful]
    assert tree.best(9, 0.02 * 0.999) == [0, likely, doubtful, unlikely, below]
    assert tree.best(2, 0.04) == [0, likely]
    assert tree.best(9, 1.0) == [0]
