"""What a sweep is going to say, before it says it.

Half-way through its layers, the hidden states of a sweep know much that no draft does: run through the
substitutes of the layers still to come, they foretell the target's tokens better than the draft did.  Behind
the last layer, while the output head still streams, they foretell nearly all of them.  Such a *preview* of
the rows that the walk will most likely go through costs a part of a draft pass in a gap.  What it says of
their children takes the place of what the draft said, so that the gaps that follow grow the tree below the
token at which the walk will end, rather than below all at which it might.

Previews change where a draft grows, never a token.  Knows nothing of how a sweep goes on.
"""

from collections.abc import Sequence

from subspec.speculation.calibration import Calibration

# When a sweep's rows are previewed: the share of its layers that are done.  And where each calibration's
# temperature starts: the later, the surer.
POINTS = {0.2: 0.2, 0.6: 0.15, 1.0: 0.02}
PREVIEW_ROWS = 48  # most rows of a preview


def preview_calibrations() -> list[Calibration]:
    """One a point."""
    return [Calibration(temperature) for temperature in POINTS.values()]


class Previews:
    """When the rows of one sweep are previewed.

    Args:
        nodes: the tree's nodes that the sweep verifies, in order of its rows.
        first: number of the row that the first of them is.
        drafting_s: seconds that were drafted before it.
        calibrations: one a point.

    Attributes:
        nodes, drafting_s: as given.
        rows: of the sweep.
    """

    def __init__(
        self, nodes: Sequence[int], first: int, drafting_s: float, calibrations: Sequence[Calibration]
    ) -> None:
        self.nodes, self.drafting_s = list(nodes), drafting_s
        self.rows = first + len(nodes)
        self._row_of = {node: first + place for place, node in enumerate(nodes)}
        self._left = list(zip(POINTS, calibrations, strict=True))

    def due(self, swept: float) -> Calibration | None:
        """The calibration of the preview that is to be made now, once; None if there is none.

        Args:
            swept: share of the layers that the sweep has done.
        """
        due = None
        while self._left and swept >= self._left[0][0]:
            due = self._left.pop(0)[1]
        return due

    def numbers(self, nodes: Sequence[int]) -> list[int]:
        """Their rows in the sweep."""
        return [self._row_of[node] for node in nodes]
