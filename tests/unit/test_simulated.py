"""The simulation, and what a checker finds in it: mutants whatever the seed, in a sound program nothing."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from test_backend import expected, streamed

from subspec.memory.backend import Backend, Event
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.simulated import DeadlockError, SimulatedBackend
from subspec.memory.hazards import HazardChecker, HazardError

SEEDS = range(60)
SITES = [
    ("host_wait", "copied"),
    ("wait", "free"),
    ("host_wait", "loaded"),
    ("wait", "ready"),
    ("host_wait", "out"),
    ("record", "copied"),
    ("record", "free"),
    ("record", "loaded"),
    ("record", "ready"),
    ("record", "out"),
]


def forgetting(backend: Backend, verb: str, kind: str) -> Backend:
    """The backend, without what one verb does with one kind of event."""
    real = getattr(backend, verb)

    def deaf(*arguments: object) -> None:
        if not any(isinstance(each, Event) and each.name.split()[0] == kind for each in arguments):
            real(*arguments)

    setattr(backend, verb, deaf)
    return backend


# Orders


def traces(slots: int = 2) -> list[list[tuple[str, str]]]:
    made = []
    for seed in SEEDS:
        backend = SimulatedBackend(seed)
        streamed(backend, slots=slots)
        backend.close()
        made.append(backend.trace)
    return made


def test_a_seed_gives_one_order_and_seeds_give_many() -> None:
    first = traces()
    assert first == traces()
    assert len({tuple(trace) for trace in first}) > 0.9 * len(SEEDS)


def test_pieces_of_a_copy_let_others_between() -> None:
    split = 0
    for trace in traces():
        places = [place for place, (_, what) in enumerate(trace) if what == "copy load 1"]
        split += places != list(range(places[0], places[0] + len(places)))
    assert split


def test_some_seeds_run_all_at_once_and_some_nothing() -> None:
    steps = set()
    for seed in SEEDS:
        backend = SimulatedBackend(seed)
        link = backend.stream("link")
        for _ in range(20):
            backend.launch(link, lambda: None)
        steps.add(len(backend.trace))
    assert {0, 20} < steps


@pytest.mark.parametrize("starving", ["link", "compute"])
def test_some_seeds_starve_a_stream(starving: str) -> None:
    def starves(seed: int) -> bool:
        backend = SimulatedBackend(seed)
        other = backend.stream("link")
        for _ in range(20):
            backend.launch(other, lambda: None)
            backend.launch(backend.compute, lambda: None)
        backend.close()
        return [name for name, _ in backend.trace[-20:]] == [starving] * 20

    assert any(starves(seed) for seed in SEEDS)


def test_some_seeds_run_only_what_is_waited_for() -> None:
    def late(seed: int) -> bool:
        backend, ran = SimulatedBackend(seed), list[str]()
        streams = {name: backend.stream(name, host=name == "c") for name in "abc"}
        ends = {name: backend.event(name) for name in "abc"}
        for name, stream in streams.items():
            if name == "b":
                backend.wait(stream, ends["a"])
            for _ in range(5):
                backend.launch(stream, partial(ran.append, name))
            backend.record(ends[name], stream)
        backend.host_wait(ends["b"])
        backend.launch(streams["a"], partial(ran.append, "a"))
        backend.host_wait(ends["c"])
        return ran == [*"aaaaabbbbbccccc"]

    assert any(late(seed) for seed in SEEDS)


# Misuse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_who_looks_too_early_sees_poison(dtype: torch.dtype) -> None:
    def early(seed: int) -> torch.Tensor:
        backend = SimulatedBackend(seed)
        target = torch.zeros(16, dtype=dtype)
        backend.copy(backend.stream("link"), target, torch.ones(16, dtype=dtype))
        return target.clone()

    seen = [early(seed) for seed in SEEDS]
    assert any(values.isnan().all() for values in seen)
    assert any(values.isnan().any() and (values == 1).any() for values in seen)
    assert any((values == 0).all() for values in seen)
    assert any((values == 1).all() for values in seen)


def test_a_device_stream_cannot_wait_for_a_thread() -> None:
    for backend in (SimulatedBackend(0), CheckedBackend(SimulatedBackend(0), HazardChecker())):
        event = backend.event("read")
        backend.record(event, backend.stream("reader", host=True))
        with pytest.raises(AssertionError, match="compute waits for read"):
            backend.wait(backend.compute, event)


@pytest.mark.parametrize("seed", range(20))
def test_a_thread_that_waits_for_threads_is_told_what_waits(seed: int) -> None:
    backend = SimulatedBackend(seed)
    reader, link = backend.stream("reader", host=True), backend.stream("link")
    read, copied, seen = backend.event("read"), backend.event("copied"), list[str]()

    def work() -> None:
        backend.record(read, reader)
        backend.record(copied, link)
        backend.wait(backend.compute, copied)
        with pytest.raises(DeadlockError) as caught:
            backend.host_wait(read)
        seen.append(str(caught.value))

    backend.launch(reader, work)
    backend.close()
    assert seen[0].startswith("read of reader is awaited, and never comes; reader is at work; compute")


@pytest.mark.parametrize("verb", ["record", "host_wait", "done", "touch"])
@pytest.mark.parametrize("seed", range(8))
def test_work_on_the_device_calls_nothing(seed: int, verb: str) -> None:
    backend = SimulatedBackend(seed)
    reader, event, end = backend.stream("reader", host=True), backend.event("event"), backend.event("end")
    calls: dict[str, Callable[[], object]] = {
        "record": lambda: backend.record(event, backend.compute),
        "host_wait": lambda: backend.host_wait(end),
        "done": lambda: backend.done(event),
        "touch": backend.touch,
    }

    def work() -> None:
        backend.record(end, backend.compute)
        backend.launch(backend.compute, calls[verb])
        backend.record(event, backend.compute)
        backend.host_wait(event)

    def run(host: bool) -> None:
        if host:
            backend.launch(reader, work)
        else:
            work()
        backend.close()

    for host in (False, True):
        with pytest.raises(AssertionError, match="work on compute calls the backend"):
            run(host)


def test_what_work_raises_comes_out() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    def run() -> None:
        backend = SimulatedBackend(0)
        backend.launch(backend.compute, fails)
        backend.close()

    with pytest.raises(ZeroDivisionError):
        run()


# Under the checker


@pytest.mark.parametrize(("slots", "staging"), list(product((1, 2, 3, 4), (1, 2))))
def test_a_sound_program_raises_nothing(slots: int, staging: int) -> None:
    for seed in SEEDS:
        checker = HazardChecker()
        backend = CheckedBackend(SimulatedBackend(seed), checker)
        assert streamed(backend, slots=slots, staging=staging, sweeps=3) == expected(sweeps=3)
        backend.close()
        assert not checker.hazards


@pytest.mark.parametrize(("verb", "kind"), SITES)
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_a_forgotten_call_is_caught_in_every_seed(verb: str, kind: str, slots: int) -> None:
    def run(seed: int) -> None:
        backend = forgetting(CheckedBackend(SimulatedBackend(seed), HazardChecker()), verb, kind)
        streamed(backend, slots=slots, sweeps=3)
        backend.close()

    for seed in SEEDS:
        with pytest.raises(HazardError):
            run(seed)


@pytest.mark.parametrize(("verb", "kind"), SITES)
def test_results_alone_show_a_forgotten_call_in_some_seeds(verb: str, kind: str) -> None:
    def wrong(seed: int) -> bool:
        backend = forgetting(SimulatedBackend(seed), verb, kind)
        got = streamed(backend, slots=2, sweeps=3)
        return got != expected(sweeps=3)

    caught = sum(wrong(seed) for seed in SEEDS)
    assert caught > 0


def test_an_event_costs_one_clock_and_a_place_its_newest_accesses() -> None:
    def kept(sweeps: int) -> tuple[int, int]:
        checker = HazardChecker()
        backend = CheckedBackend(SimulatedBackend(3), checker)
        streamed(backend, slots=3, sweeps=sweeps)
        backend.close()
        return len(checker._events), sum(map(len, checker._accesses.values()))

    events, accesses = kept(20)
    assert events <= 4 * 3 + 1
    assert accesses < 60
    assert kept(60) == (events, accesses)


def test_threads_of_one_name_are_two_actors() -> None:
    checker = HazardChecker(collect=True)
    backend = CheckedBackend(SimulatedBackend(0), checker)
    streams, memory = [backend.stream("link"), backend.stream("link")], torch.zeros(4)
    for stream in streams:
        backend.launch(stream, lambda: None, writes=[memory])
    assert len(checker.hazards) == 1


def test_a_view_that_overlaps_is_the_same_memory() -> None:
    checker = HazardChecker(collect=True)
    backend = CheckedBackend(SimulatedBackend(0), checker)
    link, memory = backend.stream("link"), torch.zeros(8)
    backend.copy(link, memory[:5], torch.ones(5))
    backend.launch(backend.compute, lambda: None, reads=[memory[5:]])
    assert not checker.hazards
    backend.launch(backend.compute, lambda: None, reads=[memory[4:]])
    assert len(checker.hazards) == 1


def test_a_hazard_that_work_kept_to_itself_comes_out_later() -> None:
    backend = CheckedBackend(SimulatedBackend(0), HazardChecker())
    reader, memory, kept = backend.stream("reader", host=True), torch.zeros(4), list[HazardError]()

    def work() -> None:
        try:
            backend.touch(writes=[memory])
        except HazardError as error:
            kept.append(error)

    backend.launch(backend.stream("link"), lambda: None, writes=[memory])
    end = backend.event("end")
    backend.launch(reader, work)
    backend.record(end, reader)
    with pytest.raises(HazardError):
        backend.host_wait(end)
    with pytest.raises(HazardError):
        backend.close()
    assert len(kept) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_record_is_remembered_for_whoever_still_waits_for_it(seed: int) -> None:
    checker = HazardChecker()
    backend = CheckedBackend(SimulatedBackend(seed), checker)
    reader, link = backend.stream("reader", host=True), backend.stream("link")
    copied, memory = backend.event("copied"), torch.zeros(4)
    backend.launch(link, lambda: None, writes=[memory])
    backend.record(copied, link)
    for _ in range(2):
        backend.wait(reader, copied)
        backend.launch(reader, lambda: backend.touch(reads=[memory]))
    backend.record(copied, link)
    backend.close()
    assert not checker.hazards
    assert len(checker._events) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_later_record_does_not_stand_for_an_earlier_one(seed: int) -> None:
    checker = HazardChecker(collect=True)
    backend = CheckedBackend(SimulatedBackend(seed), checker)
    reader, link = backend.stream("reader", host=True), backend.stream("link")
    copied, early, late = backend.event("copied"), torch.zeros(4), torch.zeros(4)
    backend.launch(link, lambda: None, writes=[early])
    backend.record(copied, link)
    backend.wait(reader, copied)
    backend.launch(reader, lambda: backend.touch(reads=[early]))
    backend.launch(reader, lambda: backend.touch(reads=[late]))
    backend.launch(link, lambda: None, writes=[late])
    backend.record(copied, link)
    backend.close()
    assert [hazard.first.start for hazard in checker.hazards] == [late.data_ptr()]
