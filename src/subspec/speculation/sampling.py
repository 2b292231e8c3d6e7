"""From logits to tokens: filters, then the likeliest under noise keyed by position (``noise``).

A token is argmax(log p / T + Gumbel(seed, position)) after penalty, temperature, top-k, top-p and min-p, in
transformers' order.  The noise depends on seed and position alone, so that a token depends on its logits
and its context, not on when, in which tree, or beside which rows it was computed; greedy decoding is the
noiseless case. The draft ranks its guesses under the same noise.  Source: the Gumbel-max trick (Gumbel
1954; Maddison et al. 2014).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from subspec.errors import OptionError
from subspec.kernels.choice import greatest, greatest_of_row, uniform
from subspec.speculation.noise import gumbel, likeliest_under_noise

GREEDY_CANDIDATES = 8  # of a draft row: what is beyond them has no probability worth counting
CANDIDATES = 64  # of a draft row, ranked under the noise
NOISY_POSITIONS = 20  # whose noise is kept; that of others is made anew when it is asked for
NUCLEUS_GUESS = 1024  # logits looked at first by top-p; a nucleus that is larger costs a full sort


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; the words are transformers'.

    Attributes:
        max_new_tokens: most tokens to generate.
        do_sample: draw tokens instead of taking the likeliest.  None: draw if a temperature is given.
        temperature: divisor of the logits; default 1 when drawing.
        top_k: draw among the k likeliest; 0: all.
        top_p: draw among the likeliest that hold this much probability.
        min_p: drop tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: divides positive (multiplies negative) logits of tokens already in prompt or text.
        seed: of the noise.
        stop: strings that end the text, themselves left out.
        ignore_eos: go on after the model's end tokens.
    """

    max_new_tokens: int = 256
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        drawing, temperature = self.do_sample, self.temperature
        checks: list[tuple[bool, str, object, str]] = [
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (temperature is None or 0 <= temperature < float("inf"), "temperature", temperature, "0 or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]"),
            (
                0 < self.repetition_penalty < float("inf"),
                "repetition_penalty",
                self.repetition_penalty,
                "above 0",
            ),
            (0 <= self.seed < 1 << 64, "seed", self.seed, "between 0 and 2^64 - 1"),
            (type(self.stop) is tuple and all(self.stop), "stop", self.stop, "a tuple of non-empty strings"),
            (not (drawing and temperature == 0), "temperature", temperature, "above 0 with do_sample=True"),
            (
                not (drawing is False and temperature),
                "temperature",
                temperature,
                "0 or None with do_sample=False",
            ),
        ]
        for good, name, value, needed in checks:
            if not good:
                raise OptionError(f"{name} is {value!r}: it must be {needed}")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.temperature) if self.do_sample is None else self.do_sample

    @property
    def divisor(self) -> float:
        """The temperature in use; 1 for greedy decoding."""
        return float(self.temperature) if self.samples and self.temperature is not None else 1.0


