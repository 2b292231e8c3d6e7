"""The one decoder: rows in, hidden states out; target and draft differ only in the products they hand in.

A pass goes layer by layer over all its rows (layer-major), so that a streamed layer is needed once however
long the prompt is; within a layer, rows go in chunks that bound the workspace.  Knows nothing of where
weights come from.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch

from subspec.models.config import ModelConfig
from subspec.models.kv_cache import KVCache
from subspec.models.operations import operations
from subspec.models.rope import rope_tables

RowProduct = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerProducts:
    """A layer's four products, (T, K) → (T, N), bias included; exact, streamed or low-bit.

    Attributes:
        qkv: C → (H + 2·Hkv)·D; ``o``: H·D → C; ``gate_up``: C → 2F; ``down``: F → C.
    """

    qkv: RowProduct
    o: RowProduct
    gate_up: RowProduct
    down: RowProduct


@dataclass(frozen=True)
class LayerNorms:
    """A layer's norm gains, always resident: (C,), (C,), and (D,) or None."""

    attention: torch.Tensor
    mlp: torch.Tensor
    q: torch.Tensor | None
    k: torch.Tensor | None


@dataclass(frozen=True)
class LayerSetting:
    """What a layer works with beside its products.

    Attributes:
        norms: its gains.
        keys: (Hkv, S, D), its part of the cache; ``values`` alike.
        cos: (S, D/2) fp32 rotary table; ``sin`` alike.
        heads: H.
        eps: of the norms; ``scale``: factor on the attention's scores.
    """

    norms: LayerNorms
    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    heads: int
    eps: float
    scale: float


@dataclass(frozen=True)
class Rows:
    """What a pass computes: one row a token.  All tensors are int32 except ``tokens``.

    Attributes:
        tokens: (T,) token ids, int64.
        positions: (T,) their positions.
        slots: (T,) where their keys and values go.
        prefix: (T,) how many leading slots each row sees.
        paths: (T, P) the slots it sees after those, in position order.
        path_lens: (T,) how many of them count.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    prefix: torch.Tensor
    paths: torch.Tensor
    path_lens: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def chunk(self, start: int, stop: int) -> "Rows":
        """Rows start … stop − 1, as views."""
        return self.mapped(lambda part: part[start:stop])

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """Rows whose every tensor went through ``change``."""
        parts = (self.tokens, self.positions, self.slots, self.prefix, self.paths, self.path_lens)
        return Rows(*map(change, parts))


class WholeLayer(Protocol):
    """A layer that does all of its arithmetic by itself."""

    def __call__(self, x: torch.Tensor, rows: Rows) -> None:
        """Add the layer into x (T, C), and write the rows' keys and values."""
        ...


def prefix_rows(tokens: list[int], start: int) -> Rows:
    """Rows of consecutive tokens at positions and slots from ``start`` on; each sees all up to itself."""
    positions = torch.arange(start, start + len(tokens), dtype=torch.int32)
    none = torch.zeros((len(tokens), 0), dtype=torch.int32)
    lengths = torch.zeros(len(tokens), dtype=torch.int32)
    return Rows(torch.tensor(tokens), positions, positions, positions + 1, none, lengths)


def finished(steps: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """Run a pass that yields after each layer to its end: what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


class Decoder:
    """The layers' arithmetic around a KV cache.

    Args:
        config: sizes and variations.
        norms: one record a layer.
        cache: written by every pass.

    Attributes:
        settings: what each layer works with, for layers that do their own arithmetic.
    """

    def __init__(self, config: ModelConfig, norms: list[LayerNorms], cache: KVCache) -> None:
        device = cache.keys.device
        self._ops = operations(device)
        cos, sin = (part.to(device) for part in rope_tables(config.rope, config.head_dim, cache.slots))
        heads, eps, scale = config.heads, config.rms_norm_eps, config.head_dim**-0.5
        self.settings = [
            LayerSetting(gains, *cache.layer(index), cos, sin, heads, eps, scale)
            for index, gains in enumerate(norms)
        ]

    def layer(
        self, index: int, layer: LayerProducts | WholeLayer, hidden: torch.Tensor, rows: Rows, chunk_rows: int
    ) -> None:
        """Run one layer over ``rows``, added into ``hidden``; their keys and values are written.

        Args:
            index: of the layer.
            layer: its products, or the whole of it.
            hidden: (T, C) what the layer before left; of the first one, embeddings.
            rows: the rows' places.
            chunk_rows: how many rows go through the layer at once.
        """
        setting = self.settings[index]
        for start in range(0, len(rows), chunk_rows):
            stop = min(start + chunk_rows, len(rows))
            part, places = hidden[start:stop], rows.chunk(start, stop)
            if isinstance(layer, LayerProducts):
                self._layer(setting, layer, part, places)
            else:
                layer(part, places)

    def _layer(self, setting: LayerSetting, products: LayerProducts, x: torch.Tensor, rows: Rows) -> None:
        """One layer over one chunk, added into x (T, C)."""
        ops, norms, eps = self._ops, setting.norms, setting.eps
        keys, values = setting.keys, setting.values
        qkv = products.qkv(ops.rms_norm(x, norms.attention, eps))  # (T, (H + 2·Hkv)·D)
        q = ops.rotate_and_store(
            qkv,
            setting.cos,
            setting.sin,
            rows.positions,
            rows.slots,
            keys,
            values,
            setting.heads,
            norms.q,
            norms.k,
            eps,
        )  # (T, H, D)
        mixed = ops.attend(q, keys, values, rows.prefix, rows.paths, rows.path_lens, setting.scale)
        x += products.o(mixed.view(x.shape[0], -1))
        x += products.down(ops.silu_mul(products.gate_up(ops.rms_norm(x, norms.mlp, eps))))
