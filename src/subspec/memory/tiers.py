"""Sizes and limits of the places that hold bytes: plain numbers, no torch.

The planner works with these; the command line parses and prints them.
"""

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from subspec.errors import BudgetError, OptionError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_BYTES = 4096
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


@dataclass(frozen=True)
class Tier:
    """A place for bytes: ``"ram"``, ``"vram"`` or ``"disk"``, with what may be used of it."""

    name: str
    capacity_bytes: int


@dataclass(frozen=True)
class Link:
    """The path between two tiers, with its measured bandwidth."""

    source: str
    target: str
    bytes_per_s: float

    def seconds(self, n_bytes: int) -> float:
        """Time that moving ``n_bytes`` takes at the link's bandwidth."""
        return n_bytes / self.bytes_per_s


class MemoryBudget:
    """A ledger of what the engine holds in one tier, by purpose; refuses what would exceed the budget.

    Args:
        total_bytes: the budget.
        option: what raises it, for messages: ``--memory``, ``--vram`` or ``--ram``.
    """

    def __init__(self, total_bytes: int, option: str = "--memory") -> None:
        self.total_bytes, self.option = total_bytes, option
        self.held: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes taken so far, over all purposes."""
        return sum(self.held.values())

    def take(self, purpose: str, n_bytes: int) -> None:
        """Enter ``n_bytes`` under ``purpose``.

        Raises:
            BudgetError: the sum would exceed the budget; nothing is entered.
        """
        if self.held_bytes + n_bytes > self.total_bytes:
            raise BudgetError(
                f"{purpose} needs {format_size(n_bytes)}; {format_size(self.held_bytes)} of the budget of "
                f"{format_size(self.total_bytes)} is taken: raise {self.option}"
            )
        self.held[purpose] = self.held.get(purpose, 0) + n_bytes


def page_aligned(n_bytes: int) -> int:
    """``n_bytes`` rounded up to whole 4 KiB pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``"1.5GiB"``, ``"500 MB"`` or a plain number of bytes.

    Raises:
        OptionError: not a size, or not positive.
    """
    if isinstance(text, float):
        raise OptionError(f'{text!r} is no number of bytes: write for example "1.5GiB", or 2000000000')
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    factor = _UNITS.get(match.group(2).upper()) if match else None
    size = float(match.group(1)) * factor if match is not None and factor is not None else 0.0
    if not 1 <= size < 1 << 60:
        raise OptionError(f"{text!r} is not a size: write for example 1.5GiB, 800MiB or 2000000000")
    return round(size)


def format_size(n_bytes: float) -> str:
    """A size for people, in binary units: ``"1.50GiB"``; ``parse_size`` reads it back."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f}{unit}"
    return f"{int(n_bytes)}B"


def peak_memory_bytes() -> int:
    """The process's high-water mark of resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "linux":
        return peak
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # unlike ru_maxrss it is not inherited across exec
            return int(line.split()[1]) * KIB
    return peak * KIB


def memory_limits() -> dict[str, int | None]:
    """What bounds this process, each in bytes or None where there is no limit."""
    meminfo = Path("/proc/meminfo")
    rows = {}
    if meminfo.exists():
        rows = {
            line.partition(":")[0]: int(line.split()[1]) * KIB for line in meminfo.read_text().splitlines()
        }
    total, available = rows.get("MemTotal"), rows.get("MemAvailable")
    limit = _cgroup_limit()
    if limit is not None and total is not None and limit >= total:
        limit = None
    return {"total_bytes": total, "available_bytes": available, "cgroup_limit_bytes": limit}


def free_memory_bytes() -> int | None:
    """Memory that this process may still use, as far as the system says; None if it does not."""
    limits = memory_limits()
    known = [size for size in (limits["available_bytes"], limits["cgroup_limit_bytes"]) if size is not None]
    return min(known, default=None)


def default_memory(free_bytes: int | None) -> int:
    """The budget of ``--memory auto``: 70 % of what is free, less 600 MiB for interpreter and libraries.

    Raises:
        OptionError: nobody knows how much is free.
    """
    return max(int(0.7 * _known(free_bytes, "--memory")) - 600 * MIB, 64 * MIB)


def default_ram(free_bytes: int | None) -> int:
    """The budget of ``--ram auto``: like ``--memory``'s, but never above 60 % of what is free.

    What it holds is pinned, and can neither be swapped nor dropped: the rest of the machine needs its share.

    Raises:
        OptionError: nobody knows how much is free.
    """
    free = _known(free_bytes, "--ram")
    return min(default_memory(free), int(0.6 * free))


def default_vram(free_bytes: int, total_bytes: int) -> int:
    """The budget of ``--vram auto``: what is free, less 600 MiB or 5 % of all for CUDA and for fragments."""
    return max(free_bytes - max(600 * MIB, total_bytes // 20), 0)


def default_budget() -> int:
    """``default_memory`` of this machine; raises as it does."""
    return default_memory(free_memory_bytes())


def _known(free_bytes: int | None, option: str) -> int:
    """What is free, or an error that asks for the option."""
    if free_bytes is None:
        raise OptionError(
            f"this system does not say how much memory is free: give {option}, for example {option} 4GiB"
        )
    return free_bytes


def _cgroup_limit() -> int | None:
    """The memory limit of this process's control group (version 1 or 2), if it has one."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.append(Path("/sys/fs/cgroup/memory" + path, "memory.limit_in_bytes"))
        elif not controllers:
            found += [
                Path(root + path, "memory.max") for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
            ]
    limits = [text for file in found if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(map(int, limits), default=None)
