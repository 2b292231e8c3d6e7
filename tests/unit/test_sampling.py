"""The filters are those of ``transformers``, and speculative texts are draws from the exact distribution."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest  # type: ignore[import-untyped]
from tiny import write_tiny
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from subspec import LLM, SamplingParams
from subspec.engine import Engine
from subspec.errors import OptionError
from subspec.kernels.choice import greatest
from subspec.models.decoder import prefix_rows
from subspec.speculation.decode import decode
from subspec.speculation.draft import TreeShape
from subspec.speculation.noise import gumbel_noise
from subspec.speculation.sampling import NOISY_POSITIONS, NUCLEUS_GUESS, Sampler, keep, penalized, rank

pytestmark = pytest.mark.usefixtures("one_thread")

FILTERS = {
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=0.9, top_k=7),
    "top-p": SamplingParams(temperature=0.9, top_p=0.8),
    "min-p": SamplingParams(temperature=0.9, min_p=0.06),
    "penalty": SamplingParams(temperature=0.9, repetition_penalty=1.6),
    "all": SamplingParams(temperature=0.8, top_k=16, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
}


def theirs(params: SamplingParams) -> Any:
    """The same filters under ``transformers``, in its order."""
    found = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found.append(TemperatureLogitsWarper(params.divisor))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    return found


def with_seed(params: SamplingParams, seed: int, **changes: int) -> SamplingParams:
    return SamplingParams(**(vars(params) | {"seed": seed} | changes))


# --- filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [50, 3 * NUCLEUS_GUESS])
@pytest.mark.parametrize(
    "spread", [0.3, 4.0]
)  # nearly flat: the nucleus is larger than what is looked at first
@pytest.mark.parametrize("name", FILTERS)
def test_the_same_tokens_are_kept_with_the_same_logits(name: str, spread: float, vocabulary: int) -> None:
    params, generator = FILTERS[name], torch.Generator().manual_seed(3)
    for trial in range(10):
        logits = spread * torch.randn(vocabulary, generator=generator)
        context = torch.randint(vocabulary, (12,), generator=generator).tolist()
        sampler = Sampler(with_seed(params, trial), context[:5])
        sampler.observe(context[5:9], 9)
        expected = theirs(params)(torch.tensor([context]), logits[None])[0]
        row = sampler._penalized(logits, context[9:]) / params.divisor
        values, tokens = keep(row, params)
        tokens = torch.arange(vocabulary) if tokens is None else tokens
        assert len(set(tokens.tolist())) == len(tokens)
        assert sorted(tokens.tolist()) == expected.isfinite().nonzero()[:, 0].tolist()
        torch.testing.assert_close(values, expected[tokens])
        drawn = sampler.choose(logits, 12, context[9:])
        assert drawn == int((expected + gumbel_noise(trial, 12, vocabulary)).argmax())


def test_one_token_always_stays() -> None:
    logits = torch.tensor([0.1, 0.2, 5.0, 0.3])
    for params in (
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0),
    ):
        values, tokens = keep(logits, params)
        assert tokens is not None
        assert (values.tolist(), tokens.tolist()) == ([5.0], [2])


def test_filters_that_keep_everything() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert keep(logits, SamplingParams(temperature=1.0, top_k=9))[1] is None
    _, tokens = keep(logits, SamplingParams(temperature=1.0, min_p=1e-9))
    assert tokens is not None
    assert tokens.tolist() == list(range(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_greedy_choice_is_the_penalized_maximum(dtype: torch.dtype) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(dtype)
    best = int(logits.argmax())
    assert Sampler(SamplingParams(), [best]).choose(logits, 5) == best
    params = SamplingParams(repetition_penalty=50.0)
    expected = theirs(params)(torch.tensor([[best, 7]]), logits.float()[None]).argmax()
    assert Sampler(params, [7]).choose(logits, 5, [best]) == int(expected) != best


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"max_new_tokens": 0},
        {"stop": "text"},
        {"stop": ("",)},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": False, "temperature": 0.5},
    ],
    ids=str,
)
def test_impossible_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=list(wrong)[-1]):
        SamplingParams(**wrong)  # type: ignore[arg-type]


# --- noise --------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_position_alone() -> None:
    logits, places = torch.zeros(100), list(range(40))
    params = SamplingParams(temperature=1.0, seed=8)
    in_order = [Sampler(params, []).choose(logits, place) for place in places]
    shuffled = random.Random(0).sample(places, len(places))
    one = Sampler(params, [4, 5])
    found = {}
    for place in shuffled:
        one.guess(torch.zeros(3, 100), random.Random(place).choice(places), [[], [1], [2]], 4)
        found[place] = one.choose(logits, place)
        one.observe([place], place // 2)
    assert [found[place] for place in places] == in_order
    assert len(set(in_order)) > 20
    other = Sampler(with_seed(params, 9), [])
    assert [other.choose(logits, place) for place in places] != in_order


def test_a_noise_row_does_not_depend_on_the_vocabulary_behind_it() -> None:
    assert torch.equal(gumbel_noise(3, 7, 50), gumbel_noise(3, 7, 80)[:50])


def test_noise_is_standard_gumbel_and_independent() -> None:
    rows = torch.stack([gumbel_noise(seed, place, 250) for seed in range(20) for place in range(20)]).double()
    assert rows.isfinite().all()
    assert kstest(rows.flatten().numpy(), "gumbel_r").pvalue > 1e-4
    correlation = np.corrcoef(rows.numpy())  # of rows with other seeds or other positions
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.4  # six standard deviations


@pytest.mark.parametrize("temperature", [1e-7, 0.05, 0.8, 3.0, 1e6])
@pytest.mark.parametrize("kind", ["random", "sure", "tied", "masked", "infinite", "no numbers"])
def test_leaving_out_noise_that_cannot_matter_leaves_the_choice(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(7)
    vocabulary, params = 20_000, SamplingParams(temperature=temperature, seed=11)
    for place in range(20):
        logits = 3 * torch.randn(vocabulary, generator=generator)
        if kind == "sure":
            logits[place] = 40.0
        elif kind == "tied":
            logits = logits.round()
        elif kind == "masked":
            logits[logits < 6] = -torch.inf
        elif kind == "infinite":
            logits[[9, 5]] = torch.inf
        elif kind == "no numbers":
            logits[[9, 5]] = torch.nan
        everything = logits / temperature + gumbel_noise(11, place, vocabulary)
        assert Sampler(params, []).choose(logits, place) == int(everything.argmax())


def test_the_token_with_the_largest_noise_may_win_from_far_below() -> None:
    vocabulary, params = 20_000, SamplingParams(temperature=1.0, seed=11)
    for place in range(20):
        noise = gumbel_noise(11, place, vocabulary)
        luckiest = int(noise.argmax())
        logits = torch.full((vocabulary,), -100.0)
        logits[0] = 5.0
        for margin, winner in ((0.01, luckiest), (-0.01, 0)):
            logits[luckiest] = logits[0] + noise[0] - noise[luckiest] + margin
            assert Sampler(params, []).choose(logits, place) == winner


def test_the_draft_ranks_its_guesses_under_the_targets_noise() -> None:
    for seed, rounded in itertools.product(range(5, 25), (False, True)):
        logits = 2 * torch.randn(1, 200, generator=torch.Generator().manual_seed(seed))
        logits = logits.round() if rounded else logits  # then filters end among equals
        for name, params in FILTERS.items():
            sampler = Sampler(with_seed(params, 6), [1, 2, 3], candidates=200)
            tokens, logs = sampler.guess(logits, 9, [[4, 5]], 3)
            assert tokens[0][0] == sampler.choose(logits[0], 9, [4, 5]), (name, seed, rounded)
            assert logs[0] == sorted(logs[0], reverse=True)
            assert sum(np.exp(logs[0])) <= 1 + 1e-5


@pytest.mark.parametrize("name", ["temperature", "all"])
def test_noise_that_was_forgotten_is_the_same_again(name: str) -> None:
    """A preview asks for more positions than are kept: each row is as if it had been asked for alone."""
    params, places = FILTERS[name], [place % 40 for place in range(90)]
    logits = 3 * torch.randn(len(places), 50, generator=torch.Generator().manual_seed(3))
    together = Sampler(params, [1])
    tokens, scores = together.candidates(logits, places, [[2]] * len(places), 5)
    assert len(together._uniform) <= NOISY_POSITIONS
    for row, place in enumerate(places):
        alone = Sampler(params, [1]).candidates(logits[row : row + 1], [place], [[2]], 5)
        assert torch.equal(tokens[row], alone[0][0])
        assert torch.equal(scores[row], alone[1][0])
        assert together.choose(logits[row], place) == Sampler(params, [1]).choose(logits[row], place)


def kept_in_order(values: torch.Tensor, params: SamplingParams) -> list[int]:
    """Which of falling logits (C,) the filters leave; of equal ones, the first."""
    kept = values[: params.top_k] if params.top_k else values
    if params.top_p < 1.0:
        sums = kept.double().softmax(-1).cumsum(-1).tolist()
        kept = kept[: 1 + sum(held < params.top_p for held in sums[:-1])]
    least = values[0] + float(np.log(params.min_p)) if params.min_p else -np.inf
    return [place for place, value in enumerate(kept) if value >= least]


@pytest.mark.parametrize("top", [torch.topk, greatest])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "tied", "silent", "uniform"])
@pytest.mark.parametrize("name", FILTERS)
def test_rows_ranked_together_are_ranked_as_each_alone(
    name: str, kind: str, dtype: torch.dtype, top: Any
) -> None:
    params, generator = FILTERS[name], torch.Generator().manual_seed(2)
    for count, candidates, vocabulary in [(3, 10, 40), (8, 8, 40), (12, 5, 40), (8, 64, 5), (1, 1, 1)]:
        logits = 3 * torch.randn(20, vocabulary, generator=generator)
        noise = torch.stack([gumbel_noise(0, place, vocabulary) for place in range(20)])
        if kind == "tied":
            logits, noise = logits.round(), noise.round()
        elif kind == "silent":
            logits[logits < 2] = -torch.inf
        elif kind == "uniform":
            logits = torch.zeros_like(logits)  # equal shares: their sums end on the filters' edges
        logits = logits.to(dtype)
        tokens, scores = rank(logits, lambda chosen: noise.gather(1, chosen), params, count, candidates, top)  # noqa: B023
        assert tokens.shape == scores.shape == (20, min(count, vocabulary))
        likeliest = top(logits, min(max(candidates, count), vocabulary))
        for row in range(20):
            values, ids = likeliest[0][row].float() / params.divisor, likeliest[1][row]
            kept = kept_in_order(values, params)
            if kind == "random" and dtype is torch.float32:
                assert sorted(values[kept].tolist()) == sorted(keep(values, params)[0].tolist())
            perturbed = values[kept] + noise[row][ids[kept]]
            order = torch.sort(perturbed, descending=True, stable=True).indices[:count]
            known = scores[row] > -torch.inf
            real = perturbed[order] > -torch.inf
            assert tokens[row][known].tolist() == ids[kept][order][real].tolist()
            assert scores[row][known].tolist() == perturbed[order][real].tolist()


def test_the_penalty_of_many_rows_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, params = torch.randn(6, 30, generator=generator), FILTERS["penalty"]
    paths = [torch.randint(30, (length,), generator=generator).tolist() for length in range(6)]
    sampler, seen = Sampler(params, [3, 4]), torch.zeros(6, 30, dtype=torch.bool)
    for row, path in enumerate(paths):
        seen[row, [3, 4, *path]] = True
    expected = [sampler._penalized(row, path) for row, path in zip(logits, paths, strict=True)]
    assert torch.equal(penalized(logits, seen, params.repetition_penalty), torch.stack(expected))
    assert penalized(logits, seen, 1.0) is logits


# --- draws of the speculative mode --------------------------------------------------------------------------

VOCABULARY = 32
PROMPT = [3, 17, 9, 28, 11, 3]
DRAWS = 1600
SHAPE = TreeShape(depth=2, width=2, nodes=4)


@dataclass(frozen=True)
class Target:
    """A tiny model, with its exact logits for every text of up to two tokens after the prompt.

    Attributes:
        engine: the model; its cache holds the prompt.
        first: (V,) logits after the prompt.
        second: (V, V) after one more token; ``third``: (V, V, V) after two.
    """

    engine: Engine
    first: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor

    def distribution(self, params: SamplingParams) -> np.ndarray:
        """Exact probabilities (V, V, V) of the three tokens after the prompt."""
        contexts = torch.tensor([[*PROMPT, a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)])
        filters, place = theirs(params), len(PROMPT)
        one = filters(contexts[:1, :place], self.first[None]).double().softmax(-1)[0]
        two = filters(contexts[::VOCABULARY, : place + 1], self.second).double().softmax(-1)
        three = filters(contexts, self.third.view(-1, VOCABULARY)).double().softmax(-1).view(self.third.shape)
        joint: np.ndarray = (one[:, None, None] * two[:, :, None] * three).numpy()
        return joint


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    place = tmp_path_factory.mktemp("sampling")
    directory = write_tiny(place / "model", "qwen2", vocab_size=VOCABULARY, num_hidden_layers=1, seed=4)
    with LLM(
        directory, "64MiB", store=place / "store", context=32, depth=SHAPE.depth, width=SHAPE.width
    ) as llm:
        engine = llm.engine
        first = engine.target(prefix_rows(PROMPT, 0), last_only=True)[0]
        second, third = torch.empty(VOCABULARY, VOCABULARY), torch.empty(VOCABULARY, VOCABULARY, VOCABULARY)
        for a in range(VOCABULARY):
            for b in range(VOCABULARY):
                second[a], third[a, b] = engine.target(prefix_rows([a, b], len(PROMPT)), last_only=False)
        yield Target(engine, first / 2, second / 2, third / 2)


class Softened(Sampler):
    """Halves all logits: a tiny model's are so far apart that one token would take nearly everything."""

    def choose(self, logits: torch.Tensor, position: int, path=()) -> int:  # type: ignore[no-untyped-def]
        return super().choose(logits / 2, position, path)


