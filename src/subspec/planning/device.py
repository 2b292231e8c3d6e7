"""Which device computes, and what may be held where: decided from facts, before anything is built.

Without a device there is one budget, ``--memory``, of RAM.  With one there are two: ``--vram``, of the
device's memory, and ``--ram``, of what is pinned behind it.  The *emulated* device is the CPU with a part of
RAM in the place of VRAM: for tests, and for trying plans.  Knows nothing of models but their dtype.
"""

from dataclasses import dataclass

import torch

from subspec.errors import OptionError
from subspec.memory.tiers import (
    default_memory,
    default_ram,
    default_vram,
    format_size,
    free_memory_bytes,
    parse_size,
)

DEVICES = ("auto", "cpu", "cuda", "emulated")
AUTO = "auto"
Size = str | int | None  # None and "auto" leave the choice to the defaults

LEAST_CAPABILITY = (7, 0)  # that the kernels compile for
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GpuFacts:
    """What a CUDA device is.

    Attributes:
        name: as its driver has it.
        capability: (major, minor) of its instruction set.
        free_bytes: of its memory; ``total_bytes``: all of it.
        bf16: whether it computes in bfloat16.
    """

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    bf16: bool

    @property
    def usable(self) -> bool:
        """Whether its instruction set is new enough for the kernels."""
        return self.capability >= LEAST_CAPABILITY

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


@dataclass(frozen=True)
class Budgets:
    """Where a model runs, and what may be held there.

    Attributes:
        device: ``cpu``, ``cuda`` or ``emulated``.
        fast_bytes: bound on what is held in the fast tier: RAM, or the device's memory.
        host_bytes: bound on what is pinned in RAM behind a device; None: there is none.
        gpu: the CUDA device, if that is the device.
    """

    device: str
    fast_bytes: int
    host_bytes: int | None = None
    gpu: GpuFacts | None = None

    def require_dtype(self, dtype: str | None) -> None:
        """Whether the device computes in a dtype (``bfloat16``, …); None is not known yet, and passes.

        Raises:
            OptionError: it does not.
        """
        if self.gpu is not None and dtype == "bfloat16" and not self.gpu.bf16:
            raise OptionError(
                f"the weights are bfloat16, and {self.gpu} has none: that takes "
                f"sm_{BF16_CAPABILITY[0]}{BF16_CAPABILITY[1]}; use --dtype float16, or --device cpu"
            )


def choose_device(
    device: str,
    memory: Size,
    vram: Size,
    ram: Size,
    gpu: GpuFacts | None,
    *,
    why_none: str = "",
    free_ram_bytes: int | None = None,
) -> Budgets:
    """The device and the budgets for what was asked; pure.

    ``auto`` takes the CUDA device if there is one that can be used, else the CPU.

    Args:
        device: one of ``DEVICES``.
        memory: on a CPU, bound on everything; on a device it means ``vram``.
        vram: bound on what is held in the device's memory.
        ram: bound on what is pinned in RAM behind a device.
        gpu: the CUDA device, or None.
        why_none: why there is none, for messages.
        free_ram_bytes: of RAM, if the system says so: what the defaults are made of.

    Raises:
        OptionError: what was asked cannot be had here, or contradicts itself; the message has the remedy.
    """
    if device not in DEVICES:
        raise OptionError(f"device is {device!r}: choose one of {', '.join(DEVICES)}")
    if device == "emulated":
        return _emulated(_fast_size(memory, vram), ram, free_ram_bytes)
    if device == "cuda" or (device == "auto" and gpu is not None and gpu.usable):
        found = _required(gpu, why_none)
        fast = _given(_fast_size(memory, vram), "--vram")
        if fast is None:
            fast = default_vram(found.free_bytes, found.total_bytes)
        elif fast > found.total_bytes:
            raise OptionError(f"--vram {format_size(fast)}: {found} has {format_size(found.total_bytes)}")
        host = _given(ram, "--ram")
        if host is None:
            host = default_ram(free_ram_bytes)
        elif free_ram_bytes is not None and host > free_ram_bytes:
            raise OptionError(f"--ram {format_size(host)}: {format_size(free_ram_bytes)} are free: lower it")
        return Budgets("cuda", fast, host, found)
    for option, size in (("--vram", vram), ("--ram", ram)):
        if size is not None and size != AUTO:
            remedy = "leave it out" if _given(memory, "--memory") is not None else "use --memory"
            raise OptionError(
                f"{option} is for a CUDA device, and {_lack(device, gpu, why_none)}: {remedy}, or play a "
                "device in RAM with --device emulated"
            )
    fast = _given(memory, "--memory")
    return Budgets("cpu", default_memory(free_ram_bytes) if fast is None else fast)


