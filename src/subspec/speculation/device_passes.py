"""The model as steps on a device see it: all is launched, and an exchange carries what the host knows."""

from collections.abc import Callable, Generator
from typing import Protocol

import torch

from subspec.memory.exchange import Exchange
from subspec.models.decoder import Rows


class Totals(Protocol):
    """Running totals of passes, in seconds."""

    @property
    def wait_s(self) -> float:
        """That sweeps waited for the link without anything to do."""
        ...

    @property
    def gap_s(self) -> float:
        """That sweeps spent in gaps, drafting."""
        ...


class DevicePasses(Protocol):
    """The model as a step on a device sees it.  Everything is launched, in the order of the calls."""

    exchange: Exchange | None

    def target(self, rows: Rows, *, last_only: bool, gap: Callable[[], bool] | None = None) -> torch.Tensor:
        """One sweep over rows on the device: logits (T, V) there.

        Calls ``gap`` again and again while the next unit is not there, until it says that it has nothing to
        do.
        """
        ...

    def draft_steps(self, rows: Rows) -> Generator[None, None, torch.Tensor]:
        """One pass over substitutes: yields after each layer, returns logits (T, V) on the device."""
        ...

    def capture_level(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        """Make ``draft_level`` of a key cheap: if the key is new, the pass may run some times.

        Args:
            rows: the same tensors for the same key, whatever is in them.
            then: computes in place with what lies at fixed addresses; does the same thing for the same key.
            key: of what is captured once and replayed.
        """
        ...

    def draft_level(self, key: object) -> None:
        """The whole draft pass that was captured under a key, and its ``then`` with the logits."""
        ...

    def run(self, work: Callable[[], object], note: str) -> None:
        """Launch ``work``, which computes in place on the device."""
        ...

    def relocate(self, sources: list[int], targets: list[int], drafts: int = 0) -> None:
        """Move each cache slot to its target; the last ``drafts`` of the sources are a draft's."""
        ...

    def counters(self) -> Totals:
        """Totals so far."""
        ...
