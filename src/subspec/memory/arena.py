"""Page-aligned memory that the engine holds, entered in its budget.

Private anonymous mappings: their start is aligned for O_DIRECT, and huge pages, which Linux seldom gives to
shared ones, keep the reads' and products' page walks short.  Pages count only once touched, huge ones whole.
The returned tensors are views; the mapping lives as long as they do.  A program must not fork while the
engine reads from disk: open(2), on O_DIRECT.
"""

import math
import mmap

import torch

from subspec.memory.exhausted import exhausted
from subspec.memory.tiers import MemoryBudget, page_aligned


class Arena:
    """Hands out memory against a ``MemoryBudget``; what does not fit is an error, never a surprise.

    Args:
        budget: the ledger.
        device: where the memory is; the CPU's is page-aligned.
    """

    def __init__(self, budget: MemoryBudget, device: torch.device | None = None) -> None:
        self.budget, self.device = budget, device or torch.device("cpu")

    def bytes(self, purpose: str, n_bytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of at least one page, its length rounded up to whole pages.

        Raises:
            BudgetError: the budget cannot hold it.
            DeviceMemoryError: the device cannot, although the budget can.
        """
        size = max(page_aligned(n_bytes), mmap.PAGESIZE)
        self.budget.take(purpose, size)
        with exhausted(self.budget):
            return place_bytes(size, self.device)

    def tensor(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor of ``shape``; raises as ``bytes`` does."""
        n_bytes = math.prod(shape) * dtype.itemsize
        return self.bytes(purpose, n_bytes)[:n_bytes].view(dtype).view(shape)


def place_bytes(n_bytes: int, device: torch.device) -> torch.Tensor:
    """A zeroed uint8 tensor on a device, outside any budget; on the CPU whole pages, page-aligned."""
    if device.type == "cpu":
        return map_bytes(page_aligned(n_bytes))
    return torch.zeros(n_bytes, dtype=torch.uint8, device=device)


def map_bytes(n_bytes: int) -> torch.Tensor:
    """An anonymous, page-aligned, zeroed uint8 tensor outside any budget (``n_bytes``: whole pages)."""
    mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
