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
from collections.abc import Iterator

import torch

from subspec.memory.timeline import Timeline
from subspec.models.decoder import Rows, finished
from subspec.speculation.calibration import Calibration
from subspec.speculation.commit import Commit, record_step
from subspec.speculation.gaps import GapFiller, add, take
from subspec.speculation.growth import Growth
from subspec.speculation.learner import Learner
from subspec.speculation.ngram import NgramGuesser, NgramRates
from subspec.speculation.passes import AdaptivePasses, LinkClock
from subspec.speculation.policy import Policy
from subspec.speculation.preview import PREVIEW_ROWS, Previews, preview_calibrations
from subspec.speculation.recycled import Recycled
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import Walk, row_numbers, walk

FIRST_ROWS = (1, 2, 4, 8)  # draft passes timed before the first step
MOST_PROMPT_ROWS = 128  # of a prompt that the draft reads for itself


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
        growth = Growth(root, sampler, calibration, self.capacity, self.policy.depth)
        growth.recycled = Recycled(prompt)
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
        self._gaps: GapFiller  # of the sweep under way, or of the last one

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
        growth.remaining = remaining
        early = remaining > 1 and len(rows) <= MOST_PROMPT_ROWS and policy.read_prompt(len(rows))
        early_s = 0.0
        if early:
            logits = finished(passes.draft_steps(rows, last_only=True))
            early_s = time.perf_counter() - start
            policy.times.observe_prompt(len(rows), early_s)
            growth.forward([0])
            add(policy, growth, [0], logits, early_s)
        gaps = self._sweeping([0], len(rows) - 1, early_s)
        begun = time.perf_counter()
        logits = passes.target(rows, last_only=True, gap=gaps.advance if early else None)
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
        growth.remaining = remaining
        start, before = time.perf_counter(), passes.counters()
        growth.propose(*self._ngrams.chain(growth.max_depth), policy.least_score)
        self._grow(start)
        drafting_s = time.perf_counter() - start
        worth = growth.worth(policy.ending)
        nodes = sorted(growth.likeliest()[: policy.verify(worth, drafting_s)])
        drafted = len(growth.tree)
        gaps = self._sweeping(nodes, 0, drafting_s)
        logits = passes.target(growth.tree.rows(nodes), last_only=False, gap=gaps.advance)  # (N, V)
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
        kept_s = following.spent_s if len(walked.tokens) < remaining else 0.0
        wasted_s = max(growth.spent_s + self._gaps.forgotten_s - kept_s - used_s, 0.0)
        verify_s = end - start - drafting_s
        commit = Commit(walked.tokens, False, drafted, len(nodes), drafting_s, verify_s, gap_s, wasted_s)
        if timeline is not None:
            record_step(timeline, commit, start, walked_s, end)
        return commit

    def _sweeping(self, nodes: list[int], first: int, drafting_s: float) -> GapFiller:
        """What fills the gaps of a sweep that now begins: its rows from ``first`` on are ``nodes``."""
        self._growth.verified = frozenset(nodes)
        previews = Previews(nodes, first, drafting_s, self._calibrations)
        self._gaps = GapFiller(self._policy, self._passes, self._growth, previews)
        return self._gaps

    def _follow(self, walked: Walk) -> tuple[float, float]:
        """Learn from a walk, keep the subtree below its last token, and move entries to where they belong.

        Returns:
            Seconds of draft passes that foresaw committed tokens; of those, what ran in gaps.
        """
        growth = self._growth
        top = growth.next_root(walked)
        self._gaps.finish(top)
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
            openings, chances = growth.frontier(policy.width)
            for place, one in enumerate(openings):
                chances[place] += policy.nearing_end(one.reached, growth.levels_left(one))
            spent_s = time.perf_counter() - start
            count = policy.widen(chances, growth.worth(policy.ending), spent_s)
            if count == 0:
                return
            nodes = growth.open(openings[:count])
            begun = time.perf_counter()
            logits = finished(self._passes.draft_steps(growth.forward(nodes)))
            take(policy, growth, nodes, logits, time.perf_counter() - begun)

    def _learn_link(self, totals: LinkClock) -> None:
        """What a sweep's bytes take at the link's speed so far."""
        if totals.link_s > 0:
            per_byte = totals.link_s / totals.streamed_bytes
            streamed, ahead = self._passes.sweep_bytes
            self._policy.times.observe_link(streamed * per_byte, ahead * per_byte)
