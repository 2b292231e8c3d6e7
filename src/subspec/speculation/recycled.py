"""What followed a token the last time: guesses that a draft pass tries in the rows it has to spare.

A draft pass forwards a node to learn its child.  Often the text, or an earlier pass, has said what follows;
a pass that forwards the guess along with the node is a level further where the guess is right.  Rows are
cheap, since a pass loads its weights once.  How often the draft agrees with a guess is counted by how much of
the context is the same, so that guesses compete with other nodes by probability.

Source: token recycling (Luo et al. 2024, arXiv 2408.08696) keeps such a table and lets the target check its
guesses; here the draft does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT = 3  # most tokens that a guess goes by
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
        self._after: dict[tuple[int, ...], int] = {}
        self._right = list(_PRIOR_RIGHT)
        self.tail: list[int] = []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        for token in tokens:
            self.learn(self.tail, token)
            self.tail = [*self.tail[1 - CONTEXT :], token]

    def learn(self, context: Sequence[int], following: int) -> None:
        """``following`` came after tokens that end like ``context``."""
        for length in range(1, min(CONTEXT, len(context)) + 1):
            self._after[tuple(context[-length:])] = following

    def guess(self, context: Sequence[int]) -> Successor | None:
        """What may follow tokens that end like ``context``; None if nothing is known."""
        for length in range(min(CONTEXT, len(context)), 0, -1):
            found = self._after.get(tuple(context[-length:]))
            if found is not None:
                kind = CONTEXT - length
                return Successor(found, self._right[kind], kind)
        return None

    def observe(self, kind: int, chance: float) -> None:
        """The draft gave a guess this probability."""
        self._right[kind] = _MEMORY * self._right[kind] + (1 - _MEMORY) * chance
