"""Page-locked host memory: what a device copies from and to at the full speed of its link.

``PinnedArena`` hands memory out like ``Arena``; the caller fills it, with direct reads for example, and
``pin`` then locks all of it where it lies.  Torch's own ``pin_memory`` rounds sizes up to powers of two and
copies; this does neither.  The driver is met in ``CudaRegistrar`` alone; for a device whose memory is RAM
there is nothing to lock.  Knows nothing of what the bytes mean.
"""

import contextlib
import os
from typing import Protocol

import torch

from subspec.errors import PinningError
from subspec.memory.arena import Arena
from subspec.memory.tiers import MemoryBudget, format_size

PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context of the process
_SUCCESS = 0


class Registrar(Protocol):
    """Locks and unlocks pages for a device."""

    def register(self, address: int, n_bytes: int) -> int:
        """Lock whole pages; returns the driver's code, 0 for success."""
        ...

    def unregister(self, address: int) -> int:
        """Unlock what was registered at ``address``; returns the driver's code."""
        ...

    def meaning(self, code: int) -> str:
        """The driver's words for a code."""
        ...


class CudaRegistrar:
    """``cudaHostRegister`` and ``cudaHostUnregister``.  Touches the device."""

    def __init__(self) -> None:
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def register(self, address: int, n_bytes: int) -> int:
        """Lock pages; they count as pinned wherever torch asks."""
        return self._checked(self._runtime.cudaHostRegister(address, n_bytes, PORTABLE))

    def unregister(self, address: int) -> int:
        """Unlock; waits for copies that still use the pages."""
        return self._checked(self._runtime.cudaHostUnregister(address))

    def meaning(self, code: int) -> str:
        """The runtime's own text."""
        return str(self._runtime.cudaGetErrorString(self._runtime.cudaError(code)))

    def _checked(self, result: object) -> int:
        """The code of a result; a failure is also taken off the runtime.

        The runtime keeps the last failure until it is asked, and torch asks after its next kernel: an
        innocent one would raise.  So one is launched here for it.
        """
        code = int(result)  # type: ignore[call-overload]
        if code != _SUCCESS:
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
        return int(code)


class PinnedArena(Arena):
    """Hands out page-aligned host memory against a ``MemoryBudget``, and locks it once it is filled.

    Args:
        budget: of the host's memory.
        registrar: of the device that will copy; ``None`` where nothing needs locking.

    Attributes:
        pinned_bytes: locked at present.
    """

    def __init__(self, budget: MemoryBudget, registrar: Registrar | None = None) -> None:
        super().__init__(budget)
        self._registrar = registrar
        self._loose: list[torch.Tensor] = []  # handed out, not locked
        self._locked: list[torch.Tensor] = []  # held, so that no mapping goes while the driver knows it
        self.pinned_bytes = 0

    def bytes(self, purpose: str, n_bytes: int) -> torch.Tensor:
        """As ``Arena``'s: a page-aligned uint8 tensor, its length rounded up to whole pages.

        It is a region of its own, and must not be copied together with another one.

        Raises:
            BudgetError: the budget cannot hold it.
        """
        region = super().bytes(purpose, n_bytes)
        self._loose.append(region)
        return region

    def pin(self) -> None:
        """Lock what was handed out since the last call; all of it or, if the driver refuses, nothing.

        Raises:
            PinningError: the driver refused.  The memory stays usable by the host, as before.
        """
        if self._registrar is None:
            return
        before = len(self._locked)
        for region in self._loose:
            code = self._registrar.register(region.data_ptr(), len(region))
            if code != _SUCCESS:
                meaning = self._registrar.meaning(code)
                done_bytes = sum(map(len, self._locked[before:]))
                self._release(before)
                raise PinningError(self._refusal(done_bytes, len(region), code, meaning))
            self._locked.append(region)
            self.pinned_bytes += len(region)
        self._loose = []

    def close(self) -> None:
        """Unlock everything, once no copy runs any more; a second call does nothing."""
        self._release(0)
        self._loose = []

    def _release(self, kept: int) -> None:
        """Unlock all but the first ``kept`` regions.  A driver that refuses is left with its own."""
        while len(self._locked) > kept:
            assert self._registrar is not None
            region = self._locked.pop()
            self._registrar.unregister(region.data_ptr())
            self.pinned_bytes -= len(region)

    def _refusal(self, done_bytes: int, n_bytes: int, code: int, meaning: str) -> str:
        """What was wanted, what the driver said, and what to do."""
        wanted = sum(map(len, self._loose))
        total = self.budget.total_bytes
        return (
            f"pinning {format_size(wanted)} of host memory failed after {format_size(done_bytes)}, at a "
            f"region of {format_size(n_bytes)}: the driver returned {code} ({meaning}). {_limit()}: lower "
            f"--ram from {format_size(total)} to at most {format_size(total - wanted + done_bytes)}"
        )


def _limit() -> str:
    """What bounds pinned memory here; the driver does not look at ``ulimit -l``."""
    if "microsoft" in os.uname().release.lower():
        return "Windows lets WSL pin about half of the machine's memory"
    return (
        "The memory that is free, and a container's limit on it, bound what can be pinned; ulimit -l does not"
    )
