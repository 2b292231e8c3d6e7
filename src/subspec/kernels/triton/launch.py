"""What all kernels of this folder share: how a launch is described, and the product of two blocks.

A kernel's module describes a launch from its arguments; ``kernels.device_operators`` runs it, and the tests
compile the very same description for devices that are not here.

Triton compiles a kernel anew for arguments that differ in what it specializes on.  So whatever may differ
from call to call, numbers of rows and where indices start, is excepted: once a kernel ran for a model's
sizes, it is compiled for all calls, and may be captured in a graph.  Knows nothing of what kernels compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: made by ``triton.jit``.
        grid: programs along each axis; none at all if one is 0.
        arguments: tensors, numbers and None, by parameter name; the first is a tensor that says the device.
        constants: the parameters that are known when compiling.
        options: ``num_warps`` and the like.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, object]
    options: Mapping[str, object]

    def run(self) -> None:
        """Enqueue it on the current stream of its device; no allocation, no synchronization."""
        if 0 in self.grid:
            return
        first = next(iter(self.arguments.values()))
        assert isinstance(first, Tensor)
        with torch.cuda.device_of(first):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def block(size: int, least: int = 16) -> int:
    """The power of two that covers ``size``, at least ``least``."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def dot(a, b, total):
    """Total + a · b with fp32 accumulation; fp32 operands are not shortened.

    Triton's interpreter multiplies the bit patterns of bf16 operands: there they become fp32 first.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Numbers in fp32 rounded to a dtype, to nearest even: the interpreter itself would cut bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))  # decided by TRITON_INTERPRET
