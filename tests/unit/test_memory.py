"""Sizes, the ledger of the budget, and the memory that is entered in it."""

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.errors import BudgetError, OptionError
from subspec.memory import tiers
from subspec.memory.arena import Arena, map_bytes
from subspec.memory.tiers import (
    GIB,
    KIB,
    MIB,
    PAGE_BYTES,
    Link,
    MemoryBudget,
    default_budget,
    default_memory,
    default_ram,
    default_vram,
    format_size,
    free_memory_bytes,
    memory_limits,
    page_aligned,
    parse_size,
    peak_memory_bytes,
)

relaxed = settings(deadline=None, max_examples=100)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.5GiB", 3 * GIB // 2),
        ("1.5 gib", 3 * GIB // 2),
        (" 500 MB ", 500_000_000),
        ("800MiB", 800 * MIB),
        (".5k", 512),
        ("2000000000", 2_000_000_000),
        (2_000_000_000, 2_000_000_000),
        ("7B", 7),
        ("1T", 1 << 40),
    ],
)
def test_sizes_are_read(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0GiB", "1.5.2GiB", "1GiBs", "many", "1e9", "nan", "inf", -5, 0]
)
def test_what_is_no_size_is_refused_and_named(text: str | int) -> None:
    with pytest.raises(OptionError, match="1.5GiB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0.5", "9" * 400])
def test_extreme_sizes_are_refused_too(text: str) -> None:
    with pytest.raises(OptionError):
        parse_size(text)


@relaxed
@given(st.integers(1, 1 << 50))
def test_what_is_printed_can_be_read_back(n_bytes: int) -> None:
    back = parse_size(format_size(n_bytes))
    assert abs(back - n_bytes) <= max(0.005 * n_bytes, 0.005 * KIB)


@relaxed
@given(st.integers(0, 1 << 50))
def test_page_alignment_is_the_least_whole_number_of_pages(n_bytes: int) -> None:
    aligned = page_aligned(n_bytes)
    assert aligned % PAGE_BYTES == 0
    assert aligned - PAGE_BYTES < n_bytes <= aligned


@relaxed
@given(st.integers(1, 1000), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 400)), max_size=20))
def test_the_budget_is_never_exceeded_and_a_refusal_enters_nothing(
    total: int, wishes: list[tuple[str, int]]
) -> None:
    budget, taken = MemoryBudget(total), 0
    for purpose, n_bytes in wishes:
        before = dict(budget.held)
        if taken + n_bytes <= total:
            budget.take(purpose, n_bytes)
            taken += n_bytes
        else:
            with pytest.raises(BudgetError, match=f"{purpose} needs .*--memory"):
                budget.take(purpose, n_bytes)
            assert budget.held == before
        assert budget.held_bytes == taken == sum(budget.held.values()) <= total


@pytest.mark.parametrize("option", ["--memory", "--vram", "--ram"])
def test_a_refusal_names_the_option_that_raises_the_budget(option: str) -> None:
    with pytest.raises(BudgetError, match=f"raise {option}$"):
        MemoryBudget(10, option).take("slots", 11)


def test_the_arena_hands_out_zeroed_whole_pages_and_enters_them() -> None:
    budget = MemoryBudget(1 << 20)
    arena, entered = Arena(budget), 0
    for n_bytes in (0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 9 * PAGE_BYTES - 5):
        memory = arena.bytes("test", n_bytes)
        assert memory.dtype == torch.uint8
        assert memory.data_ptr() % mmap.PAGESIZE == 0
        assert memory.numel() % PAGE_BYTES == 0
        assert memory.numel() >= max(n_bytes, 1)
        assert not memory.any()
        entered += memory.numel()
        assert budget.held == {"test": entered}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_arena_tensors_are_separate_writable_and_of_their_shape(dtype: torch.dtype) -> None:
    arena = Arena(MemoryBudget(1 << 20))
    tensors = [arena.tensor("test", (3, 5, 7), dtype) for _ in range(3)]
    for value, tensor in enumerate(tensors, start=1):
        assert tensor.shape == (3, 5, 7)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        tensor.fill_(value)
    assert [float(tensor.float().mean()) for tensor in tensors] == [1.0, 2.0, 3.0]


