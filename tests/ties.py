"""Which of equal logits a device takes is its own affair; a host that foretells it has to do likewise."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from subspec.speculation import sampling


@contextmanager
def ties_as_on_a_device() -> Iterator[None]:
    """Of equal logits, samplers guess those that a device would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "greatest", torch.topk)
        yield
