"""Images on their way from a store to where they stay: near memory, or pinned memory behind a device.

Files are read by a few threads, straight into host memory; what lies on a device gets a copy.  Units that
stay as plain weights are rebuilt from their residuals by the processor.  Knows nothing of products.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from subspec.engine.places import Places
from subspec.memory.arena import map_bytes
from subspec.store.exact import exact_bytes, rebuild
from subspec.store.reader import Store
from subspec.substitute.images import plain_matrices
from subspec.substitute.layout import Placed

Progress = Callable[[str, int, int], None]
THREADS = 2


@dataclass(frozen=True)
class Kept:
    """A unit that stays.

    Attributes:
        name: of its image; ``matrices``: in it; ``tiles``: their substitutes.
        plain: whether it stays as plain weights; ``load``: reads and rebuilds these (n, k) in host memory.
    """

    name: str
    matrices: Sequence[Placed]
    tiles: torch.Tensor
    plain: bool
    load: Callable[[], list[torch.Tensor]]


class Loader:
    """Reads what stays.

    Args:
        store: has it.
        places: where it goes.
        unused: near memory for one image that is not in use yet, or None.
        progress: called with (task, done, total).
    """

    def __init__(
        self, store: Store, places: Places, unused: torch.Tensor | None, progress: Progress | None
    ) -> None:
        self._store, self._near, self._host = store, places.near, places.host
        self._unused, self._progress = unused, progress

    def load(self, task: str, jobs: list[tuple[str, torch.Tensor]]) -> None:
        """Load images by name into near memory."""
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(jobs), THREADS):
                some = jobs[start : start + THREADS]
                images = pool.map(lambda job: self._read(*job), some)
                for (_, target), image in zip(some, images, strict=True):
                    if image is not target:
                        target[: len(image)].copy_(image)
                self._report(task, min(start + THREADS, len(jobs)), len(jobs))

    def resident(self, kept: Sequence[Kept]) -> dict[str, torch.Tensor]:
        """Load the units that stay in near memory, and rebuild those that stay as plain weights; by name."""
        if not kept:
            return {}
        records = self._store.manifest.files
        sizes = [
            exact_bytes(self._store, one.matrices) if one.plain else records[one.name].n_bytes for one in kept
        ]
        memory = torch.split(self._near.bytes("resident", sum(sizes)), sizes)
        places = {one.name: place for one, place in zip(kept, memory, strict=True)}
        rebuilt = [one for one in kept if one.plain and self._store.form == "residual"]
        for done, one in enumerate(rebuilt, start=1):
            self._rebuild(one, places[one.name])
            self._report("rebuilding resident layers", done, len(rebuilt))
        ready = {one.name for one in rebuilt}
        self.load("loading resident layers", [job for job in places.items() if job[0] not in ready])
        return places

    def behind(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Load images into pinned memory behind a device; by name."""
        if self._host is None or not names:
            return {}
        sizes = [self._store.manifest.files[name].n_bytes for name in names]
        memory = torch.split(self._host.bytes("images", sum(sizes)), sizes)
        jobs = list(zip(names, memory, strict=True))
        with ThreadPoolExecutor(THREADS) as pool:
            for done, _ in enumerate(pool.map(lambda job: self._store.load(*job), jobs), start=1):
                self._report("loading host memory", done, len(jobs))
        return dict(jobs)

    def _rebuild(self, one: Kept, place: torch.Tensor) -> None:
        """Rebuild a unit's plain weights, wherever they go."""
        if self._host is not None:  # its substitutes are out of the processor's reach
            weights = plain_matrices(place, one.matrices, self._store.dtype)
            for weight, rebuilt in zip(weights, one.load(), strict=True):
                weight.copy_(rebuilt)
            return
        n_bytes = self._store.manifest.files[one.name].n_bytes
        image = map_bytes(n_bytes) if self._unused is None else self._unused[:n_bytes]
        self._store.load(one.name, image)
        rebuild(self._store, image, one.tiles, one.matrices, place)

    def _read(self, name: str, target: torch.Tensor) -> torch.Tensor:
        """Read an image into ``target`` and return it, or into new memory where files do not reach that."""
        image = target if self._host is None else map_bytes(self._store.manifest.files[name].n_bytes)
        self._store.load(name, image)
        return image

    def _report(self, task: str, done: int, total: int) -> None:
        """Tell whoever asked how far it is."""
        if self._progress is not None:
            self._progress(task, done, total)