class Sampler:
    """Chooses tokens for one text.

    Args:
        params: filters, temperature and seed.
        context: token ids so far (for the penalty).
        draft_temperature: divisor that turns a draft's perturbed scores into probabilities; kept.
        candidates: how many of a draft row's likeliest tokens are ranked under the noise.
        ends: tokens that end the text: nothing is worth drafting after them; kept.
    """

    def __init__(
        self,
        params: SamplingParams,
        context: Sequence[int],
        draft_temperature: float = 1.0,
        candidates: int = CANDIDATES,
        ends: Collection[int] = (),
    ) -> None:
        self.params, self.ends = params, frozenset(ends)
        self.draft_temperature = draft_temperature
        self._candidates = candidates
        self._seen = set(context)
        self._uniform: dict[int, np.ndarray] = {}  # what the noise of a position is made from
        self._vocabulary = 0  # size, once logits were seen

    def observe(self, tokens: Sequence[int], position: int) -> None:
        """Tokens were committed; noise of positions before ``position`` is forgotten."""
        self._seen.update(tokens)
        self._uniform = {place: row for place, row in self._uniform.items() if place >= position}

    def choose(self, logits: torch.Tensor, position: int, path: Sequence[int] = ()) -> int:
        """The target's token at ``position``.

        Args:
            logits: (V,) of the row before it, bf16, fp16 or fp32.
            position: of the token chosen.
            path: tokens after the committed ones that lead to it.
        """
        if not self.params.samples:
            row = logits if self.params.repetition_penalty == 1.0 else self._penalized(logits.float(), path)
            return int(greatest_of_row(row, 1)[1])
        row = self._penalized(logits.float(), path)
        kept, tokens = keep(row / self.params.divisor, self.params)
        self._vocabulary = logits.shape[-1]
        numbers = self._uniform_at(position)
        best = likeliest_under_noise(kept, numbers if tokens is None else numbers[tokens.numpy()])
        return best if tokens is None else int(tokens[best])

    def chooser(self, logits: torch.Tensor) -> Callable[[int, int, Sequence[int]], int]:
        """``choose`` by the number of a row of logits (T, V), its position and its path."""
        return lambda row, position, path: self.choose(logits[row], position, path)

    def candidates(
        self, logits: torch.Tensor, positions: Sequence[int], paths: Sequence[Sequence[int]], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft's likeliest tokens under the target's own noise.

        Args:
            logits: (T, V) of the draft.
            positions: of the token that each row guesses.
            paths: for each row the tokens after the committed ones that lead to it.
            count: most candidates a row.

        Returns:
            Tokens (T, K) int64 and scores (T, K) fp32, best first, K at most ``count``: penalized logits,
            divided by the temperature and perturbed where tokens are drawn; −∞ where a row has fewer.
        """
        self._vocabulary = logits.shape[-1]
        if self.params.repetition_penalty == 1.0:
            return self._ranked(logits, positions, count)
        ranked = [  # a row at a time: all of them in fp32 would be large
            self._ranked(self._penalized(row.float(), path)[None], [position], count)
            for row, position, path in zip(logits, positions, paths, strict=True)
        ]
        tokens, scores = zip(*ranked, strict=True)
        return torch.cat(tokens), torch.cat(scores)

    def guess(
        self, logits: torch.Tensor, position: int, paths: Sequence[Sequence[int]], width: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The draft's best guesses for the tokens at ``position``.

        Args:
            logits: (T, V) of the draft.
            position: of the guessed tokens.
            paths: for each row the tokens after the committed ones that lead to it.
            width: guesses a row.

        Returns:
            For each row up to ``width`` tokens, best first, and the log of the probability that the target
            takes each: a softmax of perturbed scores over the ranked candidates.
        """
        ranked = self._candidates if self.params.samples else GREEDY_CANDIDATES
        tokens, scores = self.candidates(logits, [position] * len(logits), paths, max(width, ranked))
        logs = torch.log_softmax(scores / self.draft_temperature, dim=-1)
        known = (scores > -torch.inf).sum(dim=-1).clamp(max=width).tolist()
        return (
            [row[:count] for row, count in zip(tokens.tolist(), known, strict=True)],
            [row[:count] for row, count in zip(logs.tolist(), known, strict=True)],
        )

    def noise_of(self, tokens: Sequence[int], position: int) -> list[float]:
        """The noise that some tokens, of those that ``candidates`` gave, have at ``position``."""
        return gumbel(self._uniform_at(position)[list(tokens)]).tolist()

    def _ranked(
        self, logits: torch.Tensor, positions: Sequence[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rank`` of penalized logits (T, V) for tokens at ``positions``."""

        def noise(tokens: torch.Tensor) -> torch.Tensor:
            rows = zip(positions, tokens.numpy(), strict=True)
            return gumbel(np.stack([self._uniform_at(position)[own] for position, own in rows]))

        drawn = noise if self.params.samples else None
        return rank(logits, drawn, self.params, count, self._candidates, greatest)

    def _penalized(self, row: torch.Tensor, path: Sequence[int]) -> torch.Tensor:
        """A float row with the repetition penalty; the row itself when there is none."""
        if self.params.repetition_penalty == 1.0:
            return row
        seen = torch.tensor(sorted(self._seen.union(path)))
        return row.index_copy(0, seen, _weakened(row[seen], self.params.repetition_penalty))

    def _uniform_at(self, position: int) -> np.ndarray:
        """What a position's noise is made from, (V,); the same for a seed and position whenever asked."""
        row = self._uniform.pop(position, None)
        if row is None:
            if len(self._uniform) >= NOISY_POSITIONS:
                self._uniform.pop(next(iter(self._uniform)))  # the one that was asked for longest ago
            row = uniform(self.params.seed, position, self._vocabulary)
        self._uniform[position] = row
        return row


def rank(
    logits: torch.Tensor,
    noise: Callable[[torch.Tensor], torch.Tensor] | None,
    params: SamplingParams,
    count: int,
    candidates: int = CANDIDATES,
    top: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] = torch.topk,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A draft's likeliest tokens under the target's own noise.  Tensor code that reads nothing back.

    Args:
        logits: (T, V), penalized.
        noise: gives the noise of tokens (T, C) at the positions that the rows guess; None: greedy.
        params: temperature and filters.
        count: most candidates a row.
        candidates: of a row's likeliest tokens, how many are ranked under the noise.
        top: values and tokens (T, K) of a row's K greatest logits, falling.

    Returns:
        Tokens (T, K) int64 and scores (T, K) fp32, best first, K at most ``count``; −∞ where a row has fewer.
    """
    vocabulary = logits.shape[-1]
    if noise is None:
        values, tokens = top(logits, min(count, vocabulary))
        return tokens, values.float()
    values, tokens = top(logits, min(max(candidates, count), vocabulary))
    scaled = values.float() / params.divisor
    scores = scaled + noise(tokens)
    scores = torch.where(_kept(scaled, params), scores, -torch.inf)
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)  # ties go to the likelier
    return tokens.gather(1, order[:, :count]), best[:, :count]


def _kept(rows: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Where top-k, top-p and min-p, in this order, leave scaled logits (T, C), which fall along a row."""
    kept = torch.ones_like(rows, dtype=torch.bool)
    if params.top_k > 0:
        kept[:, params.top_k :] = False
    if params.top_p < 1.0:
        values = torch.where(kept, rows, -torch.inf).double()
        held = (values - torch.logsumexp(values, dim=-1, keepdim=True)).exp().cumsum(-1)
        kept[:, 1:] &= held[:, :-1] < params.top_p  # a token stays while those before it hold less
    if params.min_p > 0.0:
        kept &= rows >= rows[:, :1] + float(np.log(params.min_p))
    return kept


def penalized(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Float logits (T, V) with the repetition penalty where ``seen`` (T, V) says; themselves without one."""
    return logits if penalty == 1.0 else torch.where(seen, _weakened(logits, penalty), logits)


def _weakened(values: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits under the repetition penalty."""
    return torch.where(values < 0, values * penalty, values / penalty)


def keep(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply top-k, top-p and min-p to scaled logits (V,), in this order.

    Returns:
        The kept logits and their tokens (int64), or the row and None where nothing is dropped.
    """
    tokens = None
    if 0 < params.top_k < row.shape[-1]:
        row, tokens = greatest_of_row(row, params.top_k)
    if params.top_p < 1.0:
        row, tokens = _nucleus(row, tokens, params.top_p)
    if params.min_p > 0.0:
        chosen = (row >= row.max() + float(np.log(params.min_p))).nonzero()[:, 0]
        row, tokens = row[chosen], chosen if tokens is None else tokens[chosen]
    return row, tokens


def _nucleus(
    row: torch.Tensor, tokens: torch.Tensor | None, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest logits that together hold ``top_p`` of the probability: at least one.

    Looks at the likeliest ``NUCLEUS_GUESS`` first, and sorts everything only if they do not hold enough.
    """
    total = torch.logsumexp(row.double(), dim=-1)
    for count in (min(NUCLEUS_GUESS, len(row)), len(row)):
        values, indices = greatest_of_row(row, count)
        before = (values.double() - total).exp().cumsum(0).roll(1)
        before[0] = 0.0
        kept = int((before < top_p).sum())  # a token stays while those before it hold less than top_p
        if kept < count:
            break
    return values[:kept], indices[:kept] if tokens is None else tokens[indices[:kept]]
