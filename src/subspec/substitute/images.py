"""A unit's matrices in one run of bytes: as plain weights one after another, or as a residual image.

A residual image begins with one little-endian uint64 a matrix, the byte where its residual starts, padded to
64 bytes; each residual starts at a multiple of 64 bytes and ends where the next one, or the image, does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subspec.errors import StoreError
from subspec.substitute.layout import Placed

UNIT_BYTES = 64


def _aligned(n_bytes: int) -> int:
    """``n_bytes`` rounded up to whole units."""
    return -(-n_bytes // UNIT_BYTES) * UNIT_BYTES


def join(residuals: Sequence[Tensor]) -> list[Tensor]:
    """The image of some residuals (uint8) as pieces to write one after another, padding included."""
    starts, end = [], _aligned(8 * len(residuals))
    for residual in residuals:
        starts.append(end)
        end = _aligned(end + len(residual))
    header = torch.zeros(_aligned(8 * len(residuals)), dtype=torch.uint8)
    header[: 8 * len(starts)] = torch.tensor(starts, dtype=torch.int64).view(torch.uint8)
    pieces = [header]
    for residual in residuals:
        pieces += [residual, torch.zeros(_aligned(len(residual)) - len(residual), dtype=torch.uint8)]
    return pieces


def plain_matrices(memory: Tensor, matrices: Sequence[Placed], dtype: torch.dtype) -> list[Tensor]:
    """The plain weights (n, k) that lie one after another in ``memory`` (uint8), as views."""
    found, start = [], 0
    for matrix in matrices:
        size = matrix.n * matrix.k * dtype.itemsize
        found.append(memory[start : start + size].view(dtype).view(matrix.n, matrix.k))
        start += size
    return found


def starts(image: Tensor, count: int, n_bytes: int) -> list[int]:
    """Where the ``count`` residuals of an image start.

    Args:
        image: its first bytes, at least the header; uint8, on the host.
        count: how many residuals.
        n_bytes: of the whole image.

    Raises:
        StoreError: the header is no header.
    """
    found: list[int] = image[: 8 * count].view(torch.int64).tolist()
    if found != sorted(found) or found[0] < 8 * count or found[-1] > n_bytes:
        raise StoreError(
            "a residual image is damaged: its header has the offsets "
            f"{', '.join(map(str, found))} in {n_bytes} bytes; prove the store with: subspec verify"
        )
    return found


def split(image: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """The residuals at ``offsets`` of an image (uint8), as views; each reaches to the next one."""
    return [image[start:end] for start, end in zip(offsets, [*offsets[1:], len(image)], strict=True)]
