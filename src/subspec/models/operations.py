"""Choose, once a device, between the native kernels, a device's, and the reference functions of this room."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from subspec.kernels import device, exact
from subspec.kernels.native import kernels
from subspec.models.attention import attend_reference
from subspec.models.mlp import silu_mul_reference
from subspec.models.norm import rms_norm_reference
from subspec.models.rope import rotate_and_store_reference


@dataclass(frozen=True)
class Operations:
    """The decoder's row-wise operations; every one is canonical.  Signatures: the reference functions'."""

    attend: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]
    rotate_and_store: Callable[..., torch.Tensor]


@functools.cache
def operations(on: torch.device) -> Operations:
    """A CUDA device's operations; on the CPU the native ones where a library is loaded, or the references."""
    if on.type == "cuda":
        return Operations(device.attend, device.rms_norm, device.silu_mul, device.rotate_and_store)
    if kernels().library is None:
        return Operations(
            attend_reference, rms_norm_reference, silu_mul_reference, rotate_and_store_reference
        )
    return Operations(exact.attend, exact.rms_norm, exact.silu_mul, exact.rotate_and_store)
