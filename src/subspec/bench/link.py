"""Measure the link that layers stream over: direct reads of the store's own files, a little at a time.

A disk's speed drifts, and so it is measured before, between and after the runs that are judged by it.  A
disk or a limit that was idle for a moment may run ahead of its lasting speed: each round begins with reads
that do not count.  The candidate found fastest is then read with again for longer, and only that counts: of
nine noisy figures the best says more than the disk can keep up.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CANDIDATES = tuple(itertools.product((1, 2, 4), (4 << 20, 8 << 20, 16 << 20)))
BYTES_EACH = 768 << 20
SETTLE_S = 0.2
WARM_UP_BYTES = 512 << 20
LASTING_READS = 3
LASTING_FACTOR = 2  # a lasting read is so much longer than a candidate's
IMAGE_SUFFIXES = (".exact", ".residual")

Reader = Callable[[Sequence[Path], int, int, int], Any]


def image_files(store: Path) -> list[Path]:
    """The files of a store, or of a directory of stores, that are streamed from, in name order."""
    return sorted(path for path in store.rglob("*") if path.suffix in IMAGE_SUFFIXES)


class LinkMeter:
    """Reads the store with 1, 2 and 4 threads in requests of 4, 8 and 16 MiB: nine candidates, in turn.

    Attributes:
        measurements: every raw measurement, in order.
    """

    def __init__(
        self,
        store: Path,
        *,
        bytes_each: int = BYTES_EACH,
        settle_s: float = SETTLE_S,
        read: Reader | None = None,
    ) -> None:
        self._paths = image_files(store)
        self._total_bytes = min(bytes_each, sum(path.stat().st_size for path in self._paths))
        self._settle_s = settle_s
        self._read = read
        self._turn = itertools.cycle(CANDIDATES)
        self.measurements: list[dict[str, Any]] = []

    @property
    def lasting_bytes_per_s(self) -> float | None:
        """Median of the lasting reads of the best candidate; ``None`` before the first such read."""
        return max(self._medians([one for one in self.measurements if one["lasting"]]).values(), default=None)

    def measure_all(self) -> None:
        """Measure every candidate once, then the best one's lasting speed."""
        if self._begin():
            self._read_candidates(len(CANDIDATES))
            self._read_lasting(LASTING_READS)

    def measure(self, count: int) -> None:
        """Measure the next ``count`` candidates, going round."""
        if self._begin():
            self._read_candidates(count)

    def measure_lasting(self, count: int) -> None:
        """Measure the candidate with the best median so far ``count`` times, for longer.

        Raises:
            ValueError: no candidate was measured yet.
        """
        if self._begin():
            self._read_lasting(count)

    def _begin(self) -> bool:
        """Reads that do not count; False if there is nothing to read."""
        if not self._paths:
            return False
        if self._read is None:
            from subspec.memory.disk import measure_read

            self._read = measure_read
        time.sleep(self._settle_s)  # what the engine had begun to prefetch arrives first
        self._read(self._paths, *CANDIDATES[-1], min(WARM_UP_BYTES, 4 * self._total_bytes))
        return True

    def _read_candidates(self, count: int) -> None:
        for _ in range(count):
            self._measure(next(self._turn), self._total_bytes, lasting=False)

    def _read_lasting(self, count: int) -> None:
        medians = self._medians(self.measurements)  # lasting reads too, so that luck does not last
        best = max(medians, key=lambda candidate: medians[candidate])
        for _ in range(count):
            self._measure(best, LASTING_FACTOR * self._total_bytes, lasting=True)

    def _measure(self, candidate: tuple[int, int], total_bytes: int, *, lasting: bool) -> None:
        """Read ``total_bytes`` with a candidate."""
        assert self._read is not None
        threads, request_bytes = candidate
        speed = self._read(self._paths, threads, request_bytes, total_bytes)
        self.measurements.append(
            {
                "threads": threads,
                "request_bytes": request_bytes,
                "total_bytes": total_bytes,
                "lasting": lasting,
                "bytes_per_s": speed.bytes_per_s,
                "direct": speed.direct,
            }
        )

    @staticmethod
    def _medians(measurements: Sequence[dict[str, Any]]) -> dict[tuple[int, int], float]:
        """Median bytes/s of each candidate in some measurements."""
        speeds: dict[tuple[int, int], list[float]] = {}
        for one in measurements:
            speeds.setdefault((one["threads"], one["request_bytes"]), []).append(one["bytes_per_s"])
        return {candidate: statistics.median(found) for candidate, found in speeds.items()}
