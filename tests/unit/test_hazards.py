"""The happens-before checker and the ledger of exact entries: every broken order is seen, no sound one is.

The checker is compared with an oracle that forgets nothing, then given schedules of a slot ring: sound ones,
and mutants with one wait or signal dropped or out of place, every one of which must be caught in every order
in which the actors can run.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.memory import hazards
from subspec.memory.hazards import HazardChecker, HazardError
from subspec.models.decoder import Rows
from subspec.models.kv_ledger import InexactError, KVLedger, LedgeredPass

PART = 8


@dataclass(frozen=True)
class Op:
    """One call of the checker; ``needs``: how often a wait's event must have been signalled by then."""

    kind: str
    actor: str
    where: str
    start: int = 0
    stop: int = 0
    needs: int = 0

    def run(self, checker: HazardChecker) -> None:
        if self.kind in ("signal", "wait"):
            getattr(checker, self.kind)(self.actor, self.where)
        else:
            getattr(checker, self.kind)(self.actor, self.where, self.start, self.stop)


def first_hazard(schedule: list[Op]) -> int | None:
    """Where the checker raises."""
    checker = HazardChecker()
    for index, op in enumerate(schedule):
        try:
            op.run(checker)
        except HazardError:
            return index
    return None


# Against an oracle


def first_race(schedule: list[Op]) -> int | None:
    """Where an access conflicts with an earlier one that its actor does not know of; nothing is forgotten."""
    known: dict[str, set[int]] = {}
    events: dict[str, set[int]] = {}
    for index, op in enumerate(schedule):
        mine = known.setdefault(op.actor, set())
        if op.kind == "signal":
            events[op.where] = set(mine)
        elif op.kind == "wait":
            mine |= events.get(op.where, set())
        else:
            for other, old in enumerate(schedule[:index]):
                conflict = old.kind in ("read", "write") and "write" in (old.kind, op.kind)
                meet = old.where == op.where and max(old.start, op.start) < min(old.stop, op.stop)
                if conflict and meet and other not in mine:
                    return index
            mine.add(index)
    return None


ACTORS = st.sampled_from("abc")
SYNCS = st.builds(Op, st.sampled_from(["signal", "wait"]), ACTORS, st.sampled_from(["e", "f"]))
ACCESSES = st.builds(
    lambda kind, actor, where, start, size: Op(kind, actor, where, start, start + size),
    st.sampled_from(["read", "read", "write"]),
    ACTORS,
    st.sampled_from(["m", "n"]),
    st.integers(0, 6),
    st.integers(0, 5),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(SYNCS | ACCESSES, max_size=40))
def test_it_sees_a_race_where_one_is_and_nowhere_else(schedule: list[Op]) -> None:
    assert first_hazard(schedule) == first_race(schedule)


def handing_on(rng: random.Random, actors: list[str], turns: int) -> list[Op]:
    """Actors take turns, each waiting for the one before: all is ordered, whatever they touch."""
    schedule: list[Op] = []
    for turn in range(turns):
        actor = rng.choice(actors)
        schedule.append(Op("wait", actor, "turn"))
        for _ in range(rng.randint(1, 3)):
            start = rng.randint(0, 30)
            kind = rng.choice(["read", "write"])
            schedule.append(Op(kind, actor, f"m{turn % 2}", start, start + rng.randint(1, 9)))
        schedule.append(Op("signal", actor, "turn"))
    return schedule


def test_what_later_accesses_dominate_is_forgotten() -> None:
    checker = HazardChecker()
    most = 0
    for op in handing_on(random.Random(0), ["a", "b", "c"], 3000):
        op.run(checker)
        most = max(most, sum(map(len, checker._accesses.values())))
    assert most < 120  # two places of 39 bytes; 6,000 accesses


def test_neighbouring_parts_become_one() -> None:
    checker = HazardChecker()
    for start in range(0, 100, 10):
        checker.write("a", "m", start, start + 10)
    assert len(checker._accesses["m"]) == 1


# Its words


def test_a_hazard_names_both_accesses() -> None:
    checker = HazardChecker()
    checker.write("copy", "slot 1", 0, 64, "load 5")
    with pytest.raises(HazardError) as caught:
        checker.read("compute", "slot 1", 32, 96)
    message = str(caught.value)
    assert "copy writes slot 1[0:64] (load 5)" in message
    assert "compute reads slot 1[32:96]" in message
    assert (caught.value.hazard.first.actor, caught.value.hazard.second.actor) == ("copy", "compute")
    with pytest.raises(HazardError, match="load 5"):
        checker.check()


def test_hazards_may_be_collected() -> None:
    checker = HazardChecker(collect=True)
    for actor in "abc":
        checker.write(actor, "m", 0, 4)
    checker.check()
    assert [(one.first.actor, one.second.actor) for one in checker.hazards] == [("a", "b"), ("b", "c")]


