"""What lies where in a store's files: pure arithmetic on a ``ModelConfig``.

A layer is four fused matrices, one after another: ``qkv`` (query, key and value rows), ``o``, ``gate_up``
(gate rows, then up rows) and ``down``.  The output head is cut into chunks of whole rows, each about as
large as a layer at most, so that it streams through the same slots.  Files are padded to whole 4 KiB pages:

| file | holds |
|---|---|
| ``layer-0000.substitute`` | the layer's matrices as 4-bit tiles (``substitute.layout``) |
| ``layer-0000.residual`` | what, with them, gives the exact matrices (``substitute.images``) |
| ``layer-0000.exact`` | in a store of codec ``raw``, instead: the matrices, row-major, in the model's dtype |
| ``head-0000.substitute``, ``.residual`` or ``.exact`` | a chunk of the output head, alike |
| ``embedding.exact`` | the input embedding's rows, if it is not tied to the head |
| ``small.safetensors`` | norms and biases, and ``embedding.crc32``: one CRC-32 a row of the input embedding |
| ``tokenizer/`` | the tokenizer's files |
| ``manifest.json`` | names, sizes and CRC-32s of all of them; written last |
"""

from dataclasses import dataclass

from subspec.memory.tiers import MIB
from subspec.models.config import ModelConfig
from subspec.substitute.layout import Placed, tile_bytes

CODECS = {"residual": "residual", "raw": "exact"}  # how exact weights are kept: the form of their images
HEAD_CHUNK_BYTES = 64 * MIB
ROW_BLOCK = 16  # chunks hold a multiple of this many rows, the tiles' height


@dataclass(frozen=True)
class Matrix(Placed):
    """One fused matrix of a layer, with its parts, top to bottom."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the output head."""

    start: int
    stop: int


def layer_matrices(config: ModelConfig) -> list[Matrix]:
    """The four matrices of a layer, in the order of its files."""
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    plan = [
        ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), q_rows + 2 * kv_rows, hidden),
        ("o", ("self_attn.o_proj",), hidden, q_rows),
        ("gate_up", ("mlp.gate_proj", "mlp.up_proj"), 2 * inner, hidden),
        ("down", ("mlp.down_proj",), hidden, inner),
    ]
    matrices, substitute = [], 0
    for name, parts, n, k in plan:
        matrices.append(Matrix(n, k, substitute, name, parts))
        substitute += tile_bytes(n, k)
    return matrices


def layer_bytes(config: ModelConfig, itemsize: int) -> tuple[int, int]:
    """Exact and substitute bytes of a layer, before padding."""
    matrices = layer_matrices(config)
    exact = sum(matrix.n * matrix.k * itemsize for matrix in matrices)
    return exact, sum(tile_bytes(matrix.n, matrix.k) for matrix in matrices)


def head_chunks(config: ModelConfig, itemsize: int) -> list[Chunk]:
    """The output head's chunks: equal but for the last, none much above a layer or 64 MiB."""
    limit = min(HEAD_CHUNK_BYTES, layer_bytes(config, itemsize)[0])
    rows = max(limit // (config.hidden_size * itemsize) // ROW_BLOCK, 1) * ROW_BLOCK
    return [Chunk(start, min(start + rows, config.vocab_size)) for start in range(0, config.vocab_size, rows)]


def layer_tensor(index: int, part: str, kind: str = "weight") -> str:
    """The checkpoint's name of a part of a layer."""
    return f"model.layers.{index}.{part}.{kind}"


def layer_file(index: int, form: str) -> str:
    """File name of a layer; form: ``substitute``, ``residual`` or ``exact``."""
    return f"layer-{index:04d}.{form}"


def head_file(index: int, form: str) -> str:
    """File name of a head chunk; form: ``substitute``, ``residual`` or ``exact``."""
    return f"head-{index:04d}.{form}"
