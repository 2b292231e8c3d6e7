"""Which device computes and with what budgets, from facts of machines that are not here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from subspec import LLM
from subspec.errors import OptionError
from subspec.generation import building
from subspec.memory.tiers import GIB, MIB, default_memory, default_ram, default_vram
from subspec.planning import device as room
from subspec.planning.device import Budgets, GpuFacts, budgets_here, choose_device, gpu_facts, why_no_gpu
from subspec.planning.plan import Plan

ADA = GpuFacts("Ada", (8, 9), free_bytes=10 * GIB, total_bytes=12 * GIB, bf16=True)
TURING = GpuFacts("Turing", (7, 5), free_bytes=5 * GIB, total_bytes=6 * GIB, bf16=False)
PASCAL = GpuFacts("Pascal", (6, 1), free_bytes=5 * GIB, total_bytes=6 * GIB, bf16=False)
FREE = 32 * GIB


def chosen(
    device: str = "auto", memory: Any = "auto", vram: Any = None, ram: Any = None, gpu: GpuFacts | None = None
) -> Budgets:
    return choose_device(device, memory, vram, ram, gpu, why_none="no driver", free_ram_bytes=FREE)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, Budgets("cpu", default_memory(FREE))),
        ({"memory": "2GiB"}, Budgets("cpu", 2 * GIB)),
        ({"device": "cpu", "memory": 2 * GIB, "gpu": ADA}, Budgets("cpu", 2 * GIB)),
        ({"memory": None, "vram": "auto", "ram": "auto"}, Budgets("cpu", default_memory(FREE))),
        ({"gpu": ADA}, Budgets("cuda", default_vram(10 * GIB, 12 * GIB), default_ram(FREE), ADA)),
        ({"memory": "8GiB", "gpu": ADA}, Budgets("cuda", 8 * GIB, default_ram(FREE), ADA)),
        ({"vram": "8GiB", "ram": "9GiB", "gpu": ADA}, Budgets("cuda", 8 * GIB, 9 * GIB, ADA)),
        ({"device": "cuda", "vram": GIB, "ram": GIB, "gpu": TURING}, Budgets("cuda", GIB, GIB, TURING)),
        ({"gpu": PASCAL}, Budgets("cpu", default_memory(FREE))),
        ({"device": "emulated", "vram": "1GiB", "ram": "2GiB"}, Budgets("emulated", GIB, 2 * GIB)),
        ({"device": "emulated", "memory": "1GiB", "ram": GIB, "gpu": ADA}, Budgets("emulated", GIB, GIB)),
    ],
)
def test_the_device_and_its_budgets(asked: dict[str, Any], expected: Budgets) -> None:
    assert chosen(**asked) == expected


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device": "tpu"}, ("'tpu'", "auto, cpu, cuda, emulated")),
        ({"vram": "1GiB"}, ("--vram", "no CUDA device was found (no driver)", "use --memory")),
        ({"ram": "1GiB"}, ("--ram", "no CUDA device was found (no driver)", "use --memory")),
        ({"device": "cpu", "vram": "1GiB", "gpu": ADA}, ("--vram", "--device is cpu", "use --memory")),
        ({"vram": "1GiB", "gpu": PASCAL}, ("Pascal (sm_61) is too old", "sm_70", "use --memory")),
        ({"device": "cuda"}, ("no CUDA device was found (no driver)", "--device cpu")),
        ({"device": "cuda", "gpu": PASCAL}, ("Pascal (sm_61) is too old", "sm_70", "--device cpu")),
        ({"memory": "1GiB", "vram": "1GiB", "gpu": ADA}, ("--memory means --vram", "one of them")),
        ({"device": "emulated", "memory": "1GiB", "vram": "1GiB"}, ("--memory means --vram",)),
        ({"vram": "13GiB", "gpu": ADA}, ("--vram 13.00GiB", "Ada (sm_89) has 12.00GiB")),
        ({"vram": "much", "gpu": ADA}, ("'much' is not a size",)),
    ],
)
def test_what_cannot_be_had_is_an_error_with_its_remedy(
    asked: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(OptionError) as caught:
        chosen(**asked)
    for word in words:
        assert word in str(caught.value)


def test_an_emulated_device_shares_what_ram_there_is() -> None:
    whole = default_ram(FREE)
    assert chosen("emulated") == Budgets("emulated", whole // 2, whole - whole // 2)
    assert chosen("emulated", vram=whole - MIB).host_bytes == MIB
    with pytest.raises(OptionError, match="leaves nothing"):
        chosen("emulated", vram=whole + MIB)


def test_a_system_that_says_nothing_of_its_memory_must_be_told() -> None:
    with pytest.raises(OptionError, match="give --ram, for example"):
        choose_device("auto", "auto", None, None, ADA)
    with pytest.raises(OptionError, match="give --memory, for example"):
        choose_device("cpu", "auto", None, None, None)
    assert choose_device("auto", "auto", None, GIB, ADA).host_bytes == GIB


def test_bf16_needs_a_gpu_that_has_it() -> None:
    on_turing = chosen(gpu=TURING)
    with pytest.raises(OptionError) as caught:
        on_turing.require_dtype("bfloat16")
    for word in ("Turing (sm_75)", "sm_80", "--dtype float16", "--device cpu"):
        assert word in str(caught.value)
    for dtype in ("float16", "float32", None):
        on_turing.require_dtype(dtype)
    chosen(gpu=ADA).require_dtype("bfloat16")
    chosen("cpu", gpu=TURING).require_dtype("bfloat16")


def test_a_gpu_is_looked_for_only_where_one_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found() -> GpuFacts:
        asked.append("gpu")
        return ADA

    monkeypatch.setattr(room, "gpu_facts", found)
    assert budgets_here("cpu", GIB, None, None) == Budgets("cpu", GIB)
    assert budgets_here("emulated", GIB, None, GIB) == Budgets("emulated", GIB, GIB)
    assert asked == []
    assert budgets_here("auto", GIB, None, GIB) == Budgets("cuda", GIB, GIB, ADA)


@pytest.mark.usefixtures("one_thread")
def test_the_public_api_plans_with_the_budgets_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def build(store: object, plan: Plan, *_: object) -> None:
        plans.append(plan)
        raise OptionError("planned")

    monkeypatch.setattr(building, "built", build)
    model = write_tiny(tmp_path / "model", "qwen2", torch.bfloat16)
    given: dict[str, Any] = {"store": tmp_path / "store", "context": 64}
    with pytest.raises(OptionError, match="planned"):
        LLM(model, device="emulated", vram="90MiB", ram="80MiB", **given)
    monkeypatch.setattr(room, "gpu_facts", lambda: TURING)
    with pytest.raises(OptionError, match=r"Turing \(sm_75\)"):
        LLM(model, ram="80MiB", **given)
    (plan,) = plans
    assert (plan.budget_bytes, plan.host_budget_bytes, plan.context) == (90 * MIB, 80 * MIB, 64)


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_facts() is None
    assert "built without CUDA" in why_no_gpu()


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_what_the_driver_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def ask() -> int:
        raise error("\nFound no NVIDIA driver on your system. \nInstall one.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", ask)
    assert why_no_gpu() == "Found no NVIDIA driver on your system"


def test_emulated_budgets_are_taken_from_what_is_free() -> None:
    def chosen(vram: str | None, ram: str | None) -> Budgets:
        return choose_device("emulated", "auto", vram, ram, None, free_ram_bytes=16 * GIB)

    made = chosen("2GiB", "3GiB")
    assert (made.fast_bytes, made.host_bytes) == (2 * GIB, 3 * GIB)
    with pytest.raises(OptionError, match=r"--vram 10.00GiB and --ram 7.00GiB .* 16.00GiB are free: lower"):
        chosen("10GiB", "7GiB")
    with pytest.raises(OptionError, match=r"--vram 15.00GiB leaves nothing .*: lower it, or give --ram"):
        chosen("15GiB", None)


def test_a_size_that_is_none_names_its_option() -> None:
    with pytest.raises(OptionError, match="--ram: 'xx' is not a size"):
        choose_device("emulated", "auto", "1GiB", "xx", None, free_ram_bytes=16 * GIB)
    with pytest.raises(OptionError, match=r"--vram: 1.5 is no number of bytes"):
        choose_device("emulated", "auto", 1.5, None, None, free_ram_bytes=16 * GIB)  # type: ignore[arg-type]


def test_more_ram_than_is_free_is_refused_on_a_gpu() -> None:
    with pytest.raises(OptionError, match=r"--ram 32.00GiB: 16.00GiB are free: lower it"):
        choose_device("cuda", "auto", None, "32GiB", ADA, free_ram_bytes=16 * GIB)
