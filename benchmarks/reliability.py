"""Draw how well promised probabilities were kept, from a result of `benchmarks/trees.py`, as an SVG.

    python benchmarks/reliability.py benchmarks/results/RESULT.json docs/reliability.svg

Per bin of promised probability: a dot at (mean promised, share that the target took), its area by how many
candidates there were, beside the diagonal where every promise is kept.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

SIDE, MARGIN = 320, 48


def dots(reliability: dict[str, Any]) -> list[tuple[float, float, int]]:
    """(mean promised, share kept, count) of each bin that holds anything."""
    columns = zip(reliability["promised"], reliability["kept"], reliability["count"], strict=True)
    return [(promised / count, kept / count, count) for promised, kept, count in columns if count]


def svg(reliability: dict[str, Any], title: str) -> str:
    """The diagram."""

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + x * SIDE, MARGIN + (1 - y) * SIDE

    (left, bottom), (right, top), found = at(0, 0), at(1, 1), dots(reliability)
    most = max(count for _, _, count in found)
    marks = []
    for promised, kept, count in found:
        x, y = at(promised, kept)
        radius = 2 + 10 * math.sqrt(count / most)
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="#3b6fb6" fill-opacity="0.7"/>'
        )
        marks.append(f'<text x="{x + radius + 3:.1f}" y="{y + 4:.1f}" font-size="9">{count}</text>')
    for step in range(0, 11, 2):
        x, y = at(step / 10, step / 10)
        marks.append(f'<text x="{x:.0f}" y="{bottom + 16:.0f}" text-anchor="middle">{step / 10:g}</text>')
        marks.append(f'<text x="{left - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{step / 10:g}</text>')
    size = SIDE + 2 * MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{size}" height="{size}" fill="white"/>',
            f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
            f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{top}" stroke="#bbb" stroke-dasharray="4"/>',
            *marks,
            f'<text x="{size / 2}" y="20" text-anchor="middle" font-size="13">{title}</text>',
            f'<text x="{size / 2}" y="{size - 10}" text-anchor="middle">promised probability</text>',
            f'<text x="14" y="{size / 2}" text-anchor="middle" transform="rotate(-90 14 {size / 2})">'
            "share that the target took</text>",
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Read a result, write the diagram of the way of choosing tokens that it observed most."""
    source, out = map(Path, sys.argv[1:3])
    ways = json.loads(source.read_text())["speculation"]["calibration"]
    name, way = max(ways.items(), key=lambda item: item[1]["observations"])
    if way["error"] is None:
        raise SystemExit(f"{source}: no draft was compared with the target, there is nothing to draw")
    title = f"{way['observations']} rows, {name}; mean error {way['error']:.3f}"
    out.write_text(svg(way["reliability"], title))


if __name__ == "__main__":
    main()
