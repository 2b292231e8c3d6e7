"""Residuals: every weight comes back bit for bit at every level, whatever its substitute; and the format.

``Decoder`` below is a second implementation, in plain integers, of what docs/residual.md says.
"""

import contextlib
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from fences import fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspec.kernels import build, exact, native
from subspec.kernels.residual import ResidualKernels
from subspec.substitute import residual as codec
from subspec.substitute.layout import GROUP, TILE_BYTES, TILE_ROWS, groups, pack, tile_bytes
from subspec.substitute.quantize import quantize_tiles

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.bfloat16, torch.float16]
LIBRARIES = {level: library for level in build.levels() if (library := native._load(level)[0]) is not None}
TWINS = {level: ResidualKernels(library) for level, library in LIBRARIES.items()}
SHAPES = [(1, 1), (3, 7), (16, 64), (17, 65), (31, 130), (50, 200)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "residual.md"
LARGEST_SCALE = 2.0**124
relaxed = settings(deadline=None, max_examples=200)


@pytest.fixture(params=list(TWINS))
def twin(request: pytest.FixtureRequest) -> ResidualKernels:
    return TWINS[request.param]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, k: int, dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> Tensor:
    return (torch.randn(n, k, generator=random(seed)) * scale).to(dtype)


def numbers(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of some bit patterns, 0 to 65,535."""
    return patterns.to(torch.int32).to(torch.uint16).view(dtype)


def every_pattern(dtype: torch.dtype) -> Tensor:
    return numbers(torch.arange(1 << 16), dtype)


def mixed(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Ordinary weights with an odd pattern here and there."""
    weight = gaussian(n, k, dtype, seed)
    odd = numbers(torch.randint(0, 1 << 16, (n, k), generator=random(seed + 1)), dtype)
    return torch.where(torch.rand(n, k, generator=random(seed + 2)) < 0.03, odd, weight)


def lines_like(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales and mids of any size that a substitute may have, zeros and subnormals among them."""
    shape, source = (n, groups(k)), random(seed)
    size = 2.0 ** (torch.rand(*shape, generator=source).double() * 260 - 136)
    scales = size.clamp(max=LARGEST_SCALE) * (torch.rand(*shape, generator=source) < 0.9)
    near = torch.randn(*shape, generator=source) * size
    far = torch.randn(*shape, generator=source) * 2.0 ** (torch.rand(*shape, generator=source) * 250 - 130)
    mids = torch.where(torch.rand(*shape, generator=source) < 0.7, near, far)
    greatest = torch.finfo(torch.bfloat16).max
    return scales.float().bfloat16(), mids.clamp(-greatest, greatest).float().bfloat16()


def random_tiles(n: int, k: int, seed: int = 0) -> Tensor:
    """A substitute of nothing in particular."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random(seed))
    return pack(codes, *lines_like(n, k, seed + 1))


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16)


def decoded(twin: ResidualKernels, residual: Tensor, tiles: Tensor, like: Tensor) -> Tensor:
    out = torch.full_like(like, torch.nan)
    twin.decode(residual, tiles, like.shape[0], 0, like.shape[0], out)
    return out


def round_trip(weight: Tensor, tiles: Tensor) -> Tensor:
    """The residual, after a check that all levels and the reference write it and read the weight from it."""
    n, k = weight.shape
    residual = codec.encode_reference(weight, tiles)
    restored = codec.decode_reference(residual, tiles, n, k, weight.dtype)
    assert torch.equal(bits(restored), bits(weight))
    for level, twin in TWINS.items():
        assert torch.equal(twin.encode(weight, tiles), residual), level
        assert torch.equal(bits(decoded(twin, residual, tiles, weight)), bits(weight)), level
    return residual


# Losslessness


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 100, 1024])
def test_every_pattern_among_its_like(dtype: torch.dtype, columns: int) -> None:
    """All patterns as they follow each other, and shuffled."""
    rows = (1 << 16) // columns
    for order in (torch.arange(1 << 16), torch.randperm(1 << 16, generator=random(1))):
        weight = every_pattern(dtype)[order][: rows * columns].view(rows, columns)
        round_trip(weight, quantize_tiles(weight))
    rest = every_pattern(dtype)[rows * columns :].view(1, -1)
    if rest.numel():
        round_trip(rest, quantize_tiles(rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_in_an_ordinary_group(dtype: torch.dtype) -> None:
    """Four odd ones a group, with a substitute that knows them and one that does not."""
    ordinary = gaussian(1024, 1024, dtype)
    weight = ordinary.clone()
    order = torch.randperm(1 << 16, generator=random(2))
    weight.view(-1, 16)[:, 5] = every_pattern(dtype)[order]
    round_trip(weight, quantize_tiles(weight))
    round_trip(weight, quantize_tiles(ordinary))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_alone_in_an_ordinary_group(dtype: torch.dtype) -> None:
    weight = gaussian(1 << 16, GROUP, dtype)
    tiles = quantize_tiles(weight)
    column = torch.randint(0, GROUP, (1 << 16,), generator=random(3))
    weight[torch.arange(1 << 16), column] = every_pattern(dtype)
    round_trip(weight, tiles)
    changed = quantize_tiles(weight)
    for level, twin in TWINS.items():
        residual = twin.encode(weight, changed)
        assert torch.equal(bits(decoded(twin, residual, changed, weight)), bits(weight)), level


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any shape, scale and dtype; shifted, constant or zero in part; odd patterns at any place."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30))
    scale = 10.0 ** draw(st.floats(-30, 30))
    weight: Tensor = torch.randn(n, k, generator=random(seed)) * scale
    weight += draw(st.sampled_from([0.0, 0.0, 1.0, -30.0])) * scale
    for row in draw(st.lists(st.integers(0, n - 1), max_size=4)):
        first = draw(st.integers(0, k - 1))
        weight[row, first:] = draw(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e-39])) * scale
    if draw(st.booleans()):
        weight *= (torch.rand(n, k, generator=random(seed + 1)) < 0.5).float()
    weight = weight.to(dtype)
    corners = [0, 0x8000, 1, 0x8001, 7, 8, 0x7C00, 0xFC00, 0x7C01, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFFF]
    odd = st.one_of(st.sampled_from(corners), st.integers(0, (1 << 16) - 1))
    for at, pattern in draw(st.lists(st.tuples(st.integers(0, n * k - 1), odd), max_size=12)):
        weight.view(-1)[at] = numbers(torch.tensor([pattern]), dtype)[0]
    return weight


