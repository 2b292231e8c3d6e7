"""A fused draft layer: the bits of the decoder's own steps over the same products, at every native level."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from subspec.kernels import build, draft, exact, native
from subspec.kernels.lowbit import LowbitKernels
from subspec.memory.arena import Arena
from subspec.memory.tiers import MemoryBudget
from subspec.models import decoder as decoding
from subspec.models.attention import attend_reference
from subspec.models.config import ModelConfig, RopeConfig
from subspec.models.decoder import Decoder, LayerNorms, LayerProducts, Rows, WholeLayer, prefix_rows
from subspec.models.kv_cache import KVCache
from subspec.models.mlp import silu_mul_reference
from subspec.models.norm import rms_norm_reference
from subspec.models.operations import Operations
from subspec.models.rope import rotate_and_store_reference
from subspec.substitute import fused, linear
from subspec.substitute.linear import SubstituteLinear, substitute_linear_reference
from subspec.substitute.quantize import quantize_tiles

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LIBRARIES = {level: native._load(level)[0] for level in build.levels()}
LEVELS = [level for level, library in LIBRARIES.items() if library is not None]
NATIVE = Operations(exact.attend, exact.rms_norm, exact.silu_mul, exact.rotate_and_store)
REFERENCE = Operations(attend_reference, rms_norm_reference, silu_mul_reference, rotate_and_store_reference)
BOUND = {torch.bfloat16: 0.015, torch.float16: 0.008, torch.float32: 0.004}  # of what a layer adds
SLOTS, PREFIX, LAYERS = 120, 70, 2
# C, F, H, Hkv, D
SHAPES = [(64, 112, 4, 2, 16), (50, 37, 3, 1, 10), (200, 330, 6, 2, 24), (72, 130, 2, 2, 66)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    library = LIBRARIES[request.param]
    assert library is not None
    lowbit, layer = LowbitKernels(library), draft.DraftKernels(library)
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels(request.param, library, {}))
    monkeypatch.setattr(linear, "lowbit_kernels", lambda: lowbit)
    monkeypatch.setattr(draft, "draft_kernels", lambda: layer)
    monkeypatch.setattr(decoding, "operations", lambda _: NATIVE)
    return str(request.param)


def gaussian(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


Layers = Sequence[LayerProducts | WholeLayer]


def forward(decoder: Decoder, layers: Layers, hidden: Tensor, rows: Rows, chunk_rows: int) -> None:
    """Run all layers."""
    for index, layer in enumerate(layers):
        decoder.layer(index, layer, hidden, rows, chunk_rows)


class Model:
    """Random substitutes, norms and a cache whose first slots are filled."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, biased: bool, qk_norm: bool) -> None:
        width, inner, heads, kv_heads, dim = shape
        self.config = ModelConfig(
            "llama", 100, width, inner, LAYERS, heads, kv_heads, dim, 1e-5, RopeConfig(10000.0), biased,
            biased, biased, qk_norm, False, 512, (2,), 1,
        )  # fmt: skip
        self.dtype = dtype
        sizes = [
            ((heads + 2 * kv_heads) * dim, width),
            (width, heads * dim),
            (2 * inner, width),
            (width, inner),
        ]
        self.weights = [
            [
                SubstituteLinear(
                    quantize_tiles(gaussian(n, k, seed=10 * index + place, scale=k**-0.5)),
                    n,
                    k,
                    gaussian(n, seed=20 + place, scale=0.3).to(dtype) if biased else None,
                )
                for place, (n, k) in enumerate(sizes)
            ]
            for index in range(LAYERS)
        ]
        gain = [1 + gaussian(length, seed=length, scale=0.2).to(dtype) for length in (width, width, dim, dim)]
        head_gains = gain[2:] if qk_norm else [None, None]
        self.norms = [LayerNorms(gain[0], gain[1] * 0.5, *head_gains) for _ in range(LAYERS)]

    def decoder(self) -> Decoder:
        """With a cache of its own, always the same at first."""
        cache = KVCache(self.config, SLOTS, self.dtype, Arena(MemoryBudget(1 << 30)))
        cache.keys.copy_(gaussian(*cache.keys.shape, seed=31))
        cache.values.copy_(gaussian(*cache.values.shape, seed=32))
        return Decoder(self.config, self.norms, cache)

    def hidden(self, rows: int) -> Tensor:
        return gaussian(rows, self.config.hidden_size, seed=40).to(self.dtype)

    def fused(self, decoder: Decoder) -> Layers:
        layers = [fused.draft_layer(*each) for each in zip(self.weights, decoder.settings, strict=True)]
        assert all(isinstance(layer, fused.FusedLayer) for layer in layers)
        return layers

    def products(self) -> Layers:
        return [LayerProducts(*weights) for weights in self.weights]


