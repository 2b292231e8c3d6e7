"""Native twins of the substitutes' reference functions, for torch tensors on the CPU.

Wraps ``cpu/substitute.cpp`` and ``cpu/quantize.cpp``.  The references, which define the arithmetic, live in
the ``substitute`` room above; this module knows the functions' arguments and nothing of the code layout.
Calls release the GIL and allocate nothing but what is named ``out``.
"""

import ctypes
import functools
import threading

import torch
from torch import Tensor

from subspec.kernels.native import DTYPE_CODES, kernels

_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class LowbitKernels:
    """The low-bit functions of one loaded library.

    All tensors are on the CPU, weights and activations have unit stride in their last dimension, and dtypes
    are bf16, fp16 or fp32.  Safe to call from several threads: each has its own scratch.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._product = library.subspec_substitute_product
        self._product.argtypes = [
            _POINTER,
            _INT64,
            _INT64,
            _INT64,
            _POINTER,
            _INT64,
            _POINTER,
            _POINTER,
            _INT,
            _POINTER,
            _INT,
        ]
        self._product.restype = None
        self._values = library.subspec_substitute_values
        self._values.argtypes = [
            _POINTER,
            _INT64,
            _POINTER,
            _INT64,
            _INT64,
            _POINTER,
            _INT,
            _INT,
        ]
        self._values.restype = None
        self._quantize = library.subspec_substitute_quantize
        self._quantize.argtypes = [
            _POINTER,
            _INT,
            _INT64,
            _INT64,
            _INT64,
            _POINTER,
            _POINTER,
            _INT,
        ]
        self._quantize.restype = None
        self._scratch_bytes = library.subspec_substitute_scratch_bytes
        self._scratch_bytes.argtypes = [_INT64, _INT64]
        self._scratch_bytes.restype = _INT64
        self._local = threading.local()

    def scratch_bytes(self, rows: int, k: int) -> int:
        """Bytes of scratch that a product of this many rows keeps for its thread."""
        return int(self._scratch_bytes(rows, k))

    def product(self, x: Tensor, tiles: int, n: int, bias: Tensor | None, out: Tensor) -> None:
        """Write ``x @ substitute.T + bias`` to ``out``.

        Args:
            x: (T, K), rows may be apart.
            tiles: address of the substitute's tiles.
            n: output features.
            bias: (N,) fp32, contiguous.
            out: (T, N) in x's dtype, contiguous.
        """
        rows, k = x.shape
        local = self._local.__dict__
        if local.get("rows", 0) < rows or local.get("k", 0) < k:
            self._grow(rows, k)
        self._product(
            x.data_ptr(), x.stride(0), rows, k, tiles, n, None if bias is None else bias.data_ptr(),
            out.data_ptr(), DTYPE_CODES[x.dtype], local["address"], torch.get_num_threads(),
        )  # fmt: skip

    def _grow(self, rows: int, k: int) -> None:
        """Make this thread's scratch large enough, and never smaller."""
        local = self._local
        rows, k = max(rows, getattr(local, "rows", 8)), max(k, getattr(local, "k", 0))
        local.scratch = torch.empty(self.scratch_bytes(rows, k) + 64, dtype=torch.uint8)
        local.address = local.scratch.data_ptr() + -local.scratch.data_ptr() % 64
        local.rows, local.k = rows, k

    def values(self, tiles: int, out: Tensor, first: int = 0, rows: Tensor | None = None) -> None:
        """Write dequantized output rows to ``out``.

        Args:
            tiles: address of the substitute's tiles.
            out: (rows, K), contiguous.
            first: the first output row, if ``rows`` is not given.
            rows: int64 output row numbers, contiguous and in range.
        """
        count, k = out.shape
        self._values(
            tiles, k, None if rows is None else rows.data_ptr(), first, count, out.data_ptr(),
            DTYPE_CODES[out.dtype], torch.get_num_threads(),
        )  # fmt: skip

    def quantize(self, weight: Tensor, importance: Tensor | None, out: Tensor) -> None:
        """Write the tiles of ``weight`` (N, K; rows may be apart) to ``out`` (uint8, contiguous).

        ``importance`` (K,) fp32, contiguous: what columns count in the error; None: all alike.
        """
        n, k = weight.shape
        threads = torch.get_num_threads()
        self._quantize(
            weight.data_ptr(),
            DTYPE_CODES[weight.dtype],
            weight.stride(0),
            n,
            k,
            None if importance is None else importance.data_ptr(),
            out.data_ptr(),
            threads,
        )


@functools.cache
def lowbit_kernels() -> LowbitKernels | None:
    """The functions of the library in use, or None without one (then the references serve)."""
    library = kernels().library
    return None if library is None else LowbitKernels(library)
