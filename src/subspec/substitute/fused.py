"""A draft layer that does all of its arithmetic in one native call, and the choice of it.

The same as the decoder's steps over the same products, bit for bit, without Python between them.  Without
native kernels the decoder goes step by step.
"""

from collections.abc import Sequence

from torch import Tensor

from subspec.kernels import draft
from subspec.models.decoder import LayerProducts, LayerSetting, Rows, WholeLayer
from subspec.substitute.linear import SubstituteLinear


class FusedLayer:
    """One layer over substitutes: ``layer(x, rows)`` adds it into x.

    Args:
        kernels: the native function.
        weights: qkv, o, gate and up, down.
        setting: the layer's norms, cache and tables.
    """

    def __init__(
        self, kernels: draft.DraftKernels, weights: Sequence[SubstituteLinear], setting: LayerSetting
    ) -> None:
        norms = setting.norms
        self._kernels = kernels
        self._held = (weights, setting)  # the record has their addresses
        self._layer = draft.layer(
            (norms.attention, norms.mlp, norms.q, norms.k),
            tuple((weight.tiles, weight.native_bias) for weight in weights),
            (setting.cos, setting.sin),
            (setting.keys, setting.values),
            weights[3].k,
            setting.heads,
            setting.eps,
            setting.scale,
        )

    def __call__(self, x: Tensor, rows: Rows) -> None:
        """Add the layer into x (T, C), contiguous; write keys and values of the rows."""
        self._kernels.run(self._layer, x, rows.positions, rows.slots, rows.prefix, rows.paths, rows.path_lens)


def draft_layer(weights: Sequence[SubstituteLinear], setting: LayerSetting) -> LayerProducts | WholeLayer:
    """What a draft's source hands out: one call a layer where all products are native, else the products."""
    kernels = draft.draft_kernels()
    if kernels is None or not all(weight.native for weight in weights):
        return LayerProducts(*weights)
    return FusedLayer(kernels, weights, setting)
