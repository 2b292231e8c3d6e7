"""The draft tree as flat arrays: node 0 is the root, parents come before their children.

The root is the last committed token.  Node i's keys and values go to slot ``base + i``, where ``base`` is
the length of the committed prefix (the root's own position).  A node that is drafted while a sweep verifies
it has a *shadow* besides: another slot, for its draft keys and values, so that the sweep's exact ones stay.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from subspec.models.decoder import Rows


@dataclass
class DraftTree:
    """Tokens, parents, depths and scores of the nodes.

    Attributes:
        base: slots in the committed prefix; also the root's position.
        tokens: token id of each node.
        parents: index of each node's parent; −1 for the root.
        depths: 0 for the root.
        scores: log of the estimated probability that the target walks through the node.
        paths: each node's ancestors and itself, root first, as node indices.
        shadows: for a node drafted during its own verification, the slot of its draft keys and values.
    """

    base: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    shadows: dict[int, int] = field(default_factory=dict)

    @classmethod
    def rooted(cls, root: int, base: int) -> "DraftTree":
        """A tree of the root alone."""
        return cls(base, [root], [-1], [0], [0.0], [[0]])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, score: float) -> int:
        """Append a child of ``parent``; returns its index."""
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(score)
        self.paths.append([*self.paths[parent], node])
        return node

    def rescore(self, node: int, score: float) -> None:
        """Set a node's score, and move those of its descendants along."""
        change = score - self.scores[node]
        for one in self.below(node):
            self.scores[one] += change

    def slot(self, node: int) -> int:
        """The KV slot of a node, where a sweep writes its exact keys and values."""
        return self.base + node

    def draft_slot(self, node: int) -> int:
        """The KV slot that the draft uses for a node."""
        return self.shadows.get(node, self.base + node)

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from the root's first child on the way to ``node``, which is included; the root is not."""
        return [self.tokens[i] for i in self.paths[node][1:]]

    def rows(self, nodes: list[int]) -> Rows:
        """What a pass over ``nodes`` computes: each sees the prefix, then its ancestors and itself."""
        return self._rows(nodes, self.slot)

    def draft_rows(self, nodes: list[int]) -> Rows:
        """``rows`` for the draft: keys and values of nodes with a shadow are those in the shadow."""
        return self._rows(nodes, self.draft_slot)

    def rows_elsewhere(self, nodes: list[int], first: int) -> Rows:
        """``rows`` with slots from ``first`` on instead of the nodes' own; ``nodes`` hold all ancestors."""
        slots = {node: first + place for place, node in enumerate(nodes)}
        return self._rows(nodes, slots.__getitem__)

    def _rows(self, nodes: list[int], slot: Callable[[int], int]) -> Rows:
        lengths = [len(self.paths[node]) for node in nodes]
        longest = max(lengths)
        slots = [
            [slot(i) for i in self.paths[node]] + [0] * (longest - len(self.paths[node])) for node in nodes
        ]
        return Rows(
            tokens=torch.tensor([self.tokens[node] for node in nodes]),
            positions=torch.tensor([self.base + self.depths[node] for node in nodes], dtype=torch.int32),
            slots=torch.tensor([slot(node) for node in nodes], dtype=torch.int32),
            prefix=torch.full((len(nodes),), self.base, dtype=torch.int32),
            paths=torch.tensor(slots, dtype=torch.int32),  # (T, P)
            path_lens=torch.tensor(lengths, dtype=torch.int32),
        )

    def children(self, nodes: Sequence[int]) -> dict[int, dict[int, int]]:
        """For each parent its children among ``nodes``: token → node."""
        found: dict[int, dict[int, int]] = {}
        for node in nodes:
            if self.parents[node] >= 0:
                found.setdefault(self.parents[node], {})[self.tokens[node]] = node
        return found

    def children_of(self, parent: int) -> dict[int, int]:
        """All children of one node: token → node."""
        return {
            self.tokens[node]: node for node in range(parent + 1, len(self)) if self.parents[node] == parent
        }

    def below(self, top: int) -> list[int]:
        """``top`` and its descendants, in order."""
        depth = self.depths[top]
        return [
            node
            for node in range(top, len(self))
            if self.depths[node] >= depth and self.paths[node][depth] == top
        ]

    def rerooted(self, nodes: Sequence[int], base: int) -> "DraftTree":
        """The subtree that ``below`` gave, as a tree of its own: the first of ``nodes`` is the root.

        Scores are of reaching a node once the root is reached.  Node i of the new tree is ``nodes[i]`` here;
        its keys and values are expected in slot ``base + i``.
        """
        index = {node: i for i, node in enumerate(nodes)}
        top = nodes[0]
        tree = DraftTree.rooted(self.tokens[top], base)
        for node in nodes[1:]:
            tree.add(self.tokens[node], index[self.parents[node]], self.scores[node] - self.scores[top])
        return tree

    def best(self, count: int, min_score: float = 0.0) -> list[int]:
        """The root and the ``count`` − 1 best-scored other nodes, in order, each after its parent.

        Leaves out nodes whose score stands for a probability below ``min_score``.  A child never scores above
        its parent, so the best nodes are closed under parents; ties go to the older node.
        """
        return self.likeliest(
            [node for node in range(len(self)) if math.exp(self.scores[node]) >= min_score], count
        )

    def likeliest(self, nodes: Sequence[int], count: int) -> list[int]:
        """The ``count`` best-scored of some nodes, in order; ties go to the older node."""
        return sorted(self.ranked(nodes)[:count])

    def ranked(self, nodes: Iterable[int]) -> list[int]:
        """Some nodes, best-scored first; ties go to the older node."""
        return sorted(nodes, key=lambda node: (-self.scores[node], node))
