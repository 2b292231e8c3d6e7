"""Tests of this folder need a CUDA device; without one they are skipped, in one line of the report."""

from collections.abc import Iterator

import pytest
import torch

from subspec.memory.backend.cuda import CudaBackend


def pytest_runtest_setup() -> None:
    """Skip here: pytest tells of skips at one place once."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    backend = CudaBackend()
    yield backend
    backend.close()
