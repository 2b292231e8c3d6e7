"""The real streamer and schedule in orders that no machine would show, and each of their waits and records.

A simulation runs a toy over them under the hazard checker, in ten thousand orders without an alarm.  Then,
call site by call site, what ``subspec`` waits for or records is left out, or comes a call too late: that is
caught in every order, or the site is one that bytes do not rest on.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from toy import Case, Toy, drawn

import subspec
from subspec.errors import StoreError
from subspec.memory.backend import Event, Stream
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.simulated import SimulatedBackend
from subspec.memory.hazards import HazardChecker, HazardError

SCHEDULES, BATCH = 10_000, 1_000


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_order_gives_the_result_without_an_alarm(first: int, one_thread: None) -> None:
    for seed in range(first, first + BATCH):
        checker = HazardChecker()
        Toy(drawn(seed), CheckedBackend(SimulatedBackend(seed), checker)).run()
        assert not checker.hazards


# What each wait and each record is for

ORDERS = range(30)
PACING = "fill_gap of schedule.py"  # keeps the host from drafting ahead of the device: no byte rests on it
ACTS = ("sweep", (2, "launched"), (2, "acquired"), (2, "arrived"), "sweep", "sweep")
CASES = {
    f"{name}, {slots} slots": Case(slots, units, images, staged, ACTS, threads)
    for slots in (1, 2, 3)
    for name, units, images, staged, threads in [
        ("files through staging", (3, 2, 3), (False,) * 3, True, 1),
        ("files through staging, two readers", (3, 2, 3), (False,) * 3, True, 2),
        ("images", (3, 2, 3), (True,) * 3, False, 1),
        ("files", (3, 2, 3), (False,) * 3, False, 2),
        ("images and files", (3, 2, 3), (True, False, True), False, 1),
        ("images and files, two readers", (3, 2, 3), (True, False, True), False, 2),
    ]
}
Site = tuple[str, str]  # verb, "function of file: line"
PACKAGE = Path(subspec.__file__).parent
VERBS = str(PACKAGE / "memory" / "backend")


def site_of(frame: FrameType | None) -> str:
    """The innermost call from the package, outside the backends."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(PACKAGE)) and not path.startswith(VERBS):
            return f"{frame.f_code.co_name} of {Path(path).name}: {frame.f_lineno}"
        frame = frame.f_back
    return "a test"


@dataclass(frozen=True)
class Call:
    """A wait or a record, made from a site; ``stream`` is None where the host waits."""

    site: Site
    run: "partial[None]"
    event: Event
    stream: Stream | None = None

    def may_come_after(self, other: "Call") -> bool:
        """Whether the order of the two says nothing: a record nobody asked for yet, or two waits."""
        if self.site[0] == "record":
            return self.event is not other.event
        return other.site[0] != "record" or self.stream is not other.stream


class Sited(CheckedBackend):
    """Notes call sites; leaves one out, or makes it come after the call that its caller makes next."""

    def __init__(self, seed: int, without: Site | None = None, late: tuple[Site, Site] | None = None) -> None:
        super().__init__(SimulatedBackend(seed), HazardChecker())
        self.without, self.late = without, late
        self.sites: set[Site] = set()
        self.pairs: set[tuple[Site, Site]] = set()  # calls that follow each other, and must
        self._latest: dict[str, Call] = {}
        self._held: dict[str, Call] = {}

    def record(self, event: Event, stream: Stream) -> None:
        self._call("record", partial(super().record, event, stream), event, stream)

    def wait(self, stream: Stream, event: Event) -> None:
        self._call("wait", partial(super().wait, stream, event), event, stream)

    def host_wait(self, event: Event) -> None:
        self._call("host_wait", partial(super().host_wait, event), event)

    def _call(self, verb: str, run: "partial[None]", event: Event, stream: Stream | None = None) -> None:
        """Make a call, or hold it until its caller's next one, which it precedes or, in a mutant, follows."""
        call, me = Call((verb, site_of(sys._getframe(2))), run, event, stream), self._me()
        self._note(call, me)
        held = self._held.pop(me, None)
        follows = held is not None and self.late == (held.site, call.site)
        if held is not None and not follows:
            held.run()
        if self.late is not None and not follows and call.site == self.late[0]:
            self._held[me] = call
        elif call.site != self.without:
            call.run()
        if held is not None and follows:
            held.run()

    def _note(self, call: Call, me: str) -> None:
        """Remember where a call comes from, and after which."""
        before = self._latest.get(me)
        if before is not None and not before.may_come_after(call):
            self.pairs.add((before.site, call.site))
        self._latest[me] = call
        self.sites.add(call.site)


def run(case: Case, seed: int, **mutation: Any) -> Sited:
    """A case in one order, perhaps with a call left out or late."""
    backend = Sited(seed, **mutation)
    Toy(case, backend).run()
    return backend


def caught(case: Case, seed: int, **mutation: Any) -> bool:
    """Whether a wrong number, a hazard or a reader's own check shows it."""
    try:
        run(case, seed, **mutation)
    except (AssertionError, HazardError, StoreError):
        return True
    return False


def always_caught(cases: list[Case], **mutation: Any) -> bool:
    """Whether there is a case in which every order shows it."""
    return any(all(caught(case, seed, **mutation) for seed in ORDERS) for case in cases)


def test_a_wait_or_a_record_left_out_is_caught_in_every_order(one_thread: None) -> None:
    sites: dict[Site, list[Case]] = {}
    for case in CASES.values():
        for site in set().union(*(run(case, seed).sites for seed in range(5))):
            sites.setdefault(site, []).append(case)
    missed = {site for site, cases in sites.items() if not always_caught(cases, without=site)}
    assert len(sites) >= 20
    assert {place.split(":")[0] for _, place in missed} == {PACING}


def test_a_wait_or_a_record_that_comes_late_is_caught_in_every_order(one_thread: None) -> None:
    pairs: dict[tuple[Site, Site], list[Case]] = {}
    for case in CASES.values():
        for pair in set().union(*(run(case, seed).pairs for seed in range(5))):
            pairs.setdefault(pair, []).append(case)
    missed = {pair for pair, cases in pairs.items() if not always_caught(cases, late=pair)}
    assert len(pairs) >= 10
    assert {place.split(":")[0] for pair in missed for _, place in pair} == {PACING}
