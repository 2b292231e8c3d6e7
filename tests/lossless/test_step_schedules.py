"""Whole steps, drafted, verified and committed, in orders that no machine would show."""

from collections import Counter

import pytest
from step_runs import Run, drawn

from subspec.memory.backend.checked import CheckedBackend
from subspec.memory.backend.simulated import SimulatedBackend
from subspec.memory.hazards import HazardChecker

SCHEDULES, BATCH = 10_000, 1_000


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_every_order_commits_the_truth_without_an_alarm(first: int, one_thread: None) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        checker = HazardChecker()
        counts += Run(drawn(seed), CheckedBackend(SimulatedBackend(seed), checker), seed).run()
        assert not checker.hazards
    print(counts)
