"""A step whose tree is as deep and wide as it pays, and that goes on growing while the sweep waits.

    grow the tree that is left of the last step → choose the nodes worth verifying → sweep, and draft in its
    gaps → walk → learn → commit, keep the subtree below the next root

A prompt's sweep is such a step too, whose root is the prompt's last token: where it will wait for the link,
the draft reads the new part of the prompt first, in one pass, and then goes on in the gaps, so that the
first step has a tree to begin with.

Between two units of a sweep the processor idles until the link has brought the next one.  ``Passes.target``
then calls back, and each call advances the draft by one layer of one pass.  All of it runs in the sweep's
program order; on an accelerator the same order is the compute stream's.  Drafts may read keys and values that
the sweep has half updated: that changes trees, never tokens, since verification asks the target alone.

Source: SubSpec (Chang et al. 2025, arXiv 2509.18344) for the step; overlapping as in the text above.
"""

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Protocol

import torch

from subspec.memory.timeline import Timeline
from subspec.models.decoder import Rows, finished
from subspec.speculation.calibration import Calibration
from subspec.speculation.commit import Commit, record_step
from subspec.speculation.growth import Growth
from subspec.speculation.learner import Learner
from subspec.speculation.ngram import NgramGuesser, NgramRates
from subspec.speculation.policy import Policy
from subspec.speculation.preview import PREVIEW_ROWS, Previews, preview_calibrations
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import Walk, row_numbers, walk

Gap = Callable[[], bool]
FIRST_ROWS = (1, 2, 4)  # draft passes timed before the first step
MOST_PROMPT_ROWS = 128  # of a prompt that the draft reads for itself


class LinkClock(Protocol):
    """Running totals of the model's passes, in seconds and bytes."""

    @property
    def wait_s(self) -> float:
        """That sweeps waited for the link without anything to do."""
        ...

    @property
    def gap_s(self) -> float:
        """That sweeps spent in gaps, drafting."""
        ...

    @property
    def link_s(self) -> float:
        """That the link was busy."""
        ...

    @property
    def streamed_bytes(self) -> int:
        """Bytes that came over it."""
        ...


class AdaptivePasses(Protocol):
    """The model as an adaptive step sees it: passes that can be interleaved, and what they took."""

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """One sweep of the exact model: logits (T, V), or (1, V) of the last row.

        Calls ``gap`` again and again while the next unit is not there, until it says that it has nothing to
        do.
        """
        ...

    def draft_steps(self, rows: Rows, *, last_only: bool = False) -> Generator[None, None, torch.Tensor]:
        """A pass over substitutes: yields after each layer, returns logits (T, V), or the last row's."""
        ...

    @property
    def swept(self) -> float:
        """Share of the layers that the sweep under way has done."""
        ...

    def preview_steps(self, numbers: list[int], rows: Rows) -> Generator[None, None, torch.Tensor]:
        """A pass over rows ``numbers`` of the sweep under way from where it is, by substitutes: as a draft's.

        ``rows``: the same with slots of their own.
        """
        ...

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """Move cache slots ``sources`` to ``start`` and on; the last ``drafts`` of them are a draft's."""
        ...

    def counters(self) -> LinkClock:
        """Totals so far."""
        ...

    @property
    def sweep_bytes(self) -> tuple[int, int]:
        """Bytes that a sweep streams, and of those, how many fit the slots while no sweep runs."""
        ...


class Speculator(Learner):
    """What speculation has learnt of a model on this machine; outlasts a text.

    Args:
        policy: decides, and knows what passes cost.
        calibrations: by whether tokens are drawn.
        slots: for a tree and its shadows, and for rows that are previewed.
    """

    def __init__(self, policy: Policy, calibrations: dict[bool, Calibration], slots: int) -> None:
        super().__init__(policy, calibrations)
        self.policy, self.capacity = policy, slots - PREVIEW_ROWS
        self._previews = {drawn: preview_calibrations() for drawn in calibrations}
        self._ngrams = NgramRates()

    def begin(self, passes: AdaptivePasses, sampler: Sampler, prompt: list[int]) -> "Speculation":
        """The steps of a text that follows ``prompt``; ``prefill`` is the first to call."""
        self.policy.begin()
        calibration = self.calibrations[sampler.params.samples]
        root = DraftTree.rooted(prompt[-1], len(prompt) - 1)
        growth = Growth(root, sampler, calibration, self.capacity, 0)
        ngrams = NgramGuesser(self._ngrams, prompt)
        return Speculation(self.policy, passes, growth, ngrams, self._previews[sampler.params.samples])


