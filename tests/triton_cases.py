"""What tests of Triton kernels share: an interpreter in a process of its own, a compiler without a GPU.

Triton decides where a kernel is defined whether it will be interpreted.  So this file, run as a script, calls
operators' CUDA implementations on the arguments that a file holds, and saves what came out.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The most shared memory of a block, by architecture.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
Cases = Mapping[str, tuple[Any, ...]]  # an operator's name, then its arguments
Outcomes = dict[str, tuple[Any, ...]]  # its result, then its arguments, some of them written


def run_saved(cases_file: str, out_file: str, device: str) -> None:
    """Call each saved case's operator on a device; save the results and the arguments."""
    from subspec.kernels.device_operators import IMPLEMENTATIONS

    outcomes = {}
    for name, (operator, *arguments) in torch.load(cases_file).items():
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        result = IMPLEMENTATIONS[operator](*moved)
        outcomes[name] = tuple(a.cpu() if isinstance(a, Tensor) else a for a in (result, *moved))
    torch.save(outcomes, out_file)


if __name__ == "__main__":
    run_saved(*sys.argv[1:])
    sys.exit()


def run(cases: Cases, folder: Path, device: str) -> Outcomes:
    """What the operators make of the cases, in Triton's interpreter if the device is the CPU."""
    torch.save(cases, folder / "cases")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    script = [sys.executable, __file__, str(folder / "cases"), str(folder / "outcomes"), device]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes: Outcomes = torch.load(folder / "outcomes")
    return outcomes


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def kinds(architecture: int) -> list[str]:
    """Dtypes to compile for: fp32 only for one of the devices with the least shared memory."""
    return list(DTYPES) if architecture == 86 else ["bf16", "fp16"]


def compile_for(launch: Any, architecture: int) -> Any:
    """A launch's machine code, for arguments as aligned as a launch finds them; it must fit the device.

    The launch may be of meta tensors: those count as aligned to 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    assert isinstance(kernel, triton.JITFunction), "interpreted: unset TRITON_INTERPRET"
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    hints: dict[tuple[int, ...], Any] = {}
    assert {*launch.arguments, *constants} == {parameter.name for parameter in kernel.params}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments.get(parameter.name)
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants.setdefault(parameter.name, value)
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
            aligned = not parameter.do_not_specialize_on_alignment
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and fixed and value % 16 == 0
        if aligned:
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", architecture, 32)
    with TemporaryDirectory() as cache, patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
    return compiled


_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
