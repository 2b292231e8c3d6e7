"""What a sweep costs, and which units to keep so that it costs least: arithmetic, no torch.

A *unit* is what is streamed whole: a layer, or a chunk of the output head.  Units that stay are *resident* in
the fast tier; behind a device, units that do not may *rest* in RAM, and only the others come from disk.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Images:
    """Sizes of a store's units, in bytes, as they are streamed and as plain weights.

    Attributes:
        layers: each layer's image; ``chunks``: each head chunk's.
        plain_layer: a layer's plain weights; ``plain_chunks``: each head chunk's.
        rebuilt: whether images hold residuals, from which weights are rebuilt.
        scratch: what rebuilding weights takes beside them.
    """

    layers: tuple[int, ...]
    chunks: tuple[int, ...]
    plain_layer: int
    plain_chunks: tuple[int, ...]
    rebuilt: bool = False
    scratch: int = 0

    @property
    def plain_bytes(self) -> int:
        """Of all units as plain weights."""
        return self.plain_bytes_of(len(self.layers), len(self.chunks))

    def plain_bytes_of(self, layers: int, chunks: int) -> int:
        """Of some layers, and of the first chunks, as plain weights."""
        return layers * self.plain_layer + sum(self.plain_chunks[:chunks])


EXPECTED_ROWS = 16  # that a speculative sweep verifies, where a row must be worth its products


@dataclass(frozen=True)
class SweepCosts:
    """Measured costs of a sweep's parts; the defaults let the link alone count, and plain weights be faster.

    Attributes:
        link_bytes_per_s: of the link that units stream over.
        plain_s_per_byte: of one row's products, per byte of plain weights they are the products of.
        rebuilt_s_per_byte: the same where the weights are rebuilt from residuals first.
        row_s_per_byte: of a further row's products, per byte of plain weights, in either form.
        disk_bytes_per_s: behind a device, of the disk that the units which do not rest in RAM come from.
    """

    link_bytes_per_s: float = 1.0
    plain_s_per_byte: float = 0.0
    rebuilt_s_per_byte: float = 1e-15
    row_s_per_byte: float = 0.0
    disk_bytes_per_s: float = math.inf

    def sweep_s(
        self, streamed_bytes: int, plain_bytes: int, rebuilt_bytes: int, disk_bytes: int = 0
    ) -> float:
        """Seconds of a sweep with ``EXPECTED_ROWS`` rows: link, disk or computing, whichever takes longest.

        Args:
            streamed_bytes: that pass through the slots.
            plain_bytes: of plain weights that are multiplied as they are.
            rebuilt_bytes: of those that are rebuilt first.
            disk_bytes: of the streamed ones, those that come from disk first, to a device.
        """
        computing_s = plain_bytes * self.plain_s_per_byte + rebuilt_bytes * self.rebuilt_s_per_byte
        computing_s += (EXPECTED_ROWS - 1) * (plain_bytes + rebuilt_bytes) * self.row_s_per_byte
        disk_s = disk_bytes / self.disk_bytes_per_s
        return max(streamed_bytes / self.link_bytes_per_s, disk_s, computing_s)


@dataclass(frozen=True)
class Residents:
    """Which units stay, and which of them as plain weights: layers by number, chunks from the first on."""

    layers: tuple[int, ...]
    chunks: int
    plain_layers: tuple[int, ...]
    plain_chunks: int

    def held_bytes(self, images: Images) -> int:
        """Bytes of what stays."""
        rebuilt = sum(images.layers[index] for index in set(self.layers).difference(self.plain_layers))
        rebuilt += sum(images.chunks[self.plain_chunks : self.chunks])
        return rebuilt + images.plain_bytes_of(len(self.plain_layers), self.plain_chunks)

    def streamed_bytes(self, images: Images) -> int:
        """Bytes that a sweep streams."""
        kept = sum(images.layers[index] for index in self.layers) + sum(images.chunks[: self.chunks])
        return sum(images.layers) + sum(images.chunks) - kept

    def sweep_s(self, images: Images, costs: SweepCosts, host_bytes: int | None = None) -> float:
        """Seconds of a sweep, as ``SweepCosts`` has it.

        Args:
            images: the units.
            costs: of a sweep's parts.
            host_bytes: behind a device, RAM for images, filled to the byte; None: there is no device.
        """
        plain = images.plain_bytes_of(len(self.plain_layers), self.plain_chunks)
        if not images.rebuilt:
            plain = images.plain_bytes
        streamed = self.streamed_bytes(images)
        disk = 0 if host_bytes is None else max(streamed - host_bytes, 0)
        return costs.sweep_s(streamed, plain, images.plain_bytes - plain, disk)


@dataclass(frozen=True)
class Resting:
    """Which of the streamed units rest in RAM behind a device: layers and chunks by number."""

    layers: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()

    def held_bytes(self, images: Images) -> int:
        """Bytes of what rests."""
        layers = sum(images.layers[index] for index in self.layers)
        return layers + sum(images.chunks[index] for index in self.chunks)


def choose_resting(images: Images, residents: Residents, room_bytes: int) -> Resting:
    """The streamed units that rest in RAM: as many bytes as fit, evenly spread over a sweep.

    Spread, so that a unit from disk is read while copies of units from RAM keep the link busy.

    Args:
        images: the units.
        residents: those that are not streamed.
        room_bytes: of RAM, for images.
    """
    layers, kept = len(images.layers), set(residents.layers)
    streamed = [index for index in range(layers) if index not in kept]
    streamed += range(layers + residents.chunks, layers + len(images.chunks))  # numbered on, in sweep order
    sizes = images.layers + images.chunks
    best: list[int] = []
    best_bytes = 0
    for count in range(
        1, len(streamed) + 1
    ):  # units differ in size, so more of them are not always more bytes
        chosen = [streamed[place] for place in _spread(count, len(streamed))]
        size = sum(sizes[index] for index in chosen)
        if best_bytes < size <= room_bytes:
            best, best_bytes = chosen, size
    return Resting(
        tuple(index for index in best if index < layers),
        tuple(index - layers for index in best if index >= layers),
    )


def choose_residents(
    images: Images, spare_bytes: int, slots_bytes: int, costs: SweepCosts, host_bytes: int | None = None
) -> Residents | None:
    """The residents that fit and make the shortest sweep; None if not even the slots fit.

    Spread evenly over a sweep, so that what is streamed comes while what stays is computed: layers among
    themselves, and the first of the chunks in proportion.  More units as plain weights mean less to rebuild
    and, once memory is short, more to stream: their number grows while that makes the sweep shorter.  Where
    units are streamed as plain weights there is nothing else that they could stay as.

    Args:
        images: the units.
        spare_bytes: what may be used.
        slots_bytes: of it, what is taken as soon as anything is streamed.
        costs: of a sweep's parts.
        host_bytes: behind a device, RAM for images that do not stay; None: there is no device.
    """
    best = _with_plain(images, spare_bytes, slots_bytes, 0)
    if best is None or not images.rebuilt:
        return best and Residents(best.layers, best.chunks, best.layers, best.chunks)
    for plain in range(1, len(images.layers) + len(images.chunks) + 1):
        candidate = _with_plain(images, spare_bytes, slots_bytes, plain)
        if candidate is None:
            break
        if candidate.sweep_s(images, costs, host_bytes) >= best.sweep_s(images, costs, host_bytes):
            break
        best = candidate
    return best


def _with_plain(images: Images, spare_bytes: int, slots_bytes: int, plain: int) -> Residents | None:
    """``plain`` units as plain weights and as many more as fit; None if not even those fit."""
    layers, chunks = len(images.layers), len(images.chunks)
    units = layers + chunks
    plain_layers = _spread(min(plain, layers), layers)
    plain_chunks = plain - len(plain_layers)

    def with_resident(count: int) -> Residents:
        among_chunks = count * chunks // units  # their share, within what the plain ones and the layers leave
        among_chunks = min(max(among_chunks, plain_chunks, count - layers), count - len(plain_layers))
        held = _spread_over(plain_layers, count - among_chunks, layers)
        return Residents(held, among_chunks, plain_layers, plain_chunks)

    def fits(residents: Residents) -> bool:
        slots = slots_bytes if len(residents.layers) + residents.chunks < units else 0
        return residents.held_bytes(images) + slots <= spare_bytes

    if fits(with_resident(units)):
        return with_resident(units)
    if plain == units or not fits(with_resident(plain)):
        return None
    most, beyond = plain, units
    while beyond - most > 1:
        middle = (most + beyond) // 2
        most, beyond = (middle, beyond) if fits(with_resident(middle)) else (most, middle)
    best = with_resident(most)
    while best.chunks < chunks and fits(further := replace(best, chunks=best.chunks + 1)):
        best = further  # chunks may be smaller than the layer that would be next
    return best


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """``count`` layers, evenly spaced."""
    return tuple(index * layers // count for index in range(count))


def _spread_over(chosen: tuple[int, ...], count: int, layers: int) -> tuple[int, ...]:
    """``count`` layers that include the chosen ones, the others evenly spaced among the rest."""
    rest = sorted(set(range(layers)).difference(chosen))
    others = [rest[index] for index in _spread(count - len(chosen), len(rest))]
    return tuple(sorted((*chosen, *others)))
