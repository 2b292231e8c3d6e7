"""Texts that the toy engine of ``toy_steps`` makes, some given up, all held to the truth."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from ties import ties_as_on_a_device
from toy_hashes import DISAGREEMENT, VOCABULARY, words_of
from toy_steps import GivenUpError, Memory, ToyEngine

from subspec.engine.host_view import HostView
from subspec.errors import StoreError
from subspec.memory.backend import Backend
from subspec.speculation import ahead
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import Calibration
from subspec.speculation.decode import decode
from subspec.speculation.draft import TreeShape
from subspec.speculation.harvest import Harvest, harvest
from subspec.speculation.policy import Policy
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.times import StepTimes

CONTEXT = 24  # most tokens of a text
GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.5, seed=5)
PENALIZED = SamplingParams(repetition_penalty=1.3)


@dataclass(frozen=True)
class Text:
    """A text that is asked for.

    Attributes:
        prompt: its last tokens; ``reused``: of the text before, committed tokens that stand before them.
        tokens: most of them; ``commits``: then nobody asks for another one.
        breaks: (commit, layer) whose sweep is given up before a layer; −1: in a gap; None: none is.
        fails: whether a file cannot be read at that commit.
    """

    prompt: tuple[int, ...]
    params: SamplingParams = GREEDY
    reused: int = 0
    tokens: int = 6
    commits: int = 2
    breaks: tuple[int, int] | None = None
    fails: bool = False


@dataclass(frozen=True)
class Case:
    """An engine, what decides on trees, and the texts that they make.

    Attributes:
        shape: of trees; ``pays``: the chance that a further level does, None: always the same tree.
        gaps: the chance that a gap is drafted in.
    """

    memory: Memory
    shape: TreeShape
    pays: float | None
    gaps: float
    texts: tuple[Text, ...]


def drawn(seed: int) -> Case:
    """A random case."""
    rng = random.Random(seed)
    n_layers = rng.choice((1, 2, 2, 3, 4, 6))
    kinds = rng.choice((("file",), ("image",), ("file", "image"), ("file", "image", "resident")))
    layers = [rng.choice(kinds) for _ in range(n_layers)]
    if set(layers) == {"resident"}:
        layers[-1] = "file"
    memory = Memory(
        tuple(layers),
        slots=rng.randint(1, 4),
        parts=rng.randint(1, 2),
        staged=rng.random() < 0.7,
        threads=rng.randint(1, 2),
        spare=rng.choice((0, 1, 5)),
        warm_ups=rng.choice((0,) * 7 + (3,)),
    )
    width = rng.choice((1, 2))
    shape = TreeShape(depth=rng.choice((2, 3)), width=width, nodes=rng.choice((3, 5)))
    first = _text(rng, n_layers, rng.random() < 0.4)
    last = _text(rng, n_layers, False)
    both = (first, replace(last, reused=rng.choice((0, 2)), commits=1))
    texts = both if first.breaks or first.fails or rng.random() < 0.2 else (first,)
    return Case(memory, shape, rng.choice((None, 0.2, 0.4, 0.9)), rng.choice((0.0, 0.8, 1.0)), texts)


def _text(rng: random.Random, n_layers: int, given_up: bool) -> Text:
    """A random text."""
    commits = rng.choice((1, 2, 2, 3))
    fails = given_up and rng.random() < 0.3
    breaks = (
        None
        if not given_up or fails
        else (rng.randint(0, commits), rng.choice((-1, rng.randint(0, n_layers - 1))))
    )
    return Text(
        tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))),
        rng.choice((GREEDY, GREEDY, GREEDY, DRAWN, PENALIZED)),
        tokens=rng.randint(2, 9),
        commits=commits,
        breaks=breaks,
        fails=fails,
    )


class ChancePolicy(Policy):
    """Decides by lot."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        shape = case.shape
        super().__init__(StepTimes(), width=shape.width, nodes=shape.nodes, depth=shape.depth)
        self._case, self._rng = case, rng

    def widen(self, *_: Any) -> int:
        """Whether another level pays."""
        assert self._case.pays is not None
        return int(self._rng.random() < self._case.pays)

    def widen_in_gap(self, *_: Any) -> int:
        """Whether it does in a gap."""
        return int(self._rng.random() < self._case.gaps)

    def verify(self, scores: Any, _: float) -> int:
        """How many nodes to verify."""
        return self._rng.choice((1, 3, len(scores)))


