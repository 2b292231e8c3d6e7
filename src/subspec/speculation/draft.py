"""Grow a draft tree level by level."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from subspec.models.decoder import Rows
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree

NO_REACH = 1e-30  # below this a level is hopeless whatever the shape says
DraftPass = Callable[[Rows], torch.Tensor]


@dataclass(frozen=True)
class TreeShape:
    """A fixed tree: what is drafted, and how much of it is verified.

    Attributes:
        depth: levels below the root.
        width: nodes a level, and guesses a node.
        nodes: nodes that a sweep verifies, the root included.
        min_reach: no further level is drafted once the target reaches the last one with less than this
            probability, as the scores have it; 0 always drafts the whole depth.
        min_score: nodes that the target reaches with less than this probability are not verified.
    """

    depth: int
    width: int
    nodes: int
    min_reach: float = 0.0
    min_score: float = 0.0

    @property
    def drafted(self) -> int:
        """Most nodes that the draft makes, the root included: the scratch slots needed."""
        return 1 + self.depth * self.width

    @property
    def verified(self) -> int:
        """Most nodes that a sweep verifies: no more than there can be."""
        return min(self.nodes, self.drafted)


def grow(tree: DraftTree, draft: DraftPass, sampler: Sampler, shape: TreeShape) -> None:
    """Add up to ``shape.depth`` levels below the tree's root.

    Each level forwards the last level's nodes and keeps the ``width`` best-scored of their guesses.  A
    node's score is the sum of its guesses' log probabilities on the way from the root.  Growing ends early
    where the target is unlikely to get that far.

    Source: SubSpec (Chang et al. 2025, arXiv 2509.18344), section 4; EAGLE-2 (Li et al. 2024) for the
        dynamic tree.

    Args:
        tree: a rooted tree; nodes are added.
        draft: forwards rows and writes their keys and values: (T, V) logits.
        sampler: ranks guesses.
        shape: depth, width and when to end.
    """
    frontier = [0]
    for _ in range(shape.depth):
        logits = draft(tree.rows(frontier))  # (T, V)
        position = tree.base + tree.depths[frontier[0]] + 1
        paths = [tree.path_tokens(node) for node in frontier]
        tokens, logs = sampler.guess(logits, position, paths, shape.width)
        guesses = [
            (tree.scores[node] + log, node, token)
            for node, row_tokens, row_logs in zip(frontier, tokens, logs, strict=True)
            for token, log in zip(row_tokens, row_logs, strict=True)
            if log > -math.inf  # neither impossible nor not a number
        ]
        guesses.sort(key=lambda guess: -guess[0])  # stable: ties go to the older parent
        frontier = [tree.add(token, node, score) for score, node, token in guesses[: shape.width]]
        if sum(math.exp(tree.scores[node]) for node in frontier) < max(shape.min_reach, NO_REACH):
            break
