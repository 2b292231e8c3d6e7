"""Whole models on a device: lossless, without hidden waits or growth, and with the CPU's text in fp32."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from budgets import least_budget
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.memory.tiers import MIB
from subspec.models.decoder import prefix_rows
from subspec.store.prepare import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # torch's own, when it is switched on
]
DEVICE = "cuda"
PROMPT = [5, 9, 17, 30, 12, 44, 7]
CONTEXT, RAM = 320, 256 * MIB
CUBLAS_BYTES = 40 * MIB  # its largest workspace and some
TREE = {"depth": 6, "width": 3, "nodes": 16}
LONG = SamplingParams(200, ignore_eos=True)
SAMPLINGS = [
    SamplingParams(60, ignore_eos=True),
    SamplingParams(60, ignore_eos=True, temperature=0.8, seed=3),
]
CHILD = """
import sys
from subspec import LLM, SamplingParams
with LLM(sys.argv[1], vram=sys.argv[2], ram=sys.argv[3], device="cuda", context=320) as llm:
    llm.generate([5, 9, 17, 30], SamplingParams(30, ignore_eos=True))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 model, prepared."""
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny(folder / "model", "qwen2", torch.bfloat16, num_hidden_layers=6)
    return prepare(model, store=folder / "store")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose images are more than the staging buffers that disk needs."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24}
    model = write_tiny(folder / "model", "llama", torch.bfloat16, **shape)
    return prepare(model, store=folder / "store")


def little_vram(store: Path) -> int:
    """A budget in which one or two layers are resident."""
    least, unit = least_budget(store, context=CONTEXT, host_bytes=RAM)
    return least + 2 * unit


def opened(store: Path, vram: int, ram: int = RAM, **wishes: int) -> LLM:
    return LLM(store, vram=vram, ram=ram, device=DEVICE, context=CONTEXT, **wishes)  # type: ignore[arg-type]


def assert_same_texts(llm: LLM) -> None:
    for params in SAMPLINGS:
        plain = llm.generate(PROMPT, params, mode="plain")
        llm.reset()
        assert llm.generate(PROMPT, params).token_ids == plain.token_ids


@contextmanager
def no_hidden_waits() -> Iterator[None]:
    """Torch raises where an operation would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("wishes", [{}, TREE], ids=["adaptive", "fixed tree"])
def test_speculative_equals_plain_from_ram(store: Path, wishes: dict[str, int]) -> None:
    with opened(store, little_vram(store), **wishes) as llm:
        assert llm.plan.host_layers
        assert_same_texts(llm)


def test_graphs_and_eager_passes_give_the_same_tokens(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for switch in ("1", "0"):
        monkeypatch.setenv("SUBSPEC_GRAPHS", switch)
        with opened(store, little_vram(store), **TREE) as llm:
            assert (llm.describe()["eager"] is None) == (switch == "1")
            found = [llm.generate(PROMPT, params) for params in SAMPLINGS]
            texts.append([(one.token_ids, one.statistics.accepted) for one in found])
    assert texts[0] == texts[1]


def test_speculative_equals_plain_where_everything_is_resident(store: Path) -> None:
    with opened(store, 256 * MIB) as llm:
        assert not llm.plan.host_layers
        assert_same_texts(llm)


def test_speculative_equals_plain_from_disk(large: Path) -> None:
    with opened(large, little_vram(large)) as llm:
        whole = sum(llm.plan.host_parts.values())
    with opened(large, little_vram(large), whole - 8 * MIB) as llm:
        assert llm.plan.host_parts["staging"]
        assert_same_texts(llm)


def test_speculative_equals_plain_on_a_given_model() -> None:
    model = os.environ.get("SUBSPEC_GPU_MODEL")
    if model is None:
        pytest.skip("SUBSPEC_GPU_MODEL names no model")
    prompt = [{"role": "user", "content": "Write a short story about a lighthouse keeper."}]
    params = SamplingParams(120, ignore_eos=True)
    with LLM(model, vram=os.environ.get("SUBSPEC_GPU_VRAM"), device=DEVICE, context=1024) as llm:
        plain = llm.generate(prompt, params, mode="plain")
        llm.reset()
        assert llm.generate(prompt, params).token_ids == plain.token_ids


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_steps_wait_nowhere_but_where_they_read(store: Path, mode: str) -> None:
    with opened(store, little_vram(store)) as llm:
        llm.generate(PROMPT, SAMPLINGS[0], mode=mode)  # first calls compile and allocate
        llm.reset()
        with no_hidden_waits():
            llm.generate(PROMPT, SAMPLINGS[0], mode=mode)


def test_one_blocking_read_a_step(store: Path) -> None:
    with opened(store, little_vram(store)) as llm:
        exchange = llm.engine.exchange
        assert exchange is not None
        before = exchange.blocking_reads
        statistics = llm.generate(PROMPT, SAMPLINGS[0]).statistics
        assert exchange.blocking_reads - before <= statistics.steps + 2  # and the prefill's


def allocated_bytes() -> int:
    """Of the device, by tensors that live; cuBLAS keeps a workspace a stream, which is not theirs."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def resident_bytes() -> int:
    """Of this process, in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_memory_stays_flat(store: Path, mode: str) -> None:
    with opened(store, little_vram(store)) as llm:
        llm.generate(PROMPT, LONG, mode=mode)
        device, host = list[int](), list[int]()
        for _ in range(3):
            llm.reset()
            for _ in islice(llm.stream(PROMPT, LONG, mode=mode), 200):
                device.append(torch.cuda.memory_allocated())
            host.append(resident_bytes())
        third = len(device) // 3
        assert max(device[third:]) <= max(device[:third])
        assert host[-1] - host[0] < 4 * MIB


def test_memory_is_within_the_budget(large: Path) -> None:
    allocated_bytes()
    before, vram = torch.cuda.memory_allocated(), little_vram(large)
    torch.cuda.reset_peak_memory_stats()
    with opened(large, vram) as llm:
        llm.generate(PROMPT, SAMPLINGS[0])
        assert torch.cuda.max_memory_allocated() - before <= vram + CUBLAS_BYTES


def test_close_gives_everything_back(large: Path) -> None:
    before = allocated_bytes()
    for _ in range(2):
        with opened(large, little_vram(large)) as llm:
            llm.generate(PROMPT, SAMPLINGS[0])
        del llm
        assert allocated_bytes() - before < MIB


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_the_cpu_says_the_same_in_fp32(tmp_path: Path, family: str) -> None:
    store = prepare(write_tiny(tmp_path / "model", family, num_hidden_layers=4), store=tmp_path / "store")
    with (
        LLM(store, "256MiB", device="cpu", context=CONTEXT, **TREE) as there,  # type: ignore[arg-type]
        opened(store, little_vram(store), **TREE) as here,
    ):
        assert here.generate(PROMPT, SAMPLINGS[0]).token_ids == there.generate(PROMPT, SAMPLINGS[0]).token_ids
        rows = prefix_rows(PROMPT, 0)
        logits = [llm.engine.on_host().target(rows, last_only=False) for llm in (here, there)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_sanitizer_finds_no_race(store: Path) -> None:
    environment = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    sizes = [str(little_vram(store)), str(RAM)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(store), *sizes], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "CSAN detected" not in done.stderr
