"""The ``avxvnni`` level's product where its instruction is missing: the same source over a stand-in."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from subspec.kernels import build, native
from subspec.kernels.lowbit import LowbitKernels
from subspec.substitute.linear import substitute_linear_reference
from subspec.substitute.quantize import quantize_tiles

# What vpdpbusd does to each int32 lane: add four products of unsigned and signed bytes, without saturation.
STAND_IN = """
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
static inline __m256i stand_in(__m256i sum, __m256i a, __m256i b) {
  int32_t lanes[8];
  uint8_t u[32];
  int8_t s[32];
  memcpy(lanes, &sum, 32);
  memcpy(u, &a, 32);
  memcpy(s, &b, 32);
  for (int i = 0; i < 32; i++) lanes[i / 4] += u[i] * s[i];
  memcpy(&sum, lanes, 32);
  return sum;
}
#define LOWBIT_DPBUSD stand_in
"""


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> LowbitKernels:
    program = build.compiler()
    if program is None or native._load("avx2")[0] is None:
        pytest.skip("needs a C++ compiler and the avx2 level")
    folder = tmp_path_factory.mktemp("avxvnni")
    header, library = folder / "stand_in.h", folder / "stand_in.so"
    header.write_text(STAND_IN)
    sources = [str(build.HERE / "cpu" / name) for name in ("substitute.cpp", "quantize.cpp")]
    flags = [*build.COMMON_FLAGS, *build.STRICT_FLAGS, *build.levels()["avx2"]]
    command = [program, *flags, "-O1", "-include", str(header), "-o", str(library), *sources]
    subprocess.run(command, check=True, capture_output=True)
    return LowbitKernels(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 65), (40, 100), (48, 1000)])
def test_gives_the_bits_of_avx2(twin: LowbitKernels, n: int, k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    tiles = quantize_tiles(torch.randn(n, k, generator=generator))
    x, bias = torch.randn(rows, k, generator=generator), torch.randn(n, generator=generator)
    library, _ = native._load("avx2")
    assert library is not None
    out, expected = torch.empty(rows, n), torch.empty(rows, n)
    twin.product(x, tiles.data_ptr(), n, bias, out)
    LowbitKernels(library).product(x, tiles.data_ptr(), n, bias, expected)
    assert torch.equal(out, expected)
    reference = substitute_linear_reference(x, tiles, n, k, bias)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-4)


def test_lies_between_avx512_and_avx2() -> None:
    names = list(build.X86_LEVELS)
    assert names.index("avx512") < names.index("avxvnni") < names.index("avx2")
    assert build.X86_LEVELS["avxvnni"] == build.X86_LEVELS["avx2"] + " -mavxvnni"
    assert set(native._NEEDS) == {*names, "amx", "portable"}
    assert native._NEEDS["avxvnni"] - native._NEEDS["avx2"] == {"avx_vnni"}


def test_the_stand_in_takes_the_instructions_place() -> None:
    text = (Path(build.HERE) / "cpu" / "lowbit_tile.h").read_text()
    assert text.count("_mm256_dpbusd_avx_epi32") == 1
