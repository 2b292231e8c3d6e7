"""A device that runs out of memory: what held it, and what to lower, instead of an allocator's report.

The engine's budget keeps its own memory within bounds; this happens where other programs, fragments or a
library's workspace took more than was free when the budget was chosen.
"""

import contextlib
from collections.abc import Iterator

import torch

from subspec.errors import DeviceMemoryError
from subspec.memory.tiers import MIB, MemoryBudget, format_size


@contextlib.contextmanager
def exhausted(budget: MemoryBudget) -> Iterator[None]:
    """Explain a device's lack of memory by what the engine holds of it.

    What the allocator kept for later is given back to the device, so that the engine stays usable.

    Raises:
        DeviceMemoryError: the device had no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(explanation(budget, *_free_and_total_bytes())) from error


def explanation(budget: MemoryBudget, free_bytes: int | None, total_bytes: int | None) -> str:
    """What happened, the numbers, and the remedy.

    Args:
        budget: what the engine holds.
        free_bytes: of the device, if it says so; ``total_bytes``: likewise, its size.
        total_bytes: see ``free_bytes``.
    """
    held = ", ".join(
        f"{name.replace('_', ' ')} {format_size(size)}" for name, size in budget.held.items() if size
    )
    rest = ""
    if free_bytes is not None and total_bytes is not None:
        others = max(total_bytes - free_bytes - budget.held_bytes, 0)
        rest = (
            f"; of its {format_size(total_bytes)}, {format_size(others)} are with CUDA, fragments and other "
            f"programs, and {format_size(free_bytes)} are free"
        )
    lower = max(budget.total_bytes - max(512 * MIB, budget.total_bytes // 16), MIB)
    return (
        f"the device ran out of memory: the engine holds {format_size(budget.held_bytes)} ({held}){rest}: "
        f"lower {budget.option} from {format_size(budget.total_bytes)} to {format_size(lower)}, or lower "
        "--context, or close other programs that use the device"
    )


def _free_and_total_bytes() -> tuple[int | None, int | None]:
    """Of the current device, after what the allocator kept was given back; None where it does not say."""
    with contextlib.suppress(RuntimeError, AssertionError):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return free, total
    return None, None
