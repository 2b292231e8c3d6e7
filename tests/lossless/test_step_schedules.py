"""Whole steps, drafted, verified and committed, in orders that no machine would show.

A simulation runs the method's own steps over a toy model, with the real levels, exchange, cache, streamer
and schedule, under the hazard checker and the ledger of exact entries: every commit, every guess of the draft
and every entry of the cache is what a plain loop makes.  Then a step is made wrong, and it shows.

An order costs some 18 ms, a third of that for the checker, the rest spread over simulated operations and
those of small tensors.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from step_runs import Case, Run, drawn

from subspec.memory.backend import Backend, Event, Stream
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.simulated import SimulatedBackend
from subspec.memory.exchange import Exchange, Pending, Ring
from subspec.memory.hazards import HazardChecker
from subspec.models.kv_ledger import KVLedger
from subspec.speculation.ahead import _Steps
from subspec.speculation.harvest import Harvest
from subspec.speculation.levels import Levels
from subspec.speculation.verify import Walk

SCHEDULES, BATCH = 10_000, 1_000

SITUATIONS = (
    "gap passes finished",
    "gap passes dropped",
    "shadow",
    "plants verified",
    "move",
    "0 accepted",
    "1 accepted",
    "accepted whole",
    "given up",
    "given up in a gap",
    "failed",
    "warm-up",
)


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_order_commits_the_truth_without_an_alarm(first: int, one_thread: None) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        checker = HazardChecker()
        counts += Run(drawn(seed), CheckedBackend(SimulatedBackend(seed), checker), seed).run()
        assert not checker.hazards
    assert {name: counts[name] for name in SITUATIONS if not counts[name]} == {}


# What the order of a step's parts is for

ORDERS = range(300)


class Late(SimulatedBackend):
    """Launches one thing of a step after the next launch of another one, or before one of some others."""

    def __init__(self, seed: int, what: str, after: str, before: tuple[str, ...] = ()) -> None:
        super().__init__(seed)
        self.what, self.after, self.before = what, after, before
        self._held: list[Callable[[], object]] = []

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        note: str = "",
    ) -> None:
        if note == self.what:
            self._held.append(work)
            return
        if note in self.before:
            self._launch_held(stream)
        super().launch(stream, work, reads=reads, writes=writes, note=note)
        if note == self.after:
            self._launch_held(stream)

    def _launch_held(self, stream: Stream) -> None:
        """What is late by now."""
        while self._held:
            super().launch(stream, self._held.pop(0), note=self.what)


def caught(case: Case, backend: Backend, seed: int) -> bool:
    """Whether anything shows: a wrong token, guess or entry, an alarm, or what poison leads to."""
    try:
        Run(case, backend, seed).run()
    except Exception:  # noqa: BLE001 - poison leads anywhere
        return True
    return False


def shows(make: Callable[[int], Backend] = SimulatedBackend, orders: range = ORDERS) -> bool:
    """Whether there is an order in which it does."""
    return any(caught(drawn(seed), make(seed), seed) for seed in orders)


@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("select", "head"),  # of the sweep: it verifies what the last step chose
        ("shadow", "draft layer 0"),
        ("root", "select"),
        ("advance", "summary"),
        ("summary", "compare"),
        ("move", "embedding"),  # of the next sweep
        ("plant", "select"),
        ("draft head", "advance"),
    ],
)
def test_a_part_of_a_step_that_comes_late_shows(what: str, after: str, one_thread: None) -> None:
    assert shows(lambda seed: Late(seed, what, after))


@pytest.mark.parametrize("what", ["commit", "move"])
def test_what_is_planted_and_what_is_committed_may_come_in_any_order(what: str, one_thread: None) -> None:
    """The one goes to the levels' memory, the other to the cache's: neither reads the other's."""
    before = ("seen", "root", "select", "compare")
    assert not shows(lambda seed: Late(seed, what, "plant", before), ORDERS[:100])


# What the waits and the places of a step are for


def taken_at_once(exchange: Exchange, pending: Pending) -> torch.Tensor:
    """A mutant of ``Exchange.take``: what was accepted is decided, and moved, before it is known."""
    return pending.value.clone()


def sent_beside(exchange: Exchange, target: torch.Tensor, values: torch.Tensor) -> None:
    """A mutant of ``Exchange.send``: it copies on a stream that ``compute`` does not wait for."""
    backend = exchange._backend
    backend.copy(backend.stream("side"), target, values.clone(), "upload")


def first_region(ring: Ring, n_bytes: int) -> tuple[torch.Tensor, Event]:
    """A mutant of ``Ring.region``: it does not wait for the copies out of what it hands out again."""
    return ring._memory[:n_bytes], ring._event()


def drafts_in_place(patch: pytest.MonkeyPatch) -> None:
    """Levels that are verified go on drafting in their own slots."""
    patch.setattr(Levels, "shadow", lambda levels, level: None)
    patch.setattr(_Steps, "_entry", lambda steps, grown, node: steps._base + grown.places[node])


def keeps_drafts(patch: pytest.MonkeyPatch) -> None:
    """A commit takes the shadows of what was verified."""
    go_on = _Steps._go_on

    def from_shadows(steps: _Steps, grown: Harvest, walked: Walk) -> None:
        shape, places = steps._levels.shape, list(grown.places)
        for node in walked.nodes:
            if grown.tree.depths[node] == steps._shadowed:
                places[node] = shape.nodes + (places[node] - 1) % shape.width * (places[node] > 0)
        go_on(steps, replace(grown, places=places), walked)

    patch.setattr(_Steps, "_go_on", from_shadows)


def without_ledger(patch: pytest.MonkeyPatch) -> None:
    """Let tokens and entries alone show it."""
    patch.setattr(KVLedger, "_require_exact", lambda ledger, layer, slots, what: None)


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the summary is not waited for": lambda patch: patch.setattr(Exchange, "take", taken_at_once),
    "uploads are not waited for": lambda patch: patch.setattr(Exchange, "send", sent_beside),
    "regions are handed out too early": lambda patch: patch.setattr(Ring, "region", first_region),
    "drafts go to the slots of what is verified": drafts_in_place,
    "a commit keeps a draft's entries": keeps_drafts,
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("watched", [True, False], ids=["watched", "by its result"])
def test_a_step_that_is_wrong_shows(name: str, watched: bool, one_thread: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[name](patch)
        if watched:
            assert shows(lambda seed: CheckedBackend(SimulatedBackend(seed), HazardChecker()))
        else:
            without_ledger(patch)
            assert shows()
