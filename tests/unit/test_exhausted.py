"""A device that runs out of memory: the error says what held it and what to lower, and the model goes on."""

from pathlib import Path

import pytest
import torch
from budgets import least_budget
from tiny import write_tiny

from subspec import LLM, DeviceMemoryError, PinningError, SamplingParams
from subspec.engine.places import Places
from subspec.generation import building
from subspec.memory import arena
from subspec.memory.arena import Arena
from subspec.memory.exhausted import explanation
from subspec.memory.tiers import GIB, MIB, MemoryBudget
from subspec.store.prepare import prepare

PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def test_the_numbers_and_the_remedy() -> None:
    budget = MemoryBudget(7 * GIB, "--vram")
    budget.take("kv_cache", GIB)
    budget.take("substitutes", 4 * GIB)
    text = explanation(budget, 100 * MIB, 8 * GIB)
    assert "the engine holds 5.00GiB (kv cache 1.00GiB, substitutes 4.00GiB)" in text
    assert "of its 8.00GiB, 2.90GiB are with CUDA" in text
    assert "100.00MiB are free" in text
    assert "lower --vram from 7.00GiB to 6.50GiB, or lower --context" in text
    assert "free" not in explanation(budget, None, None)


def test_memory_that_the_device_refuses_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(n_bytes: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(arena, "place_bytes", refuse)
    with pytest.raises(DeviceMemoryError, match=r"slots 1.00MiB.*lower --vram from 4.00GiB to 3.50GiB"):
        Arena(MemoryBudget(4 * GIB, "--vram")).bytes("slots", MIB)


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_a_text_broken_off_by_it_leaves_the_model_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = prepare(write_tiny(tmp_path / "model", "qwen2", torch.bfloat16), store=tmp_path / "store")
    with LLM(store, least_budget(store, context=64)[0], context=64) as llm:
        expected = llm.generate(PROMPT, PARAMS, mode="plain").token_ids
        llm.reset()
        launch, calls = llm.engine.schedule._launch, 0

        def sometimes(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == after + 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            launch(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(llm.engine.schedule, "_launch", sometimes)
        with pytest.raises(DeviceMemoryError, match="lower --memory"):
            llm.generate(PROMPT, PARAMS)
        assert llm.generate(PROMPT, PARAMS).token_ids == expected


def test_a_model_that_cannot_be_built_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(write_tiny(tmp_path / "model", "qwen2", torch.bfloat16), store=tmp_path / "store")
    before = open_files()

    def refuse(*_: object) -> None:
        raise PinningError("pinning failed: lower --ram")

    with monkeypatch.context() as patch:
        patch.setattr(Places, "pin", refuse)
        with pytest.raises(PinningError, match="lower --ram"):
            LLM(store, vram="64MiB", ram="64MiB", device="emulated", context=64)
        assert open_files() == before

    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(building, "Ahead", exhaust)
        with pytest.raises(DeviceMemoryError, match="lower --vram"):
            LLM(store, vram="64MiB", ram="64MiB", device="emulated", context=64)
        assert open_files() == before
    with LLM(store, vram="64MiB", ram="64MiB", device="emulated", context=64) as llm:
        assert llm.generate(PROMPT, PARAMS).token_ids


def open_files() -> set[str]:
    """Files of a store that the process has open."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return {str(link) for link in links if "store" in str(link)}
