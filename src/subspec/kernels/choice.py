"""What choosing tokens takes of native code: greatest logits, and the numbers that noise is made from.

``greatest`` and ``uniform`` run ``cpu/choice.cpp`` where a library is loaded, else their references, which
stand here beside them and give the same tokens, values and bits.  For tensors on the CPU.  Knows nothing of
samplers or trees.  Calls release the GIL.
"""

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

from subspec.kernels import native

_P, _I, _N, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64


def greatest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest logits of each row.

    Args:
        logits: (T, V) bf16, fp16 or fp32; those of a row are contiguous.
        count: how many, at most V.

    Returns:
        Values (T, count) in the same dtype, falling, and their tokens (T, count) int64.  Of equal logits the
        one of lower number comes first, also where only some of them are among the greatest.  NaN is greater
        than all else.

    Raises:
        MemoryError: for the few numbers per row that it takes.
    """
    library = native.kernels().library
    if library is None:
        return greatest_reference(logits, count)
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 or vocabulary == 1
    assert 0 < count <= vocabulary
    values = torch.empty(rows, count, dtype=logits.dtype)
    tokens = torch.empty(rows, count, dtype=torch.int64)
    if _declared(library).subspec_greatest(
        native.DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocabulary,
        count,
        tokens.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory to rank {vocabulary} logits")
    return values, tokens


def greatest_of_row(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``greatest`` of one row (V,): values (count,) and tokens (count,)."""
    values, tokens = greatest(row[None], count)
    return values[0], tokens[0]


def greatest_reference(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``greatest``, by a stable sort of everything."""
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], tokens[:, :count]


def uniform(seed: int, position: int, count: int) -> np.ndarray:
    """Numbers (count,) in fp64, strictly inside (0, 1), the same for a seed and position whenever asked.

    Args:
        seed: below 2⁶⁴.
        position: likewise.
        count: how many; more of them begin with the same ones.
    """
    library = native.kernels().library
    if library is None:
        return uniform_reference(seed, position, count)
    numbers = np.empty(count)
    _declared(library).subspec_uniform(seed, position, count, numbers.ctypes.data, torch.get_num_threads())
    return numbers


def uniform_reference(seed: int, position: int, count: int) -> np.ndarray:
    """``uniform``: the 53 upper bits of words of Philox4x64-10, moved off 0 and 1."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))
    return np.minimum(generator.random(count) + 2.0**-54, 1 - 2.0**-53)


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions set."""
    library.subspec_greatest.argtypes = [_I, _P, _N, _N, _N, _N, _P, _P, _I]
    library.subspec_greatest.restype = _I
    library.subspec_uniform.argtypes = [_U, _U, _N, _P, _I]
    library.subspec_uniform.restype = None
    return library
