"""What a CUDA device computes, as torch operators in the namespace ``subspec``.

Each checks its arguments, makes its result and enqueues one Triton kernel on the current stream
(``device_operators`` says how; the kernels are in ``triton/``).  Nothing waits for the device, and nothing
but the result is allocated, so that all may be captured in CUDA graphs, once each has run for its shapes and
been compiled.  Fake and meta tensors get the same checks, and a result without values.  There is no CPU
implementation: the references and ``exact`` are that.

Triton is imported when a kernel first runs: importing this module needs neither Triton nor a device.
Tensors are bf16, fp16 or fp32, of one dtype a call except where said, contiguous, and on one device; anything
else raises a ValueError.  A row's bits do not depend on the other rows of the call.  Numbers that lie on the
device, positions, slots and tokens, cannot be checked.  Knows nothing of models beyond shapes.
"""

import torch
from torch import Tensor

from subspec.kernels import device_operators

assert device_operators.IMPLEMENTATIONS  # importing them defined them


def attend(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, paths: Tensor, path_lens: Tensor, scale: float
) -> Tensor:
    """Attention of each row over the slots [0 … prefix) followed by its path.

    Reference: ``models.attention.attend_reference``.  A row without keys gives zeros.

    Args:
        q: (T, H, D) queries; D at most 256.
        k: (Hkv, S, D) keys of one layer by slot, heads may lie apart; ``v`` alike.
        v: see ``k``.
        prefix: (T,) int32, how many leading slots each row sees.
        paths: (T, P) int32, further slots, in position order; P may be 0.
        path_lens: (T,) int32, how many of them count.
        scale: factor on the products of queries and keys.

    Returns:
        (T, H, D), new.
    """
    return torch.ops.subspec.attend(q, k, v, prefix, paths, path_lens, scale)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X · rsqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once.

    Reference: ``models.norm.rms_norm_reference``.

    Args:
        x: (..., C).
        weight: (C,).
        eps: added to the mean square.

    Returns:
        (..., C), new.
    """
    return torch.ops.subspec.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, in fp32, rounded once: (T, 2F), the gate's columns first, to (T, F), new.

    Reference: ``models.mlp.silu_mul_reference``.
    """
    return torch.ops.subspec.silu_mul(gate_up)  # type: ignore[no-any-return]


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Split a fused projection, normalise and rotate queries and keys, write keys and values to their slots.

    Reference: ``models.rope.rotate_and_store_reference``.

    Args:
        qkv: (T, (H + 2·Hkv)·D): query heads, key heads, value heads.
        cos: (M, D/2) fp32 table; ``sin`` alike.
        sin: see ``cos``.
        positions: (T,) int32, row of the tables for each row.
        slots: (T,) int32, where each row's key and value go; of alike ones, either's stay.
        k_cache: (Hkv, S, D) of one layer, heads may lie apart; written.
        v_cache: alike; written.
        heads: H.
        q_norm: (D,) gain of a per-head RMS norm, or None; ``k_norm`` alike.
        k_norm: see ``q_norm``.
        eps: of those norms.

    Returns:
        (T, H, D), new: the rotated queries.
    """
    return torch.ops.subspec.rotate_and_store(  # type: ignore[no-any-return]
        qkv, cos, sin, positions, slots, k_cache, v_cache, heads, q_norm, k_norm, eps
    )


def lowbit_linear(x: Tensor, tiles: Tensor, n: int, k: int, bias: Tensor | None) -> Tensor:
    """X · Wᵀ + bias, with W the weight that a substitute stands for, in x's dtype.

    Reference: a product with ``substitute.layout.dequantize``, accumulated in fp32 and rounded once.

    Args:
        x: (T, k).
        tiles: (bytes,) uint8 on a multiple of 16 bytes, the substitute of the (n, k) weight.
        n: the weight's rows.
        k: its columns.
        bias: (n,) in fp32 or x's dtype, or None.

    Returns:
        (T, n), new.
    """
    return torch.ops.subspec.lowbit_linear(x, tiles, n, k, bias)  # type: ignore[no-any-return]


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X · weightᵀ + bias in tiles of 16 rows, accumulated in fp32 in one order, rounded once.

    Args:
        x: (T, K).
        weight: (N, K).
        bias: (N,) in fp32 or x's dtype, or None.

    Returns:
        (T, N), new.
    """
    return torch.ops.subspec.exact_linear(x, weight, bias)  # type: ignore[no-any-return]


def decode_residual(residual: Tensor, tiles: Tensor, n: int, k: int, out: Tensor) -> None:
    """Rebuild an exact weight.

    Reference: ``substitute.residual.decode_reference``.

    Args:
        residual: (bytes,) uint8; what follows the residual is not read.
        tiles: (bytes,) uint8 on a multiple of 16 bytes, the substitute of the (n, k) weight.
        n: the weight's rows.
        k: its columns.
        out: (n, k) bf16 or fp16; written.
    """
    torch.ops.subspec.decode_residual(residual, tiles, n, k, out)


def gather_rows(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a table, bit for bit: ``table[tokens]``.

    Args:
        table: (V, C), on the tokens' device, or in pinned host memory, of which the device reads those rows.
        tokens: (T,) int32 or int64 on the device, each 0 to V − 1.

    Returns:
        (T, C) on the tokens' device, new.
    """
    return torch.ops.subspec.gather_rows(table, tokens)  # type: ignore[no-any-return]
