"""Steps on a device whose host runs ahead: the tree grows there, and the host waits for it once a step.

Each step uploads the root, launches draft passes that grow the tree level by level, lets the device choose
the likeliest nodes, launches the sweep that verifies them, and then reads one summary: the tree, the
target's token after each verified node, and what the calibration learns from.  Whether another level pays is
decided a level late, from the reach of a level that came back while the next one was under way.  While a
unit of the sweep is not there yet, further levels are drafted below the last one, a layer at a time; what
survives the walk is replanted as the next step's tree.

Plain tensors and numbers: nothing here knows of streams, tiers or kernels.
"""

from collections.abc import Callable, Generator
from typing import Protocol

import torch

from subspec.memory.exchange import Exchange
from subspec.memory.schedule import Gap
from subspec.models.decoder import Rows


class DevicePasses(Protocol):
    """The model as a step on a device sees it.  Everything is launched, in the order of the calls."""

    exchange: Exchange | None

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """One sweep over rows on the device: logits (T, V) there.

        Calls ``gap`` again and again while the next unit is not there, until it says that it has nothing to
        do.
        """
        ...

    def draft_steps(self, rows: Rows) -> Generator[None, None, torch.Tensor]:
        """One pass over substitutes: yields after each layer, returns logits (T, V) on the device."""
        ...

    def draft_level(self, rows: Rows, then: Callable[[torch.Tensor], object]) -> None:
        """A whole draft pass, and ``then`` with its logits; ``rows`` and ``then`` are the same objects each time."""
        ...

    def run(self, work: Callable[[], object], note: str) -> None:
        """Launch ``work``, which computes in place on the device."""
        ...

    def relocate(self, sources: list[int], targets: list[int], drafts: int = 0) -> None:
        """Move each cache slot of ``sources`` to its one of ``targets``; the last ``drafts`` are a draft's."""
        ...
