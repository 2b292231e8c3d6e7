"""Grow a draft tree best node first, before a sweep and in its gaps.

A draft pass forwards the likeliest nodes that were not forwarded yet, wherever in the tree they are, and adds
their likely children.  The same growth goes on while a sweep verifies a part of the tree: a verified node
that is forwarded then gets a shadow slot, since the sweep writes exact keys and values into its own.  After
the walk, ``continue_from`` keeps what was grown below the next root.

The host reads one small table of guesses a pass; what it decides rests on that alone.  Decides nothing by
times, which it only adds up (``policy`` decides how wide and how long), and knows nothing of where keys and
values are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from subspec.models.decoder import Rows
from subspec.speculation.calibration import CANDIDATES, Calibration
from subspec.speculation.frontier import Opening, context_of, frontier
from subspec.speculation.recycled import Recycled
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import Walk

CHILDREN = 6  # most children of a node
_TIE = 0.05  # what being equal to a token of lower number costs: bf16 logits are often equal


@dataclass(frozen=True)
class Guess:
    """What a draft pass said of a node's next token.

    Attributes:
        tokens: candidates, best first; ``logs``: of the probabilities that the target takes each.
        scores: (K,) that the calibration made them from; K may be more than there are candidates.
        seconds: the node's share of the pass; ``in_gap``: whether it ran in a sweep's gaps.
    """

    tokens: list[int]
    logs: list[float]
    scores: torch.Tensor
    seconds: float
    in_gap: bool

    def place_of(self, token: int) -> int | None:
        """Which candidate a token is; None if it is none."""
        return self.tokens.index(token) if token in self.tokens else None


@dataclass
class Growth:
    """A tree under way.

    Attributes:
        tree: its nodes; the root is drafted like any other.
        capacity: most slots: nodes and shadows.
        deepest: most levels.
        remaining: tokens that are wanted of the text.
        guesses: of the nodes forwarded so far.
        verified: nodes in the sweep under way; empty while there is none.
        recycled: guesses that draft passes try.
        previewed: what previews of that sweep said of its nodes, and by which calibration.
    """

    tree: DraftTree
    sampler: Sampler
    calibration: Calibration
    capacity: int
    deepest: int
    remaining: int = 1
    guesses: dict[int, Guess] = field(default_factory=dict)
    verified: frozenset[int] = frozenset()
    recycled: Recycled = field(default_factory=lambda: Recycled(()))
    previewed: list[tuple[int, Calibration, Guess]] = field(default_factory=list)
    _forwarded: set[int] = field(default_factory=set)
    _tried: dict[int, int] = field(default_factory=dict)  # guesses in the pass under way, and their kinds

    def __post_init__(self) -> None:
        self._forwarded |= set(self.guesses)

    @property
    def max_depth(self) -> int:
        """Nodes at this depth are not forwarded, their children could not be used."""
        return min(self.deepest, self.remaining - 1)

    def levels_left(self, opening: Opening) -> int | None:
        """Levels to draft below a node until a walk can fill the text; None if that is too deep."""
        return self.remaining - 1 - opening.depth if self.remaining - 1 <= self.deepest else None

    def worth(self, ending: float = 0.0) -> list[float]:
        """The tokens to expect of verifying each of ``likeliest``, in its order.

        Args:
            ending: what it is worth, in tokens, that the text ends with the step.
        """
        tree, full = self.tree, self.remaining - 1
        reached = [math.exp(score) for score in tree.scores]
        ends = [0.0] * len(tree)  # probabilities that the text ends with the target's token after a node
        for node in range(1, len(tree)):
            if tree.depths[node] == full:
                ends[node] = reached[node]
            elif tree.tokens[node] in self.sampler.ends:
                ends[tree.parents[node]] += reached[node]
        return [reached[node] + ending * ends[node] for node in self.likeliest()]

    def likeliest(self) -> list[int]:
        """The nodes that the text may go on from, likeliest first, each after its parent: to be verified.

        One that ends the text is not worth it: the target says so after its parent.
        """
        tree = self.tree
        ends, deepest = self.sampler.ends, self.max_depth
        going_on = (
            n for n in range(1, len(tree)) if tree.depths[n] <= deepest and tree.tokens[n] not in ends
        )
        return tree.ranked([0, *going_on])

    def propose(self, tokens: Sequence[int], chances: Sequence[float], least_score: float) -> None:
        """Add a chain of guessed tokens below the root, as far as it is likely enough.

        Args:
            tokens: one below the other; where the tree has one already, its own score stands.
            chances: probability of each, given that the one before is right.
            least_score: the chain ends before a node less likely to be reached than this.
        """
        tree, node = self.tree, 0
        for token, chance in zip(tokens, chances, strict=True):
            room = self.capacity - len(tree) - len(tree.shadows) - (CHILDREN + 1)
            known = tree.children_of(node).get(token)
            score = tree.scores[node] + math.log(chance)
            if known is None and (room <= 0 or math.exp(score) < least_score or node in self._forwarded):
                return
            node = tree.add(token, node, score) if known is None else known
            if token in self.sampler.ends:
                return

    def frontier(self, most: int) -> tuple[list[Opening], list[float]]:
        """What to forward next, likeliest first, and the probabilities that it matters.

        At most ``most`` nodes, and no more than have room for themselves and their children.
        """
        room = self.capacity - len(self.tree) - len(self.tree.shadows)
        most = min(most, room // (CHILDREN + 2))
        chosen = frontier(self.tree, self._forwarded, self.recycled, self.sampler, most, self.max_depth)
        return chosen, [max(one.matters, 0.0) for one in chosen]

    def open(self, openings: Sequence[Opening]) -> list[int]:
        """The nodes of some openings, each after its parent; guesses become nodes."""
        for one in openings:
            if one.node < 0:
                assert one.above is not None
                assert one.guess is not None
                score = self.tree.scores[one.above.node] + math.log(max(one.guess.chance, 1e-6))
                one.node = self.tree.add(one.token, one.above.node, score)
                self._tried[one.node] = one.guess.kind
        return [one.node for one in openings]

    def open_below(self, nodes: Sequence[int], most: int) -> list[int]:
        """The likeliest of some nodes, their ancestors among them, whose children could still be used."""
        tree = self.tree
        usable = [
            node
            for node in nodes
            if tree.depths[node] < self.max_depth
            and (node == 0 or tree.tokens[node] not in self.sampler.ends)
        ]
        return tree.likeliest(usable, most)

    def forward(self, nodes: list[int]) -> Rows:
        """The rows of a draft pass over ``nodes``, which from now on count as forwarded."""
        self._forwarded.update(nodes)
        for node in nodes:
            if node in self.verified:
                shadow = self.tree.base + self.capacity - 1 - len(self.tree.shadows)
                self.tree.shadows[node] = shadow
        return self.tree.draft_rows(nodes)

    def take(self, nodes: list[int], logits: torch.Tensor, seconds: float, least_score: float) -> list[float]:
        """Add the likely children of forwarded nodes.

        Args:
            nodes: as given to ``forward``.
            logits: (T, V) of the pass.
            seconds: that it took.
            least_score: children less likely to be reached than this are left out, but for the likeliest.

        Returns:
            For each node but wrong guesses the probability of its likeliest child, given the node.
        """
        tree, likeliest = self.tree, []
        for node, guess in zip(nodes, self._guesses(nodes, logits, self.calibration, seconds), strict=True):
            self.guesses[node] = guess
            if node in self._tried and math.exp(tree.scores[node]) < least_score:
                continue  # a wrong guess
            for child, kind in self._tried.items():
                if tree.parents[child] == node:
                    place = guess.place_of(tree.tokens[child])
                    self.recycled.observe(kind, 0.0 if place is None else math.exp(guess.logs[place]))
            if guess.tokens:
                self._recycle(node, guess)
            self._add_children(node, self.calibration, guess, least_score)
            likeliest.append(math.exp(guess.logs[0]) if guess.logs else 0.0)
        self._tried.clear()
        return likeliest

    def _recycle(self, node: int, guess: Guess) -> None:
        """A later pass may try what this one said."""
        tokens, scores = guess.tokens[:1], [0.0]
        if self.sampler.params.samples:
            tokens = guess.tokens
            noise = self.sampler.noise_of(tokens, self.tree.base + self.tree.depths[node] + 1)
            scores = [score - one for score, one in zip(guess.scores.tolist(), noise, strict=False)]
        self.recycled.learn(context_of(self.tree, node, self.recycled), tokens, scores)

    def preview(
        self, nodes: list[int], logits: torch.Tensor, calibration: Calibration, least_score: float
    ) -> None:
        """What the sweep will probably say of some of its nodes: it takes the place of what the draft said.

        A draft pass that forwards one of them later has its say again; to let previews stand gained nothing.

        Args:
            nodes: parents before children.
            logits: (T, V) of a preview.
            calibration: of such previews.
            least_score: as in ``take``.
        """
        for node, guess in zip(nodes, self._guesses(nodes, logits, calibration, 0.0), strict=True):
            if len(self.tree) + len(self.tree.shadows) + CHILDREN > self.capacity:
                return
            self.previewed.append((node, calibration, guess))
            self._add_children(node, calibration, guess, least_score)

    def _guesses(
        self, nodes: list[int], logits: torch.Tensor, calibration: Calibration, seconds: float
    ) -> list[Guess]:
        """What logits (T, V) say of the nodes' next tokens."""
        tree = self.tree
        positions = [tree.base + tree.depths[node] + 1 for node in nodes]
        paths = [tree.path_tokens(node) for node in nodes]
        tokens, scores = self.sampler.candidates(logits, positions, paths, CANDIDATES)  # (T, K)
        equal = (scores[:, :, None] == scores[:, None, :]) & (tokens[:, :, None] > tokens[:, None, :])
        scores = scores - _TIE * equal.sum(-1)  # the target takes the first of equals
        logs = calibration.log_probabilities(scores)
        guesses = []
        for own_tokens, own_logs, own_scores in zip(tokens.tolist(), logs.tolist(), scores, strict=True):
            known = [place for place, log in enumerate(own_logs) if log > -math.inf]  # nor NaN
            guesses.append(
                Guess(
                    [own_tokens[i] for i in known],
                    [own_logs[i] for i in known],
                    own_scores,
                    seconds / len(nodes),
                    bool(self.verified),
                )
            )
        return guesses

    def _add_children(self, node: int, calibration: Calibration, guess: Guess, least_score: float) -> None:
        """Children that are likely enough; one that is there already gets the better founded score."""
        tree = self.tree
        there = tree.children_of(node)
        least = math.log(least_score) if least_score > 0 else -math.inf
        for place, (token, log) in enumerate(zip(guess.tokens[:CHILDREN], guess.logs, strict=False)):
            score = tree.scores[node] + log
            if place and score < least:
                break
            if token in there:
                tree.rescore(there.pop(token), score)
            else:
                tree.add(token, node, score)
        unlikely = math.log(max(calibration.miss, 1e-6))
        for child in there.values():  # guessed elsewhere, and not here
            tree.rescore(child, min(tree.scores[child], tree.scores[node] + unlikely))

    @property
    def spent_s(self) -> float:
        """Seconds of the draft passes that made what the tree holds."""
        return sum(guess.seconds for guess in self.guesses.values())

    def learn(self, walk: Walk) -> tuple[float, float]:
        """Tell the calibration what the target took.

        Returns:
            Seconds of draft passes that foresaw committed tokens; of those, what ran in gaps.
        """
        used_s = used_in_gaps_s = 0.0
        took = dict(zip(walk.nodes, walk.tokens, strict=True))
        self.recycled.extend(walk.tokens)
        for node, calibration, foreseen in self.previewed:
            if node in took:
                calibration.observe(foreseen.scores, foreseen.logs, foreseen.place_of(took[node]))
        for node, token in took.items():
            guess = self.guesses.get(node)
            if guess is None:
                continue
            taken = guess.place_of(token)
            self.calibration.observe(guess.scores, guess.logs, taken)
            if taken is not None:
                used_s += guess.seconds
                used_in_gaps_s += guess.seconds if guess.in_gap else 0.0
        return used_s, used_in_gaps_s

    def next_root(self, walk: Walk) -> int | None:
        """The node that is the walk's bonus token, if the tree has it."""
        return self.tree.children_of(walk.nodes[-1]).get(walk.tokens[-1])

    def continue_from(self, walk: Walk, top: int | None) -> tuple["Growth", list[int]]:
        """The growth of the next step.

        Args:
            walk: what the sweep said.
            top: the node that is the next root, if the tree has it.

        Returns:
            It, and the cache slots whose entries must lie at this tree's ``base`` and on for it: the accepted
            path's, then those of its own nodes.
        """
        tree, base = self.tree, self.tree.base + len(walk.tokens)
        kept = [] if top is None else tree.likeliest(tree.below(top), self.capacity // 2)
        following = tree.rerooted(kept, base) if kept else DraftTree.rooted(walk.tokens[-1], base)
        guesses = {i: self.guesses[node] for i, node in enumerate(kept) if node in self.guesses}
        slots = [tree.slot(node) for node in (*walk.nodes, *kept)]
        growth = Growth(
            following, self.sampler, self.calibration, self.capacity, self.deepest, guesses=guesses
        )
        growth.recycled = self.recycled
        return growth, slots
