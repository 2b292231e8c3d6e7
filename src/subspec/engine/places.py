"""Where an engine's memory is, under its plan: near, where passes compute, and pinned behind a device.

Hands out every piece against the tier's budget.  Knows nothing of what is kept in them.
"""

import torch

from subspec.memory.arena import Arena
from subspec.memory.backend import Backend
from subspec.memory.exchange import Exchange
from subspec.memory.pinned import CudaRegistrar, PinnedArena
from subspec.memory.streamer import STAGING_BUFFERS, THREADS
from subspec.memory.tiers import MemoryBudget
from subspec.planning.plan import Plan
from subspec.store.reader import Store
from subspec.store.rows import EmbeddingRows
from subspec.store.table import EmbeddingTable

UNMAPPED = ("workspace", "scratch", "norms_biases")  # parts that are entered, and allocated by their users


class Places:
    """The tiers of one engine.

    Args:
        plan: what goes where.
        backend: has the device.

    Attributes:
        budget: of near memory; ``host_budget``: of RAM behind a device, or None.
        near: memory where passes compute; ``host``: pinned memory behind a device, or None.
    """

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self._plan, self._backend = plan, backend
        self.budget = MemoryBudget(plan.budget_bytes, "--vram" if plan.device_tier else "--memory")
        self.near = Arena(self.budget, backend.device)
        self.host_budget: MemoryBudget | None = None
        self.host: PinnedArena | None = None
        if plan.host_budget_bytes is not None:
            locks = backend.device.type == "cuda"
            self.host_budget = MemoryBudget(plan.host_budget_bytes, "--ram")
            self.host = PinnedArena(self.host_budget, CudaRegistrar() if locks else None)
        for purpose in UNMAPPED:
            if size := plan.parts.get(purpose, 0):
                self.budget.take(purpose, size)

    def slots(self) -> list[torch.Tensor]:
        """The slots that units stream through."""
        return [self.near.bytes("slots", self._plan.slot_bytes) for _ in range(self._plan.slots)]

    def embedding(self, store: Store, checksums: torch.Tensor) -> EmbeddingRows | EmbeddingTable:
        """Where rows of the input embedding are looked up."""
        if self.host is not None:
            return EmbeddingTable(store, self.host)
        return EmbeddingRows(store, checksums, self._plan.cache_rows, self.near)

    def staging(self) -> list[torch.Tensor]:
        """Pinned buffers that units from disk pass through on their way to a device; none without one."""
        size = self._plan.host_parts.get("staging", 0)
        if self.host is None or not size:
            return []
        return list(torch.split(self.host.bytes("staging", size), size // (THREADS * STAGING_BUFFERS)))

    def exchange(self) -> Exchange | None:
        """What host and device tell each other through; None where there is no device."""
        if self.host is None:
            return None
        up, down = (
            self.host.bytes(purpose, self._plan.host_parts[purpose]) for purpose in ("uploads", "results")
        )
        return Exchange(self._backend, up, down)

    def pin(self) -> None:
        """Lock what was handed out behind the device, and let that finish what was done to near memory.

        Raises:
            PinningError: the driver does not lock it.
        """
        if self.host is not None:
            self.host.pin()
        self._backend.settle()

    def close(self) -> None:
        """Unlock it."""
        if self.host is not None:
            self.host.close()
