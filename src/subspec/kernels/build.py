"""Compile the C++ kernels into one shared library per instruction set.

Runs inside the package's own build (``hatch_build.py`` loads this file by path) and on its own, for an
install that had no compiler at first: ``python -m subspec.kernels.build``.  Uses the standard library only
and knows nothing of torch: the kernels have a plain C interface and are called through ``ctypes``.

Every source in ``cpu/`` is compiled once per level of ``LEVELS``; ``native.py`` loads the best library the
processor supports.  A level that fails to compile is left out and its reason kept in ``build.json``.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
# Canonical arithmetic: the compiler must not fuse or reorder differently in two copies of one loop.
STRICT_FLAGS = ["-ffp-contract=off", "-fno-fast-math"]
_AVX2 = "-mavx2 -mbmi2 -mfma -mf16c -mpopcnt"
_AVX512 = f"{_AVX2} -mavx512f -mavx512cd -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
X86_LEVELS = {
    "avx512bf16": f"{_AVX512} -mavx512bf16 -mavx512vbmi -mavx512vbmi2",
    "avx512": _AVX512,
    "avxvnni": f"{_AVX2} -mavxvnni",
    "avx2": _AVX2,
}


def levels() -> dict[str, list[str]]:
    """Instruction-set levels of this processor family, best first, each with its compiler flags."""
    found = {}
    if platform.machine() in ("x86_64", "AMD64"):
        found.update({name: flags.split() for name, flags in X86_LEVELS.items()})
    found["portable"] = []
    return found


def library_path(level: str) -> Path:
    """Where the library of a level lies, built or not."""
    return HERE / f"libsubspec_{level}.so"


def compiler() -> str | None:
    """The C++ compiler to use: ``$CXX``, else the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    return next(
        (path for name in (named, "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def build() -> dict[str, str]:
    """Compile what is missing or older than its sources.

    Returns:
        For each level ``"ok"`` or the reason it has no library; also written to ``build.json``.
    """
    sources = sorted((HERE / "cpu").glob("*.cpp"))
    newest = max(path.stat().st_mtime for path in [*(HERE / "cpu").iterdir(), Path(__file__)])
    program = compiler()

    def built(level: str, flags: list[str]) -> str:
        target = library_path(level)
        if target.exists() and target.stat().st_mtime > newest:
            return "ok"
        if program is None:
            return "no C++ compiler found (tried $CXX, c++, g++, clang++)"
        return _compile(program, sources, flags, target)

    wanted = levels()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcome = dict(zip(wanted, pool.map(built, wanted, wanted.values()), strict=True))
    (HERE / "build.json").write_text(json.dumps(outcome, indent=1))
    return outcome


def _compile(program: str, sources: list[Path], flags: list[str], target: Path) -> str:
    """Compile one library, with OpenMP where the compiler has it; the last error if it cannot be done."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    error = ""
    for openmp in (["-fopenmp"], []):
        command = [
            program,
            *COMMON_FLAGS,
            *STRICT_FLAGS,
            *openmp,
            *flags,
            "-o",
            str(partial),
            *map(str, sources),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            partial.replace(target)
            return "ok"
        error = done.stderr.strip()
    partial.unlink(missing_ok=True)
    return f"{Path(program).name} failed: {error[-2000:]}"


if __name__ == "__main__":
    result = build()
    for name, message in result.items():
        sys.stdout.write(f"{name}: {message}\n")
    sys.exit(0 if "ok" in result.values() else 1)
