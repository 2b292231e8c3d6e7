"""What the host makes of a step's summary: the tree, the guesses behind it, and the next step's tree.

The counterpart of ``levels`` on the host.  Tree nodes are renumbered without the missing ones; ``places``
says which node of the device each one is, and with it which cache slot.
"""

import math
from dataclasses import dataclass

import torch

from subspec.speculation.levels import EMPTY, Shape, summary_sizes
from subspec.speculation.tree import DraftTree


@dataclass(frozen=True)
class Guesses:
    """What the draft said of a node's next token: tokens, best first, and scores (K,) fp32 of them all."""

    tokens: list[int]
    scores: torch.Tensor


@dataclass(frozen=True)
class Harvest:
    """A step's tree, as the device left it.

    Attributes:
        tree: its nodes, missing ones left out.
        places: which node of the device each one is.
        verified: the nodes that the sweep verified, in the order of its rows.
        targets: the target's token after each of them, if the device chose it.
        guesses: by node, of those that were forwarded.
    """

    tree: DraftTree
    places: list[int]
    verified: list[int]
    targets: list[int]
    guesses: dict[int, Guesses]


def harvest(summary: torch.Tensor, shape: Shape, base: int, levels: int, verified: int) -> Harvest:
    """Read a summary (``summary_size``,) int32.

    Args:
        summary: on the host.
        shape: of the state that it is of.
        base: of the tree.
        levels: that were drafted: nodes of deeper ones count for nothing, those of the last one were not
            forwarded.
        verified: rows of the sweep.
    """
    nodes, candidates = shape.nodes, shape.candidates
    parts = torch.split(summary, summary_sizes(shape))
    token, parent, score, guess, guess_score, chosen, targets = parts
    scores = score.view(torch.float32).tolist()
    tokens, parents = token.tolist(), parent.tolist()
    tree, places, numbers = DraftTree.rooted(tokens[0], base), [0], {0: 0}
    for place in range(1, 1 + levels * shape.width):
        if scores[place] > EMPTY and parents[place] in numbers:
            numbers[place] = tree.add(tokens[place], numbers[parents[place]], scores[place])
            places.append(place)
    guessed = guess.view(nodes, candidates).tolist()
    guessed_scores = guess_score.view(torch.float32).view(nodes, candidates)
    guesses = {
        node: Guesses(guessed[place], guessed_scores[place])
        for node, place in enumerate(places)
        if tree.depths[node] < levels
    }
    rows = [numbers[place] for place in chosen[:verified].tolist()]
    return Harvest(tree, places, rows, targets[:verified].tolist(), guesses)


@dataclass(frozen=True)
class Seedling:
    """A tree for ``Levels.plant``.

    Attributes:
        packed: int32, what the device is to know.
        levels: of it; the last one's nodes are the next to be forwarded.
        nodes: of the harvest's tree, whose entries it needs; ``places``: which nodes they become.
        scores: of all its nodes: probabilities to be reached, falling; ``frontier``: of the last level's.
    """

    packed: torch.Tensor
    levels: int
    nodes: list[int]
    places: list[int]
    scores: list[float]
    frontier: list[float]


def seedling(grown: Harvest, top: int, shape: Shape, base: int) -> Seedling | None:
    """The tree below ``top``, the next root, in level layout; None if nothing is below it.

    Args:
        grown: the step's tree.
        top: a node of it.
        shape: of the state that it is for.
        base: of the new tree.
    """
    tree, depth = grown.tree, grown.tree.depths[top]
    kept = tree.below(top)
    levels = max(tree.depths[node] for node in kept) - depth
    if levels == 0:
        return None
    places = _places(tree, kept, shape.width)
    chances = [math.exp(tree.scores[node] - tree.scores[top]) for node in kept]
    last = [chance for node, chance in zip(kept, chances, strict=True) if tree.depths[node] - depth == levels]
    ordered = sorted(chances, reverse=True), sorted(last, reverse=True)
    packed = torch.cat([torch.tensor([base, levels], dtype=torch.int32), *_tables(grown, places, shape)])
    return Seedling(packed, levels, kept, list(places.values()), *ordered)


def _places(tree: DraftTree, kept: list[int], width: int) -> dict[int, int]:
    """Where each node of a subtree, its root first, lies in level layout."""
    depth, filled = tree.depths[kept[0]], [0] * (max(tree.depths) + 1)
    places = {kept[0]: 0}
    for node in kept[1:]:
        level = tree.depths[node] - depth
        places[node] = 1 + (level - 1) * width + filled[level]
        filled[level] += 1
    return places


def _tables(grown: Harvest, places: dict[int, int], shape: Shape) -> list[torch.Tensor]:
    """A subtree's nodes as the device knows them, by place: flat int32 tables as ``Levels.plant`` reads."""
    tree, kept, at = grown.tree, list(places), torch.tensor(list(places.values()))
    top, depth = kept[0], tree.depths[kept[0]]
    unknown = Guesses([0] * shape.candidates, torch.full((shape.candidates,), EMPTY))  # not forwarded yet
    guesses = [grown.guesses.get(node, unknown) for node in kept]
    paths = [[places[one] for one in tree.paths[node][depth:]] for node in kept]

    def table(values: torch.Tensor, filler: float = 0) -> torch.Tensor:
        found = torch.full((shape.nodes, *values.shape[1:]), filler, dtype=values.dtype)
        found[at] = values
        return found.view(torch.int32).flatten()

    def numbers(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return [
        table(numbers([tree.tokens[node] for node in kept])),
        table(numbers([0, *(places[tree.parents[node]] for node in kept[1:])])),
        table(torch.tensor([tree.scores[node] - tree.scores[top] for node in kept]), EMPTY),
        table(numbers([guess.tokens for guess in guesses])),
        table(torch.stack([guess.scores for guess in guesses]), EMPTY),
        table(numbers([path + [0] * (shape.depth + 1 - len(path)) for path in paths])),
    ]
