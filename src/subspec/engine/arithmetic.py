"""What sweeps and drafts share: the decoder's layers over a KV cache, the final norm, and fresh memory."""

from collections.abc import Callable

import torch

from subspec.memory.backend import Backend
from subspec.models.config import ModelConfig
from subspec.models.decoder import Decoder, LayerProducts, LayerSetting, Rows, WholeLayer
from subspec.models.kv_cache import KVCache
from subspec.models.kv_ledger import KVLedger, LedgeredPass
from subspec.models.operations import operations
from subspec.store.vectors import FINAL_NORM, layer_norms


class Arithmetic:
    """What a pass computes, layer by layer, and where it writes.

    Args:
        config: of the model.
        small: norms by name, where passes compute.
        cache: of keys and values; decides the dtype of all that is computed.
        backend: launches.
        ledger: of exact cache entries, if they are checked.
        chunk_rows: how many rows a layer takes at once.

    Attributes:
        config: of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        small: dict[str, torch.Tensor],
        cache: KVCache,
        backend: Backend,
        ledger: KVLedger | None,
        chunk_rows: int,
    ) -> None:
        self.config = config
        self._dtype, self._backend = cache.keys.dtype, backend
        self._ledger, self._chunk_rows = ledger, chunk_rows
        self._decoder = Decoder(config, [layer_norms(small, index) for index in range(config.layers)], cache)
        self._final_norm = small[FINAL_NORM]
        self._rms_norm = operations(backend.device).rms_norm

    @property
    def settings(self) -> list[LayerSetting]:
        """What each layer works with, for layers that do their own arithmetic."""
        return self._decoder.settings

    def launch(self, work: Callable[[], object], note: str) -> None:
        """Launch ``work`` on the compute stream."""
        self._backend.launch(self._backend.compute, work, note=note)

    def hidden(self, rows: int) -> torch.Tensor:
        """Memory for hidden states (T, C)."""
        return self._memory(rows, self.config.hidden_size)

    def logits(self, rows: int) -> torch.Tensor:
        """Memory for logits (T, V)."""
        return self._memory(rows, self.config.vocab_size)

    def entered(self, rows: Rows, *, exact: bool) -> LedgeredPass | None:
        """A pass's entry in the ledger, if there is one."""
        return None if self._ledger is None else LedgeredPass(self._ledger, rows, exact=exact)

    def layer(
        self,
        index: int,
        layer: LayerProducts | WholeLayer,
        hidden: torch.Tensor,
        rows: Rows,
        entry: LedgeredPass | None,
    ) -> None:
        """A layer of a pass, added into ``hidden`` (T, C); keys and values are written, and entered."""
        self._decoder.layer(index, layer, hidden, rows, self._chunk_rows)
        if entry is not None:
            entry.layer(index)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, (T, C)."""
        return self._rms_norm(hidden, self._final_norm, self.config.rms_norm_eps)

    def _memory(self, rows: int, columns: int) -> torch.Tensor:
        """Where the compute stream may write."""
        return torch.empty((rows, columns), dtype=self._dtype, device=self._backend.device)
