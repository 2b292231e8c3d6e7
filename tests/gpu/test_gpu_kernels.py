"""Each kernel on the device against its reference function, and a row's bits, whoever is beside.

The interpreter checks the same in unit tests: here it is the compiled code, on sizes of real models.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subspec.kernels import device
from subspec.memory.backend.cuda import CudaBackend
from subspec.models.attention import attend_reference
from subspec.models.mlp import silu_mul_reference
from subspec.models.norm import rms_norm_reference
from subspec.models.rope import rotate_and_store_reference
from subspec.substitute import residual as codec
from subspec.substitute.layout import dequantize
from subspec.substitute.quantize import quantize_tiles

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SHAPES = [(1536, 1536), (896, 4864), (4864, 896), (1000, 200)]
ROWS = [1, 2, 5, 16, 17, 40]
SLACK = {
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float32: 2e-5,
}  # of a sum's size: roundings of results


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def called(operation: Callable[..., Tensor], *values: Any) -> Tensor:
    """The operation's result, its tensors moved to the device."""
    return operation(*[value.cuda() if isinstance(value, Tensor) else value for value in values])


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    slack = SLACK[dtype]
    torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=slack, atol=slack)


def assert_rows_stand_alone(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A row's bits are the same alone, among others, and in another order."""
    whole, backwards = run(x), run(x.flip(0).contiguous()).flip(0)
    assert torch.equal(whole, backwards)
    for row in range(0, len(x), 5):
        assert torch.equal(run(x[row : row + 1].contiguous()), whole[row : row + 1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_residuals_give_back_every_bit(n: int, k: int, dtype: torch.dtype, backend: CudaBackend) -> None:
    weight = 0.03 * normal(n, k, dtype=dtype)
    tiles = quantize_tiles(weight)
    image, near, out = codec.encode(weight, tiles).cuda(), tiles.cuda(), weight.cuda().zero_()
    torch.cuda.synchronize()
    replay = backend.capture(lambda: device.decode_residual(image, near, n, k, out))
    backend.launch(backend.compute, lambda: out.zero_())
    backend.launch(backend.compute, replay)
    torch.cuda.synchronize()
    assert torch.equal(out.cpu().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_low_bit_products(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    tiles, x, bias = (
        quantize_tiles(normal(n, k)),
        normal(rows, k, dtype=dtype, seed=1),
        normal(n, dtype=dtype),
    )
    weight = dequantize(tiles, n, k, torch.float32).double()
    got = device.lowbit_linear(x.cuda(), tiles.cuda(), n, k, bias.cuda())
    size = weight.abs().sum(1).max()
    assert_near(got / size, (x.double() @ weight.T + bias.double()) / size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_exact_products(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    weight, bias = normal(n, k, dtype=dtype).cuda(), normal(n, dtype=dtype).cuda()
    x = normal(rows, k, dtype=dtype, seed=1).cuda()
    wanted = (x.double() @ weight.double().T + bias.double()).cpu()
    assert_near(device.exact_linear(x, weight, bias) / k**0.5, wanted / k**0.5, dtype)
    assert_rows_stand_alone(lambda part: device.exact_linear(part, weight, bias), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rowwise_operations(dtype: torch.dtype) -> None:
    x, gain = normal(17, 1536, dtype=dtype), normal(1536, dtype=dtype, seed=1)
    near, near_gain = x.cuda(), gain.cuda()
    assert_near(device.rms_norm(near, near_gain, 1e-6), rms_norm_reference(x, gain, 1e-6), dtype)
    assert_near(device.silu_mul(near), silu_mul_reference(x), dtype)
    assert_rows_stand_alone(lambda part: device.rms_norm(part, near_gain, 1e-6), near)
    assert_rows_stand_alone(device.silu_mul, near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_rotation(dtype: torch.dtype, normed: bool) -> None:
    heads, kv_heads, dim, rows, capacity = 12, 2, 128, 9, 40
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = normal(capacity, dim // 2)
    positions = torch.randperm(capacity, generator=torch.Generator().manual_seed(1))[:rows].int()
    slots = torch.randperm(capacity, generator=torch.Generator().manual_seed(2))[:rows].int()
    caches = [torch.zeros(kv_heads, capacity, dim, dtype=dtype) for _ in range(2)]
    gains = [normal(dim, dtype=dtype, seed=seed) if normed else None for seed in (3, 4)]
    first = qkv, angles.cos(), angles.sin(), positions, slots
    near_caches = [cache.cuda() for cache in caches]
    got = called(device.rotate_and_store, *first, *near_caches, heads, *gains, 1e-6)
    wanted = rotate_and_store_reference(*first, caches[0], caches[1], heads, gains[0], gains[1], 1e-6)
    for here, there in zip([got, *near_caches], [wanted, *caches], strict=True):
        assert_near(here, there, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 2, 128), (14, 2, 64), (9, 3, 64), (4, 4, 80)])
def test_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    rows, capacity, deepest = 11, 700, 13
    q = normal(rows, heads, dim, dtype=dtype)
    k, v = (normal(kv_heads, capacity, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    prefix = torch.tensor([0, 1, 15, 16, 17, 64, 65, 127, 128, 511, 600]).int()
    lengths = torch.arange(rows).int().clamp(min=1)
    paths = torch.stack(
        [torch.randperm(80, generator=torch.Generator().manual_seed(row))[:deepest] for row in range(rows)]
    ).int()
    paths += 600
    values = q, k, v, prefix, paths, lengths
    got = called(device.attend, *values, dim**-0.5)
    assert_near(got, attend_reference(*values, dim**-0.5), dtype)
    for row in range(rows):
        part = [value[row : row + 1] for value in (prefix, paths, lengths)]
        alone = called(device.attend, q[row : row + 1], k, v, *part, dim**-0.5)
        assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows(dtype: torch.dtype, pinned: bool) -> None:
    table, tokens = normal(500, 896, dtype=dtype), torch.tensor([499, 0, 7, 7, 250])
    place = table.pin_memory() if pinned else table.cuda()
    assert torch.equal(device.gather_rows(place, tokens.cuda()).cpu(), table[tokens])
