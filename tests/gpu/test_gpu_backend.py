"""What the backend promises, on a device; and that a missing wait shows there."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from slow import SlowBackend, sleep

from subspec.errors import PinningError
from subspec.memory.arena import map_bytes
from subspec.memory.backend.cuda import CudaBackend
from subspec.memory.disk import writable
from subspec.memory.pinned import CudaRegistrar, PinnedArena
from subspec.memory.tiers import MIB, MemoryBudget

pytestmark = pytest.mark.gpu
N = 1 << 20


@pytest.fixture
def arena() -> Iterator[PinnedArena]:
    arena = PinnedArena(MemoryBudget(64 * MIB), CudaRegistrar())
    yield arena
    torch.cuda.synchronize()
    arena.close()


def pinned(arena: PinnedArena, value: float = 0.0) -> torch.Tensor:
    tensor = arena.tensor("test", (N,), torch.float32).fill_(value)
    arena.pin()
    return tensor


def zeros() -> torch.Tensor:
    tensor = torch.zeros(N, device="cuda")
    torch.cuda.synchronize()
    return tensor


def read(backend: CudaBackend, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The one way to the host: a copy on compute, and a wait."""
    done = backend.event("read")
    backend.copy(backend.compute, target, source)
    backend.record(done, backend.compute)
    backend.host_wait(done)
    return target


def count_up(out: torch.Tensor) -> None:
    """2, 4, 6, …, by way of memory that a graph must have."""
    out.copy_((out * 0 + 1).cumsum(0) * 2)


def test_registered_memory_is_pinned_and_copies_both_ways(backend: CudaBackend, arena: PinnedArena) -> None:
    up, down, target = pinned(arena, 3.0), pinned(arena), zeros()
    assert up.is_pinned()
    assert up[N // 2 :].is_pinned()
    assert not map_bytes(4096).is_pinned()
    backend.copy(backend.compute, target, up)
    assert read(backend, target, down).eq(3.0).all()
    arena.close()
    assert not up.is_pinned()


def test_a_refused_registration_leaves_no_error_behind(arena: PinnedArena) -> None:
    region = arena.bytes("test", MIB)
    arena.pin()
    other = PinnedArena(MemoryBudget(MIB), CudaRegistrar())
    other._loose.append(region)  # which is locked already
    with pytest.raises(PinningError, match="712"):
        other.pin()
    assert torch.ones(8, device="cuda").sum().item() == 8
    assert region.is_pinned()


@pytest.mark.parametrize("waits", [True, False])
def test_a_slow_copy_is_whole_where_it_is_waited_for(arena: PinnedArena, waits: bool) -> None:
    backend = SlowBackend(copies=True, work=False)
    link, ready = backend.stream("link"), backend.event("ready")
    source, target, total = pinned(arena, 1.0), zeros(), zeros()[:1]
    backend.copy(link, target, source)
    backend.record(ready, link)
    if waits:
        backend.wait(backend.compute, ready)
    backend.launch(backend.compute, lambda: torch.sum(target, 0, keepdim=True, out=total))
    backend.close()
    assert (total.item() == N) is waits


@pytest.mark.parametrize("waits", [True, False])
def test_a_slot_is_written_once_it_is_free(arena: PinnedArena, waits: bool) -> None:
    backend = SlowBackend(copies=False, work=True)
    link, free = backend.stream("link"), backend.event("free")
    source, slot, total = pinned(arena, 1.0), zeros(), zeros()[:1]
    backend.launch(backend.compute, lambda: torch.sum(slot, 0, keepdim=True, out=total))
    backend.record(free, backend.compute)
    if waits:
        backend.wait(link, free)
    backend.copy(link, slot, source)
    backend.close()
    assert (total.item() == 0) is waits


def test_host_waits_and_done_tell_the_truth(backend: CudaBackend) -> None:
    event = backend.event("event")
    assert backend.done(event)
    backend.host_wait(event)
    backend.launch(backend.compute, sleep)
    backend.record(event, backend.compute)
    assert not backend.done(event)
    backend.host_wait(event)
    assert backend.done(event)


def test_a_wait_is_for_the_newest_record_at_its_call(backend: CudaBackend) -> None:
    first, second = backend.stream("first"), backend.stream("second")
    event, end = backend.event("event"), backend.event("end")
    backend.record(event, first)
    backend.wait(second, event)
    backend.record(end, second)
    backend.launch(first, sleep)
    backend.record(event, first)
    backend.host_wait(end)
    assert not backend.done(event)


def test_host_streams_fill_staging_memory(backend: CudaBackend, arena: PinnedArena) -> None:
    worker, link = backend.stream("worker", host=True), backend.stream("link")
    emptied, loaded, copied = backend.event("emptied"), backend.event("loaded"), backend.event("copied")
    staging, target, total, down = pinned(arena), zeros(), zeros(), pinned(arena)

    def load(value: int) -> None:
        backend.host_wait(emptied)
        writable(staging.view(torch.uint8))[:] = torch.full((N,), float(value)).view(torch.uint8).numpy().data
        backend.copy(link, target, staging)
        backend.record(emptied, link)
        backend.record(copied, link)

    for value in (1, 2, 4, 8):
        backend.launch(worker, partial(load, value))
        backend.record(loaded, worker)
        backend.host_wait(loaded)
        backend.wait(backend.compute, copied)
        backend.launch(backend.compute, lambda: total.add_(target))
        used = backend.event("used")
        backend.record(used, backend.compute)
        backend.wait(link, used)
    assert read(backend, total, down).eq(15).all()


def test_a_graph_follows_the_contents_of_its_buffers(backend: CudaBackend, arena: PinnedArena) -> None:
    x, weight, out = zeros()[:64].view(8, 8), torch.eye(8, device="cuda") * 3, zeros()[:64].view(8, 8)
    up, down = pinned(arena)[:64].view(8, 8), pinned(arena)[:64].view(8, 8)
    torch.cuda.synchronize()
    replay = backend.capture(lambda: out.copy_(torch.relu(x @ weight) + 1))
    for value in (1.0, -2.0, 5.0):
        up.fill_(value)
        backend.copy(backend.compute, x, up)
        backend.launch(backend.compute, replay)
        assert read(backend, out, down).eq(max(3 * value, 0) + 1).all()


def test_graphs_share_memory_and_may_be_captured_while_others_copy(
    backend: CudaBackend, arena: PinnedArena
) -> None:
    link, stop = backend.stream("link"), threading.Event()
    source, elsewhere, outs, down = pinned(arena, 1.0), zeros(), [zeros() for _ in range(6)], pinned(arena)

    def copy_all_the_time() -> None:
        copied = backend.event("copied")
        while not stop.is_set():
            backend.copy(link, elsewhere, source)
            backend.record(copied, link)
            backend.host_wait(copied)

    thread = threading.Thread(target=copy_all_the_time)
    thread.start()
    try:
        replays = [backend.capture(partial(count_up, out)) for out in outs]
    finally:
        stop.set()
        thread.join()
    for replay in replays:
        backend.launch(backend.compute, replay)
    expected = 2.0 * torch.arange(1, N + 1)
    for out in outs:
        assert torch.equal(read(backend, out, down), expected)
