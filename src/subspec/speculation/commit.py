"""What a step adds to a text."""

from dataclasses import dataclass


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
        wasted_s: seconds of draft passes whose guesses came to nothing; None where nobody counts them.
    """

    tokens: list[int]
    prefill: bool
    drafted: int
    verified: int
    draft_s: float
    verify_s: float
    gap_s: float = 0.0
    wasted_s: float | None = None
