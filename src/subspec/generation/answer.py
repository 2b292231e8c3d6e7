"""An answer as it grows by committed tokens, and what ends it."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from subspec.generation.results import Result, Statistics
from subspec.generation.text import TextStream
from subspec.speculation.sampling import SamplingParams


@dataclass
class Answer:
    """The text under way.

    Attributes:
        tokenizer: the transformers tokenizer, or None.
        ends: tokens that end the text.
        prompt: token ids.
        params: what else ends the text.
        limit: most tokens that there is room for.
        token_ids: so far; ``finish_reason``: what ended it, or nothing.
    """

    tokenizer: Any
    ends: Collection[int]
    prompt: list[int]
    params: SamplingParams
    limit: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self._text = TextStream(self.tokenizer, self.params.stop)

    def take(self, tokens: list[int]) -> tuple[str, list[int]]:
        """Add committed tokens up to what ends the text; returns what they add."""
        text, taken = "", []
        for token in tokens:
            taken.append(token)
            self.token_ids.append(token)
            text += self._text.feed(token)
            if token in self.ends:
                self.finish_reason = "eos"
            elif self._text.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.limit:
                self.finish_reason = "length" if self.limit == self.params.max_new_tokens else "context"
            if self.finish_reason:
                break
        return text, taken

    def finish(self) -> str:
        """Text that was held back until the end."""
        return self._text.finish()

    def result(self, statistics: Statistics) -> Result:
        """The finished text."""
        return Result(self._text.text, self.token_ids, len(self.prompt), self.finish_reason, statistics)
