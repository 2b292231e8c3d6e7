"""The recorder of spans: what it writes is the trace-event format, in order and nested."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.errors import OptionError
from subspec.memory.timeline import Timeline, recorded, require_writable

Span = tuple[float, float]


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == kind]


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Complete events of each track lie within or beside each other; the one around comes first."""
    around: dict[int, list[float]] = {}
    for event in of_kind(events, "X"):
        start, end = event["ts"], event["ts"] + event["dur"]
        ends = around.setdefault(event["tid"], [])
        while ends and ends[-1] <= start + 1e-6:
            ends.pop()
        assert not ends or end <= ends[-1] + 1e-6
        ends.append(end)


def test_the_file_is_in_the_trace_event_format(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span("sweep", "layer 0", 10.0005, 10.002, streamed=True)
    timeline.span("link: reader 0", "unit", 10.0, 10.001, bytes=4096)
    timeline.counter("nodes", 10.0015, 7)
    timeline.export_chrome_trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["displayTimeUnit"] == "ms"
    events = written["traceEvents"]
    assert all({"ph", "name", "pid"} <= event.keys() for event in events)
    names = {one["tid"]: one["args"]["name"] for one in of_kind(events, "M") if one["name"] == "thread_name"}
    orders = [one["tid"] for one in of_kind(events, "M") if one["name"] == "thread_sort_index"]
    assert [names[tid] for tid in orders] == ["sweep", "link: reader 0"]
    link, layer = of_kind(events, "X")
    assert (link["ts"], link["dur"], link["args"], names[link["tid"]]) == (
        0.0,
        1000.0,
        {"bytes": 4096},
        "link: reader 0",
    )
    assert (layer["ts"], layer["dur"], layer["args"], names[layer["tid"]]) == (
        500.0,
        1500.0,
        {"streamed": True},
        "sweep",
    )
    (counter,) = of_kind(events, "C")
    assert (counter["ts"], counter["args"]) == (1500.0, {"value": 7})
    stamps = [event["ts"] for event in events if "ts" in event]
    assert stamps == sorted(stamps)


def test_tracks_have_one_order_whatever_came_first() -> None:
    timeline = Timeline()
    for track in ("zebra", "gaps", "link: b", "draft", "link: a", "steps", "sweep"):
        timeline.span(track, "x", 0.0, 1.0)
    named = [one["args"]["name"] for one in timeline.events() if one["name"] == "thread_name"]
    assert named == ["steps", "sweep", "draft", "gaps", "link: a", "link: b", "zebra"]


def test_an_empty_timeline_is_a_valid_trace(tmp_path: Path) -> None:
    Timeline().export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["ph"] for event in events] == ["M"]


def split(span: Span, cuts: list[float], depth: int) -> list[Span]:
    """The span, and nested ones that share its borders."""
    if depth == 0:
        return [span]
    start, end = span
    borders = [start, *sorted(start + (end - start) * cut for cut in cuts), end]
    inner = [one for pair in zip(borders, borders[1:], strict=False) for one in split(pair, cuts, depth - 1)]
    return [*inner, span]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e6), st.floats(1e-6, 1e3), st.lists(st.floats(0, 1), max_size=2), st.integers(0, 3))
def test_what_nested_stays_nested(start: float, length: float, cuts: list[float], depth: int) -> None:
    timeline = Timeline()
    for begin, end in split((start, start + length), cuts, depth):
        timeline.span("track", "x", begin, end)
    events = timeline.events()
    assert_nested(events)
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in of_kind(events, "X"))


def test_threads_may_report_at_once() -> None:
    timeline = Timeline()

    def report(track: str) -> None:
        for index in range(500):
            timeline.span(track, "x", index, index + 1)

    threads = [threading.Thread(target=report, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(of_kind(timeline.events(), "X")) == 2000


# Files


def test_a_trace_is_written_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    used: list[Timeline | None] = []
    path = tmp_path / "trace.json"
    with recorded(used.append, path) as timeline:
        assert not path.exists()
        timeline.span("a", "b", 0.0, 1.0)
    assert used == [timeline, None]
    assert len(of_kind(json.loads(path.read_text())["traceEvents"], "X")) == 1
    with pytest.raises(KeyError), recorded(used.append, path):
        raise KeyError
    assert used[-1] is None
    assert not of_kind(json.loads(path.read_text())["traceEvents"], "X")


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with recorded(lambda _: None, None) as timeline:
        pass
    assert not list(tmp_path.iterdir())
    timeline.export_chrome_trace("later.json")
    assert Path("later.json").exists()


def test_asking_whether_a_path_is_writable_leaves_it_alone(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("kept")
    require_writable(old)
    assert old.read_text() == "kept"
    require_writable(tmp_path / "new.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@pytest.mark.parametrize("place", ["missing/trace.json", ""])
def test_a_path_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path, place: str) -> None:
    used: list[Timeline | None] = []
    with pytest.raises(
        OptionError, match=r"cannot be written \(.*\): name a file in a directory that exists"
    ):
        recorded(used.append, tmp_path / place).__enter__()
    assert not used
    with pytest.raises(OptionError, match="cannot be written"):
        Timeline().export_chrome_trace(tmp_path / place)
