"""A model that answers from a list of words, with the interface of ``LLM`` and none of its work."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from subspec.chat import Chat
from subspec.generation import LLM
from subspec.generation.results import Piece, Result, Statistics
from subspec.memory.timeline import Timeline, recorded

MIB = 1 << 20
FIGURES: dict[str, Any] = {
    "reused_tokens": 0, "prefill_s": 0.5, "decode_s": 2.0, "tok_s": 1.0, "acceptance_length": 1.0, "steps": 4,
    "sweeps": 5, "streamed_bytes": 0, "draft_s": 0.25, "verify_s": 1.5, "wait_s": 0.125, "accepted": [],
    "drafted": [], "verified": [], "gap_s": 0.5, "wasted_s": 0.125, "link_s": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    budget_bytes: int = 100 * MIB
    host_budget_bytes: int | None = None
    budgets: str = "100.00MiB"

    def explain(self) -> str:
        return "24 of 30 layers streamed"

    def as_dict(self) -> dict[str, Any]:
        return {"streamed_layers": 24}


def result(mode: str = "plain", tokens: int = 4, *, finish_reason: str = "length", **figures: Any) -> Result:
    """A run of ``tokens`` tokens counted from 0."""
    ids = list(range(tokens))
    text = " ".join(f"word{token}" for token in ids)
    return Result(text, ids, 3, finish_reason, Statistics(mode, tokens, **{**FIGURES, **figures}))


def open_chat(llm: "FakeLLM", **choices: Any) -> Chat:
    """A conversation with a fake."""
    return Chat(cast(LLM, llm), **choices)


class FakeLLM:
    """Speculative runs are four times as fast as plain ones; what was asked is kept in ``calls``."""

    streamed_bytes = 0
    instances: list["FakeLLM"] = []

    def __init__(
        self, model: str, memory: str = "auto", *, mode: str = "speculative", **choices: Any
    ) -> None:
        self.model, self.memory, self.mode, self.choices = model, memory, mode, choices
        self.plan = Plan()
        self.store_path = Path("nowhere")
        self.calls: list[tuple[Any, Any, str]] = []
        self.resets = 0
        self.closed = False
        FakeLLM.instances.append(self)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def traced(self, path: str | Path | None = None) -> AbstractContextManager[Timeline]:
        return recorded(lambda _: None, path)

    def reset(self) -> None:
        self.resets += 1

    def describe(self) -> dict[str, Any]:
        return {"name": self.model}

    def speculation(self) -> dict[str, Any]:
        return {"agreement": 0.9}

    def generate(
        self, prompt: Any, params: Any = None, *, mode: str | None = None, raw: bool = False
    ) -> Result:
        mode = mode or self.mode
        self.calls.append((prompt, params, "raw" if raw else mode))
        tokens = params.max_new_tokens if params else 4
        speed = {"plain": 1.0, "speculative": 4.0}[mode]
        return result(mode, tokens, tok_s=speed, acceptance_length=speed, streamed_bytes=self.streamed_bytes)

    def stream(
        self, prompt: Any, params: Any = None, *, mode: str | None = None, raw: bool = False
    ) -> Iterator[Piece]:
        whole = self.generate(prompt, params, mode=mode, raw=raw)
        for token, word in zip(whole.token_ids, whole.text.split(), strict=True):
            yield Piece(word + " ", [token])
        yield Piece("", [], whole)
