"""Norm, activation and rotary embedding, on a CUDA device.

The twins of ``rms_norm_reference``, ``silu_mul_reference`` and ``rotate_and_store_reference`` in ``models/``.
A program has one row, or a part of one that its place in the row alone decides, so that a row's bits do not
depend on the others.  Without contraction every product and sum rounds as the references' do; what may differ
is the order of a norm's sum, and roots and exponentials by their last bits.  Knows nothing of caches beyond
their shape.
"""

import triton
import triton.language as tl
from torch import Tensor

from subspec.kernels.triton.launch import Launch, block, rounded

_STRICT = {"enable_fp_fusion": False}
_SILU_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Launch:
    """X · rsqrt(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once.

    Args:
        x: (..., C), contiguous.
        weight: (C,), same dtype.
        eps: added to the mean square.
        out: like x, written; may be x.
    """
    width = x.shape[-1]
    return Launch(
        rms_norm_row,
        (x.numel() // width,),
        {"x": x, "weight": weight, "out": out, "eps": eps},
        {"width": width, "width_block": block(width)},
        {"num_warps": 4 if width <= 2048 else 8, **_STRICT},
    )


def silu_mul(gate_up: Tensor, out: Tensor) -> Launch:
    """silu(gate) · up, in fp32, rounded once.

    Args:
        gate_up: (T, 2F), contiguous: the gate's F columns, then the up projection's.
        out: (T, F), written.
    """
    rows, width = out.shape
    return Launch(
        silu_mul_part,
        (rows, triton.cdiv(width, _SILU_BLOCK)),
        {"gate_up": gate_up, "out": out, "width": width},
        {"part": _SILU_BLOCK},
        {"num_warps": 4, **_STRICT},
    )


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor,
) -> Launch:
    """Split a fused projection, normalise and rotate queries and keys, write keys and values to their slots.

    Args:
        qkv: (T, (H + 2·Hkv)·D), contiguous.
        cos: (M, D/2) fp32 table, contiguous; ``sin`` alike.
        sin: see ``cos``.
        positions: (T,) int32, row of the tables for each row; read on the device, as are ``slots``.
        slots: (T,) int32, where each row's key and value go; of alike ones, either's stay.
        k_cache: (Hkv, S, D), heads may lie apart; written.
        v_cache: alike; written.
        q_norm: (D,) gain of a per-head norm, or None; ``k_norm`` alike.
        k_norm: see ``q_norm``.
        eps: of those norms.
        out: (T, H, D), written: the rotated queries.
    """
    rows, heads, dim = out.shape
    kv_heads = k_cache.shape[0]
    normed = q_norm is not None and k_norm is not None
    return Launch(
        rotate_and_store_head,
        (rows, heads + 2 * kv_heads),
        {
            "qkv": qkv, "cos": cos, "sin": sin, "positions": positions, "slots": slots, "k_cache": k_cache,
            "v_cache": v_cache, "q_norm": q_norm if normed else None, "k_norm": k_norm if normed else None,
            "out": out, "k_stride": k_cache.stride(0), "v_stride": v_cache.stride(0), "eps": eps,
        },
        {"heads": heads, "kv_heads": kv_heads, "half": dim // 2, "half_block": block(dim // 2)},
        {"num_warps": 1, **_STRICT},
    )  # fmt: skip


# Where rows start may be a multiple of 16 bytes in one call and not in the next, and what the compiler knows
# of it decides which thread sums what: so it is told nothing.
@triton.jit(do_not_specialize_on_alignment=["x", "out"])
def rms_norm_row(x, weight, out, eps, width: tl.constexpr, width_block: tl.constexpr):
    """One row; program (row,)."""
    column = tl.arange(0, width_block)
    inside, at = column < width, tl.program_id(0).to(tl.int64) * width + column
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(out + at, rounded(wide * scale * gain, out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_part(gate_up, out, width, part: tl.constexpr):
    """``part`` columns of a row; program (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * part + tl.arange(0, part)
    inside, at = column < width, 2 * row * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, rounded(product, out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store_head(
    qkv,
    cos,
    sin,
    positions,
    slots,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    out,
    k_stride,
    v_stride,
    eps,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    half_block: tl.constexpr,
):
    """One head of one row: query heads, key heads, value heads; program (row, head)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, half_block)
    inside = column < half
    at = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * half + column
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    slot = tl.load(slots + row).to(tl.int64) * 2 * half
    if head >= heads + kv_heads:
        target = v_cache + (head - heads - kv_heads) * v_stride + slot + column
        tl.store(target, first, mask=inside)
        tl.store(target + half, second, mask=inside)
    else:
        angle = tl.load(positions + row).to(tl.int64) * half + column
        cosine = tl.load(cos + angle, mask=inside, other=0.0)
        sine = tl.load(sin + angle, mask=inside, other=0.0)
        if head < heads:
            target = out + (row * heads + head) * 2 * half + column
            _rotate(first, second, cosine, sine, q_norm, eps, target, column, half)
        else:
            target = k_cache + (head - heads) * k_stride + slot + column
            _rotate(first, second, cosine, sine, k_norm, eps, target, column, half)


@triton.jit
def _rotate(first, second, cosine, sine, norm, eps, target, column, half: tl.constexpr):
    """Normalise a head given by its halves where there is a gain, rotate it, and store it."""
    inside = column < half
    x, y = first.to(tl.float32), second.to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(x * x + y * y, axis=0) / (2 * half) + eps)
        low = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(norm + half + column, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x * scale * low, first.dtype).to(tl.float32)
        y = rounded(y * scale * high, first.dtype).to(tl.float32)
    dtype: tl.constexpr = target.dtype.element_ty
    tl.store(target, rounded(x * cosine - y * sine, dtype), mask=inside)
    tl.store(target + half, rounded(y * cosine + x * sine, dtype), mask=inside)
