"""What pays, against brute force on a known cost model; and the costs, learnt from noisy times."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.speculation.policy import PREVIEW_SHARE, Policy
from subspec.speculation.preview import POINTS, PREVIEW_ROWS, Previews, preview_calibrations
from subspec.speculation.times import DraftTimes, StepTimes, SweepTimes

relaxed = settings(deadline=None, max_examples=150)
seconds = st.floats(0.001, 3.0)


def times(draft_s: float, base_s: float, row_s: float, link_s: float, ahead_s: float = 0.0) -> StepTimes:
    """Known costs: a draft pass of any width, a sweep, the link."""
    known = StepTimes(link_s=link_s, ahead_s=ahead_s)
    for rows in (1, 2, 4, 8):
        known.draft.observe(rows, draft_s)
    known.sweep.base_s, known.sweep.row_s = base_s, row_s
    return known


def policy(known: StepTimes, rate: float = 0.0, gap_value: float = 0.0) -> Policy:
    """A policy at a given rate, whose gaps are worth a given share."""
    made = Policy(known, width=4, nodes=40, depth=30)
    made.gap_value = gap_value
    if rate:
        made.stepped(1, 1 / rate, drafted=True)
        assert made.rate == pytest.approx(rate)
    return made


def best_chain_rate(known: StepTimes, agreement: float) -> float:
    """The highest rate that a chain of some length brings, over endless text."""

    def rate_of(depth: int) -> float:
        tokens = sum(agreement**level for level in range(depth + 1))
        return tokens / known.step_s(depth * known.draft(1), depth + 1)

    return max(map(rate_of, range(31)))


def text_s(chooser: Policy, length: int, ends: bool) -> list[float]:
    """Expected seconds of texts of 0 to ``length`` tokens; ``ends``: whether the policy knows their end."""
    times, seconds = chooser.times, [0.0]
    for remaining in range(1, length + 1):
        full, scores, worth = remaining - 1, [1.0], [1.0]
        while (depth := len(scores) - 1) < min(full, chooser.depth):
            levels = full - depth if ends and full <= chooser.depth else None
            chance = scores[-1] + chooser.nearing_end(scores[-1], levels)
            if not chooser.widen([chance], worth, depth * times.draft(1)):
                break
            scores.append(scores[-1] * chooser.agreement)
            worth.append(scores[-1] * (1 + (chooser.ending if ends and depth + 1 == full else 0)))
        drafting_s = depth * times.draft(1)
        verified = chooser.verify(worth, drafting_s)
        step_s = times.step_s(drafting_s, verified)
        reached = [*scores[:verified], 0.0]
        stops = [above - below for above, below in itertools.pairwise(reached)]
        seconds.append(step_s + sum(p * seconds[full - k] for k, p in enumerate(stops)))
    return seconds


falling = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12).map(
    lambda found: [1.0, *sorted(found, reverse=True)]
)


@relaxed
@given(falling, seconds, st.floats(0.0, 0.2), st.floats(0.0, 4.0), st.floats(0.1, 30.0))
def test_the_verified_nodes_bring_most_by_brute_force(
    scores: list[float], base_s: float, row_s: float, link_s: float, rate: float
) -> None:
    known = times(0.03, base_s, row_s, link_s)
    chosen = policy(known, rate).verify(scores, 0.0)

    def value(count: int) -> float:
        return sum(scores[:count]) - rate * known.step_s(0.0, count)

    best = max(value(count) for count in range(1, len(scores) + 1))
    assert value(chosen) == pytest.approx(best, abs=1e-9)


@relaxed
@given(st.floats(0.3, 0.99), st.floats(0.002, 0.2), seconds, st.floats(0.0, 0.05), st.floats(0.0, 4.0))
def test_a_chain_ends_where_the_best_fixed_depth_does(
    agreement: float, draft_s: float, base_s: float, row_s: float, link_s: float
) -> None:
    """At its own best rate the policy draws the chain that has that rate, to within a level."""
    known = times(draft_s, base_s, row_s, link_s)

    best_rate = best_chain_rate(known, agreement)
    chooser = policy(known, best_rate)
    chooser.agreement = agreement
    scores = [1.0]
    for depth in range(30):
        if not chooser.widen([scores[-1]], scores, depth * draft_s):
            break
        scores.append(scores[-1] * agreement)
    verified = chooser.verify(scores, (len(scores) - 1) * draft_s)
    tokens = sum(scores[:verified])
    found = tokens / known.step_s((len(scores) - 1) * draft_s, verified)
    assert found >= 0.93 * best_rate


def test_nothing_is_drafted_where_nothing_pays() -> None:
    """A sweep as cheap as a draft pass: plain decoding, and a trial now and then."""
    known = times(draft_s=0.01, base_s=0.009, row_s=0.004, link_s=0.0)
    chooser = policy(known, 1 / 0.013)
    chooser.agreement = 0.6
    tried = []
    for step in range(400):
        drafts = chooser.widen([1.0], [1.0], 0.0)
        tried += [step] if drafts else []
        chooser.stepped(1, 0.013, drafted=bool(drafts))
    assert 3 <= len(tried) <= 12
    assert tried[0] >= 8


@pytest.mark.parametrize("link_s", [0.0, 2.7])
@pytest.mark.parametrize("agreement", [0.85, 0.9, 0.95, 0.97])
def test_texts_end_sooner_if_the_policy_knows_their_end(agreement: float, link_s: float) -> None:
    """Over all lengths; by how much, computing the best decisions backwards says: one to two per cent.

    Behind a slow link drafting is nearly free, trees are deep anyway, and it only must do no harm.
    """
    known = times(0.06, 0.76, 0.022, link_s)
    chooser = policy(known, best_chain_rate(known, agreement))
    chooser.agreement = agreement
    blind, seeing = text_s(chooser, 64, ends=False), text_s(chooser, 64, ends=True)
    gains = [slow / fast for slow, fast in zip(blind[8:], seeing[8:], strict=True)]
    assert min(gains) > 0.97
    assert sum(gains) / len(gains) >= (1.0 if link_s else 1.004)


def test_drafting_costs_nothing_while_it_hides_behind_the_prefetching() -> None:
    hidden = times(0.05, 0.1, 0.0, link_s=2.0, ahead_s=0.5)
    exposed = times(0.05, 0.1, 0.0, link_s=2.0, ahead_s=0.0)
    unlikely = [0.01]
    assert policy(hidden, 5.0).widen(unlikely, [1.0, 0.01], 0.0) == 1
    assert policy(exposed, 5.0).widen(unlikely, [1.0, 0.01], 0.0) == 0


def test_rows_are_free_behind_the_link_unless_gaps_are_worth_something() -> None:
    known = times(0.05, 0.1, 0.02, link_s=2.0)
    scores = [1.0, *[0.05] * 30]
    assert policy(known, 5.0).verify(scores, 0.0) == 31
    assert policy(known, 5.0, gap_value=1.0).verify(scores, 0.0) == 1


def test_where_the_sweep_is_full_a_node_must_be_likelier_than_another() -> None:
    """Growing on brings nothing but what it displaces, however little rows and passes cost."""
    known = times(0.001, 0.1, 0.0, 2.0)
    decided = policy(known, rate=5.0)
    full = [1.0] * decided.nodes
    assert decided.widen([0.5], full[:-1], 0.0) == 1
    assert decided.widen([0.5], full, 0.0) == 0
    assert decided.widen([0.5], [*full[:-1], 0.1], 0.0) == 1


def test_the_draft_reads_a_prompt_where_the_link_leaves_time_for_it() -> None:
    known = times(0.05, 0.2, 0.001, 2.7)
    decided = policy(known)
    assert decided.read_prompt(1)
    assert decided.read_prompt(60), "few rows cost nothing more than one, as far as is known"
    known.observe_prompt(50, 1.05)  # 20 ms a row
    assert known.prompt_s(60) == pytest.approx(0.05 + 60 * 0.02)
    assert known.prompt_s(4) == 0.05, "so few rows were timed themselves"
    assert decided.read_prompt(20)
    assert not decided.read_prompt(60)
    known.link_s = 0.0
    assert not decided.read_prompt(1), "nothing streams"
    assert not policy(StepTimes(link_s=3.0)).read_prompt(1), "what it costs is not known"


def test_a_gap_takes_the_width_that_brings_most_a_second() -> None:
    known = StepTimes()
    for rows, cost in ((1, 0.030), (2, 0.033), (4, 0.060)):
        known.draft.observe(rows, cost)
    chooser = policy(known)
    assert chooser.widen_in_gap([0.9, 0.9, 0.9, 0.9]) == 4
    assert chooser.widen_in_gap([0.9, 0.2, 0.1, 0.1]) == 2
    assert chooser.widen_in_gap([0.9, 0.01, 0.0, 0.0]) == 1
    assert chooser.widen_in_gap([]) == 0


def test_a_preview_takes_a_small_part_of_the_gaps_and_nothing_where_there_are_none() -> None:
    for link_s in (0.0, 1.0, 4.0, 40.0):
        made = policy(times(0.01, 0.5, 0.001, link_s))
        made.times.observe_preview(32, 0.5, 0.2)
        row_s = 0.2 / 32 / (0.5 + 0.15)  # through all layers; the head is 0.15 of them
        gap_s = made.times.gap_s(0.0, 20)
        for swept in (0.2, 0.6, 1.0):
            rows = made.preview(0.0, 20, swept)
            assert 0 <= rows <= PREVIEW_ROWS
            assert rows * row_s * (1 - swept + 0.15) <= PREVIEW_SHARE * gap_s
            assert rows or gap_s < 0.2
        assert made.preview(0.0, 20, 1.0) >= made.preview(0.0, 20, 0.2), "the fewer layers, the more rows"
    assert made.preview(0.0, 20, 0.2) == PREVIEW_ROWS


def test_each_point_is_previewed_once_and_one_that_is_late_is_left_out() -> None:
    marks = preview_calibrations()
    first, second, last = POINTS
    previews = Previews([0, 2], 5, 0.0, marks)
    assert previews.due(first / 2) is None
    assert previews.due(first) is marks[0]
    assert previews.due(second - 1e-9) is None
    assert previews.due(last) is marks[2]
    assert previews.due(last) is None
    assert previews.numbers([2, 0]) == [6, 5]


def test_rates_forget() -> None:
    chooser = policy(times(0.03, 0.5, 0.01, 1.0))
    hoped = chooser.rate
    assert 0 < hoped < 30
    for _ in range(40):
        chooser.stepped(10, 1.0, drafted=True)
    assert chooser.rate == pytest.approx(10, rel=0.01)
    for _ in range(40):
        chooser.stepped(2, 1.0, drafted=True)
    assert chooser.rate == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("base_s", "row_s"), [(0.9, 0.02), (0.1, 0.02), (0.5, 0.0), (0.0, 0.03)])
def test_a_sweeps_cost_is_learnt_from_noisy_sweeps(base_s: float, row_s: float) -> None:
    chance, learnt = random.Random(1), SweepTimes()
    learnt.start(300, base_s + 300 * row_s)
    for _ in range(60):
        rows = chance.randint(1, 40)
        learnt.observe(rows, (base_s + rows * row_s) * chance.uniform(0.97, 1.05))
    for rows in (4, 20, 40):
        assert learnt(rows) == pytest.approx(base_s + rows * row_s, rel=0.12, abs=0.01)


def test_sweeps_of_one_size_leave_the_slope_alone() -> None:
    learnt = SweepTimes()
    learnt.start(300, 3.4)
    before = learnt.row_s
    for _ in range(50):
        learnt.observe(10, 1.0)
    assert learnt(10) == pytest.approx(1.0, rel=0.1)
    assert learnt.row_s == pytest.approx(before, rel=0.7)


def test_draft_times_lie_between_what_was_seen() -> None:
    learnt = DraftTimes()
    assert learnt(3) == 0.0
    learnt.observe(2, 0.04)
    learnt.observe(4, 0.08)
    assert learnt(1) == 0.04
    assert learnt(3) == pytest.approx(0.06)
    assert learnt(8) == pytest.approx(0.16)
    for _ in range(40):
        learnt.observe(4, 0.05)
    assert learnt(4) == pytest.approx(0.05, rel=0.02)
    learnt.observe(4, 50.0)
    assert learnt(4) < 0.07, "one pass that the machine delayed must not decide"


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(1e-4, 1.0)), min_size=1, max_size=20))
def test_draft_times_are_always_positive(passes: list[tuple[int, float]]) -> None:
    learnt = DraftTimes()
    for rows, cost in passes:
        learnt.observe(rows, cost)
    assert all(learnt(rows) > 0 for rows in range(1, 30))


def test_a_step_is_the_longer_of_link_and_products() -> None:
    known = times(0.05, 0.2, 0.01, link_s=1.0, ahead_s=0.1)
    assert known.step_s(0.0, 10) == pytest.approx(1.0)
    assert known.step_s(0.05, 10) == pytest.approx(1.0)
    assert known.step_s(0.3, 10) == pytest.approx(0.3 + 0.9)
    assert known.step_s(0.0, 200) == pytest.approx(2.2)
    for drafting_s, rows in itertools.product((0.0, 0.05, 0.5), (1, 50, 200)):
        assert known.step_s(drafting_s, rows) >= known.sweep(rows) + drafting_s
