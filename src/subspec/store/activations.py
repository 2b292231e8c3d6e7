"""Which columns of a matrix count: what the exact model's activations over a short text say.

While a store is prepared, the text goes through the model a layer at a time, with the weights that are in
memory anyway.  The mean squares of what meets each column then weigh the errors of its 4-bit codes
(``substitute.quantize``).  Exact weights do not depend on any of this, so texts come out the same; drafts
agree with them more often.

Every row counts alike, whatever its norm: the first token's activations can be a thousand times the others'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from subspec.kernels.native import kernels
from subspec.memory.arena import Arena
from subspec.memory.tiers import PAGE_BYTES, MemoryBudget
from subspec.models.config import ModelConfig
from subspec.models.decoder import Decoder, LayerProducts, prefix_rows
from subspec.models.kv_cache import KVCache, cache_bytes
from subspec.models.linear import ExactProduct
from subspec.models.operations import operations
from subspec.store.vectors import FINAL_NORM, layer_biases, layer_norms
from subspec.substitute.quantize import column_importance

MOST_TOKENS = 768
_ROWS = 256  # that go through a layer at once


@dataclass
class _Watched:
    """An exact product that notes what it is given.

    Attributes:
        weight: (N, K); ``bias``: (N,) or None.
        squares: (K,) fp32, sums over all rows so far, each row's relative to its mean.
    """

    product: ExactProduct
    weight: torch.Tensor
    bias: torch.Tensor | None
    squares: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.weight.shape[1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.squares += _relative_squares(x).sum(0)
        return self.product(x, self.weight, self.bias)


def _relative_squares(x: torch.Tensor) -> torch.Tensor:
    """Squares (T, K) fp32, each row's relative to its mean; a row of zeros stays so."""
    squares = x.float().square()
    return squares / squares.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class Activations:
    """A text on its way through a model.

    Args:
        config: the model's.
        vectors: norms and biases by name.
        embedded: (T, C) the text's embeddings, at least one row, in the model's dtype; changed in place.
        read: a layer's four exact matrices, for layers that are passed without being prepared.
    """

    def __init__(
        self,
        config: ModelConfig,
        vectors: Mapping[str, torch.Tensor],
        embedded: torch.Tensor,
        read: Callable[[int], list[torch.Tensor]],
    ) -> None:
        self._config, self._vectors, self._hidden, self._read = config, vectors, embedded, read
        self._rows = prefix_rows([0] * len(embedded), 0)
        self._one = replace(config, layers=1)
        self._memory = Arena(
            MemoryBudget(cache_bytes(self._one, len(embedded), embedded.element_size()) + (1 << 16))
        )
        size = cache_bytes(self._one, len(embedded), embedded.element_size()) + PAGE_BYTES
        self._cache = KVCache(self._one, len(embedded), embedded.dtype, Arena(MemoryBudget(size)))
        native = kernels().library is not None
        self._product = ExactProduct("native" if native else "torch", native=native)
        self._next = 0

    def layer(self, index: int, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pass a layer, after those before it: what the columns (K,) of its four matrices count."""
        self._reach(index)
        return self._pass(weights)

    def head(self) -> torch.Tensor:
        """Pass all layers: what the columns (C,) of the output head count."""
        self._reach(self._config.layers)
        gains, eps = self._vectors[FINAL_NORM], self._config.rms_norm_eps
        normed = operations(self._hidden.device).rms_norm(self._hidden, gains, eps)
        return column_importance(_relative_squares(normed).mean(0))

    def _reach(self, index: int) -> None:
        """Pass the layers before ``index`` that were not passed yet."""
        while self._next < index:
            self._pass(self._read(self._next))

    def _pass(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pass the next layer."""
        biases = layer_biases(self._vectors, self._config, self._next)
        watched = [
            _Watched(self._product, weight, bias) for weight, bias in zip(weights, biases, strict=True)
        ]
        decoder = Decoder(self._one, [layer_norms(self._vectors, self._next)], self._cache)
        decoder.layer(0, LayerProducts(*watched), self._hidden, self._rows, _ROWS)
        self._next += 1
        return [column_importance(one.squares / len(self._hidden)) for one in watched]