@relaxed
@given(weights(), st.integers(0, 1 << 30))
def test_any_weight_over_any_substitute(weight: Tensor, seed: int) -> None:
    n, k = weight.shape
    round_trip(weight, quantize_tiles(weight))
    round_trip(weight, random_tiles(n, k, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_over_random_substitutes(dtype: torch.dtype) -> None:
    for seed in range(4):
        weight = every_pattern(dtype)[torch.randperm(1 << 16, generator=random(seed))].view(256, 256)
        round_trip(weight, random_tiles(256, 256, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_substitute_of_another_weight_serves(dtype: torch.dtype) -> None:
    weight = mixed(33, 150, dtype)
    for scale in (0.02, 0.0005, 4.0):
        round_trip(weight, quantize_tiles(gaussian(33, 150, dtype, seed=9, scale=scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_whose_rows_lie_apart(dtype: torch.dtype) -> None:
    wide = mixed(70, 300, dtype)
    weight = wide[:, 20:170]
    tiles = quantize_tiles(weight)
    residual = codec.encode_reference(weight.contiguous(), tiles)
    for twin in TWINS.values():
        assert torch.equal(twin.encode(weight, tiles), residual)
    assert torch.equal(codec.encode(weight, tiles), residual)
    turned = wide.T  # columns apart
    tiles = quantize_tiles(turned)
    assert torch.equal(codec.encode(turned, tiles), codec.encode_reference(turned.contiguous(), tiles))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(twin: ResidualKernels, dtype: torch.dtype) -> None:
    weight = mixed(400, 300, dtype)
    tiles = quantize_tiles(weight)
    residual = twin.encode(weight, tiles)
    with threads(2):
        assert torch.equal(twin.encode(weight, tiles), residual)
        assert torch.equal(bits(decoded(twin, residual, tiles, weight)), bits(weight))


# Parts of a matrix


def check_rows(weight: Tensor, first: int, last: int) -> None:
    """Rows [first, last) from every level, reference and public function; nothing is written beside them."""
    n, k = weight.shape
    tiles = quantize_tiles(weight)
    residual = codec.encode(weight, tiles)
    expected = bits(weight[first:last])
    for level, twin in TWINS.items():
        memory = torch.full((last - first + 2, k), 7, dtype=weight.dtype)
        twin.decode(residual, tiles, n, first, last, memory[1:-1])
        assert torch.equal(bits(memory[1:-1]), expected), level
        assert (memory[0] == 7).all()
        assert (memory[-1] == 7).all()
    rows = torch.empty(last - first, k, dtype=weight.dtype)
    codec._decode_rows_reference(residual, tiles, n, rows, first)
    assert torch.equal(bits(rows), expected)
    out = torch.empty(last - first, k, dtype=weight.dtype)
    assert codec.decode_rows(residual, tiles, n, out, first) is out
    assert torch.equal(bits(out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(75, 130), (64, 64), (5, 9)])
def test_rows_of_whole_stripes(n: int, k: int, dtype: torch.dtype) -> None:
    weight = mixed(n, k, dtype)
    for first in range(0, n, TILE_ROWS):
        for last in [*range(first, n, TILE_ROWS), n]:
            check_rows(weight, first, last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [1, 15, 17, 31, 40, 74])
def test_rows_that_end_inside_a_stripe(last: int, dtype: torch.dtype) -> None:
    """What follows the last row wanted are fields, not escapes."""
    weight = mixed(75, 130, dtype)
    for first in range(0, last, TILE_ROWS):
        check_rows(weight, first, last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_native_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mixed(40, 100, dtype)
    tiles = quantize_tiles(weight)
    residual = codec.encode(weight, tiles)
    monkeypatch.setattr(codec, "residual_kernels", lambda: None)
    monkeypatch.setattr(codec, "_CHUNK", 2048)  # one stripe at a time
    assert torch.equal(codec.encode(weight, tiles), residual)
    out = torch.empty(24, 100, dtype=dtype)
    codec.decode_rows(residual, tiles, 40, out, 16)
    assert torch.equal(bits(out), bits(weight[16:]))


# What may be read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_what_surrounds_a_residual_is_ignored(n: int, k: int, dtype: torch.dtype) -> None:
    """The tail's content, too, and codes, scales and mids of rows and columns that do not exist."""
    weight = mixed(n, k, dtype)
    tiles = quantize_tiles(weight)
    residual = codec.encode(weight, tiles)
    end = 64 + len(residual)
    for filler in (torch.full((end + 16,), 255), torch.randint(0, 256, (end + 16,), generator=random(4))):
        memory = filler.to(torch.uint8)
        memory[64:end] = residual
        for kept in (end, end - codec.TAIL_BYTES):  # the tail as written, and overwritten
            memory[kept:] = filler[kept:].to(torch.uint8)
            inside = memory[64:]
            for level, twin in TWINS.items():
                assert torch.equal(bits(decoded(twin, inside, tiles, weight)), bits(weight)), level
            again = codec.decode_reference(inside, tiles, n, k, dtype)
            assert torch.equal(bits(again), bits(weight))
            assert torch.equal(memory[:64], filler[:64].to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 7), (17, 65), (31, 130)])
def test_padding_has_no_say(n: int, k: int, dtype: torch.dtype) -> None:
    weight = mixed(n, k, dtype)
    rows, columns = -(-n // TILE_ROWS) * TILE_ROWS, groups(k) * GROUP
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=random(5))
    scales, mids = lines_like(rows, columns, 6)
    everywhere = pack(codes, scales, mids)
    residual = round_trip(weight, everywhere)
    plain = pack(codes[:n, :k], scales[:n], mids[:n])
    assert torch.equal(codec.encode(weight, plain), residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_beyond_the_tail_is_touched(twin: ResidualKernels, at_end: bool, dtype: torch.dtype) -> None:
    """A stray read or write ends the process."""
    for n, k in SHAPES:
        for weight in (mixed(n, k, dtype), torch.ones(n, k, dtype=dtype), torch.zeros(n, k, dtype=dtype)):
            weight = fenced(weight, at_end)
            tiles = fenced(quantize_tiles(weight), at_end)
            residual = fenced(twin.encode(weight, tiles), at_end)
            out = fenced(torch.zeros_like(weight), at_end)
            twin.decode(residual, tiles, n, 0, n, out)
            assert torch.equal(bits(out), bits(weight))


# Size


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 8.0), (torch.float16, 11.0)])
def test_size_for_gaussian_weights(dtype: torch.dtype, most: float) -> None:
    for scale in (0.001, 0.02, 1.0):
        weight = gaussian(256, 1024, dtype, scale=scale)
        residual = codec.encode(weight, quantize_tiles(weight))
        assert most - 1.0 < 8 * len(residual) / weight.numel() <= most


@pytest.mark.parametrize(("dtype", "worst"), [(torch.bfloat16, 43), (torch.float16, 46)])
def test_size_has_a_bound(dtype: torch.dtype, worst: int) -> None:
    """11 bits (fp16: 14) and an escape of 32 for each weight, 4 bytes a tile and 4 more, the tail."""
    for seed in range(3):
        patterns = torch.randint(0, 1 << 16, (128, 512), generator=random(seed))
        weight = numbers(patterns, dtype)
        for tiles in (quantize_tiles(weight), random_tiles(128, 512, seed)):
            size = len(codec.encode(weight, tiles))
            assert (
                8 * size <= worst * weight.numel() + 32 * (weight.numel() // 1024 + 1) + 8 * codec.TAIL_BYTES
            )
    # As many bits as there can be: every code 8, the bin around zero, and no weight in it.
    weight = torch.full((16, 64), 1000.0, dtype=dtype)
    tiles = pack(torch.full((16, 64), 8, dtype=torch.uint8), torch.ones(16, 1), torch.zeros(16, 1))
    assert len(round_trip(weight, tiles)) == 8 + 1024 * worst // 8 + codec.TAIL_BYTES


def test_a_constant_group_takes_no_bits() -> None:
    for value in (0.0, 1.0, -0.15625, 3e-39):
        weight = torch.full((20, 100), value).bfloat16()
        residual = round_trip(weight, quantize_tiles(weight))
        assert len(residual) == codec.directory_bytes(20, 100) + codec.TAIL_BYTES
        half = weight.half()  # 3e-39 is zero there
        residual = round_trip(half, quantize_tiles(half))
        assert (
            len(residual) == codec.directory_bytes(20, 100) + 20 * (24 + -(-36 * 3 // 8)) + codec.TAIL_BYTES
        )


# The product


def linear_ways() -> list[tuple[str, int]]:
    """Levels, and the ways of bf16 products that each has here."""
    tiles = native._load("amx")[0] is not None
    more = [("avx512bf16", way) for way in (1, 2)[: 1 + tiles]] if "avx512bf16" in LIBRARIES else []
    return [*((level, 0) for level in LIBRARIES), *more]


@pytest.mark.parametrize(("name", "way"), linear_ways())
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_equals_that_of_the_exact_weight(
    dtype: torch.dtype, name: str, way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels(name, LIBRARIES[name], {}, way))
    twin = ResidualKernels(LIBRARIES[name])
    for n, k in [(1, 1), (16, 64), (75, 130), (150, 333), (203, 64), (64, 1100)]:
        weight = gaussian(n, k, dtype, scale=0.1)
        weight.view(-1)[:: max(n * k // 50, 1)] = -0.0
        weight.view(-1)[3 :: max(n * k // 30, 1)] = 100.0
        tiles = quantize_tiles(weight)
        residual, bias = twin.encode(weight, tiles), gaussian(1, n, dtype, seed=1, scale=1.0)[0]
        x = gaussian(300, k, dtype, seed=2, scale=1.0)
        for rows in (1, 2, 5, 17, 64, 256, 300):
            for count in (1, 2):
                with threads(count):
                    expected = exact.linear(x[:rows], weight, bias)
                    got = twin.linear(x[:rows], residual, tiles, n, bias)
                    assert torch.equal(bits(got), bits(expected))
        plain = twin.linear(x[:3], residual, tiles, n, None)
        assert torch.equal(bits(plain), bits(exact.linear(x[:3], weight)))
        assert twin.linear(x[:0], residual, tiles, n, bias).shape == (0, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_with_special_weights(
    twin: ResidualKernels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the weight that holds an infinity or NaN spoils its own output only."""
    library = next(library for level, library in LIBRARIES.items() if TWINS[level] is twin)
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("", library, {}))
    weight = gaussian(40, 100, dtype, scale=0.1)
    weight[3, 70], weight[20, 0], weight[39, 99] = torch.inf, torch.nan, -torch.inf
    tiles, x = quantize_tiles(weight), gaussian(5, 100, dtype, seed=1)
    got = twin.linear(x, twin.encode(weight, tiles), tiles, 40, None)
    assert torch.equal(bits(got), bits(exact.linear(x, weight)))
    assert (~got.isfinite()).sum() == 15


# Bins


def rounded(value: Fraction, digits: int, least: int) -> Fraction:
    """To nearest even with so many significant bits, none of them below 2^least."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent  # 2^exponent <= |value| < 2^(exponent + 1)
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    return round(value / unit) * unit


def test_edges_do_not_depend_on_fused_arithmetic() -> None:
    """Product and sum rounded once together, or one after the other, and the bins' own: all the same."""
    scales, mids = (part[:, 0] for part in lines_like(400, 1, 7))
    found = codec.bins(scales, mids, torch.bfloat16)
    for row, (scale, mid) in enumerate(zip(scales.tolist(), mids.tolist(), strict=True)):
        for q in range(1, 16):
            product = Fraction(2 * q - 17, 2) * Fraction(scale)
            assert rounded(product, 24, -149) == product
            edge = rounded(product + Fraction(mid), 24, -149)
            number = min(max(rounded(edge, 8, -133), -(Fraction(2) ** 128)), Fraction(2) ** 128)
            wide = torch.tensor(float(number), dtype=torch.float64)  # 2^128 becomes infinite below
            above = max(int(bits(wide.bfloat16()[None])[0]) % 0x8000 - int(found.floor[row]), 0)
            assert int(found.base[row, q]) == (-above if number < 0 else above)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bins_follow_each_other(dtype: torch.dtype) -> None:
    scales, mids = (part[:, 0] for part in lines_like(20_000, 1, 8))
    found = codec.bins(scales, mids, dtype)
    base, width = found.base, found.width
    assert base.min() >= -(1 << 15)
    assert base.max() < 1 << 15
    assert width.min() == 0
    assert width.max() == 11
    assert (base[:, 2:] >= base[:, 1:-1]).all()
    reach = base + (1 << width) - 1
    closed = width[:, 1:15] < 11
    assert (reach[:, 1:15] >= base[:, 2:])[closed].all()
    assert (reach[:, 0] == base[:, 1]).all()
    assert (found.floor >= 0).all()


def test_bins_of_some_groups() -> None:
    found = codec.bins(
        torch.tensor([0.25, 0.0]).bfloat16(), torch.tensor([0.0, 1.0]).bfloat16(), torch.float16
    )
    assert found.floor.tolist() == [[640], [0]]
    assert found.width[0].tolist() == [7, 6, 6, 6, 6, 7, 7, 8, 11, 8, 7, 7, 6, 6, 6, 7]
    assert found.base[0, 7:].tolist() == [-1088, -896, 896, 1088, 1184, 1248, 1296, 1328, 1360]
    assert found.base[0, 0] == found.base[0, 1] - 127
    assert found.width[1].tolist() == [1, *[0] * 14, 1]
    assert found.base[1].tolist() == [1919, *[1920] * 15]


# A second implementation, and the document's example


class Decoder:
    """What docs/residual.md says, one weight after another."""

    def __init__(self, tiles: bytes, residual: bytes, n: int, k: int, half: bool) -> None:
        self.tiles, self.residual, self.n, self.k, self.half = tiles, residual, n, k, half
        self.low = 3 if half else 0
        self.across = (k + 63) // 64
        self.payloads = 4 * ((n + 15) // 16 * self.across + 1)

    def weight(self) -> list[list[int]]:
        """The patterns."""
        whole = [[-1] * self.k for _ in range(self.n)]
        for t in range((self.n + 15) // 16 * self.across):
            start, end = struct.unpack_from("<2I", self.residual, 4 * t)
            top, left = t // self.across * 16, t % self.across * 64
            columns, at = min(64, self.k - left), self.payloads + start
            for r in range(min(16, self.n - top)):
                patterns, at = self.row(t, r, columns, at)
                whole[top + r][left : left + columns] = patterns
            for place, pattern in struct.iter_unpack("<2H", self.residual[at : self.payloads + end]):
                whole[top + place // 64][left + place % 64] = pattern
        return whole

    def row(self, t: int, r: int, columns: int, at: int) -> tuple[list[int], int]:
        """A row's patterns, escapes not yet put in, and where its bytes end."""
        tile = self.tiles[576 * t : 576 * t + 576]
        codes = []
        for c in range(columns):
            both = tile[64 * (c // 8) + 4 * r + c % 4]
            codes.append(both >> 4 if c % 8 >= 4 else both & 15)
        scale, mid = (struct.unpack_from("<H", tile, first + 2 * r)[0] for first in (512, 544))
        floor, base, width = self.bins(scale, mid)
        main, at = self.fields([min(width[q], 8) for q in codes], at)
        extra, at = self.fields([3 if width[q] > 8 else 0 for q in codes], at)
        lowest, at = self.fields([self.low] * columns, at)
        patterns = []
        for q, lower, upper, last in zip(codes, main, extra, lowest, strict=True):
            place = base[q] + lower + (upper << 8)
            pattern = (abs(place) + floor) << self.low if place else 0
            patterns.append((pattern + (0x8000 if place < 0 else 0)) | last)
        return patterns, at

    def fields(self, widths: list[int], at: int) -> tuple[list[int], int]:
        """Consecutive fields of one part of a row, and where the part ends."""
        size = (sum(widths) + 7) // 8
        stream = int.from_bytes(self.residual[at : at + size], "little")
        found = []
        for width in widths:
            found.append(stream & ((1 << width) - 1))
            stream >>= width
        return found, at + size

    def bins(self, scale: int, mid: int) -> tuple[int, list[int], list[int]]:
        """Floor, bases and widths of a group; scale and mid as bf16 patterns."""
        s, m = (np.frombuffer(struct.pack("<I", part << 16), np.float32)[0] for part in (scale, mid))
        floor = max(((self.narrowed(s) & 0x7FFF) >> self.low) - 1024, 0)
        lower = [0]
        with np.errstate(all="ignore"):
            for q in range(1, 16):
                pattern = self.narrowed(np.float32(q - 8.5) * s + m)
                above = max(((pattern & 0x7FFF) >> self.low) - floor, 0)
                lower.append(-above if pattern & 0x8000 else above)
        width = [0] + [min((lower[q + 1] - lower[q]).bit_length(), 11) for q in range(1, 15)]
        width.append(min(width[14] + 1, 11))
        width[0] = min(width[1] + 1, 11)
        return floor, [lower[1] - 2 ** width[0] + 1, *lower[1:]], width

    def narrowed(self, value: np.float32) -> int:
        """The pattern of an fp32 number in the weight's dtype."""
        if self.half:
            with np.errstate(all="ignore"):
                return int(np.float16(value).view(np.uint16))
        raw = int(np.float32(value).view(np.uint32))
        return (raw + 0x7FFF + (raw >> 16 & 1)) >> 16


def read_by_the_document(residual: Tensor, tiles: Tensor, like: Tensor) -> Tensor:
    n, k = like.shape
    half = like.dtype is torch.float16
    patterns = Decoder(tiles.numpy().tobytes(), residual.numpy().tobytes(), n, k, half).weight()
    return numbers(torch.tensor(patterns), like.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_decoder_written_from_the_document(n: int, k: int, dtype: torch.dtype) -> None:
    weight = mixed(n, k, dtype)
    for tiles in (quantize_tiles(weight), random_tiles(n, k)):
        residual = codec.encode(weight, tiles)
        assert torch.equal(bits(read_by_the_document(residual, tiles, weight)), bits(weight))
        size = struct.unpack_from("<I", residual.numpy().tobytes(), codec.directory_bytes(n, k) - 4)[0]
        assert len(residual) == codec.directory_bytes(n, k) + size + 128
        assert not residual[-128:].any()


@settings(deadline=None, max_examples=40)
@given(weights(), st.integers(0, 1 << 30))
def test_a_decoder_written_from_the_document_reads_anything(weight: Tensor, seed: int) -> None:
    part = weight[:20, :90].contiguous()
    for tiles in (quantize_tiles(part), random_tiles(part.shape[0], part.shape[1], seed)):
        residual = codec.encode(part, tiles)
        assert torch.equal(bits(read_by_the_document(residual, tiles, part)), bits(part))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_example_of_the_document(dtype: torch.dtype) -> None:
    blocks = re.findall(r"```text\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    block = blocks[DTYPES.index(dtype)]
    written = b"".join(bytes.fromhex(line.split("  ")[0]) for line in block.splitlines()) + bytes(128)
    codes = torch.tensor([[9, 8, 8, 8, 15, 15], [8, 8, 15, 8, 8, 8]], dtype=torch.uint8)
    tiles = pack(codes, torch.tensor([[0.25], [0.0]]), torch.tensor([[0.0], [1.0]]))
    assert len(tiles) == tile_bytes(2, 6) == TILE_BYTES
    weight = torch.tensor([[0.3, -0.02, 0.0, -0.0, 1.9, 100.0], [1.0, 1.0, 1.0078125, 1.0, 1.0, -1.0]]).to(
        dtype
    )
    assert round_trip(weight, tiles).numpy().tobytes() == written
    residual = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    assert torch.equal(bits(read_by_the_document(residual, tiles, weight)), bits(weight))
