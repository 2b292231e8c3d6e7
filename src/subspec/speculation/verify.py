"""Walk a tree with the target's own tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from subspec.speculation.tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """What the target said of a tree.

    Attributes:
        nodes: the accepted path, root first, as node indices.
        tokens: the target's tokens: the accepted nodes' (root left out), then the bonus token.
    """

    nodes: list[int]
    tokens: list[int]


def row_numbers(nodes: Sequence[int]) -> dict[int, int]:
    """Which row of a sweep over ``nodes``, in this order, each of them is."""
    return {node: row for row, node in enumerate(nodes)}


def walk(tree: DraftTree, rows: Mapping[int, int], choose: Callable[[int, int, list[int]], int]) -> Walk:
    """From the root, take the target's own next token; while a verified child carries it, descend.

    Draft scores never enter: any tree gives the text of plain decoding.

    Args:
        tree: the drafted tree.
        rows: the verified nodes, and which row of the sweep each is; the root, 0, is one of them.
        choose: (row, position, path tokens) → the target's token after the row.
    """
    children = tree.children(list(rows))
    path = [0]
    tokens: list[int] = []
    while True:
        node = path[-1]
        token = choose(rows[node], tree.base + tree.depths[node] + 1, tokens)
        child = children.get(node, {}).get(token)
        tokens.append(token)
        if child is None:
            return Walk(path, list(tokens))
        path.append(child)
