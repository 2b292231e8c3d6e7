"""Trees that grow as they pay, and in the gaps of a sweep, give plain decoding's tokens, keys and values.

What is decided by time is decided by chance here: which nodes are forwarded and verified, and after how many
layers of drafting a sweep goes on with its next unit.  Drafts leave NaN wherever they write.
"""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from budgets import least_budget
from drafters import CERTAIN, Drafter, Run, Silent, always, never, run_plain, sometimes
from drafters import _run as run_loop
from tiny import FAMILIES, write_tiny

from subspec import LLM, SamplingParams
from subspec.engine import Engine
from subspec.memory.hazards import SWITCH
from subspec.memory.schedule import Step
from subspec.models.decoder import Rows
from subspec.models.kv_ledger import InexactError
from subspec.speculation.adaptive import Speculation, Speculator
from subspec.speculation.calibration import calibrations
from subspec.speculation.growth import Growth
from subspec.speculation.policy import Policy
from subspec.speculation.preview import PREVIEW_ROWS
from subspec.speculation.sampling import Sampler
from subspec.speculation.times import StepTimes
from subspec.speculation.tree import DraftTree
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 26
SAMPLINGS = {
    "greedy": SamplingParams(NEW_TOKENS),
    "temperature": SamplingParams(NEW_TOKENS, temperature=0.8, seed=1),
    "all filters": SamplingParams(
        NEW_TOKENS, temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.2, seed=5
    ),
}
TEMPERS = {"always": always, "never": never, "sometimes": sometimes}
WIDTH, NODES, DEPTH = 4, 14, 9
CAPACITY = 80 + PREVIEW_ROWS


class ByChance(Policy):
    """Forwards and verifies at random."""

    def __init__(self, seed: int) -> None:
        super().__init__(StepTimes(), width=WIDTH, nodes=NODES, depth=DEPTH)
        self._random = random.Random(seed)

    def read_prompt(self, rows: int) -> bool:
        return self._random.random() < 0.5

    def widen(self, frontier: Sequence[float], scores: Sequence[float], drafting_s: float) -> int:
        return min(self._random.choice((0, 1, 1, 2, 2, 3, WIDTH)), len(frontier))

    def widen_in_gap(self, frontier: Sequence[float]) -> int:
        return min(self._random.choice((0, 1, 1, 2, 2, WIDTH)), len(frontier))

    def verify(self, scores: Sequence[float], drafting_s: float) -> int:
        return min(self._random.randint(1, NODES), len(scores))

    def preview(self, drafting_s: float, rows: int, swept: float) -> int:
        return self._random.choice((0, 1, 3, NODES))


class Gappy(Drafter):
    """An engine whose drafts come from elsewhere, in pieces, and whose sweeps have gaps where chance says.

    Attributes:
        filled: pieces of drafting done in gaps.
        previewed: rows that were previewed in them.
    """

    def __init__(
        self, engine: Engine, text: Sequence[int], temper: Callable[..., torch.Tensor] | None, seed: int
    ) -> None:
        super().__init__(engine, text, temper or always, seed)
        self._own_drafts = temper is None
        self._chance = random.Random(seed)
        self._swept: set[int] = set()
        self._tokens = torch.zeros(0)
        self.filled = self.previewed = 0

    def target(self, rows: Rows, *, last_only: bool, gap: Callable[[], bool] | None = None) -> torch.Tensor:
        self._token_in.update(zip(rows.slots.tolist(), rows.tokens.tolist(), strict=True))
        if gap is None:
            return self._engine.target(rows, last_only=last_only)
        schedule, busy = self._engine.schedule, gap
        launch = schedule._launch

        def launch_after_a_gap(step: Step, slot: torch.Tensor | None) -> None:
            for _ in range(self._chance.choice((0, 0, 1, 2, 5, 9))):
                if not busy():
                    break
                self.filled += 1
            launch(step, slot)

        self._swept, self._tokens = set(rows.slots.tolist()), rows.tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule, "_launch", launch_after_a_gap)
            logits = self._engine.target(rows, last_only=last_only)
        self._swept = set()
        return logits

    def draft_steps(self, rows: Rows, *, last_only: bool = False) -> Generator[None, None, torch.Tensor]:
        self._token_in.update(zip(rows.slots.tolist(), rows.tokens.tolist(), strict=True))
        yield from self._spoilt(self._engine.draft_steps(rows, last_only=last_only), rows)
        wanted = range(len(rows))[-1:] if last_only else range(len(rows))
        return torch.stack([self._row(rows, index) for index in wanted])  # (T, V)

    @property
    def swept(self) -> float:
        return self._engine.swept

    def preview_steps(self, numbers: list[int], rows: Rows) -> Generator[None, None, torch.Tensor]:
        self._token_in.update(zip(rows.slots.tolist(), rows.tokens.tolist(), strict=True))
        assert self._tokens[numbers].tolist() == rows.tokens.tolist(), "other rows than the sweep's"
        self.previewed += len(rows)
        yield from self._spoilt(self._engine.preview_steps(numbers, rows), rows)
        return torch.stack([self._row(rows, index) for index in range(len(rows))])  # (T, V)

    def _spoilt(self, steps: Generator[None, None, torch.Tensor], rows: Rows) -> Generator[None, None, None]:
        """A pass whose keys and values are NaN; the engine's own, if it drafts for itself."""
        slots, cache = rows.slots.long(), self._engine.cache
        for layer in range(len(cache.keys)):
            assert self._swept.isdisjoint(slots.tolist()), "a draft writes where the sweep does"
            if self._own_drafts and next(steps, 0) is not None:
                return
            for part in (cache.keys, cache.values):
                part[layer][:, slots] = torch.nan
            yield
        if self._own_drafts:
            assert next(steps, 0) == 0, "there is a piece left"

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        tokens = [self._token_in.get(source) for source in sources]
        self._engine.move(sources, start, drafts)
        for place, token in enumerate(tokens):
            if token is not None:
                self._token_in[start + place] = token

    def counters(self) -> object:
        return self._engine.counters()

    @property
    def sweep_bytes(self) -> tuple[int, int]:
        return self._engine.sweep_bytes


