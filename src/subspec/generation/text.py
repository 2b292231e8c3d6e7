"""Tokens to text, piece by piece, with stop strings."""

from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of half a character


class TextStream:
    """Text of one answer as its tokens arrive.

    Never emits half a character, nor text that may be the beginning of a stop string.

    Args:
        tokenizer: a transformers tokenizer, or None (then the text stays empty).
        stop: strings that end the text; they are left out of it.

    Attributes:
        text: everything emitted so far.
        stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._backend: Any = None if tokenizer is None else tokenizer.backend_tokenizer
        self._ids: list[int] = []
        self._from = self._shown = 0  # ids from where on are decoded again; ids whose text was shown
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take one token; returns what may be shown now."""
        if self._backend is None or self.stopped:
            return ""
        self._held += self._decode(token)
        ends = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if ends:
            self.stopped = True
            return self._emit(min(ends))
        return self._emit(len(self._held) - self._partial_stop())

    def finish(self) -> str:
        """The text ends here: what was held back may be shown."""
        return "" if self.stopped else self._emit(len(self._held))

    def _decode(self, token: int) -> str:
        """The text that a token completes.

        Decodes again what was shown last together with what came since, so that spaces between words and
        characters of several tokens come out as in the whole text.
        """
        self._ids.append(token)
        before = self._backend.decode(self._ids[self._from : self._shown], skip_special_tokens=True)
        text = self._backend.decode(self._ids[self._from :], skip_special_tokens=True)
        if len(text) <= len(before) or text.endswith(INCOMPLETE):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return str(text[len(before) :])

    def _emit(self, count: int) -> str:
        """Move the first ``count`` held characters to the text."""
        shown, self._held = self._held[:count], self._held[count:]
        self.text += shown
        return shown

    def _partial_stop(self) -> int:
        """How many held characters, at the end, begin a stop string."""
        longest = 0
        for word in self._stop:
            for size in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:size]):
                    longest = size
                    break
        return longest
