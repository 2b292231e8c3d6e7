"""The conversation: history, commands, and Ctrl-C."""

import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_llm import FakeLLM, open_chat, result

from subspec.chat import Chat
from subspec.errors import ContextError
from subspec.generation import Piece


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM("model")


def converse(monkeypatch: pytest.MonkeyPatch, chat: Chat, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.run()


def test_the_history_grows_and_goes_to_the_model(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = open_chat(llm, system="Be brief.")
    converse(monkeypatch, chat, "first\n   \nsecond")
    answer = "word0 word1 word2 word3 "
    assert [message["content"] for message in chat.messages] == [
        "Be brief.",
        "first",
        answer,
        "second",
        answer,
    ]
    assert [len(call[0]) for call in llm.calls] == [2, 4]
    assert [message["role"] for message in llm.calls[1][0]] == ["system", "user", "assistant", "user"]


def test_reset_forgets_all_but_the_system_message(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = open_chat(llm, system="Be brief.")
    converse(monkeypatch, chat, "first\n/reset\n/stats\n")
    assert [message["content"] for message in chat.messages] == ["Be brief."]
    assert llm.resets == 1


def test_commands(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    converse(monkeypatch, open_chat(llm), "/stats\n/help\n/what now\nhello\n/stats\n/exit\nnever\n")
    captured = capsys.readouterr()
    assert "nothing answered yet" in captured.out
    assert "/reset" in captured.out
    assert "conversation: 1 answers · 4 tokens" in captured.out
    assert "unknown command /what" in captured.err
    assert len(llm.calls) == 1


def test_a_space_before_a_slash_makes_it_a_message(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    converse(monkeypatch, open_chat(llm), " /etc/passwd is what?\n")
    assert llm.calls[0][0] == [{"role": "user", "content": "/etc/passwd is what?"}]


class Interrupted(FakeLLM):
    """Ctrl-C comes ``times`` times after ``said`` words."""

    said, times = 2, 1

    def stream(
        self, prompt: Any, params: Any = None, *, mode: str | None = None, raw: bool = False
    ) -> Iterator[Piece]:
        self.generate(prompt, params, mode=mode, raw=raw)
        self.finished = False
        try:
            for word in range(8):
                if word == self.said:
                    for _ in range(self.times):
                        signal.raise_signal(signal.SIGINT)
                yield Piece(f"word{word} ", [word])
        finally:
            self.finished = True


@pytest.mark.parametrize(("times", "kept", "resets"), [(1, "word0 word1 word2 ", 0), (2, "word0 word1 ", 1)])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: int, kept: str, resets: int
) -> None:
    monkeypatch.setattr(Interrupted, "times", times)
    llm, before = Interrupted("model"), signal.getsignal(signal.SIGINT)
    chat = open_chat(llm)
    chat.turn("hello")
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": kept}]
    assert llm.finished
    assert llm.resets == resets
    assert "[stopped]" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupted, "times", 2)
    monkeypatch.setattr(Interrupted, "said", 0)
    chat = open_chat(Interrupted("model"))
    chat.turn("hello")
    assert chat.messages == []


def test_an_error_is_told_and_the_conversation_goes_on(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> Iterator[Piece]:
        yield from ()
        raise ContextError("the prompt has 5000 tokens, the context 4096")

    monkeypatch.setattr(llm, "stream", refuse)
    chat = open_chat(llm)
    chat.turn("long")
    assert chat.messages == []
    assert "error: the prompt has 5000 tokens" in capsys.readouterr().err


def test_an_answer_cut_short_says_so(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    open_chat(llm).turn("hello")
    assert "cut off by the length limit" in capsys.readouterr().err


def test_keys_at_the_prompt(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: Iterator[str | BaseException] = iter(["hello", KeyboardInterrupt(), EOFError()])

    def typed(_prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    open_chat(llm).run()
    assert len(llm.calls) == 1
    assert "Ctrl-D" in capsys.readouterr().out


def test_the_summary_is_the_callers(llm: FakeLLM) -> None:
    chat = open_chat(llm, summarize=lambda one: f"{one.finish_reason}!")
    chat.results.append(result())
    assert chat.stats().startswith("last answer: length!")