def run_adaptive(engine: Engine, prompt: list[int], params: SamplingParams, passes: Gappy, seed: int) -> Run:
    sampler = Sampler(params, prompt)
    speculator = Speculator(ByChance(seed), calibrations({}), CAPACITY)
    return run_loop(engine, passes, prompt, sampler, speculator)  # type: ignore[arg-type]


def check_order(subject: "Subject") -> None:
    """No access to a slot, or to an exact entry of the cache, was out of order so far."""
    checker = subject.llm.engine.checker
    assert checker is not None
    checker.check()


class Subject:
    """A tiny model that streams, and its plain texts."""

    def __init__(self, directory: Path, family: str) -> None:
        write_tiny(directory / "model", family, torch.bfloat16, num_hidden_layers=3)
        store = prepare(directory / "model", store=directory / "store")
        choices = {"context": 128, "depth": DEPTH, "width": 9}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, "1")  # every access to slots and to the cache is checked
            self.llm = LLM(store, least_budget(store, **choices)[0], **choices)  # type: ignore[arg-type]
        assert self.llm.plan.tree_slots >= CAPACITY
        assert self.llm.plan.streamed_bytes > 0
        generator = random.Random(7)
        self.prompt = [generator.randrange(self.llm.config.vocab_size) for _ in range(50)]
        self._plain: dict[str, Run] = {}

    def plain(self, sampling: str) -> Run:
        if sampling not in self._plain:
            self._plain[sampling] = run_plain(self.llm.engine, self.prompt, SAMPLINGS[sampling])
        return self._plain[sampling]

    def passes(self, sampling: str, temper: str | None, seed: int) -> Gappy:
        text = self.prompt + self.plain(sampling).tokens
        return Gappy(self.llm.engine, text, TEMPERS[temper] if temper else None, seed)

    def run(self, sampling: str, temper: str | None, seed: int) -> tuple[Run, Gappy]:
        passes = self.passes(sampling, temper, seed)
        return run_adaptive(self.llm.engine, self.prompt, SAMPLINGS[sampling], passes, seed), passes


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    made = Subject(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.llm.close()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("temper", TEMPERS)
def test_any_growth_with_any_gaps_equals_plain(subject: Subject, temper: str, sampling: str) -> None:
    filled = accepted = previewed = 0
    for seed in range(6):
        found, passes = subject.run(sampling, temper, seed)
        assert found.tokens == subject.plain(sampling).tokens, seed
        assert found.same(subject.plain(sampling)), f"{seed}: same tokens, other keys or values"
        filled += passes.filled
        previewed += passes.previewed
        accepted += sum(found.accepted)
        check_order(subject)
    assert filled > 50
    assert previewed > 10
    assert accepted or temper == "never"  # the text repeats itself now and then: guesses need no draft


def test_the_engines_own_drafts_in_gaps(subject: Subject) -> None:
    for sampling in SAMPLINGS:
        for seed in range(4):
            found, _ = subject.run(sampling, None, seed)
            assert found.same(subject.plain(sampling)), (sampling, seed)


def test_subtrees_that_survive_are_verified_and_accepted(subject: Subject) -> None:
    """With a drafter that is always right, what gaps grew is committed without being drafted again."""
    lengths = [max(subject.run("greedy", "always", seed)[0].accepted) for seed in range(12)]
    assert max(lengths) >= DEPTH - 1
    kept = []
    original = Growth.continue_from

    def counted(self: Growth, *arguments: object) -> tuple[Growth, list[int]]:
        following, slots = original(self, *arguments)  # type: ignore[arg-type]
        kept.append(len(following.tree))
        return following, slots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Growth, "continue_from", counted)
        for seed in range(4):
            assert subject.run("greedy", "always", seed)[0].same(subject.plain("greedy"))
    assert max(kept) > 4


