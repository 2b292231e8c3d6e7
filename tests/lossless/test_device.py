"""Behind a device, trees that grow there give plain decoding's tokens, keys and values, whatever drafts.

The emulated device: RAM stands for VRAM, and the flow is a GPU's.  The reference is the engine without one.
What is decided by time is decided by chance here, as in ``test_adaptive``.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from device_drafters import forget_accesses, run_device
from device_subjects import TEMPERS, Subject, open_device
from drafters import _run
from faithful import Faithful, Recorder
from test_lossless import SAMPLINGS, TREES
from tiny import FAMILIES

from subspec import LLM
from subspec.memory.backend import Backend, Event
from subspec.memory.exchange import Ring
from subspec.memory.hazards import HazardError
from subspec.models.kv_ledger import InexactError
from subspec.speculation import ahead as ahead_module
from subspec.speculation.ahead import _Steps
from subspec.speculation.harvest import Seedling, seedling
from subspec.speculation.levels import Levels, Shape
from subspec.speculation.sampling import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKED = ("llama", "qwen3")  # families: checking accesses takes as long as all else


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    made = Subject(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.cpu.close()


@pytest.fixture(scope="module")
def llm(subject: Subject) -> Iterator[LLM]:
    """It streams from RAM and from disk."""
    checked = subject.family in CHECKED
    with open_device(subject.store, subject.vram, subject.ram + subject.unit, checked=checked) as opened:
        assert 0 < opened.plan.disk_bytes < opened.plan.streamed_bytes
        yield opened


# --- every tree, every draft --------------------------------------------------------------------------------


def test_plain_on_a_device_equals_plain_on_a_cpu(subject: Subject, llm: LLM) -> None:
    for sampling in ("greedy", "temperature", "all filters"):
        forget_accesses(llm.engine)
        sampler = Sampler(SAMPLINGS[sampling], subject.prompt)
        found = _run(llm.engine, llm.engine.on_host(), subject.prompt, sampler, None)
        assert found.same(subject.plain(sampling)), sampling
        assert len(set(found.tokens)) >= 20, f"{sampling}: the text is too dull to tell"


@pytest.mark.parametrize("temper", TEMPERS)
def test_trees_by_chance_equal_plain(subject: Subject, llm: LLM, temper: str) -> None:
    filled, accepted, planted = 0, 0, 0
    for seed, sampling in enumerate(SAMPLINGS):
        found, passes = subject.check(llm, sampling, temper, seed)
        filled += found.filled
        accepted += sum(found.accepted)
        planted += sum(found > drafted for found, drafted in zip(found.accepted, passes, strict=True))
    assert filled > 100
    assert (accepted > 0) == (temper != "never")
    assert planted > 2 or temper == "never", "what gaps grew is never accepted without being drafted again"


@pytest.mark.parametrize("subject", ["qwen3"], indirect=True)
def test_a_tree_that_is_too_deep_for_the_rest(subject: Subject, llm: LLM) -> None:
    """Subtrees that survive may be deeper than there are tokens to come: none too many is committed."""
    for most in range(2, 26):
        subject.check(llm, "greedy", "always", most, most=most)


@pytest.mark.parametrize("tree", TREES)
def test_pinned_trees_equal_plain(subject: Subject, llm: LLM, tree: str) -> None:
    place = list(TREES).index(tree) + FAMILIES.index(subject.family)
    shape, samplings = TREES[tree], list(SAMPLINGS)
    for number, temper in enumerate(TEMPERS):
        accepted = subject.check(llm, samplings[(3 * place + number) % 7], temper, 0, tree)[0].accepted
        assert (max(accepted) == 0) == (temper == "never")
        if temper == "always":  # the last step has room for fewer
            assert set(accepted[:-1]) == {min(shape.depth, shape.nodes - 1)}


def test_the_engines_own_drafts(subject: Subject, llm: LLM) -> None:
    accepted = 0
    for seed, (sampling, tree) in enumerate([("greedy", None), ("all filters", None), ("penalty", "bushy")]):
        accepted += sum(subject.check(llm, sampling, None, seed, tree)[0].accepted)
    assert accepted > 15, "the substitutes hardly ever agree"


@pytest.mark.parametrize("subject", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_draft_sees_the_noise_and_the_penalty_of_the_target(
    subject: Subject, llm: LLM, sampling: str
) -> None:
    params, recorder = SAMPLINGS[sampling], Recorder(subject.cpu.engine)
    plain = _run(subject.cpu.engine, recorder, subject.prompt, Sampler(params, subject.prompt), None)
    ahead, said = subject.ahead("chain", 0), torch.stack(recorder.said)
    passes = Faithful(llm.engine, ahead, subject.prompt + plain.tokens, params, 0, said)
    found = run_device(llm.engine, passes, ahead, subject.prompt, params, 0)
    assert found.run.same(plain)
    assert len(found.accepted) <= 9, "not nearly all of its guesses were right"  # four steps if all are


@pytest.mark.parametrize("subject", ["qwen3"], indirect=True)
def test_each_tree_has_its_own_captured_passes(subject: Subject, llm: LLM) -> None:
    """What was captured for one tree is never replayed for another one of the same sampling."""
    first = {tree: subject.check(llm, "greedy", None, 0, tree)[0].accepted for tree in ("chain", "bushy")}
    llm.engine.drafter._captured.clear()
    for tree, accepted in first.items():
        assert subject.check(llm, "greedy", None, 0, tree)[0].accepted == accepted


# --- what the tests must be able to notice ------------------------------------------------------------------


def without_shadows(patch: pytest.MonkeyPatch) -> None:
    """A level that the sweep verifies is drafted in its own slots."""
    patch.setattr(Levels, "shadow", lambda *_: None)


def shadows_that_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Of a shadowed level, the nodes' own slots survive, also those that nobody wrote."""
    patch.setattr(_Steps, "_entry", lambda self, grown, node: self._base + grown.places[node])


