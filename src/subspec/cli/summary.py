"""One line about a run, for people: how fast, how much was accepted and streamed, how much memory it took."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subspec.generation import Result


def summary_line(result: "Result", budget_bytes: int) -> str:
    """Tokens, tokens/s, acceptance length, bytes streamed, and the process's peak beside the budget."""
    from subspec.memory.tiers import format_size, peak_memory_bytes

    statistics = result.statistics
    parts = [f"{statistics.new_tokens} tokens", f"{statistics.tok_s:.2f} tok/s"]
    if statistics.mode != "plain":
        parts.append(f"acceptance length {statistics.acceptance_length:.1f}")
    parts.append(f"streamed {format_size(statistics.streamed_bytes)}")
    parts.append(f"prefill {statistics.prefill_s:.1f} s")
    parts.append(f"peak {format_size(peak_memory_bytes())} (budget {format_size(budget_bytes)})")
    if result.finish_reason in ("length", "context"):
        parts.append(f"cut off by the {result.finish_reason} limit")
    return " · ".join(parts)
