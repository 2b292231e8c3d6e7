"""What activations say of columns, against hooks on the same model under ``transformers``."""

from functools import partial
from pathlib import Path

import pytest
import torch
from reference import load_reference
from tiny import FAMILIES, add_letters, write_tiny

from subspec.checkpoint import open_checkpoint
from subspec.models.config import ModelConfig
from subspec.store.activations import Activations
from subspec.store.prepare import prepare
from subspec.store.reader import Store
from subspec.store.writer import EMBEDDING, StoreWriter
from subspec.substitute.quantize import column_importance

TOKENS = [5, 9, 5, 200, 31, 77, 8, 8, 300, 12, 4, 99, 250, 61, 7]
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def expected(directory: Path) -> list[torch.Tensor]:
    """Importance of every matrix's columns, layer by layer, then the head's."""
    model, found = load_reference(directory), {}

    def note(name: str, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        squares = given[0][0].square()
        found[name] = column_importance((squares / squares.mean(1, keepdim=True)).mean(0))

    for name, module in model.named_modules():
        if name.endswith(INPUTS) or name == "lm_head":
            module.register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    layers = range(model.config.num_hidden_layers)
    return [*(found[f"model.layers.{i}.{name}"] for i in layers for name in INPUTS), found["lm_head"]]


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_that_of_the_models_own_activations(family: str, skipped: int, tmp_path: Path) -> None:
    """With layers that are passed unprepared, as in a job that goes on, the later ones say the same."""
    directory = write_tiny(tmp_path / "model", family)
    with open_checkpoint(directory, None) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        writer = StoreWriter(tmp_path, checkpoint, config, "raw")
        embedded = checkpoint.read(EMBEDDING)[torch.tensor(TOKENS)]
        activations = Activations(config, writer._vectors(), embedded, writer._matrices)
        layers = range(skipped, config.layers)
        found = [one for i in layers for one in activations.layer(i, writer._matrices(i))]
        found.append(activations.head())
    for own, wanted in zip(found, expected(directory)[4 * skipped :], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)


def substitutes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.substitute")}


@pytest.mark.parametrize("stream", ["raw", "residual"])
def test_a_tokenizer_makes_columns_count_and_changes_nothing_exact(stream: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "qwen2", torch.bfloat16)
    plain = prepare(model, store=tmp_path / "plain", stream=stream)
    add_letters(model)
    weighed = prepare(model, store=tmp_path / "weighed", stream=stream)
    before, after = substitutes(plain), substitutes(weighed)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    records = []
    for place in (plain, weighed):
        store = Store(place)
        records.append({name: one.tensors for name, one in store.manifest.files.items() if one.tensors})
        store.close()
    assert records[0] == records[1]  # digests of the exact weights
