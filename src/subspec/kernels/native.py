"""Load the compiled kernels and say which ones are in use.

The one seam between Python and C++.  Other modules of this room wrap the library's functions for torch
tensors; the rooms above choose between such a wrapper and their documented reference function once, at
start-up.  Knows nothing of models, stores or plans.

``SUBSPEC_KERNELS`` forces a level: ``reference`` (no native kernel at all), ``portable``, ``avx2``,
``avxvnni``, ``avx512``, ``avx512bf16``, or ``amx``: that last library, with exact bf16 products on the
processor's matrix tiles.
"""

import ctypes
import functools
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from subspec.errors import OptionError
from subspec.kernels import build

INTERFACE_VERSION = 8  # as in cpu/version.cpp; counts changes of any function's arguments
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_AVX2 = {"avx2", "bmi2", "fma", "f16c", "popcnt"}
_AVX512 = _AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512vbmi", "avx512_vbmi2"}
_NEEDS = {
    "amx": _AVX512_BF16 | {"amx_tile", "amx_bf16"},
    "avx512bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avxvnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
    "portable": set[str](),
}


@dataclass(frozen=True)
class Kernels:
    """The loaded library, or why there is none.

    Attributes:
        level: instruction-set level in use, or ``"reference"``.
        library: the ``ctypes`` library; calls release the GIL.  ``None`` for ``"reference"``.
        missing: for each better level, why it is not in use.
        bf16: how exact bf16 products are computed, in the words of ``cpu/linear.cpp``: 0 in fp32, 1 by the
            processor's bf16 instruction, 2 on its matrix tiles.
    """

    level: str
    library: ctypes.CDLL | None
    missing: dict[str, str]
    bf16: int = 0


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction-set flags of this processor, in the words of ``/proc/cpuinfo`` (empty elsewhere)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def levels() -> list[str]:
    """The levels of this processor family, best first, without ``reference``."""
    built = list(build.levels())
    return ["amx", *built] if "avx512bf16" in built else built


@functools.cache
def kernels() -> Kernels:
    """The best library that is built and that this processor can run; loaded once.

    Raises:
        OptionError: ``SUBSPEC_KERNELS`` names an unknown level, or one that cannot be loaded here.
    """
    forced = os.environ.get("SUBSPEC_KERNELS")
    known = [*levels(), "reference"]
    if forced and forced not in known:
        raise OptionError(f"SUBSPEC_KERNELS={forced}: choose one of {', '.join(known)}")
    missing: dict[str, str] = {}
    for level in [forced] if forced else known:
        if level == "reference":
            break
        library, reason = _load(level)
        if library is not None:
            return Kernels(level, library, missing, _bf16_product(level, library))
        missing[level] = reason
    if forced and forced != "reference":
        raise OptionError(f"SUBSPEC_KERNELS={forced}: {missing[forced]}")
    return Kernels("reference", None, missing)


def _load(level: str) -> tuple[ctypes.CDLL | None, str]:
    """The library of a level, or the reason why not."""
    lacks = _NEEDS[level] - cpu_features()
    if lacks:
        return None, f"this processor ({platform.machine()}) lacks {', '.join(sorted(lacks))}"
    tiles = level == "amx"
    path = build.library_path("avx512bf16" if tiles else level)
    if not path.exists():
        return None, _build_failure("avx512bf16" if tiles else level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    if library.subspec_interface_version() != INTERFACE_VERSION:
        return None, f"{path.name} is of another version; run: python -m subspec.kernels.build"
    if tiles and not library.subspec_tiles():
        return (
            None,
            "the compiler knew no matrix tiles, or the system does not grant their use (Linux 5.16 does)",
        )
    return library, ""


def _bf16_product(level: str, library: ctypes.CDLL) -> int:
    """The fastest exact bf16 product of a level."""
    return 2 if level == "amx" else int(library.subspec_pairs())


def _build_failure(level: str) -> str:
    """What the build said of a level that has no library."""
    remedy = "install a C++ compiler and run: python -m subspec.kernels.build"
    try:
        outcome = json.loads((build.HERE / "build.json").read_text())
    except (OSError, ValueError):
        return f"not built; {remedy}"
    return f"{outcome.get(level, 'not built')}; {remedy}"
