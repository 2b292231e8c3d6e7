"""Behind a device, trees that grow there give plain decoding's tokens, keys and values, whatever drafts.

The emulated device: RAM stands for VRAM, and the flow is a GPU's.  The reference is the engine without one.
What is decided by time is decided by chance here, as in ``test_adaptive``.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, least_budget, least_device_budgets
from device_drafters import DeviceRun, run_device
from drafters import Run, _run, always, never, run_plain, sometimes
from test_adaptive import DEPTH, NODES, WIDTH, ByChance
from test_lossless import SAMPLINGS, TREES
from tiny import FAMILIES, write_tiny

from subspec import LLM
from subspec.memory.hazards import SWITCH
from subspec.planning import parts, plan
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import calibrations
from subspec.speculation.draft import TreeShape
from subspec.speculation.sampling import Sampler
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERS = {"always": always, "never": never, "sometimes": sometimes}
BOUNDS: dict[str, Any] = {"context": 128, "depth": 10, "width": 4, "nodes": 41}
CHANCE = TreeShape(DEPTH, WIDTH, NODES)
STAGING_BYTES = 4 * 8192  # so that units of tiny models come in several parts


@pytest.fixture(scope="module", autouse=True)
def _little_staging() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (parts, plan):
            patch.setattr(module, "STAGING_BYTES", STAGING_BYTES)
        yield


def open_device(store: Path, vram: int = PLENTY, ram: int = PLENTY, **options: Any) -> LLM:
    """A model on the emulated device, whose every access is checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        return LLM(store, vram=vram, ram=ram, device="emulated", **(BOUNDS | options))


class Subject:
    """A tiny model on the emulated device, and its plain texts on the CPU alone."""

    def __init__(self, directory: Path, family: str) -> None:
        write_tiny(directory / "model", family, torch.bfloat16)
        self.store = prepare(directory / "model", store=directory / "store")
        vram, ram, unit = least_device_budgets(self.store, **BOUNDS)
        self.llm = open_device(self.store, vram, ram + unit)
        assert 0 < self.llm.plan.disk_bytes < self.llm.plan.streamed_bytes
        self.cpu = LLM(self.store, least_budget(self.store, **BOUNDS)[0], **BOUNDS)
        generator = random.Random(7)
        self.prompt = [generator.randrange(self.llm.config.vocab_size) for _ in range(50)]
        self._plain: dict[str, Run] = {}
        self._aheads: dict[object, Ahead] = {}

    def plain(self, sampling: str) -> Run:
        if sampling not in self._plain:
            self._plain[sampling] = run_plain(self.cpu.engine, self.prompt, SAMPLINGS[sampling])
        return self._plain[sampling]

    def ahead(self, shape: TreeShape, policy: ByChance | None) -> Ahead:
        """One whose trees have a shape; without a policy, always all of it."""
        key = shape, policy is None
        if key not in self._aheads:
            size = self.llm.config.vocab_size
            self._aheads[key] = Ahead(shape, size, torch.device("cpu"), calibrations({}), policy)
        self._aheads[key].policy = policy
        return self._aheads[key]

    def run(self, sampling: str, temper: str | None, seed: int, tree: str | None = None) -> DeviceRun:
        """A text by a drafter, or by the engine's own drafts, in a tree, or in one by chance."""
        ahead = self.ahead(TREES[tree], None) if tree else self.ahead(CHANCE, ByChance(seed))
        drafts = TEMPERS[temper] if temper else None
        plain = self.plain(sampling)
        return run_device(self.llm.engine, ahead, self.prompt, SAMPLINGS[sampling], plain, drafts, seed)

    def check(self, sampling: str, temper: str | None, seed: int, tree: str | None = None) -> DeviceRun:
        """A run that must equal plain, with one wait a step, and no access out of order."""
        found, plain, case = self.run(sampling, temper, seed, tree), self.plain(sampling), (sampling, seed)
        assert found.run.tokens == plain.tokens, case
        assert found.run.same(plain), f"{case}: same tokens, other keys or values"
        assert found.reads == 1 + len(found.run.accepted), case
        checker = self.llm.engine.checker
        assert checker is not None
        checker.check()
        return found

    def close(self) -> None:
        self.llm.close()
        self.cpu.close()


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    made = Subject(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


def test_plain_on_a_device_equals_plain_on_a_cpu(subject: Subject) -> None:
    for sampling, params in SAMPLINGS.items():
        view, sampler = subject.llm.engine.on_host(), Sampler(params, subject.prompt)
        found = _run(subject.llm.engine, view, subject.prompt, sampler, None)
        assert found.same(subject.plain(sampling)), sampling
        assert len(set(found.tokens)) >= 20, f"{sampling}: the text is too dull to tell"


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("temper", TEMPERS)
def test_trees_by_chance_equal_plain(subject: Subject, temper: str, sampling: str) -> None:
    found = [subject.check(sampling, temper, seed) for seed in range(2)]
    assert sum(one.filled for one in found) > 20
    assert any(any(one.run.accepted) for one in found) == (temper != "never")


@pytest.mark.parametrize("tree", TREES)
def test_pinned_trees_equal_plain(subject: Subject, tree: str) -> None:
    shape = TREES[tree]
    for number, sampling in enumerate(SAMPLINGS):
        temper = list(TEMPERS)[(number + list(TREES).index(tree)) % 3]
        accepted = subject.check(sampling, temper, 0, tree).run.accepted
        assert (max(accepted) == 0) == (temper == "never")
        if temper == "always":  # the last step has room for fewer
            assert set(accepted[:-1]) == {min(shape.depth, shape.nodes - 1)}, sampling