class Run:
    """A case on a backend; ``counts``: what happened."""

    def __init__(self, case: Case, backend: Backend, seed: int, engine: type[ToyEngine] = ToyEngine) -> None:
        self.case, self.counts = case, Counter[str]()
        rng = random.Random(seed)
        policy = None if case.pays is None else ChancePolicy(case, rng)
        calibrations = {False: Calibration(), True: Calibration()}
        self.ahead = Ahead(case.shape, VOCABULARY, backend.device, calibrations, policy)
        self.engine = engine(case.memory, self.ahead.levels.shape, CONTEXT, backend, self._breaks)
        self.breaks: tuple[int, int] | None = None
        self.whole: list[int] = []  # the text, as far as it is committed
        self.cached = 0  # its tokens in the cache
        self._unfinished = 0  # gap passes so far
        self._deepest = 0  # level that was verified

    def run(self) -> Counter[str]:
        """All texts; raises whatever is found."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ahead, "harvest", self._harvested)
            for text in self.case.texts:
                self._text(text)
        self.engine.close()
        return self.counts + self.engine.counts

    def _text(self, text: Text) -> None:
        """One text, perhaps to where it is given up."""
        cached = min(text.reused, self.cached)
        self.whole = [*self.whole[:cached], *text.prompt]
        self.cached, self.engine.sweeps, self.breaks = cached, -1, text.breaks
        self.sampler = Sampler(text.params, self.whole)
        prompt = list(self.whole)
        commits = decode(HostView(self.engine), prompt, cached, self.sampler, self.ahead, text.tokens)
        exchange = self.engine.exchange
        assert exchange is not None
        try:
            for number in range(text.commits + 1):
                self.engine.files[-1].failing = text.fails and number == text.commits
                before = exchange.blocking_reads
                commit = next(commits, None)
                if commit is None:
                    assert len(self.whole) - len(prompt) == text.tokens
                    break
                assert exchange.blocking_reads == before + 1
                self._committed(commit.tokens, commit.verified)
        except GivenUpError:
            self.counts["given up in a gap" if self.breaks and self.breaks[1] < 0 else "given up"] += 1
        except StoreError:
            assert text.fails
            self.counts["failed"] += 1
        self.engine.files[-1].failing, self._unfinished = False, self._gap_passes_left()
        self.engine.run(partial(self._compare, tuple(self.whole[: self.cached])), "compare")

    def _committed(self, tokens: list[int], verified: int) -> None:
        """Hold a commit to the truth."""
        for token in tokens:
            logits = self.engine.truth.logits(tuple(self.whole))
            chosen = Sampler(self.sampler.params, self.whole).choose(logits, len(self.whole))
            assert token == chosen
            self.whole.append(token)
        self.cached = len(self.whole) - 1
        if verified > 1:
            self.counts[f"{min(len(tokens), 2) - 1} accepted"] += 1
            self.counts["accepted whole"] += len(tokens) == self._deepest + 1

    def _harvested(self, *args: Any) -> Harvest:
        """What the host makes of a summary: the draft guessed from the entries of each node's own path."""
        grown = harvest(*args)
        for node, guess in grown.guesses.items():
            path = grown.tree.path_tokens(node)
            logits = self.engine.truth.logits((*self.whole, *path), DISAGREEMENT)
            position = len(self.whole) + len(path)
            count = len(guess.tokens)
            with ties_as_on_a_device():
                tokens, scores = self.sampler.candidates(logits[None], [position], [path], count)
            assert guess.tokens == tokens[0].tolist()
            assert torch.equal(guess.scores, scores[0])
        depths = [grown.tree.depths[node] for node in grown.verified]
        self._deepest = max(depths)
        before, self._unfinished = self._unfinished, self._gap_passes_left()
        self.counts["gap passes dropped"] += self._unfinished - before
        planted = self.engine.counts["plant"] - self.counts["plants seen"]
        self.counts["plants seen"] += planted
        self.counts["plants verified"] += bool(planted and self._deepest > 0)
        return grown

    def _gap_passes_left(self) -> int:
        """Gap passes so far that did not end."""
        return self.engine.counts["gap passes begun"] - self.engine.counts["gap passes finished"]

    def _compare(self, text: tuple[int, ...]) -> None:
        """The cache holds the exact entries of a text."""
        held = torch.stack([self.engine.cache.keys, self.engine.cache.values])[:, :, 0, : len(text), 0]
        assert np.array_equal(words_of(held.contiguous()), self.engine.truth.entries(text))

    def _breaks(self, sweep: int, layer: int) -> None:
        """Give up where the text says."""
        if (sweep, layer) == self.breaks:
            raise GivenUpError
