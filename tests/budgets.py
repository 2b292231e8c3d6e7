"""How little memory a store can be run in."""

from pathlib import Path
from typing import Any

from subspec.errors import BudgetError
from subspec.planning.hardware import stored_images
from subspec.planning.plan import Request, make_plan
from subspec.store.reader import Store


def least_budget(store: Path, **wishes: Any) -> tuple[int, int]:
    """The least budget, to the byte, that the planner takes for a store, and the largest unit it streams."""
    opened = Store(store)
    small, low, high = opened.manifest.files["small.safetensors"].n_bytes, 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            request = Request(middle, **wishes)
            make_plan(opened.config, opened.dtype.itemsize, small, request, stored_images(opened))
            high = middle
        except BudgetError:
            low = middle
    unit = max(path.stat().st_size for path in opened.images())
    opened.close()
    return high, unit
