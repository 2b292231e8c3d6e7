"""The draft tree where the draft is computed: grown level by level by tensor code that never asks the host.

Level 0 is the root; each further level has exactly ``width`` nodes, the likeliest guesses over all rows of
the pass before.  Node ``1 + (level − 1)·width + i`` is the i-th of its level; a node that is missing has the
score −∞.  All state lies in tensors made once, every operation works in place and has the same shapes for
any level, so that a pass with its ``advance`` can be captured as a graph and replayed.  The host learns what
grew from one ``summary`` a step (``harvest`` reads it), and of a level's reach a level late.

Slots: node n's keys and values are those of slot ``base + n``.  Nodes that are drafted while a sweep
verifies them use the *shadow* slots after all nodes instead, as the sweep writes exact entries into theirs.

Source: EAGLE-2 (Li et al. 2024) for the dynamic tree.  Knows nothing of times, streams or kernels.
"""

from dataclasses import dataclass

import torch

from subspec.models.decoder import Rows
from subspec.speculation.sampling import SamplingParams, penalized, rank

EMPTY = -torch.inf


@dataclass(frozen=True)
class Shape:
    """The bounds that the state is made for.

    Attributes:
        depth: most levels below the root; ``width``: nodes a level; ``verified``: most rows of a sweep.
        candidates: guesses a row that the host learns of.
        vocabulary: V.
    """

    depth: int
    width: int
    verified: int
    candidates: int
    vocabulary: int

    @property
    def nodes(self) -> int:
        """M: all nodes, the root included."""
        return 1 + self.depth * self.width

    @property
    def slots(self) -> int:
        """Cache slots: all nodes, and the shadows."""
        return self.nodes + self.width

    @property
    def positions(self) -> int:
        """Positions that noise is kept for: those of all levels' tokens, and of the one after."""
        return self.depth + 2


