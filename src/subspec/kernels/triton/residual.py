"""Exact weights out of substitute and residual, on a CUDA device.

The twin of ``decode_reference`` in ``substitute/residual.py``, which has the format.  Importing this module
imports Triton: callers will do so only where there is a CUDA device; there are none yet but its tests.  Knows
nothing of layers or streams.

Every result is the reference's, bit for bit: all is integer arithmetic but a bin's edge, (q - 8.5) * s + m in
fp32.  Its product is exact, so that one rounding remains, contracted or not.  Nor does it matter whether a
device flushes subnormals to zero: a scale is 0 or at least 2^-100 (``substitute/quantize.py``).  If it is 0,
the edge is m, whose bits are taken as they are.  Otherwise the product is a multiple of 2^-108, and at least
2^-101:

- a subnormal m is below half a unit in the product's last place: it changes nothing, flushed or not;
- a normal m below 2^-102 leaves a sum above 2^-102;
- any larger m is a multiple of 2^-109, and so is the sum: it is 0, or normal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The format's constants, as in substitute/layout.py and substitute/residual.py.
GROUP = tl.constexpr(64)
TILE_ROWS = tl.constexpr(16)
TILE_BYTES = tl.constexpr(576)
FLOOR_STEPS = tl.constexpr(1024)
MAX_WIDTH = tl.constexpr(11)
MAIN_BITS = tl.constexpr(8)
EXTRA_BITS = tl.constexpr(3)
LOW_BITS = {torch.bfloat16: 0, torch.float16: 3}

# Eight warps: 4 weights a thread, for which the compiler finds one layout; with fewer warps it moves
# addresses between threads.  Fusion makes no difference; it is set because releases differ in its default.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_SCALE_WORDS = tl.constexpr(128)  # where a tile's scales and mids start, in units of 4 bytes
_MID_WORDS = tl.constexpr(136)
_NOTES = tl.constexpr(128)  # escapes at a time


def decode(residual: Tensor, tiles: Tensor, n: int, k: int, out: Tensor) -> None:
    """Rebuild an exact weight.

    Runs on the current stream of ``out``'s device, allocates nothing and does not synchronize.

    Args:
        residual: (bytes,) uint8, contiguous, on any byte; what follows the residual is not read.
        tiles: (bytes,) uint8, the substitute of the (n, k) weight, on a multiple of 4 bytes.
        n: the weight's rows.
        k: its columns.
        out: (n, k) bf16 or fp16, contiguous; written.
    """
    assert residual.dtype is torch.uint8
    assert residual.is_contiguous()
    assert out.shape == (n, k)
    assert out.is_contiguous()
    assert out.device == tiles.device == residual.device
    count = triton.cdiv(n, TILE_ROWS.value) * triton.cdiv(k, GROUP.value)
    if count == 0:
        return
    words, patterns = tiles.view(torch.int32), out.view(torch.int16)
    with torch.cuda.device_of(out):
        decode_tile[(count,)](residual, words, patterns, n, k, LOW_BITS[out.dtype], **OPTIONS)


@triton.jit(do_not_specialize_on_alignment=["residual"])  # read byte by byte anyway
def decode_tile(residual, tiles, out, n, k, low_bits: tl.constexpr):
    """Rebuild one tile; a program for each, in their order.

    Args:
        residual: uint8, from the directory on.
        tiles: int32, the substitute.
        out: int16, the weight's bit patterns, row stride k.
        n: the weight's rows.
        k: its columns.
        low_bits: 0 for bf16, 3 for fp16: the bits of a pattern that are stored as they are.
    """
    groups = tl.cdiv(k, GROUP)
    tile = tl.program_id(0)
    first_row, first_column = tile // groups * TILE_ROWS, tile % groups * GROUP
    rows, columns = tl.minimum(n - first_row, TILE_ROWS), tl.minimum(k - first_column, GROUP)
    directory = residual + 4 * tile.to(tl.int64)
    start, end = _uint32(directory), _uint32(directory + 4)
    payload = residual + 4 * (tl.num_programs(0).to(tl.int64) + 1) + start
    target = out + first_row.to(tl.int64) * k + first_column

    words = tiles + tile.to(tl.int64) * (TILE_BYTES // 4)
    patterns, used = _patterns(payload, words, rows, columns, low_bits)
    row, column = tl.arange(0, TILE_ROWS)[:, None], tl.arange(0, GROUP)[None, :]
    valid = (row < rows) & (column < columns)
    tl.store(target + row.to(tl.int64) * k + column, patterns.to(tl.int16), mask=valid)
    tl.debug_barrier()  # an escape and the number that it replaces are two threads' stores
    _restore_escapes(payload + used, (end - start).to(tl.int32) - used, target, k, rows, columns)


@triton.jit
def _patterns(payload, words, rows, columns, low_bits: tl.constexpr):
    """A tile's bit patterns (16, 64) but for escapes, and the bytes of payload that these took; int32."""
    row, column = tl.arange(0, TILE_ROWS), tl.arange(0, GROUP)[None, :]
    valid = (row < rows)[:, None] & (column < columns)
    scale, mid = _halves(words + _SCALE_WORDS), _halves(words + _MID_WORDS)
    floor = tl.maximum(_magnitude(scale, low_bits) - FLOOR_STEPS, 0)[:, None]
    bins = tl.gather(_bins(scale, mid, floor, low_bits), _codes(words), axis=1)
    base, width = bins >> 4, tl.where(valid, bins & 15, 0)

    # Where the fields lie: one scan counts the main parts' bits and, in the upper half, the wide fields.
    main_width, wide = tl.minimum(width, MAIN_BITS), width > MAIN_BITS
    sizes = main_width + (wide.to(tl.int32) << 16)
    before, total = tl.cumsum(sizes, axis=1) - sizes, tl.sum(sizes, axis=1)
    main_bytes = ((total & 0xFFFF) + 7) >> 3
    extra_bytes = ((total >> 16) * EXTRA_BITS + 7) >> 3
    low_bytes = tl.where(row < rows, (columns * low_bits + 7) >> 3, 0)
    row_bytes = main_bytes + extra_bytes + low_bytes
    main_at = tl.cumsum(row_bytes, axis=0) - row_bytes
    extra_at = main_at + main_bytes
    low_at = extra_at + extra_bytes

    main = _bits(payload, main_at[:, None] * 8 + (before & 0xFFFF), valid) & ((1 << main_width) - 1)
    extra = _bits(payload, extra_at[:, None] * 8 + (before >> 16) * EXTRA_BITS, wide) & 7
    place = base + main + (extra << MAIN_BITS)
    magnitude = tl.where(place == 0, 0, tl.abs(place) + floor)
    patterns = magnitude << low_bits | tl.where(place < 0, 0x8000, 0)
    if low_bits > 0:
        patterns |= _bits(payload, low_at[:, None] * 8 + column * low_bits, valid) & 7
    return patterns, tl.sum(row_bytes, axis=0)


