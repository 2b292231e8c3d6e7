"""The device's operators without a device: shapes, what is refused, what is written, and a cheap import."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from subspec.kernels import device
from subspec.kernels.device_operators import IMPLEMENTATIONS
from subspec.models.attention import attend_reference
from subspec.models.mlp import silu_mul_reference
from subspec.models.norm import rms_norm_reference
from subspec.models.rope import rotate_and_store_reference
from subspec.substitute import layout

BF16, FP32, INT = torch.bfloat16, torch.float32, torch.int32
Make = Callable[..., Tensor]


def arguments(make: Make) -> dict[str, tuple[dict[str, Any], tuple[int, ...] | None]]:
    """Right arguments of each operator, and its result's shape."""
    rows = {name: make(5, dtype=INT) for name in ("positions", "slots")}
    seen = {"prefix": make(5, dtype=INT), "paths": make(5, 3, dtype=INT), "path_lens": make(5, dtype=INT)}
    cache = {name: make(2, 2, 30, 16)[part] for part, name in enumerate(("k_cache", "v_cache"))}
    tables, gains = {"cos": make(9, 8, dtype=FP32), "sin": make(9, 8, dtype=FP32)}, make(16)
    tiles, size = make(layout.tile_bytes(24, 70), dtype=torch.uint8), {"n": 24, "k": 70}
    kv = {"k": make(3, 30, 16)[:2], "v": make(2, 30, 16)}
    return {
        "attend": ({"q": make(5, 4, 16), **kv, **seen, "scale": 0.25}, (5, 4, 16)),
        "rms_norm": ({"x": make(5, 3, 40), "weight": make(40), "eps": 1e-6}, (5, 3, 40)),
        "silu_mul": ({"gate_up": make(5, 22)}, (5, 11)),
        "rotate_and_store": (
            {
                "qkv": make(5, 128), **tables, **rows, **cache, "heads": 4, "q_norm": gains, "k_norm": gains,
                "eps": 0.1,
            },
            (5, 4, 16),
        ),
        "lowbit_linear": ({"x": make(5, 70), "tiles": tiles, **size, "bias": make(24, dtype=FP32)}, (5, 24)),
        "exact_linear": ({"x": make(5, 70), "weight": make(24, 70), "bias": None}, (5, 24)),
        "decode_residual": (
            {"residual": make(999, dtype=torch.uint8), "tiles": tiles, **size, "out": make(24, 70)},
            None,
        ),
        "gather_rows": ({"table": make(9, 70), "tokens": make(5, dtype=torch.int64)}, (5, 70)),
    }  # fmt: skip


def on(place: str) -> Make:
    def make(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=place)

    return make


META = arguments(on("meta"))
WRONG: dict[str, list[dict[str, Any]]] = {
    "attend": [
        {"q": on("meta")(5, 3, 16)},  # not a multiple of the key heads
        {"q": on("meta")(4, 4, 16)},  # other rows
        {"v": on("meta")(2, 29, 16)},
        {"k": on("meta")(2, 16, 30).mT},  # a key's values apart
        {"prefix": on("meta")(5, dtype=torch.int64)},
        {"prefix": on("cpu")(5, dtype=INT)},
        {"q": on("meta")(5, 4, 512), "k": on("meta")(2, 30, 512), "v": on("meta")(2, 30, 512)},
    ],
    "rms_norm": [{"weight": on("meta")(41)}, {"weight": on("meta")(40, dtype=FP32)}],
    "silu_mul": [{"gate_up": on("meta")(5, 21)}, {"gate_up": on("meta")(22, 5).T}],
    "rotate_and_store": [
        {"heads": 5},
        {"k_norm": None},
        {"cos": on("meta")(9, 8)},
        {"slots": on("meta")(4, dtype=INT)},
        {"v_cache": on("meta")(2, 30, 16, dtype=FP32)},
    ],
    "lowbit_linear": [
        {"k": 71},
        {"n": 33},
        {"bias": on("meta")(23)},
        {"x": on("meta")(5, 70, dtype=torch.int8)},
    ],
    "exact_linear": [{"weight": on("meta")(24, 71)}, {"bias": on("meta")(24, dtype=torch.float16)}],
    "decode_residual": [
        {"out": on("meta")(24, 70, dtype=FP32)},
        {"residual": on("meta")(19, dtype=torch.uint8)},
    ],
    "gather_rows": [{"tokens": on("meta")(5, dtype=torch.int16)}, {"table": on("meta")(70, 9).T}],
}  # fmt: skip


def check_result(name: str, given: dict[str, Any], shape: tuple[int, ...] | None) -> None:
    result = getattr(device, name)(**given)
    if shape is None:
        assert result is None
        return
    assert result.shape == shape
    assert result.dtype is BF16
    assert result.is_contiguous()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shapes(name: str) -> None:
    check_result(name, *META[name])


def test_shapes_on_a_fake_device() -> None:
    with FakeCuda():
        for name, (given, shape) in arguments(on("cuda")).items():
            check_result(name, given, shape)
        host_table = torch.empty(9, 70, dtype=BF16)
        assert device.gather_rows(host_table, torch.empty(5, dtype=INT, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(("name", "changed"), [(name, one) for name, some in WRONG.items() for one in some])
def test_refuses(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got|gains"):
        getattr(device, name)(**{**META[name][0], **changed})


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_schemas_say_what_is_written(name: str) -> None:
    schema = getattr(torch.ops.subspec, name).default._schema
    written = {argument.name for argument in schema.arguments if argument.is_write}
    assert written == {"rotate_and_store": {"k_cache", "v_cache"}, "decode_residual": {"out"}}.get(
        name, set()
    )
    assert [argument.name for argument in schema.arguments] == list(
        inspect.signature(getattr(device, name)).parameters
    )


@pytest.mark.parametrize(
    "reference", [attend_reference, rms_norm_reference, silu_mul_reference, rotate_and_store_reference]
)
def test_signatures_are_the_references(reference: Callable[..., Tensor]) -> None:
    twin = getattr(device, reference.__name__.removesuffix("_reference"))
    assert inspect.signature(twin) == inspect.signature(reference)


def test_no_implementation_on_the_cpu() -> None:
    with pytest.raises(NotImplementedError):
        device.silu_mul(torch.empty(2, 4))


def test_importing_needs_no_triton() -> None:
    script = "import sys; sys.modules['triton'] = None; from subspec.kernels import device; import torch; "
    script += "device.silu_mul(torch.empty(2, 4, device='meta'))"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_captured_in_a_graph(name: str) -> None:
    """A graph gives what a call gave: nothing waits, nothing is compiled or copied."""

    def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    given, shape = arguments(zeros)[name]
    wanted = getattr(device, name)(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = getattr(device, name)(**given)
    if shape is not None:
        result.fill_(7)
        graph.replay()
        assert torch.equal(result, wanted)
