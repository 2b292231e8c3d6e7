"""What a generation returns."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """How a text was made.

    Attributes:
        mode: ``plain`` or ``speculative``.
        new_tokens: tokens in the text.
        reused_tokens: prompt tokens whose keys and values were still there.
        prefill_s: seconds up to the first token; ``decode_s``: seconds after it.
        tok_s: tokens after the first, per second of decoding.
        acceptance_length: tokens committed per step, prefill not counted; 0 without steps.
        steps: draft–verify–commit rounds.
        sweeps: passes of the exact model, prefill included.
        streamed_bytes: bytes that came over the link while decoding.
        draft_s: seconds spent drafting before sweeps; ``verify_s``: in sweeps and walks; of those,
            ``wait_s``: waiting for the link, ``gap_s``: drafting meanwhile.
        wasted_s: seconds of draft passes whose guesses came to nothing; None for a fixed tree.
        link_s: seconds that the link was busy.
        accepted: accepted tokens of each step, the bonus token left out.
        drafted: nodes of each step's tree when its sweep began, the root included; ``verified``: of them,
            those in the sweep.
    """

    mode: str
    new_tokens: int
    reused_tokens: int
    prefill_s: float
    decode_s: float
    tok_s: float
    acceptance_length: float
    steps: int
    sweeps: int
    streamed_bytes: int
    draft_s: float
    verify_s: float
    wait_s: float
    gap_s: float
    wasted_s: float | None
    link_s: float
    accepted: list[int]
    drafted: list[int]
    verified: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for result files."""
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """A finished text.

    Attributes:
        text: without the stop string that ended it.
        token_ids: generated ids, an end token included.
        prompt_tokens: length of the prompt.
        finish_reason: ``eos``, ``stop`` (a stop string), ``length`` (max_new_tokens) or ``context`` (it is
        full).
        statistics: how it was made.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    statistics: Statistics


@dataclass(frozen=True)
class Piece:
    """A part of a text as it commits; ``result`` is set on the last one only."""

    text: str
    token_ids: list[int]
    result: Result | None = None