def budgets_here(device: str, memory: Size, vram: Size, ram: Size) -> Budgets:
    """``choose_device`` on this machine; it is not asked for a GPU where none is wanted.  Raises alike."""
    gpu, why_none = None, ""
    if device in ("auto", "cuda"):
        gpu = gpu_facts()
        why_none = "" if gpu is not None else why_no_gpu()
    free = free_memory_bytes()
    return choose_device(device, memory, vram, ram, gpu, why_none=why_none, free_ram_bytes=free)


def gpu_facts() -> GpuFacts | None:
    """The current CUDA device, or None.  Makes CUDA's context on it: what is free then is what is left."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    return GpuFacts(properties.name, capability, free, total, bf16=capability >= BF16_CAPABILITY)


def why_no_gpu() -> str:
    """Why torch finds no CUDA device, as far as it says."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.current_device()  # asks the driver, which says what it lacks
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n")[0].rstrip(". ")
    return "the driver lists none"


def _given(size: Size, option: str) -> int | None:
    """Bytes of an option's size; None if the choice is left open."""
    if size is None or size == AUTO:
        return None
    try:
        return parse_size(size)
    except OptionError as error:
        raise OptionError(f"{option}: {error}") from error


def _fast_size(memory: Size, vram: Size) -> Size:
    """The size of a device's memory that was asked for under either name."""
    if _given(memory, "--memory") is not None and _given(vram, "--vram") is not None:
        raise OptionError("--memory means --vram on a device: give one of them")
    return vram if _given(memory, "--memory") is None else memory


def _emulated(vram: Size, ram: Size, free_ram_bytes: int | None) -> Budgets:
    """Both tiers are taken from RAM: what is not said shares what ``--ram auto`` would take."""
    fast, host = _given(vram, "--vram"), _given(ram, "--ram")
    if fast is None:
        fast = default_ram(free_ram_bytes) // 2
    if host is None:
        host = max(default_ram(free_ram_bytes) - fast, 0)
    if free_ram_bytes is not None and fast + host > free_ram_bytes:
        raise OptionError(
            f"--vram {format_size(fast)} and --ram {format_size(host)} are both taken from RAM, of which "
            f"{format_size(free_ram_bytes)} are free: lower them"
        )
    if host == 0:
        raise OptionError(
            f"--vram {format_size(fast)} leaves nothing of the RAM that may be taken here: lower it, or give "
            "--ram"
        )
    return Budgets("emulated", fast, host)


def _required(gpu: GpuFacts | None, why_none: str) -> GpuFacts:
    """The GPU, if there is one and it will do."""
    if gpu is None:
        raise OptionError(
            f"--device cuda, and {_lack('cuda', None, why_none)}: use --device cpu and --memory"
        )
    if not gpu.usable:
        raise OptionError(f"--device cuda, and {_lack('cuda', gpu, why_none)}: use --device cpu and --memory")
    return gpu


def _lack(device: str, gpu: GpuFacts | None, why_none: str) -> str:
    """Why no CUDA device is used, as half a sentence."""
    if device == "cpu":
        return "--device is cpu"
    if gpu is None:
        return f"no CUDA device was found{f' ({why_none})' if why_none else ''}"
    return f"{gpu} is too old: the kernels take sm_{LEAST_CAPABILITY[0]}{LEAST_CAPABILITY[1]} and above"
