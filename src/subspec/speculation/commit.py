"""What a step adds to a text."""

from dataclasses import dataclass

from subspec.memory.timeline import Timeline


@dataclass(frozen=True)
class Commit:
    """What one step (or the prefill) added to the text.

    Attributes:
        tokens: committed tokens in order; the last one has no entry in the cache yet.
        prefill: True for the first commit of a text.
        drafted: nodes in the tree when the sweep began, root included.
        verified: nodes that the sweep verified.
        draft_s: seconds spent drafting before the sweep; ``gap_s``: in its gaps.
        verify_s: seconds from the start of the sweep to the commit, its gaps included.
        wasted_s: seconds of draft passes whose guesses came to nothing, previews left out; None where nobody
            counts them.
    """

    tokens: list[int]
    prefill: bool
    drafted: int
    verified: int
    draft_s: float
    verify_s: float
    gap_s: float = 0.0
    wasted_s: float | None = None


def record_step(timeline: Timeline, commit: Commit, start_s: float, walked_s: float, end_s: float) -> None:
    """Put a step's parts on a timeline: it began at ``start_s``, its walk ended at ``walked_s``."""
    drafted_s = start_s + commit.draft_s
    timeline.span("steps", "draft", start_s, drafted_s, nodes=commit.drafted)
    timeline.span("steps", "verify", drafted_s, walked_s, nodes=commit.verified)
    timeline.span("steps", "commit", walked_s, end_s, tokens=len(commit.tokens))
    for name, value in ("drafted nodes", commit.drafted), ("committed tokens", len(commit.tokens)):
        timeline.counter(name, end_s, value)
