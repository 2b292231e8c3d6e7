"""The decoding loop on a toy model whose cache is a list: same text as token by token, and a true cache."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from subspec.models.decoder import Rows
from subspec.speculation.decode import Commit, decode
from subspec.speculation.draft import TreeShape
from subspec.speculation.sampling import Sampler, SamplingParams

VOCABULARY = 11
PROMPT = [4, 9, 1]
AGREEMENT = {"always": 1.0, "mostly": 0.8, "never": 0.0}
SHAPES = [None, TreeShape(1, 1, 2), TreeShape(4, 1, 5), TreeShape(3, 3, 6), TreeShape(6, 2, 13)]
SAMPLING = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(temperature=1.0, seed=7),
    "filtered": SamplingParams(temperature=0.7, top_k=6, top_p=0.9, repetition_penalty=1.3, seed=3),
    "penalized": SamplingParams(repetition_penalty=1.5),
}


@dataclass(frozen=True)
class Entry:
    """What a cache slot holds: a token at a position, written by a sweep (exact) or by the draft."""

    token: int
    position: int
    exact: bool


class ToyModel:
    """Logits are a fixed random function of the whole context, read out of the cache.

    A row's context is what its prefix and path slots hold, so a wrong slot, move or path changes the text.
    """

    def __init__(self, agreement: float, slots: int) -> None:
        self.slots: list[Entry | None] = [None] * slots
        self.sweeps: list[int] = []  # rows of each
        self.drafted_positions: list[int] = []
        self._agreement = agreement

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        self.sweeps.append(len(rows))
        contexts = self._contexts(rows, exact=True)
        return torch.stack([truth(context) for context in (contexts[-1:] if last_only else contexts)])

    def draft(self, rows: Rows) -> torch.Tensor:
        self.drafted_positions += rows.positions.tolist()
        return torch.stack([self._guess(context) for context in self._contexts(rows, exact=False)])

    def move(self, sources: list[int], start: int) -> None:
        moved = [self.slots[source] for source in sources]
        self.slots[start : start + len(moved)] = moved

    def _guess(self, context: list[int]) -> torch.Tensor:
        """The target's logits, or, with the rest of the probability, their negative."""
        agrees = hash((7, *context)) % 1000 < 1000 * self._agreement  # of integers: the same in every run
        return truth(context) if agrees else -truth(context)

    def _contexts(self, rows: Rows, *, exact: bool) -> list[list[int]]:
        """Write the rows' entries, then read what each row sees, which must be one position after another."""
        for token, slot, position in zip(
            rows.tokens.tolist(), rows.slots.tolist(), rows.positions.tolist(), strict=True
        ):
            self.slots[slot] = Entry(token, position, exact)
        contexts = []
        for row in range(len(rows)):
            seen = list(range(int(rows.prefix[row])))
            seen += rows.paths[row, : int(rows.path_lens[row])].tolist()
            entries = [self.slots[slot] for slot in seen]
            found = [entry for entry in entries if entry is not None]
            assert [entry.position for entry in found] == list(range(len(seen))), "a gap in the context"
            assert seen[-1] == int(rows.slots[row])
            if exact:
                assert all(entry.exact for entry in found), "a sweep saw a draft's keys"
            contexts.append([entry.token for entry in found])
        return contexts


def truth(context: Sequence[int]) -> torch.Tensor:
    """The toy target: logits (V,) of the token after ``context``."""
    return _truth(tuple(context)).clone()


@cache
def _truth(context: tuple[int, ...]) -> torch.Tensor:
    rng = random.Random(hash(context))
    return torch.tensor([rng.gauss(0, 2) for _ in range(VOCABULARY)])


def token_by_token(prompt: list[int], params: SamplingParams, count: int) -> list[int]:
    """The text by definition."""
    text = list(prompt)
    for position in range(len(prompt), len(prompt) + count):
        text.append(Sampler(params, text).choose(truth(text), position))
    return text[len(prompt) :]


def run(
    model: ToyModel, shape: TreeShape | None, params: SamplingParams, count: int, cached: int = 0
) -> Iterator[Commit]:
    return decode(model, PROMPT, cached, Sampler(params, PROMPT), shape, count)


def check_cache(model: ToyModel, text: list[int]) -> None:
    """Prompt and committed tokens but the last lie in order, exact."""
    assert model.slots[: len(text) - 1] == [Entry(token, i, True) for i, token in enumerate(text[:-1])]


