"""What a draft pass may forward next: nodes that were not forwarded yet, and guesses of what follows them.

A pass loads its weights once for all of its rows, so that besides the likeliest nodes it may try what
probably follows them: where the guess is right, the pass gains a level.  Nodes and guesses compete by the
probability that the target gets there.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from subspec.speculation.recycled import Recycled, Successor
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree

_LEAST_GUESS = 0.05  # guesses less likely to be reached than this are not tried


@dataclass
class Opening:
    """A node that may be forwarded, or a guess that would become one.

    Attributes:
        node: its number; −1 as long as it is none.
        above: of a guess, the opening that it follows.
        token, depth: of the node.
        reached: the probability that the target gets there; ``matters``: and to no child that is known.
        guess: what it was guessed from.
        last: whether it has no children.
    """

    node: int
    above: "Opening | None"
    token: int
    depth: int
    reached: float
    matters: float
    guess: Successor | None = None
    last: bool = True


def frontier(
    tree: DraftTree,
    forwarded: Collection[int],
    recycled: Recycled,
    sampler: Sampler,
    most: int,
    max_depth: int,
) -> list[Opening]:
    """At most ``most`` nodes to forward, likeliest first; none that ends the text.

    Args:
        tree: the nodes; a node may be opened if its parent was forwarded, or is opened before it.
        forwarded: those that were.
        recycled: guesses of what follows a node, which come after it.
        sampler: knows the noise that guesses will meet, and the tokens that nothing follows.
        most: nodes and guesses.
        max_depth: nodes at this depth are not forwarded.
    """
    opened: dict[int, Opening] = {}
    ends = sampler.ends
    for node in range(len(tree)):
        parent, goes_on = tree.parents[node], tree.tokens[node] not in ends
        attached = node == 0 or (goes_on and (parent in forwarded or parent in opened))
        if node not in forwarded and attached and tree.depths[node] < max_depth:
            reached = math.exp(tree.scores[node])
            opened[node] = Opening(node, None, tree.tokens[node], tree.depths[node], reached, reached)
    for node in range(1, len(tree)):
        above = opened.get(tree.parents[node])
        if above is not None:
            above.matters -= math.exp(tree.scores[node])
            above.last = False
    chosen = sorted(opened.values(), key=lambda one: (-one.reached, one.node))[:most]
    for one in [one for one in chosen if one.last]:
        chosen += _guessed_below(one, tree, recycled, sampler, min(most, max_depth - 1 - one.depth))
    return sorted(chosen, key=lambda one: -one.reached)[:most]  # stable: a node before its guesses


def context_of(tree: DraftTree, node: int, recycled: Recycled) -> list[int]:
    """The last tokens on the way to a node, its own the last."""
    return [*recycled.tail, *tree.path_tokens(node)]


def _guessed_below(
    opening: Opening, tree: DraftTree, recycled: Recycled, sampler: Sampler, most: int
) -> list[Opening]:
    """A chain of at most ``most`` guesses of what follows a node."""
    context = context_of(tree, opening.node, recycled)
    chain: list[Opening] = []
    while len(chain) < most:
        noise = partial(sampler.noise_of, position=tree.base + opening.depth + 1)
        found = recycled.guess(context, noise)
        if found is None or found.token in sampler.ends:
            break
        reached = found.chance * opening.reached
        if reached < _LEAST_GUESS:
            break
        context.append(found.token)
        opening = Opening(-1, opening, found.token, opening.depth + 1, reached, reached, found)
        chain.append(opening)
    return chain