def test_an_event_means_its_newest_record() -> None:
    checker = HazardChecker()
    checker.write("a", "m", 0, 1)
    checker.signal("a", "e")
    checker.write("a", "m", 1, 2)
    checker.wait("b", "e")
    checker.read("b", "m", 0, 1)
    with pytest.raises(HazardError):
        checker.read("b", "m", 1, 2)
    checker.signal("a", "e")
    checker.wait("b", "e")
    checker.read("b", "m", 0, 2)
    checker.signal("c", "e")  # c knows nothing, and its record takes the place of a's
    checker.wait("d", "e")
    with pytest.raises(HazardError):
        checker.read("d", "m", 0, 2)


def test_an_event_that_was_never_recorded_or_is_forgotten_orders_nothing() -> None:
    checker = HazardChecker(collect=True)
    checker.write("a", "m", 0, 1)
    checker.wait("b", "e")
    checker.read("b", "m", 0, 1)
    assert len(checker.hazards) == 1
    checker.signal("a", "e")
    checker.forget("e")
    checker.wait("c", "e")
    checker.read("c", "m", 0, 1)
    assert len(checker.hazards) == 2


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool) -> None:
    monkeypatch.delenv(hazards.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(hazards.SWITCH, value)
    assert hazards.wanted() is on


# A slot ring


def ring_programs(rng: random.Random) -> list[list[Op]]:
    """What each reader and the consumer of a random ring do, without a wait or signal too many."""
    loads, slots, readers, parts = rng.randint(2, 7), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 4)
    programs: list[list[Op]] = [[] for _ in range(readers)]
    consumer: list[Op] = []
    reused = readers == 1 and rng.random() < 0.5  # events of slots, recorded again, or events of loads

    def event(kind: str, load: int) -> tuple[str, int]:
        return (f"{kind} {load % slots}", load // slots + 1) if reused else (f"{kind} {load}", 1)

    for load in range(loads):
        place, free, ready = f"slot {load % slots}", event("free", load - slots), event("ready", load)
        takers = [rng.randrange(readers) for _ in range(parts)]
        finisher = rng.choice(takers)
        for reader in sorted(set(takers), key=lambda one: (one == finisher, one)):
            program, actor = programs[reader], f"reader {reader}"
            if load >= slots:
                program.append(Op("wait", actor, free[0], needs=free[1]))
            for part in (index for index, taker in enumerate(takers) if taker == reader):
                program.append(Op("write", actor, place, part * PART, (part + 1) * PART))
            if reader != finisher:
                program.append(Op("signal", actor, f"filled {load} {reader}"))
        program, actor = programs[finisher], f"reader {finisher}"
        program += [
            Op("wait", actor, f"filled {load} {one}", needs=1) for one in sorted({*takers} - {finisher})
        ]
        program.append(Op("signal", actor, ready[0]))
        consumer.append(Op("wait", "consumer", ready[0], needs=ready[1]))
        consumer.append(Op("read", "consumer", place, 0, parts * PART))
        if load + slots < loads:
            consumer.append(Op("signal", "consumer", event("free", load)[0]))
    return [*programs, consumer]


def in_some_order(rng: random.Random, programs: list[list[Op]]) -> list[Op]:
    """The programs, interleaved as threads that wait for each other may run."""
    ahead = [list(reversed(program)) for program in programs]
    signalled: dict[str, int] = {}
    schedule = []
    while any(ahead):
        able = [one for one in ahead if one and one[-1].needs <= signalled.get(one[-1].where, 0)]
        op = rng.choice(able).pop()  # an empty list would be a deadlock of the ring
        if op.kind == "signal":
            signalled[op.where] = signalled.get(op.where, 0) + 1
        schedule.append(op)
    return schedule


def mutants(schedule: list[Op]) -> list[list[Op]]:
    """The schedule with one wait or signal dropped, or swapped with what it must come before or after."""
    found = []
    for index, op in enumerate(schedule):
        if op.kind in ("signal", "wait"):
            found.append(schedule[:index] + schedule[index + 1 :])
        after = next((i for i in range(index + 1, len(schedule)) if schedule[i].actor == op.actor), None)
        if after is None or not (op.kind == "wait" or schedule[after].kind == "signal"):
            continue
        if op.kind == schedule[after].kind or (op.kind, schedule[after].kind) == ("signal", "wait"):
            continue  # the order of two waits, or of two signals, is free
        swapped = list(schedule)
        swapped[index], swapped[after] = swapped[after], swapped[index]
        found.append(swapped)
    return found


def test_a_sound_ring_raises_nothing() -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        assert first_hazard(in_some_order(rng, ring_programs(rng))) is None, seed


def test_every_mutant_of_a_ring_is_caught_in_every_order() -> None:
    caught = 0
    for seed in range(150):
        rng = random.Random(seed)
        programs = ring_programs(rng)
        for _ in range(3):
            for mutant in mutants(in_some_order(rng, programs)):
                assert first_hazard(mutant) is not None, (seed, mutant)
                caught += 1
    assert caught > 10_000


# The ledger of exact entries


def ledger() -> KVLedger:
    """Three layers of eight slots, four of them exact."""
    made = KVLedger(3, 8)
    for layer in range(3):
        made.swept(layer, range(4))
    return made


def test_a_sweep_reads_what_a_sweep_wrote() -> None:
    made = ledger()
    made.drafted(1, [4, 5])
    made.swept(1, [4, 5])
    made.read_exact(1, range(6))


@pytest.mark.parametrize("slot", [0, 3, 5])
@pytest.mark.parametrize("layer", range(3))
def test_a_sweep_that_reads_what_a_draft_wrote_raises(layer: int, slot: int) -> None:
    made = ledger()
    made.drafted(layer, [slot])
    for other in range(3):
        if other != layer:
            made.read_exact(other, range(4))
    with pytest.raises(InexactError, match=f"attends to slot {slot} of layer {layer}, which a draft wrote"):
        made.read_exact(layer, [1, 2, slot])


def test_a_sweep_that_reads_what_nobody_wrote_raises() -> None:
    with pytest.raises(InexactError, match="slot 6 of layer 0, which nobody wrote"):
        ledger().read_exact(0, [6])


@pytest.mark.parametrize("start", [4, 5])
def test_a_commit_that_keeps_what_a_draft_wrote_raises(start: int) -> None:
    made = ledger()
    for layer in range(3):
        made.swept(layer, [5, 7])
    made.drafted(2, [7])
    with pytest.raises(InexactError, match="keeps slot 7 of layer 2, which a draft wrote"):
        made.moved([5, 7], [start, start + 1])
    made.swept(2, [7])
    made.moved([5, 7], [start, start + 1])
    made.read_exact(0, [start, start + 1])


def test_what_a_commit_overwrites_is_exact() -> None:
    made = ledger()
    for layer in range(3):
        made.drafted(layer, [4])
        made.swept(layer, [6])
    made.moved([6], [4])
    made.read_exact(2, range(5))


def tree_rows(*lengths: int) -> Rows:
    """Rows at slots 4 and 5 that see two slots, then the first so many of slots 3, 4 and 2, 7."""
    numbers = partial(torch.tensor, dtype=torch.int32)
    paths = numbers([[3, 4], [2, 7]])
    return Rows(
        torch.tensor([1, 2]), numbers([2, 3]), numbers([4, 5]), numbers([2, 2]), paths, numbers(lengths)
    )


@pytest.mark.parametrize(("slot", "lengths", "seen"), [
    (1, (2, 1), True), (3, (2, 1), True), (2, (2, 1), True), (2, (2, 0), False), (3, (0, 1), False),
    (7, (2, 1), False), (7, (2, 2), True), (4, (2, 1), False), (5, (2, 1), False), (6, (2, 2), False),
])  # fmt: skip
def test_a_sweep_attends_to_its_prefix_and_paths(slot: int, lengths: tuple[int, int], seen: bool) -> None:
    made = ledger()
    for layer in range(3):
        made.swept(layer, [7])
    made.drafted(1, [slot])
    entered = LedgeredPass(made, tree_rows(*lengths), exact=True)
    entered.layer(0)
    if seen:
        with pytest.raises(InexactError, match=f"slot {slot} of layer 1"):
            entered.layer(1)
    else:
        entered.layer(1)
        made.read_exact(1, [4, 5])


def test_a_draft_enters_what_it_writes_when_a_layer_is_done() -> None:
    made = ledger()
    for layer in range(3):
        made.swept(layer, [4, 5])
    entered = LedgeredPass(made, tree_rows(2, 2), exact=False)
    made.read_exact(0, [4, 5])
    entered.layer(0)
    for slot in (4, 5):
        with pytest.raises(InexactError, match=f"slot {slot} of layer 0"):
            made.read_exact(0, [slot])
    made.read_exact(0, range(4))
    made.read_exact(1, [4, 5])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("dsr"), st.integers(0, 1), st.sets(st.integers(0, 4))), max_size=30)
)
def test_the_last_writer_decides(calls: list[tuple[str, int, set[int]]]) -> None:
    made, last = KVLedger(2, 5), dict[tuple[int, int], str]()
    write: dict[str, Callable[[int, set[int]], None]] = {"d": made.drafted, "s": made.swept}
    for kind, layer, slots in calls:
        if kind in write:
            write[kind](layer, slots)
            last |= {(layer, slot): kind for slot in slots}
        elif any(last.get((layer, slot)) != "s" for slot in slots):
            with pytest.raises(InexactError):
                made.read_exact(layer, slots)
        else:
            made.read_exact(layer, slots)
