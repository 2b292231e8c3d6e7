"""Gaps in a sweep: the draft runs only while the next unit is not there, and holds no slot meanwhile.

The order of events is recorded from the engine's own sweep, over a streamer that is ready when chance says.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from budgets import least_budget
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.memory.streamer import Streamer
from subspec.models.decoder import finished, prefix_rows
from subspec.speculation.adaptive import Speculator
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = list(range(10, 40))
PARAMS = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gaps")
    model = write_tiny(directory / "model", "qwen2", torch.bfloat16, num_hidden_layers=4, vocab_size=800)
    return prepare(model, store=directory / "store")


@pytest.fixture
def llm(store: Path) -> Iterator[LLM]:
    with LLM(store, least_budget(store, context=128)[0], context=128) as opened:
        assert opened.plan.streamed_bytes > 0
        assert isinstance(opened.tree, Speculator)
        yield opened


class Recorded:
    """A streamer in front of the real one; says that it is ready when chance wants it to.

    Attributes:
        events: ``gap``, ``ready``, ``late`` (asked and not ready), ``acquire``, ``release``, in order.
    """

    def __init__(self, streamer: Streamer, seed: int) -> None:
        self._streamer, self._chance = streamer, random.Random(seed)
        self.events: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._streamer, name)

    def ready(self) -> bool:
        there = self._chance.random() < 0.4
        self.events.append("ready" if there else "late")
        return there

    def acquire(self) -> torch.Tensor:
        self.events.append("acquire")
        return self._streamer.acquire()

    def release(self) -> None:
        self.events.append("release")
        self._streamer.release()


@pytest.mark.parametrize("seed", range(5))
def test_a_draft_runs_only_after_a_unit_was_found_late(llm: LLM, seed: int) -> None:
    engine = llm.engine
    assert engine.schedule.streamer is not None
    recorded = Recorded(engine.schedule.streamer, seed)
    engine.schedule.streamer = recorded  # type: ignore[assignment]

    def gap() -> bool:
        recorded.events.append("gap")
        return True

    engine.target(prefix_rows(PROMPT, 0), last_only=True, gap=gap)
    events = recorded.events
    units = len(recorded._streamer.units)
    assert events.count("acquire") == events.count("release") == units
    assert "gap" in events
    held = False
    for before, event in zip(events, events[1:], strict=False):
        if event == "gap":
            assert before == "late", "the link had brought the unit, and waits for a draft"
            assert not held, "a slot is held while a draft runs"
        held = (held or event == "acquire") and event != "release"


def test_a_sweep_whose_gap_has_nothing_to_do_waits_for_the_link(llm: LLM) -> None:
    engine = llm.engine
    assert engine.schedule.streamer is not None
    recorded = Recorded(engine.schedule.streamer, 0)
    engine.schedule.streamer = recorded  # type: ignore[assignment]
    asked: list[int] = []

    def idle() -> bool:
        asked.append(1)
        return False

    engine.target(prefix_rows(PROMPT, 0), last_only=True, gap=idle)
    assert 0 < len(asked) <= len(recorded._streamer.units), "an idle gap is not asked again for the same unit"


def test_a_gap_that_fails_leaves_no_gap_and_no_hidden_states_behind(llm: LLM) -> None:
    engine = llm.engine
    assert engine.schedule.streamer is not None
    real = engine.schedule.streamer
    engine.schedule.streamer = Recorded(real, 0)  # type: ignore[assignment]

    def gap() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.target(prefix_rows(PROMPT, 0), last_only=True, gap=gap)
    assert not engine.schedule.in_gap
    assert engine._sweeper.hidden.numel() == 0
    engine.schedule.streamer = real
    engine.target(prefix_rows(PROMPT, 0), last_only=True)


def test_the_later_a_preview_the_closer_it_is_and_nothing_exact_is_touched(llm: LLM) -> None:
    engine = llm.engine
    assert engine.schedule.streamer is not None
    rows = prefix_rows(PROMPT, 0)
    elsewhere = replace(rows, slots=rows.slots + 64, paths=rows.slots.expand(len(rows), -1) + 64)
    elsewhere = replace(elsewhere, prefix=torch.zeros_like(rows.prefix), path_lens=rows.prefix)
    exact = engine.target(rows, last_only=False)
    kept = engine.cache.keys[:, :, : len(PROMPT)].clone()
    engine.schedule.streamer = Recorded(engine.schedule.streamer, 0)  # type: ignore[assignment]
    errors: dict[float, float] = {}

    def gap() -> bool:
        logits = finished(engine.preview_steps(list(range(len(PROMPT))), elsewhere))
        errors[engine.swept] = float((logits.float() - exact.float()).abs().mean())
        return False

    assert torch.equal(engine.target(rows, last_only=False, gap=gap), exact)
    assert torch.equal(engine.cache.keys[:, :, : len(PROMPT)], kept)
    early, late = min(errors), max(errors)
    assert late == 1.0, "no gap before the head"
    assert early < 0.5
    assert errors[late] < 0.7 * errors[early]


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_texts_with_gaps_of_any_length_are_plain_ones(llm: LLM, temperature: float | None) -> None:
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=temperature, seed=3)
    plain = llm.generate(PROMPT, params, mode="plain").token_ids
    engine = llm.engine
    real = engine.schedule.streamer
    assert real is not None
    filled = 0.0
    for seed in range(4):
        engine.schedule.streamer = Recorded(real, seed)  # type: ignore[assignment]
        llm.reset()
        found = llm.generate(PROMPT, params)
        assert found.token_ids == plain
        filled += found.statistics.gap_s
    assert filled > 0


def test_what_was_learnt_outlives_the_process_and_is_no_part_of_the_store(llm: LLM, store: Path) -> None:
    llm.generate(PROMPT, PARAMS)
    assert isinstance(llm.tree, Speculator)
    learnt = llm.tree.learnt()
    llm.close()
    with LLM(store, "64MiB", context=128) as again:
        assert isinstance(again.tree, Speculator)
        assert again.tree.learnt() == learnt
    (store / "calibration.json").write_text("not json")
    with LLM(store, "64MiB", context=128) as damaged:
        assert damaged.generate(PROMPT, SamplingParams(max_new_tokens=3, ignore_eos=True)).token_ids
    with LLM(store, "64MiB", context=128, depth=3) as pinned:
        assert not isinstance(pinned.tree, Speculator)
        assert pinned.speculation() == {}
