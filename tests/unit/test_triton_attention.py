"""The Triton attention: near the reference in the interpreter, and a row's bits its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, SHARED_BYTES, Outcomes, compile_for, kinds, run

from subspec.models.attention import attend_reference

pytest.importorskip("triton", reason="Triton is not installed")

SLOTS, CAPACITY = 220, 24
# Rows, query heads, key heads, head size, and each row's prefix and path length (cycled).
SHAPES = {
    "one row": (1, 2, 2, 64, [(70, 5)]),
    "no prefix": (2, 2, 1, 64, [(0, 1), (0, 24)]),
    "no path": (2, 4, 2, 64, [(1, 0), (128, 0)]),
    "block edges": (4, 2, 1, 128, [(63, 1), (64, 1), (60, 8), (128, 24)]),
    "group of 7": (2, 14, 2, 128, [(100, 3), (20, 24)]),
    "80 wide": (2, 4, 2, 80, [(65, 4), (3, 2)]),
    "96 wide": (2, 2, 2, 96, [(65, 4), (3, 2)]),
    "256 wide": (2, 2, 1, 256, [(33, 4), (3, 2)]),
    "17 rows": (17, 2, 1, 64, [(9, 3), (100, 0), (60, 9)]),
}
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 2e-6}


def case(name: str, kind: str) -> tuple[Any, ...]:
    """Arguments of ``attend``; the cache's unused slots hold NaN, its heads lie apart."""
    rows, heads, kv_heads, dim, seen = SHAPES[name]
    seeded = torch.Generator().manual_seed(rows * dim)
    prefix, path_lens = torch.tensor([seen[row % len(seen)] for row in range(rows)], dtype=torch.int32).T
    paths = torch.stack([150 + torch.randperm(60, generator=seeded)[:CAPACITY] for _ in range(rows)]).int()
    cache = torch.randn(2, kv_heads + 1, SLOTS, dim, generator=seeded).to(DTYPES[kind])
    used = torch.zeros(SLOTS, dtype=torch.bool)
    used[: int(prefix.max())] = True
    for row in range(rows):
        used[paths[row, : int(path_lens[row])].long()] = True
    cache[:, :, ~used] = torch.nan
    k, v = cache[:, :kv_heads]
    q = torch.randn(rows, heads, dim, generator=seeded).to(DTYPES[kind])
    return q, k, v, prefix.contiguous(), paths, path_lens.contiguous(), dim**-0.5


CASES = {f"{name}, {kind}": ("attend", *case(name, kind)) for name in SHAPES for kind in DTYPES}
WHOLE = "17 rows, fp32"  # where no rounding of results hides another order of sums
ORDER = torch.randperm(17, generator=torch.Generator().manual_seed(1))


def variants() -> dict[str, tuple[Any, ...]]:
    """The case with 17 rows again: in another order, one alone, in other slots, with paths for prefixes."""
    q, k, v, prefix, paths, path_lens, scale = case("17 rows", "fp32")

    def some(rows: Any, prefix: Tensor = prefix, paths: Tensor = paths, lens: Tensor = path_lens) -> Any:
        chosen = (part[rows].contiguous() for part in (prefix, paths, lens))
        return "attend", q[rows].contiguous(), k, v, *chosen, scale

    away = 150 + torch.randperm(70, generator=torch.Generator().manual_seed(2))
    moved = torch.cat([torch.arange(150), away])
    k2, v2 = torch.empty_like(k), torch.empty_like(v)
    k2[:, moved], v2[:, moved] = k, v
    tail = torch.arange(70, 100, dtype=torch.int32).expand(17, -1)
    longer = torch.cat([tail, paths], dim=1)
    return {
        "order": some(ORDER),
        "one": some(slice(5, 6)),
        "slots": ("attend", q, k2, v2, prefix, moved[paths.long()].int(), path_lens, scale),
        "no room for paths": some(slice(1, 2), paths=paths[:, :0]),
        "prefix as path": some(slice(1, 2), prefix - 30, longer, path_lens + 30),
        "nothing seen": some(slice(0, 1), prefix * 0, paths, path_lens * 0),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(CASES | variants(), tmp_path_factory.mktemp("attention"), "cpu")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_near_the_reference(outcomes: Outcomes, name: str, kind: str) -> None:
    result = outcomes[f"{name}, {kind}"][0]
    assert result.dtype is DTYPES[kind]
    q, k, v, *seen = case(name, kind)
    wanted = attend_reference(q.double(), k.double(), v.double(), *seen)
    assert (result.double() - wanted).abs().max() <= TOLERANCE[kind]


def test_a_row_is_its_own(outcomes: Outcomes) -> None:
    """Whatever other rows there are, whatever slots keys lie in, and whether they are prefix or path."""
    whole = outcomes[WHOLE][0]
    assert torch.equal(outcomes["order"][0], whole[ORDER])
    assert torch.equal(outcomes["one"][0], whole[5:6])
    assert torch.equal(outcomes["slots"][0], whole)
    assert torch.equal(outcomes["no room for paths"][0], whole[1:2])
    assert torch.equal(outcomes["prefix as path"][0], whole[1:2])
    assert not outcomes["nothing seen"][0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(tmp_path: Path) -> None:
    found = run(CASES | variants(), tmp_path, "cuda")
    for name in SHAPES:
        for kind in DTYPES:
            test_near_the_reference(found, name, kind)
    test_a_row_is_its_own(found)


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_compiles(architecture: int) -> None:
    from subspec.kernels.triton import attention

    def places(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    for kind in kinds(architecture):
        for dim in (64, 128, 256) if kind == "bf16" else (64, 128):  # 80 and 96 are as 128
            q, k = (torch.empty(s, dtype=DTYPES[kind], device="meta") for s in ((5, 8, dim), (2, 99, dim)))
            launch = attention.attend(q, k, k, places(5), places(5, 8), places(5), 0.1, q)
            compile_for(launch, architecture)