def slots_needed(shape: TreeShape | None, count: int) -> int:
    return len(PROMPT) + count + 1 + (shape.depth * shape.width if shape else 0)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("agreement", AGREEMENT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_text_is_that_of_one_token_at_a_time(
    shape: TreeShape | None, agreement: str, sampling: str
) -> None:
    count, params = 30, SAMPLING[sampling]
    model = ToyModel(AGREEMENT[agreement], slots_needed(shape, count))
    text = list(PROMPT)
    for number, commit in enumerate(run(model, shape, params, count)):
        assert commit.prefill == (number == 0)
        assert commit.tokens
        text += commit.tokens
        check_cache(model, text)
        if shape is not None:
            assert commit.verified <= shape.nodes
            assert commit.drafted <= shape.drafted
            assert len(commit.tokens) <= shape.depth + 1
    assert text[len(PROMPT) :] == token_by_token(PROMPT, params, count)
    assert model.sweeps[0] == len(PROMPT)
    if shape is None:
        assert model.sweeps[1:] == [1] * (count - 1)


def test_a_draft_that_always_agrees_saves_sweeps_and_one_that_never_does_costs_none() -> None:
    count, shape = 41, TreeShape(4, 1, 5)
    sweeps = {}
    for name, agreement in AGREEMENT.items():
        model = ToyModel(agreement, slots_needed(shape, count))
        list(run(model, shape, SamplingParams(), count))
        sweeps[name] = len(model.sweeps)
    assert sweeps["always"] == 1 + 40 // 5
    assert sweeps["always"] < sweeps["mostly"] < sweeps["never"] <= count


@pytest.mark.parametrize("agreement", AGREEMENT)
@pytest.mark.parametrize("count", range(1, 14))
def test_no_token_too_many_is_made_or_drafted(count: int, agreement: str) -> None:
    shape = TreeShape(5, 2, 11)
    model = ToyModel(AGREEMENT[agreement], slots_needed(shape, count))
    tokens = [token for commit in run(model, shape, SamplingParams(), count) for token in commit.tokens]
    assert tokens == token_by_token(PROMPT, SamplingParams(), count)
    last = len(PROMPT) + count - 1
    assert all(position < last - 1 for position in model.drafted_positions), "drafted what cannot be used"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("commits", range(1, 6))
def test_an_abandoned_text_leaves_a_cache_that_the_next_one_can_use(
    shape: TreeShape | None, commits: int
) -> None:
    model = ToyModel(0.8, slots_needed(shape, 60))
    texts, text = run(model, shape, SamplingParams(), 40), list(PROMPT)
    for _ in range(commits):
        text += next(texts).tokens
    texts.close()  # type: ignore[attr-defined]
    check_cache(model, text)
    longer = [*text, 5]
    rest = decode(model, longer, len(text) - 1, Sampler(SamplingParams(), longer), shape, 12)
    tokens = [token for commit in rest for token in commit.tokens]
    assert tokens == token_by_token(longer, SamplingParams(), 12)


@pytest.mark.parametrize("cached", range(len(PROMPT)))
def test_a_cached_prefix_is_not_computed_again(cached: int) -> None:
    model = ToyModel(0.8, slots_needed(SHAPES[3], 10))
    model.slots[:cached] = [Entry(token, i, True) for i, token in enumerate(PROMPT[:cached])]
    tokens = [
        token for commit in run(model, SHAPES[3], SamplingParams(), 10, cached) for token in commit.tokens
    ]
    assert model.sweeps[0] == len(PROMPT) - cached
    assert tokens == token_by_token(PROMPT, SamplingParams(), 10)


# The toy must be able to notice


class MovesNothing(ToyModel):
    def move(self, sources: list[int], start: int) -> None:
        pass


class MovesOneByOne(ToyModel):
    """Copies slot after slot, from the last one on, so that overlapping moves read what they have written."""

    def move(self, sources: list[int], start: int) -> None:
        for i in reversed(range(len(sources))):
            self.slots[start + i] = self.slots[sources[i]]


class ReadsTheDraft(ToyModel):
    """A sweep that does not write its rows."""

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        before = list(self.slots)
        logits = super().target(rows, last_only=last_only)
        self.slots = before if len(self.sweeps) > 1 else self.slots
        return logits


@pytest.mark.parametrize("kind", [MovesNothing, MovesOneByOne, ReadsTheDraft])
def test_a_broken_cache_is_noticed(kind: type[ToyModel]) -> None:
    count, noticed = 60, 0
    for shape in (TreeShape(3, 3, 6), TreeShape(5, 3, 12)):
        model, text = kind(0.6, slots_needed(shape, count)), list(PROMPT)
        try:
            for commit in run(model, shape, SamplingParams(), count):
                text += commit.tokens
                check_cache(model, text)
            assert text[len(PROMPT) :] == token_by_token(PROMPT, SamplingParams(), count)
        except AssertionError:
            noticed += 1
    assert noticed
