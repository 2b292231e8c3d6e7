"""Logits agree with ``transformers`` in fp32, for every family and kind of file."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import decode_cached, load_reference, open_engine, prefill, reference_logits, verify_tree
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, write_tiny, write_tiny_gguf

from subspec import LLM
from subspec.speculation.tree import DraftTree

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
VISIBLE = 100 * TOLERANCE  # what dropping a term must change at least
LENGTH = 48  # theirs computes angles in fp32: their error grows with the position, past 1e-4 at about 150
LAYERS = 2


def random_text(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(320) for _ in range(length)]


def random_tree(root: int, base: int, nodes: int, seed: int) -> DraftTree:
    """Nodes below random parents, deep ones more often."""
    generator, tree = random.Random(seed), DraftTree.rooted(root, base)
    for _ in range(nodes - 1):
        parent = max(generator.randrange(len(tree)), generator.randrange(len(tree)))
        tree.add(generator.randrange(320), parent, 0.0)
    return tree


@dataclass
class Pair:
    """A model under both implementations."""

    llm: LLM
    theirs: transformers.PreTrainedModel


CASES = [
    (family, tied, kind) for family in FAMILIES for tied in (False, True) for kind in ("safetensors", "gguf")
]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}-{case[2]}"
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, tied, kind = request.param
    place = tmp_path_factory.mktemp("parity")
    directory = write_tiny(place / "model", family, tie_word_embeddings=tied, num_hidden_layers=LAYERS)
    model = directory
    if kind == "gguf":
        model = write_tiny_gguf(
            place / "model.gguf", family, tie_word_embeddings=tied, num_hidden_layers=LAYERS
        )
    llm = open_engine(model, place / "store")
    yield Pair(llm, load_reference(directory))
    llm.close()


def test_prefill(pair: Pair) -> None:
    text = random_text(LENGTH)
    expected = reference_logits(pair.theirs, text)
    assert expected.std() >= 1, "such small logits would hide a dropped term"
    found = prefill(pair.llm.engine, text)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < TOLERANCE


def test_cached_decode(pair: Pair) -> None:
    text, start = random_text(LENGTH, seed=1), LENGTH - 30
    found = decode_cached(pair.llm.engine, text, start)
    with torch.no_grad():  # theirs decodes from its cache as well
        state = pair.theirs(torch.tensor([text[:start]]), use_cache=True).past_key_values
        rows = []
        for token in text[start:]:
            step = pair.theirs(torch.tensor([[token]]), past_key_values=state, use_cache=True)
            state = step.past_key_values
            rows.append(step.logits[0, 0])
    assert (found - torch.stack(rows)).abs().max() < TOLERANCE


@pytest.mark.parametrize("nodes", [1, 24])
def test_tree(pair: Pair, nodes: int) -> None:
    prefix = random_text(LENGTH - 8, seed=2)
    tree = random_tree(5, len(prefix), nodes, seed=3)
    found = verify_tree(pair.llm.engine, prefix, tree)
    for node in range(nodes):
        path = [tree.tokens[0], *tree.path_tokens(node)]
        expected = reference_logits(pair.theirs, prefix + path)[-1]
        assert (found[node] - expected).abs().max() < TOLERANCE, f"node {node} at depth {tree.depths[node]}"


# --- would a dropped term be seen? --------------------------------------------------------------------------

Mutation = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def without(part: str) -> Mutation:
    """The model with one bias at zero, or one norm gain at one, in its last layer (or at its end)."""

    def mutate(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = sorted(name for name in weights if part in name)[-1]
        weights[name] = (
            torch.zeros_like(weights[name]) if name.endswith("bias") else torch.ones_like(weights[name])
        )

    return mutate


def plain_rope(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """The model without its rope scaling."""
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }


def other_eps(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """The model with ten times the norms' epsilon, as if the config's were not read."""
    config["rms_norm_eps"] = 1e-2


_ATTENTION_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
_TERMS = {
    "llama": (*_NORMS, *_ATTENTION_BIASES, "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"),
    "llama3": _NORMS,
    "mistral": _NORMS,
    "qwen2": (*_NORMS, *_ATTENTION_BIASES),
    "qwen3": (*_NORMS, "q_norm", "k_norm"),
}
MUTANTS = [(family, term, without(term)) for family, terms in _TERMS.items() for term in terms]
MUTANTS += [(family, "eps", other_eps) for family in FAMILIES] + [("llama3", "rope scaling", plain_rope)]


@pytest.mark.parametrize(
    ("family", "mutate"),
    [pytest.param(family, mutate, id=f"{family}-{term}") for family, term, mutate in MUTANTS],
)
def test_a_dropped_term_is_seen(family: str, mutate: Mutation, tmp_path: Path) -> None:
    directory, text = write_tiny(tmp_path / "model", family, num_hidden_layers=LAYERS), random_text(LENGTH)
    expected = reference_logits(load_reference(directory), text)
    weights, config = (
        load_file(directory / "model.safetensors"),
        json.loads((directory / "config.json").read_text()),
    )
    mutate(weights, config)
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    llm = open_engine(directory, tmp_path / "store")
    assert (prefill(llm.engine, text) - expected).abs().max() > VISIBLE
    llm.close()
