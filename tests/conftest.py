"""Makes ``tests`` importable for all test folders: ``from tiny import write_tiny``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from subspec.checkpoint import fetch_demo


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for a module of tiny models, where handing work to a second costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_file() -> Path:
    """The demo model's GGUF file, downloaded on first use."""
    return fetch_demo()
