"""What the host knows of a tree that grows on a device, and what it decides by that: a level late.

The device tells each level's reach by a copy that nobody waits for.  Before another pass is launched, the
host looks at the levels that have had the time of ``LATE`` further ones to come back; of the newest ones it
expects what the draft's agreement lets it.  Knows nothing of slots or rows.
"""

import time

from subspec.memory.exchange import Exchange, Pending
from subspec.speculation.draft import NO_REACH, TreeShape
from subspec.speculation.policy import Policy

LATE = 1  # levels that a decision is late: the host looks at one level while the device computes the next
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of sweeps: few shapes, so that each is seen often


class Outlook:
    """The reach of one text's trees.

    Args:
        exchange: brings what the device tells.
        policy: decides by times and probabilities; None: the fixed tree's own bounds do.
        shape: the bounds.
    """

    def __init__(self, exchange: Exchange, policy: Policy | None, shape: TreeShape) -> None:
        self._exchange, self._policy, self._shape = exchange, policy, shape
        self._coming: list[Pending] = []  # reach of levels that nobody has looked at, oldest first
        self._frontier: list[float] = []  # of the newest level that was looked at, falling
        self._scores: list[float] = []  # of all nodes looked at, falling
        self._looked_s = 0.0  # when a level was looked at last, in a row of passes

    def begin(self, scores: list[float], frontier: list[float]) -> None:
        """A tree is there: probabilities to be reached of all its nodes and of the newest level, falling."""
        self._coming, self._scores, self._frontier = [], scores, frontier

    def resume(self) -> None:
        """Passes follow one another from here on: the time from look to look is theirs."""
        self._looked_s = 0.0

    def launched(self, reach: Pending) -> None:
        """Another level was launched."""
        self._coming.append(reach)

    def pays(self, spent_s: float) -> bool:
        """Whether to draft another level.

        Args:
            spent_s: drafting in this step so far.
        """
        self._look()
        if self._policy is None:
            return sum(self._frontier) >= max(self._shape.min_reach, NO_REACH)
        return self._policy.widen(self._expected(), self._expected_scores(), spent_s) > 0

    def pays_in_gap(self) -> bool:
        """Whether another level is worth a gap."""
        self.resume()
        self._look()
        return self._policy is not None and self._policy.widen_in_gap(self._expected()) > 0

    def rows(self, most: int, spent_s: float) -> int:
        """How many nodes to verify, of ``most`` that there are."""
        if self._policy is None or most == 1:
            return most
        wanted = self._policy.verify(self._expected_scores(), spent_s)
        return min(next((rows for rows in ROWS if rows >= wanted), most), most)

    def _look(self) -> None:
        """Look at the levels that are due."""
        while len(self._coming) > LATE:
            reach = self._exchange.take(self._coming.pop(0)).tolist()
            now = time.perf_counter()
            if self._policy is not None and self._looked_s:
                self._policy.times.draft.observe(len(reach), now - self._looked_s)
            self._looked_s = now
            self._frontier = sorted((one for one in reach if one > 0), reverse=True)
            self._scores = sorted([*self._scores, *self._frontier], reverse=True)

    def _expected(self) -> list[float]:
        """The newest level's probabilities to be reached, as far as can be told, falling."""
        assert self._policy is not None
        return [one * self._policy.agreement ** len(self._coming) for one in self._frontier]

    def _expected_scores(self) -> list[float]:
        """All nodes' probabilities, falling, those of levels that nobody looked at as expected."""
        assert self._policy is not None
        agreement, levels = self._policy.agreement, range(1, len(self._coming) + 1)
        coming = [one * agreement**level for level in levels for one in self._frontier]
        return sorted([*self._scores, *coming], reverse=True)
