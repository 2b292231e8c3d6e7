"""Which units stay: within the budget, as many as fit, and as plain weights where that shortens a sweep."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspec.planning.cost import Images, Residents, SweepCosts, choose_residents, choose_resting

PAGE = 4096
sizes = st.integers(1, 60).map(lambda pages: pages * PAGE)


@st.composite
def images(draw: st.DrawFn, rebuilt: bool = True) -> Images:
    plain_layer = draw(sizes)
    plain_chunks = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    layers = draw(st.integers(1, 12))
    if not rebuilt:
        return Images((plain_layer,) * layers, plain_chunks, plain_layer, plain_chunks)
    share = st.floats(0.3, 1.1)
    return Images(
        tuple(int(plain_layer * draw(share)) // PAGE * PAGE + PAGE for _ in range(layers)),
        tuple(int(chunk * draw(share)) // PAGE * PAGE + PAGE for chunk in plain_chunks),
        plain_layer,
        plain_chunks,
        rebuilt=True,
    )


costs = st.builds(
    SweepCosts,
    link_bytes_per_s=st.sampled_from([1e6, 1e9, 1e12]),
    plain_s_per_byte=st.sampled_from([0.0, 1e-10, 1e-6]),
    rebuilt_s_per_byte=st.sampled_from([0.0, 1e-10, 1e-6]),
)


def check_spread(found: Residents, units: Images, room: int) -> None:
    """Chunks stay in proportion to layers, but for plain weights, and where chunks alone find room."""
    count, every = len(found.layers) + found.chunks, len(units.layers) + len(units.chunks)
    off = found.chunks * every - count * len(units.chunks)
    if off <= -every:
        assert found.layers == found.plain_layers
    if found.chunks < len(units.chunks):
        assert units.chunks[found.chunks] > room or count + 1 == every


def check(found: Residents, units: Images, spare: int, slots: int) -> None:
    streamed = found.streamed_bytes(units)
    assert found.held_bytes(units) + (slots if streamed else 0) <= spare
    assert set(found.plain_layers) <= set(found.layers) <= set(range(len(units.layers)))
    assert 0 <= found.plain_chunks <= found.chunks <= len(units.chunks)
    check_spread(found, units, spare - slots - found.held_bytes(units))
    kept = {*found.layers}
    expected = sum(size for index, size in enumerate(units.layers) if index not in kept)
    assert streamed == expected + sum(units.chunks[found.chunks :])


@given(units=images(), spare=st.integers(0, 900 * PAGE), own=costs)
def test_what_stays_fits_and_is_never_worse_than_nothing_plain(
    units: Images, spare: int, own: SweepCosts
) -> None:
    slots = 2 * max(*units.layers, *units.chunks)
    found = choose_residents(units, spare, slots, own)
    everything = sum(units.layers) + sum(units.chunks)
    if found is None:
        assert spare < min(slots, everything)
        return
    check(found, units, spare, slots)
    link_alone = choose_residents(units, spare, slots, SweepCosts())
    assert link_alone is not None
    check(link_alone, units, spare, slots)
    assert found.sweep_s(units, own) <= link_alone.sweep_s(units, own)
    assert (link_alone.streamed_bytes(units) == 0) == (spare >= everything)


@given(units=images(rebuilt=False), spare=st.integers(0, 900 * PAGE))
def test_plain_images_stay_plain(units: Images, spare: int) -> None:
    slots = 2 * max(*units.layers, *units.chunks)
    found = choose_residents(units, spare, slots, SweepCosts())
    if found is not None:
        check(found, units, spare, slots)
        assert (found.plain_layers, found.plain_chunks) == (found.layers, found.chunks)


UNITS = Images((50,) * 8, (50, 50), 100, (100, 100), rebuilt=True)


@pytest.mark.parametrize(
    ("spare", "own", "resident", "plain"),
    [
        (2000, SweepCosts(), 10, 10),  # everything fits as plain weights
        (600, SweepCosts(), 10, 2),  # everything stays; what is left makes some of it plain
        (400, SweepCosts(1.0, 0.0, 0.0), 6, 0),  # the link counts: two slots, the rest residents
        (400, SweepCosts(1e9, 1.0, 10.0), 3, 3),  # rebuilding counts: plain weights, though fewer
        (100, SweepCosts(), 0, 0),
    ],
)
def test_what_counts_decides(spare: int, own: SweepCosts, resident: int, plain: int) -> None:
    found = choose_residents(UNITS, spare, 100, own)
    assert found is not None
    assert len(found.layers) + found.chunks == resident
    assert len(found.plain_layers) + found.plain_chunks == plain


@pytest.mark.parametrize(
    ("count", "layers", "chunks"),
    [(1, (0,), 0), (4, (0, 2, 4, 6), 0), (5, (0, 2, 4, 6), 1), (7, (0, 1, 2, 4, 5, 6), 1)],
)
def test_residents_are_spread_over_the_sweep(count: int, layers: tuple[int, ...], chunks: int) -> None:
    found = choose_residents(UNITS, 100 + 50 * count, 100, SweepCosts(1.0, 0.0, 0.0))
    assert found is not None
    assert (found.layers, found.chunks) == (layers, chunks)


@given(layers=st.integers(1, 80), chunks=st.integers(1, 12), resident=st.integers(1, 91))
def test_streamed_units_follow_one_another_as_seldom_as_can_be(
    layers: int, chunks: int, resident: int
) -> None:
    units = Images((1,) * layers, (1,) * chunks, 1, (1,) * chunks)
    found = choose_residents(units, 2 + resident, 2, SweepCosts())
    assert found is not None
    kept, streamed = len(found.layers), layers + chunks - len(found.layers) - found.chunks
    runs = "".join("r" if index in found.layers else "s" for index in range(layers)).split("r")
    assert max(map(len, runs)) <= (math.ceil(layers / kept) - 1 if kept else layers)
    assert chunks - found.chunks <= math.ceil(streamed * chunks / (layers + chunks))


def test_a_budget_below_the_slots_holds_nothing() -> None:
    assert choose_residents(UNITS, 99, 100, SweepCosts()) is None


@given(
    units=images(), spare=st.integers(0, 300 * PAGE), rooms=st.lists(st.integers(0, 900 * PAGE), min_size=1)
)
def test_what_rests_in_ram_fits_is_streamed_and_grows(units: Images, spare: int, rooms: list[int]) -> None:
    residents = choose_residents(units, spare, 0, SweepCosts())
    assert residents is not None
    resting_bytes = []
    for room in sorted(rooms):
        resting = choose_resting(units, residents, room)
        assert resting.held_bytes(units) <= room
        assert not set(resting.layers) & set(residents.layers)
        assert all(residents.chunks <= chunk < len(units.chunks) for chunk in resting.chunks)
        resting_bytes.append(resting.held_bytes(units))
    assert resting_bytes == sorted(resting_bytes)
    streamed = residents.streamed_bytes(units)
    assert choose_resting(units, residents, streamed).held_bytes(units) == streamed


def test_units_that_rest_are_spread_over_the_sweep() -> None:
    resting = choose_resting(UNITS, Residents((1, 3), 0, (), 0), 200)
    assert (resting.layers, resting.chunks) == ((0, 4, 6), (0,))


def test_more_units_that_are_fewer_bytes_do_not_rest() -> None:
    units = Images((10, 10, 90, 10, 10), (), 90, ())
    resting = choose_resting(units, Residents((), 0, (), 0), 100)
    assert resting.layers == (0, 2)  # and not the three of 10 that are more evenly spread


@pytest.mark.parametrize(
    ("own", "seconds"),
    [
        (
            SweepCosts(link_bytes_per_s=10, disk_bytes_per_s=10),
            10.0,
        ),  # the copies of all, and the disk's share
        (SweepCosts(link_bytes_per_s=10, disk_bytes_per_s=2), 20.0),
        (SweepCosts(link_bytes_per_s=10, disk_bytes_per_s=2, plain_s_per_byte=1.0), 30.0),
    ],
)
def test_a_sweep_takes_as_long_as_the_slowest_of_link_disk_and_computing(
    own: SweepCosts, seconds: float
) -> None:
    assert own.sweep_s(100, plain_bytes=30, rebuilt_bytes=0, disk_bytes=40) == pytest.approx(seconds)


def test_ram_hides_the_disk() -> None:
    own = SweepCosts(link_bytes_per_s=1e9, disk_bytes_per_s=1.0, rebuilt_s_per_byte=0.0)
    nothing = Residents((), 0, (), 0)
    assert [nothing.sweep_s(UNITS, own, room) for room in (0, 400)] == [500.0, 100.0]
    assert nothing.sweep_s(UNITS, own, 500) == nothing.sweep_s(UNITS, own) < 1e-3
