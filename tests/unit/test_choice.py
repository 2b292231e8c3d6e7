"""A device's ways to multiply: what they pack is what the tiles say; a wrong or slow one is not taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor
from torch.nn import functional as F

from subspec.kernels import device
from subspec.substitute import choice, device_products
from subspec.substitute.choice import Choice, Shape, choose, choose_on, difference, fastest
from subspec.substitute.device_products import Gemlite, Product, Tiles, TorchInt4, Way
from subspec.substitute.layout import GROUP, dequantize, groups, pack, tile_bytes, unpack
from subspec.substitute.linear import SubstituteLinear

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SHAPES = [(16, 128), (48, 256), (208, 384)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tiles(n: int, k: int) -> Tensor:
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=seeded(n + k))
    scales = 0.01 + 0.01 * torch.rand(n, groups(k), generator=seeded(1))
    mids = 0.05 * torch.randn(n, groups(k), generator=seeded(2))
    return pack(codes, scales.bfloat16(), mids.bfloat16())


def activations(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=seeded(rows * k)).bfloat16()


@pytest.fixture(autouse=True)
def lowbit_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the device's kernel in its place."""

    def reference(x: Tensor, tiles: Tensor, n: int, k: int, bias: Tensor | None) -> Tensor:
        added = None if bias is None else bias.float()
        return F.linear(x.float(), dequantize(tiles, n, k, torch.float32), added).to(x.dtype)

    monkeypatch.setattr(device, "lowbit_linear", reference)


# What torch's operators do on a CUDA device, as pytorch's aten/src/ATen/native/cuda/int4mm.cu says


