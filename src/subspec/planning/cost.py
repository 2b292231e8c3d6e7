"""What a sweep costs, and which units to keep so that it costs least: arithmetic, no torch.

A *unit* is what is streamed whole: a layer, or a chunk of the output head.
"""

from dataclasses import dataclass


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
    """

    link_bytes_per_s: float = 1.0
    plain_s_per_byte: float = 0.0
    rebuilt_s_per_byte: float = 1e-15
    row_s_per_byte: float = 0.0

    def sweep_s(self, streamed_bytes: int, plain_bytes: int, rebuilt_bytes: int) -> float:
        """Seconds of a sweep with ``EXPECTED_ROWS`` rows: streaming hides computing, or it is hidden."""
        computing_s = plain_bytes * self.plain_s_per_byte + rebuilt_bytes * self.rebuilt_s_per_byte
        computing_s += (EXPECTED_ROWS - 1) * (plain_bytes + rebuilt_bytes) * self.row_s_per_byte
        return max(streamed_bytes / self.link_bytes_per_s, computing_s)


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

    def sweep_s(self, images: Images, costs: SweepCosts) -> float:
        """Seconds of a sweep, as ``SweepCosts`` has it."""
        plain = images.plain_bytes_of(len(self.plain_layers), self.plain_chunks)
        if not images.rebuilt:
            plain = images.plain_bytes
        return costs.sweep_s(self.streamed_bytes(images), plain, images.plain_bytes - plain)


def choose_residents(
    images: Images, spare_bytes: int, slots_bytes: int, costs: SweepCosts
) -> Residents | None:
    """The residents that fit and make the shortest sweep; None if not even the slots fit.

    Layers come before chunks, spread evenly over the model.  More units as plain weights mean less to rebuild
    and, once memory is short, more to stream: their number grows while that makes the sweep shorter.  Where
    units are streamed as plain weights there is nothing else that they could stay as.

    Args:
        images: the units.
        spare_bytes: what may be used.
        slots_bytes: of it, what is taken as soon as anything is streamed.
        costs: of a sweep's parts.
    """
    best = _with_plain(images, spare_bytes, slots_bytes, 0)
    if best is None or not images.rebuilt:
        return best and Residents(best.layers, best.chunks, best.layers, best.chunks)
    for plain in range(1, len(images.layers) + len(images.chunks) + 1):
        candidate = _with_plain(images, spare_bytes, slots_bytes, plain)
        if candidate is None or candidate.sweep_s(images, costs) >= best.sweep_s(images, costs):
            break
        best = candidate
    return best


def _with_plain(images: Images, spare_bytes: int, slots_bytes: int, plain: int) -> Residents | None:
    """``plain`` units as plain weights and as many more as fit; None if not even those fit."""
    layers, units = len(images.layers), len(images.layers) + len(images.chunks)
    plain_layers = _spread(min(plain, layers), layers)

    def with_resident(count: int) -> Residents:
        held = _spread_over(plain_layers, min(count, layers), layers)
        return Residents(held, max(count - layers, 0), plain_layers, plain - len(plain_layers))

    def fits(count: int) -> bool:
        slots = slots_bytes if count < units else 0
        return with_resident(count).held_bytes(images) + slots <= spare_bytes

    if fits(units):
        return with_resident(units)
    if plain == units or not fits(plain):
        return None
    most, beyond = plain, units
    while beyond - most > 1:
        middle = (most + beyond) // 2
        most, beyond = (middle, beyond) if fits(middle) else (most, middle)
    return with_resident(most)


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """``count`` layers, evenly spaced."""
    return tuple(index * layers // count for index in range(count))


def _spread_over(chosen: tuple[int, ...], count: int, layers: int) -> tuple[int, ...]:
    """``count`` layers that include the chosen ones, the others evenly spaced among the rest."""
    rest = sorted(set(range(layers)).difference(chosen))
    others = [rest[index] for index in _spread(count - len(chosen), len(rest))]
    return tuple(sorted((*chosen, *others)))
