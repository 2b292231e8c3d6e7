"""Guesses that cost nothing: what followed the last tokens when they stood in the text before.

The longest known ending of the text is looked up in prompt and output; what came after it then is guessed to
come again.  How often that is right is counted by the length of the match, on every committed token, so that
such guesses compete with the draft's by probability.

Source: prompt lookup decoding (Saxena 2023); counts with a Beta prior.
"""

from collections.abc import Sequence

LEAST_MATCH = 3
MOST_MATCH = 16
LENGTHS = (3, 4, 5, 7, 10, 16)  # matches are counted by the largest of these that they reach
_PRIOR_RIGHT = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
_PRIOR_WEIGHT = 6.0
_MEMORY = 200.0  # guesses after which the counts are halved


class NgramRates:
    """How often a guess after a match of some length was right; outlasts a text."""

    def __init__(self) -> None:
        self._right = [_PRIOR_WEIGHT * rate for rate in _PRIOR_RIGHT]
        self._made = [_PRIOR_WEIGHT] * len(LENGTHS)

    def __call__(self, match: int) -> float:
        """The probability that a guess after a match of ``match`` tokens is right."""
        kind = self._kind(match)
        return self._right[kind] / self._made[kind]

    def observe(self, match: int, right: bool) -> None:
        """A guess met the text."""
        kind = self._kind(match)
        self._right[kind] += right
        self._made[kind] += 1
        if self._made[kind] > _MEMORY:
            self._right[kind] /= 2
            self._made[kind] /= 2

    def _kind(self, match: int) -> int:
        return sum(match >= length for length in LENGTHS[1:])


class NgramGuesser:
    """The text so far, and where each of its endings stood before.

    Args:
        rates: shared by all texts.
        tokens: the prompt.
    """

    def __init__(self, rates: NgramRates, tokens: Sequence[int]) -> None:
        self._rates = rates
        self._text: list[int] = []
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # LEAST_MATCH tokens → the place after their last standing
        self._place, self._match = 0, 0  # what the text's ending is matched with: the place after it
        for token in tokens:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        for token in tokens:
            if self._match:
                self._rates.observe(self._match, self._text[self._place] == token)
            self._append(token)

    def chain(self, most: int) -> tuple[list[int], list[float]]:
        """Up to ``most`` tokens that may follow the text, and the probability of each, given those before."""
        if not self._match:
            return [], []
        tokens = self._text[self._place : self._place + most]
        chances = [self._rates(min(self._match + i, MOST_MATCH)) for i in range(len(tokens))]
        return tokens, chances

    def _append(self, token: int) -> None:
        """Add a token; go on with the match if it holds, else look for the latest one."""
        held = self._match and self._text[self._place] == token
        self._text.append(token)
        end = len(self._text)
        if held:
            self._place, self._match = self._place + 1, min(self._match + 1, MOST_MATCH)
        else:
            self._match = 0
        ending = tuple(self._text[-LEAST_MATCH:])
        if len(ending) == LEAST_MATCH:
            if not self._match and ending in self._after:
                self._place = self._after[ending]
                self._match = self._length(self._place, end)
            self._after[ending] = end

    def _length(self, place: int, end: int) -> int:
        """How many tokens before ``place`` and before ``end`` agree, up to ``MOST_MATCH``."""
        most = min(place, MOST_MATCH)
        return next((i for i in range(most) if self._text[place - 1 - i] != self._text[end - 1 - i]), most)
