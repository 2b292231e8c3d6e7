"""Page-aligned memory that the engine holds, entered in its budget.

Anonymous mappings: their start is aligned for O_DIRECT, their pages count only once touched, and huge pages
keep the reads' and products' page walks short.  The returned tensors are views; the mapping lives as long
as they do.
"""

import math
import mmap

import torch

from subspec.memory.tiers import MemoryBudget, page_aligned


class Arena:
    """Hands out memory against a ``MemoryBudget``; what does not fit is an error, never a surprise."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget

    def bytes(self, purpose: str, n_bytes: int) -> torch.Tensor:
        """A page-aligned uint8 tensor of at least one page, its length rounded up to whole pages.

        Raises:
            BudgetError: the budget cannot hold it.
        """
        size = max(page_aligned(n_bytes), mmap.PAGESIZE)
        self.budget.take(purpose, size)
        return map_bytes(size)

    def tensor(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor of ``shape``; raises as ``bytes`` does."""
        n_bytes = math.prod(shape) * dtype.itemsize
        return self.bytes(purpose, n_bytes)[:n_bytes].view(dtype).view(shape)


def map_bytes(n_bytes: int) -> torch.Tensor:
    """An anonymous, page-aligned, zeroed uint8 tensor outside any budget (``n_bytes``: whole pages)."""
    mapping = mmap.mmap(-1, n_bytes)
    if n_bytes >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
