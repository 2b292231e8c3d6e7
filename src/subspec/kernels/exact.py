"""The native kernels of the exact pass, as functions on torch CPU tensors.

One property holds throughout: a row's result is a pure function of that row's inputs.  It does not depend
on how many rows a call has, on their order or contents, on the number of threads, nor, in attention, on the
slots that keys lie in.  Sums are in fp32 and in a fixed order, results are rounded once, to nearest even.
Different instruction-set levels may round differently.

Tensors are bf16, fp16 or fp32, of one dtype per call except where said, and contiguous.  ``native.py`` loads
the library; this module knows nothing of models or caches beyond shapes.  Calls release the GIL.
"""

import ctypes
import functools

import torch
from torch import Tensor

from subspec.errors import OptionError
from subspec.kernels import native

MAX_HEAD_DIM = 512
_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "subspec_linear": ([_I, _I, _P, _P, _P, _P, _N, _N, _N, _I], _I),
    "subspec_attend": ([_I, *[_P] * 7, *[_N] * 7, _F, _I], _I),
    "subspec_rms_norm": ([_I, _P, _P, _P, _N, _N, _F, _I], None),
    "subspec_silu_mul": ([_I, _P, _P, _N, _N, _I], None),
    "subspec_rotate_and_store": ([_I, *[_P] * 10, *[_N] * 6, _F, _I], None),
}


