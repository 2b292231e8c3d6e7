"""Native twins of the residual codec, and the exact product that rebuilds its weights as it goes.

Wraps ``cpu/residual.cpp`` and the residual form of ``cpu/linear.cpp``.  The references, which define the
format, live in the ``substitute`` room above; this module knows the functions' arguments only.  Calls release
the GIL.
"""

import ctypes
import functools

import torch
from torch import Tensor

from subspec.kernels import native
from subspec.kernels.native import DTYPE_CODES

_P, _I, _N = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class ResidualKernels:
    """The residual functions of one loaded library.

    Weights are bf16 or fp16, tensors on the CPU; residuals and tiles uint8, contiguous.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._encode = library.subspec_residual_encode
        self._encode.argtypes, self._encode.restype = [_I, _P, _N, _N, _N, _P, _P, _N, _I], _N
        self._decode = library.subspec_residual_decode
        self._decode.argtypes, self._decode.restype = [_I, _P, _P, *[_N] * 5, _P, _I], None
        self._linear = library.subspec_linear_residual
        self._linear.argtypes, self._linear.restype = [_I, _I, *[_P] * 3, _N, _P, _P, *[_N] * 3, _I], _I

    def encode(self, weight: Tensor, tiles: Tensor) -> Tensor:
        """The residual of ``weight`` (N, K; rows may be apart), a new tensor.

        Raises:
            MemoryError: there is no memory for it.
            ValueError: it is above 4 GiB.
        """
        n, k = weight.shape
        out = torch.empty(n * k * 2 + (1 << 16), dtype=torch.uint8)
        size = self._encode_to(weight, tiles, out)
        if size > len(out):
            out = torch.empty(size, dtype=torch.uint8)
            self._encode_to(weight, tiles, out)
        return out[:size].clone()

    def _encode_to(self, weight: Tensor, tiles: Tensor, out: Tensor) -> int:
        """Bytes of the residual, written if ``out`` holds them."""
        n, k = weight.shape
        size = self._encode(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), n, k, tiles.data_ptr(),
            out.data_ptr(), len(out), torch.get_num_threads(),
        )  # fmt: skip
        if size == -2:
            raise ValueError(
                f"the residual of {n} x {k} weights is above 4 GiB: cut the matrix into smaller ones"
            )
        if size < 0:
            raise MemoryError(f"no memory for the residual of {n} x {k} weights")
        return int(size)

    def decode(self, residual: Tensor, tiles: Tensor, n: int, first: int, last: int, out: Tensor) -> None:
        """Write rows [first, last) of the exact (n, K) weight to ``out`` (rows, K), contiguous.

        ``first`` is a multiple of 16.
        """
        assert out.is_contiguous()
        assert out.shape[0] == last - first
        assert first % 16 == 0
        assert 0 <= first <= last <= n
        self._decode(
            DTYPE_CODES[out.dtype], tiles.data_ptr(), residual.data_ptr(), len(residual), n, out.shape[1],
            first, last, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def linear(self, x: Tensor, residual: Tensor, tiles: Tensor, n: int, bias: Tensor | None) -> Tensor:
        """``exact.linear`` over the rebuilt weights: the same bits, without a full-size copy of them.

        Each thread rebuilds up to 64 rows of the weight at a time, and keeps the memory for them.

        Args:
            x: (T, K), contiguous.
            residual: of the (n, K) weight, in x's dtype.
            tiles: its substitute.
            n: output features.
            bias: (n,) in x's dtype, or None.

        Returns:
            (T, n), new.
        """
        rows, k = x.shape
        assert x.is_contiguous()
        assert bias is None or (bias.dtype is x.dtype and bias.shape == (n,) and bias.is_contiguous())
        out = torch.empty(rows, n, dtype=x.dtype)
        failed = self._linear(
            DTYPE_CODES[x.dtype], native.kernels().bf16, x.data_ptr(), tiles.data_ptr(), residual.data_ptr(),
            len(residual), None if bias is None else bias.data_ptr(), out.data_ptr(), rows, k, n,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(
                f"no memory to prepare {min(rows, 256)} rows of {k} values and rebuild weights for them: "
                "lower --memory, or use fewer threads (OMP_NUM_THREADS)"
            )
        return out


@functools.cache
def residual_kernels() -> ResidualKernels | None:
    """The functions of the library in use, or None without one (then the references serve)."""
    library = native.kernels().library
    return None if library is None else ResidualKernels(library)
