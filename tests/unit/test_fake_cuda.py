"""The device without values: it must see what a real one would do wrong, and count exactly."""

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import Copy, FakeCuda, HiddenSyncError

from subspec.memory.backend import Backend

MIB = 1 << 20


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda:
        yield cuda


def line() -> int:
    """The caller's line."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_the_host_keeps_its_values(cuda: FakeCuda) -> None:
    assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
    assert torch.tensor([3.5]).item() == 3.5
    assert torch.nonzero(torch.tensor([0, 1])).tolist() == [[1]]
    assert cuda.vram_bytes == 0


def test_device_operations_have_shapes_and_strides(cuda: FakeCuda) -> None:
    x, weight = (
        torch.empty(5, 8, device="cuda", dtype=torch.bfloat16),
        torch.tensor([[1.0] * 8], device="cuda"),
    )
    y = torch.nn.functional.linear(x, weight.bfloat16().expand(3, 8))
    assert (y.shape, y.dtype, y.device) == ((5, 3), torch.bfloat16, torch.device("cuda", 0))
    assert y.T.stride() == (1, 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda device, host: device + host,
        lambda device, host: device @ host.reshape(2, 1),
        lambda device, host: torch.cat([device, host]),
        lambda device, host: device.add_(host),
        lambda device, host: host.add_(device),
        lambda device, host: torch.add(device, 1.0, out=host),
        lambda device, host: device[host.long()],
        lambda device, host: device.index_put_((host.long(),), device),
    ],
)
def test_two_devices_in_one_operation_raise(
    cuda: FakeCuda, mix: Callable[[torch.Tensor, torch.Tensor], object]
) -> None:
    device, host = torch.zeros(2, device="cuda"), torch.zeros(2)
    with pytest.raises((RuntimeError, AssertionError)):
        mix(device, host)


def test_a_number_of_the_host_may_be_an_operand(cuda: FakeCuda) -> None:
    assert (torch.zeros(2, device="cuda") * torch.tensor(3.0)).device.type == "cuda"


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: int(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: max(x),
    ],
)
def test_hidden_syncs_raise(cuda: FakeCuda, sync: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(HiddenSyncError, match="test_fake_cuda.py"):
        sync(torch.zeros(4, device="cuda"))


def test_copies_are_counted_with_bytes_and_place(cuda: FakeCuda) -> None:
    host, device = torch.zeros(6), torch.zeros(6, device="cuda")
    other = torch.empty_like(device)
    backend, stream = cuda.backend, cuda.backend.stream("copies")
    first = line() + 1
    backend.copy(stream, device, host)
    backend.copy(stream, other[:4], device[2:])
    backend.copy(stream, host[:2], other[:2])
    device.cpu()
    host.to("cuda", torch.float16)
    host.clone()
    host.copy_(torch.ones(6))
    kinds = [("h2d", 24, False), ("d2d", 16, False), ("d2h", 8, False), ("d2h", 24, True), ("h2d", 12, True)]
    assert cuda.copies.copies == [
        Copy(*kind, f"test_fake_cuda.py:{first + index}") for index, kind in enumerate(kinds)
    ]
    assert (cuda.copies.count("d2h"), cuda.copies.n_bytes("d2h")) == (2, 32)


def test_views_are_no_copies(cuda: FakeCuda) -> None:
    x = torch.zeros(4, 6, device="cuda")
    x.view(24)[3:].view(3, 7).T.to("cuda").contiguous  # noqa: B018
    assert cuda.copies.copies == []
    x.T.contiguous()
    assert cuda.copies.count("d2d") == 1


def test_what_the_host_reads_comes_from_the_hook() -> None:
    seen: list[torch.Size] = []

    def read_back(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)

    with FakeCuda(read_back) as cuda:
        tokens = torch.empty(2, 2, dtype=torch.int64, device="cuda")
        assert tokens.cpu().tolist() == [[0, 1], [2, 3]]
        pinned = torch.full((2,), 9)
        cuda.backend.copy(cuda.backend.compute, pinned, tokens[1])
        assert pinned.tolist() == [0, 1]
        assert seen == [(2, 2), (2,)]


def test_a_hook_of_another_shape_is_refused() -> None:
    with FakeCuda(lambda tensor: torch.zeros(3)), pytest.raises(AssertionError, match="another kind"):
        torch.zeros(2, device="cuda").cpu()


def test_memory_now_and_at_most(cuda: FakeCuda) -> None:
    one = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    assert cuda.vram_bytes == MIB
    view = one[: MIB // 2].view(torch.bfloat16)
    assert cuda.vram_bytes == MIB
    two = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
    del one
    assert cuda.vram_bytes == 3 * MIB  # the view holds it
    del view
    assert (cuda.vram_bytes, cuda.peak_bytes) == (2 * MIB, 3 * MIB)
    two.bitwise_not_()
    assert cuda.peak_bytes == 3 * MIB
    cuda.reset_peak()
    assert cuda.peak_bytes == 2 * MIB
    two.to(torch.float16)
    assert (cuda.vram_bytes, cuda.peak_bytes) == (2 * MIB, 6 * MIB)


def test_work_in_place_takes_no_memory(cuda: FakeCuda) -> None:
    x, out = torch.zeros(8, 8, device="cuda"), torch.empty(8, 8, device="cuda")
    cuda.reset_peak()
    torch.mm(x, x, out=out)
    out.mul_(2)
    assert cuda.peak_bytes == 2 * 256


def test_the_backend_runs_everything_at_once(cuda: FakeCuda) -> None:
    backend: Backend = cuda.backend
    order: list[str] = []
    worker, event = backend.stream("worker", host=True), backend.event("event")
    backend.launch(worker, lambda: order.append("host"))
    backend.record(event, worker)
    backend.host_wait(event)
    backend.launch(backend.compute, lambda: order.append("device"))
    assert order == ["host", "device"]
    assert backend.done(event)
    assert backend.device == torch.device("cuda:0")
    backend.close()


def test_captured_work_stays_on_the_device(cuda: FakeCuda) -> None:
    device, host = torch.zeros(2, device="cuda"), torch.zeros(2)
    cuda.backend.capture(lambda: device.add_(1))()
    for work in (lambda: device.copy_(host, non_blocking=True), lambda: host.copy_(device)):
        with pytest.raises(AssertionError, match="captured work copies"):
            cuda.backend.capture(work)()


def test_operators_with_a_fake_implementation_run(cuda: FakeCuda) -> None:
    @torch.library.custom_op("subspec_test::double", mutates_args=("out",))
    def double(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(2 * x)

    @double.register_fake
    def _(x: torch.Tensor, out: torch.Tensor) -> None:
        assert x.shape == out.shape

    x = torch.zeros(3, device="cuda")
    double(x, torch.empty_like(x))
    assert cuda.copies.copies == []


def test_inference_mode_hides_nothing(cuda: FakeCuda) -> None:
    with torch.inference_mode():
        x = torch.zeros(4, device="cuda")
        x.cpu()
        torch.ones(2).to("cuda")
        torch.nn.functional.linear(x, x.expand(3, 4))
        assert torch.ones(2).tolist() == [1.0, 1.0]
        with pytest.raises(HiddenSyncError):
            x.nonzero()
    assert [copy.direction for copy in cuda.copies.copies] == ["d2h", "h2d"]


def test_native_code_gets_no_address(cuda: FakeCuda) -> None:
    x = torch.zeros(4, device="cuda")
    for tensor in (x, x[1:], x.half()):
        with pytest.raises(RuntimeError, match="data pointer"):
            tensor.data_ptr()


def test_outside_there_is_no_device() -> None:
    with FakeCuda():
        pass
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
