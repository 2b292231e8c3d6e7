"""A CUDA device without values: device code runs on a CPU build of torch, and all is checked but numbers.

Inside ``with FakeCuda() as cuda``, tensors on ``cuda`` have shapes, dtypes and strides only; tensors on the
CPU are as real as ever.  What would go wrong on a device goes wrong here: operands on two devices, a host
that waits for a value (``HiddenSyncError``), a kernel on host memory.  Copies are counted with their places
(``cuda.copies``), and so are bytes of device memory, now and at most (``cuda.vram_bytes``, ``peak_bytes``).

What the host reads back comes from the hook ``read_back``, as there is nothing to read: it gets the device
tensor and returns a CPU tensor of its shape and dtype.  ``cuda.backend`` is a backend on which everything
runs at once, on the calling thread; modes belong to a thread, so device code must stay on that one.

Native code must not meet such tensors: asking for their address raises.
"""

# mypy: disable-error-code="no-untyped-call"
# Torch's modes and storage references are not typed.

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspec.memory.backend import Event, Stream

aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default, aten.clone.default)
_READ_PINNED_MEMORY = ("subspec::gather_rows",)  # over the bus, by its unified address
_CUDA_DEVICE_TYPE = 1  # c10::DeviceType::CUDA
_GUARD_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_TORCH, _THIS = str(Path(torch.__file__).parent), str(Path(__file__))
_guard: list[object] = []  # the stand-in's memory, for as long as the process lives


class HiddenSyncError(AssertionError):
    """The host wants a value, or a shape, that only the device knows."""


