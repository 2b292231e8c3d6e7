"""Who wrote each entry of the KV cache last: the exact target, or a draft.

Target and draft share one cache, so exactness rests on a rule: a draft never writes a slot that a sweep reads
as exact or that a commit keeps.  The ledger says where the rule is broken; it is used by tests, and behind
``SUBSPEC_HAZARDS=1``.  Its order is that of its calls, so passes that take turns must do so between layers.
"""

from collections.abc import Iterable, Sequence

from subspec.models.decoder import Rows

UNWRITTEN, EXACT, DRAFT = range(3)
_WRITERS = ("nobody", "a sweep", "a draft")


class InexactError(RuntimeError):
    """Keys and values that had to be exact are not: a bug, never a user's mistake."""


class KVLedger:
    """The last writer of every (layer, slot).

    Args:
        layers: L; ``slots``: S.
        slots: see ``layers``.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self._writers = [bytearray(slots) for _ in range(layers)]

    def drafted(self, layer: int, slots: Iterable[int]) -> None:
        """A draft wrote ``slots`` of ``layer``."""
        self._wrote(layer, slots, DRAFT)

    def swept(self, layer: int, slots: Iterable[int]) -> None:
        """A sweep wrote ``slots`` of ``layer``."""
        self._wrote(layer, slots, EXACT)

    def read_exact(self, layer: int, slots: Iterable[int]) -> None:
        """A sweep attends to ``slots`` of ``layer``.

        Raises:
            InexactError: one of them was not written by a sweep last.
        """
        self._require_exact(layer, slots, "a sweep attends to")

    def moved(self, sources: Sequence[int], targets: Sequence[int], drafts: int = 0) -> None:
        """A commit keeps slots ``sources`` and moves each to its one of ``targets``, in all layers.

        Args:
            sources: its slots, the last ``drafts`` of them a draft's, kept for the next tree.
            targets: where they go.
            drafts: how many are a draft's.

        Raises:
            InexactError: one of the others was not written by a sweep last; nothing is noted as moved then.
        """
        exact = len(sources) - drafts
        for layer in range(len(self._writers)):
            self._require_exact(layer, sources[:exact], "a commit keeps")
        for layer in range(len(self._writers)):
            self.swept(layer, targets[:exact])
            self.drafted(layer, targets[exact:])

    def _wrote(self, layer: int, slots: Iterable[int], writer: int) -> None:
        """Note the writer of some slots."""
        writers = self._writers[layer]
        for slot in slots:
            writers[slot] = writer

    def _require_exact(self, layer: int, slots: Iterable[int], what: str) -> None:
        """Raise if a slot's last writer was not a sweep."""
        writers = self._writers[layer]
        for slot in slots:
            if writers[slot] != EXACT:
                raise InexactError(
                    f"{what} slot {slot} of layer {layer}, which {_WRITERS[writers[slot]]} wrote last"
                )


class LedgeredPass:
    """Enters a pass in the ledger, a layer at a time, when the decoder is done with the layer.

    Args:
        ledger: where it is entered.
        rows: what the pass computes; read at the first layer's turn.
        exact: a sweep, or a draft.
    """

    def __init__(self, ledger: KVLedger, rows: Rows, *, exact: bool) -> None:
        self._ledger, self._rows, self._exact = ledger, rows, exact
        self._written: list[int] = []
        self._read: set[int] = set()

    def layer(self, index: int) -> None:
        """Layer ``index`` was computed.

        Raises:
            InexactError: a sweep attended to what was not exact.
        """
        if not self._written:
            self._written = self._rows.slots.tolist()
            self._read = _attended(self._rows) if self._exact else set()
        if self._exact:
            self._ledger.swept(index, self._written)
            self._ledger.read_exact(index, self._read)
        else:
            self._ledger.drafted(index, self._written)


def _attended(rows: Rows) -> set[int]:
    """Every slot that one of the rows sees."""
    paths, lengths = rows.paths.tolist(), rows.path_lens.tolist()
    slots = {slot for path, length in zip(paths, lengths, strict=True) for slot in path[:length]}
    return slots.union(range(max(rows.prefix.tolist(), default=0)))
