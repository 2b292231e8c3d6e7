"""A layer's norms and biases among a checkpoint's vectors, which go by name."""

from collections.abc import Mapping

import torch

from subspec.models.config import ModelConfig
from subspec.models.decoder import LayerNorms
from subspec.store.layout import layer_matrices, layer_tensor

FINAL_NORM = "model.norm.weight"


def layer_norms(vectors: Mapping[str, torch.Tensor], index: int) -> LayerNorms:
    """The norm gains of a layer."""
    return LayerNorms(
        attention=vectors[layer_tensor(index, "input_layernorm")],
        mlp=vectors[layer_tensor(index, "post_attention_layernorm")],
        q=vectors.get(layer_tensor(index, "self_attn.q_norm")),
        k=vectors.get(layer_tensor(index, "self_attn.k_norm")),
    )


def layer_biases(
    vectors: Mapping[str, torch.Tensor], config: ModelConfig, index: int
) -> list[torch.Tensor | None]:
    """The bias of each fused matrix of a layer, where it has one."""
    found = []
    for matrix in layer_matrices(config):
        parts = [vectors.get(layer_tensor(index, part, "bias")) for part in matrix.parts]
        known = [part for part in parts if part is not None]
        found.append(torch.cat(known) if known else None)
    return found
