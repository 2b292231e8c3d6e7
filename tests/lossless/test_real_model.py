"""On a real model in bf16, whose logits often tie: speculative equals plain, greedy and sampled."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from budgets import least_device_budgets

from subspec import LLM, SamplingParams
from subspec.generation.results import Result

pytestmark = pytest.mark.slow

NEW_TOKENS = 200
PlainOf = Callable[[int, float | None], Result]
PROMPTS = (
    "Our kitchen sink drains slowly after every rain. What could be wrong, and what should I check first?",
    "Write a short story about a lighthouse keeper who collects other people's umbrellas.",
    "def median_of_three(a, b, c):\n    # finish this Python function and explain it line by line",
    "A train leaves at 14:20 and arrives at 17:05, with two stops of five minutes. How long did it move?",
    "Liste fünf Dinge auf, die man auf eine Wanderung mitnehmen sollte, und begründe jedes kurz.",
    "Turn this into a table: Ada has 3 cats, Boris has 1 dog, Chen has 2 birds and 4 fish.",
    "Persuade a stubborn neighbour, politely and in four paragraphs, to trim the hedge between our gardens.",
    "What is the difference between weather and climate? Answer as if to a curious ten-year-old.",
)
CASES = [(index, temperature) for index in range(len(PROMPTS)) for temperature in (None, 0.8)]


@pytest.fixture(scope="module")
def demo_store(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("demo")
    yield directory / "store"
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def model(demo_file: Path, demo_store: Path) -> Iterator[LLM]:
    """Everything resident, and a tree that does not depend on what else the machine does."""
    with LLM(demo_file, "2GiB", store=demo_store, context=512, depth=8, width=3, nodes=16) as llm:
        assert llm.describe()["dtype"] == "bfloat16"
        assert llm.plan.streamed_bytes == 0
        yield llm


@pytest.fixture(scope="module")
def small_model(model: LLM, demo_store: Path) -> Iterator[LLM]:
    """A good part of the exact weights streamed and rebuilt, other prompt chunks, trees that must pay."""
    held, resident = model.plan.held_bytes, model.plan.parts["resident"]
    settings = {"context": 512, "prefill_chunk": 7}
    with LLM(demo_store, held - resident * 3 // 4, store=None, **settings) as llm:  # type: ignore[arg-type]
        assert llm.plan.streamed_bytes > resident // 10
        yield llm


@pytest.fixture(scope="module")
def plain_of(model: LLM) -> PlainOf:
    """Plain decoding of a case, done once."""
    return cache(
        lambda index, temperature: model.generate(PROMPTS[index], params_of(index, temperature), mode="plain")
    )


def params_of(index: int, temperature: float | None) -> SamplingParams:
    return SamplingParams(NEW_TOKENS, temperature=temperature, seed=index, ignore_eos=True)


@pytest.mark.parametrize(("index", "temperature"), CASES)
def test_speculative_equals_plain(
    model: LLM, plain_of: PlainOf, index: int, temperature: float | None
) -> None:
    plain = plain_of(index, temperature)
    model.reset()
    speculative = model.generate(PROMPTS[index], params_of(index, temperature))
    assert len(plain.token_ids) == NEW_TOKENS
    assert len(set(plain.token_ids)) >= 20
    assert speculative.token_ids == plain.token_ids
    assert speculative.text == plain.text
    assert speculative.statistics.acceptance_length > 2, "the substitutes hardly ever agree"


@pytest.mark.parametrize(("index", "temperature"), [(1, 0.8), (6, None)])
def test_the_same_text_under_a_smaller_budget(
    small_model: LLM,
    plain_of: PlainOf,
    index: int,
    temperature: float | None,
) -> None:
    expected = plain_of(index, temperature).token_ids
    found = small_model.generate(PROMPTS[index], params_of(index, temperature))
    assert found.token_ids == expected
    assert found.statistics.streamed_bytes > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_text_by_any_number_of_threads(small_model: LLM, plain_of: PlainOf, threads: int) -> None:
    before, params = torch.get_num_threads(), params_of(3, 0.8)
    expected = plain_of(3, 0.8).token_ids
    torch.set_num_threads(threads)
    try:
        small_model.reset()
        found = small_model.generate(PROMPTS[3], replace(params, max_new_tokens=48))
    finally:
        torch.set_num_threads(before)
    assert found.token_ids == expected[:48]
    assert found.statistics.streamed_bytes > 0


@pytest.fixture(scope="module")
def device_model(model: LLM, demo_store: Path) -> Iterator[LLM]:
    """Behind a device: nothing resident, half of what streams in RAM, half on disk."""
    vram, ram, _ = least_device_budgets(demo_store, context=512)
    streamed = model.plan.parts["resident"]
    with LLM(demo_store, vram=vram, ram=ram + streamed // 4, device="emulated", context=512) as llm:
        assert 0 < llm.plan.disk_bytes < llm.plan.streamed_bytes
        yield llm


@pytest.mark.parametrize(("index", "temperature"), [(0, 0.8), (0, None), (5, 0.8), (5, None)])
def test_the_same_text_behind_a_device(
    device_model: LLM,
    plain_of: PlainOf,
    index: int,
    temperature: float | None,
) -> None:
    expected = plain_of(index, temperature).token_ids
    found = device_model.generate(PROMPTS[index], params_of(index, temperature))
    assert found.token_ids == expected
    assert found.statistics.streamed_bytes > 0
    assert found.statistics.acceptance_length > 2