def a_seedling_one_node_off(patch: pytest.MonkeyPatch) -> None:
    """The surviving subtree's entries go one slot too far."""

    def planted(*arguments: object) -> Seedling | None:
        found = seedling(*arguments)  # type: ignore[arg-type]
        if found is None:
            return None
        return replace(found, places=[found.places[0], *(place + 1 for place in found.places[1:])])

    patch.setattr(ahead_module, "seedling", planted)


def a_summary_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    """The host reads what the last step left."""
    summarize = Levels.summarize

    def late(self: Levels, targets: torch.Tensor | None) -> None:
        before = self.summary.clone()
        summarize(self, targets)
        now, self._late = self.summary.clone(), getattr(self, "_late", before)  # type: ignore[attr-defined]
        self.summary.copy_(self._late)  # type: ignore[attr-defined]
        self._late = now  # type: ignore[attr-defined]

    patch.setattr(Levels, "summarize", late)


def nodes_selected_after_the_sweep(patch: pytest.MonkeyPatch) -> None:
    """The sweep goes over rows that were not described yet."""

    def sweep(self: _Steps, count: int) -> torch.Tensor:
        self._shadowed = None
        gap = None if self._policy is None else self._draft_in_gap
        logits = self._passes.target(self._levels.verify.chunk(0, count), last_only=False, gap=gap)
        self._passes.run(partial(self._levels.select, count), "select")
        self._end_gap_pass()
        return logits

    patch.setattr(_Steps, "_sweep", sweep)


def nodes_selected_once_the_gaps_are_over(patch: pytest.MonkeyPatch) -> None:
    """The host learns of other nodes than those that the sweep went over."""
    end = _Steps._end_gap_pass

    def end_and_select(self: _Steps) -> None:
        end(self)
        self._passes.run(partial(self._levels.select, self._levels.shape.verified), "select")

    patch.setattr(_Steps, "_end_gap_pass", end_and_select)


def too_little_noise(patch: pytest.MonkeyPatch) -> None:
    """Noise of a position overwrites that of one that is still wanted."""
    patch.setattr(Shape, "positions", property(lambda self: self.depth - 2))


def old_scores(patch: pytest.MonkeyPatch) -> None:
    """A tree begins with the nodes of the last one."""

    def begin(self: Levels, seed: torch.Tensor) -> None:
        scores = self._score.clone()
        original(self, seed)
        self._score[1:].copy_(scores[1:])

    original = Levels.begin
    patch.setattr(Levels, "begin", begin)


def uploads_without_a_wait(patch: pytest.MonkeyPatch) -> None:
    """What the device has not read yet is overwritten."""

    class NeverWaiting:
        def __init__(self, backend: Backend) -> None:
            self.event = backend.event

        def host_wait(self, event: Event) -> None:
            pass

    region = Ring.region

    def unwaited(self: Ring, n_bytes: int) -> tuple[torch.Tensor, Event]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "_backend", NeverWaiting(self._backend))
            return region(self, n_bytes)

    patch.setattr(Ring, "region", unwaited)


MUTANTS = (
    without_shadows,
    shadows_that_are_forgotten,
    a_seedling_one_node_off,
    a_summary_of_the_step_before,
    nodes_selected_after_the_sweep,
    nodes_selected_once_the_gaps_are_over,
    too_little_noise,
    old_scores,
    uploads_without_a_wait,
)


def upload_little(llm: LLM, patch: pytest.MonkeyPatch) -> None:
    """Make room for a surviving subtree and little else, so that some uploads must wait."""
    assert llm.engine.exchange is not None
    ring = llm.engine.exchange._up
    patch.setattr(ring, "_memory", ring._memory[:4608])


@pytest.mark.parametrize("subject", ["qwen3"], indirect=True)
def test_a_little_room_for_uploads(subject: Subject, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_little(llm, monkeypatch)
    for seed in range(2):
        subject.check(llm, "all filters", "sometimes", seed)


@pytest.mark.parametrize("subject", ["qwen3"], indirect=True)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_step_is_noticed(
    subject: Subject, llm: LLM, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    upload_little(llm, monkeypatch)
    subject.forget_trees()
    noticed = []
    for seed, temper in enumerate(("sometimes", "never", "sometimes")):
        plain = subject.plain("temperature", 9 if temper == "never" else 26)
        try:
            if not subject.run(llm, "temperature", temper, seed)[0].run.same(plain):
                noticed.append("other tokens, keys or values")
        except (AssertionError, KeyError, IndexError, InexactError, HazardError) as error:
            noticed.append(repr(error))
    subject.forget_trees()
    assert llm.engine.checker is not None
    llm.engine.checker.hazards.clear()
    assert noticed
