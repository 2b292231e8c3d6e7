"""Speculative decoding equals plain decoding, token for token, whatever drafts, in whatever tree.

And more than tokens: the keys and values that a text leaves behind have the same bits.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from drafters import DRAFTERS, Run, run_drafter, run_plain
from tiny import FAMILIES, write_tiny

from subspec import LLM, SamplingParams
from subspec.kernels import native
from subspec.models.operations import operations
from subspec.speculation import decode as decoding
from subspec.speculation.draft import DraftPass, TreeShape
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TREES = {
    "chain": TreeShape(depth=6, width=1, nodes=7),
    "bushy": TreeShape(depth=3, width=4, nodes=13),
    "deep": TreeShape(depth=10, width=2, nodes=21),
    "partly verified": TreeShape(depth=6, width=4, nodes=9),
}
NEW_TOKENS = 26
SAMPLINGS = {
    "greedy": SamplingParams(NEW_TOKENS),
    "penalty": SamplingParams(NEW_TOKENS, repetition_penalty=1.3),
    "temperature": SamplingParams(NEW_TOKENS, temperature=0.8, seed=1),
    "top-k": SamplingParams(NEW_TOKENS, temperature=0.8, top_k=12, seed=2),
    "top-p": SamplingParams(NEW_TOKENS, temperature=0.8, top_p=0.9, seed=3),
    "min-p": SamplingParams(NEW_TOKENS, temperature=0.8, min_p=0.03, seed=4),
    "all filters": SamplingParams(
        NEW_TOKENS, temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.2, seed=5
    ),
}
DEEPEST, WIDEST = 10, 4


class Subject:
    """A tiny model, and its plain texts by sampling."""

    def __init__(self, directory: Path, family: str, dtype: torch.dtype, **options: int) -> None:
        changes = {"depth": DEEPEST, "width": WIDEST, "context": 128} | options
        write_tiny(directory / "model", family, dtype, num_hidden_layers=2)
        self.llm = LLM(directory / "model", "64MiB", store=directory / "store", **changes)  # type: ignore[arg-type]
        generator = random.Random(7)
        self.prompt = [
            generator.randrange(self.llm.config.vocab_size) for _ in range(50)
        ]  # texts pass 64 keys
        self._plain: dict[str, Run] = {}

    def share(self, tree: str) -> list[tuple[str, str]]:
        """Samplings and drafters to try in a tree: all in bf16, half in fp16, the others in fp32."""
        pairs = list(itertools.product(enumerate(SAMPLINGS), enumerate(DRAFTERS)))
        odd = {torch.bfloat16: None, torch.float16: 0, torch.float32: 1}[self.llm.engine.store.dtype]
        place = list(TREES).index(tree)
        chosen = [(s, d) for (i, s), (j, d) in pairs if odd is None or (i + j + place) % 2 == odd]
        return [pair for pair in chosen if pair[1] != "nothing" or tree in ("chain", "bushy")]  # no tree then

    def plain(self, sampling: str) -> Run:
        if sampling not in self._plain:
            self._plain[sampling] = run_plain(self.llm.engine, self.prompt, SAMPLINGS[sampling])
        return self._plain[sampling]

    def drafted(self, sampling: str, shape: TreeShape, drafter: str, seed: int = 0) -> Run:
        plain = self.plain(sampling)
        return run_drafter(self.llm.engine, self.prompt, SAMPLINGS[sampling], shape, drafter, plain, seed)


@pytest.fixture(scope="module", params=list(itertools.product(FAMILIES, DTYPES)), ids="-".join)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    family, dtype = request.param
    made = Subject(tmp_path_factory.mktemp(f"{family}-{dtype}"), family, DTYPES[dtype])
    yield made
    made.llm.close()


@pytest.mark.parametrize("tree", TREES)
def test_speculative_equals_plain(subject: Subject, tree: str) -> None:
    shape = TREES[tree]
    for sampling, drafter in subject.share(tree):
        plain, drafted = subject.plain(sampling), subject.drafted(sampling, shape, drafter)
        assert len(set(plain.tokens)) >= 20, f"{sampling}: the text is too dull to tell"
        assert torch.isfinite(subject.llm.engine.cache.keys[:, :, : plain.keys.shape[2]]).all()
        assert drafted.tokens == plain.tokens, (sampling, drafter)
        assert drafted.same(plain), f"{sampling}, {drafter}: same tokens, other keys or values"
        longest = max(drafted.accepted)
        assert longest <= min(shape.depth, shape.nodes - 1)
        assert (longest == 0) == (drafter in ("never", "nothing")), (sampling, drafter, drafted.accepted)
        if drafter == "always":  # the last step has room for fewer
            assert set(drafted.accepted[:-1]) == {min(shape.depth, shape.nodes - 1)}, sampling


def test_every_accepted_length_occurs(subject: Subject) -> None:
    shape, found = TreeShape(depth=6, width=3, nodes=19), set()
    for sampling, seed in itertools.product(("greedy", "all filters"), range(10)):
        drafted = subject.drafted(sampling, shape, "sometimes", seed)
        assert drafted.same(subject.plain(sampling))
        found.update(drafted.accepted)
    assert found == set(range(shape.depth + 1))


def wild_trees(text: list[int], seed: int) -> Callable[[DraftTree, DraftPass, Sampler, TreeShape], None]:
    """Trees without levels: any parent, in any order, twin siblings, right guesses anywhere."""
    generator = random.Random(seed)

    def grow(tree: DraftTree, draft: DraftPass, sampler: Sampler, shape: TreeShape) -> None:
        for _ in range(generator.randrange(shape.drafted)):
            open_nodes = [node for node in range(len(tree)) if tree.depths[node] < shape.depth]
            parent = generator.choice(open_nodes)
            place = tree.base + tree.depths[parent] + 1
            right = text[place] if place < len(text) else 0
            token = right if generator.random() < 0.5 else generator.randrange(320)
            tree.add(token, parent, tree.scores[parent] - generator.choice((0.0, generator.random())))

    return grow


@pytest.mark.parametrize("sampling", ["greedy", "all filters"])
def test_wild_trees(subject: Subject, sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, accepted = subject.plain(sampling), []
    for seed in range(5):
        monkeypatch.setattr(decoding, "grow", wild_trees(subject.prompt + plain.tokens, seed))
        drafted = subject.drafted(sampling, TreeShape(DEEPEST, WIDEST, 12), "substitutes")
        assert drafted.same(plain)
        accepted += drafted.accepted
    assert {0, 1, 2, 3} <= set(accepted)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a compiler: every kernel is its documented reference."""
    choosers = (native.kernels, operations)
    monkeypatch.setenv("SUBSPEC_KERNELS", "reference")
    for chooser in choosers:
        chooser.cache_clear()
    yield
    monkeypatch.undo()
    for chooser in choosers:
        chooser.cache_clear()


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bf16"), ("qwen2", "fp16"), ("qwen3", "fp32"), ("qwen3", "bf16")]
)
@pytest.mark.usefixtures("reference_kernels")
def test_reference_kernels(family: str, dtype: str, tmp_path: Path) -> None:
    subject = Subject(tmp_path, family, DTYPES[dtype])
    assert subject.llm.engine.weights.product.name.startswith("torch")
    for sampling, drafter in [
        ("greedy", "sometimes"),
        ("all filters", "substitutes"),
        ("temperature", "always"),
    ]:
        for tree in ("bushy", "partly verified"):
            assert subject.drafted(sampling, TREES[tree], drafter).same(subject.plain(sampling)), (
                sampling,
                tree,
            )
    subject.llm.close()
