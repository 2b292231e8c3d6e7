"""When another draft pass pays, how wide, and which nodes are worth a place in the sweep.

Decoding is a renewal process: each step costs seconds and commits tokens, and the best long-run rate λ
(tokens/s) is reached by taking whatever brings more tokens than λ × the seconds it costs.  λ is the rate of
the steps just done.  A node brings the probability that the target walks through it; what it costs,
``times.StepTimes`` predicts: rows are free while the link is the slower one, except that they take away
from drafting in the gaps; drafting is free while it fits the prefetching.  If not even one pass pays, a step
is plain.  The token that ends a text is worth more than others, as it saves a step.  Plain numbers, no
tensors.  Source: renewal reward, e.g. Ross, Stochastic Processes, section 3.6; the ratio's fixed point is
Dinkelbach's (1967).
"""

from collections.abc import Sequence

from subspec.speculation.preview import PREVIEW_ROWS
from subspec.speculation.times import StepTimes

FIRST_GUESS_AGREEMENT = 0.85
FIRST_GAP_VALUE = 0.3
PREVIEW_SHARE = 0.12  # of a sweep's gaps: more is not spent on one look ahead
READING_SHARE = 0.33  # of a prompt's gaps: more is not spent to have them at all
_FORGET = 0.85  # of tokens and seconds, a step
_FORGET_AGREEMENT = 0.97
_FORGET_GAP = 0.9
_ENDING_SHARE = 0.5  # of a plain step: nearest to the best decisions where those can be computed
_LEAST_SCORE = 0.004  # nodes less likely than this are not even kept
_TRY_AGAIN = (8, 64)  # plain steps between trials whether drafting pays by now: the first pause, the longest


