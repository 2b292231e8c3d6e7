"""The CUDA backend against a ``torch.cuda`` that only writes down what it is told."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import torch

from subspec.errors import OptionError
from subspec.memory.backend import Backend
from subspec.memory.backend.cuda import WARM_UPS, CudaBackend
from subspec.memory.backend.threads import ThreadBackend

Calls = list[tuple[Any, ...]]


class Driver:
    """What stands for ``torch.cuda``: streams and events numbered in the order they were made."""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.current = ["default"]
        self.made = {"stream": 0, "event": 0, "graph": 0, "pool": 0}

    def name(self, kind: str) -> str:
        self.made[kind] += 1
        return f"{kind} {self.made[kind]}"

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        self.current.append(stream.name)
        yield
        self.current.pop()

    @contextmanager
    def graph(
        self, graph: "FakeGraph", pool: str, stream: "FakeStream", capture_error_mode: str
    ) -> Iterator[None]:
        self.calls.append(("capture", graph.name, pool, stream.name, capture_error_mode))
        yield
        self.calls.append(("captured", graph.name))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name, kind in {"Stream": FakeStream, "Event": FakeEvent, "CUDAGraph": FakeGraph}.items():
            patch.setattr(torch.cuda, name, partial(kind, self))
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: self.name("pool"))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)


class FakeStream:
    def __init__(self, driver: Driver, device: torch.device) -> None:
        self.driver, self.name = driver, driver.name("stream")

    def wait_event(self, event: "FakeEvent") -> None:
        self.driver.calls.append(("wait_event", self.name, event.name))

    def synchronize(self) -> None:
        self.driver.calls.append(("stream.synchronize", self.name))


class FakeEvent:
    def __init__(self, driver: Driver, enable_timing: bool = False, blocking: bool = False) -> None:
        assert not enable_timing
        self.driver, self.name = driver, driver.name("event")

    def record(self, stream: FakeStream) -> None:
        self.driver.calls.append(("record", self.name, stream.name))

    def synchronize(self) -> None:
        self.driver.calls.append(("event.synchronize", self.name))

    def query(self) -> bool:
        self.driver.calls.append(("query", self.name))
        return False


class FakeGraph:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.name = driver, driver.name("graph")

    def replay(self) -> None:
        self.driver.calls.append(("replay", self.name, self.driver.current[-1]))


@dataclass
class Memory:
    """A tensor as far as a copy looks at it."""

    driver: Driver
    name: str
    is_cuda: bool = True
    pinned: bool = False

    def is_pinned(self) -> bool:
        return self.pinned

    def copy_(self, source: "Memory", non_blocking: bool = False) -> None:
        self.driver.calls.append(
            ("copy_", self.name, source.name, self.driver.current[-1], f"non_blocking={non_blocking}")
        )


def copy(backend: CudaBackend, stream: Any, target: Memory, source: Memory) -> None:
    backend.copy(stream, cast(torch.Tensor, target), cast(torch.Tensor, source))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    driver.install(monkeypatch)
    return driver


@pytest.fixture
def backend(driver: Driver) -> Iterator[CudaBackend]:
    backend = CudaBackend()
    yield backend
    backend.close()


def in_turn(backend: CudaBackend, stream: Any) -> Callable[[], None]:
    """Waits until a host stream has come this far."""
    event = backend.event("here")
    backend.record(event, stream)
    return lambda: backend.host_wait(event)


def test_it_is_a_backend() -> None:
    backend: type[Backend] = CudaBackend
    assert backend


def test_importing_touches_no_device() -> None:
    code = "import torch, subspec.memory.backend.cuda as c; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_device_is_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no CUDA device 2: torch finds 2"):
        CudaBackend(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="--device cpu"):
        CudaBackend()


def test_record_wait_copy_launch_are_one_call_each(driver: Driver, backend: CudaBackend) -> None:
    copies, ready = backend.stream("copies"), backend.event("ready")
    slot, pinned = Memory(driver, "slot"), Memory(driver, "pinned", is_cuda=False, pinned=True)
    copy(backend, copies, slot, pinned)
    backend.record(ready, copies)
    backend.wait(backend.compute, ready)
    backend.launch(backend.compute, lambda: driver.calls.append(("work", driver.current[-1])))
    copy(backend, backend.compute, pinned, slot)
    assert driver.calls == [
        ("copy_", "slot", "pinned", "stream 2", "non_blocking=True"),
        ("record", "event 1", "stream 2"),
        ("wait_event", "stream 1", "event 1"),
        ("work", "stream 1"),
        ("copy_", "pinned", "slot", "stream 1", "non_blocking=True"),
    ]
    assert driver.current == ["default"]


def test_the_host_waits_and_asks_by_one_call(driver: Driver, backend: CudaBackend) -> None:
    event = backend.event("event")
    backend.record(event, backend.compute)
    assert not backend.done(event)
    backend.host_wait(event)
    assert driver.calls[1:] == [("query", "event 1"), ("event.synchronize", "event 1")]


def test_a_wait_is_for_the_newest_record(driver: Driver, backend: CudaBackend) -> None:
    event = backend.event("event")
    backend.record(event, backend.compute)
    backend.record(event, backend.compute)
    backend.host_wait(event)
    backend.wait(backend.compute, event)
    assert driver.calls[2:] == [("event.synchronize", "event 2"), ("wait_event", "stream 1", "event 2")]


def test_an_event_never_recorded_holds_nobody(driver: Driver, backend: CudaBackend) -> None:
    event, worker = backend.event("event"), backend.stream("worker", host=True)
    backend.wait(backend.compute, event)
    backend.wait(worker, event)
    backend.host_wait(event)
    assert backend.done(event)
    assert driver.calls == []


def test_memory_that_is_not_pinned_is_refused(driver: Driver, backend: CudaBackend) -> None:
    slot, plain = Memory(driver, "slot"), Memory(driver, "plain", is_cuda=False)
    for target, source in ((slot, plain), (plain, slot)):
        with pytest.raises(AssertionError):
            copy(backend, backend.compute, target, source)
    assert driver.calls == []


def test_a_host_stream_waits_for_the_record_it_was_told_of(driver: Driver, backend: CudaBackend) -> None:
    event, worker = backend.event("event"), backend.stream("worker", host=True)
    busy = threading.Event()
    backend.launch(worker, busy.wait)
    backend.record(event, backend.compute)
    backend.wait(worker, event)
    backend.record(event, backend.compute)
    assert len(driver.calls) == 2  # the worker is not there yet
    busy.set()
    in_turn(backend, worker)()
    assert ("event.synchronize", "event 1") in driver.calls
    assert ("event.synchronize", "event 2") not in driver.calls


def test_a_host_stream_runs_in_turn_and_calls_verbs(driver: Driver, backend: CudaBackend) -> None:
    worker, ready = backend.stream("worker", host=True), backend.event("ready")
    order: list[str] = []
    backend.launch(worker, lambda: order.append("first"))
    backend.launch(worker, lambda: backend.record(ready, backend.compute))
    backend.launch(worker, lambda: order.append("second"))
    in_turn(backend, worker)()
    assert order == ["first", "second"]
    assert driver.calls == [("record", "event 1", "stream 1")]


def test_a_device_stream_cannot_wait_for_a_host_stream(driver: Driver, backend: CudaBackend) -> None:
    event, worker = backend.event("read"), backend.stream("worker", host=True)
    backend.record(event, worker)
    with pytest.raises(AssertionError, match="compute cannot wait for the host's read"):
        backend.wait(backend.compute, event)
    backend.host_wait(event)
    assert backend.done(event)


def test_capture_warms_up_then_captures_on_compute_in_one_pool(driver: Driver, backend: CudaBackend) -> None:
    def work() -> None:
        driver.calls.append(("work", driver.current[-1]))

    replays = [backend.capture(work), backend.capture(work)]
    one = [("work", "stream 1")] * WARM_UPS
    inside = [
        ("work", "default")
    ]  # torch.cuda.graph makes its stream the current one; this stand-in does not
    expected: Calls = []
    for graph in ("graph 1", "graph 2"):
        begin = ("capture", graph, "pool 1", "stream 1", "thread_local")
        expected += [*one, begin, *inside, ("captured", graph)]
    assert driver.calls == expected
    driver.calls.clear()
    backend.launch(backend.compute, replays[1])
    assert driver.calls == [("replay", "graph 2", "stream 1")]


def test_without_graphs_the_work_itself_is_launched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPEC_GRAPHS", "0")
    made = CudaBackend()

    def work() -> None:
        """Nothing."""

    assert made.capture(work) is work
    assert made.eager == "SUBSPEC_GRAPHS=0"
    assert not any(call[0] == "capture" for call in driver.calls)
    made.close()


def test_a_capture_that_fails_is_said_and_the_work_launched(driver: Driver, backend: CudaBackend) -> None:
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        if len(runs) > WARM_UPS:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert backend.capture(work) is work
    assert "not permitted" in str(backend.eager)
    assert backend.capture(work) is work  # and is not tried again
    assert len(runs) == WARM_UPS + 1


def test_threads_capture_nothing() -> None:
    backend, calls = ThreadBackend(), [0]
    work = backend.capture(lambda: calls.append(1))
    assert calls == [0]
    backend.launch(backend.compute, work)
    assert calls == [0, 1]
    backend.close()


def test_close_ends_threads_and_drains_streams_once(driver: Driver) -> None:
    backend, ran = CudaBackend(), [False]
    worker = backend.stream("worker", host=True)
    backend.stream("copies")
    backend.launch(worker, lambda: ran.append(True))
    backend.close()
    backend.close()
    assert ran[-1]
    assert driver.calls == [("stream.synchronize", "stream 1"), ("stream.synchronize", "stream 2")]
