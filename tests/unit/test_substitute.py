"""Substitutes: the tiles' bytes, the quality of the codes, and every native level against the references."""

import struct

import pytest
import torch
from fences import fenced
from torch import Tensor
from torch.nn import functional as F

from subspec.kernels import build, native
from subspec.kernels.lowbit import LowbitKernels
from subspec.substitute import linear, quantize
from subspec.substitute.layout import (
    TILE_BYTES,
    dequantize,
    dequantize_rows,
    groups,
    pack,
    tile_bytes,
    unpack,
    values,
)
from subspec.substitute.linear import (
    SubstituteLinear,
    quantize_activations,
    substitute_linear_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (15, 63), (16, 64), (17, 65), (40, 100)]
LIBRARIES = {level: native._load(level)[0] for level in build.levels()}
LEVELS = [level for level, library in LIBRARIES.items() if library is not None]


@pytest.fixture(params=LEVELS)
def twin(request: pytest.FixtureRequest) -> LowbitKernels:
    library = LIBRARIES[request.param]
    assert library is not None
    return LowbitKernels(library)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_parts(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    g = groups(k)
    return (
        codes,
        (gaussian(n, g, seed=seed + 1).abs() * 0.01).bfloat16(),
        (gaussian(n, g, seed=seed + 2) * 0.01).bfloat16(),
    )


def quantized(twin: LowbitKernels, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    tiles = torch.zeros(tile_bytes(weight.shape[0], weight.shape[1]), dtype=torch.uint8)
    twin.quantize(weight, importance, tiles)
    return tiles


def product(twin: LowbitKernels, x: Tensor, tiles: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    out = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    twin.product(x, tiles.data_ptr(), n, bias, out)
    return out


# The layout


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpack_returns_what_was_packed(n: int, k: int) -> None:
    parts = random_parts(n, k)
    tiles = pack(*parts)
    assert tiles.dtype == torch.uint8
    assert tiles.numel() == tile_bytes(n, k)
    for before, after in zip(parts, unpack(tiles, n, k), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_bytes_lie_where_the_layout_says() -> None:
    codes, scales, mids = random_parts(18, 130)
    data = bytes(pack(codes, scales, mids).tolist())
    assert len(data) == 2 * 3 * 576
    # Row 17, column 77: stripe 1, its row 1; group 1, its column 13 = 8 * 1 + 4 + 1: line 1, j = 1, high.
    tile = data[(1 * 3 + 1) * 576 :]
    assert tile[64 * 1 + 4 * 1 + 1] >> 4 == codes[17, 77]
    assert tile[64 * 1 + 4 * 1 + 1] & 15 == codes[17, 73]
    assert tile[512 + 2 * 1 : 512 + 2 * 1 + 2] == struct.pack("<f", scales[17, 1].item())[2:]
    assert tile[544 + 2 * 1 : 544 + 2 * 1 + 2] == struct.pack("<f", mids[17, 1].item())[2:]
    # Padding: row 18 does not exist, nor does column 130 (group 2, column 2).
    assert tile[64 * 1 + 4 * 2 + 1] == 0x88
    assert tile[512 + 2 * 2 : 512 + 2 * 2 + 2] == b"\0\0"
    assert data[(0 * 3 + 2) * 576 + 4 * 0 + 2] == 0x88


def test_a_value_is_rounded_once_to_bf16() -> None:
    codes = torch.tensor([[0, 7, 8, 9, 15]], dtype=torch.uint8)
    scale, mid = torch.tensor([[0.0157]]).bfloat16(), torch.tensor([[1.0]]).bfloat16()
    expected = torch.tensor([(q - 8) * scale.item() + 1.0 for q in (0, 7, 8, 9, 15)]).bfloat16()
    assert torch.equal(values(codes, scale, mid, torch.bfloat16)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_equal_dequantize(twin: LowbitKernels, n: int, k: int, dtype: torch.dtype) -> None:
    tiles = pack(*random_parts(n, k))
    whole = dequantize(tiles, n, k, dtype)
    rows = torch.randint(0, n, (23,), generator=torch.Generator().manual_seed(5))
    assert torch.equal(dequantize_rows(tiles, n, k, rows, dtype), whole[rows])
    assert torch.equal(SubstituteLinear(tiles, n, k).rows(rows, dtype), whole[rows])
    some, all_of_them = torch.empty(23, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
    twin.values(tiles.data_ptr(), some, rows=rows)
    twin.values(tiles.data_ptr(), all_of_them)
    assert torch.equal(some, whole[rows])
    assert torch.equal(all_of_them, whole)


def test_rows_out_of_range_are_refused() -> None:
    layer = SubstituteLinear(pack(*random_parts(17, 64)), 17, 64)
    for index in (-1, 17):
        with pytest.raises(IndexError):
            layer.rows(torch.tensor([0, index]), torch.float32)
    assert layer.rows(torch.empty(0, dtype=torch.int64), torch.float32).shape == (0, 64)


# The codes


def relative_error(weight: Tensor, tiles: Tensor) -> float:
    restored = dequantize(tiles, weight.shape[0], weight.shape[1], torch.float32)
    return float((restored - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_on_gaussian_weights(dtype: torch.dtype) -> None:
    weight = gaussian(100, 640, dtype=dtype) * 0.02
    error = relative_error(weight, pack(*quantize.quantize(weight)))
    assert 0.079 < error < 0.083  # minimum to maximum alone: 0.0897; four refits of it: 0.0845


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (48, 512)])
def test_native_codes_equal_the_reference(twin: LowbitKernels, n: int, k: int, dtype: torch.dtype) -> None:
    weight = (gaussian(n, k) * 0.02 + 0.005).to(dtype)
    expected = unpack(pack(*quantize.quantize(weight)), n, k)
    tiles = quantized(twin, weight)
    codes, _, _ = unpack(tiles, n, k)
    assert (codes == expected[0]).float().mean() >= 0.999
    assert relative_error(weight, tiles) == pytest.approx(relative_error(weight, pack(*expected)), rel=1e-3)
    wide = F.pad(weight, (0, 3))[:, :k]  # rows apart
    assert torch.equal(quantized(twin, wide), tiles)


def some_importance(k: int) -> Tensor:
    return quantize.column_importance(gaussian(k, seed=5).square() ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (48, 512)])
def test_native_codes_by_importance_equal_the_reference(
    twin: LowbitKernels, n: int, k: int, dtype: torch.dtype
) -> None:
    weight, importance = (gaussian(n, k) * 0.02 + 0.005).to(dtype), some_importance(k)
    expected = pack(*quantize.quantize(weight, importance))
    codes = unpack(quantized(twin, weight, importance), n, k)[0]
    assert (codes == unpack(expected, n, k)[0]).float().mean() >= 0.999


def test_importance_lowers_the_error_of_what_it_stands_for() -> None:
    weight, squares = gaussian(64, 256) * 0.02, gaussian(256, seed=5).square() ** 3
    x = gaussian(400, 256, seed=6) * squares.sqrt()

    def product_error(importance: Tensor | None) -> float:
        restored = dequantize(pack(*quantize.quantize(weight, importance)), 64, 256, torch.float32)
        return float((x @ (restored - weight).T).square().mean())

    assert product_error(quantize.column_importance(squares)) < 0.75 * product_error(None)


def test_equal_importance_changes_nothing(twin: LowbitKernels) -> None:
    weight = gaussian(40, 100)
    importance = quantize.column_importance(torch.full((100,), 3.0))
    assert torch.equal(importance, torch.ones(100))
    assert torch.equal(quantized(twin, weight, importance), quantized(twin, weight))
    assert torch.equal(pack(*quantize.quantize(weight, importance)), pack(*quantize.quantize(weight)))


def test_importance_of_odd_squares_is_finite_and_positive() -> None:
    for squares in (torch.zeros(3), torch.tensor([1.0, torch.inf, 2.0]), torch.tensor([torch.nan, 1.0, 0.0])):
        importance = quantize.column_importance(squares)
        assert importance.isfinite().all()
        assert (importance > 0).all()


def odd_groups() -> Tensor:
    """One odd group of 64 a row, fp32."""
    w = gaussian(14, 64)
    w[0] = 0.0
    w[1] = 0.15625
    w[2, 3] = torch.inf
    w[3, 5] = torch.nan
    w[4, 9] = 1e30
    w[5] *= 1e-40
    w[6] *= 1e-45
    w[7, :] = 3e38
    w[7, ::2] = -3e38
    w[8] = 1000 + w[8] * 0.001
    w[9] = 0.0
    w[9, 0] = -7.0
    w[10] = torch.arange(64) % 16
    w[11, 63] = -torch.inf
    w[12] *= 1e20
    w[13] = -0.0
    return w


def test_odd_groups(twin: LowbitKernels) -> None:
    w = odd_groups()
    parts = quantize.quantize(w)
    codes, scales, mids = parts
    assert scales.isfinite().all()
    assert mids.isfinite().all()
    for row in (2, 3, 11):
        assert (codes[row] == 8).all()
        assert scales[row] == mids[row] == 0
    restored = dequantize(pack(*parts), 14, 64, torch.float32)
    for row in (0, 1, 13):
        assert torch.equal(restored[row], w[row])
    torch.testing.assert_close(restored[10], w[10], rtol=0, atol=0.05)
    torch.testing.assert_close(restored[8], w[8], rtol=2**-8, atol=0)
    assert restored[9, 0] == -7
    assert restored[9, 1].abs() < 0.01
    assert torch.equal(quantized(twin, w), pack(*parts))
    importance = some_importance(64)
    assert torch.equal(quantized(twin, w, importance), pack(*quantize.quantize(w, importance)))


def test_a_partial_group_takes_no_notice_of_its_padding() -> None:
    weight = gaussian(4, 70) * 0.01 + 5  # zeros among these would ruin the last group
    restored = dequantize(pack(*quantize.quantize(weight)), 4, 70, torch.float32)
    torch.testing.assert_close(restored, weight, rtol=2**-8, atol=0.01)
    alone = quantize.quantize(weight[:, 64:])
    assert torch.equal(quantize.quantize(weight)[0][:, 64:], alone[0])


def test_quantize_tiles_takes_any_strides_and_no_rows() -> None:
    weight = gaussian(70, 33).T
    assert torch.equal(quantize.quantize_tiles(weight), pack(*quantize.quantize(weight)))
    assert quantize.quantize_tiles(torch.empty(0, 64)).numel() == 0
    assert quantize.quantize(torch.empty(0, 64))[1].shape == (0, 1)


# The product


@pytest.mark.parametrize("k", [1, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_integer_sums_are_exact(twin: LowbitKernels, n: int, k: int) -> None:
    """With scale 1, mid 8 and integer activations reaching 127, the whole product is integers."""
    codes, scales, mids = random_parts(n, k)
    codes[0], codes[-1, 0] = 15, 15
    tiles = pack(codes, torch.ones_like(scales), torch.full_like(mids, 8))
    x = torch.randint(-127, 128, (17, k), generator=torch.Generator().manual_seed(3)).float()
    x[:, ::64] = 127
    x[1], x[2] = 127, -127
    expected = x.long() @ codes.long().T
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        assert torch.equal(product(twin, x[:rows], tiles, n).long(), expected[:rows])
    assert torch.equal(substitute_linear_reference(x, tiles, n, k).long(), expected)


@pytest.mark.parametrize("rows", [1, 4, 70])
@pytest.mark.parametrize(("n", "k"), [(7 * 16 + 3, 640), (39 * 16 - 5, 192)])
def test_threads_share_every_output(twin: LowbitKernels, n: int, k: int, rows: int) -> None:
    """Fewer threads than stripes of outputs, as many, and more; shares of one stripe and of several, with a
    rest.  Nothing beyond the tiles may be read."""
    tiles = fenced(pack(*random_parts(n, k)), at_end=True)
    x, before = gaussian(rows, k), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = product(twin, x, tiles, n)
        for threads in (2, 3, 8, 13, 39, 70):
            torch.set_num_threads(threads)
            assert torch.equal(product(twin, x, tiles, n), expected), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_rounded_as_the_reference_says(twin: LowbitKernels, dtype: torch.dtype) -> None:
    """Code 1 in one column a row and 0 elsewhere, scale 1, mid 8: the product shows scale times code."""
    x = gaussian(300, 64, dtype=dtype)
    x[0], x[1], x[2] = 0.0, x[1] * 1e-35, 127.0
    x[2, 1:32] = torch.arange(31) + 0.5  # ties
    tiles = pack(
        torch.eye(64, dtype=torch.uint8),
        torch.ones(64, 1).bfloat16(),
        torch.full((64, 1), 8.0).bfloat16(),
    )
    codes, scales = quantize_activations(x)
    assert codes[2, 0, 1:5].tolist() == [0, 2, 2, 4]
    assert torch.equal(product(twin, x, tiles, 64), (codes[:, 0] * scales).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (300, 1600)])
def test_product_is_near_the_reference(twin: LowbitKernels, n: int, k: int, dtype: torch.dtype) -> None:
    tiles = pack(*random_parts(n, k))
    x = (gaussian(70, k) + 0.3).to(dtype)
    size = x.float().abs() @ dequantize(tiles, n, k, torch.float32).abs().T
    for rows, bias in (
        (1, None),
        (2, gaussian(n)),
        (5, gaussian(n)),
        (8, None),
        (11, None),
        (70, gaussian(n)),
    ):
        expected = substitute_linear_reference(x[:rows], tiles, n, k, bias).float()
        got = product(twin, x[:rows], tiles, n, bias).float()
        bound = (
            2e-6 * (size[:rows] + 1) + expected.abs() * torch.finfo(dtype).eps
        )  # fp32 order; one step of dtype
        assert ((got - expected).abs() <= bound).all()


def test_reference_is_the_product_of_what_it_says() -> None:
    weight = gaussian(33, 300)
    tiles = pack(*quantize.quantize(weight))
    x = gaussian(6, 300, seed=1)
    exact = F.linear(x, dequantize(tiles, 33, 300, torch.float32))
    got = substitute_linear_reference(x, tiles, 33, 300)
    assert (got - exact).norm() / exact.norm() < 0.008  # 8-bit activations


def test_a_row_with_a_nan_spoils_no_other(twin: LowbitKernels) -> None:
    tiles = pack(*random_parts(17, 200))
    x = gaussian(9, 200)
    clean = product(twin, x, tiles, 17)
    x[2, 150], x[7, 0] = torch.inf, torch.nan
    got = product(twin, x, tiles, 17)
    spoilt = torch.tensor([2, 7])
    assert got[spoilt].isnan().all()
    assert substitute_linear_reference(x, tiles, 17, 200)[spoilt].isnan().all()
    kept = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    assert torch.equal(got[kept], clean[kept])


def test_rows_may_be_apart(twin: LowbitKernels) -> None:
    tiles = pack(*random_parts(17, 200))
    x = gaussian(5, 300)[:, :200]
    assert torch.equal(product(twin, x, tiles, 17), product(twin, x.contiguous(), tiles, 17))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_with_and_without_native_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 300, 1000  # more than one chunk of the fallback
    monkeypatch.setattr(linear, "_CHUNK", 1 << 16)
    tiles, bias = pack(*random_parts(n, k)), gaussian(n, dtype=dtype)
    x = gaussian(7, k, dtype=dtype)
    exact = F.linear(x, dequantize(tiles, n, k, dtype), bias).float()
    layer = SubstituteLinear(tiles, n, k, bias)
    assert layer.native == (native.kernels().library is not None)
    assert (layer(x).float() - exact).norm() / exact.norm() < 0.01
    assert layer(x).dtype == dtype
    assert layer(x[:0]).shape == (0, n)
    monkeypatch.setattr(linear, "lowbit_kernels", lambda: None)
    fallback = SubstituteLinear(tiles, n, k, bias)
    assert not fallback.native
    torch.testing.assert_close(fallback(x).float(), exact, rtol=torch.finfo(dtype).eps * 2, atol=1e-4)
    rows = torch.tensor([299, 0, 299])
    assert torch.equal(fallback.rows(rows, dtype), layer.rows(rows, dtype))


def test_tiles_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match=f"{TILE_BYTES} contiguous bytes"):
        SubstituteLinear(torch.empty(TILE_BYTES - 1, dtype=torch.uint8), 16, 64)
