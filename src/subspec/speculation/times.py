"""What drafting and sweeping cost here, learnt while decoding: seconds by row count, plain numbers.

A step's seconds are those of its drafting, and then of the sweep: the longer one of what it computes and
what it still has to wait for.  While a step drafts, the link fills the free slots: that much is hidden.
Knows nothing of trees.
"""

from dataclasses import dataclass, field

_FORGET = 0.8  # what is left of an old draft time once a new one is seen
_FORGET_SWEEP = 0.9
_HEAD_SHARE = 0.15  # the output head's part of a draft pass, beside all layers' 1
_BASE_ROWS = 40.0  # rows that cost as much as what a sweep costs besides, until that is known


@dataclass
class DraftTimes:
    """Seconds of a draft pass by its rows: means that forget, straight lines between what was seen."""

    seen: dict[int, float] = field(default_factory=dict)

    def observe(self, rows: int, seconds: float) -> None:
        """A pass ended."""
        known = self.seen.get(rows)
        if known is None:
            self.seen[rows] = seconds
        else:  # a single late pass says little
            self.seen[rows] = _FORGET * known + (1 - _FORGET) * min(seconds, 2 * known)

    def __call__(self, rows: int) -> float:
        """Expected seconds; 0 as long as nothing was seen."""
        if not self.seen or rows <= 0:
            return 0.0
        if rows in self.seen:
            return self.seen[rows]
        below = max((known for known in self.seen if known < rows), default=None)
        above = min((known for known in self.seen if known > rows), default=None)
        if below is None:
            assert above is not None
            return self.seen[above]
        if above is None:
            return self.seen[below] * rows / below
        share = (rows - below) / (above - below)
        return (1 - share) * self.seen[below] + share * self.seen[above]


class SweepTimes:
    """Seconds that a sweep computes, as base + rows · slope: a fit that forgets."""

    def __init__(self) -> None:
        self.base_s = self.row_s = 0.0
        self._weight = self._n = self._nn = self._t = self._nt = 0.0

    def start(self, rows: int, seconds: float) -> None:
        """A first guess from one sweep of any size, a prefill's."""
        if self._weight == 0:
            self.row_s = seconds / (rows + _BASE_ROWS)
            self.base_s = _BASE_ROWS * self.row_s
            self._add(rows, seconds, 0.3)

    def observe(self, rows: int, seconds: float) -> None:
        """A sweep ended."""
        self._add(rows, seconds, 1.0)
        # A weak pull to the slope known so far: sweeps of equal size say nothing of it.
        pull = 0.02 * self._weight * max(self._n / self._weight, 1.0) ** 2
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        spread = self._nn - self._weight * mean_n**2
        together = self._nt - self._weight * mean_n * mean_t
        slope = (together + pull * self.row_s) / (spread + pull)
        self.row_s = min(max(slope, 0.0), mean_t / max(mean_n, 1.0))
        self.base_s = mean_t - self.row_s * mean_n

    def __call__(self, rows: int) -> float:
        """Expected seconds."""
        return self.base_s + rows * self.row_s

    def _add(self, rows: int, seconds: float, weight: float) -> None:
        fade = _FORGET_SWEEP
        self._weight = fade * self._weight + weight
        self._n = fade * self._n + weight * rows
        self._nn = fade * self._nn + weight * rows * rows
        self._t = fade * self._t + weight * seconds
        self._nt = fade * self._nt + weight * rows * seconds


@dataclass
class StepTimes:
    """What a step takes.

    Attributes:
        draft: of draft passes; ``sweep``: of what sweeps compute.
        link_s: that the link needs for what a sweep streams; 0 if nothing streams.
        ahead_s: of it, what fits the slots while no sweep runs.
        prompt_row_s: of a draft pass over many rows, a row's share; 0 until one was seen.
        preview_row_s: a row's share of what a preview of all layers would take; 0 until one was seen.
    """

    draft: DraftTimes = field(default_factory=DraftTimes)
    sweep: SweepTimes = field(default_factory=SweepTimes)
    link_s: float = 0.0
    ahead_s: float = 0.0
    prompt_row_s: float = 0.0
    preview_row_s: float = 0.0

    def prompt_s(self, rows: int) -> float:
        """Seconds of a draft pass that reads ``rows`` of a prompt; 0 as long as nothing is known."""
        most = max(self.draft.seen, default=0)
        if rows <= most or most <= 1:
            return self.draft(rows)
        return self.draft(1) + rows * (self.prompt_row_s or self._guessed_row_s)

    def observe_prompt(self, rows: int, seconds: float) -> None:
        """The draft read ``rows`` of a prompt."""
        if rows > max(self.draft.seen, default=0):
            self.prompt_row_s = max(seconds - self.draft(1), 0.0) / rows

    def preview_rows(self, seconds: float, left: float) -> int:
        """Rows that a preview through the ``left`` share of the layers can have in some seconds."""
        if self.draft(1) * (left + _HEAD_SHARE) > seconds:
            return 0
        row_s = (self.preview_row_s or self._guessed_row_s) * (left + _HEAD_SHARE)
        return int(seconds / row_s) if row_s > 0 else 0

    def observe_preview(self, rows: int, left: float, seconds: float) -> None:
        """A preview of ``rows`` through the ``left`` share of the layers ended."""
        row_s = seconds / (rows * (left + _HEAD_SHARE))
        if rows > max(self.draft.seen, default=0):
            known = self.preview_row_s
            self.preview_row_s = row_s if known == 0 else _FORGET * known + (1 - _FORGET) * row_s

    @property
    def _guessed_row_s(self) -> float:
        """A row's share of many, until one was seen: twice that of few, as many do not share a load."""
        most = max(self.draft.seen, default=0)
        return 2 * max(self.draft(most) - self.draft(1), 0.0) / (most - 1) if most > 1 else 0.0

    def step_s(self, drafting_s: float, rows: int) -> float:
        """Seconds of a step that drafts for ``drafting_s`` and verifies ``rows`` nodes."""
        waiting_s = self.link_s - min(drafting_s, self.ahead_s)
        return drafting_s + max(self.sweep(rows), waiting_s)

    def gap_s(self, drafting_s: float, rows: int) -> float:
        """Of a step, the seconds that its sweep leaves the processor idle."""
        return max(self.step_s(drafting_s, rows) - drafting_s - self.sweep(rows), 0.0)

    def observe_link(self, link_s: float, ahead_s: float) -> None:
        """A sweep's bytes took this long."""
        known = self.link_s
        self.link_s = link_s if known == 0 else 0.8 * known + 0.2 * link_s
        self.ahead_s = ahead_s
