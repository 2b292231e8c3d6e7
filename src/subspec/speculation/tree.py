"""The draft tree as flat arrays: node 0 is the root, parents come before their children.

The root is the last committed token.  Node i's keys and values go to slot ``base + i``, where ``base`` is
the length of the committed prefix (the root's own position).
"""

import math
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
    """

    base: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

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

    def slot(self, node: int) -> int:
        """The KV slot of a node."""
        return self.base + node

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from the root's first child on the way to ``node``, which is included; the root is not."""
        return [self.tokens[i] for i in self.paths[node][1:]]

    def rows(self, nodes: list[int]) -> Rows:
        """What a pass over ``nodes`` computes: each sees the prefix, then its ancestors and itself."""
        lengths = [len(self.paths[node]) for node in nodes]
        longest = max(lengths)
        slots = [
            [self.base + i for i in self.paths[node]] + [0] * (longest - len(self.paths[node]))
            for node in nodes
        ]
        return Rows(
            tokens=[self.tokens[node] for node in nodes],
            positions=torch.tensor([self.base + self.depths[node] for node in nodes], dtype=torch.int32),
            slots=torch.tensor([self.base + node for node in nodes], dtype=torch.int32),
            prefix=torch.full((len(nodes),), self.base, dtype=torch.int32),
            paths=torch.tensor(slots, dtype=torch.int32),  # (T, P)
            path_lens=torch.tensor(lengths, dtype=torch.int32),
        )

    def children(self, nodes: list[int]) -> dict[int, dict[int, int]]:
        """For each parent its children among ``nodes``: token → node."""
        found: dict[int, dict[int, int]] = {}
        for node in nodes:
            if self.parents[node] >= 0:
                found.setdefault(self.parents[node], {})[self.tokens[node]] = node
        return found

    def best(self, count: int, min_score: float = 0.0) -> list[int]:
        """The root and the ``count`` − 1 best-scored other nodes, in order, each after its parent.

        Leaves out nodes whose score stands for a probability below ``min_score``.  A child never scores above
        its parent, so the best nodes are closed under parents; ties go to the older node.
        """
        likely = [node for node in range(len(self)) if math.exp(self.scores[node]) >= min_score]
        ranked = sorted(likely, key=lambda node: (-self.scores[node], node))
        return sorted(ranked[:count])