class Levels:
    """One tree.  Between ``begin`` or ``plant`` and the summary, calls follow the device's stream.

    Args:
        shape: its bounds.
        device: where the state lies.

    Attributes:
        first, next: the rows of the root's pass, (1,), and of the newest level's, (width,).
        verify: the rows that ``select`` chose, (verified,); a sweep takes the first ones.
        reach: (width,) fp32, the newest level's probabilities to be reached.
        summary: (summary_size,) int32, what ``summarize`` packs for the host.
        noise: (positions, V) fp32, the row of position p at p modulo ``positions``.
        seen: (V,) bool, the tokens of prompt and text, for the repetition penalty.
        calibration: (2,) fp32, the draft's temperature and the logarithm of 1 − its misses.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        nodes, width, path = shape.nodes, shape.width, shape.depth + 1

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._base, self._level = zeros(1), zeros(1)
        self._token, self._parent, self._slot = zeros(nodes), zeros(nodes), zeros(nodes)
        self._score = zeros(nodes, dtype=torch.float32)
        self._path = zeros(nodes, path)
        self._guess = zeros(nodes, shape.candidates)
        self._guess_score = zeros(nodes, shape.candidates, dtype=torch.float32)
        self._node = torch.arange(nodes, device=device)
        self._place = torch.arange(width, device=device)
        self._depth = (self._node + width - 1).div(width, rounding_mode="floor")
        self._chosen = zeros(shape.verified)
        self.first, self.next, self.verify = (self._rows(count) for count in (1, width, shape.verified))
        self.reach = zeros(width, dtype=torch.float32)
        self.summary = zeros(summary_size(shape), dtype=torch.int32)
        self.noise = zeros(shape.positions, shape.vocabulary, dtype=torch.float32)
        self.seen = zeros(shape.vocabulary, dtype=torch.bool)
        self.calibration = zeros(2, dtype=torch.float32)

    def _rows(self, count: int) -> Rows:
        """Memory for the description of some rows."""

        def numbers(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        tokens = torch.zeros(count, dtype=torch.int64, device=self.device)
        path = self.shape.depth + 1
        return Rows(
            tokens, numbers(count), numbers(count), numbers(count), numbers(count, path), numbers(count)
        )

    # --- a new tree ---

    def begin(self, seed: torch.Tensor) -> None:
        """Start a tree of the root alone; ``seed`` (2,) int64 on the device: its token, and the base."""
        self._base.copy_(seed[1:])
        self._level.zero_()
        self._score.fill_(EMPTY)
        self._score[:1].zero_()
        self._token[:1].copy_(seed[:1])
        self._path.zero_()
        torch.add(self._node, self._base, out=self._slot)
        self._describe(self.first, self._node[:1], self._slot)

    def plant(self, seedling: torch.Tensor) -> None:
        """Start with a tree that the host put together: a ``harvest.seedling``, on the device."""
        nodes, guesses, paths = self.shape.nodes, self._guess.numel(), self._path.numel()
        parts = torch.split(seedling, [1, 1, nodes, nodes, nodes, guesses, guesses, paths])
        self._base.copy_(parts[0])
        self._level.copy_(parts[1])
        self._token.copy_(parts[2])
        self._parent.copy_(parts[3])
        self._score.copy_(parts[4].view(torch.float32))
        self._guess.copy_(parts[5].view_as(self._guess))
        self._guess_score.copy_(parts[6].view(torch.float32).view_as(self._guess_score))
        self._path.copy_(parts[7].view_as(self._path))
        torch.add(self._node, self._base, out=self._slot)
        self._describe(self.next, self._newest(), self._slot)

    # --- growing ---

    def advance(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """Make the next level of what the draft says of the rows ``first`` (1, V) or ``next`` (width, V)."""
        shape, rows = self.shape, self._newest()[: logits.shape[0]]
        if params.repetition_penalty != 1.0:
            logits = penalized(logits.float(), self._seen_by(rows), params.repetition_penalty)
        noise = self._noise_of if params.samples else None
        tokens, scores = rank(logits, noise, params, shape.candidates)  # (T, K)
        logs = torch.log_softmax(scores / self.calibration[0], dim=-1) + self.calibration[1]
        totals = (self._score.index_select(0, rows)[:, None] + logs).flatten()
        totals = torch.where(totals > EMPTY, totals, EMPTY)  # nor NaN
        best, order = torch.sort(totals, descending=True, stable=True)  # ties go to the older parent
        best, order = _padded(best, shape.width, EMPTY), _padded(order, shape.width, 0)
        self._guess.index_copy_(0, rows, tokens)
        self._guess_score.index_copy_(0, rows, scores)
        parents = rows.index_select(0, order.div(tokens.shape[1], rounding_mode="floor"))
        self._level.add_(1).clamp_(max=shape.depth)  # a pass that warms up for its capture runs unasked
        self._append(tokens.flatten().index_select(0, order), parents, best)

    def _noise_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The noise of tokens (T, C) at the position that the newest level's passes guess."""
        position = (self._base + self._level + 1) % self.shape.positions
        return self.noise.index_select(0, position)[0].index_select(0, tokens.flatten()).view(tokens.shape)

    def _append(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        """Write the newest level's nodes (width,), and the rows of their pass."""
        nodes = self._newest()
        self._token.index_copy_(0, nodes, tokens)
        self._parent.index_copy_(0, nodes, parents)
        self._score.index_copy_(0, nodes, scores)
        paths = self._path.index_select(0, parents)  # (width, P)
        paths.index_copy_(1, self._level, nodes[:, None])
        self._path.index_copy_(0, nodes, paths)
        torch.exp(scores, out=self.reach)
        self._describe(self.next, nodes, self._slot)

    def _newest(self) -> torch.Tensor:
        """The nodes of the newest level (width,); of level 0, the root and nodes that nobody counts."""
        first = (self._level - 1) * self.shape.width + 1
        return (first + self._place).clamp(min=0) * (self._level > 0)

    def _seen_by(self, rows: torch.Tensor) -> torch.Tensor:
        """What each row's text has in it: (T, V) bool."""
        seen = self.seen[None].repeat(len(rows), 1)
        on_path = self._token.index_select(0, self._path.index_select(0, rows).flatten())
        return seen.scatter_(1, on_path.view(len(rows), -1), True)

    def _describe(self, rows: Rows, nodes: torch.Tensor, slots: torch.Tensor) -> None:
        """Fill in the rows of a pass over nodes whose entries are in ``slots`` (M,)."""
        paths = self._path.index_select(0, nodes)  # (T, P)
        rows.tokens.copy_(self._token.index_select(0, nodes))
        rows.positions.copy_(self._depth.index_select(0, nodes) + self._base)
        rows.slots.copy_(slots.index_select(0, nodes))
        rows.prefix.copy_(self._base.expand(len(nodes)))
        rows.paths.copy_(slots.index_select(0, paths.flatten()).view_as(paths))
        rows.path_lens.copy_(self._depth.index_select(0, nodes) + 1)

    # --- verifying ---

    def select(self, count: int) -> None:
        """Describe the ``count`` likeliest nodes in the first rows of ``verify``, by number.

        Where there are fewer, the root takes their place: the same entry is written once more.
        """
        best, order = torch.sort(self._score, descending=True, stable=True)  # parents before children
        likeliest = _padded(torch.where(best > EMPTY, order, 0), count, 0)
        nodes = torch.sort(likeliest).values
        self._chosen[:count].copy_(nodes)
        self._describe(self.verify.chunk(0, count), nodes, self._node + self._base)

    def shadow(self, level: int) -> None:
        """Let the newest level, ``level``, draft in shadow slots: a sweep is about to write its own ones."""
        rows = self.first if level == 0 else self.next
        count = len(rows)
        nodes = self._newest()[:count]
        self._slot.index_copy_(0, nodes, self._base + self.shape.nodes + self._place[:count])
        self._describe(rows, nodes, self._slot)

    def summarize(self, targets: torch.Tensor | None) -> None:
        """Pack what the host wants to know of a step.

        Args:
            targets: (T,) int64, the target's token after each row of the sweep; None: the host chooses.
        """
        chosen = torch.zeros(self.shape.verified, dtype=torch.int64, device=self.device)
        if targets is not None:
            chosen[: len(targets)] = targets
        parts = [self._token, self._parent, self._score, self._guess, self._guess_score, self._chosen, chosen]
        packed = [
            part.flatten().view(torch.int32) if part.is_floating_point() else part.flatten().int()
            for part in parts
        ]
        torch.cat(packed, out=self.summary)


def summary_sizes(shape: Shape) -> list[int]:
    """Numbers of a summary's parts: token, parent, score, guesses and their scores, chosen nodes, targets."""
    nodes, guesses, verified = shape.nodes, shape.nodes * shape.candidates, shape.verified
    return [nodes, nodes, nodes, guesses, guesses, verified, verified]


def summary_size(shape: Shape) -> int:
    """Numbers of a summary."""
    return sum(summary_sizes(shape))


def _padded(values: torch.Tensor, count: int, filler: float) -> torch.Tensor:
    """The first ``count`` values, with filler where there are fewer."""
    if len(values) >= count:
        return values[:count]
    return torch.nn.functional.pad(values, (0, count - len(values)), value=filler)
