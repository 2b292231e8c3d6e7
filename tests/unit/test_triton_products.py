"""Triton's products and gather: exact where fp32 is, else near a float64 product; a row's bits its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, SHARED_BYTES, Outcomes, compile_for, kinds, run, same_bits

from subspec.substitute import layout
from subspec.substitute.quantize import quantize_tiles

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [(1, 16, 64), (16, 40, 65), (17, 33, 128), (5, 48, 300), (2, 7, 40)]  # T, N, K
OPERATORS = ["lowbit_linear", "exact_linear"]


def seeded(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(7**i * part for i, part in enumerate(key)))


def whole_numbers(n: int, k: int) -> Tensor:
    """Tiles of a weight of small whole numbers: scale 1 or 2, mid −3 … 3, all codes."""
    some = seeded(n, k)
    g = layout.groups(k)
    codes = torch.randint(0, 16, (n, k), generator=some, dtype=torch.uint8)
    scales, mids = torch.randint(1, 3, (n, g), generator=some), torch.randint(-3, 4, (n, g), generator=some)
    return layout.pack(codes, scales.bfloat16(), mids.bfloat16())


def case(operator: str, shape: tuple[int, int, int], kind: str, whole: bool) -> tuple[object, ...]:
    """An operator's arguments; with a bias unless there is one row, in fp32 for odd sizes."""
    (rows, n, k), dtype, some = shape, DTYPES[kind], seeded(*shape)
    x = torch.randint(-2, 3, (rows, k), generator=some) if whole else torch.randn(rows, k, generator=some)
    bias = torch.randint(-4, 5, (n,), generator=some).to(torch.float32 if n % 2 else dtype)
    tiles = whole_numbers(n, k) if whole else quantize_tiles(torch.randn(n, k, generator=some).bfloat16())
    with_bias = None if rows == 1 else bias
    if operator == "lowbit_linear":
        return operator, x.to(dtype), tiles, n, k, with_bias
    return operator, x.to(dtype), layout.dequantize(tiles, n, k, dtype), with_bias


def name(operator: str, shape: tuple[int, int, int], kind: str, whole: bool) -> str:
    return f"{operator} {shape} {kind} {whole}"


CASES = {
    name(operator, shape, kind, whole): case(operator, shape, kind, whole)
    for operator in OPERATORS for shape in SHAPES for kind in DTYPES for whole in (False, True)
}  # fmt: skip
TABLE = torch.randint(-(2**15), 2**15, (9, 1100), generator=seeded(3), dtype=torch.int16).view(torch.bfloat16)
TOKENS = torch.tensor([8, 0, 3, 3])
ORDER = torch.randperm(17, generator=seeded(4))