def test_the_arena_refuses_what_the_budget_does_not_hold() -> None:
    budget = MemoryBudget(3 * PAGE_BYTES)
    arena = Arena(budget)
    arena.bytes("first", 2 * PAGE_BYTES)
    with pytest.raises(BudgetError, match="second needs 8.00KiB; 8.00KiB of the budget of 12.00KiB is taken"):
        arena.bytes("second", PAGE_BYTES + 1)  # one page and a byte: two pages
    assert budget.held == {"first": 2 * PAGE_BYTES}
    arena.bytes("second", PAGE_BYTES)


def mapping_flags(address: int) -> list[str]:
    """Linux's word on the mapping that holds an address: ``sh``, it is shared; ``hg``, advised huge pages."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:" and holds:
            return rest
        if not first.endswith(":"):
            start, end = (int(edge, 16) for edge in first.split("-"))
            holds = start <= address < end
    raise AssertionError("no mapping holds it")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages to give"
)
def test_huge_pages_may_serve_large_memory() -> None:
    """They are for private mappings; for shared ones most systems switch them off, whatever is advised."""
    memory = map_bytes(4 * MIB)
    flags = mapping_flags(memory.data_ptr())
    assert "hg" in flags
    assert "sh" not in flags


def test_large_mappings_are_aligned_too_and_outlive_their_other_names() -> None:
    part = map_bytes(4 * MIB)[MIB : MIB + 4]
    part += 7
    other = map_bytes(4 * MIB)
    assert part.tolist() == [7, 7, 7, 7]
    assert other.data_ptr() % PAGE_BYTES == 0


def test_a_link_takes_its_bytes_over_its_bandwidth() -> None:
    assert Link("disk", "ram", 2e9).seconds(10**9) == pytest.approx(0.5)


def test_the_machine_says_what_it_has() -> None:
    limits = memory_limits()
    assert set(limits) == {"total_bytes", "available_bytes", "cgroup_limit_bytes"}
    total, available = limits["total_bytes"], limits["available_bytes"]
    assert total is not None
    assert available is not None
    assert 0 < available <= total
    assert 64 * MIB <= default_budget() <= total


@relaxed
@given(st.integers(0, 1 << 42))
def test_defaults_leave_the_machine_its_share(free: int) -> None:
    assert default_ram(free) == min(default_memory(free), int(0.6 * free)) <= free
    assert default_ram(free + GIB) >= default_ram(free)
    assert default_memory(free) >= 64 * MIB


@relaxed
@given(st.integers(0, 1 << 38), st.integers(0, 1 << 38))
def test_the_default_of_vram_leaves_room_for_cuda(free: int, used: int) -> None:
    budget, total = default_vram(free, free + used), free + used
    assert 0 <= budget <= free
    if budget:
        assert free - budget >= 600 * MIB
        assert free - budget >= total // 20
        assert free - budget <= max(600 * MIB, total // 20)


def test_defaults_at_known_sizes() -> None:
    assert default_memory(10 * GIB) == 7 * GIB - 600 * MIB
    assert default_ram(4 * GIB) == int(2.8 * GIB) - 600 * MIB
    assert default_ram(100 * GIB) == 60 * GIB
    assert default_vram(8 * GIB, 8 * GIB) == 8 * GIB - 600 * MIB
    assert default_vram(80 * GIB, 80 * GIB) == 76 * GIB


@pytest.mark.parametrize(("default", "option"), [(default_memory, "--memory"), (default_ram, "--ram")])
def test_without_knowing_what_is_free_a_size_must_be_given(
    default: Callable[[int | None], int], option: str
) -> None:
    with pytest.raises(OptionError, match=f"give {option}, for example {option} 4GiB"):
        default(None)


def test_what_is_free_is_the_least_of_what_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int | None] = {"available_bytes": 9, "cgroup_limit_bytes": None}
    monkeypatch.setattr(tiers, "memory_limits", lambda: limits)
    assert free_memory_bytes() == 9
    limits["cgroup_limit_bytes"] = 7
    assert free_memory_bytes() == 7
    limits.update(available_bytes=None, cgroup_limit_bytes=None)
    assert free_memory_bytes() is None


def test_the_peak_covers_what_was_touched() -> None:
    before = peak_memory_bytes()
    memory = map_bytes(64 * MIB)
    memory.fill_(1)
    assert peak_memory_bytes() >= 64 * MIB
    assert peak_memory_bytes() >= before
