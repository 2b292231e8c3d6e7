"""Print an answer as it is made, and one line about how: speed, acceptance, bytes streamed, memory."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspec.generation import LLM, Result


def print_answer(
    llm: "LLM", prompt: Any, params: Any, *, mode: str | None = None, raw: bool = False
) -> "Result":
    """Write the pieces to standard output as they come; return the whole."""
    result = None
    for piece in llm.stream(prompt, params, mode=mode, raw=raw):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        result = piece.result or result
    print(flush=True)
    assert result is not None, "the last piece carries the result"
    return result


def summary_line(result: "Result", budgets: str) -> str:
    """Tokens, tokens/s, acceptance length, bytes streamed, and the process's peak beside the budget."""
    from subspec.memory.tiers import format_size, peak_memory_bytes

    statistics = result.statistics
    parts = [f"{statistics.new_tokens} tokens", f"{statistics.tok_s:.2f} tok/s"]
    if statistics.mode != "plain":
        parts.append(f"acceptance length {statistics.acceptance_length:.1f}")
    parts.append(f"streamed {format_size(statistics.streamed_bytes)}")
    parts.append(f"prefill {statistics.prefill_s:.1f} s")
    parts.append(f"peak of the process {format_size(peak_memory_bytes())} (budget of the engine {budgets})")
    if result.finish_reason in ("length", "context"):
        parts.append(f"cut off by the {result.finish_reason} limit")
    return " · ".join(parts)
