"""The definitions behind ``device``: each operator's schema, the checks of its arguments, its kernel.

An operator has one function that checks arguments and makes an empty result, for all tensors, fake ones too,
and one that launches the kernel for CUDA tensors.  Knows nothing of what kernels compute.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Of the layouts of a substitute's tiles and of a residual's directory (substitute/).
GROUP, TILE_ROWS, TILE_BYTES, DIRECTORY_BYTES = 64, 16, 576, 4

Implementation = Callable[..., Tensor | None]

OPERATORS = torch.library.Library("subspec", "FRAGMENT")  # type: ignore[no-untyped-call]
IMPLEMENTATIONS: dict[str, Implementation] = {}  # for CUDA tensors, by operator; filled below


# Results: what an operator returns, without values, after its arguments were found right.


def _attend_result(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, paths: Tensor, path_lens: Tensor, _scale: float
) -> Tensor:
    _need(q.dim() == 3, "q is (T, H, D)", q)
    _check_cache(k, v, q.shape[2])
    _need(q.dtype in FLOATS, "q is bf16, fp16 or fp32", q)
    _need(q.shape[2] <= MAX_HEAD_DIM, f"a head has at most {MAX_HEAD_DIM} values", q)
    _need(q.shape[1] % k.shape[0] == 0, f"query heads are a multiple of the {k.shape[0]} key heads", q)
    _need(paths.dim() == 2, "paths are (T, P)", paths)
    _check_indices(q.shape[0], prefix=prefix, path_lens=path_lens)
    _need(paths.shape[0] == q.shape[0] and paths.dtype is torch.int32, "paths are (T, P) int32", paths)
    _check_alike(q, k=k, v=v)
    _check_placed(q.device, q, prefix, paths, path_lens)
    return torch.empty_like(q)


def _rms_norm_result(x: Tensor, weight: Tensor, _eps: float) -> Tensor:
    _need(x.dim() > 0 and x.dtype in FLOATS, "x is (..., C) in bf16, fp16 or fp32", x)
    _need(weight.shape == x.shape[-1:], f"the gain has {x.shape[-1]} values", weight)
    _check_alike(x, weight=weight)
    _check_placed(x.device, x, weight)
    return torch.empty_like(x)


def _silu_mul_result(gate_up: Tensor) -> Tensor:
    _need(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "gate_up is (T, 2F)", gate_up)
    _need(gate_up.dtype in FLOATS, "gate_up is bf16, fp16 or fp32", gate_up)
    _check_placed(gate_up.device, gate_up)
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _rotate_and_store_result(
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
    _eps: float,
) -> Tensor:
    _need(k_cache.dim() == 3, "the cache is (Hkv, S, D)", k_cache)
    kv_heads, _, dim = k_cache.shape
    _check_cache(k_cache, v_cache, dim)
    _need(qkv.dim() == 2 and qkv.dtype in FLOATS, "qkv is (T, …) in bf16, fp16 or fp32", qkv)
    _need(qkv.shape[1] == (heads + 2 * kv_heads) * dim, f"a row has {heads} + 2·{kv_heads} heads", qkv)
    _need(dim % 2 == 0, "a head has an even number of values", k_cache)
    for table in (cos, sin):
        _need(table.dim() == 2 and table.shape[1] * 2 == dim, f"a table is (M, {dim // 2})", table)
        _need(table.dtype is torch.float32 and table.shape == cos.shape, "tables are fp32, alike", table)
    _check_indices(qkv.shape[0], positions=positions, slots=slots)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("give the gains of both queries and keys, or neither")
    gains = [gain for gain in (q_norm, k_norm) if gain is not None]
    for gain in gains:
        _need(gain.shape == (dim,), f"a gain has {dim} values", gain)
        _check_alike(qkv, gain=gain)
    _check_alike(qkv, k_cache=k_cache, v_cache=v_cache)
    _check_placed(qkv.device, qkv, cos, sin, positions, slots, *gains)
    return qkv.new_empty(qkv.shape[0], heads, dim)


def _lowbit_linear_result(x: Tensor, tiles: Tensor, n: int, k: int, bias: Tensor | None) -> Tensor:
    _need(x.dim() == 2 and x.shape[1] == k, f"x is (T, {k})", x)
    _need(x.dtype in FLOATS, "x is bf16, fp16 or fp32", x)
    _check_tiles(tiles, n, k)
    _check_bias(bias, x, n)
    _check_placed(x.device, x, tiles)
    return x.new_empty(x.shape[0], n)


def _exact_linear_result(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _need(x.dim() == 2 and x.dtype in FLOATS, "x is (T, K) in bf16, fp16 or fp32", x)
    _need(weight.dim() == 2 and weight.shape[1] == x.shape[1], f"the weight is (N, {x.shape[1]})", weight)
    _check_alike(x, weight=weight)
    _check_bias(bias, x, weight.shape[0])
    _check_placed(x.device, x, weight)
    return x.new_empty(x.shape[0], weight.shape[0])


def _check_decode(residual: Tensor, tiles: Tensor, n: int, k: int, out: Tensor) -> None:
    _need(out.shape == (n, k), f"out is ({n}, {k})", out)
    _need(out.dtype in (torch.bfloat16, torch.float16), "out is bf16 or fp16", out)
    _check_tiles(tiles, n, k)
    directory = DIRECTORY_BYTES * (_tiles(n, k) + 1)
    _need(residual.dim() == 1 and residual.dtype is torch.uint8, "the residual is (bytes,) uint8", residual)
    _need(residual.shape[0] >= directory, f"the residual's directory has {directory} bytes", residual)
    _check_placed(out.device, residual, tiles, out)


def _gather_rows_result(table: Tensor, tokens: Tensor) -> Tensor:
    _need(table.dim() == 2, "the table is (V, C)", table)
    _need(tokens.dim() == 1, "tokens are (T,)", tokens)
    _need(tokens.dtype in (torch.int32, torch.int64), "tokens are int32 or int64", tokens)
    _check_placed(tokens.device, tokens)
    _check_placed(torch.device("cpu") if table.device.type == "cpu" else tokens.device, table)
    return tokens.new_empty(tokens.shape[0], table.shape[1], dtype=table.dtype)


def _tiles(n: int, k: int) -> int:
    """Tiles of an (n, k) weight's substitute."""
    return -(-n // TILE_ROWS) * -(-k // GROUP)


def _need(right: bool, rule: str, tensor: Tensor) -> None:
    if not right:
        raise ValueError(f"{rule}; got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}")


def _check_cache(k: Tensor, v: Tensor, dim: int) -> None:
    """Keys and values of one layer; not their dtypes."""
    for part in (k, v):
        _need(part.dim() == 3 and part.shape == k.shape, "keys and values are (Hkv, S, D) alike", part)
        _need(part.shape[2] == dim, f"keys and values have {dim} values a head", part)
        _need(part.stride()[1:] == (dim, 1), "a head's keys lie one after another", part)


def _check_indices(rows: int, **indices: Tensor) -> None:
    for name, tensor in indices.items():
        _need(tensor.shape == (rows,) and tensor.dtype is torch.int32, f"{name}: ({rows},) int32", tensor)


def _check_alike(first: Tensor, **others: Tensor) -> None:
    """Of the first one's dtype and device."""
    for name, tensor in others.items():
        same = tensor.dtype is first.dtype and tensor.device == first.device
        _need(same, f"{name} is {first.dtype} on {first.device}", tensor)


def _check_placed(device: torch.device, *tensors: Tensor) -> None:
    for tensor in tensors:
        _need(tensor.device == device, f"all is on {device}", tensor)
        _need(tensor.is_contiguous(), "contiguous", tensor)


def _check_tiles(tiles: Tensor, n: int, k: int) -> None:
    size = _tiles(n, k) * TILE_BYTES
    _need(tiles.shape == (size,) and tiles.dtype is torch.uint8, f"the tiles are ({size},) uint8", tiles)


def _check_bias(bias: Tensor | None, x: Tensor, n: int) -> None:
    if bias is not None:
        _need(bias.shape == (n,), f"the bias has {n} values", bias)
        _need(bias.dtype in (torch.float32, x.dtype), f"the bias is fp32 or {x.dtype}", bias)
        _check_placed(x.device, bias)


# Launches: the kernel for an operator's arguments, which were found right, and its result.


def _attend_launch(*arguments: Any) -> None:
    _kernels("attention").attend(*arguments).run()


def _rotate_and_store_launch(*arguments: Any) -> None:
    *inputs, _heads, q_norm, k_norm, eps, out = arguments
    _kernels("rowwise").rotate_and_store(*inputs, q_norm, k_norm, eps, out).run()


def _kernels(module: str) -> Any:
    """A module of kernels, imported on first use: it needs Triton."""
    return importlib.import_module(f"subspec.kernels.triton.{module}")


def _operator(schema: str, result: Implementation, launch: Callable[..., None]) -> None:
    """Define an operator: ``result`` for all tensors, and then ``launch`` for those on a CUDA device."""
    name = schema.split("(")[0]

    def run(*arguments: Any) -> Tensor | None:
        out = result(*arguments)
        launch(*arguments, *([] if out is None else [out]))
        return out

    OPERATORS.define(schema)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"subspec::{name}", result, lib=OPERATORS)
    OPERATORS.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]
    IMPLEMENTATIONS[name] = run


