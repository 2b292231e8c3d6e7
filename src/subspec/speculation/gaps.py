"""What fills the gaps of one sweep: previews of it when they are due, else the tree's growth, layer by layer.

A draft pass that the sweep's end breaks off goes on behind it if the next step needs what it says; a preview
has nothing to say then.
"""

import time
from collections.abc import Callable, Generator
from functools import partial

import torch

from subspec.models.decoder import finished
from subspec.speculation.calibration import Calibration
from subspec.speculation.growth import Growth
from subspec.speculation.passes import AdaptivePasses
from subspec.speculation.policy import Policy
from subspec.speculation.preview import Previews


def take(policy: Policy, growth: Growth, nodes: list[int], logits: torch.Tensor, seconds: float) -> None:
    """A draft pass over some nodes ended: add its guesses (from logits (T, V)), learn what it took."""
    policy.times.draft.observe(len(nodes), seconds)
    add(policy, growth, nodes, logits, seconds)


def add(policy: Policy, growth: Growth, nodes: list[int], logits: torch.Tensor, seconds: float) -> None:
    """Add the guesses of a pass over some nodes, logits (T, V), to the tree."""
    for likeliest in growth.take(nodes, logits, seconds, policy.least_score):
        policy.passed(likeliest)


class GapFiller:
    """Drafts while one sweep waits.

    Args:
        policy: says how wide.
        passes: the model.
        growth: the tree.
        previews: of the sweep.

    Attributes:
        forgotten_s: seconds of a draft pass that the sweep's end broke off and nobody needs.
    """

    def __init__(self, policy: Policy, passes: AdaptivePasses, growth: Growth, previews: Previews) -> None:
        self._policy, self._passes, self._growth, self._previews = policy, passes, growth, previews
        self._nodes: list[int] = []
        self._pass: Generator[None, None, torch.Tensor] | None = None
        self._pass_s = 0.0
        self._end: Callable[[torch.Tensor], None] = self._drafted
        self.forgotten_s = 0.0

    def advance(self) -> bool:
        """One layer of a pass; False if there is nothing worth drafting."""
        start = time.perf_counter()
        if self._pass is None and not self._begin():
            return False
        assert self._pass is not None
        try:
            next(self._pass)
            self._pass_s += time.perf_counter() - start
        except StopIteration as done:
            self._pass_s += time.perf_counter() - start
            self._pass = None
            self._end(done.value)
        return True

    def finish(self, top: int | None) -> None:
        """The sweep has ended: end the pass that it broke off if it is of use, else forget it.

        Args:
            top: the node that the next step begins with, if the tree has it.
        """
        unfinished, self._pass = self._pass, None
        if unfinished is None:
            return
        if top is None or set(self._nodes).isdisjoint(self._growth.tree.below(top)):
            self.forgotten_s = self._pass_s if self._end == self._drafted else 0.0
            return
        start = time.perf_counter()
        logits = finished(unfinished)
        self._pass_s += time.perf_counter() - start
        self._end(logits)

    def _begin(self) -> bool:
        """Choose the next pass; False if there is none."""
        self._pass_s = 0.0
        if self._begin_preview():
            return True
        growth = self._growth
        openings, chances = growth.frontier(self._policy.width)
        count = self._policy.widen_in_gap(chances)
        if count == 0:
            return False
        self._nodes = growth.open(openings[:count])
        self._pass = self._passes.draft_steps(growth.forward(self._nodes))
        self._end = self._drafted
        return True

    def _begin_preview(self) -> bool:
        """Begin a preview; False if it is not the time for one."""
        growth, passes, previews = self._growth, self._passes, self._previews
        swept = passes.swept
        calibration = previews.due(swept)
        if calibration is None:
            return False
        most = self._policy.preview(previews.drafting_s, previews.rows, swept)
        nodes = growth.open_below(previews.nodes, most)
        if not nodes:
            return False
        rows = growth.tree.rows_elsewhere(nodes, growth.tree.base + growth.capacity)
        self._nodes = nodes
        self._pass = passes.preview_steps(previews.numbers(nodes), rows)
        self._end = partial(self._previewed, calibration, 1 - swept)
        return True

    def _drafted(self, logits: torch.Tensor) -> None:
        """A draft pass ended."""
        take(self._policy, self._growth, self._nodes, logits, self._pass_s)

    def _previewed(self, calibration: Calibration, left: float, logits: torch.Tensor) -> None:
        """A preview through the ``left`` share of the layers ended."""
        self._policy.times.observe_preview(len(self._nodes), left, self._pass_s)
        self._growth.preview(self._nodes, logits, calibration, self._policy.least_score)
