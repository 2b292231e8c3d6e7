"""What every backend promises: one suite for threads, for many seeds of the simulation, and both, checked."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from patience import finishes

from subspec.memory.backend import Backend
from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.simulated import SimulatedBackend
from subspec.memory.backend.threads import ThreadBackend
from subspec.memory.hazards import HazardChecker

SEEDS = 60


def backends() -> Iterator[Backend]:
    for _ in range(10):
        yield ThreadBackend()
        yield CheckedBackend(ThreadBackend(), HazardChecker())
    for seed in range(SEEDS):
        yield SimulatedBackend(seed)
        yield CheckedBackend(SimulatedBackend(seed), HazardChecker())


def promised(test: Callable[[Backend], None]) -> Callable[[], None]:
    """The test on every backend; it closes what it was given."""

    def run() -> None:
        for backend in backends():
            test(backend)
            backend.close()

    def on_all() -> None:
        finishes(run)

    on_all.__name__ = test.__name__
    return on_all


def streamed(
    backend: Backend, *, slots: int, staging: int = 2, units: int = 3, sweeps: int = 2
) -> list[tuple[int, float]]:
    """A small streamer: a thread fills staging memory, a copy takes it to a slot, a layer reads it there.

    Returns the state after each sweep, which depends on every byte and on the order.
    """
    reader, link = backend.stream("reader", host=True), backend.stream("link")
    events = {
        kind: [backend.event(f"{kind} {index}") for index in range(max(slots, staging))]
        for kind in ("free", "loaded", "ready", "copied")
    }
    out = backend.event("out")
    data = [torch.full((8,), float(unit + 1)) for unit in range(units)]
    stages, rings = torch.zeros(staging, 8), torch.zeros(slots, 8)
    state, seen = torch.zeros(()), torch.zeros(())

    def read(load: int) -> None:
        stage, slot = load % staging, load % slots
        backend.host_wait(events["copied"][stage])
        backend.touch(writes=[stages[stage]])
        stages[stage].copy_(data[load % units])
        backend.wait(link, events["free"][slot])
        backend.copy(link, rings[slot], stages[stage], f"load {load}")
        backend.record(events["copied"][stage], link)
        backend.record(events["ready"][slot], link)

    def layer(slot: int) -> None:
        state.mul_(3).add_(rings[slot].sum()).remainder_(10007)

    states, launched, total = [], 0, sweeps * units
    for load in range(total):
        for ahead in range(launched, min(total, load + slots)):
            backend.launch(reader, partial(read, ahead), note=f"read {ahead}")
            backend.record(events["loaded"][ahead % slots], reader)
            launched = ahead + 1
        slot = load % slots
        backend.host_wait(events["loaded"][slot])
        backend.wait(backend.compute, events["ready"][slot])
        backend.launch(backend.compute, partial(layer, slot), reads=[rings[slot]], writes=[state])
        backend.record(events["free"][slot], backend.compute)
        if (load + 1) % units == 0:
            backend.copy(backend.compute, seen, state, "state")
            backend.record(out, backend.compute)
            backend.host_wait(out)
            backend.touch(reads=[seen])
            states.append((load, float(seen)))
    return states


def expected(units: int = 3, sweeps: int = 2) -> list[tuple[int, float]]:
    """What ``streamed`` must return."""
    states, state = [], 0.0
    for load in range(sweeps * units):
        state = (state * 3 + 8.0 * (load % units + 1)) % 10007
        if (load + 1) % units == 0:
            states.append((load, state))
    return states


@promised
def test_a_stream_keeps_the_order_of_the_calls(backend: Backend) -> None:
    for host in (False, True):
        stream, reached, ran = backend.stream("s", host=host), backend.event("end"), list[int]()
        for index in range(20):
            backend.launch(stream, partial(ran.append, index))
        backend.record(reached, stream)
        backend.host_wait(reached)
        assert ran == list(range(20))


@promised
def test_a_copy_is_whole_where_it_was_waited_for(backend: Backend) -> None:
    link, there, end = backend.stream("link"), backend.event("there"), backend.event("end")
    source, target, sums = torch.arange(50.0), torch.zeros(50), list[float]()
    backend.copy(link, target, source)
    backend.record(there, link)
    backend.wait(backend.compute, there)
    backend.launch(backend.compute, lambda: sums.append(float(target.sum())), reads=[target])
    backend.record(end, backend.compute)
    backend.host_wait(end)
    assert sums == [float(source.sum())]


@promised
def test_every_shape_and_dtype_of_memory_can_be_copied(backend: Backend) -> None:
    link, end = backend.stream("link"), backend.event("end")
    for source in (
        torch.tensor(3),
        torch.ones(2, 3, dtype=torch.bool),
        torch.rand(0, 4),
        torch.rand(7).half(),
    ):
        target = torch.zeros_like(source)
        backend.copy(link, target, source)
        backend.record(end, link)
        backend.host_wait(end)
        backend.touch(reads=[target])
        assert torch.equal(target, source)


@promised
def test_a_wait_is_for_the_newest_record_at_its_call(backend: Backend) -> None:
    first, second, ran = backend.stream("first"), backend.stream("second"), list[str]()
    event, back, end = backend.event("event"), backend.event("back"), backend.event("end")
    backend.launch(first, partial(ran.append, "before"))
    backend.record(event, first)
    backend.wait(second, event)
    backend.launch(second, partial(ran.append, "between"))
    backend.record(back, second)
    backend.wait(first, back)
    backend.launch(first, partial(ran.append, "after"))
    backend.record(event, first)  # were the wait for this one, both would wait for ever
    backend.record(end, first)
    backend.host_wait(end)
    assert ran == ["before", "between", "after"]


@promised
def test_the_host_waits_for_the_newest_record(backend: Backend) -> None:
    stream, event, ran = backend.stream("s"), backend.event("event"), list[int]()
    for index in range(5):
        backend.launch(stream, partial(ran.append, index))
        backend.record(event, stream)
    backend.host_wait(event)
    assert ran == list(range(5))


@promised
def test_nobody_waits_for_an_event_that_was_never_recorded(backend: Backend) -> None:
    stream, never, end = backend.stream("s"), backend.event("never"), backend.event("end")
    backend.wait(stream, never)
    backend.record(end, stream)
    backend.host_wait(end)
    backend.host_wait(never)
    assert backend.done(never)


@promised
def test_a_host_streams_work_uses_the_device(backend: Backend) -> None:
    worker, link = backend.stream("worker", host=True), backend.stream("link")
    copied, end, target, seen = backend.event("copied"), backend.event("end"), torch.zeros(9), list[float]()

    def work() -> None:
        for value in range(1, 5):
            source = torch.full((9,), float(value))
            backend.copy(link, target, source)
            backend.record(copied, link)
            backend.host_wait(copied)
            backend.touch(reads=[target])
            seen.append(float(target.sum()))

    backend.launch(worker, work)
    backend.record(end, worker)
    backend.host_wait(end)
    assert seen == [9.0, 18.0, 27.0, 36.0]


@promised
def test_a_host_stream_waits_in_its_turn_for_a_device_stream(backend: Backend) -> None:
    worker, link = backend.stream("worker", host=True), backend.stream("link")
    copied, end, target, seen = backend.event("copied"), backend.event("end"), torch.zeros(9), list[float]()

    def work() -> None:
        backend.touch(reads=[target])
        seen.append(float(target.sum()))

    backend.copy(link, target, torch.ones(9))
    backend.record(copied, link)
    backend.wait(worker, copied)
    backend.launch(worker, work)
    backend.record(end, worker)
    backend.host_wait(end)
    assert seen == [9.0]


@promised
def test_done_comes_true_and_says_the_truth(backend: Backend) -> None:
    stream, event, ran = backend.stream("s"), backend.event("event"), list[int]()
    for index in range(3):
        backend.launch(stream, partial(ran.append, index))
        backend.record(event, stream)
        while not backend.done(event):
            pass
        assert ran == list(range(index + 1))
        assert backend.done(event)


@promised
def test_close_runs_what_was_launched_and_may_be_called_again(backend: Backend) -> None:
    ran: list[str] = []
    for name, host in (("thread", True), ("link", False)):
        stream = backend.stream(name, host=host)
        for _ in range(5):
            backend.launch(stream, partial(ran.append, name))
    backend.close()
    backend.close()
    assert sorted(ran) == ["link"] * 5 + ["thread"] * 5


@pytest.mark.parametrize(("slots", "staging"), list(product((1, 2, 3, 4), (1, 2, 3))))
def test_a_streamed_sweep_is_right(slots: int, staging: int) -> None:
    @promised
    def test(backend: Backend) -> None:
        assert streamed(backend, slots=slots, staging=staging) == expected()

    test()


def test_threads_run_beside_the_caller() -> None:
    def run() -> None:
        backend, gate, end = ThreadBackend(), threading.Event(), threading.Event()
        link, copied, target = backend.stream("link"), backend.event("copied"), torch.zeros(4)
        idents: list[Any] = []
        backend.launch(link, gate.wait)
        backend.copy(link, target, torch.ones(4))
        backend.record(copied, link)
        backend.launch(link, lambda: idents.append(threading.get_ident()))
        backend.launch(link, end.set)
        assert not backend.done(copied)
        assert not target.any()
        gate.set()
        backend.host_wait(copied)
        assert target.all()
        end.wait()
        assert idents != [threading.get_ident()]
        backend.launch(backend.compute, lambda: idents.append(threading.get_ident()))
        assert idents[1] == threading.get_ident()  # which computes
        backend.close()

    finishes(run)


def test_threads_under_stress() -> None:
    def run() -> None:
        for slots, staging in product((1, 2, 4), (1, 2)):
            backend = CheckedBackend(ThreadBackend(), HazardChecker())
            got = streamed(backend, slots=slots, staging=staging, units=7, sweeps=60)
            assert got == expected(7, 60)
            backend.close()

    finishes(run)
