"""Scores become probabilities: a known temperature and miss rate are found again, and promises are kept."""

import math
import random

import pytest
import torch

from subspec.speculation.calibration import (
    CANDIDATES,
    MOST_CERTAINTY,
    PRIOR_CERTAINTY,
    Calibration,
    calibrations,
)


def observe(calibration: Calibration, temperature: float, miss: float, count: int, seed: int = 0) -> None:
    """Rows of random scores; the target takes a candidate by the true temperature, or none at all."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in range(count):
        scores = (3 * torch.randn(CANDIDATES, generator=generator)).sort(descending=True).values
        logs = calibration.log_probabilities(scores[None])[0].tolist()
        truth = torch.softmax(scores / temperature, dim=-1)
        drawn = int(torch.multinomial(truth, 1, generator=generator))
        calibration.observe(scores, logs, None if chance.random() < miss else drawn)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("miss", [0.0, 0.05, 0.3])
def test_the_temperature_and_the_misses_are_found(temperature: float, miss: float) -> None:
    calibration = Calibration()
    observe(calibration, temperature, miss, 1500)
    assert calibration.temperature == pytest.approx(temperature, rel=0.15)
    assert calibration.miss == pytest.approx(miss, abs=0.04)
    assert calibration.observations == 1500


def test_promises_are_kept_once_it_has_learnt() -> None:
    learnt = Calibration()
    observe(learnt, 2.0, 0.1, 1500)
    fresh = Calibration(learnt.temperature, learnt.miss)
    observe(fresh, 2.0, 0.1, 1500, seed=1)
    wrong = Calibration(0.4, 0.0)
    wrong._refit = lambda: None  # type: ignore[method-assign]
    observe(wrong, 2.0, 0.1, 1500, seed=1)
    assert fresh.reliability.error is not None
    assert wrong.reliability.error is not None
    assert fresh.reliability.error < 0.02 < wrong.reliability.error
    assert sum(fresh.reliability.count) <= 1500 * CANDIDATES
    assert sum(fresh.reliability.kept) <= 1500


def test_nothing_observed_has_no_error() -> None:
    assert Calibration().reliability.error is None


def test_probabilities_sum_to_what_is_not_missed() -> None:
    calibration = Calibration(0.5, 0.1)
    logs = calibration.log_probabilities(torch.tensor([[3.0, 1.0, -math.inf], [0.0, 0.0, 0.0]]))
    assert logs.exp().sum(-1).tolist() == pytest.approx([0.9, 0.9])
    assert logs[0, 2] == -math.inf


def test_a_few_observations_change_little() -> None:
    calibration = Calibration(0.7, 0.02)
    observe(calibration, 5.0, 0.0, 8)
    assert 0.6 < calibration.temperature < 3.0


def test_what_many_texts_have_taught_outlasts_a_few_sharper_ones() -> None:
    """Processes that each see a little, of one kind at a time, do not drift from one extreme to the next."""
    first = Calibration()
    observe(first, 1.0, 0.0, 600)
    later = [first]
    for seed in range(1, 6):
        later.append(calibrations({"greedy": later[-1].learnt()})[False])
        observe(later[-1], 1.0 if seed % 2 else 0.3, 0.0, 40, seed)
    assert all(0.6 < one.temperature < 1.3 for one in later)
    assert first.learnt()["certainty"] > Calibration().certainty


def test_a_draft_that_never_missed_is_not_held_to_be_unfailing() -> None:
    learnt = Calibration().learnt()
    for seed in range(30):
        one = calibrations({"greedy": learnt})[False]
        observe(one, 0.5, 0.0, 100, seed)
        learnt = one.learnt()
    assert 1e-4 < learnt["miss"] < 2e-3


def test_rows_without_or_with_few_candidates_do_no_harm() -> None:
    calibration = Calibration()
    for _ in range(40):
        calibration.observe(torch.tensor([2.0, -math.inf, -math.inf]), [-0.02], 0)
        calibration.observe(torch.full((3,), -math.inf), [], None)
    assert math.isfinite(calibration.temperature)
    assert 0 < calibration.miss < 1


def test_certainty_does_not_run_away() -> None:
    calibration = Calibration()
    for _ in range(2000):
        calibration.observe(torch.tensor([30.0, 1.0]), [0.0, -29.0], 0)
    assert 0.05 <= calibration.temperature <= 20
    assert calibration.certainty == pytest.approx(PRIOR_CERTAINTY), "rows that any temperature explains"
    informed = Calibration()
    observe(informed, 0.5, 0.0, 2000)
    assert PRIOR_CERTAINTY < informed.certainty <= MOST_CERTAINTY, "another process meets other texts"


def test_learnt_values_start_the_next_process() -> None:
    first = calibrations({})
    observe(first[True], 1.8, 0.1, 600)
    learnt = {"drawn": first[True].learnt(), "greedy": {"temperature": math.nan, "miss": 7.0}}
    second = calibrations(learnt)
    assert second[True].learnt() == first[True].learnt()
    assert second[False].learnt() == Calibration().learnt()
    assert calibrations({"drawn": {"temperature": -1.0}})[True].learnt() == Calibration().learnt()
