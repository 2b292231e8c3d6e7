"""An engine behind a device as the host sees it: rows go up, logits come back, one wait a pass.

For prompts and plain steps, which have nothing to do while they wait.  Trees grow on the device
(``speculation.ahead``) without it.
"""

from typing import Protocol

import torch

from subspec.memory.exchange import Exchange
from subspec.memory.schedule import Gap
from subspec.models.decoder import Rows


class DeviceEngine(Protocol):
    """What the view needs of an engine."""

    exchange: Exchange | None

    def upload(self, rows: Rows) -> Rows:
        """The same rows where passes compute."""
        ...

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        """A sweep: logits on the device."""
        ...

    def draft(self, rows: Rows) -> torch.Tensor:
        """A draft pass: logits on the device."""
        ...

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        """Move cache slots."""
        ...


class HostView:
    """Passes whose rows and logits are on the host; see ``speculation.decode.OnHost``.

    Attributes:
        device: the engine itself.
    """

    def __init__(self, engine: DeviceEngine) -> None:
        self.device = engine

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        """One sweep: logits (T, V), or (1, V) of the last row, on the host."""
        return self._read(self.device.target(self.device.upload(rows), last_only=last_only))

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V) on the host."""
        return self._read(self.device.draft(self.device.upload(rows)))

    def move(self, sources: list[int], start: int) -> None:
        """Move cache slots ``sources`` to ``start`` and on."""
        self.device.move(sources, start)

    def _read(self, logits: torch.Tensor) -> torch.Tensor:
        """Wait for logits."""
        assert self.device.exchange is not None
        return self.device.exchange.read(logits)
