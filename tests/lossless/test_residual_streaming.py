"""Texts are the same whether weights stream raw or as residuals, and stay rebuilt or as plain weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, least_budget, least_device_budgets
from device_subjects import little_staging
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.generation import building
from subspec.planning.cost import SweepCosts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = list(range(5, 45, 3))
GREEDY = SamplingParams(24, ignore_eos=True)
SAMPLED = SamplingParams(24, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
COSTS = {
    "the link alone counts": SweepCosts(),
    "rebuilding is dear": SweepCosts(1e12, 1e-12, 1.0),
    "rebuilding is free": SweepCosts(1e6, 1.0, 0.0),
}


@pytest.fixture(
    scope="module", params=["llama-bf16-tied", "qwen3-fp16-tied", "qwen2-bf16-untied", "mistral-fp16"]
)
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as a raw and as a residual store; its head has several chunks."""
    family, dtype, *tied = request.param.split("-")
    place = tmp_path_factory.mktemp(request.param)
    write_tiny(
        place / "model",
        family,
        {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype],
        seed=4,
        hidden_size=96,  # a group and a half
        vocab_size=1000,
        tie_word_embeddings=tied == ["tied"],
    )
    for stream in ("raw", "residual"):
        with LLM(place / "model", "64MiB", store=place / stream, stream=stream, context=96) as llm:
            assert llm.describe()["codec"] == stream
    return {stream: place / stream for stream in ("raw", "residual")}


def texts(llm: LLM) -> list[list[int]]:
    found = []
    for mode in ("plain", "speculative"):
        for params in (GREEDY, SAMPLED):
            llm.reset()
            found.append(llm.generate(PROMPT, params, mode=mode).token_ids)
    return found


@pytest.fixture(scope="module")
def expected(stores: dict[str, Path]) -> list[list[int]]:
    """Raw, all in memory."""
    with LLM(stores["raw"], "64MiB", context=96) as llm:
        assert llm.plan.streamed_bytes == 0
        found = texts(llm)
    assert found[:2] == found[2:]
    assert len(set(found[0] + found[1])) > 10
    return found


@pytest.mark.parametrize("costs", COSTS)
def test_the_text_is_that_of_raw_weights(
    stores: dict[str, Path], expected: list[list[int]], costs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "measure_costs", lambda _: COSTS[costs])
    least, unit = least_budget(stores["residual"], context=96, prefill_rows=5)
    forms = set()
    for budget in (least, least + unit, least + 3 * unit, least + 6 * unit, 64 << 20):
        with LLM(stores["residual"], budget, context=96, prefill_chunk=5) as llm:
            plan = llm.plan
            assert texts(llm) == expected, plan.explain()
            forms.add((plan.streamed_bytes > 0, len(plan.plain_layers), len(plan.resident_layers)))
    assert any(streamed for streamed, _, _ in forms)
    assert any(not streamed and plain for streamed, plain, _ in forms)
    assert any(plain < resident for _, plain, resident in forms) or costs == "rebuilding is dear"


@pytest.mark.parametrize("stream", ["raw", "residual"])
def test_the_text_behind_a_device_is_the_same(
    stores: dict[str, Path], expected: list[list[int]], stream: str
) -> None:
    found = set()
    with little_staging():
        vram, ram, unit = least_device_budgets(stores[stream], context=96, prefill_rows=5)
        for near, behind in ((vram, ram), (vram, PLENTY), (vram + 2 * unit, ram + unit), (PLENTY, PLENTY)):
            sizes: dict[str, Any] = {"vram": near, "ram": behind, "context": 96, "prefill_chunk": 5}
            with LLM(stores[stream], device="emulated", **sizes) as llm:
                assert texts(llm) == expected, llm.plan.explain()
                found.add((llm.plan.streamed_bytes > 0, llm.plan.disk_bytes > 0, llm.plan.adaptive))
    assert found == {(True, True, True), (True, False, True), (False, False, True)}


@pytest.mark.parametrize("stream", ["raw", "residual"])
def test_checking_every_read_changes_nothing(
    stores: dict[str, Path], expected: list[list[int]], stream: str
) -> None:
    least, _ = least_budget(stores[stream], context=96)
    with LLM(stores[stream], least, context=96, paranoid=True) as llm:
        assert llm.plan.streamed_bytes
        assert texts(llm) == expected


def test_residuals_stream_fewer_bytes(stores: dict[str, Path]) -> None:
    streamed = {}
    for stream, store in stores.items():
        least, _ = least_budget(store, context=96)
        with LLM(store, least, context=96) as llm:
            assert not llm.plan.resident_layers
            streamed[stream] = llm.plan.streamed_bytes
    assert streamed["residual"] < 0.85 * streamed["raw"]  # pages of 4 KiB weigh heavily in a tiny model
