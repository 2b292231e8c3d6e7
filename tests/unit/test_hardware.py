"""The trial that a plan rests on: it finds costs, and reads no more than they are worth."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from subspec.kernels.native import kernels
from subspec.memory.disk import ReadSpeed, measure_read
from subspec.planning import hardware
from subspec.planning.hardware import measure_costs
from subspec.store.prepare import prepare
from subspec.store.reader import Store

pytestmark = pytest.mark.skipif(kernels().library is None, reason="without native kernels nothing is tried")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(prepare(write_tiny(tmp_path / "tiny", "qwen2", torch.bfloat16), store=tmp_path / "store"))
    yield opened
    opened.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each measurement of reads is told to read."""
    found: list[int] = []

    def counted(paths: Sequence[Path], threads: int, request_bytes: int, total_bytes: int) -> ReadSpeed:
        found.append(total_bytes)
        return measure_read(paths, threads, request_bytes, total_bytes)

    monkeypatch.setattr(hardware, "measure_read", counted)
    return found


def test_a_small_model_is_not_read_more_than_a_few_times(store: Store, asked: list[int]) -> None:
    costs = measure_costs(store)
    sweep_bytes = sum(path.stat().st_size for path in store.images())
    assert sweep_bytes <= sum(asked) <= 6 * sweep_bytes
    assert min(costs.link_bytes_per_s, costs.plain_s_per_byte, costs.rebuilt_s_per_byte) > 0


def test_of_a_large_model_enough_is_read_to_outlast_a_burst(
    store: Store, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_bytes = sum(path.stat().st_size for path in store.images())
    monkeypatch.setattr(hardware, "SETTLING_BYTES", sweep_bytes // 2)
    monkeypatch.setattr(hardware, "READ_BYTES", sweep_bytes // 4)
    measure_costs(store)
    assert asked == [sweep_bytes // 2, sweep_bytes // 4]
