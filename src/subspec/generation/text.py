"""Tokens to text, piece by piece, with stop strings."""

from typing import Any

from tokenizers.decoders import DecodeStream


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
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
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
        """The text that a token completes."""
        try:
            return self._decoder.step(self._backend, token) or ""
        except Exception:  # noqa: BLE001 - the library's own class; bytes that are no text end a run of them
            self._decoder = DecodeStream(skip_special_tokens=True)
            return self._decoder.step(self._backend, token) or ""

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
