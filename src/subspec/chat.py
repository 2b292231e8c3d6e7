"""A conversation in the terminal: history, a few commands, and an answer that Ctrl-C can stop.

Works on any object with the interface of ``LLM``; knows nothing of budgets, trees or stores.  The whole
history goes to the model each turn; the engine recognizes what it has already seen and prefills the rest.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from subspec.errors import SubspecError

if TYPE_CHECKING:
    from subspec.generation import LLM, Result
    from subspec.speculation.sampling import SamplingParams

PROMPT = "> "
HELP = """\
/reset  forget the conversation
/stats  figures of the last answer and of the conversation
/help   this list
/exit   leave, as does Ctrl-D
Ctrl-C stops an answer and keeps what was said; twice, it does not wait for the running step."""


class Chat:
    """The read-answer loop.

    Args:
        llm: the model to talk with.
        params: how its tokens are chosen.
        system: a system message that opens every conversation.
        summarize: one line about an answer, for ``/stats``.
    """

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams | None" = None,
        *,
        system: str | None = None,
        summarize: "Callable[[Result], str]" = lambda result: f"{result.statistics.tok_s:.2f} tok/s",
    ) -> None:
        self.llm = llm
        self.params = params
        self.summarize = summarize
        self.results: list[Result] = []
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._opening)

    def run(self) -> None:
        """Read lines from standard input until its end, or ``/exit``."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (gives input() editing and history)
            print("/help lists the commands, Ctrl-D leaves.")
        while (line := _read(terminal)) is not None:
            if not line.strip():
                continue
            if line.startswith("/"):
                if not self.command(line.strip()):
                    return
            else:
                self.turn(line)

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; False means leave."""
        if line == "/exit":
            return False
        if line == "/reset":
            self.reset()
        elif line == "/stats":
            print(self.stats())
        elif line == "/help":
            print(HELP)
        else:
            _note(f"unknown command {line.split()[0]}; to send it as a message, put a space before it")
        return True

    def reset(self) -> None:
        """Start a new conversation, and let the engine forget the old one."""
        self.messages = list(self._opening)
        self.results.clear()
        self.llm.reset()

    def stats(self) -> str:
        """What ``/stats`` prints."""
        if not self.results:
            return "nothing answered yet"
        every = [result.statistics for result in self.results]
        tokens = sum(one.new_tokens for one in every)
        seconds = sum(one.prefill_s + one.decode_s for one in every)
        last = self.results[-1]
        context = f"prompt {last.prompt_tokens} tokens, {last.statistics.reused_tokens} of them kept"
        return (
            f"last answer: {self.summarize(last)}; {context}\n"
            f"conversation: {len(every)} answers · {tokens} tokens in {seconds:.1f} s"
        )

    def turn(self, text: str) -> None:
        """Answer one message; what was said before a Ctrl-C or an error stays in the history."""
        self.messages.append({"role": "user", "content": text.strip()})
        said: list[str] = []
        try:
            self._answer(said)
        except KeyboardInterrupt:
            # Raised anywhere inside a step: what the engine kept of the text may be half-written.
            self.llm.reset()
            _note("stopped")
        except SubspecError as error:
            _note(f"error: {error}")
        if answer := "".join(said):
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def _answer(self, said: list[str]) -> None:
        """Print the answer and collect it in ``said``."""
        pieces = self.llm.stream(list(self.messages), self.params)
        ended = None
        with _stop_on_interrupt() as stop:
            try:
                for piece in pieces:
                    said.append(piece.text)
                    print(piece.text, end="", flush=True)
                    if (ended := piece.result) or stop.is_set():
                        break
            finally:
                print(flush=True)
        if ended is None:
            _note("stopped")
            return
        self.results.append(ended)
        if ended.finish_reason in ("length", "context"):
            _note(f"cut off by the {ended.finish_reason} limit")


def _read(terminal: bool, stream: TextIO | None = None) -> str | None:
    """The next line without its end; ``None`` at the end.  Ctrl-C gives up the line typed so far."""
    if not terminal:
        line = (stream or sys.stdin).readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")


def _note(text: str) -> None:
    """Something about the conversation that is no part of it."""
    print(f"[{text}]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """While inside, the first Ctrl-C sets the event that is yielded; a second raises ``KeyboardInterrupt``.

    Letting a step finish keeps the engine's state whole.  Handlers can only be set in the main thread; in
    another one Ctrl-C raises at once there anyway.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