class Policy:
    """Decides for one model on one machine; what it learns outlasts a text.

    Args:
        times: what drafting and sweeping cost, kept up to date by the decoding loop.
        width: most rows of a draft pass.
        nodes: most nodes that a sweep verifies.
        depth: most levels of a tree.
    """

    def __init__(self, times: StepTimes, *, width: int, nodes: int, depth: int) -> None:
        self.times, self.width, self.nodes, self.depth = times, width, nodes, depth
        self.agreement = FIRST_GUESS_AGREEMENT  # probability of a node's likeliest child, given the node
        self.gap_value = FIRST_GAP_VALUE  # share of drafting in gaps that a later step uses
        self._tokens = self._seconds = 0.0
        self._plain_steps, self._pause = 0, _TRY_AGAIN[0]

    @property
    def rate(self) -> float:
        """λ: tokens/s of the steps just done; before the first one, of the best chain to hope for."""
        if self._seconds > 0:
            return self._tokens / self._seconds
        best, tokens, likely = 0.0, 1.0, 1.0
        for depth in range(self.depth + 1):
            step_s = self.times.step_s(depth * self.times.draft(1), depth + 1)
            best = max(best, tokens / step_s if step_s > 0 else 0.0)
            likely *= self.agreement
            tokens += likely
        return best

    @property
    def ending(self) -> float:
        """What it is worth, in tokens, that a step ends the text: a part of what another would take."""
        return _ENDING_SHARE * self.rate * self.times.step_s(0.0, 1)

    def nearing_end(self, reached: float, levels: int | None) -> float:
        """What a draft pass over a node is worth, in tokens, for bringing the text nearer to its end.

        Args:
            reached: the node's probability.
            levels: to draft below it until a walk can fill the text, of which the pass is one; None if the
                tree does not get there.
        """
        if not levels:
            return 0.0
        return self.ending * reached * self.agreement ** (levels - 1) / levels

    @property
    def least_score(self) -> float:
        """Nodes less likely to be reached than this are not worth keeping."""
        return max(_LEAST_SCORE, 0.5 * self.gap_value * self.rate * self.times.sweep.row_s)

    def begin(self) -> None:
        """A text begins: what the last one's rate was counts for little."""
        self._tokens, self._seconds = 0.3 * self._tokens, 0.3 * self._seconds
        self._plain_steps = 0

    def passed(self, likeliest: float) -> None:
        """A node was drafted; its likeliest child has this probability, given the node."""
        self.agreement = _FORGET_AGREEMENT * self.agreement + (1 - _FORGET_AGREEMENT) * likeliest

    def stepped(self, tokens: int, seconds: float, drafted: bool) -> None:
        """A step ended; ``drafted``: whether it verified anything but the root."""
        self._tokens = _FORGET * self._tokens + tokens
        self._seconds = _FORGET * self._seconds + seconds
        self._plain_steps = 0 if drafted else self._plain_steps + 1
        if drafted and tokens > 1:
            self._pause = _TRY_AGAIN[0]

    def drafted_in_gaps(self, used_s: float, gap_s: float) -> None:
        """Of the seconds drafted in a sweep's gaps, a later step used some."""
        if gap_s > 0:
            self.gap_value = _FORGET_GAP * self.gap_value + (1 - _FORGET_GAP) * min(used_s / gap_s, 1.0)

    def verify(self, scores: Sequence[float], drafting_s: float) -> int:
        """How many of the likeliest nodes to verify.

        Args:
            scores: tokens to expect of the nodes, likeliest first: their probabilities to be reached, the
                root's 1 first, and what it is worth that the text ends there.
            drafting_s: what the step has drafted.
        """
        best, best_value, value, rate = 1, 0.0, 0.0, self.rate
        for count in range(2, min(len(scores), self.nodes) + 1):
            value += scores[count - 1] - rate * self._row_s(drafting_s, count - 1)
            if value > best_value:
                best, best_value = count, value
        return best

    def widen(self, frontier: Sequence[float], scores: Sequence[float], drafting_s: float) -> int:
        """How many of the likeliest undrafted nodes to forward now; 0: draft no more.

        Args:
            frontier: their probabilities, and what ``nearing_end`` adds.
            scores: of all nodes, as for ``verify``.
            drafting_s: what the step has drafted so far.
        """
        rows = self.verify(scores, drafting_s)
        best, best_gain = 0, 0.0
        reached, rate = 0.0, self.rate
        # A new node costs its row, or, where the sweep is full, the place of the least likely node there.
        place = scores[self.nodes - 1] if len(scores) >= self.nodes else 0.0
        row = max(rate * self._row_s(drafting_s, rows), place)
        for count, score in enumerate(frontier[: self.width], start=1):
            reached += max(score * self.agreement - row, 0.0)
            spent_s = drafting_s + self.times.draft(count)
            later = self.times.step_s(spent_s, rows) - self.times.step_s(drafting_s, rows)
            gain = reached - rate * later
            if gain > best_gain:
                best, best_gain = count, gain
        if best == 0 and len(scores) == 1 and frontier and self._plain_steps >= self._pause:
            self._pause = min(2 * self._pause, _TRY_AGAIN[1])
            return 1
        return best

    def read_prompt(self, rows: int) -> bool:
        """Whether the draft shall read a prompt's ``rows`` for itself, and go on in the gaps of its sweep."""
        times = self.times
        idle_s = times.link_s - times.sweep(rows)
        return 0 < times.prompt_s(rows) < READING_SHARE * idle_s

    def preview(self, drafting_s: float, rows: int, swept: float) -> int:
        """How many rows of a sweep to preview now; 0: none.

        Args:
            drafting_s: what the step drafted before the sweep.
            rows: that the sweep verifies.
            swept: share of the layers that it has done.
        """
        gap_s = self.times.gap_s(drafting_s, rows)
        return min(self.times.preview_rows(PREVIEW_SHARE * gap_s, 1 - swept), PREVIEW_ROWS)

    def widen_in_gap(self, frontier: Sequence[float]) -> int:
        """How many of the likeliest undrafted nodes to forward in a gap: those that bring most a second."""
        best, best_gain, reached = 0, 0.0, 0.0
        for count, score in enumerate(frontier[: self.width], start=1):
            reached += score
            seconds = self.times.draft(count)
            gain = reached / seconds if seconds > 0 else reached
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def _row_s(self, drafting_s: float, rows: int) -> float:
        """What one more verified row costs: its products, or the drafting that they keep from a gap."""
        bound = self.times.step_s(drafting_s, rows + 1) - self.times.step_s(drafting_s, rows)
        return bound + self.gap_value * max(self.times.sweep.row_s - bound, 0.0)
