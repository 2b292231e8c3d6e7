"""A trace of a tiny model's texts: each layer of each sweep, each draft, step and streamed byte is there."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import least_budget
from patience import PATIENCE_S
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.errors import OptionError
from subspec.generation import Result
from subspec.models.decoder import finished, prefix_rows
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 96
PROMPT = list(range(10, 30))
PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = tmp_path_factory.mktemp("trace")
    write_tiny(directory / "model", "qwen2", torch.bfloat16, num_hidden_layers=4)
    store = prepare(directory / "model", store=directory / "store")
    least, unit = least_budget(store, context=CONTEXT)
    with LLM(store, least + unit, context=CONTEXT) as opened:
        assert opened.plan.resident_layers
        assert len(opened.plan.resident_layers) < 4
        yield opened


def settled_bytes(llm: LLM) -> int:
    """Bytes streamed so far, once the readers have filled the ring and rest."""
    deadline = time.monotonic() + PATIENCE_S
    streamer = llm.engine.schedule.streamer
    assert streamer is not None
    arrived = [event for slot in streamer._slots for event in slot.arrived]
    while not all(map(streamer._backend.done, arrived)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return llm.engine.counters().streamed_bytes


def traced(llm: LLM, path: Path, mode: str) -> tuple[Events, Result, int]:
    """Events by time, the text, and the bytes streamed meanwhile."""
    llm.reset()
    before = settled_bytes(llm)
    with llm.traced(path):
        result = llm.generate(PROMPT, PARAMS, mode=mode)
        after = settled_bytes(llm)
    return json.loads(path.read_text())["traceEvents"], result, after - before


def on(events: Events, track: str) -> Events:
    return [event for event in events if event["ph"] == "X" and event["cat"].startswith(track)]


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_everything_is_in_the_trace(llm: LLM, tmp_path: Path, mode: str) -> None:
    events, result, streamed = traced(llm, tmp_path / "trace.json", mode)
    figures, sweep = result.statistics, on(events, "sweep")
    names = Counter(event["name"] for event in sweep)
    weights = llm.engine.weights
    layers, head = [[unit.name for unit in part] for part in (weights.layers, weights.head)]
    units = [*layers, "norm", *head]
    assert names.pop("sweep") == figures.sweeps
    waits = names.pop("wait")
    assert names == dict.fromkeys(units, figures.sweeps)
    assert waits == figures.sweeps * len(weights.streamed())
    order = [event["name"] for event in sweep if event["name"] not in ("sweep", "wait")]
    assert order == units * figures.sweeps
    assert sum(event["args"]["bytes"] for event in on(events, "link")) == streamed > 0
    steps = Counter(event["name"] for event in on(events, "steps"))
    each = figures.steps
    assert steps == {"prefill": 1, "draft": each, "verify": each, "commit": each}
    assert bool(on(events, "draft")) == (mode == "speculative")
    tokens = [
        one["args"]["value"] for one in events if one["ph"] == "C" and one["name"] == "committed tokens"
    ]
    assert tokens == [accepted + 1 for accepted in figures.accepted]


def test_spans_nest_and_waits_and_drafts_lie_where_they_belong(llm: LLM, tmp_path: Path) -> None:
    events, result, _ = traced(llm, tmp_path / "trace.json", "speculative")
    figures = result.statistics
    by_track: dict[int, Events] = {}
    for event in events:
        if event["ph"] == "X":
            by_track.setdefault(event["tid"], []).append(event)
    for spans in by_track.values():
        stack: list[float] = []
        for event in spans:
            while stack and stack[-1] <= event["ts"] + 1e-3:
                stack.pop()
            assert not stack or event["ts"] + event["dur"] <= stack[-1] + 1e-3
            stack.append(event["ts"] + event["dur"])
    # A draft pass that a sweep's end broke off ends in the commit, or in the prefill.
    inside = {"draft": ("draft", "commit", "prefill"), "sweep": ("verify", "prefill")}
    for track, steps in inside.items():
        around = [(one["ts"], one["ts"] + one["dur"]) for one in on(events, "steps") if one["name"] in steps]
        for event in on(events, track):
            end = event["ts"] + event["dur"]
            assert any(low <= event["ts"] + 1e-3 and end <= high + 1e-3 for low, high in around)
    verifying = sum(event["dur"] for event in on(events, "steps") if event["name"] in ("verify", "commit"))
    assert verifying / 1e6 == pytest.approx(figures.verify_s, abs=1e-5)
    drafting = sum(event["dur"] for event in on(events, "steps") if event["name"] == "draft")
    assert drafting / 1e6 == pytest.approx(figures.draft_s, abs=1e-5)
    prefill = next(event for event in on(events, "steps") if event["name"] == "prefill")
    waits = sum(
        event["dur"]
        for event in on(events, "sweep")
        if event["name"] == "wait" and event["ts"] > prefill["ts"] + prefill["dur"]
    )
    assert waits / 1e6 == pytest.approx(figures.wait_s, abs=1e-5)


def test_a_draft_that_a_sweep_broke_off_is_traced_from_where_it_goes_on(llm: LLM) -> None:
    llm.reset()
    engine = llm.engine
    with llm.traced() as timeline:
        steps = engine.draft_steps(prefix_rows([7], 40))
        engine.schedule.in_gap = True
        next(steps)
        next(steps)
        engine.schedule.in_gap = False
        timeline.counter("swept", time.perf_counter(), 1)
        finished(steps)
    events = timeline.events()
    (swept,) = [event for event in events if event["name"] == "swept"]
    (span,) = on(events, "draft")
    assert span["ts"] >= swept["ts"]
    assert span["args"] == {"rows": 1}


def test_tracing_changes_no_token_and_ends_with_its_block(llm: LLM, tmp_path: Path) -> None:
    llm.reset()
    expected = llm.generate(PROMPT, PARAMS).token_ids
    llm.reset()
    with llm.traced() as timeline:
        assert llm.generate(PROMPT, PARAMS).token_ids == expected
        with pytest.raises(OptionError, match="under way"):
            llm.traced()
    known = len(timeline.events())
    llm.reset()
    settled_bytes(llm)
    llm.generate(PROMPT, PARAMS)
    assert llm.engine.timeline is None
    assert len(timeline.events()) - known <= 4  # reads that were under way


def test_a_path_that_cannot_be_written_is_known_before_the_block(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"), llm.traced(tmp_path / "no" / "trace.json"):
        pytest.fail("the block began")
    assert llm.engine.timeline is None
