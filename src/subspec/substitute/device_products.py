"""Ways in which a CUDA device can multiply with substitutes, one class each.

``Tiles`` leaves the weights as they lie and is the reference.  The others bring a form of the weight of their
own: as many bytes as the tiles, so it goes into the tiles' very memory and a plan stays true.  A weight that
was packed so has no tiles any more; only who needs none else may ask for it.  All compute ``x @ W.T + bias``
with the values of ``layout``, but for roundings of 2^-9.

Which way is taken is decided in ``choice``.  Nothing here touches a device, or imports a library that is not
surely there, before it is asked to.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from subspec.kernels import device
from subspec.substitute.layout import GROUP, TILE_ROWS, groups, tile_bytes, unpack

Product = Callable[
    [Tensor, Tensor | None, Tensor], object
]  # x (T, k), bias (n,) or None, out (T, n): written
INT4_COLUMNS = 128  # that torch's kernel packs together: 8 inner tiles of 16
_INNER_TILES = 8
_BLOCK = 1 << 22  # weights unpacked at a time


class Way(Protocol):
    """A way to multiply.

    Attributes:
        name: as users see it.
    """

    name: str

    def misfit(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """Why it cannot multiply activations of ``dtype`` with an (n, k) weight; None: it can."""
        ...

    def pack(self, tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Product:
        """The product with a weight that fits; what lies in ``tiles`` may be replaced for it, in place.

        Args:
            tiles: (tile_bytes(n, k),) uint8, contiguous: the substitute of the (n, k) weight.
            n: output features.
            k: input features.
            dtype: of the activations and results.
        """
        ...


class Tiles:
    """The tiles as they are, by our own kernel: takes every shape and dtype."""

    name = "triton"

    def misfit(self, n: int, k: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        """Nothing."""
        return None

    def pack(self, tiles: Tensor, n: int, k: int, dtype: torch.dtype | None = None) -> Product:  # noqa: ARG002
        """The product, in any dtype; the tiles stay."""

        def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
            out.copy_(device.lowbit_linear(x, tiles, n, k, bias))

        return product


class TorchInt4:
    """``aten._weight_int4pack_mm``: bf16, from compute capability 8.0 on.

    It computes ``(code - 8) * scale + zero``, with float zeros: our s and m.  Codes go in as bytes (n, k / 2)
    with the even column's in the high nibble (torch 2.5 and later; ``choice`` would notice another order),
    and come out as (n / 8, k / 128, 32, 4) int32 in torch's own order; scales and zeros lie as (k / 64, n, 2)
    bf16.  Rows are independent: 8 of them make one slice of the packed codes.

    Args:
        capability: of the device.
        convert: packs codes; ``multiply``: the product.  Default: torch's operators.
    """

    name = "torch int4"

    def __init__(
        self,
        capability: tuple[int, int],
        convert: Callable[[Tensor, int], Tensor] | None = None,
        multiply: Callable[[Tensor, Tensor, int, Tensor], Tensor] | None = None,
    ) -> None:
        self._capability = capability
        self._convert = convert or torch.ops.aten._convert_weight_to_int4pack
        self._multiply = multiply or torch.ops.aten._weight_int4pack_mm

    def misfit(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """A dtype, a device or a shape that the kernel does not take."""
        if dtype is not torch.bfloat16:
            return f"takes bfloat16 only, not {_name(dtype)}"
        if self._capability < (8, 0):
            return "needs compute capability 8.0, the device has {}.{}".format(*self._capability)
        return _odd_shape(n, k, INT4_COLUMNS)

    def pack(self, tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Product:  # noqa: ARG002
        """The product; the tiles are replaced."""
        codes_bytes = n * k // 2
        codes = tiles[:codes_bytes].view(torch.int32).view(n // 8, k // INT4_COLUMNS, 32, 4)
        ends = tiles[codes_bytes:].view(torch.bfloat16).view(groups(k), n, 2)

        def write(rows: slice, part: Tensor, scales: Tensor, mids: Tensor) -> None:
            pairs = part[:, 0::2] << 4 | part[:, 1::2]  # (rows, k / 2)
            codes[rows.start // 8 : rows.stop // 8] = self._convert(pairs, _INNER_TILES)
            ends[:, rows, 0], ends[:, rows, 1] = scales.t(), mids.t()

        _repack(tiles, n, k, write)

        def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
            _store(self._multiply(x.contiguous(), codes, GROUP, ends), bias, out)

        return product


class Gemlite:
    """The Triton kernels of gemlite, 0.6 and later, if it is installed: bf16 and fp16.

    Its form: (k / 8, n) int32, the code of column 8 i + j in nibble j of row i; scales and zeros (k / 64, n)
    in the activations' dtype; the value is ``code * scale + zero`` in one fused operation, so our m - 8 s is
    rounded once more than elsewhere.

    Args:
        library: the module ``gemlite``, or None to import it when it is first asked for.
    """

    name = "gemlite"

    def __init__(self, library: Any = None) -> None:
        self._library = library

    def misfit(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """No library, or a dtype or shape that it does not take."""
        if self._library is None and importlib.util.find_spec("gemlite") is None:
            return "is not installed"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 and float16 only, not {_name(dtype)}"
        return _odd_shape(n, k, GROUP)

    def pack(self, tiles: Tensor, n: int, k: int, dtype: torch.dtype) -> Product:
        """The product; the tiles are replaced.

        Raises:
            ImportError: or whatever else the library raises when it does not work here.
        """
        library, meta_scale, settings = self._settings(dtype, tiles.device)
        codes_bytes = n * k // 2
        codes = tiles[:codes_bytes].view(torch.int32).view(k // 8, n)
        scales, zeros = tiles[codes_bytes:].view(dtype).view(2, groups(k), n)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=tiles.device)

        def write(rows: slice, part: Tensor, scale: Tensor, mid: Tensor) -> None:
            nibbles = part.view(len(part), k // 8, 8).int() << shifts
            codes[:, rows] = nibbles.sum(-1, dtype=torch.int32).t()  # disjoint bits: a sum is their union
            scales[:, rows] = scale.t()
            zeros[:, rows] = (mid.float() - 8 * scale.float()).t()

        _repack(tiles, n, k, write)
        form = [codes, scales, zeros, meta_scale]

        def product(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
            _store(library.forward_functional(x, None, form, settings), bias, out)

        return product

    @functools.cache  # noqa: B019 - one a process
    def _settings(self, dtype: torch.dtype, place: torch.device) -> tuple[Any, Tensor, list[int]]:
        """The library, and what it is to be told with each product: it packs a sample and says so."""
        library = self._library
        if library is None:
            library = importlib.import_module("gemlite")
            library.set_autotune("default")  # its own tables and defaults: a start is no time to search
        kind = {torch.bfloat16: library.DType.BF16, torch.float16: library.DType.FP16}[dtype]
        n, k = 64, 2 * GROUP
        sample = library.GemLiteLinear(4, GROUP, k, n, input_dtype=kind, output_dtype=kind)
        ends = torch.ones(n, k // GROUP, dtype=dtype, device=place)
        sample.pack(torch.zeros(n, k, dtype=torch.uint8, device=place), ends, ends, fma_mode=True)
        return library, sample.get_tensor_args()[3], sample.get_meta_args()


def _odd_shape(n: int, k: int, columns: int) -> str | None:
    """Why a form without padding would not fit the tiles' memory."""
    if n % TILE_ROWS or k % columns:
        return f"takes multiples of {TILE_ROWS} rows and {columns} columns, not {n} x {k}"
    assert n * k // 2 + 4 * n * groups(k) == tile_bytes(n, k)
    return None


def _repack(tiles: Tensor, n: int, k: int, write: Callable[[slice, Tensor, Tensor, Tensor], None]) -> None:
    """Hand codes, scales and mids of some rows at a time to ``write``, which may write all over the tiles.

    They are kept in host memory meanwhile: a device that is nearly full has no room for a second copy.
    """
    source = torch.empty(tiles.shape, dtype=tiles.dtype).copy_(tiles)
    per_row = groups(k) * GROUP
    step = max(1, _BLOCK // (per_row * TILE_ROWS)) * TILE_ROWS
    for first in range(0, n, step):
        last = min(first + step, n)
        block = source[tile_bytes(first, k) : tile_bytes(last, k)].to(tiles.device)
        write(slice(first, last), *unpack(block, last - first, k))


def _store(product: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the product, with its bias, where it is wanted."""
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


def _name(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")