def convert(pairs: Tensor, inner_tiles: int) -> Tensor:
    """(n, k / 2) bytes, even columns high, to 8 codes an int32: (n / 8, k / (16 inner), 32, inner / 2)."""
    n, k = pairs.shape[0], pairs.shape[1] * 2
    packed = torch.empty(n // 8, k // (16 * inner_tiles), 32, inner_tiles // 2, dtype=torch.int32)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).view(n, k).int()
    for lane in range(32):  # it has a row's columns c, c + 1, c + 8, c + 9 of each of two tiles of 16
        for inner in range(0, inner_tiles, 2):
            first = 16 * inner + 2 * (lane % 4)
            columns = [first + shift for shift in (0, 1, 8, 9, 16, 17, 24, 25)]
            places = [0, 16, 4, 20, 8, 24, 12, 28]  # even columns in the low half, odd ones in the high half
            taken = codes.view(n // 8, 8, -1, 16 * inner_tiles)[:, lane // 4][..., columns]
            packed[:, :, lane, inner // 2] = (taken << torch.tensor(places)).sum(-1).int()
    return packed


def unconvert(packed: Tensor) -> Tensor:
    """The codes (n, k) that ``convert`` packed, read as the product reads them: lane by lane."""
    slices, outer, _, half = packed.shape
    codes = torch.empty(slices * 8, outer * 32 * half, dtype=torch.int64)
    nibbles = (packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # (n / 8, outer, lane, half, 8)
    for lane in range(32):
        for at in range(8):  # the lower halves of four registers, then the upper ones
            column = 2 * (lane % 4) + (0, 8, 16, 24)[at % 4] + at // 4
            for pair in range(half):
                target = codes.view(slices, 8, outer, 32 * half)[:, lane // 4, :, 32 * pair + column]
                target.copy_(nibbles[:, :, lane, pair, at])
    return codes


def multiply(x: Tensor, packed: Tensor, group: int, ends: Tensor) -> Tensor:
    """``(code - 8) * scale + zero``, rounded to bf16, times x in float64, rounded to bf16."""
    assert x.is_contiguous()
    scales, zeros = (ends[..., i].t().double().repeat_interleave(group, 1) for i in (0, 1))
    weight = ((unconvert(packed) - 8) * scales + zeros).bfloat16()
    return (x.double() @ weight.double().t()).bfloat16()


INT4 = TorchInt4((8, 9), convert, multiply)


def fake_gemlite() -> Any:
    """What this project asks of gemlite 0.6."""

    class Layer:
        def __init__(
            self, bits: int, group: int, k: int, n: int, input_dtype: str, output_dtype: str
        ) -> None:
            self.meta = [0, bits, group, 15, 8]

        def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor, fma_mode: bool) -> None:
            assert fma_mode

        def get_meta_args(self) -> list[int]:
            return self.meta

        def get_tensor_args(self) -> list[Tensor]:
            return [torch.empty(0)] * 3 + [torch.tensor(0.0)]

    def forward(x: Tensor, bias: None, form: list[Tensor], settings: list[int]) -> Tensor:
        codes, scales, zeros, _ = form
        assert settings == [0, 4, 64, 15, 8]
        assert all(part.is_contiguous() and part.dtype is x.dtype for part in (scales, zeros))
        nibbles = (codes.long()[:, None] >> torch.arange(0, 32, 4)[None, :, None]) & 15  # (k / 8, 8, n)
        wide = [part.double().repeat_interleave(settings[2], 0) for part in (scales, zeros)]
        weight = nibbles.view(-1, codes.shape[1]) * wide[0] + wide[1]  # (k, n)
        return (x.double() @ weight).to(x.dtype)

    return SimpleNamespace(
        GemLiteLinear=Layer, forward_functional=forward, DType=SimpleNamespace(BF16="bf16", FP16="fp16")
    )


# Packing


def test_the_model_of_torchs_packing_has_an_inverse() -> None:
    codes = torch.randint(16, (16, 256), dtype=torch.uint8, generator=seeded(3))
    packed = convert(codes[:, 0::2] << 4 | codes[:, 1::2], 8)
    assert torch.equal(unconvert(packed).byte(), codes)


def test_torch_says_the_same_shape_of_packed_codes() -> None:
    pairs = torch.empty(48, 128, dtype=torch.uint8, device="meta")
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    ours = convert(torch.zeros(48, 128, dtype=torch.uint8), 8)
    assert (packed.shape, packed.dtype) == (ours.shape, ours.dtype)


def test_torch_takes_codes_scales_and_mids_for_the_values_of_the_layout() -> None:
    """By the CPU's operators of the same meaning, which take one code an int32."""
    n, k = 48, 256
    tiles, x = random_tiles(n, k), activations(4, k)
    codes, scales, mids = unpack(tiles, n, k)
    ends = torch.stack([scales.t(), mids.t()], -1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, ends)
    assert difference(found, F.linear(x.float(), dequantize(tiles, n, k, torch.float32))) < 0.02


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("way", [INT4, Gemlite(fake_gemlite())], ids=["int4", "gemlite"])
def test_a_packed_weight_is_the_substitutes(
    monkeypatch: pytest.MonkeyPatch, way: Way, n: int, k: int, block: int
) -> None:
    monkeypatch.setattr(device_products, "_BLOCK", block)
    x, bias = activations(3, 2 * k)[:, ::2], activations(1, n)[0]
    tiles = random_tiles(n, k)
    weight = dequantize(tiles, n, k, torch.float64)
    product = way.pack(tiles, n, k, BF16)
    for added in (None, bias):
        out = torch.full((3, n), torch.nan, dtype=BF16)
        product(x, added, out)
        expected = x.double() @ weight.t() + (0 if added is None else added.double())
        assert difference(out, expected) < 0.03


@pytest.mark.parametrize("way", [INT4, Gemlite(fake_gemlite())], ids=["int4", "gemlite"])
def test_packing_stays_in_the_tiles_memory(way: Way) -> None:
    n, k = 48, 256
    size = tile_bytes(n, k)
    memory = torch.full((size + 128,), 77, dtype=torch.uint8)
    tiles = memory[64:-64].copy_(random_tiles(n, k))
    before, x = tiles.clone(), activations(2, k)
    product = way.pack(tiles, n, k, BF16)
    assert bool((memory[:64] == 77).all())
    assert bool((memory[-64:] == 77).all())
    assert not torch.equal(tiles, before)
    results = torch.empty(2, 2, n, dtype=BF16)
    product(x, None, results[0])
    tiles.zero_()  # nothing of the weight is anywhere else
    product(x, None, results[1])
    assert bool(results[0].any())
    assert not bool(results[1].any())


def test_fp16_goes_to_gemlite_only() -> None:
    n, k = 48, 256
    tiles, x = random_tiles(n, k), activations(3, k).half()
    weight = dequantize(tiles, n, k, torch.float64)
    way = Gemlite(fake_gemlite())
    assert way.misfit(n, k, torch.float16) is None
    assert INT4.misfit(n, k, torch.float16) == "takes bfloat16 only, not float16"
    out = torch.empty(3, n, dtype=torch.float16)
    way.pack(tiles, n, k, torch.float16)(x, None, out)
    assert difference(out, x.double() @ weight.t()) < 0.01


@pytest.mark.parametrize(
    ("way", "n", "k", "why"),
    [
        (INT4, 24, 128, "multiples of 16 rows"),
        (INT4, 16, 192, "128 columns"),
        (TorchInt4((7, 5)), 16, 128, "compute capability 8.0, the device has 7.5"),
        (Gemlite(fake_gemlite()), 16, 96, "64 columns"),
        (Gemlite(), 16, 128, "not installed"),
    ],
)
def test_misfits_say_why(way: Way, n: int, k: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why in (way.misfit(n, k, BF16) or "")


def test_a_devices_layer_takes_torchs_form_in_place() -> None:
    """Torch's own operators take what is packed, as far as shapes and dtypes tell; nobody waits."""
    n, k = 48, 256
    tiles = random_tiles(n, k)
    with FakeCuda() as cuda:
        layer = SubstituteLinear(tiles.cuda(), n, k, torch.zeros(n, dtype=BF16, device="cuda"))
        before = cuda.vram_bytes
        layer.pack(TorchInt4((8, 0)), BF16)
        assert cuda.vram_bytes == before
        x, copies = torch.zeros(5, k, dtype=BF16, device="cuda"), len(cuda.copies.copies)
        assert layer(x).shape == (5, n)
        assert [copy for copy in cuda.copies.copies[copies:] if copy.direction != "d2d"] == []


# The choice


@dataclass
class Fake:
    """A way that multiplies the tiles, then spoils the result; its products say how long they took."""

    name: str
    seconds: float
    spoil: Callable[[Tensor], object] = lambda out: None
    why: str | None = None
    rows: list[int] = field(default_factory=list)

    def misfit(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        return self.why

    def pack(self, tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Product:
        inner = Tiles().pack(tiles.clone(), n, k)
        tiles.fill_(255)

        def product(x: Tensor, bias: Tensor | None, out: Tensor) -> float:
            self.rows.append(len(x))
            inner(x, bias, out)
            self.spoil(out)
            return self.seconds * len(x)

        return product


def timer(work: Callable[[], object]) -> Callable[[], float]:
    """Products say themselves how long they took."""

    def once() -> float:
        seconds = work()
        assert isinstance(seconds, float)
        return seconds

    return once


def chosen(ways: Sequence[Way], shapes: Sequence[Shape] = (Shape(32, 128, 3), Shape(48, 64, 1))) -> Choice:
    return choose(ways, shapes, BF16, CPU, timer)


def test_the_fastest_right_way_is_taken() -> None:
    ways = [
        Fake("reference", 3.0),
        Fake("slow", 5.0),
        Fake("fast", 2.0),
        Fake("odd", 1.0, why="does not fit"),
    ]
    found = chosen(ways)
    assert found.way is ways[2]
    assert found.rejected == {"odd": "does not fit"}
    assert found.seconds == {"reference": 3 * 31 * 4, "slow": 5 * 31 * 4, "fast": 2 * 31 * 4}
    assert found.describe()["name"] == "fast"
    assert set(ways[2].rows) == set(choice.ROWS)


@pytest.mark.parametrize("last", [2.95, 3.0, 5.0])
def test_the_reference_stays_unless_another_clearly_wins(last: float) -> None:
    assert chosen([Fake("reference", 3.0), Fake("other", last)]).way.name == "reference"
    assert fastest({"reference": 3.0, "other": 2.0}, "reference") == "other"
    assert fastest({}, "reference") == "reference"


def one_wrong(out: Tensor) -> None:
    out[-1, -1] += out.float().square().mean().sqrt()


def unwritten(out: Tensor) -> None:
    out[:, -1] = torch.nan


def only_at_16(out: Tensor) -> None:
    if len(out) == 16:
        out.neg_()


def raises(out: Tensor) -> None:
    raise RuntimeError("no kernel image\nmore")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (one_wrong, "off by 1"),
        (unwritten, "nan"),
        (only_at_16, "16 rows"),
        (raises, "RuntimeError: no kernel image"),
    ],
)
def test_a_wrong_way_is_dropped_with_the_reason(spoil: Callable[[Tensor], object], why: str) -> None:
    found = chosen([Fake("reference", 3.0), Fake("wrong", 0.1, spoil), Fake("right", 1.0)])
    assert found.way.name == "right"
    assert "wrong" not in found.seconds
    assert why in found.rejected["wrong"]


def test_wrong_orders_of_nibbles_or_scales_are_wrong() -> None:
    swapped = TorchInt4((9, 0), lambda pairs, inner: convert(pairs >> 4 | pairs << 4, inner), multiply)
    crossed = TorchInt4((9, 0), convert, lambda x, w, g, ends: multiply(x, w, g, ends.flip(-1)))
    for way in (swapped, crossed):
        found = choose([Tiles(), way], [Shape(32, 256, 1)], BF16, CPU, lambda work: lambda: 1.0)
        assert "is wrong" in found.rejected[way.name]
    found = choose([Tiles(), INT4], [Shape(32, 256, 1)], BF16, CPU, lambda work: lambda: 1.0)
    assert found.rejected == {}


def test_a_way_without_the_bias_is_wrong() -> None:
    forgetful = Fake("forgetful", 1.0)
    pack_whole = forgetful.pack

    def pack_without(tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Product:
        product = pack_whole(tiles, n, k, dtype)
        return lambda x, bias, out: product(x, None, out)

    forgetful.pack = pack_without  # type: ignore[method-assign]
    assert "is wrong" in chosen([Fake("reference", 3.0), forgetful]).rejected["forgetful"]


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_a_way_that_cannot_be_timed_is_dropped(runs: int) -> None:
    def fragile(work: Callable[[], object]) -> Callable[[], float]:
        left = iter(range(runs))

        def once() -> float:
            seconds = timer(work)()
            if seconds < 2 and next(left, None) is None:
                raise RuntimeError("cannot be captured")
            return seconds

        if not runs:
            once()
        return once

    ways = [Fake("reference", 3.0), Fake("fragile", 1.0), Fake("right", 2.0)]
    found = choose(ways, [Shape(32, 128, 1)] * 2, BF16, CPU, fragile)
    assert found.way.name == "right"
    assert found.rejected == {"fragile": "fails: RuntimeError: cannot be captured"}
    assert set(found.seconds) == {"reference", "right"}


def test_without_a_working_reference_nothing_else_is_taken() -> None:
    found = chosen([Fake("reference", 3.0, raises), Fake("other", 1.0)])
    assert found.way.name == "reference"
    assert found.rejected == {"other": "could not be compared: RuntimeError: no kernel image"}


def test_without_time_nothing_else_is_taken() -> None:
    def broken(work: Callable[[], object]) -> Callable[[], float]:
        raise RuntimeError("out of memory")

    found = choose([Fake("reference", 3.0), Fake("other", 1.0)], [Shape(32, 128, 1)], BF16, CPU, broken)
    assert found.way.name == "reference"
    assert found.rejected == {"other": "could not be compared: RuntimeError: out of memory"}


def test_nothing_is_tried_where_tiles_are_needed_or_there_is_no_device() -> None:
    kept = choose_on(torch.device("cuda"), [Shape(32, 128, 1)], BF16, tiles_kept=True)
    assert kept.way.name == "triton"
    assert set(kept.rejected) == {"torch int4", "gemlite"}
    assert choose_on(CPU, [Shape(32, 128, 1)], BF16, tiles_kept=False).way.name == "triton"
