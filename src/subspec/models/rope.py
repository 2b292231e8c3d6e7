"""Rotary position embedding: tables of cosines and sines, and their use on queries and keys."""

import math

import torch

from subspec.models.config import RopeConfig
from subspec.models.norm import rms_norm_reference


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions 0 … positions − 1.

    Returns:
        Two fp32 tensors (positions, D/2), computed in fp64.  Source: Su et al. 2021; the llama3 kind: the
        Llama 3.1 model card's wavelength-dependent scaling.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = scale_frequencies(rope, 1.0 / rope.theta**exponents)  # (D/2,)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def scale_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Inverse frequencies (D/2,) after the configured scaling."""
    if rope.frequency_divisors is not None:
        return frequencies / torch.tensor(rope.frequency_divisors, dtype=frequencies.dtype)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        share = rope.original_max_position / wavelengths - rope.low_freq_factor
        smooth = (share / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = torch.where(wavelengths > low, frequencies / rope.factor, blended)
        return torch.where(wavelengths < high, frequencies, scaled)
    return frequencies


def rotate_and_store_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Split a fused projection, normalise and rotate queries and keys, write keys and values to their slots.

    Args:
        qkv: (T, (H + 2·Hkv)·D): query heads, key heads, value heads.
        cos: (M, D/2) fp32 table; ``sin`` alike.
        sin: see ``cos``.
        positions: (T,) int32, row of the tables for each row.
        slots: (T,) int32, where each row's key and value go.
        k_cache: (Hkv, S, D) of one layer; written.
        v_cache: alike; written.
        heads: H.
        q_norm: (D,) gain of a per-head RMS norm, or None; ``k_norm`` alike.
        k_norm: see ``q_norm``.
        eps: of those norms.

    Returns:
        (T, H, D): the rotated queries.  Rotation is in fp32 with one rounding.
    """
    kv_heads, _, head_dim = k_cache.shape
    q, k, v = torch.split(qkv.view(qkv.shape[0], -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    rows = positions.long()
    row_cos, row_sin = cos[rows][:, None], sin[rows][:, None]  # (T, 1, D/2)
    k_cache[:, slots.long()] = _rotate(k, row_cos, row_sin).transpose(0, 1)
    v_cache[:, slots.long()] = v.transpose(0, 1)
    return _rotate(q, row_cos, row_sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head: (T, heads, D) by (T, 1, D/2)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