class Speculation:
    """The steps of one text: ``prefill``, ``prefilled``, then ``commits``."""

    def __init__(
        self,
        policy: Policy,
        passes: AdaptivePasses,
        growth: Growth,
        ngrams: NgramGuesser,
        calibrations: list[Calibration],
    ) -> None:
        self._policy, self._passes, self._growth, self._ngrams = policy, passes, growth, ngrams
        self._calibrations = calibrations  # of previews
        self._previews = Previews([], 0, 0.0, calibrations)
        self._gap_nodes: list[int] = []
        self._gap_pass: Generator[None, None, torch.Tensor] | None = None
        self._gap_pass_s = 0.0
        self._gap_end: Callable[[torch.Tensor], None] = self._take_gap_pass

    def prefill(self, rows: Rows, remaining: int) -> torch.Tensor:
        """The prompt's sweep, with what can be drafted meanwhile.

        Args:
            rows: the prompt's tokens that the cache does not hold.
            remaining: tokens that are wanted.

        Returns:
            Logits (1, V) of the last row, exact.
        """
        policy, passes, growth = self._policy, self._passes, self._growth
        start, before = time.perf_counter(), passes.counters()
        growth.max_depth = min(policy.depth, remaining - 1)
        early = remaining > 1 and len(rows) <= MOST_PROMPT_ROWS and policy.read_prompt(len(rows))
        early_s = 0.0
        if early:
            logits = finished(passes.draft_steps(rows, last_only=True))
            early_s = time.perf_counter() - start
            policy.times.observe_prompt(len(rows), early_s)
            growth.forward([0])
            self._add([0], logits, early_s)
        self._verify([0], len(rows) - 1, early_s)
        begun = time.perf_counter()
        logits = passes.target(rows, last_only=True, gap=self._advance if early else None)
        swept_s, after = time.perf_counter() - begun, passes.counters()
        gap_s, waited_s = after.gap_s - before.gap_s, after.wait_s - before.wait_s
        policy.times.sweep.start(len(rows), max(swept_s - waited_s - gap_s, 0.0))
        self._learn_link(after)
        policy.drafted_in_gaps(0.0, gap_s)
        return logits

    def prefilled(self, token: int) -> None:
        """The target's first token is known: keep what was drafted below it."""
        self._follow(Walk([0], [token]))

    def commits(self, remaining: int, timeline: Timeline | None) -> Iterator[Commit]:
        """The steps after a prefill, for ``remaining`` more tokens."""
        if not self._policy.times.draft.seen and remaining > 1:
            self._time_drafts()
        while remaining > 0:
            commit = self.step(remaining, timeline)
            remaining -= len(commit.tokens)
            yield commit

    def _time_drafts(self) -> None:
        """Time a draft pass of each of ``FIRST_ROWS`` rows, before anything is drafted."""
        root, base = self._growth.tree.tokens[0], self._growth.tree.base
        for rows in FIRST_ROWS:
            if rows > self._policy.width:
                return
            tree = DraftTree.rooted(root, base)
            nodes = [0, *(tree.add(root, 0, 0.0) for _ in range(rows - 1))]
            start = time.perf_counter()
            finished(self._passes.draft_steps(tree.rows(nodes)))
            self._policy.times.draft.observe(rows, time.perf_counter() - start)

    def step(self, remaining: int, timeline: Timeline | None) -> Commit:
        """Draft, verify and commit once: at least one token, no more than ``remaining``."""
        policy, passes, growth = self._policy, self._passes, self._growth
        growth.max_depth = min(policy.depth, remaining - 1)
        start, before = time.perf_counter(), passes.counters()
        growth.propose(*self._ngrams.chain(growth.max_depth), policy.least_score)
        self._grow(start)
        drafting_s = time.perf_counter() - start
        nodes = growth.usable(policy.verify(growth.scores(), drafting_s))
        drafted = len(growth.tree)
        self._verify(nodes, 0, drafting_s)
        logits = passes.target(growth.tree.rows(nodes), last_only=False, gap=self._advance)  # (N, V)
        swept_s = time.perf_counter() - start - drafting_s
        walked = walk(growth.tree, row_numbers(nodes), growth.sampler.chooser(logits))
        walked_s = time.perf_counter()
        used_s, used_in_gaps_s = self._follow(walked)
        following = self._growth
        growth.sampler.observe(walked.tokens, following.tree.base)
        end, after = time.perf_counter(), passes.counters()
        gap_s, wait_s = after.gap_s - before.gap_s, after.wait_s - before.wait_s
        policy.times.sweep.observe(len(nodes), max(swept_s - gap_s - wait_s, 0.0))
        self._learn_link(after)
        policy.drafted_in_gaps(used_in_gaps_s, gap_s)
        policy.stepped(len(walked.tokens), end - start, len(nodes) > 1)
        wasted_s = max(growth.spent_s - following.spent_s - used_s, 0.0)
        verify_s = end - start - drafting_s
        commit = Commit(walked.tokens, False, drafted, len(nodes), drafting_s, verify_s, gap_s, wasted_s)
        if timeline is not None:
            record_step(timeline, commit, start, walked_s, end)
        return commit

    def _verify(self, nodes: list[int], first: int, drafting_s: float) -> None:
        """A sweep begins whose rows from ``first`` on are ``nodes``, after some drafting."""
        self._growth.verified = frozenset(nodes)
        self._previews = Previews(nodes, first, drafting_s, self._calibrations)

    def _follow(self, walked: Walk) -> tuple[float, float]:
        """Learn from a walk, keep the subtree below its last token, and move entries to where they belong.

        Returns:
            Seconds of draft passes that foresaw committed tokens; of those, what ran in gaps.
        """
        growth = self._growth
        top = growth.next_root(walked)
        self._end_gap_pass(top)
        used = growth.learn(walked)
        following, slots = growth.continue_from(walked, top)
        self._passes.move(slots, growth.tree.base, len(following.tree) if top is not None else 0)
        self._ngrams.extend(walked.tokens)
        self._growth = following
        return used

    def _grow(self, start: float) -> None:
        """Draft before the sweep, as long as it pays."""
        growth, policy = self._growth, self._policy
        while True:
            open_nodes, chances = growth.frontier(policy.width)
            spent_s = time.perf_counter() - start
            count = policy.widen(chances, growth.scores(), spent_s)
            if count == 0:
                return
            nodes = open_nodes[:count]
            begun = time.perf_counter()
            logits = finished(self._passes.draft_steps(growth.forward(nodes)))
            self._take(nodes, logits, time.perf_counter() - begun)

    def _advance(self) -> bool:
        """One layer of a draft pass in a gap; False if there is nothing worth drafting."""
        start = time.perf_counter()
        if self._gap_pass is None and not self._begin_gap_pass():
            return False
        assert self._gap_pass is not None
        try:
            next(self._gap_pass)
            self._gap_pass_s += time.perf_counter() - start
        except StopIteration as done:
            self._gap_pass_s += time.perf_counter() - start
            self._gap_pass = None
            self._gap_end(done.value)
        return True

    def _begin_gap_pass(self) -> bool:
        """Choose the next pass of a gap; False if there is none."""
        growth = self._growth
        self._gap_pass_s = 0.0
        if self._begin_preview():
            return True
        open_nodes, chances = growth.frontier(self._policy.width)
        count = self._policy.widen_in_gap(chances)
        if count == 0:
            return False
        self._gap_nodes = open_nodes[:count]
        self._gap_pass = self._passes.draft_steps(growth.forward(self._gap_nodes))
        self._gap_end = self._take_gap_pass
        return True

    def _begin_preview(self) -> bool:
        """Begin a preview of the sweep under way; False if it is not the time for one."""
        growth, passes, previews = self._growth, self._passes, self._previews
        swept = passes.swept
        calibration = previews.due(swept)
        if calibration is None:
            return False
        most = self._policy.preview(previews.drafting_s, len(previews.nodes), swept)
        nodes = growth.open_below(previews.nodes, most)
        if not nodes:
            return False
        rows = growth.tree.rows_elsewhere(nodes, growth.tree.base + growth.capacity)
        self._gap_nodes = nodes
        self._gap_pass = passes.preview_steps(previews.numbers(nodes), rows)
        self._gap_end = partial(self._previewed, calibration, 1 - swept)
        return True

    def _take_gap_pass(self, logits: torch.Tensor) -> None:
        """A draft pass in gaps ended."""
        self._take(self._gap_nodes, logits, self._gap_pass_s)

    def _previewed(self, calibration: Calibration, left: float, logits: torch.Tensor) -> None:
        """A preview through the ``left`` share of the layers ended."""
        self._policy.times.observe_preview(len(self._gap_nodes), left, self._gap_pass_s)
        self._growth.preview(self._gap_nodes, logits, calibration, self._policy.least_score)

    def _end_gap_pass(self, top: int | None) -> None:
        """End the pass that the sweep's end broke off, if the next step needs it; else forget it."""
        unfinished, self._gap_pass = self._gap_pass, None
        if unfinished is None or top is None:
            return
        if set(self._gap_nodes).isdisjoint(self._growth.tree.below(top)):
            return
        start = time.perf_counter()
        logits = finished(unfinished)
        self._gap_pass_s += time.perf_counter() - start
        self._take_gap_pass(logits)

    def _take(self, nodes: list[int], logits: torch.Tensor, seconds: float) -> None:
        """A draft pass ended: add its guesses, learn what it took."""
        self._policy.times.draft.observe(len(nodes), seconds)
        self._add(nodes, logits, seconds)

    def _add(self, nodes: list[int], logits: torch.Tensor, seconds: float) -> None:
        """Add the guesses of a draft pass."""
        for likeliest in self._growth.take(nodes, logits, seconds, self._policy.least_score):
            self._policy.passed(likeliest)

    def _learn_link(self, totals: LinkClock) -> None:
        """What a sweep's bytes take at the link's speed so far."""
        if totals.link_s > 0:
            per_byte = totals.link_s / totals.streamed_bytes
            streamed, ahead = self._passes.sweep_bytes
            self._policy.times.observe_link(streamed * per_byte, ahead * per_byte)
