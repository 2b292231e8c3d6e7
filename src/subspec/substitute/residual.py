"""The residual: what, added to a substitute, restores an exact weight's bits.  Codec and reference.

A weight's code q, with its group's scale s and mid m, says in which *bin* the weight lies; a bin holds few
numbers of the weight's dtype where they are sparse, more where they are dense.  The residual stores the
weight's place in its bin, in as many bits as the bin needs, which (s, m, q) tell: no lengths are stored.
``docs/residual.md`` is the format's full description; in short, for every group of 64 weights of a row:

- ``mag`` is a number's bit pattern in the weight's dtype without its sign (fp16: the upper 12 of those 15
  bits; the lower 3 are stored as they are).  The *floor* F = max(mag(s) − 1024, 0) cuts off magnitudes below
  s / 256, and ``place(w)`` = ±max(mag(w) − F, 0) orders the numbers that are left by value.
- Bin q = 1 … 14 reaches from L(q) to L(q + 1), L(q) = place((q − 8.5)·s + m): the product is exact in fp32,
  its sum with m is rounded to fp32 and then to the dtype, all to nearest even.  Its *width* is the bit length
  of L(q + 1) − L(q), its *base* L(q).  Bin 15 starts at L(15), bin 0 ends with L(1), each one bit wider than
  its neighbour.  No bin is wider than 11 bits.
- The *field* of a weight is place(w) − base, in ``width`` bits.  A weight with another place, or with place 0
  and any pattern but that of +0, has a field of zeros and is kept whole, as an *escape*.

All numbers are little-endian.  A matrix's residual is a directory (one uint32 a tile: where its payload
starts after the directory, and where the last ends), the tiles' payloads in the order of the substitute's
tiles, and 128 bytes of zeros, so that a decoder may read ahead.  A tile's payload: for each of its rows that
exist, the fields' lower 8 bits, one after another from bit 0 of the first byte up; then, in whole bytes
again, 3 bits, from bit 8 on, of each field wider than 8; then, in fp16, the lowest 3 bits of every weight;
after the last row the escapes: uint16 64·row + column, uint16 bits.

Everything is integer but L, and L is the same on every device.  ``encode`` and ``decode`` use the native
twins where they are; ``*_reference`` are these definitions in torch.  fp32 has no residual form.

Knows nothing of files, layers, or when something is streamed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from subspec.kernels.residual import residual_kernels
from subspec.substitute.layout import GROUP, TILE_BYTES, TILE_ROWS, groups, unpack

LOW_BITS = {torch.bfloat16: 0, torch.float16: 3}  # of a bit pattern, stored as they are
FLOOR_STEPS = 8 * 128  # eight octaves
MAX_WIDTH = 11
MAIN_BITS = 8
EXTRA_BITS = 3
TAIL_BYTES = 128
_ROW_BYTES = 64 + 24 + 24  # most bytes of a row's main, extra and low parts
_CHUNK = 1 << 18  # weights at a time in the references: their temporaries stay in a cache


@dataclass(frozen=True)
class Bins:
    """The bins of some groups: base and width (R, 16) and floor (R, 1), int32."""

    base: Tensor
    width: Tensor
    floor: Tensor


def bins(scales: Tensor, mids: Tensor, dtype: torch.dtype) -> Bins:
    """The bins of groups with these scales and mids, (R,) bf16 each."""
    scale, mid = scales.float()[:, None], mids.float()[:, None]
    floor = (_magnitude(scale.to(dtype)) - FLOOR_STEPS).clamp(min=0)
    steps = torch.arange(16, device=scales.device) - 8.5
    lower = _place((steps * scale + mid).to(dtype), floor)  # (R, 16); lower[:, 0] is of no use
    span = torch.zeros_like(lower)
    span[:, 1:15] = lower[:, 2:] - lower[:, 1:15]
    width = torch.frexp(span.float()).exponent.int()  # the bit length: spans are below 2^16, exact in fp32
    width[:, 0], width[:, 15] = width[:, 1] + 1, width[:, 14] + 1
    width.clamp_(max=MAX_WIDTH)
    base = lower.clone()
    base[:, 0] = lower[:, 1] - (1 << width[:, 0]) + 1
    return Bins(base, width, floor)


def _pattern(weight: Tensor) -> Tensor:
    """Bit patterns of 16-bit floats, as int32 from 0 to 65,535."""
    return weight.view(torch.int16).int() & 0xFFFF


def _magnitude(weight: Tensor) -> Tensor:
    """The part of the bit pattern that places are made of."""
    return (_pattern(weight) & 0x7FFF) >> LOW_BITS[weight.dtype]


def _place(weight: Tensor, floor: Tensor) -> Tensor:
    """Signed distance from the floor, int32."""
    above = (_magnitude(weight) - floor).clamp(min=0)
    return torch.where(_pattern(weight) >= 0x8000, -above, above)


def encode_reference(weight: Tensor, tiles: Tensor) -> Tensor:
    """The residual of ``weight`` over its substitute.  Reference.

    Args:
        weight: (N, K) bf16 or fp16.
        tiles: its substitute.

    Returns:
        (bytes,) uint8, new.

    Raises:
        ValueError: it is above 4 GiB.
    """
    n, k = weight.shape
    stripe = TILE_BYTES * groups(k)
    payloads, sizes = [], []
    for first, last in _stripes(n, k):
        part = tiles[first // TILE_ROWS * stripe : -(-last // TILE_ROWS) * stripe]
        payload, size = _encode_stripes(weight[first:last], part)
        payloads.append(payload)
        sizes.append(size)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), *sizes]).cumsum(0)
    if int(ends[-1]) >= 1 << 32:
        raise ValueError(
            f"the residual of {n} x {k} weights is above 4 GiB: cut the matrix into smaller ones"
        )
    tail = torch.zeros(TAIL_BYTES, dtype=torch.uint8)
    return torch.cat([ends.to(torch.uint32).view(torch.uint8), *payloads, tail])


def _stripes(n: int, k: int) -> list[tuple[int, int]]:
    """Rows [first, last) of whole stripes, some at a time: bounds the references' workspace."""
    step = max(_CHUNK // (groups(k) * GROUP * TILE_ROWS), 1) * TILE_ROWS
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def _grouped(tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Bins, Tensor]:
    """Codes (R, 64), bins and validity (R, 64) of n rows' groups, R = stripes · G · 16, in tile order."""
    rows, g = -(-n // TILE_ROWS) * TILE_ROWS, groups(k)
    codes, scales, mids = unpack(tiles, rows, g * GROUP)
    valid = (torch.arange(rows) < n)[:, None] & (torch.arange(g * GROUP) < k)
    found = bins(_by_tile(scales, 1)[:, 0], _by_tile(mids, 1)[:, 0], dtype)
    return _by_tile(codes, GROUP).long(), found, _by_tile(valid, GROUP)


def _by_tile(part: Tensor, columns: int) -> Tensor:
    """(rows, G · columns) in tile order: (stripes · G · 16, columns)."""
    return part.view(-1, TILE_ROWS, part.shape[1] // columns, columns).transpose(1, 2).reshape(-1, columns)


def _encode_stripes(weight: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Payload and the size of each tile's payload, of whole stripes."""
    n, k = weight.shape
    codes, found, valid = _grouped(tiles, n, k, weight.dtype)
    padded = F.pad(weight, (0, -k % GROUP, 0, -n % TILE_ROWS))
    values = _by_tile(padded, GROUP)  # (R, 64)
    place, pattern = _place(values, found.floor), _pattern(values)
    width = found.width.gather(1, codes) * valid
    field = place - found.base.gather(1, codes)
    escaped = valid & ((field < 0) | (field >= 1 << width) | ((place == 0) & (pattern != 0)))
    field = torch.where(escaped, 0, field)
    low = LOW_BITS[weight.dtype]
    kept = [
        _packed(field & 255, width.clamp(max=MAIN_BITS), MAIN_BITS),
        _packed(field >> MAIN_BITS, (width > MAIN_BITS) * EXTRA_BITS, EXTRA_BITS),
        _packed(pattern & ((1 << low) - 1), valid * low, 3),
    ]
    content = torch.cat([content for content, _ in kept], dim=1).view(-1, TILE_ROWS * _ROW_BYTES)
    used = torch.cat([used for _, used in kept], dim=1).view(-1, TILE_ROWS * _ROW_BYTES)
    notes = torch.stack(
        [torch.arange(TILE_ROWS * GROUP).expand(len(used), -1), pattern.view(len(used), -1)], 2
    )
    notes = notes.to(torch.uint16).view(torch.uint8).view(len(used), -1)
    noted = escaped.view(len(used), -1).repeat_interleave(4, dim=1)
    content, used = torch.cat([content, notes], dim=1), torch.cat([used, noted], dim=1)
    return content[used], used.sum(1)


def _packed(field: Tensor, width: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Fields (R, 64) of at most ``most`` bits one after another: bytes (R, 8 · most); which are in use."""
    start = width.cumsum(1) - width
    bits = torch.zeros(
        (len(field), GROUP * most + 1), dtype=torch.uint8
    )  # the last one takes what is not kept
    for bit in range(most):
        at = torch.where(width > bit, start + bit, GROUP * most)
        bits.scatter_(1, at, (field >> bit & 1).to(torch.uint8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    content = (bits[:, :-1].view(len(field), -1, 8) * weights).sum(2, dtype=torch.uint8)
    return content, torch.arange(content.shape[1]) < -(-width.sum(1, keepdim=True) // 8)


def decode_reference(residual: Tensor, tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The exact weight: the inverse of ``encode_reference``, (n, k) in ``dtype``, new.  Reference."""
    out = torch.empty((n, k), dtype=dtype)
    _decode_rows_reference(residual, tiles, n, out, 0)
    return out


def _decode_rows_reference(residual: Tensor, tiles: Tensor, n: int, out: Tensor, first: int) -> None:
    """Write rows ``first`` and on of the exact weight to ``out`` (rows, k); ``first`` a multiple of 16."""
    rows, k = out.shape
    g = groups(k)
    directory = residual[: directory_bytes(n, k)].view(torch.uint32).long()
    payload = residual[directory_bytes(n, k) :]
    for start, stop in _stripes(rows, k):
        low, high = (first + start) // TILE_ROWS * g, -(-(first + stop) // TILE_ROWS) * g
        part = tiles[low * TILE_BYTES : high * TILE_BYTES]
        present = min(high // g * TILE_ROWS, n) - low // g * TILE_ROWS
        decoded = _decode_stripes(payload, directory[low : high + 1], part, present, k, out.dtype)
        out[start:stop] = decoded[: stop - start]


def _decode_stripes(
    payload: Tensor, ends: Tensor, tiles: Tensor, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Rebuild n rows of whole stripes whose tiles' payloads start and end at ``ends``."""
    codes, found, valid = _grouped(tiles, n, k, dtype)
    width = found.width.gather(1, codes) * valid
    low = LOW_BITS[dtype]
    widths = [width.clamp(max=MAIN_BITS), (width > MAIN_BITS) * EXTRA_BITS, valid * low]
    sizes = torch.stack([-(-part.sum(1) // 8) for part in widths])  # (3, R)
    rows = sizes.sum(0).view(-1, TILE_ROWS)
    start = (ends[:-1, None] + rows.cumsum(1) - rows).view(-1, 1)  # where a row's payload begins
    main = _unpacked(payload, start, widths[0])
    extra = _unpacked(payload, start + sizes[0, :, None], widths[1])
    place = found.base.gather(1, codes) + main + (extra << MAIN_BITS)
    magnitude = torch.where(place == 0, 0, place.abs() + found.floor)
    pattern = magnitude << low | torch.where(place < 0, 0x8000, 0)
    if low:
        pattern |= _unpacked(payload, start + sizes[:2].sum(0)[:, None], widths[2])
    pattern = pattern.int().view(-1, TILE_ROWS * GROUP)
    _restore_escapes(pattern, payload, ends[:-1] + rows.sum(1), ends[1:])
    g = groups(k)
    whole = pattern.view(-1, g, TILE_ROWS, GROUP).transpose(1, 2).reshape(-1, g * GROUP)
    return whole[:n, :k].to(torch.uint16).view(dtype).contiguous()


def _unpacked(payload: Tensor, start: Tensor, width: Tensor) -> Tensor:
    """Fields (R, 64) of at most 8 bits that begin at bytes ``start`` (R, 1)."""
    bit = width.cumsum(1) - width
    at = start + (bit >> 3)
    window = payload[at].int() | payload[at + 1].int() << 8
    return window >> (bit & 7) & ((1 << width) - 1)


def _restore_escapes(pattern: Tensor, payload: Tensor, first: Tensor, last: Tensor) -> None:
    """Put the weights kept whole, in bytes [first, last) of each tile, into ``pattern`` (tiles, 1024)."""
    counts = ((last - first) // 4).clamp(min=0)
    tile = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.arange(len(tile)) - (counts.cumsum(0) - counts)[tile]
    notes = payload[(first[tile] + 4 * number)[:, None] + torch.arange(4)]
    notes = notes.contiguous().view(torch.uint16).int()
    known = notes[:, 0] < TILE_ROWS * GROUP  # always, unless bytes are damaged
    pattern[tile[known], notes[known, 0]] = notes[known, 1]


def directory_bytes(n: int, k: int) -> int:
    """Bytes of the directory of an (n, k) weight's residual."""
    return 4 * (-(-n // TILE_ROWS) * groups(k) + 1)


def encode(weight: Tensor, tiles: Tensor) -> Tensor:
    """The residual of ``weight`` (N, K) over its substitute, natively where possible: (bytes,) uint8, new."""
    native = residual_kernels()
    if native is None:
        return encode_reference(weight, tiles)
    return native.encode(weight if weight.stride(-1) == 1 else weight.contiguous(), tiles)


def decode_rows(residual: Tensor, tiles: Tensor, n: int, out: Tensor, first: int = 0) -> Tensor:
    """Rebuild some rows of an exact weight (n, K).

    Args:
        residual: as ``encode`` made it; what follows it is ignored.
        tiles: the weight's substitute.
        n: its rows.
        out: (rows, K) bf16 or fp16, contiguous; written with rows ``first`` and on.
        first: a multiple of 16.

    Returns:
        ``out``.
    """
    native = residual_kernels()
    if native is None:
        _decode_rows_reference(residual, tiles, n, out, first)
    else:
        native.decode(residual, tiles, n, first, first + len(out), out)
    return out