@functools.cache
def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions set."""
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        OptionError: no native kernels are in use.
    """
    library = native.kernels().library
    if library is None:
        raise OptionError("the exact kernels are native code and none is loaded: `subspec doctor` says why")
    return _declare(library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A linear layer, y = x Wᵀ + b.

    The calling thread keeps scratch of ``4 · K · min(T, 256)`` bytes for its later calls.

    Args:
        x: (T, K) rows.
        weight: (N, K) as it lies in a checkpoint; any element alignment.
        bias: (N,) or None.
        out: (T, N) to write to; must not overlap the inputs.

    Returns:
        (T, N), ``out`` if given.
    """
    rows, length = x.shape
    outputs = weight.shape[0]
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype)
    assert x.dtype is weight.dtype is out.dtype
    assert weight.shape[1] == length
    assert out.shape == (rows, outputs)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert out.is_contiguous()
    assert bias is None or (bias.dtype is x.dtype and bias.shape == (outputs,) and bias.is_contiguous())
    library = _library()
    failed = library.subspec_linear(
        native.DTYPE_CODES[x.dtype],
        native.kernels().bf16,
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        length,
        outputs,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory to prepare {min(rows, 256)} rows of {length} values")
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Tensor,
    paths: Tensor,
    path_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each query row over its own keys, in the order of their positions.

    Row t sees the keys in slots ``0 .. prefix[t]-1``, then those in slots ``paths[t, :path_lens[t]]``.  The
    result depends on that sequence of keys and values, not on the slots.  Softmax is in fp32, over blocks of
    64 keys.  Query head h uses KV head ``h // (H // Hkv)``.  A row without keys gives zeros.

    Args:
        q: (T, H, D), D at most 512.
        k: (Hkv, S, D), one layer of the cache: a slot's D values and neighbouring slots are contiguous, heads
            may lie apart.
        v: (Hkv, S, D), likewise.
        prefix: (T,) int32.
        paths: (T, P) int32; P may be 0.
        path_lens: (T,) int32.
        scale: factor of the scores.
        out: (T, H, D) to write to.

    Returns:
        (T, H, D), ``out`` if given.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[0]
    if out is None:
        out = torch.empty_like(q)
    assert q.dtype is k.dtype is v.dtype is out.dtype
    assert prefix.dtype is paths.dtype is path_lens.dtype is torch.int32
    assert q.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == q.shape
    assert paths.is_contiguous()
    assert k.shape == v.shape
    assert k.stride()[1:] == v.stride()[1:] == (dim, 1)
    assert heads % kv_heads == 0
    assert k.shape[2] == dim <= MAX_HEAD_DIM
    assert prefix.shape == path_lens.shape == (rows,)
    assert prefix.is_contiguous()
    assert path_lens.is_contiguous()
    failed = _library().subspec_attend(
        native.DTYPE_CODES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        prefix.data_ptr(),
        paths.data_ptr(),
        path_lens.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        kv_heads,
        dim,
        k.stride(0),
        v.stride(0),
        paths.shape[1],
        scale,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the attention of {heads} heads of {dim} values")
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """RMS norm in fp32, rounded once: x / sqrt(mean(x²) + eps) · w.

    Args:
        x: (T, C).
        weight: (C,).
        eps: added to the mean square.
        out: (T, C) to write to; may be ``x``.

    Returns:
        (T, C), ``out`` if given.
    """
    rows, width = x.shape
    if out is None:
        out = torch.empty_like(x)
    assert x.dtype is weight.dtype is out.dtype
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == x.shape
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    _library().subspec_rms_norm(
        native.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return out


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Gated SiLU, silu(gate) · up, in fp32 and rounded once; each element by itself.

    Args:
        gate_up: (T, 2F): the gate's columns, then up's.
        out: (T, F) to write to; must not overlap ``gate_up``.

    Returns:
        (T, F), ``out`` if given.
    """
    rows, twice = gate_up.shape
    width = twice // 2
    if out is None:
        out = torch.empty(rows, width, dtype=gate_up.dtype)
    assert twice == 2 * width
    assert gate_up.dtype is out.dtype
    assert gate_up.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == (rows, width)
    _library().subspec_silu_mul(
        native.DTYPE_CODES[gate_up.dtype],
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        torch.get_num_threads(),
    )
    return out


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    q_out: Tensor | None = None,
) -> Tensor:
    """Split the projections; normalise and rotate queries and keys; write keys and values to their slots.

    The halves of a head are rotated against each other, ``x1·cos − x2·sin`` and ``x2·cos + x1·sin``, in fp32
    and rounded once.  With a norm, each head is RMS-normalised in fp32 and rounded to the dtype first.

    Args:
        qkv: (T, (H + 2 Hkv) D): query heads, key heads, value heads.
        cos: (M, D/2) fp32 table by position.
        sin: (M, D/2) fp32.
        positions: (T,) int32, below M.
        slots: (T,) int32; different rows write different slots.
        k_cache: (Hkv, S, D), one layer of the cache, as in `attend`; written.
        v_cache: (Hkv, S, D); written.
        heads: H.
        q_norm: (D,) or None.
        k_norm: (D,) or None.
        eps: of the norms.
        q_out: (T, H, D) to write to.

    Returns:
        The rotated queries (T, H, D), ``q_out`` if given.
    """
    rows = qkv.shape[0]
    kv_heads, _, dim = k_cache.shape
    if q_out is None:
        q_out = torch.empty(rows, heads, dim, dtype=qkv.dtype)
    assert qkv.dtype is k_cache.dtype is v_cache.dtype is q_out.dtype
    assert cos.dtype is sin.dtype is torch.float32
    assert positions.dtype is slots.dtype is torch.int32
    assert qkv.is_contiguous()
    assert qkv.shape[1] == (heads + 2 * kv_heads) * dim
    assert k_cache.shape == v_cache.shape
    assert k_cache.stride()[1:] == v_cache.stride()[1:] == (dim, 1)
    assert dim % 2 == 0
    assert dim <= MAX_HEAD_DIM
    assert cos.shape == sin.shape
    assert cos.shape[1] * 2 == dim
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert positions.shape == slots.shape == (rows,)
    assert positions.is_contiguous()
    assert slots.is_contiguous()
    assert q_out.is_contiguous()
    assert q_out.shape == (rows, heads, dim)
    for norm in (q_norm, k_norm):
        assert norm is None or (norm.dtype is qkv.dtype and norm.shape == (dim,) and norm.is_contiguous())
    _library().subspec_rotate_and_store(
        native.DTYPE_CODES[qkv.dtype],
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        q_out.data_ptr(),
        rows,
        heads,
        kv_heads,
        dim,
        k_cache.stride(0),
        v_cache.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return q_out