_operator(
    "attend(Tensor q, Tensor k, Tensor v, Tensor prefix, Tensor paths, Tensor path_lens, float scale) "
    "-> Tensor",
    _attend_result,
    _attend_launch,
)
_operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm_result,
    lambda *a: _kernels("rowwise").rms_norm(*a).run(),
)
_operator(
    "silu_mul(Tensor gate_up) -> Tensor",
    _silu_mul_result,
    lambda *a: _kernels("rowwise").silu_mul(*a).run(),
)
_operator(
    "rotate_and_store(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor slots, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, int heads, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
    _rotate_and_store_result,
    _rotate_and_store_launch,
)
_operator(
    "lowbit_linear(Tensor x, Tensor tiles, int n, int k, Tensor? bias) -> Tensor",
    _lowbit_linear_result,
    lambda *a: _kernels("lowbit").lowbit_linear(*a).run(),
)
_operator(
    "exact_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _exact_linear_result,
    lambda *a: _kernels("linear").exact_linear(*a).run(),
)
_operator(
    "decode_residual(Tensor residual, Tensor tiles, int n, int k, Tensor(a!) out) -> ()",
    _check_decode,
    lambda *a: _kernels("residual").decode(*a),
)
_operator(
    "gather_rows(Tensor table, Tensor tokens) -> Tensor",
    _gather_rows_result,
    lambda *a: _kernels("gather").gather_rows(*a).run(),
)
