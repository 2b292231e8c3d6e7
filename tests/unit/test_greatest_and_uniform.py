"""Greatest logits and uniform numbers are those of sorting and of numpy, at every instruction-set level."""

import math
import threading

import numpy as np
import pytest
import torch
from fences import fenced
from torch import Tensor

from subspec.kernels import build, choice, native

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT_VIEW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SIZES = [1, 2, 7, 127, 128, 129, 256, 1000, 5003]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[*build.levels(), "reference"], autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs each test once for every level that this machine can load, and once without a library."""
    name = str(request.param)
    library, reason = (None, "") if name == "reference" else native._load(name)
    if library is None and reason:
        pytest.skip(reason)
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels(name, library, {}))
    return name


def rows_of(kind: str, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Logits of one kind, the same for the same arguments."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.zeros(rows, vocabulary)
    elif kind == "zeros of both signs":
        logits = torch.where(logits > 0, 0.0, -0.0)
    elif kind == "rising":
        logits = torch.arange(vocabulary).float().expand(rows, -1)
    elif kind == "special":
        kinds = torch.randint(0, 5, logits.shape, generator=generator)
        logits[kinds == 1], logits[kinds == 2], logits[kinds == 3] = torch.inf, -torch.inf, torch.nan
    elif kind == "masked":
        logits[logits < 5] = -torch.inf
    return logits.to(dtype).contiguous()


def chosen_by_sorting(row: Tensor, count: int) -> list[int]:
    """Tokens of a row's greatest logits, by plain Python: NaN first, then by value, then by number."""
    values = row.tolist()
    nothing = [token for token, value in enumerate(values) if math.isnan(value)]
    numbers = [token for token, value in enumerate(values) if not math.isnan(value)]
    return (nothing + sorted(numbers, key=lambda token: -values[token]))[:count]  # sorting is stable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["random", "tied", "equal", "zeros of both signs", "rising", "special", "masked"]
)
def test_the_greatest_logits_come_falling_and_equals_by_number(kind: str, dtype: torch.dtype) -> None:
    for vocabulary in SIZES:
        logits = rows_of(kind, 3, vocabulary, dtype)
        for count in {1, min(4, vocabulary), min(64, vocabulary), vocabulary}:
            values, tokens = choice.greatest(logits, count)
            assert tokens.tolist() == [chosen_by_sorting(row, count) for row in logits], (vocabulary, count)
            assert torch.equal(values.view(INT_VIEW[dtype]), logits.gather(1, tokens).view(INT_VIEW[dtype]))


def test_rows_may_lie_apart_and_nothing_beyond_them_is_read() -> None:
    for vocabulary in (5, 128, 1003):
        logits = rows_of("random", 4, vocabulary, torch.bfloat16)
        wide = torch.full((4, vocabulary + 3), 1000.0, dtype=torch.bfloat16)
        wide[:, :vocabulary] = logits
        expected = choice.greatest_reference(logits, 5)
        for found in (wide[:, :vocabulary], fenced(logits, at_end=True), fenced(logits, at_end=False)):
            values, tokens = choice.greatest(found, 5)
            assert torch.equal(tokens, expected[1])
            assert torch.equal(values, expected[0])


def test_threads_share_rows_and_numbers() -> None:
    logits, before = rows_of("random", 9, 20_001, torch.bfloat16), torch.get_num_threads()
    expected, numbers = choice.greatest_reference(logits, 64), choice.uniform_reference(3, 4, 20_001)
    torch.set_num_threads(4)
    try:
        values, tokens = choice.greatest(logits, 64)
        assert torch.equal(tokens, expected[1])
        assert torch.equal(values, expected[0])
        assert np.array_equal(choice.uniform(3, 4, 20_001), numbers)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 63) + 5, (1 << 64) - 1])
@pytest.mark.parametrize("position", [0, 1, 4095, 1 << 20, (1 << 32) + 1])
def test_uniform_numbers_are_numpys_bit_for_bit(seed: int, position: int) -> None:
    for count in (1, 3, 4, 5, 250, 20_003):
        numbers = choice.uniform(seed, position, count)
        assert np.array_equal(numbers, choice.uniform_reference(seed, position, count)), count
        assert numbers.min() > 0
        assert numbers.max() < 1


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    logits = [rows_of("random", rows, 3000, torch.float32) for rows in range(1, 7)]
    found: dict[int, bool] = {}

    def run(number: int) -> None:
        expected = choice.greatest_reference(logits[number], 32)[1]
        found[number] = all(torch.equal(choice.greatest(logits[number], 32)[1], expected) for _ in range(50))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(logits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(len(logits)), True)
