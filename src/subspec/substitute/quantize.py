"""Choose the 4-bit codes of a weight: group by group, with least squared error in what it will multiply.

A group of 64 columns is replaced by a line ``(q - 8) * s + m`` over the codes 0 to 15.  The search alternates
between the codes nearest to the weights for a given line, and the line that fits given codes best (least
squares over scale and mid), the line always *rounded to bf16* before codes are taken for it: what is
minimized is what will be used.  It starts from four ranges, the group's minimum to maximum with 5 % cut off
at neither, either and both ends, refits each twice, refits the best of all lines seen twice more, and keeps
the best.  (On gaussian weights one start and four refits leave 4 % more error, min to max alone 10 %.)

Columns count by their *importance* where it is known: a power of the mean square of the activations that meet
them.  The first power would make the error of a product least if activations were uncorrelated and well
known; a lower one drafts better.  Source: Lin et al. 2024 (AWQ, arXiv 2306.00978) for how much activations
tell of which weights matter.

Pure functions.  ``quantize`` is the reference; ``quantize_tiles`` uses the native twin where there is one,
which performs the same operations in the same order and gives the same codes.  Knows nothing of products or
stores.

Rules for odd input: a group holding an infinity or NaN becomes zeros (codes 8, s = m = 0); weights beyond
2^100 count as 2^100; a group whose range is below 2^-95 becomes its middle (codes 8, s = 0).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from subspec.kernels.lowbit import lowbit_kernels
from subspec.substitute.layout import GROUP, groups, pack, tile_bytes

CUT = 0.05
REFITS = 2
POLISH = 2
IMPORTANCE_POWER = 0.7
TINY, HUGE = 2.0**-100, 2.0**100
_CHUNK = 1 << 20  # weights at a time in the reference: bounds its workspace


def quantize(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and mids of a weight.  Reference.

    Args:
        weight: (N, K) bf16, fp16 or fp32.
        importance: (K,) fp32, as ``column_importance`` makes it; default: all columns count alike.

    Returns:
        codes (N, K) uint8, scales and mids (N, ceil(K / 64)) bf16.
    """
    n, k = weight.shape
    g = groups(k)
    step = max(1, _CHUNK // max(1, k))
    counts = torch.ones(k) if importance is None else importance
    padded = F.pad(counts, (0, -k % GROUP)).view(g, GROUP)
    parts = []
    for first in range(0, n, step):
        rows = weight[first : first + step]
        grouped = F.pad(rows.float(), (0, -k % GROUP)).view(-1, GROUP)
        codes, scale, mid = _quantize_groups(grouped, padded.repeat(len(rows), 1))
        parts.append((codes.view(-1, g * GROUP)[:, :k], scale.view(-1, g), mid.view(-1, g)))
    if not parts:
        none = torch.empty(0, g, dtype=torch.bfloat16)
        return torch.empty(0, k, dtype=torch.uint8), none, none
    return _joined(parts, 0), _joined(parts, 1), _joined(parts, 2)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], which: int) -> Tensor:
    """One of the three results, of all chunks of rows."""
    return torch.cat([part[which] for part in parts])


def column_importance(mean_square: Tensor) -> Tensor:
    """What columns count in a group's error, from the mean squares of the activations that meet them.

    Args:
        mean_square: (K,) fp32, finite and not negative.

    Returns:
        (K,) fp32 from 2^-10 to 2^10: the power of each one's share of the mean; ones if that is zero.
    """
    relative = (mean_square / mean_square.mean()) ** IMPORTANCE_POWER
    return torch.where(relative.isfinite(), relative, 1.0).clamp(2.0**-10, 2.0**10)


def quantize_tiles(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """The substitute of a weight (N, K), as tiles: ``pack(*quantize(…))``, natively where possible."""
    native = lowbit_kernels()
    if native is None:
        return pack(*quantize(weight, importance))
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    tiles = torch.empty(tile_bytes(*weight.shape), dtype=torch.uint8)
    native.quantize(weight, importance, tiles)
    return tiles


def _quantize_groups(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and mid of groups (G, 64) fp32; mask: what a weight counts, 0 where there is none."""
    w = torch.where(w.isfinite().all(1, keepdim=True), w, 0.0).clamp(-HUGE, HUGE)
    filled = torch.where(mask > 0, w, w[:, :1])
    low, high = filled.amin(1), filled.amax(1)
    constant = ~(high - low >= 32 * TINY)
    scale, mid = _search(w, mask, low, high)
    scale = torch.where(constant, 0.0, scale)
    mid = torch.where(constant, _bf16(0.5 * low + 0.5 * high), mid)
    codes = torch.where(constant[:, None] | (mask == 0), 0.0, _codes(w, scale, mid)) + 8
    return codes.to(torch.uint8), scale.bfloat16(), mid.bfloat16()


def _search(w: Tensor, mask: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The best line found for each group."""
    total = _sum(w * mask)
    span = high - low
    lines = []
    for above in (0.0, CUT):
        for below in (0.0, CUT):
            start, end = low + below * span, high - above * span
            scale = _bf16((end - start) / 15)
            lines.append((scale, _bf16(start + 8 * scale)))
    best = lines[0]
    least = torch.full_like(low, torch.inf)
    for _ in range(REFITS + 1):
        for i, line in enumerate(lines):
            error, lines[i] = _refit(w, mask, total, line)
            best, least = _better(best, least, line, error)
    line = best
    for _ in range(POLISH + 1):
        error, refitted = _refit(w, mask, total, line)
        best, least = _better(best, least, line, error)
        line = refitted
    return best


def _better(
    best: tuple[Tensor, Tensor],
    least: Tensor,
    line: tuple[Tensor, Tensor],
    error: Tensor,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Group by group, the line with the smaller error, and that error."""
    wins = error < least
    chosen = torch.where(wins, line[0], best[0]), torch.where(wins, line[1], best[1])
    return chosen, torch.where(wins, error, least)


def _refit(
    w: Tensor, mask: Tensor, total: Tensor, line: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The squared error of a line's codes, and the line that fits these codes best."""
    scale, mid = line
    u = _codes(w, scale, mid)
    error = (u * scale[:, None] + mid[:, None]) - w
    counted = u * mask
    n, su, suu, suw = _sum(mask), _sum(counted), _sum(counted * u), _sum(counted * w)
    spread = n * suu - su * su
    fitted = _bf16((n * suw - su * total) / spread)
    fitted = torch.where((spread > 0) & (fitted >= TINY), fitted, scale)
    return _sum(error * mask * error), (fitted, _bf16((total - fitted * su) / n))


def _codes(w: Tensor, scale: Tensor, mid: Tensor) -> Tensor:
    """Codes minus 8, as floats."""
    return ((w - mid[:, None]) * (1 / scale)[:, None]).clamp(-8, 7).round()


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _sum(x: Tensor) -> Tensor:
    """Sums of groups (G, 64) -> (G,), in the order of the native twin."""
    lanes = x.view(-1, 4, 16)
    lanes = ((lanes[:, 0] + lanes[:, 1]) + lanes[:, 2]) + lanes[:, 3]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]
