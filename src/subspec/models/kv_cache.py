"""Keys and values by slot: one allocation, written by layers, rearranged by commits.

Slots 0 … length − 1 hold the committed prefix in position order; the slots after it are scratch for tree
nodes. Target and draft share the cache: a sweep overwrites the nodes' draft entries with exact ones.
"""

import torch

from subspec.memory.arena import Arena
from subspec.models.config import ModelConfig


def cache_bytes(config: ModelConfig, slots: int, itemsize: int) -> int:
    """Size of a cache of ``slots`` slots of values of ``itemsize`` bytes."""
    return 2 * config.layers * config.kv_heads * slots * config.head_dim * itemsize


class KVCache:
    """The cache of all layers.

    Attributes:
        keys: (L, Hkv, S, D); ``values`` alike.
        slots: S.
    """

    def __init__(self, config: ModelConfig, slots: int, dtype: torch.dtype, arena: Arena) -> None:
        shape = (2, config.layers, config.kv_heads, slots, config.head_dim)
        self.keys, self.values = arena.tensor("kv_cache", shape, dtype)
        self.slots = slots

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, views (Hkv, S, D)."""
        return self.keys[index], self.values[index]

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy each slot of ``sources`` (n,) to its slot of ``targets`` (n,), in all layers.

        Both are int64, on the cache's device, the targets distinct; slots may be in both.
        """
        for part in (self.keys, self.values):
            part.index_copy_(2, targets, part.index_select(2, sources))