def tree_rows(count: int) -> Rows:
    """Nodes after a prefix: node i hangs on node (i - 1) // 2; slots in reverse."""
    paths = torch.zeros(count, count, dtype=torch.int32)
    lens, depths = torch.zeros(count, dtype=torch.int32), [0] * count
    slots = torch.arange(PREFIX + count - 1, PREFIX - 1, -1, dtype=torch.int32)
    for node in range(count):
        chain = [node]
        while chain[0]:
            chain.insert(0, (chain[0] - 1) // 2)
        depths[node] = len(chain) - 1
        paths[node, : len(chain)] = slots[chain]
        lens[node] = len(chain)
    prefix = torch.full((count,), PREFIX, dtype=torch.int32)
    positions = torch.tensor(depths, dtype=torch.int32) + PREFIX
    return Rows(torch.zeros(count, dtype=torch.int64), positions, slots, prefix, paths, lens)


def state(decoder: Decoder) -> list[Tensor]:
    return [part for each in decoder.settings for part in (each.keys, each.values)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("biased", "qk_norm"), [(True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_decoders_own_steps(
    level: str, shape: tuple[int, ...], dtype: torch.dtype, biased: bool, qk_norm: bool
) -> None:
    model = Model(shape, dtype, biased, qk_norm)
    places: list[tuple[Callable[[int], Rows], int, int]] = [
        *((tree_rows, count, 64) for count in (1, 2, 3, 5, 8, 9, 17)),
        (tree_rows, 17, 7),
        (lambda count: prefix_rows([0] * count, PREFIX - count), 6, 64),  # without paths
    ]
    for rows_of, count, chunk in places:
        rows, hidden, expected = rows_of(count), model.hidden(count), model.hidden(count)
        one, other = model.decoder(), model.decoder()
        forward(one, model.fused(one), hidden, rows, chunk)
        forward(other, model.products(), expected, rows, chunk)
        assert expected.isfinite().all()
        assert torch.equal(hidden, expected)
        assert not torch.equal(hidden, model.hidden(count))
        assert all(map(torch.equal, state(one), state(other)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_near_the_reference_arithmetic(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same W4A8 arithmetic by the reference functions: one layer within the rounding of activations.

    A last bit of the dtype may move an activation to the next of its 8-bit codes, by 1/127 of its group's
    largest.  What follows from it stays near the error that 8 bits have themselves, and is rarer the finer
    the dtype.
    """
    model = Model(SHAPES[2], dtype, biased=True, qk_norm=True)
    rows, hidden, expected = tree_rows(9), model.hidden(9), model.hidden(9)
    one = model.decoder()
    one.layer(0, model.fused(one)[0], hidden, rows, 64)
    monkeypatch.setattr(decoding, "operations", lambda _: REFERENCE)
    weights = [
        partial(substitute_linear_reference, tiles=each.tiles, n=each.n, k=each.k, bias=each.bias)
        for each in model.weights[0]
    ]
    model.decoder().layer(0, LayerProducts(*weights), expected, rows, 64)
    start = model.hidden(9).float()
    change = (expected.float() - start).norm()
    assert change > 0.3 * start.norm()
    assert (hidden.float() - expected.float()).norm() / change < BOUND[dtype]


def test_a_pass_can_pause_after_each_layer(level: str) -> None:
    model = Model(SHAPES[0], torch.bfloat16, biased=True, qk_norm=False)
    one, other = model.decoder(), model.decoder()
    rows, hidden, expected = tree_rows(5), model.hidden(5), model.hidden(5)
    layers = model.fused(one)
    one.layer(0, layers[0], hidden, rows, 2)
    between = hidden.clone()
    untouched = model.decoder()
    assert not all(map(torch.equal, state(one)[:2], state(untouched)[:2]))
    assert all(map(torch.equal, state(one)[2:], state(untouched)[2:]))
    one.layer(1, layers[1], hidden, rows, 2)
    assert not torch.equal(hidden, between)
    forward(other, model.products(), expected, rows, 5)
    assert torch.equal(hidden, expected)


def test_threads_change_nothing(level: str) -> None:
    model = Model((512, 1100, 8, 2, 64), torch.bfloat16, biased=False, qk_norm=False)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        decoder, hidden = model.decoder(), model.hidden(17)
        forward(decoder, model.fused(decoder), hidden, tree_rows(17), 64)
        results.append([hidden, *state(decoder)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_without_native_kernels_products_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "lowbit_kernels", lambda: None)
    monkeypatch.setattr(draft, "draft_kernels", lambda: None)
    monkeypatch.setattr(decoding, "operations", lambda _: REFERENCE)
    model = Model(SHAPES[0], torch.float32, biased=True, qk_norm=False)
    decoder, hidden = model.decoder(), model.hidden(3)
    layers = [fused.draft_layer(*each) for each in zip(model.weights, decoder.settings, strict=True)]
    assert all(isinstance(layer, LayerProducts) for layer in layers)
    forward(decoder, layers, hidden, tree_rows(3), 64)
    assert hidden.isfinite().all()
