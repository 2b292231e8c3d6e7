"""A drafter behind a device that says what the target says."""

from collections.abc import Sequence

import torch
from device_drafters import DeviceDrafter
from drafters import always

from subspec.engine import Engine
from subspec.models.decoder import Rows
from subspec.speculation.ahead import Ahead
from subspec.speculation.sampling import SamplingParams


class Faithful(DeviceDrafter):
    """Along the plain text it says what the target says: only noise, penalty and filters can make it miss.

    Args:
        engine, ahead, text, params, seed: a ``DeviceDrafter``'s.
        said: the target's logits (n, V), which gave the last n tokens of the text.
    """

    def __init__(
        self,
        engine: Engine,
        ahead: Ahead,
        text: Sequence[int],
        params: SamplingParams,
        seed: int,
        said: torch.Tensor,
    ) -> None:
        super().__init__(engine, ahead, text, always, params, seed)
        self._said = dict(zip(list(self._right)[-len(said) :], said, strict=True))

    def _row(self, text: int | None) -> torch.Tensor:
        known = None if text is None else self._said.get(text)
        return super()._row(text) if known is None else known


class Recorder:
    """Passes without a tree, which keep what the target says of a text.

    Attributes:
        said: logits (V,) of each token.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.said: list[torch.Tensor] = []

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        logits = self._engine.target(rows, last_only=last_only)
        self.said.append(logits[-1].clone())
        return logits

    def draft(self, rows: Rows) -> torch.Tensor:
        return self._engine.draft(rows)

    def move(self, sources: list[int], start: int) -> None:
        self._engine.move(sources, start)
