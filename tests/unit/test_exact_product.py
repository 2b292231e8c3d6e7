"""The start-up check of the exact product sees what calls are made, and takes no way that fails it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from subspec.errors import ModelError
from subspec.models import linear
from subspec.models.linear import ExactProduct, choose_product

SHAPES = [(48, 32), (40, 96)]
BIASED = [(40, 96)]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...], bool]]:
    """(rows, shape of the weight, whether there is a bias) of each of torch's products; no native kernels."""
    found: list[tuple[int, tuple[int, ...], bool]] = []
    original: Linear = F.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found.append((len(x), tuple(weight.shape), bias is not None))
        return original(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    monkeypatch.setattr(linear, "kernels", lambda: type("None", (), {"library": None}))
    return found


def chosen() -> ExactProduct:
    return choose_product(SHAPES, torch.float32, torch.zeros(96 * 48 * 4, dtype=torch.uint8), BIASED)


@pytest.mark.parametrize("way", [ExactProduct("", least_rows=4), ExactProduct("", rows_a_call=16)])
def test_no_call_is_longer_or_shorter_than_those_that_were_tried(
    way: ExactProduct, calls: list[tuple[int, tuple[int, ...], bool]]
) -> None:
    weight = torch.randn(40, 96)
    for rows in (1, 5, 16, 256, 257, 700):
        calls.clear()
        x = torch.randn(rows, 96)
        found = way(x, weight, None)
        assert found.shape == (rows, 40)
        assert torch.allclose(found, x @ weight.T, atol=1e-4)
        sizes = [size for size, _, _ in calls]
        assert sum(sizes) >= rows
        assert min(sizes) >= 4
        assert max(sizes) <= 256
        assert way.rows_a_call is None or set(sizes) == {16}


def test_every_shape_is_tried_and_with_a_bias_where_it_has_one(
    calls: list[tuple[int, tuple[int, ...], bool]],
) -> None:
    chosen()
    assert {(shape, has) for _, shape, has in calls} == {
        ((48, 32), False),
        ((40, 96), False),
        ((40, 96), True),
    }


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_library_whose_short_calls_sum_otherwise_is_not_believed(
    with_bias: bool, calls: list[tuple[int, tuple[int, ...], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 9 rows, or below 9 rows with a bias, the order of summation is another one."""
    counted: Linear = F.linear

    def otherwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(x) < 9 and (bias is not None or not with_bias):
            return counted(x.flip(1), weight.flip(1), bias)
        return counted(x, weight, bias)

    monkeypatch.setattr(F, "linear", otherwise)
    way = chosen()
    assert (way.rows_a_call or way.least_rows) >= 16, "less than 9 rows a call"


def test_if_no_way_passes_it_is_said(
    calls: list[tuple[int, tuple[int, ...], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Linear = F.linear
    generator = torch.Generator().manual_seed(0)

    def random(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return counted(x, weight, bias) * (1 + torch.rand(1, generator=generator))

    monkeypatch.setattr(F, "linear", random)
    with pytest.raises(ModelError, match="no exact product is row-invariant"):
        chosen()