def install_guard() -> None:
    """Let a CPU build of torch take ``cuda`` for a device that exists; does nothing on a CUDA build.

    Torch has a guard that switches no device, and puts it in place of a CUDA guard that counts no devices.  A
    CPU build has no CUDA guard at all, so one is put there whose every method returns 0.
    """
    if torch.version.cuda or torch.version.hip or _guard:
        return
    library = ctypes.CDLL(str(Path(_TORCH) / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (_CUDA_DEVICE_TYPE + 1)).in_dll(library, _GUARD_REGISTRY)
    zero = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda this: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    stand_in = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    _guard.extend((zero, methods, stand_in))
    registry[_CUDA_DEVICE_TYPE] = ctypes.addressof(stand_in)
    torch._C._ensureCUDADeviceGuardSet()
    assert registry[_CUDA_DEVICE_TYPE] != ctypes.addressof(stand_in), "torch kept the stand-in"


@dataclass(frozen=True)
class Copy:
    """One copy.

    Attributes:
        direction: ``h2d``, ``d2h``, or ``d2d`` into other memory of the device.
        n_bytes: that the target takes.
        blocking: whether the host waits for it.
        site: ``file:line`` of the code that asked for it.
    """

    direction: str
    n_bytes: int
    blocking: bool
    site: str


class CopyCounter(TorchDispatchMode):
    """Writes down the copies that touch a device.

    Attributes:
        copies: in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Copy] = []

    def count(self, direction: str) -> int:
        """How many copies went that way."""
        return sum(copy.direction == direction for copy in self.copies)

    def n_bytes(self, direction: str) -> int:
        """How many bytes went that way."""
        return sum(copy.n_bytes for copy in self.copies if copy.direction == direction)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and _on_device(args, kwargs):
            with self:  # elsewhere composite operations arrive as what they consist of
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func in _COPIES:
            self._note(result, args[1] if func is aten.copy_.default else args[0], func, args, kwargs)
        return result

    def _note(self, target: torch.Tensor, source: torch.Tensor, func: Any, args: Any, kwargs: Any) -> None:
        """Enter a copy, unless it stays on the host or within one tensor's memory."""
        ends = "d" if source.device.type == "cuda" else "h", "d" if target.device.type == "cuda" else "h"
        if ends == ("h", "h"):
            return
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        blocking = not non_blocking and ends != ("d", "d")
        self.copies.append(Copy("2".join(ends), target.nbytes, blocking, call_site()))


class FakeCuda:
    """A context in which the device ``cuda`` exists, without values.

    Args:
        read_back: gives what the host reads of a device tensor; default: zeros.

    Attributes:
        backend: everything at once.
        copies: counted since the context was entered.
    """

    def __init__(self, read_back: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        install_guard()
        self.read_back = read_back or (lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
        self.copies = CopyCounter()
        self._split = _Split(self)
        self.backend = FakeCudaBackend(self.copies)
        self._stack = ExitStack()

    @property
    def vram_bytes(self) -> int:
        """Bytes of device memory that tensors hold now."""
        return self._split.vram_bytes()

    @property
    def peak_bytes(self) -> int:
        """The most that ``vram_bytes`` ever was after an operation."""
        return self._split.peak_bytes

    def reset_peak(self) -> None:
        """Measure the most from now on."""
        self._split.peak_bytes = self.vram_bytes

    def __enter__(self) -> Self:
        for mode in (self._split.fake, self._split, self.copies):
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Split(TorchDispatchMode):
    """Sends operations of the device to the fake mode, and leaves the host's alone."""

    def __init__(self, owner: FakeCuda) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.peak_bytes = 0
        self._owner = owner
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _on_device(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].copy_(self._value(args[1]))
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            with unset_fake_temporarily():
                return self._value(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if func not in _COPIES and func.name() not in _READ_PINNED_MEMORY:
            self._refuse_host_operands(func, tree_leaves((args, kwargs)))
        return self._enter(self._run(func, args, kwargs))

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the host reads."""
        value = self._owner.read_back(tensor)
        assert value.device.type == "cpu"
        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), "read_back gave another kind"
        return value

    def _refuse_host_operands(self, func: Any, leaves: Sequence[Any]) -> None:
        """A kernel takes numbers from the host, not its memory; torch would copy an index, and wait."""
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.dim():
                raise AssertionError(f"{func} at {call_site()} takes host memory, {tuple(leaf.shape)}")

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation's shapes."""
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HiddenSyncError(f"{func} at {call_site()} waits for the device") from error

    def _enter(self, result: Any) -> Any:
        """Account for the memory of what came out."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                assert tensor.device.type == "cuda", f"a host tensor without values, at {call_site()}"
                torch._C._set_throw_on_mutable_data_ptr(tensor)
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.vram_bytes())
        return result

    def vram_bytes(self) -> int:
        """The bytes of the storages that still live."""
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
        return sum(n_bytes for _, n_bytes in self._storages.values())


class FakeCudaBackend:
    """A backend of the device ``cuda:0`` whose streams, also the host's, run at once on the caller's thread.

    Captured work is held to what a graph allows: it copies nothing from or to the host.
    """

    def __init__(self, counter: CopyCounter) -> None:
        self.device = torch.device("cuda", 0)
        self.compute = Stream("compute", host=False)
        self.eager: str | None = None
        self._counter = counter

    def stream(self, name: str, *, host: bool = False) -> Stream:
        return Stream(name, host=host)

    def event(self, name: str) -> Event:
        return Event(name)

    def settle(self) -> None:
        """Everything is done."""

    def record(self, event: Event, stream: Stream) -> None:
        """Reached at once."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Everything was reached."""

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor, note: str = "") -> None:
        assert not stream.host, f"{stream.name} is a host stream"
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        assert target.is_contiguous()
        assert source.is_contiguous()
        target.copy_(source, non_blocking=True)

    def launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        note: str = "",
    ) -> None:
        work()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        def replay() -> None:
            before = len(self._counter.copies)
            work()
            crossing = [copy for copy in self._counter.copies[before:] if copy.direction != "d2d"]
            assert not crossing, f"captured work copies from or to the host: {crossing}"

        return replay

    def host_wait(self, event: Event) -> None:
        """Everything was reached."""

    def done(self, event: Event) -> bool:
        return True

    def touch(
        self, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = (), note: str = ""
    ) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to end."""


def _on_device(args: Any, kwargs: Any) -> bool:
    """Whether an operation takes tensors of the device, or makes some."""
    return any(
        (isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda")
        or (isinstance(leaf, torch.device) and leaf.type == "cuda")
        for leaf in tree_leaves((args, kwargs))
    )


def call_site() -> str:
    """``file:line`` of the innermost code outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _THIS)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
