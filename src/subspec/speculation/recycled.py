"""What followed a token the last time: guesses that a draft pass tries in the rows it has to spare.

A draft pass forwards a node to learn its child.  Often the text, or an earlier pass, has said what follows;
a pass that forwards the guess along with the node is a level further where the guess is right.  Rows are
cheap, since a pass loads its weights once.  How often the draft agrees with a guess is counted by how much of
the context is the same, so that guesses compete with other nodes by probability.  Where tokens are drawn,
what is remembered are the candidates and their scores without noise: the noise of the place decides.

Source: token recycling (Luo et al. 2024, arXiv 2408.08696) keeps such a table and lets the target check its
guesses; here the draft does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Noise = Callable[[Sequence[int]], Sequence[float]]

CONTEXT = 3  # most tokens that a guess goes by
MOST_CONTEXTS = 1 << 16  # remembered, some 20 MB; those that nothing was learnt of for longest are forgotten
_PRIOR_RIGHT = (0.75, 0.55, 0.25)  # by kind: the last three tokens are the same, two, one
_MEMORY = 0.97


@dataclass(frozen=True)
class Successor:
    """A guess.

    Attributes:
        token: what may follow.
        chance: that the draft says so too.
        kind: of the guess, for ``Recycled.observe``.
    """

    token: int
    chance: float
    kind: int


class Recycled:
    """The successors in one text and in the drafts of it.

    Args:
        tokens: of the text so far.

    Attributes:
        tail: its last ``CONTEXT`` tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], tuple[Sequence[int], Sequence[float]]] = {}
        self._right = list(_PRIOR_RIGHT)
        self.tail: list[int] = []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        for token in tokens:
            for context in _contexts(self.tail):
                known = self._after.get(context)
                if known is None or token not in known[0]:
                    self._remember(context, [token], [0.0])
            self.tail = [*self.tail[1 - CONTEXT :], token]

    def learn(self, context: Sequence[int], tokens: Sequence[int], scores: Sequence[float]) -> None:
        """After tokens that end like ``context`` a draft saw these candidates, with scores without noise."""
        for known in _contexts(context):
            self._remember(known, tokens, scores)

    def guess(self, context: Sequence[int], noise: Noise) -> Successor | None:
        """What may follow tokens that end like ``context``; None if nothing is known.

        Args:
            context: tokens.
            noise: that of some tokens where the guess is to stand; asked if there are several candidates.
        """
        for kind, known in enumerate(_contexts(context)):
            if known in self._after:
                tokens, scores = self._after[known]
                best = 0
                if len(tokens) > 1:
                    drawn = [score + one for score, one in zip(scores, noise(tokens), strict=True)]
                    best = drawn.index(max(drawn))
                kind += CONTEXT - min(CONTEXT, len(context))
                return Successor(tokens[best], self._right[kind], kind)
        return None

    def _remember(self, context: tuple[int, ...], tokens: Sequence[int], scores: Sequence[float]) -> None:
        """The newest of a context, and forget the oldest context of too many."""
        self._after.pop(context, None)
        self._after[context] = tokens, scores
        if len(self._after) > MOST_CONTEXTS:
            self._after.pop(next(iter(self._after)))

    def observe(self, kind: int, chance: float) -> None:
        """The draft gave a guess this probability."""
        self._right[kind] = _MEMORY * self._right[kind] + (1 - _MEMORY) * chance


def _contexts(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The last ``CONTEXT`` tokens, or as many as there are, then one fewer, down to the last one."""
    for length in range(min(CONTEXT, len(tokens)), 0, -1):
        yield tuple(tokens[-length:])