def test_what_was_drafted_behind_the_prompt_begins_the_first_step(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    original = Speculation.prefilled

    def counted(self: Speculation, token: int) -> None:
        original(self, token)
        begun.append(len(self._growth.tree))

    monkeypatch.setattr(Speculation, "prefilled", counted)
    for reads in (True, False):
        monkeypatch.setattr(ByChance, "read_prompt", lambda *_, reads=reads: reads)
        for seed in range(12):
            assert subject.run("temperature", "always", seed)[0].same(subject.plain("temperature"))
    assert max(begun[:12]) > 3
    assert begun[12:] == [1] * 12


def test_a_draft_without_guesses(subject: Subject) -> None:
    params = SAMPLINGS["greedy"]

    class Mute(Silent):
        def candidates(
            self, logits: torch.Tensor, positions: Sequence[int], paths: Sequence[Sequence[int]], count: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = len(logits)
            return torch.zeros((rows, count), dtype=torch.int64), torch.full((rows, count), -torch.inf)

    speculator = Speculator(ByChance(0), calibrations({}), CAPACITY)
    passes = subject.passes("greedy", "always", 0)
    found = run_loop(subject.llm.engine, passes, subject.prompt, Mute(params, subject.prompt), speculator)  # type: ignore[arg-type]
    assert found.same(subject.plain("greedy"))
    assert len(found.accepted) > 20, "nothing but guesses from the text itself can have been accepted"


# --- what the tests must be able to notice ------------------------------------------------------------------


def without_shadows(patch: pytest.MonkeyPatch) -> None:
    """A verified node that is drafted in a gap keeps its own slot."""

    def forward(self: Growth, nodes: list[int]) -> Rows:
        self._forwarded.update(nodes)
        return self.tree.draft_rows(nodes)

    patch.setattr(Growth, "forward", forward)


def losing_the_end_of_the_path(patch: pytest.MonkeyPatch) -> None:
    """The keys and values of the accepted path's last node, and the subtree's, stay where they were."""
    original = Growth.continue_from

    def continue_from(self: Growth, walk: object, top: int | None) -> tuple[Growth, list[int]]:
        following, slots = original(self, walk, top)  # type: ignore[arg-type]
        return following, slots[: len(walk.nodes) - 1]  # type: ignore[attr-defined]

    patch.setattr(Growth, "continue_from", continue_from)


def shadows_in_the_tree(patch: pytest.MonkeyPatch) -> None:
    """Shadows lie where nodes lie."""

    def forward(self: Growth, nodes: list[int]) -> Rows:
        self._forwarded.update(nodes)
        for node in nodes:
            if node in self.verified:
                self.tree.shadows[node] = self.tree.base + len(self.tree.shadows)
        return self.tree.draft_rows(nodes)

    patch.setattr(Growth, "forward", forward)


def previews_in_the_tree(patch: pytest.MonkeyPatch) -> None:
    """Previewed rows write where the sweep's do."""
    patch.setattr(DraftTree, "rows_elsewhere", lambda self, nodes, _: self.rows(nodes))


@pytest.mark.parametrize(
    "mutant", [without_shadows, losing_the_end_of_the_path, shadows_in_the_tree, previews_in_the_tree]
)
def test_a_broken_growth_is_noticed(
    subject: Subject, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, noticed = subject.plain("greedy"), 0
    mutant(monkeypatch)
    for seed in range(6):
        try:
            noticed += not subject.run("greedy", "sometimes", seed)[0].same(plain)
        except (AssertionError, KeyError, InexactError):
            noticed += 1
    assert noticed


def test_certainty_is_beyond_noise() -> None:
    """The tempers are as certain as they claim: no Gumbel noise of a text this long reaches that far."""
    assert CERTAIN > 40
