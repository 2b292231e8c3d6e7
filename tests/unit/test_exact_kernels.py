"""The exact kernels: close to plain torch, and every row a pure function of its own inputs, bit for bit."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from subspec.errors import OptionError
from subspec.kernels import build, exact, native

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half a unit in the last place, relative: what one rounding may cost.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
INT_VIEW = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}


# Levels, and the ways of bf16 products that some have beside the plain one.
WAYS = {**dict.fromkeys(build.levels(), 0), "avx512bf16 pairs": 1, "amx": 2}


@pytest.fixture(params=WAYS, autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs each test once for every level that this machine can load, and each way of bf16 products."""
    name, way = str(request.param).partition(" ")[0], WAYS[request.param]
    library, reason = native._load(name) if name in native.levels() else (None, "of another processor family")
    if library is None:
        pytest.skip(reason)
    if way and "linear" not in request.node.name and "rounding" not in request.node.name:
        pytest.skip("only products have several ways")
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels(name, library, {}, way))
    return name


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restores the thread count, and starts every test with the same random numbers."""
    before = torch.get_num_threads()
    torch.manual_seed(7)
    torch.set_num_threads(1)  # tests that mean threads say so
    yield
    torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(INT_VIEW[a.dtype]), b.contiguous().view(INT_VIEW[b.dtype]))


def assert_rounds_to(result: Tensor, reference: Tensor, scale: Tensor, terms: float) -> None:
    """The result is the fp64 reference within one rounding and `terms` fp32 rounding units of `scale`."""
    bound = reference.abs() * ROUNDING[result.dtype] * 1.001 + scale * terms * 2.0**-24
    bound += 2.0**-25 if result.dtype == torch.float16 else 1e-40
    excess = ((result.double() - reference).abs() - bound).max()
    assert excess <= 0, f"over the bound by {excess}"


def test_no_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("reference", None, {}))
    with pytest.raises(OptionError, match="doctor"):
        exact.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)


# ------------------------------------------------------------------------------------------------ linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 31, 64, 100, 333])
def test_linear_matches_fp64(dtype: torch.dtype, length: int) -> None:
    for T, N, biased in itertools.product([1, 2, 5, 6, 7, 13, 250], [1, 4, 7, 66], [False, True]):
        if T == 250 and N == 66 and length > 100:
            continue
        x, weight = torch.randn(T, length).to(dtype), torch.randn(N, length).to(dtype)
        bias = torch.randn(N).to(dtype) if biased else None
        reference = x.double() @ weight.double().T
        magnitude = x.double().abs() @ weight.double().abs().T
        if bias is not None:
            reference, magnitude = (
                reference + bias.double(),
                magnitude + bias.double().abs(),
            )
        out = torch.full((T, N), float("nan"), dtype=dtype)
        assert exact.linear(x, weight, bias, out) is out
        assert_rounds_to(out, reference, magnitude, length / 4 + 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_are_pure(dtype: torch.dtype) -> None:
    for K, N in [(1, 3), (100, 7), (515, 65), (1536, 333)]:
        x, weight, bias = (
            torch.randn(64, K).to(dtype),
            torch.randn(N, K).to(dtype),
            torch.randn(N).to(dtype),
        )
        torch.set_num_threads(1)
        alone = torch.cat([exact.linear(row[None], weight, bias) for row in x])
        for count in (2, 3, 5, 6, 7, 12, 23, 64):
            assert same_bits(exact.linear(x[:count], weight, bias), alone[:count])
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            order = torch.randperm(64)
            assert same_bits(exact.linear(x[order].contiguous(), weight, bias), alone[order])
        torch.set_num_threads(1)
        hostile = torch.full((9, K), float("nan"), dtype=dtype)
        hostile[4] = x[11]
        assert same_bits(exact.linear(hostile, weight, bias)[4], alone[11])
        hostile.zero_()[8] = x[11]
        assert same_bits(exact.linear(hostile, weight, bias)[8], alone[11])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_outputs_are_pure(dtype: torch.dtype) -> None:
    """A weight row gives the same bits wherever it lies: heads are streamed in chunks of rows."""
    x, weight = torch.randn(7, 200).to(dtype), torch.randn(75, 200).to(dtype)
    whole = exact.linear(x, weight)
    for first, last in [(0, 1), (0, 33), (33, 75), (5, 6), (70, 75)]:
        assert same_bits(exact.linear(x, weight[first:last]), whole[:, first:last])
    shifted = torch.empty(1 + weight.numel(), dtype=dtype)[1:].view_as(weight).copy_(weight)
    assert same_bits(exact.linear(x, shifted), whole)


def test_linear_of_many_rows_equals_few() -> None:
    x, weight = torch.randn(500, 1100).bfloat16(), torch.randn(90, 1100).bfloat16()
    whole = exact.linear(x, weight)
    for start in (0, 100, 238, 241, 479, 499):
        assert same_bits(exact.linear(x[start : start + 3], weight), whole[start : start + 3])


# --------------------------------------------------------------------------------------------- attention


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, lists: list[list[int]], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in fp64 over explicit slot lists, and the largest |value| seen by each output."""
    group = q.shape[1] // k.shape[0]
    out = torch.zeros(q.shape, dtype=torch.float64)
    bound = torch.zeros(q.shape, dtype=torch.float64)
    for t, slots in enumerate(lists):
        for h in range(q.shape[1]):
            if not slots:
                continue
            keys, values = k[h // group, slots].double(), v[h // group, slots].double()
            weights = torch.softmax(keys @ q[t, h].double() * scale, dim=0)
            out[t, h], bound[t, h] = weights @ values, values.abs().amax(0)
    return out, bound


def tree_inputs(lists: list[list[int]], prefix: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's inputs for rows whose slot lists begin with 0 .. prefix-1."""
    longest = max((len(slots) - p for slots, p in zip(lists, prefix, strict=True)), default=0)
    paths = torch.full((len(lists), longest), -(2**31), dtype=torch.int32)
    for t, (slots, p) in enumerate(zip(lists, prefix, strict=True)):
        paths[t, : len(slots) - p] = torch.tensor(slots[p:], dtype=torch.int32)
    lens = [len(slots) - p for slots, p in zip(lists, prefix, strict=True)]
    return (
        torch.tensor(prefix, dtype=torch.int32),
        paths,
        torch.tensor(lens, dtype=torch.int32),
    )


def cache_of(heads: int, slots: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as views of a larger cache: heads lie further apart than their slots fill."""
    both = torch.randn(2, heads, slots + 3, dim).to(dtype)
    both[:, :, slots:] = float("nan")
    return both[0, :, :slots], both[1, :, :slots]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 6, 64, 80, 128, 512])
def test_attend_matches_fp64(dtype: torch.dtype, dim: int) -> None:
    for kv_heads, group in [(1, 1), (2, 3), (1, 7)]:
        k, v = cache_of(kv_heads, 210, dim, dtype)
        prefix = [0, 1, 5, 63, 64, 65, 130, 130, 0, 0]
        lists = [list(range(p)) for p in prefix]
        lists[6] += [150, 140, 209]
        lists[7] += [150, 141]
        lists[8] += [150, 3, 77]
        q = (2 * torch.randn(len(lists), kv_heads * group, dim)).to(dtype)
        scale = 1 / math.sqrt(dim)
        out = exact.attend(q, k, v, *tree_inputs(lists, prefix), scale)
        reference, bound = attend_reference(q, k, v, lists, scale)
        assert_rounds_to(out, reference, bound, 200 + dim)
        assert out[0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (4, 4, 20), (9, 1, 128)])
def test_attend_does_not_depend_on_slots(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """The same keys as prefix, as path, or in part; NaN in every slot that is not to be seen."""
    k, v = cache_of(kv_heads, 150, dim, dtype)
    q = torch.randn(3, heads, dim).to(dtype)
    for count in (1, 5, 64, 100, 150):
        rows = torch.full((3,), count, dtype=torch.int32)
        nothing = torch.zeros(3, dtype=torch.int32)
        whole = exact.attend(q, k, v, rows, torch.empty(3, 0, dtype=torch.int32), nothing, 0.3)
        for kept in {0, 1, count // 2, count - 1, count}:
            slots = torch.cat([torch.arange(kept), kept + 20 + torch.randperm(400)[: count - kept]])
            spread = torch.full((2, kv_heads, 600, dim), float("nan"), dtype=dtype)
            spread[0, :, slots], spread[1, :, slots] = k[:, :count], v[:, :count]
            paths = slots[kept:].int().expand(3, -1).contiguous()
            out = exact.attend(q, spread[0], spread[1], nothing + kept, paths, rows - kept, 0.3)
            assert same_bits(out, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_attend_rows_are_pure(dtype: torch.dtype, dim: int) -> None:
    """Any batch, order, chunk or thread count gives the bits of the row alone."""
    S = 180
    k, v = cache_of(2, S, dim, dtype)
    q = torch.randn(100, 6, dim).to(dtype)
    prefix = torch.randint(0, 140, (100,), dtype=torch.int32)
    prefix[:50] = torch.arange(50) + 60  # as in prefill
    paths = torch.randint(140, S, (100, 9), dtype=torch.int32)
    lens = torch.randint(0, 10, (100,), dtype=torch.int32)
    lens[:50] = 0

    def run(rows: Tensor) -> Tensor:
        return exact.attend(q[rows], k, v, prefix[rows], paths[rows], lens[rows], 0.2)

    torch.set_num_threads(1)
    alone = torch.cat([run(torch.tensor([t])) for t in range(100)])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for rows in [
            torch.arange(100),
            torch.randperm(100),
            torch.arange(13, 50),
            torch.arange(48, 55),
        ]:
            assert same_bits(run(rows), alone[rows])


def test_attend_is_stable_for_large_scores() -> None:
    k, v = cache_of(1, 130, 64, torch.float32)
    q = torch.randn(1, 2, 64) * 300
    lists = [list(range(130))]
    out = exact.attend(q, k, v, *tree_inputs(lists, [130]), 1.0)
    reference, bound = attend_reference(q, k, v, lists, 1.0)
    assert_rounds_to(out, reference, bound, 2e5)  # scores of some 7,000 carry errors of 4e-3


# ------------------------------------------------------------------------------------------------- small


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 64, 100, 1536])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = (3 * torch.randn(37, width)).to(dtype), torch.randn(width).to(dtype)
    out = exact.rms_norm(x, weight, 1e-5)
    wide = x.double()
    reference = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5) * weight.double()
    assert_rounds_to(out, reference, reference.abs(), 8 + width / 32)
    assert same_bits(torch.cat([exact.rms_norm(row[None], weight, 1e-5) for row in x]), out)
    order = torch.randperm(37)
    assert same_bits(exact.rms_norm(x[order], weight, 1e-5), out[order])
    assert same_bits(exact.rms_norm(x, weight, 1e-5, out=x), out)


def test_rms_norm_with_threads() -> None:
    x, weight = torch.randn(64, 1003), torch.randn(1003)
    torch.set_num_threads(1)
    alone = torch.cat([exact.rms_norm(row[None], weight, 1e-5) for row in x])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert same_bits(exact.rms_norm(x, weight, 1e-5), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 16, 33, 2500])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    pair = (4 * torch.randn(29, 2 * width)).to(dtype)
    out = exact.silu_mul(pair)
    gate, up = pair.double().chunk(2, dim=1)
    reference = gate * torch.sigmoid(gate) * up
    assert_rounds_to(out, reference, reference.abs(), 10)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert same_bits(exact.silu_mul(pair), out)
    flat = torch.stack([gate.flatten(), up.flatten()], dim=1).to(dtype)[:200]
    alone = torch.cat([exact.silu_mul(element[None]) for element in flat])
    assert same_bits(alone.flatten(), out.flatten()[:200])
    mixed = exact.silu_mul(torch.cat([pair[:, 1:width], pair[:, width + 1 :]], dim=1))
    assert same_bits(mixed, out[:, 1:])


def test_silu_of_every_half() -> None:
    """Every bf16 and fp16 gate, against fp64: no input is special, infinities included."""
    for dtype in (torch.bfloat16, torch.float16):
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        gate = gate[~gate.isnan()]
        pair = torch.cat([gate, torch.ones_like(gate)])[None]
        out = exact.silu_mul(pair)[0]
        finite = gate.isfinite()
        wide = gate[finite].double()
        reference = wide * torch.sigmoid(wide)
        kept = torch.where(reference.abs() > 1e-36, reference, 0)  # below, sigmoid is subnormal in fp32
        assert_rounds_to(out[finite], kept, kept.abs() + 1e-28, 10)
        assert out[gate == float("inf")].isinf().all()


def test_exponential_in_fp32() -> None:
    """silu(x) / x is 1 / (1 + e^-x): for x below -20 it shows e^x itself, to 2 units in the last place."""
    x = torch.linspace(-80, -20, 200_001)
    shown = exact.silu_mul(torch.cat([x, torch.ones_like(x)])[None])[0].double()
    reference = x.double() * torch.sigmoid(x.double())
    assert ((shown - reference).abs() / reference.abs()).max() < 3 * 2.0**-23


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """Heads (T, n, D) normalised and rotated by (T, D/2) tables, as the documentation says."""
    wide = x.double()
    if norm is not None:
        wide = (
            (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.double())
            .to(x.dtype)
            .double()
        )
    first, second = wide.chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 64, 80, 128])
def test_rotate_and_store(dtype: torch.dtype, normed: bool, dim: int) -> None:
    T, H, Hkv, S, M = 11, 4, 2, 30, 50
    qkv = torch.randn(T, (H + 2 * Hkv) * dim).to(dtype)
    angle = torch.rand(M, dim // 2) * 6
    positions = torch.randint(0, M, (T,), dtype=torch.int32)
    slots = torch.randperm(S)[:T].int()
    norms = [torch.randn(dim).to(dtype) if normed else None for _ in range(2)]
    k, v = cache_of(Hkv, S, dim, dtype)
    before_k, before_v = k.clone(), v.clone()
    tables = angle.cos(), angle.sin()
    q = exact.rotate_and_store(qkv, *tables, positions, slots, k, v, H, norms[0], norms[1], 1e-6)
    heads = qkv.view(T, H + 2 * Hkv, dim)
    at = [table[positions.long()] for table in tables]
    # With a norm, its rounding may fall the other way: one more unit in the last place of the norm's result.
    extra = 2 * ROUNDING[dtype] * 2**24 if normed else 0
    for out, part, norm in [
        (q, heads[:, :H], norms[0]),
        (k[:, slots].transpose(0, 1), heads[:, H:-Hkv], norms[1]),
    ]:
        reference = rotate_reference(part, at[0], at[1], norm, 1e-6)
        largest = reference.view(*part.shape[:2], 2, dim // 2).norm(dim=-2).repeat(1, 1, 2)
        assert_rounds_to(out, reference, largest, 8 + extra)
    assert same_bits(v[:, slots].transpose(0, 1), heads[:, -Hkv:])
    others = [slot for slot in range(S) if slot not in slots.tolist()]
    assert same_bits(k[:, others], before_k[:, others])
    assert same_bits(v[:, others], before_v[:, others])
    for t in range(T):
        k1, v1 = before_k.clone(), before_v.clone()
        one = slice(t, t + 1)
        alone = exact.rotate_and_store(
            qkv[one], *tables, positions[one], slots[one], k1, v1, H, norms[0], norms[1], 1e-6
        )
        assert same_bits(alone, q[one])
        assert same_bits(k1[:, slots[t]], k[:, slots[t]])


# --------------------------------------------------------------------------------------------- rounding


def test_rounding_matches_torch() -> None:
    """A sum of two is rounded once and as torch rounds it, in every binade; what is NaN stays NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15).short().view(dtype)
        values = torch.where(values.abs() < 1e-37, 0, values)  # products may flush what is subnormal in fp32
        for scale in (1.0, 2.0**-8, 2.0**-12, 0.75):
            other = (values.float() * torch.rand(values.shape) * scale).to(dtype)
            other = torch.where(other.abs() < 1e-37, 0, other)
            every = exact.linear(torch.stack([values, other], 1), torch.ones(5, 2, dtype=dtype))
            expected = (values.float() + other.float()).to(dtype)
            number = ~expected.isnan()
            for out in every.unbind(1):  # four are rounded together, the fifth alone
                assert torch.equal(out[number], expected[number])
                assert out[~number].isnan().all()