@triton.jit
def _uint32(at):
    """Four bytes, on any byte, as int64."""
    low = tl.load(at).to(tl.int64) | tl.load(at + 1).to(tl.int64) << 8
    return low | tl.load(at + 2).to(tl.int64) << 16 | tl.load(at + 3).to(tl.int64) << 24


@triton.jit
def _codes(words):
    """A tile's codes, (16, 64) int32.

    A word has the codes of columns 8 t + j in its bytes' low nibbles, of 8 t + 4 + j in the high ones.
    """
    row, line, column = tl.arange(0, TILE_ROWS), tl.arange(0, GROUP // 8), tl.arange(0, 8)
    packed = tl.load(words + line[None, :] * TILE_ROWS + row[:, None])  # (16, 8)
    shift = (column & 3) * 8 + (column >> 2) * 4
    return tl.reshape(packed[:, :, None] >> shift[None, None, :] & 15, (TILE_ROWS, GROUP))


@triton.jit
def _halves(words):
    """Sixteen bf16 numbers as the bits of fp32 ones, (16,) int32."""
    row = tl.arange(0, TILE_ROWS)
    return tl.load(words + (row >> 1)) >> ((row & 1) * 16) << 16


@triton.jit
def _magnitude(bits, low_bits: tl.constexpr):
    """The magnitude, without its low bits, of fp32 numbers rounded to the dtype; from their bits, int32."""
    if low_bits == 0:
        pattern = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    else:
        pattern = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (pattern & 0x7FFF) >> low_bits


@triton.jit
def _edge(code, scale, mid, floor, low_bits: tl.constexpr):
    """The place where a code's bin starts: code (1, 16), the rest (16, 1), int32 -> (16, 16)."""
    step = scale.to(tl.float32, bitcast=True)
    edge = (code.to(tl.float32) - 8.5) * step + mid.to(tl.float32, bitcast=True)
    bits = tl.where(step == 0.0, mid, edge.to(tl.int32, bitcast=True))
    above = tl.maximum(_magnitude(bits, low_bits) - floor, 0)
    return tl.where(bits < 0, -above, above)


@triton.jit
def _bins(scale, mid, floor, low_bits: tl.constexpr):
    """The bins of a tile's rows, (16, 16) int32: 16 * base + width.

    Scales and mids are (16,), floors (16, 1), int32.
    """
    code = tl.arange(0, 16)[None, :]
    inner = tl.minimum(tl.maximum(code, 1), 14)
    lower = _edge(inner, scale[:, None], mid[:, None], floor, low_bits)
    upper = _edge(inner + 1, scale[:, None], mid[:, None], floor, low_bits)
    # The bit length of a span, which is below 2^16, is in the exponent of the same number in fp32.
    length = ((upper - lower).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    length = tl.maximum(length, 0) + tl.where(inner == code, 0, 1)
    width = tl.minimum(length, MAX_WIDTH)
    base = tl.where(code == 15, upper, tl.where(code == 0, lower + 1 - (1 << width), lower))
    return base * 16 + width


@triton.jit
def _bits(payload, bit, mask):
    """At least eight bits of the payload from ``bit`` on, and 0 where the mask is not set."""
    return _uint16(payload + (bit >> 3), mask) >> (bit & 7)


@triton.jit
def _uint16(at, mask):
    """Two bytes, on any byte, as int32; 0 where the mask is not set."""
    low, high = tl.load(at, mask=mask, other=0), tl.load(at + 1, mask=mask, other=0)
    return low.to(tl.int32) | high.to(tl.int32) << 8


@triton.jit
def _restore_escapes(notes, size, target, k, rows, columns):
    """Put the weights that were kept whole, ``size`` bytes of them, into a tile of the weight."""
    at = 4 * tl.arange(0, _NOTES)
    left = size
    while left > 0:
        where, pattern = _uint16(notes + at, at < size), _uint16(notes + at + 2, at < size)
        row, column = where >> 6, where & (GROUP - 1)
        inside = (at < size) & (row < rows) & (column < columns)
        tl.store(target + row.to(tl.int64) * k + column, pattern.to(tl.int16), mask=inside)
        at += 4 * _NOTES
        left -= 4 * _NOTES
