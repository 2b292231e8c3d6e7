"""Runs under ``SUBSPEC_HAZARDS``: sound engines raise nothing, an engine with one rule broken raises."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from budgets import least_budget
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.errors import StoreError
from subspec.memory.hazards import SWITCH, HazardError
from subspec.memory.schedule import Step
from subspec.memory.streamer import Streamer
from subspec.models.decoder import prefix_rows
from subspec.models.kv_ledger import InexactError
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 96
PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("order")
    return prepare(
        write_tiny(directory / "model", "qwen2", torch.bfloat16, num_hidden_layers=4),
        store=directory / "store",
    )


def opened(store: Path) -> LLM:
    return LLM(store, least_budget(store, context=CONTEXT)[0], context=CONTEXT)


@pytest.fixture
def checked(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setenv(SWITCH, "1")
    with opened(store) as llm:
        yield llm


def test_nothing_is_checked_unless_asked(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    with opened(store) as llm:
        assert llm.engine.checker is None
        assert llm.engine.ledger is None
        assert llm.describe()["hazard_checks"] is False


def test_a_checked_run_gives_the_same_tokens_and_raises_nothing(
    store: Path, checked: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWITCH)
    with opened(store) as llm:
        expected = llm.generate(PROMPT, PARAMS, mode="plain").token_ids
    assert checked.describe()["hazard_checks"] is True
    for mode in ("speculative", "plain", "speculative"):
        assert checked.generate(PROMPT, PARAMS, mode=mode).token_ids == expected
        assert (
            next(iter(checked.stream(PROMPT + expected, PARAMS, mode=mode))).result is None
        )  # then abandoned
    assert checked.engine.checker is not None
    assert checked.engine.checker._accesses
    checked.engine.checker.check()


def test_a_slot_given_back_before_its_use_is_caught(checked: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Streamer.acquire, Streamer.release

    def acquire(streamer: Streamer) -> torch.Tensor:
        slot = sound[0](streamer)
        sound[1](streamer)
        return slot

    monkeypatch.setattr(Streamer, "acquire", acquire)
    monkeypatch.setattr(Streamer, "release", lambda _: None)
    with pytest.raises((HazardError, StoreError)):
        checked.generate(PROMPT, PARAMS)
    assert checked.engine.checker is not None
    assert checked.engine.checker.hazards
    checked.engine.checker.collect = True  # or closing would raise it again, and what reads under way add


def test_a_draft_over_the_prefix_is_caught(checked: LLM) -> None:
    first = checked.generate(PROMPT, PARAMS).token_ids
    checked.engine.draft(prefix_rows([7], 3))
    with pytest.raises(InexactError, match="attends to slot 3 of layer 0, which a draft wrote last"):
        checked.generate(PROMPT + first, PARAMS)


def test_a_draft_between_layers_of_a_sweep_is_caught_where_it_matters(
    checked: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep has written slot 40 of the first two layers exactly when a draft takes it."""
    engine = checked.engine
    checked.generate(PROMPT, PARAMS)
    launch = engine.schedule._launch

    def launch_after_a_draft(step: Step, slot: torch.Tensor | None) -> None:
        if step.name == engine.weights.layers[2].name:
            engine.draft(prefix_rows([7], 40))
        launch(step, slot)

    monkeypatch.setattr(engine.schedule, "_launch", launch_after_a_draft)
    engine.target(prefix_rows([5], 40), last_only=True)
    with pytest.raises(InexactError, match="keeps slot 40 of layer 0, which a draft wrote last"):
        engine.move([40], 41)
    monkeypatch.undo()
    engine.target(prefix_rows([5], 40), last_only=True)
    engine.move([40], 41)


def test_a_commit_of_what_was_only_drafted_is_caught(checked: LLM) -> None:
    checked.generate(PROMPT, PARAMS)
    checked.engine.draft(prefix_rows([7], 60))
    with pytest.raises(InexactError, match="keeps slot 60 of layer 0, which a draft wrote last"):
        checked.engine.move([60], 50)
