"""Triton's norm, activation and rotary embedding: the references' numbers, and a row's bits its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, SHARED_BYTES, Outcomes, compile_for, kinds, run, same_bits

from subspec.models.mlp import silu_mul_reference
from subspec.models.norm import rms_norm_reference
from subspec.models.rope import rotate_and_store_reference

pytest.importorskip("triton", reason="Triton is not installed")

REFERENCES: dict[str, Any] = {
    "rms_norm": rms_norm_reference,
    "silu_mul": silu_mul_reference,
    "rotate_and_store": rotate_and_store_reference,
}
SLOTS = 40
ORDER = torch.randperm(17, generator=torch.Generator().manual_seed(1))


def normal(*shape: int, kind: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DTYPES[kind])


def rotary(rows: int, heads: int, kv_heads: int, dim: int, gains: bool, kind: str) -> tuple[Any, ...]:
    """Arguments of ``rotate_and_store``: slots in no order, heads of the cache apart."""
    cache = torch.full((2, kv_heads + 1, SLOTS, dim), 7.0, dtype=DTYPES[kind])
    angles = torch.arange(50 * dim // 2).view(50, dim // 2) * 0.37
    places = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(2)).int()
    q_norm, k_norm = (1 + normal(dim, kind=kind), 1 - normal(dim, kind=kind)) if gains else (None, None)
    k_cache, v_cache = cache[:, :kv_heads]
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, kind=kind)
    positions, slots = (49 - places[:rows]).contiguous(), places[:rows].clone()
    return qkv, angles.cos(), angles.sin(), positions, slots, k_cache, v_cache, heads, q_norm, k_norm, 1e-6


def cases(kind: str) -> dict[str, tuple[Any, ...]]:
    shape = {(1, 64): "a row", (17, 896): "17 rows", (3, 100): "any width", (2, 5120): "wide"}
    found: dict[str, tuple[Any, ...]] = {}
    for (rows, width), name in shape.items():
        found[f"norm, {name}"] = "rms_norm", normal(rows, width, kind=kind), normal(width, kind=kind), 1e-6
        found[f"silu, {name}"] = "silu_mul", 6 * normal(rows, 2 * width, kind=kind)
    found["norm, heads"] = "rms_norm", normal(2, 3, 64, kind=kind), normal(64, kind=kind), 1e-5
    for rows, heads, kv_heads, dim in [(1, 2, 2, 64), (17, 2, 1, 128), (3, 7, 1, 80)]:
        for gains in (False, True):
            made = rotary(rows, heads, kv_heads, dim, gains, kind)
            found[f"rotary, {rows} rows, {dim}, {gains}"] = "rotate_and_store", *made
    return {f"{name}, {kind}": made for name, made in found.items()}


CASES = {name: made for kind in DTYPES for name, made in cases(kind).items()}
WHOLE = {
    "norm, 17 rows, bf16": (1,),
    "silu, 17 rows, bf16": (1,),
    "rotary, 17 rows, 128, True, bf16": (1, 4, 5),
}  # with 17 rows: which arguments have one entry a row


def variants() -> dict[str, tuple[Any, ...]]:
    """The cases with 17 rows again, in another order, and one row alone."""
    found = {}
    for name, by_row in WHOLE.items():
        for kind, rows in [("order", ORDER), ("one", slice(16, 17))]:
            case = CASES[name]
            found[f"{name}, {kind}"] = tuple(
                part[rows].contiguous() if i in by_row else part for i, part in enumerate(case)
            )
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(CASES | variants(), tmp_path_factory.mktemp("rowwise"), "cpu")


def assert_near(a: Tensor, b: Tensor) -> None:
    """A unit in the last place apart, or two where a norm's rounding comes before."""
    torch.testing.assert_close(
        a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-6 if a.dtype is torch.float32 else 4e-3
    )


@pytest.mark.parametrize("name", CASES)
def test_near_the_reference(outcomes: Outcomes, name: str) -> None:
    operator, *arguments = CASES[name]
    written = [part.clone() if isinstance(part, Tensor) else part for part in arguments]
    wanted = REFERENCES[operator](*written)
    for found, right in zip(outcomes[name], (wanted, *written), strict=True):
        if isinstance(found, Tensor) and found.is_floating_point():
            assert_near(found, right)


@pytest.mark.parametrize("kind", DTYPES)
def test_rotation_without_gains_is_exact(outcomes: Outcomes, kind: str) -> None:
    """Every product and sum rounds as the reference's; values are copied, other slots untouched."""
    name = f"rotary, 17 rows, 128, False, {kind}"
    written: list[Any] = [part.clone() if isinstance(part, Tensor) else part for part in CASES[name][1:]]
    wanted = rotate_and_store_reference(*written)
    assert same_bits(outcomes[name][0], wanted)
    for i in (5, 6):
        assert same_bits(outcomes[name][1 + i].contiguous(), written[i].contiguous())


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_norms_are_rounded_before_rotation(outcomes: Outcomes, kind: str) -> None:
    """As the reference's are: only where a norm's sum has another last bit may a number differ."""
    name = f"rotary, 17 rows, 128, True, {kind}"
    arguments: Any = [part.clone() if isinstance(part, Tensor) else part for part in CASES[name][1:]]
    wanted = rotate_and_store_reference(*arguments)
    assert (outcomes[name][0] == wanted).float().mean() > 0.98


@pytest.mark.parametrize("name", WHOLE)
def test_a_row_is_its_own(outcomes: Outcomes, name: str) -> None:
    whole, order, one = outcomes[name], outcomes[f"{name}, order"], outcomes[f"{name}, one"]
    assert same_bits(order[0], whole[0][ORDER])
    assert same_bits(one[0], whole[0][16:])
    if name.startswith("rotary"):
        slot = int(one[5])
        for i in (6, 7):
            assert same_bits(order[i].contiguous(), whole[i].contiguous())
            assert same_bits(one[i][:, slot].contiguous(), whole[i][:, slot].contiguous())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(tmp_path: Path) -> None:
    found = run(CASES | variants(), tmp_path, "cuda")
    for name in CASES:
        test_near_the_reference(found, name)
    for name in WHOLE:
        test_a_row_is_its_own(found, name)


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_compiles(architecture: int) -> None:
    from subspec.kernels.triton import rowwise

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for kind in kinds(architecture):
        dtype = DTYPES[kind]
        for width in (896, 8192):
            x = empty(5, width, dtype=dtype)
            compiled = compile_for(rowwise.rms_norm(x, empty(width, dtype=dtype), 1e-6, x), architecture)
            assert "fma.rn.f32" not in compiled.asm["ptx"]  # contraction could depend on the layout
        compile_for(
            rowwise.silu_mul(empty(5, 2 * 8960, dtype=dtype), empty(5, 8960, dtype=dtype)), architecture
        )
        cache, table, places = empty(2, 99, 128, dtype=dtype), empty(99, 64), empty(5, dtype=torch.int32)
        qkv, out = empty(5, 12 * 128, dtype=dtype), empty(5, 8, 128, dtype=dtype)
        for gain in (None, empty(128, dtype=dtype)):
            launch = rowwise.rotate_and_store(
                qkv, table, table, places, places, cache, cache, gain, gain, 1e-6, out
            )
            compile_for(launch, architecture)
