"""Walk a tree with the target's own tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

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


def walk(
    tree: DraftTree,
    nodes: list[int],
    logits: torch.Tensor,
    choose: Callable[[torch.Tensor, int, list[int]], int],
) -> Walk:
    """From the root, take the target's own next token; while a verified child carries it, descend.

    Draft scores never enter: any tree gives the text of plain decoding.

    Args:
        tree: the drafted tree.
        nodes: the verified nodes, root first.
        logits: (N, V) of the target, in the order of ``nodes``.
        choose: (logits row, position, path tokens) → the target's token.
    """
    row_of = {node: row for row, node in enumerate(nodes)}
    children = tree.children(nodes)
    path = [nodes[0]]
    tokens: list[int] = []
    while True:
        node = path[-1]
        token = choose(logits[row_of[node]], tree.base + tree.depths[node] + 1, tokens)
        child = children.get(node, {}).get(token)
        tokens.append(token)
        if child is None:
            return Walk(path, list(tokens))
        path.append(child)
