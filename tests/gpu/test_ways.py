"""The ways of a real device to multiply: those that fit are right, can be timed, and serve whole models."""

from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from subspec import LLM, SamplingParams
from subspec.engine import weights
from subspec.memory.backend.cuda import CudaBackend
from subspec.memory.tiers import MIB
from subspec.store.prepare import prepare
from subspec.substitute.choice import Choice, Shape, choose_on
from subspec.substitute.device_products import TorchInt4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [Shape(1024, 512, 1), Shape(4096, 1408, 1), Shape(18944, 3584, 1)])
def test_ways_that_fit_are_right(backend: CudaBackend, shape: Shape) -> None:
    found = choose_on(backend.device, [shape], torch.bfloat16, tiles_kept=False)
    assert not [why for why in found.rejected.values() if why.startswith(("is wrong", "fails", "could not"))]
    assert "triton" in found.seconds or not found.seconds
    if torch.cuda.get_device_capability(backend.device) >= (8, 0):
        assert found.seconds["torch int4"] > 0


def test_a_model_drafts_in_torchs_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip("torch's int4 product needs compute capability 8.0")
    monkeypatch.setattr(weights, "choose_on", lambda *_, **__: Choice(TorchInt4(capability)))
    shape = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 128, "num_hidden_layers": 4}
    model = write_tiny(tmp_path / "model", "llama", torch.bfloat16, **shape)
    store = prepare(model, store=tmp_path / "store", stream="raw")
    params = SamplingParams(60, ignore_eos=True)
    with LLM(store, vram=512 * MIB, ram=256 * MIB, device="cuda", context=320) as llm:
        assert llm.engine.weights.draft_product == "torch int4"
        plain = llm.generate([5, 9, 17, 30], params, mode="plain")
        llm.reset()
        drafted = llm.generate([5, 9, 17, 30], params)
    assert drafted.token_ids == plain.token_ids
