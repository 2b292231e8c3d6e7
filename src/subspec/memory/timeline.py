"""What happened when: spans and counters on tracks, for a trace viewer.

Whoever does something worth seeing holds a ``Timeline`` or ``None``, and reports a span once it is over, with
the ``time.perf_counter`` seconds between which it lasted.  Knows nothing of what tracks and names mean.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from subspec.errors import OptionError

FIRST_TRACKS = ("steps", "sweep", "draft", "gaps")  # from the top; others follow by name
_PROCESS = 1


class Timeline:
    """Spans and counters, in memory until exported.  Thread-safe.

    Spans of one track must nest, as a viewer stacks them: one track a thread, or a kind of work that takes
    turns.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []
        self._counters: list[tuple[str, float, float]] = []
        self._lock = threading.Lock()

    def span(self, track: str, name: str, start_s: float, end_s: float, **arguments: Any) -> None:
        """Something on ``track`` that lasted from ``start_s`` to ``end_s``; ``arguments``: plain data."""
        with self._lock:
            self._spans.append((track, name, start_s, end_s, arguments))

    def counter(self, name: str, at_s: float, value: float) -> None:
        """A quantity that has ``value`` from ``at_s`` on."""
        with self._lock:
            self._counters.append((name, at_s, value))

    def events(self) -> list[dict[str, Any]]:
        """All so far in Chrome's trace-event format, by time; the earliest start is 0.

        Source: "Trace Event Format" (Google), complete (X), counter (C) and metadata (M) events; times in
            microseconds.
        """
        with self._lock:
            spans, counters = list(self._spans), list(self._counters)
        origin = min([span[2] for span in spans] + [counter[1] for counter in counters], default=0.0)

        def nanoseconds(at_s: float) -> int:
            return round((at_s - origin) * 1e9)

        ranks = {name: rank for rank, name in enumerate(FIRST_TRACKS)}
        tracks = sorted({span[0] for span in spans}, key=lambda track: (ranks.get(track, len(ranks)), track))
        thread_of = {track: number for number, track in enumerate(tracks, start=1)}
        timed: list[dict[str, Any]] = []
        for track, name, start_s, end_s, arguments in spans:
            start, end = nanoseconds(start_s), nanoseconds(end_s)
            event = {"ph": "X", "cat": track, "name": name, "pid": _PROCESS, "tid": thread_of[track]}
            timed.append(event | {"ts": start / 1000, "dur": (end - start) / 1000, "args": arguments})
        for name, at_s, value in counters:
            event = {"ph": "C", "name": name, "pid": _PROCESS}
            timed.append(event | {"ts": nanoseconds(at_s) / 1000, "args": {"value": value}})
        timed.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))  # a span before those inside it
        return _names(thread_of) + timed

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write what was recorded as JSON, for https://ui.perfetto.dev or ``chrome://tracing``.

        Raises:
            OptionError: the file cannot be written.
        """
        content = json.dumps({"displayTimeUnit": "ms", "traceEvents": self.events()})
        with _told_of(Path(path)):
            Path(path).write_text(content)


@contextlib.contextmanager
def recorded(use: Callable[[Timeline | None], None], path: str | Path | None) -> Iterator[Timeline]:
    """A new timeline, handed to ``use`` for the block and exported to ``path`` after it, also after an error.

    Raises:
        OptionError: the file cannot be written, found out before the block.
    """
    if path is not None:
        require_writable(path)
    timeline = Timeline()
    use(timeline)
    try:
        yield timeline
    finally:
        use(None)
        if path is not None:
            timeline.export_chrome_trace(path)


def require_writable(path: str | Path) -> None:
    """Find out now whether a trace can be written to ``path``; leaves there what was there.

    Raises:
        OptionError: it cannot.
    """
    place = Path(path)
    with _told_of(place):
        existed = place.exists()
        with place.open("ab"):
            pass
        if not existed:
            place.unlink()


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"the trace {path} cannot be written ({error.strerror}): "
            "name a file in a directory that exists and that you may write to"
        ) from error


def _names(thread_of: dict[str, int]) -> list[dict[str, Any]]:
    """Metadata: what the process and each track are called, and their order."""
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": "subspec"}}
    ]
    for track, number in thread_of.items():
        event = {"ph": "M", "pid": _PROCESS, "tid": number}
        found.append(event | {"name": "thread_name", "args": {"name": track}})
        found.append(event | {"name": "thread_sort_index", "args": {"sort_index": number}})
    return found
