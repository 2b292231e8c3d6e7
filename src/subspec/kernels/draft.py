"""A whole layer of the draft in one call, for torch tensors on the CPU.

Wraps ``cpu/draft.cpp``, which runs the operations of ``exact`` and the products of ``lowbit`` one after
another: the same functions with the same roundings, without a return to Python between them.  Reference:
the decoder's own layer over ``SubstituteLinear`` products; the results are equal bit for bit.  Knows nothing
of decoders or plans.  Calls release the GIL.
"""

import ctypes
import functools
import threading

import torch
from torch import Tensor

from subspec.kernels.exact import MAX_HEAD_DIM
from subspec.kernels.native import DTYPE_CODES, kernels

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """Addresses of a substitute's tiles and of its bias (N,), fp32; the bias may be None."""

    _fields_ = [("tiles", _POINTER), ("bias", _POINTER)]


class Layer(ctypes.Structure):
    """What a layer's calls have in common; made by ``layer``, which says what the fields are."""

    _fields_ = [
        *[(name, _POINTER) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")],
        *[(name, Matrix) for name in ("qkv", "o", "gate_up", "down")],
        *[(name, _POINTER) for name in ("cosine", "sine", "keys", "values")],
        *[(name, _INT64) for name in ("k_stride", "v_stride", "C", "F", "H", "Hkv", "D")],
        *[(name, ctypes.c_float) for name in ("eps", "scale")],
        ("dtype", ctypes.c_int32),
    ]


class _Rows(ctypes.Structure):
    """The rows of one call: five addresses, T, P."""

    _fields_ = [
        *[(name, _POINTER) for name in ("positions", "slots", "prefix", "paths", "path_lens")],
        *[(name, _INT64) for name in ("T", "P")],
    ]


def _address(tensor: Tensor | None) -> int | None:
    """Of a contiguous tensor, or None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def layer(
    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    matrices: tuple[tuple[Tensor, Tensor | None], ...],
    tables: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    feed_forward: int,
    heads: int,
    eps: float,
    scale: float,
) -> Layer:
    """Prepare a layer.  It holds addresses: the tensors must live as long as it does.

    Args:
        norms: gains before attention (C,) and feed-forward (C,), of query and key heads (D,) or None; their
            dtype is the layer's.
        matrices: tiles and bias (N,), fp32 or None, of qkv (C → (H + 2·Hkv)·D), o (H·D → C), gate and up
            (C → 2F) and down (F → C).
        tables: cosines and sines (M, D/2), fp32.
        cache: keys and values (Hkv, S, D) of the layer, as in ``exact.attend``.
        feed_forward: F.
        heads: H.
        eps: of the norms.
        scale: of the attention's scores.
    """
    keys, values = cache
    kv_heads, _, dim = keys.shape
    dtype = norms[0].dtype
    assert all(norm is None or norm.dtype is dtype for norm in norms)
    assert keys.dtype is values.dtype is dtype
    assert keys.shape == values.shape
    assert keys.stride()[1:] == values.stride()[1:] == (dim, 1)
    assert heads % kv_heads == 0
    assert dim % 2 == 0
    assert dim <= MAX_HEAD_DIM
    assert all(table.dtype is torch.float32 and table.shape[1] * 2 == dim for table in tables)
    assert all(bias is None or bias.dtype is torch.float32 for _, bias in matrices)
    return Layer(
        *map(_address, norms),
        *(Matrix(_address(tiles), _address(bias)) for tiles, bias in matrices),
        *map(_address, tables),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        norms[0].shape[0],
        feed_forward,
        heads,
        kv_heads,
        dim,
        eps,
        scale,
        DTYPE_CODES[dtype],
    )


class DraftKernels:
    """The draft's function of one loaded library.  Safe in several threads: each has its own scratch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.subspec_draft_layer
        self._run.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int]
        self._run.restype = ctypes.c_int
        self._scratch_bytes = library.subspec_draft_scratch_bytes
        self._scratch_bytes.argtypes = [_POINTER, _INT64]
        self._scratch_bytes.restype = _INT64
        self._local = threading.local()

    def run(
        self,
        layer: Layer,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        prefix: Tensor,
        paths: Tensor,
        path_lens: Tensor,
    ) -> None:
        """Add the layer's attention and feed-forward to x; write keys and values to their slots.

        Args:
            layer: of x's dtype.
            x: (T, C), contiguous; overwritten.
            positions: (T,) int32, as in ``exact.rotate_and_store``.
            slots: (T,) int32, likewise.
            prefix: (T,) int32, as in ``exact.attend``.
            paths: (T, P) int32, likewise.
            path_lens: (T,) int32, likewise.

        Raises:
            MemoryError: no memory for the attention's scratch.
        """
        places = (positions, slots, prefix, paths, path_lens)
        assert all(part.dtype is torch.int32 and part.shape[0] == x.shape[0] for part in places)
        assert DTYPE_CODES[x.dtype] == layer.dtype
        assert x.shape[1] == layer.C
        rows = _Rows(*map(_address, places), *paths.shape)
        address = ctypes.addressof(layer)
        scratch = self._scratch(self._scratch_bytes(address, x.shape[0]))
        if self._run(address, ctypes.addressof(rows), _address(x), scratch, torch.get_num_threads()):
            raise MemoryError(f"no memory for the attention of {layer.H} heads of {layer.D} values")

    def _scratch(self, n_bytes: int) -> int:
        """The address of this thread's scratch, which never shrinks."""
        local = self._local
        if getattr(local, "n_bytes", 0) < n_bytes:
            local.memory = torch.empty(n_bytes + 64, dtype=torch.uint8)
            local.address = local.memory.data_ptr() + -local.memory.data_ptr() % 64
            local.n_bytes = n_bytes
        return int(local.address)


@functools.cache
def draft_kernels() -> DraftKernels | None:
    """The function of the library in use, or None without one (then the decoder goes step by step)."""
    library = kernels().library
    return None if library is None else DraftKernels(library)