def variants() -> dict[str, tuple[object, ...]]:
    """The cases with 17 rows again, in another order, and one row alone; and gathered rows."""
    found: dict[str, tuple[object, ...]] = {
        f"gather {kind}": ("gather_rows", TABLE, TOKENS.to(kind)) for kind in (torch.int32, torch.int64)
    }
    for operator in OPERATORS:
        _, x, *rest = case(operator, SHAPES[2], "bf16", False)
        assert isinstance(x, Tensor)
        found[f"{operator} order"] = operator, x[ORDER].contiguous(), *rest
        found[f"{operator} one"] = operator, x[16:].contiguous(), *rest
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(CASES | variants(), tmp_path_factory.mktemp("products"), "cpu")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_products(outcomes: Outcomes, operator: str, shape: tuple[int, int, int], kind: str) -> None:
    """Products of whole numbers are exact, others within rounding of the sum and of the result."""
    dtype = DTYPES[kind]
    for whole in (True, False):
        result, x, weight, *rest = outcomes[name(operator, shape, kind, whole)]
        if operator == "lowbit_linear":
            weight = layout.dequantize(weight, *shape[1:], dtype)
        x, weight, bias = x.double(), weight.double(), 0.0 if rest[-1] is None else rest[-1].double()
        wanted = x @ weight.T + bias
        if whole:
            assert same_bits(result, wanted.float().to(dtype))
        else:
            margin = torch.finfo(dtype).eps * wanted.abs() + 1e-6 * (x.abs() @ weight.abs().T)
            assert ((result.double() - wanted).abs() <= margin).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_row_is_its_own(outcomes: Outcomes, operator: str) -> None:
    whole = outcomes[name(operator, SHAPES[2], "bf16", False)][0]
    assert same_bits(outcomes[f"{operator} order"][0], whole[ORDER])
    assert same_bits(outcomes[f"{operator} one"][0], whole[16:])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_gathers_bits(outcomes: Outcomes, kind: torch.dtype) -> None:
    assert same_bits(outcomes[f"gather {kind}"][0], TABLE[TOKENS])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(tmp_path: Path) -> None:
    found = run(CASES | variants(), tmp_path, "cuda")
    for operator in OPERATORS:
        for shape in SHAPES:
            for kind in DTYPES:
                test_products(found, operator, shape, kind)
        test_a_row_is_its_own(found, operator)
    test_gathers_bits(found, torch.int32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gathers_out_of_pinned_memory() -> None:
    from subspec.kernels.device import gather_rows

    assert same_bits(gather_rows(TABLE.pin_memory(), TOKENS.cuda()).cpu(), TABLE[TOKENS])


def test_constants_are_the_layouts() -> None:
    from subspec.kernels import device_operators as operators
    from subspec.kernels.triton import lowbit

    assert lowbit.TILE_WORDS.value * 4 == lowbit.TILE_HALVES.value * 2 == layout.TILE_BYTES
    assert lowbit.SCALE_HALVES.value * 2 == layout.CODE_BYTES
    for constant in ("GROUP", "TILE_ROWS", "TILE_BYTES"):
        assert getattr(operators, constant) == getattr(layout, constant)


def test_nothing_is_compiled_anew_between_calls() -> None:
    """Whatever differs from call to call is not specialized on: a graph must not meet the compiler."""
    from subspec.kernels.triton import attention, gather, linear, lowbit, residual, rowwise

    kernels = [
        attention.attend_row, gather.copy_part, linear.multiply, lowbit.multiply_codes, residual.decode_tile,
        rowwise.rms_norm_row, rowwise.silu_mul_part, rowwise.rotate_and_store_head,
    ]  # fmt: skip
    indices = {"prefix", "paths", "path_lens", "positions", "slots", "tokens", "residual"}
    for parameter in (parameter for kernel in kernels for parameter in kernel.params):
        assert parameter.do_not_specialize or parameter.name not in {"rows", "capacity"}
        assert parameter.do_not_specialize_on_alignment or parameter.name not in indices


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_compiles(architecture: int) -> None:
    from subspec.kernels.triton import gather, linear, lowbit

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for kind in kinds(architecture):
        dtype = DTYPES[kind]
        for n, k in [(1536, 8960), (130, 1000)] if architecture == 86 else [(1536, 8960)]:
            x, weight, out = (empty(*shape, dtype=dtype) for shape in ((5, k), (n, k), (5, n)))
            tiles = empty(layout.tile_bytes(n, k), dtype=torch.uint8)
            bias = empty(n, dtype=torch.float32) if kind == "bf16" else None
            compile_for(linear.exact_linear(x, weight, bias, out), architecture)
            compiled = compile_for(lowbit.lowbit_linear(x, tiles, n, k, bias, out), architecture)
            assert ".ftz" not in compiled.asm["ptx"]  # what flushes subnormal weights to zero
    for index in (torch.int32, torch.int64):
        table, out = empty(9, 1536, dtype=dtype), empty(5, 1536, dtype=dtype)
        compile_for(gather.gather_rows(table, empty(5, dtype=index), out), architecture)
