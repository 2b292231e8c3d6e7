"""Pinned memory: all of it is locked or nothing, and a refusal says what to do."""

import os
from types import SimpleNamespace

import pytest
import torch

from subspec.errors import BudgetError, PinningError
from subspec.memory.pinned import CudaRegistrar, PinnedArena
from subspec.memory.tiers import KIB, PAGE_BYTES, MemoryBudget

OUT_OF_MEMORY = 2


class Registrar:
    """A driver that refuses its ``limit``-th region and every later one."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.locked, self.calls = limit, dict[int, int](), 0

    def register(self, address: int, n_bytes: int) -> int:
        assert address % PAGE_BYTES == n_bytes % PAGE_BYTES == 0
        assert address not in self.locked
        self.calls += 1
        if self.calls >= self.limit:
            return OUT_OF_MEMORY
        self.locked[address] = n_bytes
        return 0

    def unregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def meaning(self, code: int) -> str:
        return {OUT_OF_MEMORY: "out of memory"}[code]


def filled(
    registrar: Registrar | None, budget_bytes: int = 64 * KIB
) -> tuple[PinnedArena, list[torch.Tensor]]:
    """An arena that handed out 8, 16 and 8 KiB."""
    arena = PinnedArena(MemoryBudget(budget_bytes), registrar)
    return arena, [arena.bytes("images", size) for size in (8 * KIB, 13 * KIB, 5 * KIB)]


def test_memory_is_handed_out_as_by_the_arena() -> None:
    arena, regions = filled(None)
    tensor = arena.tensor("staging", (3, 5), torch.float32)
    assert [len(region) for region in regions] == [8 * KIB, 16 * KIB, 8 * KIB]
    assert all(region.data_ptr() % PAGE_BYTES == 0 and not region.any() for region in regions)
    assert tensor.shape == (3, 5)
    assert arena.budget.held == {"images": 32 * KIB, "staging": PAGE_BYTES}
    with pytest.raises(BudgetError):
        arena.bytes("images", 32 * KIB)


def test_pin_locks_what_was_handed_out_since() -> None:
    registrar = Registrar()
    arena, regions = filled(registrar)
    assert not registrar.locked
    arena.pin()
    assert registrar.locked == {region.data_ptr(): len(region) for region in regions}
    later = arena.tensor("staging", (4,), torch.uint8)
    arena.pin()
    assert registrar.locked[later.data_ptr()] == PAGE_BYTES
    assert registrar.calls == 4
    assert arena.pinned_bytes == 36 * KIB


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_refusal_leaves_nothing_of_the_call_locked(limit: int) -> None:
    registrar = Registrar(limit)
    arena, regions = filled(registrar)
    regions[0][:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(PinningError):
        arena.pin()
    assert not registrar.locked
    assert arena.pinned_bytes == 0
    assert regions[0][:3].tolist() == [1, 2, 3]
    registrar.limit = 1000  # memory became free: the same regions can be locked after all
    arena.pin()
    assert len(registrar.locked) == 3


def test_a_refusal_keeps_what_was_locked_before() -> None:
    registrar = Registrar(limit=5)
    arena, regions = filled(registrar)
    arena.pin()
    arena.bytes("staging", KIB)
    arena.bytes("staging", KIB)
    with pytest.raises(PinningError):
        arena.pin()
    assert set(registrar.locked) == {region.data_ptr() for region in regions}


def test_a_refusal_says_the_numbers_and_the_remedy() -> None:
    arena, _ = filled(Registrar(limit=2))
    with pytest.raises(PinningError) as caught:
        arena.pin()
    message = str(caught.value)
    assert "pinning 32.00KiB of host memory failed after 8.00KiB, at a region of 16.00KiB" in message
    assert "returned 2 (out of memory)" in message
    assert "lower --ram from 64.00KiB to at most 40.00KiB" in message


def test_wsl_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wsl = SimpleNamespace(release="5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setattr(os, "uname", lambda: wsl)
    arena, _ = filled(Registrar(limit=1))
    with pytest.raises(PinningError, match="WSL pin about half"):
        arena.pin()


def test_close_unlocks_everything_once() -> None:
    registrar = Registrar()
    arena, _ = filled(registrar)
    arena.pin()
    arena.close()
    arena.close()
    assert not registrar.locked
    assert arena.pinned_bytes == 0


def test_without_a_device_nothing_is_locked() -> None:
    arena, _ = filled(None)
    arena.pin()
    assert arena.pinned_bytes == 0
    arena.close()


class Runtime:
    """``torch.cuda.cudart()``: an enumeration for results, as pybind makes it."""

    class cudaError(int):  # noqa: N801 - the runtime's name
        pass

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> "Runtime.cudaError":  # noqa: N802
        self.calls.append(("register", address, n_bytes, flags))
        return self.cudaError(OUT_OF_MEMORY if n_bytes > PAGE_BYTES else 0)

    def cudaHostUnregister(self, address: int) -> "Runtime.cudaError":  # noqa: N802
        self.calls.append(("unregister", address))
        return self.cudaError(0)

    def cudaGetErrorString(self, code: "Runtime.cudaError") -> str:  # noqa: N802
        assert isinstance(code, self.cudaError)
        return f"words for {int(code)}"


def test_the_cuda_registrar_calls_the_runtime_and_clears_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, launched = Runtime(), [0]

    def ones(*size: int, device: str) -> None:
        launched[0] += 1
        raise RuntimeError("CUDA error: out of memory")  # the failure that the runtime kept

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", ones)
    registrar = CudaRegistrar()
    assert registrar.register(4096, PAGE_BYTES) == 0
    assert registrar.unregister(4096) == 0
    assert launched == [0]
    assert registrar.register(8192, 2 * PAGE_BYTES) == OUT_OF_MEMORY
    assert launched == [1]
    assert registrar.meaning(OUT_OF_MEMORY) == "words for 2"
    assert runtime.calls[:2] == [("register", 4096, PAGE_BYTES, 1), ("unregister", 4096)]
