"""Plans for VRAM, RAM and disk: within both budgets, each unit in one place, and monotone."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import BIG, HUGE, SMALL_BYTES, models

from subspec.errors import BudgetError
from subspec.memory.tiers import MIB, page_aligned
from subspec.models.config import ModelConfig
from subspec.models.kv_cache import cache_bytes
from subspec.planning import plan as planner
from subspec.planning.cost import Images, SweepCosts
from subspec.planning.parts import STAGING_BYTES, largest_matrix, slot_count
from subspec.planning.plan import Plan, Request, make_plan, plain_images
from subspec.store.layout import layer_matrices

SMALL_STAGING = 2 << 12  # the models here are small: with the real buffers none would need the disk
TREE = {"depth": 4, "width": 2, "nodes": 5}  # a tree chosen by itself may grow with the budget
relaxed = settings(deadline=None, max_examples=60)
percent = st.integers(0, 110)


@pytest.fixture(autouse=True, scope="module")
def small_staging() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "STAGING_BYTES", SMALL_STAGING)
        yield


@st.composite
def stores(draw: st.DrawFn) -> tuple[ModelConfig, Images]:
    """A model, and its units: plain weights, or residuals of various sizes."""
    model = draw(models())
    plain = plain_images(model, 2)
    if draw(st.booleans()):
        return model, plain
    shares = st.floats(0.3, 1.1)
    layers, chunks = (
        tuple(page_aligned(int(size * draw(shares))) for size in sizes)
        for sizes in (plain.layers, plain.chunks)
    )
    return model, replace(plain, layers=layers, chunks=chunks, rebuilt=True)


def plan(
    store: tuple[ModelConfig, Images],
    vram: int = HUGE,
    ram: int = HUGE,
    costs: SweepCosts | None = None,
    **wishes: Any,
) -> Plan:
    model, images = store
    request = Request(vram, **{**TREE, **wishes}, host_bytes=ram)
    return make_plan(model, 2, SMALL_BYTES, request, images, costs)


def least(option: str, store: tuple[ModelConfig, Images], vram: int = HUGE, ram: int = HUGE) -> int:
    """The bytes that the error of a hopeless budget says would do; it names the option."""
    with pytest.raises(BudgetError, match=f"raise {option} to at least") as caught:
        plan(store, vram, ram)
    (mib,) = re.findall(r"at least (\d+)MiB", str(caught.value))
    return int(mib) * MIB


def some_vram(store: tuple[ModelConfig, Images], percent: int) -> int:
    """A budget on the way from the least one to one for everything."""
    low = least("--vram", store, vram=1)
    return low + max(plan(store).held_bytes - low, 0) * percent // 100


def some_ram(store: tuple[ModelConfig, Images], vram: int, percent: int) -> int:
    """A budget on the way from the least one, to the byte, to one for all that does not stay in ``vram``."""
    parts = plan(store, vram).host_parts
    low = parts["embedding"] + parts["uploads"] + parts["results"] + min(SMALL_STAGING, parts["images"])
    return low + (sum(parts.values()) - low) * percent // 100


@relaxed
@given(stores(), percent, percent)
def test_every_unit_is_in_one_place_and_both_budgets_hold(
    store: tuple[ModelConfig, Images], of_vram: int, of_ram: int
) -> None:
    model, images = store
    vram = some_vram(store, of_vram)
    ram = some_ram(store, vram, of_ram)
    made = plan(store, vram, ram)
    assert made.held_bytes <= vram
    assert made.host_held_bytes <= ram
    assert min(*made.parts.values(), *made.host_parts.values()) >= 0
    assert set(made.host_layers) <= set(range(model.layers)) - set(made.resident_layers)
    assert set(made.host_chunks) <= set(range(made.resident_chunks, len(images.chunks)))
    resting = [images.layers[index] for index in made.host_layers]
    resting += [images.chunks[index] for index in made.host_chunks]
    resident = [images.layers[index] for index in made.resident_layers]
    everything = sum(images.layers) + sum(images.chunks)
    assert made.host_parts["images"] == sum(resting)
    assert made.copied_bytes == everything - sum(resident) - sum(images.chunks[: made.resident_chunks])
    assert made.disk_bytes == made.copied_bytes - sum(resting)
    assert made.host_parts["staging"] == (SMALL_STAGING if made.disk_bytes else 0)
    assert bool(made.slots) == bool(made.copied_bytes)


@relaxed
@given(stores(), percent, st.lists(percent, min_size=2, max_size=12))
def test_more_ram_never_means_more_from_disk(
    store: tuple[ModelConfig, Images], of_vram: int, of_ram: list[int]
) -> None:
    vram = some_vram(store, of_vram)
    plans = [plan(store, vram, some_ram(store, vram, percent)) for percent in sorted(of_ram)]
    read = [made.disk_bytes for made in plans]
    assert read == sorted(read, reverse=True)
    assert len({made.copied_bytes for made in plans}) == 1


@relaxed
@given(stores(), st.lists(percent, min_size=2, max_size=12))
def test_more_vram_never_means_more_copies(store: tuple[ModelConfig, Images], of_vram: list[int]) -> None:
    copied = [plan(store, some_vram(store, percent)).copied_bytes for percent in sorted(of_vram)]
    assert copied == sorted(copied, reverse=True)


@relaxed
@given(stores(), percent)
def test_the_least_ram_is_least_to_the_byte(store: tuple[ModelConfig, Images], of_vram: int) -> None:
    vram = some_vram(store, of_vram)
    low = some_ram(store, vram, 0)
    plan(store, vram, low)
    with pytest.raises(BudgetError, match="raise --ram to at least"):
        plan(store, vram, low - 1)


REAL = BIG, plain_images(BIG, 2)


def test_the_error_of_a_small_vram_names_a_size_that_does() -> None:
    enough = least("--vram", REAL, vram=1)
    plan(REAL, enough)
    assert least("--vram", REAL, vram=enough - MIB) == enough


def test_the_error_of_a_small_ram_names_a_size_that_does() -> None:
    vram = some_vram(REAL, 20)
    enough = least("--ram", REAL, vram, ram=1)
    plan(REAL, vram, enough)
    assert least("--ram", REAL, vram, enough - MIB) == enough


def test_what_rests_in_ram_is_evenly_spread_over_the_sweep() -> None:
    vram = some_vram(REAL, 20)
    made = plan(REAL, vram, some_ram(REAL, vram, 50))
    streamed = sorted(set(range(BIG.layers)) - set(made.resident_layers))
    places = [streamed.index(layer) for layer in made.host_layers]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert len(places) > 3
    assert max(gaps) - min(gaps) <= 1
    assert max(gaps) > 1


def test_without_disk_there_is_no_staging_and_one_byte_less_needs_it() -> None:
    vram = some_vram(REAL, 20)
    whole = some_ram(REAL, vram, 100)
    assert plan(REAL, vram, whole).disk_bytes == plan(REAL, vram, whole).host_parts["staging"] == 0
    less = plan(REAL, vram, whole - 1)
    assert less.disk_bytes >= max(less.slot_bytes // 2, 1)
    assert less.host_parts["staging"] > 0


def test_staging_takes_its_room_before_images_do() -> None:
    vram = some_vram(REAL, 20)
    ram = some_ram(REAL, vram, 100) - REAL[1].chunks[-1]  # what all but the last unit would fill
    made = plan(REAL, vram, ram)
    assert made.host_held_bytes <= ram
    assert made.host_parts["staging"] == SMALL_STAGING


def test_what_all_stays_in_vram_leaves_ram_to_the_embedding() -> None:
    made = plan(REAL)
    assert made.copied_bytes == made.disk_bytes == made.slots == 0
    assert (made.host_layers, made.host_chunks) == ((), ())
    assert made.host_parts["embedding"] == page_aligned(BIG.vocab_size * BIG.hidden_size * 2)
    exchanged = made.host_parts["uploads"] + made.host_parts["results"]
    assert made.host_held_bytes - made.host_parts["embedding"] == exchanged > 0


def test_a_device_keeps_no_embedding_and_has_slots_for_shadows() -> None:
    made = plan(REAL, context=100)
    assert made.parts["embedding_cache"] == made.cache_rows == 0
    assert made.cache_slots == 100 + 1 + 4 * 2 + 2
    assert made.parts["kv_cache"] == page_aligned(cache_bytes(BIG, made.cache_slots, 2))


def test_a_device_that_rebuilds_weights_has_room_for_the_largest() -> None:
    rebuilt = BIG, replace(REAL[1], rebuilt=True, scratch=12345)
    largest = max(*(matrix.n * matrix.k * 2 for matrix in layer_matrices(BIG)), *REAL[1].plain_chunks)
    assert plan(rebuilt).parts["scratch"] == largest == page_aligned(largest_matrix(BIG, 2))
    assert plan(REAL).parts["scratch"] == 0
    assert plan(rebuilt).parts["workspace"] == plan(REAL).parts["workspace"]


def test_a_third_slot_must_be_cheap() -> None:
    held = {"substitutes": 1000}
    assert [slot_count(held, size, device=True) for size in (49, 50)] == [3, 2]
    assert slot_count(held, 1, device=False) == 2


def test_a_slow_disk_keeps_more_units_and_fewer_plain_ones() -> None:
    store = BIG, replace(REAL[1], layers=tuple(size // 2 for size in REAL[1].layers), rebuilt=True)
    slow_products = SweepCosts(1e12, plain_s_per_byte=1e-11, rebuilt_s_per_byte=1e-10)
    vram = some_vram(store, 60)
    ram = some_ram(store, some_vram(store, 0), 20)
    fast_disk = plan(store, vram, ram, slow_products)
    slow_disk = plan(store, vram, ram, replace(slow_products, disk_bytes_per_s=1e9))
    assert len(slow_disk.plain_layers) < len(fast_disk.plain_layers)
    assert slow_disk.disk_bytes < fast_disk.disk_bytes


def test_without_a_second_budget_nothing_is_said_of_a_device() -> None:
    made = make_plan(BIG, 2, SMALL_BYTES, Request(2500 * MIB))
    assert not made.device_tier
    assert made.copied_bytes == 0
    assert made.disk_bytes == made.streamed_bytes > 0
    assert made.host_parts == {}
    assert "VRAM" not in made.explain()


def test_the_plan_explains_all_three_tiers() -> None:
    vram = some_vram(REAL, 20)
    made = plan(REAL, vram, some_ram(REAL, vram, 50))
    text = made.explain()
    for expected in (
        *("VRAM: budget", "RAM: budget", "embedding", "staging", "images", "kv cache"),
        f"in RAM: {len(made.host_layers)} layers, {len(made.host_chunks)} head chunks",
        "read from disk a sweep: ",
    ):
        assert expected in text
    record = json.loads(json.dumps(made.as_dict()))
    assert record["device_tier"] is True
    assert record["copied_bytes"] == made.copied_bytes


def test_staging_is_two_buffers_a_reader() -> None:
    assert STAGING_BYTES == 2 * 2 * 8 * MIB
