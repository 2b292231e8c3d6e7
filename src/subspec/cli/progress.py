"""Progress bars: only on a terminal, and only for work that has lasted two seconds."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DELAY_S = 2.0


class TerminalProgress:
    """A callback ``progress(task, done, total)`` that draws bars on standard error when that is a terminal.

    A context manager: leaving it removes the bars.  Nothing is drawn, or imported, for work that ends sooner
    than ``delay_s``, or when standard error goes to a file.
    """

    def __init__(self, stream: TextIO | None = None, delay_s: float = DELAY_S) -> None:
        self._stream = stream or sys.stderr
        self._delay_s = delay_s
        self._started: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._display: Progress | None = None

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of ``task`` are finished."""
        if not self._stream.isatty():
            return
        now = time.monotonic()
        start = self._started.setdefault(task, now)
        if done >= total:
            self._finish(task)
        elif now - start >= self._delay_s:
            self._draw(task, done, total)

    def close(self) -> None:
        """Remove the bars; a later call starts anew."""
        if self._display is not None:
            self._display.stop()
        self._display = None
        self._bars.clear()
        self._started.clear()

    def _draw(self, task: str, done: int, total: int) -> None:
        if self._display is None:
            self._display = _display(self._stream)
            self._display.start()
        if task not in self._bars:
            self._bars[task] = self._display.add_task(task, total=total)
        self._display.update(self._bars[task], completed=done, total=total)

    def _finish(self, task: str) -> None:
        self._started.pop(task, None)
        bar = self._bars.pop(task, None)
        if self._display is not None and bar is not None:
            self._display.remove_task(bar)
            if not self._bars:
                self._display.stop()
                self._display = None


def _display(stream: TextIO) -> "Progress":
    """Empty rich bars that leave nothing behind and redraw seldom: the processor has other work."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=stream), transient=True, refresh_per_second=4)
