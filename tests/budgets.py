"""How little memory a store can be run in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspec.errors import BudgetError
from subspec.planning.hardware import stored_images
from subspec.planning.plan import Plan, Request, make_plan
from subspec.store.reader import Store

PLENTY = 1 << 30


def least_budget(store: Path, **wishes: Any) -> tuple[int, int]:
    """The least budget, to the byte, that the planner takes for a store, and the largest unit it streams."""
    opened = Store(store)
    least = _least(lambda budget: _plan(opened, Request(budget, **wishes)))
    unit = max(path.stat().st_size for path in opened.images())
    opened.close()
    return least, unit


def least_device_budgets(store: Path, **wishes: Any) -> tuple[int, int, int]:
    """The least VRAM for a store, the least RAM behind that, and the largest unit that streams."""
    vram, unit = least_budget(store, **wishes, host_bytes=PLENTY)
    opened = Store(store)
    ram = _least(lambda budget: _plan(opened, Request(vram, **wishes, host_bytes=budget)))
    opened.close()
    return vram, ram, unit


def device_plan(store: Path, vram: int, ram: int, **wishes: Any) -> Plan:
    """The plan for a store on a device."""
    opened = Store(store)
    made = _plan(opened, Request(vram, **wishes, host_bytes=ram))
    opened.close()
    return made


def _plan(store: Store, request: Request) -> Plan:
    """The plan for a request."""
    small = store.manifest.files["small.safetensors"].n_bytes
    return make_plan(store.config, store.dtype.itemsize, small, request, stored_images(store))


def _least(planned: Callable[[int], Plan]) -> int:
    """The least budget, to the byte, that can be planned."""
    low, high = 0, PLENTY
    while high - low > 1:
        middle = (low + high) // 2
        try:
            planned(middle)
            high = middle
        except BudgetError:
            low = middle
    return high