def draw(target: Target, params: SamplingParams, draws: int = DRAWS) -> tuple[np.ndarray, Counter[int]]:
    """Counts (V, V, V) of the first three tokens over seeds, and how often each accepted length occurred."""
    counts, accepted = np.zeros((VOCABULARY,) * 3, dtype=np.int64), Counter[int]()
    for seed in range(draws):
        sampler = Softened(with_seed(params, seed), PROMPT)
        steps = decode(target.engine, PROMPT, len(PROMPT) - 1, sampler, SHAPE, 2 + SHAPE.depth)
        tokens = next(steps).tokens
        while len(tokens) < 3:
            committed = next(steps).tokens
            accepted[len(committed) - 1] += len(tokens) == 1  # the first step has room for every length
            tokens = tokens + committed
        counts[tuple(tokens[:3])] += 1
    return counts, accepted


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square over cells; those that expect few draws are put together, neighbours with neighbours."""
    assert not counts[probabilities == 0].any(), "a token was drawn that the filters drop"
    expected, found = probabilities.flatten() * counts.sum(), counts.flatten()
    rare = expected < 8
    group = (expected[rare].cumsum() / 16).astype(int)
    group = np.minimum(
        group, max(int(expected[rare].sum() / 16) - 1, 0)
    )  # the last one has as much as the others
    wanted = [*expected[~rare], *np.bincount(group, expected[rare])]
    drawn = [*found[~rare], *np.bincount(group, found[rare])]
    if wanted[-1] < 8:  # all rare ones together are too few
        wanted[-2:], drawn[-2:] = [sum(wanted[-2:])], [sum(drawn[-2:])]
    assert len(wanted) >= 4
    return float(chisquare(drawn, wanted, sum_check=False).pvalue)


def p_values(counts: np.ndarray, exact: np.ndarray) -> list[float]:
    """Of each of the three tokens by itself, of neighbours, and of all three together."""
    sums = [(1, 2), (0, 2), (0, 1), (2,), (0,), ()]
    return [p_value(counts.sum(axis), exact.sum(axis)) for axis in sums]


@pytest.mark.parametrize("name", FILTERS)
def test_speculative_draws_follow_the_targets_distribution(target: Target, name: str) -> None:
    counts, accepted = draw(target, FILTERS[name])
    assert min(p_values(counts, target.distribution(FILTERS[name]))) > 1e-4
    assert sum(accepted.values()) == DRAWS
    assert min(accepted[length] for length in range(SHAPE.depth + 1)) > DRAWS / 20, accepted


def test_a_wrong_distribution_would_be_rejected(target: Target) -> None:
    counts, _ = draw(target, FILTERS["temperature"])
    for wrong in (SamplingParams(temperature=0.95), SamplingParams(temperature=0.7, repetition_penalty=1.4)):
        assert max(p_values(counts, target.distribution(wrong))[3:]) < 1e-4
    shared = target.distribution(FILTERS["temperature"])
    swapped = shared.sum(2).T[:, :, None] * np.ones(VOCABULARY) / VOCABULARY
    assert p_value(counts.sum(2), swapped.sum(2)) < 1e-6
