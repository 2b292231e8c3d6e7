"""The residual's Triton kernel: exact bits in Triton's interpreter, machine code for each architecture.

Triton decides where a kernel is defined whether it will be interpreted, so the interpreter has a process of
its own: this file run as a script, which decodes all cases of a file and saves what came out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import SHARED_BYTES

from subspec.substitute import layout
from subspec.substitute import residual as codec
from subspec.substitute.quantize import quantize_tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 1), (1, 64), (16, 64), (15, 63), (17, 65), (33, 7), (3, 200), (40, 128)]
GUARD = 64  # elements around the output, which must stay as they are
UNTOUCHED = 0x5555


def decode_saved(cases_file: str, out_file: str, device: str) -> None:
    """Decode each saved case on a device; save the outputs with the guards around them."""
    from subspec.kernels.triton import residual as kernel

    outputs = {}
    for name, (image, start, tiles, (n, k), dtype) in torch.load(cases_file).items():
        whole = torch.full((n * k + 2 * GUARD,), UNTOUCHED, dtype=torch.int16, device=device)
        out = whole[GUARD : n * k + GUARD].view(dtype).view(n, k)
        kernel.decode(image.to(device)[start:], tiles.to(device), n, k, out)
        outputs[name] = whole.cpu()
    torch.save(outputs, out_file)


if __name__ == "__main__":
    decode_saved(*sys.argv[1:])
    sys.exit()

triton = pytest.importorskip("triton", reason="Triton is not installed")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def from_patterns(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of bit patterns, int64."""
    return (patterns & 0xFFFF).to(torch.uint16).view(dtype).contiguous()


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights in many shapes, and odd ones."""
    seeded = torch.Generator().manual_seed(11)

    def normal(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=seeded)

    def below(end: int, n: int, k: int) -> Tensor:
        return torch.randint(0, end, (n, k), generator=seeded)

    every = torch.arange(65536)
    finite = every[from_patterns(every, dtype).isfinite()]
    odd = normal(20, 150) + 0.1
    odd[below(32, 20, 150) == 0] = -0.0
    odd[3, 5], odd[4, 70], odd[19, 149] = torch.inf, -torch.inf, torch.nan
    one_each = torch.tensor(
        [0, 0x8000, 1, 0x8001, 0x7F, 0x807F, 0x80, 0x3FF, 0x83FF, 0x400, 0x3F80, 0x7B00, 0xFBFF]
    )
    made = {f"{n} x {k}": 0.03 * normal(n, k) for n, k in SHAPES}
    made |= {
        "all scales": normal(40, 150) * torch.exp2(below(181, 40, 1) - 90.0),
        "heavy tails": 0.03 * normal(32, 128) ** 5,
        "odd numbers": odd,
        "the largest": torch.finfo(dtype).max * (1.0 - 2 * below(2, 16, 100)) * (below(3, 16, 100) > 0),
        "every pattern": from_patterns(every[torch.randperm(65536, generator=seeded)], dtype).view(-1, 128),
        "every number, by size": from_patterns(finite, dtype).view(-1, 64),
        # Scale 0, mids down to subnormal ones.
        "one number a group": from_patterns(one_each[:, None].expand(-1, 70), dtype),
        "few numbers a group": from_patterns(below(65536, 48, 1) + below(9, 48, 64), dtype),
        "small numbers": from_patterns(below(0x300, 32, 64) | below(2, 32, 64) << 15, dtype),
    }
    return {name: weight.to(dtype) for name, weight in made.items()}


WEIGHTS = {
    f"{name}, {kind}": weight for kind, dtype in DTYPES.items() for name, weight in weights(dtype).items()
}


def decode_all(folder: Path, device: str) -> dict[str, Tensor]:
    """What the kernel makes of each weight's residual, which lies on any byte with foreign bytes behind."""
    cases = {}
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        tiles = quantize_tiles(weight)
        around, start = torch.full((9,), 255, dtype=torch.uint8), number % 4
        image = torch.cat([around[:start], codec.encode_reference(weight, tiles), around])
        cases[name] = image, start, tiles, tuple(weight.shape), weight.dtype
    torch.save(cases, folder / "cases")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    script = [sys.executable, __file__, str(folder / "cases"), str(folder / "outputs"), device]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs: dict[str, Tensor] = torch.load(folder / "outputs")
    return outputs


def assert_exact(whole: Tensor, weight: Tensor) -> None:
    """The guards are untouched, and between them is the weight."""
    assert same_bits(whole[GUARD:-GUARD].view(weight.shape), weight)
    assert whole[:GUARD].eq(UNTOUCHED).all()
    assert whole[-GUARD:].eq(UNTOUCHED).all()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return decode_all(tmp_path_factory.mktemp("interpreted"), "cpu")


@pytest.mark.parametrize("name", WEIGHTS)
def test_exact_bits(interpreted: dict[str, Tensor], name: str) -> None:
    assert_exact(interpreted[name], WEIGHTS[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_exact_bits_on_a_device(tmp_path: Path) -> None:
    for name, whole in decode_all(tmp_path, "cuda").items():
        assert_exact(whole, WEIGHTS[name])


def test_empty_weights_need_no_launch() -> None:
    from subspec.kernels.triton import residual as kernel

    for n, k in [(0, 64), (16, 0)]:
        kernel.decode(
            torch.zeros(132, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), n, k,
            torch.empty(n, k, dtype=torch.bfloat16),
        )  # fmt: skip


def test_constants_are_the_formats() -> None:
    from subspec.kernels.triton import residual as kernel

    assert kernel.LOW_BITS == codec.LOW_BITS
    for name in ("FLOOR_STEPS", "MAX_WIDTH", "MAIN_BITS", "EXTRA_BITS"):
        assert getattr(kernel, name).value == getattr(codec, name)
    for name in ("GROUP", "TILE_ROWS", "TILE_BYTES"):
        assert getattr(kernel, name).value == getattr(layout, name)


@pytest.mark.parametrize(("kind", "aligned"), [("bf16", True), ("fp16", False)])
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_compiles(
    architecture: int, kind: str, aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code, with and without what a launch may find: sizes and addresses that are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from subspec.kernels.triton import residual as kernel

    assert isinstance(kernel.decode_tile, triton.JITFunction), "interpreted: unset TRITON_INTERPRET"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = {"residual": "*u8", "tiles": "*i32", "out": "*i16", "n": "i32", "k": "i32"}
    hints = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))} if aligned else None
    source = ASTSource(
        kernel.decode_tile,
        signature={**arguments, "low_bits": "constexpr"},
        constexprs={"low_bits": kernel.LOW_BITS[DTYPES[kind]]},
        attrs=hints,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernel.OPTIONS)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert ".ftz" not in compiled.asm["ptx"]  # what flushes subnormal numbers to zero
    between_stores = compiled.asm["ttir"].split("tt.store")[1]
    assert "barrier" in between_stores  # escapes overwrite other threads' stores: the interpreter cannot tell
    assert 0 < compiled.metadata.shared <= SHARED_BYTES[architecture]
