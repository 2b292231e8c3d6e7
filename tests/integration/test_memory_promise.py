"""The budget in real processes: what preparing and generating add to a process's memory, and a capped one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config

from subspec.memory.tiers import MIB
from subspec.models.config import ModelConfig
from subspec.store.prepare import store_bytes

GROUPS = Path("/sys/fs/cgroup/memory")  # version 1
SLACK_BYTES = 700 * MIB  # beside the budget, for the interpreter and its libraries

PREPARE = """
import sys
from pathlib import Path
import subspec.store.prepare as prepare
from subspec.memory.tiers import peak_memory_bytes
import tempfile, torch
for small in sys.argv[1:3]:  # the first one pays for what is loaded and started once
    before = peak_memory_bytes()
    with tempfile.TemporaryDirectory(dir=Path(small).parent) as place:
        prepare.prepare(small, store=Path(place) / "store")
print(peak_memory_bytes() - before)
"""
GENERATE = """
import json, sys
from subspec import LLM, SamplingParams
from subspec.memory.tiers import peak_memory_bytes
loaded = peak_memory_bytes()
with LLM(sys.argv[1], int(sys.argv[2]), context=384, depth=8, width=2) as llm:
    result = llm.generate(list(range(300)), SamplingParams(max_new_tokens=6, ignore_eos=True))
    print(json.dumps({"loaded": loaded, "peak": peak_memory_bytes(), "tokens": result.token_ids,
                      "streamed": llm.plan.streamed_bytes, "held": llm.plan.held_bytes}))
"""


def write_model(directory: Path, dtype: torch.dtype, **sizes: Any) -> tuple[Path, ModelConfig]:
    """A random model in one shard a layer, so that making it takes little memory either."""
    directory.mkdir()
    config = tiny_config("qwen2", **sizes)
    (directory / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_dict(config)
    shards: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    names = list(model.tensors())
    step = max(1, len(names) // sizes["num_hidden_layers"])
    for number, first in enumerate(range(0, len(names), step)):
        part = {
            name: (torch.rand(model.tensors()[name], generator=generator) * 0.1 - 0.05).to(dtype)
            for name in names[first : first + step]
        }
        file = f"part-{number}.safetensors"
        save_file(part, directory / file)
        shards |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": shards}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory, model


def run(program: str, *arguments: object, group: Path | None = None) -> str:
    """The last line that a fresh interpreter prints, in a control group if one is given."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        preexec_fn=enter,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preparing_takes_the_memory_of_a_few_layers(tmp_path: Path, dtype: torch.dtype) -> None:
    """A model of many times the bound; the warm-up has layers of the same size, but two of them."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8000}
    layers = 18 if dtype == torch.float32 else 36
    small, _ = write_model(tmp_path / "small", dtype, **sizes, num_hidden_layers=2)
    large, model = write_model(tmp_path / "large", dtype, **sizes, num_hidden_layers=layers)
    bound = 24 * MIB
    assert store_bytes(model, dtype.itemsize, "raw") > 6 * bound
    assert int(run(PREPARE, small, large)) < bound


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of our own, removed afterwards."""
    place = GROUPS / f"subspec-test-{os.getpid()}"
    if os.geteuid() != 0 or not os.access(GROUPS, os.W_OK):
        pytest.skip(f"{GROUPS} is not there or not writable: memory cannot be capped here")
    try:
        place.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made: {error}")
    try:
        yield place
    finally:
        place.rmdir()


def test_a_capped_process_keeps_the_promise(tmp_path: Path, group: Path) -> None:
    """Prepare and generate with half the model's memory, under a cap that counts the page cache too."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 8000, "num_hidden_layers": 20}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    directory, _ = write_model(tmp_path / "model", torch.bfloat16, **sizes, tie_word_embeddings=True)
    weights_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert weights_bytes > 150 * MIB
    budget = weights_bytes // 2
    cap = budget + SLACK_BYTES
    (group / "memory.limit_in_bytes").write_text(str(cap))
    store = tmp_path / "store"
    run("import sys; from pathlib import Path; from subspec.store.prepare import prepare; "
        "print(prepare(sys.argv[1], store=Path(sys.argv[2])))", directory, store, group=group)  # fmt: skip
    found = json.loads(run(GENERATE, store, budget, group=group))
    assert len(found["tokens"]) == 6
    assert found["streamed"] > 0
    assert found["peak"] <= cap
    assert int((group / "memory.max_usage_in_bytes").read_text()) <= cap
    assert found["peak"] - found["loaded"] <= budget + 100 * MIB, "more than the budget and some library code"
