"""From a draft's scores to probabilities that the target agrees, learnt while decoding.

A draft row's candidates get ``(1 − miss) · softmax(scores / temperature)``; *miss* is how often the
target's token is none of them.  Every row of an accepted path shows which candidate the target took; the
temperature is fitted to what was seen last by maximum likelihood, the misses are counted.  One
``Calibration`` serves one way of choosing tokens, since drawing and greedy decoding agree differently.  Knows
nothing of trees or times.

Source: temperature scaling, Guo et al. 2017 (arXiv 1706.04599), section 4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CALIBRATION_NAMES = {False: "greedy", True: "drawn"}
CANDIDATES = 8  # of a draft row; what is beyond them counts as a miss
DEFAULT_TEMPERATURE = 0.3
DEFAULT_MISS = 0.02
WINDOW = 512  # observations that the fit looks at
PRIOR_CERTAINTY = 8.0  # of a starting temperature that nothing was seen of: 1 / variance of its logarithm
MOST_CERTAINTY = 24.0  # of one that an earlier process has learnt: other texts may come
_MISS_WEIGHT = 32.0  # rows that the starting miss rate is worth
_FEWEST_MISSES = 0.05  # that are always counted in: that none was seen does not prove that there are none
_NEVER = -1e4  # the score of a candidate that is none
_REFIT_AFTER = 8  # new observations
_LIMITS = (0.01, 20.0)  # of the temperature
BINS = 10  # of the reliability record


@dataclass(frozen=True)
class Reliability:
    """What was promised and what came, by promised probability: bin i holds [i / 10, (i + 1) / 10).

    The last bin holds 1 as well.

    Attributes:
        promised: sum of the probabilities of a bin's candidates.
        kept: how many of them the target took.
        count: how many there were.
    """

    promised: tuple[float, ...]
    kept: tuple[int, ...]
    count: tuple[int, ...]

    @property
    def error(self) -> float | None:
        """Expected calibration error: |promised − kept| over all candidates, per candidate; None of none."""
        total, pairs = sum(self.count), zip(self.promised, self.kept, strict=True)
        return sum(abs(promised - kept) for promised, kept in pairs) / total if total else None


class Calibration:
    """The temperature and miss rate of one way of choosing tokens.

    Args:
        temperature: to start from.
        miss: likewise, in [0, 1).
        certainty: of that temperature.
    """

    def __init__(
        self,
        temperature: float = DEFAULT_TEMPERATURE,
        miss: float = DEFAULT_MISS,
        certainty: float = PRIOR_CERTAINTY,
    ) -> None:
        self.temperature, self.miss, self.certainty = temperature, miss, certainty
        self._prior = temperature, certainty
        self._missed, self._seen = max(miss * _MISS_WEIGHT - _FEWEST_MISSES, 0.0), _MISS_WEIGHT
        self._scores = np.full((WINDOW, CANDIDATES), _NEVER)  # a ring; each row's best score is 0
        self._taken = np.zeros(WINDOW, dtype=np.int64)
        self._fitted = self._fresh = 0  # rows written to the ring; of them, since the last fit
        self.observations = 0
        self._promised, self._kept, self._count = [0.0] * BINS, [0] * BINS, [0] * BINS

    def log_probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Logs of the probabilities that the target takes each candidate: (T, K) from scores (T, K).

        Tensor code without synchronization; rows without candidates give −∞ or NaN.
        """
        return torch.log_softmax(scores / self.temperature, dim=-1) + math.log1p(-self.miss)

    def observe(self, scores: torch.Tensor, logs: Sequence[float], taken: int | None) -> None:
        """A draft row met the target.

        Args:
            scores: (K,) of its candidates, as ``log_probabilities`` took them.
            logs: the probabilities' logs that were promised then.
            taken: which candidate the target took; None for another token.
        """
        self.observations += 1
        self._seen += 1
        self._missed += taken is None
        self.miss = min((self._missed + _FEWEST_MISSES) / self._seen, 0.99)
        for candidate, log in enumerate(logs):
            probability = math.exp(log) if log <= 0 else math.nan
            if not probability > 0:
                continue
            found = min(int(probability * BINS), BINS - 1)
            self._promised[found] += probability
            self._kept[found] += candidate == taken
            self._count[found] += 1
        if self._seen > WINDOW:  # forget slowly
            self._seen, self._missed = self._seen / 2, self._missed / 2
        if taken is not None:
            row = scores.double().numpy()[:CANDIDATES]
            place = self._fitted % WINDOW
            self._scores[place] = _NEVER
            usable = np.isfinite(row)
            self._scores[place, : len(row)] = np.where(usable, row - row[usable].max(), _NEVER)
            self._taken[place] = taken
            self._fitted += 1
            self._fresh += 1
            if self._fresh >= _REFIT_AFTER:
                self._refit()

    def learnt(self) -> dict[str, float]:
        """The values to start from next time."""
        return {"temperature": self.temperature, "miss": self.miss, "certainty": self.certainty}

    @property
    def reliability(self) -> Reliability:
        """The record so far."""
        return Reliability(tuple(self._promised), tuple(self._kept), tuple(self._count))

    def _refit(self) -> None:
        """The likeliest temperature of the rows in the window, the prior counted in: Newton's method on 1/T.

        The log likelihood of β = 1/T is concave: Σ β·s(taken) − log Σ exp(β·s); the prior is a bell in log β.
        """
        self._fresh = 0
        count = min(self._fitted, WINDOW)
        scores = self._scores[:count]  # (n, K)
        won = scores[np.arange(count), self._taken[:count]]
        (start, weight), beta = self._prior, 1 / self.temperature
        for _ in range(4):
            weights = np.exp(beta * scores)
            weights /= weights.sum(-1, keepdims=True)
            mean = (weights * scores).sum(-1)
            spread = (weights * scores**2).sum(-1) - mean**2
            slope = float((won - mean).sum()) - weight * math.log(beta * start) / beta
            curve = float(spread.sum()) + weight / beta**2
            beta = min(max(beta + slope / curve, beta / 2, 1 / _LIMITS[1]), beta * 2, 1 / _LIMITS[0])
        self.temperature = 1 / beta
        self.certainty = min(curve * beta**2, MOST_CERTAINTY)


def calibrations(learnt: dict[str, dict[str, float]]) -> dict[bool, Calibration]:
    """A calibration for greedy decoding (False) and one for drawing (True), from learnt values.

    Values that make no sense are replaced by the defaults.
    """
    found = {}
    for drawn, name in CALIBRATION_NAMES.items():
        values = learnt.get(name, {})
        temperature, miss = values.get("temperature", 0.0), values.get("miss", -1.0)
        certainty = values.get("certainty", PRIOR_CERTAINTY)
        found[drawn] = Calibration(
            temperature if _LIMITS[0] <= temperature <= _LIMITS[1] else DEFAULT_TEMPERATURE,
            miss if 0 <= miss < 1 else DEFAULT_MISS,
            certainty if PRIOR_CERTAINTY <= certainty <= MOST_CERTAINTY else PRIOR_CERTAINTY,
        )
    return found
