"""Steps on a device whose host runs ahead: the tree grows there, and the host waits for it once a step.

A step uploads its root, launches draft passes that grow the tree level by level, lets the device choose the
likeliest nodes, launches the sweep that verifies them, and reads one summary: the tree, the target's token
after each verified node, and what the calibration learns from.  Whether another level pays is decided a level
late, from the reach of a level that came back while the next one was under way.  While a unit of the sweep
is not there yet, further levels are drafted below the last one, a layer at a time; what survives the walk is
planted as the next step's tree.

Plain tensors and numbers: nothing here knows of streams, tiers or kernels.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial

import torch

from subspec.memory.timeline import Timeline
from subspec.models.decoder import Rows
from subspec.speculation.calibration import CANDIDATES, Calibration
from subspec.speculation.commit import Commit, record_step
from subspec.speculation.device_passes import DevicePasses
from subspec.speculation.draft import TreeShape
from subspec.speculation.harvest import Harvest, harvest, seedling
from subspec.speculation.learner import Learner
from subspec.speculation.levels import Levels, Shape
from subspec.speculation.noise import gumbel_noise
from subspec.speculation.outlook import Outlook
from subspec.speculation.policy import Policy
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.verify import Walk, walk


class Ahead(Learner):
    """Speculation on a device; outlasts a text.

    Args:
        shape: the bounds of a tree; without a policy, the tree itself.
        vocabulary: V.
        device: where trees grow.
        calibrations: by whether tokens are drawn.
        policy: decides how deep and how many; None: always as ``shape`` has it.
    """

    def __init__(
        self,
        shape: TreeShape,
        vocabulary: int,
        device: torch.device,
        calibrations: dict[bool, Calibration],
        policy: Policy | None,
    ) -> None:
        super().__init__(policy, calibrations)
        self.shape, self.policy = shape, policy
        candidates = min(max(CANDIDATES, shape.width), vocabulary)
        width = min(shape.width, vocabulary)
        verified = min(shape.nodes, 1 + shape.depth * width)
        self.levels = Levels(Shape(shape.depth, width, verified, candidates, vocabulary), device)

    def commits(
        self,
        passes: DevicePasses,
        sampler: Sampler,
        text: list[int],
        remaining: int,
        timeline: Timeline | None,
    ) -> Iterator[Commit]:
        """The steps after a prefill; the cache holds all of ``text`` but the token that it committed."""
        if self.policy is not None:
            self.policy.begin()
        steps = _Steps(self, passes, sampler, text)
        while remaining > 0:
            commit = steps.step(remaining, timeline)
            remaining -= len(commit.tokens)
            yield commit


class _Steps:
    """The steps of one text."""

    def __init__(self, ahead: Ahead, passes: DevicePasses, sampler: Sampler, text: list[int]) -> None:
        assert passes.exchange is not None
        self._levels, self._shape, self._policy = ahead.levels, ahead.shape, ahead.policy
        self._passes, self._exchange, self._sampler = passes, passes.exchange, sampler
        self._calibration = ahead.calibrations[sampler.params.samples]
        self._outlook = Outlook(passes.exchange, ahead.policy, ahead.shape)
        self._root, self._base = text[-1], len(text) - 1
        self._most = 0  # levels that this step may use
        self._drafted = 0  # levels of the tree under way
        self._planted = 0  # of these, levels that an earlier step drafted
        self._shadowed: int | None = None  # the level whose draft entries are in shadow slots
        self._gap_pass: Generator[None, None, torch.Tensor] | None = None
        self._gap_layers = self._pass_layers = 0  # of the pass under way in gaps; of a whole one
        self._noise: set[int] = set()  # positions whose noise is on the device
        self._advance = partial(_advance, ahead.levels, sampler.params)
        self._passes.run(self._levels.seen.zero_, "seen")
        self._tell_seen(text)
        self._capture()

    def _capture(self) -> None:
        """Let the passes over a level be captured, in scratch memory: what they leave is begun anew."""
        self._root_alone()
        for rows in (self._levels.first, self._levels.next):
            self._passes.capture_level(rows, self._advance, self._key(rows))

    def step(self, remaining: int, timeline: Timeline | None) -> Commit:
        """Draft, verify and commit once: at least one token, no more than ``remaining``."""
        start, before = time.perf_counter(), self._passes.counters()
        self._most = min(self._levels.shape.depth, remaining - 1)
        self._begin()
        while self._drafted < self._most and self._outlook.pays(time.perf_counter() - start):
            self._draft_level()
        drafted_s = time.perf_counter() - start
        shape, drafted = self._levels.shape, self._drafted
        count = self._outlook.rows(min(shape.verified, 1 + drafted * shape.width), drafted_s)
        logits = self._sweep(count)
        grown, choose = self._read(logits, count)
        rows = {node: row for row, node in enumerate(grown.verified) if grown.tree.depths[node] <= self._most}
        walked = walk(grown.tree, rows, choose)
        walked_s = time.perf_counter()
        self._learn(grown, walked)
        self._go_on(grown, walked)
        end, after = time.perf_counter(), self._passes.counters()
        gap_s = after.gap_s - before.gap_s
        if self._policy is not None:
            sweep_s = walked_s - start - drafted_s - gap_s - (after.wait_s - before.wait_s)
            self._policy.times.sweep.observe(count, max(sweep_s, 0.0))
            self._policy.stepped(len(walked.tokens), end - start, len(rows) > 1)
        made = sum(1 for depth in grown.tree.depths if depth <= drafted)
        commit = Commit(walked.tokens, False, made, len(rows), drafted_s, end - start - drafted_s, gap_s)
        if timeline is not None:
            record_step(timeline, commit, start, walked_s, end)
        return commit

    # --- before the sweep ---

    def _begin(self) -> None:
        """Put the root on the device, unless its tree was planted there, and what scores are made with."""
        if self._policy is None:
            numbers = [self._sampler.draft_temperature, 0.0]
        else:
            numbers = [self._calibration.temperature, math.log1p(-self._calibration.miss)]
        self._exchange.send(self._levels.calibration, torch.tensor(numbers))
        self._outlook.resume()
        if self._drafted == 0:
            self._root_alone()

    def _root_alone(self) -> None:
        """A tree of the root alone."""
        seed = self._exchange.sent(torch.tensor([self._root, self._base]))
        self._passes.run(partial(self._levels.begin, seed), "root")
        self._outlook.begin([1.0], [1.0])

    def _draft_level(self) -> None:
        """Launch the pass over the newest level, which makes the next one."""
        rows = self._next_rows()
        self._passes.draft_level(self._key(rows))
        self._grown()

    def _next_rows(self) -> Rows:
        """The rows of the newest level, with their noise under way."""
        position = self._base + self._drafted + 1
        if self._sampler.params.samples and position not in self._noise:
            row = self._levels.noise[position % len(self._levels.noise)]
            self._exchange.send(row, gumbel_noise(self._sampler.params.seed, position, len(row)))
            self._noise.add(position)
        return self._levels.first if self._drafted == 0 else self._levels.next

    def _key(self, rows: Rows) -> object:
        """Of the captured pass over the root or a level: it depends on this, and on the device's memory."""
        params = replace(self._sampler.params, max_new_tokens=1, seed=0, stop=(), ignore_eos=False)
        return self._levels, rows is self._levels.first, params

    def _grown(self) -> None:
        """A level was launched: let its reach come."""
        self._outlook.launched(self._exchange.begin_read(self._levels.reach))
        self._drafted += 1

    # --- the sweep, and its gaps ---

    def _sweep(self, count: int) -> torch.Tensor:
        """Launch the sweep: logits (count, V) on the device."""
        self._shadowed = None
        self._passes.run(partial(self._levels.select, count), "select")
        gap = None if self._policy is None else self._draft_in_gap
        rows = self._levels.verify.chunk(0, count)
        logits = self._passes.target(rows, last_only=False, gap=gap)
        self._end_gap_pass()
        return logits

    def _draft_in_gap(self) -> bool:
        """Launch one layer of a draft pass; False if there is nothing worth drafting."""
        if self._gap_pass is None and not self._begin_gap_pass():
            return False
        assert self._gap_pass is not None
        try:
            next(self._gap_pass)
            self._gap_layers += 1
        except StopIteration as done:
            self._passes.run(partial(self._advance, done.value), "advance")
            self._pass_layers, self._gap_pass = self._gap_layers, None
            self._grown()
        return True

    def _begin_gap_pass(self) -> bool:
        """Begin a pass over the newest level, if it is worth it."""
        if self._drafted >= self._levels.shape.depth or not self._outlook.pays_in_gap():
            return False
        if self._shadowed is None:
            self._shadowed = self._drafted
            self._passes.run(partial(self._levels.shadow, self._drafted), "shadow")
        self._gap_layers = 0
        self._gap_pass = self._passes.draft_steps(self._next_rows())
        return True

    def _end_gap_pass(self) -> None:
        """End the pass that the sweep's end broke off if most of it is done; else forget it."""
        while self._gap_pass is not None and 2 * self._gap_layers >= self._pass_layers:
            self._draft_in_gap()
        self._gap_pass = None

    # --- after the sweep ---

    def _read(self, logits: torch.Tensor, count: int) -> tuple[Harvest, Callable[[int, int, list[int]], int]]:
        """Wait for the step's summary: the tree, and how the target's token after a row is found."""
        params = self._sampler.params
        simple = not params.samples and params.repetition_penalty == 1.0
        targets = partial(_likeliest, logits) if simple else None
        self._passes.run(partial(self._summarize, targets), "summary")
        pending = None if simple else self._exchange.begin_read(logits)
        summary = self._exchange.read(self._levels.summary)
        grown = harvest(summary, self._levels.shape, self._base, self._drafted, count)
        if pending is None:
            return grown, lambda row, *_: grown.targets[row]
        rows = self._exchange.take(pending)  # it is there: the summary came after it
        return grown, self._sampler.chooser(rows)

    def _summarize(self, targets: Callable[[], torch.Tensor] | None) -> None:
        """Pack the summary."""
        self._levels.summarize(None if targets is None else targets())

    def _learn(self, grown: Harvest, walked: Walk) -> None:
        """Tell calibration and policy what the target took, and what the draft thought."""
        if self._policy is None or not grown.guesses:
            return
        logs = self._calibration.log_probabilities(
            torch.stack([one.scores for one in grown.guesses.values()])
        )
        of_node = dict(zip(grown.guesses, logs.tolist(), strict=True))
        for node, (likeliest, *_) in of_node.items():
            if grown.tree.depths[node] < self._planted:
                continue  # the step that drafted it has told already
            self._policy.passed(math.exp(likeliest) if likeliest > -math.inf else 0.0)
        for node, token in zip(walked.nodes, walked.tokens, strict=True):
            if node in grown.guesses:
                guess = grown.guesses[node]
                known = sum(log > -math.inf for log in of_node[node])  # nor NaN
                tokens = guess.tokens[:known]
                taken = tokens.index(token) if token in tokens else None
                self._calibration.observe(guess.scores, of_node[node][:known], taken)

    def _go_on(self, grown: Harvest, walked: Walk) -> None:
        """Commit what was accepted, and plant what survives of the tree."""
        base = self._base + len(walked.tokens)
        sources = [self._base + grown.places[node] for node in walked.nodes]
        targets = list(range(self._base, base))
        top = grown.tree.children_of(walked.nodes[-1]).get(walked.tokens[-1])
        planted = None if top is None else seedling(grown, top, self._levels.shape, base)
        if planted is not None:
            sources += [self._entry(grown, node) for node in planted.nodes]
            targets += [base + place for place in planted.places]
        self._passes.relocate(sources, targets, 0 if planted is None else len(planted.nodes))
        self._sampler.observe(walked.tokens, base)
        self._tell_seen(walked.tokens)
        self._root, self._base = walked.tokens[-1], base
        self._noise = {position for position in self._noise if position > base}
        self._drafted = self._planted = 0
        if planted is not None:
            packed = self._exchange.sent(planted.packed)
            self._passes.run(partial(self._levels.plant, packed), "plant")
            self._drafted = self._planted = planted.levels
            self._outlook.begin(planted.scores, planted.frontier)

    def _entry(self, grown: Harvest, node: int) -> int:
        """The slot of a node's newest entry: exact if the sweep verified it, else the draft's."""
        place, shape = grown.places[node], self._levels.shape
        if grown.tree.depths[node] != self._shadowed or node in grown.verified:
            return self._base + place
        return self._base + shape.nodes + (0 if place == 0 else (place - 1) % shape.width)

    def _tell_seen(self, tokens: list[int]) -> None:
        """Tokens that the repetition penalty is for."""
        if self._sampler.params.repetition_penalty != 1.0:
            places = self._exchange.sent(torch.tensor(tokens))
            self._passes.run(lambda: self._levels.seen.index_fill_(0, places, True), "seen")


def _advance(levels: Levels, params: SamplingParams, logits: torch.Tensor) -> None:
    """What a draft pass ends with; captured passes keep it, and nothing of the text."""
    levels.advance(logits, params)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of each row's greatest logits, (T,) int64; as ``Sampler.choose`` takes it."""
    rows = logits.float()
    numbers = torch.arange(rows.shape[1], device=rows.device)
    greatest = torch.where(rows == rows.amax(dim=-1, keepdim=True), numbers, rows.shape[1])
    return greatest.amin(dim=-1).clamp(max=rows.shape[1] - 1)  # a row of NaN has none
