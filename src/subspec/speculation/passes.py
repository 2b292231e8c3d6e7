"""The model as an adaptive step sees it: passes that can be interleaved, and what they took."""

from collections.abc import Callable, Generator
from typing import Protocol

import torch

from subspec.models.decoder import Rows

Gap = Callable[[], bool]


class LinkClock(Protocol):
    """Running totals of the model's passes, in seconds and bytes."""

    @property
    def wait_s(self) -> float:
        """That sweeps waited for the link without anything to do."""
        ...

    @property
    def gap_s(self) -> float:
        """That sweeps spent in gaps, drafting."""
        ...

    @property
    def link_s(self) -> float:
        """That the link was busy."""
        ...

    @property
    def streamed_bytes(self) -> int:
        """Bytes that came over it."""
        ...


class AdaptivePasses(Protocol):
    """The model as an adaptive step sees it: passes that can be interleaved, and what they took."""

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """One sweep of the exact model: logits (T, V), or (1, V) of the last row.

        Calls ``gap`` again and again while the next unit is not there, until it says that it has nothing to
        do.
        """
        ...

    def draft_steps(self, rows: Rows, *, last_only: bool = False) -> Generator[None, None, torch.Tensor]:
        """A pass over substitutes: yields after each layer, returns logits (T, V), or the last row's."""
        ...

    @property
    def swept(self) -> float:
        """Share of the layers that the sweep under way has done."""
        ...

    def preview_steps(self, numbers: list[int], rows: Rows) -> Generator[None, None, torch.Tensor]:
        """A pass over rows ``numbers`` of the sweep under way from where it is, by substitutes: as a draft's.

        ``rows``: the same with slots of their own.
        """
        ...

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """Move cache slots ``sources`` to ``start`` and on; the last ``drafts`` of them are a draft's."""
        ...

    def counters(self) -> LinkClock:
        """Totals so far."""
        ...

    @property
    def sweep_bytes(self) -> tuple[int, int]:
        """Bytes that a sweep streams, and of those, how many fit the slots while no sweep runs."""
        ...
