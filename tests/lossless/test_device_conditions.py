"""Behind a device, the text depends on no placement and on nothing that came before, and ends anywhere.

And both tiers hold what the plan says.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from budgets import PLENTY, least_device_budgets
from device_drafters import forget_accesses, gaps_by_chance
from device_subjects import BOUNDS, Subject, little_staging, open_device
from test_lossless import SAMPLINGS

from subspec import LLM
from subspec.memory import arena
from subspec.planning import plan as planning

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["qwen3-residual", "qwen2-raw"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    family, stream = request.param.split("-")
    made = Subject(tmp_path_factory.mktemp(request.param), family, stream, num_hidden_layers=4)
    yield made
    made.cpu.close()


@pytest.fixture(scope="module")
def llm(subject: Subject) -> Iterator[LLM]:
    """Its trees are drafted and verified by chance, in gaps as well."""
    with open_device(subject.store, subject.vram, subject.ram + subject.unit) as opened:
        opened.tree = subject.ahead(None, 3)
        with gaps_by_chance(opened.engine, 3):
            yield opened


# --- where weights lie --------------------------------------------------------------------------------------

PLACEMENTS = ("all resident", "RAM", "some resident", "RAM and disk", "disk")


def open_placed(subject: Subject, placement: str) -> LLM:
    """A model that streams from where a placement says."""
    with little_staging():
        vram, ram, unit = least_device_budgets(subject.store, **BOUNDS)
    budgets = {
        "all resident": (PLENTY, PLENTY),
        "RAM": (vram, PLENTY),
        "some resident": (vram + unit, ram + unit),
        "RAM and disk": (vram, ram + 2 * unit),
        "disk": (vram, ram),
    }
    llm = open_device(subject.store, *budgets[placement])
    streamed, from_disk = llm.plan.streamed_bytes, llm.plan.disk_bytes
    resting = streamed - from_disk
    found = bool(llm.plan.resident_layers), bool(resting), bool(from_disk)
    expected = {
        "all resident": (True, False, False),
        "RAM": (False, True, False),
        "some resident": (True, True, True),
        "RAM and disk": (False, True, True),
        "disk": (False, False, True),
    }
    assert found == expected[placement], llm.plan.explain()
    return llm


@pytest.mark.parametrize(
    ("placement", "slots"), [("all resident", 2), *itertools.product(PLACEMENTS[1:], (2, 3))]
)
def test_the_text_of_every_placement(
    subject: Subject, placement: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "slot_count", lambda *_, **__: slots)
    with open_placed(subject, placement) as llm:
        assert llm.plan.slots == (0 if placement == "all resident" else slots)
        subject.check(llm, "temperature", None, slots)
        subject.check(llm, "all filters", "sometimes", slots)
        streamer = llm.engine.schedule.streamer
        if placement == "disk":
            assert streamer is not None
            assert len(streamer._readers[0].buffers) == 2
            assert streamer.read_bytes == streamer.streamed_bytes > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_both_tiers_hold_what_the_plan_says(
    subject: Subject, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    place = arena.place_bytes

    def counted(n_bytes: int, device: torch.device) -> torch.Tensor:
        mapped.append(n_bytes)
        return place(n_bytes, device)

    monkeypatch.setattr(arena, "place_bytes", counted)
    with open_placed(subject, placement) as llm:
        plan, engine = llm.plan, llm.engine
        assert engine.places.host_budget is not None
        for budget, planned in (
            (engine.places.budget, plan.parts),
            (engine.places.host_budget, plan.host_parts),
        ):
            held = {name: size for name, size in budget.held.items() if size}
            assert held == {name: size for name, size in planned.items() if size}
            assert budget.held_bytes == sum(planned.values()) <= budget.total_bytes
        unmapped = sum(plan.parts.get(name, 0) for name in ("workspace", "scratch", "norms_biases"))
        expected = plan.held_bytes - unmapped + plan.host_held_bytes
        assert sum(mapped) == expected
        llm.generate(subject.prompt, SAMPLINGS["temperature"])
        assert sum(mapped) == expected


# --- what came before, and where it ends --------------------------------------------------------------------


def test_whatever_came_before(subject: Subject, llm: LLM) -> None:
    """Texts one after another on one model: kept prefixes, texts broken off, other samplings and seeds."""
    chance, reused = random.Random(5), 0
    for number in range(20):
        forget_accesses(llm.engine)
        sampling = chance.choice(list(SAMPLINGS))
        seed, length = chance.choice((1, 2)), chance.choice((1, 2, 3, 5, 9, 26))
        params = replace(SAMPLINGS[sampling], seed=seed, max_new_tokens=length, ignore_eos=True)
        prompt = subject.prompt[: chance.choice((3, 20, 50))]
        prompt = chance.choice((prompt, llm._cached[:90] + [5], [number, *prompt]))
        expected = subject.cpu.generate(prompt, params, mode="plain").token_ids
        pieces = chance.choice((1, 2, 99))
        found = list(itertools.islice(llm.stream(prompt, params), pieces))
        tokens = [token for piece in found for token in piece.token_ids]
        assert tokens == expected[: len(tokens)], (number, sampling)
        if pieces == 99:
            assert len(tokens) == length
            assert found[-1].result is not None
            reused += found[-1].result.statistics.reused_tokens > 0
    assert reused > 1


@pytest.mark.parametrize("sampling", ["greedy", "all filters"])
def test_a_text_may_end_anywhere(subject: Subject, llm: LLM, sampling: str) -> None:
    plain = subject.plain(sampling).tokens
    for count in (1, 2, 3, 5, 9, 25):
        forget_accesses(llm.engine)
        llm.reset()
        params = replace(SAMPLINGS[sampling], max_new_tokens=count, ignore_eos=True)
        found = llm.generate(subject.prompt, params)
        assert (found.token_ids, found.finish_reason) == (plain[:count], "length")


def test_the_context_may_end_anywhere(subject: Subject) -> None:
    plain = subject.plain("all filters").tokens
    params = replace(SAMPLINGS["all filters"], ignore_eos=True)
    for room in (1, 2, 3, 4, 9, 17):
        with open_device(subject.store, subject.vram, subject.ram, context=50 + room) as llm:
            llm.tree = subject.ahead(None, room)
            with gaps_by_chance(llm.engine, room):
                found = llm.generate(subject.prompt, params)
            assert (found.token_ids, found.finish_reason) == (plain[:room], "context")
