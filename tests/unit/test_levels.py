"""The tree that grows on its device: the host's own one, replayable, readable, and planted again."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import ties_as_on_a_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from subspec.models.decoder import Rows
from subspec.speculation.draft import TreeShape, grow
from subspec.speculation.harvest import Harvest, harvest, seedling
from subspec.speculation.levels import Levels, Shape
from subspec.speculation.noise import gumbel_noise
from subspec.speculation.sampling import CANDIDATES, GREEDY_CANDIDATES, Sampler, SamplingParams
from subspec.speculation.tree import DraftTree

pytestmark = pytest.mark.usefixtures("one_thread")
relaxed = settings(deadline=None, max_examples=60)

ROOT, BASE = 1, 7
CPU = torch.device("cpu")
WAYS = {
    "greedy": SamplingParams(),
    "penalty": SamplingParams(repetition_penalty=1.5),
    "drawn": SamplingParams(temperature=0.8, seed=3),
    "filtered": SamplingParams(
        temperature=0.8, top_k=5, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=4
    ),
}


class Drafter:
    """Logits that depend on the tokens and positions that a row sees: whatever its slots hold.

    Args:
        style: "random"; "sure" of one token; "tied" often; "broken": rows of −∞, and such with NaN.
    """

    def __init__(self, style: str, vocabulary: int, seed: int = 0) -> None:
        self._style, self._vocabulary, self._seed = style, vocabulary, seed
        self.cache: dict[int, tuple[int, int]] = {}  # by slot: token and position

    def __call__(self, rows: Rows) -> torch.Tensor:
        """Write the rows' entries, then see: (T, V)."""
        places = zip(rows.slots.tolist(), rows.tokens.tolist(), rows.positions.tolist(), strict=True)
        for slot, token, position in places:
            self.cache[slot] = token, position
        seen = [
            (prefix, *(self.cache[slot] for slot in path[:length]))
            for prefix, path, length in zip(
                rows.prefix.tolist(), rows.paths.tolist(), rows.path_lens.tolist(), strict=True
            )
        ]
        return torch.stack([self._row(hash((self._seed, *one)) % (1 << 40)) for one in seen])

    def _row(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        row = 2 * torch.randn(self._vocabulary, generator=generator)
        if self._style == "sure":
            row[seed % self._vocabulary] = 30
        elif self._style == "tied":
            row = torch.randint(2, (self._vocabulary,), generator=generator).float()
        elif self._style == "broken":
            if seed % 3 == 0:
                row[torch.rand(self._vocabulary, generator=generator) < 0.7] = -math.inf
            elif seed % 7 == 0:
                row[seed % self._vocabulary] = math.nan
            elif seed % 11 == 0:
                row.fill_(-math.inf)
        return row


def candidates_of(params: SamplingParams, vocabulary: int) -> int:
    """K as the host's tree has it."""
    return min(CANDIDATES if params.samples else GREEDY_CANDIDATES, vocabulary)


def levels_for(shape: Shape, params: SamplingParams, device: torch.device = CPU) -> Levels:
    """State that knows the noise, what was seen, and a calibration that changes nothing."""
    levels = Levels(shape, device)
    levels.seen[torch.tensor([ROOT, 0], device=device)] = True
    levels.calibration.copy_(torch.tensor([1.0, 0.0]))
    for position in range(BASE, BASE + shape.positions):
        levels.noise[position % shape.positions] = gumbel_noise(params.seed, position, shape.vocabulary)
    return levels


def rows_of(levels: Levels, level: int) -> Rows:
    """The rows of the pass over a level."""
    return levels.first if level == 0 else levels.next


def grown_on_device(levels: Levels, drafter: Drafter, params: SamplingParams, depth: int) -> None:
    """A tree of ``depth`` levels."""
    levels.begin(torch.tensor([ROOT, BASE]))
    for level in range(depth):
        levels.advance(drafter(rows_of(levels, level)), params)


def grown_on_host(drafter: Drafter, params: SamplingParams, depth: int, width: int) -> DraftTree:
    """The same, by ``grow``; of equal logits it takes those that a device takes."""
    tree = DraftTree.rooted(ROOT, BASE)
    with ties_as_on_a_device():
        grow(tree, drafter, Sampler(params, [ROOT, 0]), TreeShape(depth, width, 1))
    return tree


def read(levels: Levels, depth: int, verified: int = 1) -> Harvest:
    """What the host learns after ``depth`` levels."""
    levels.select(verified)
    levels.summarize(torch.arange(verified))
    return harvest(levels.summary, levels.shape, BASE, depth, verified)


def nodes_of(tree: DraftTree) -> list[tuple[int, int, int]]:
    return list(zip(tree.tokens, tree.parents, tree.depths, strict=True))


# --- growing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@relaxed
@given(
    style=st.sampled_from(["random", "sure", "tied", "broken"]),
    vocabulary=st.integers(2, 14),
    width=st.integers(1, 6),
    depth=st.integers(1, 5),
    seed=st.integers(0, 1000),
    count=st.integers(1, 30),
)
def test_the_device_grows_and_chooses_what_the_host_would(
    way: str, style: str, vocabulary: int, width: int, depth: int, seed: int, count: int
) -> None:
    params = WAYS[way]
    depth = min(depth, 2) if style == "tied" else depth  # sums of two round alike in fp32 and fp64
    count = min(count, 1 + depth * width)
    shape = Shape(depth, width, count, candidates_of(params, vocabulary), vocabulary)
    levels = levels_for(shape, params)
    grown_on_device(levels, Drafter(style, vocabulary, seed), params, depth)
    found = read(levels, depth, count)
    host = Drafter(style, vocabulary, seed)
    tree = grown_on_host(host, params, depth, width)
    assert nodes_of(found.tree) == nodes_of(tree)
    assert found.tree.scores == pytest.approx(tree.scores, abs=1e-4)
    best = tree.best(count)
    assert sorted(set(found.verified)) == found.verified[count - len(best) :] == best
    assert found.targets == list(range(count))
    again = Drafter(style, vocabulary, seed)
    expected = again(tree.rows(list(range(len(tree)))))  # every node's own logits
    target = Drafter(style, vocabulary, seed)
    sweep = target(levels.verify.chunk(0, count))
    torch.testing.assert_close(sweep, expected[found.verified], equal_nan=True)
    assert set(target.cache) == {BASE + found.places[node] for node in best}


def test_deep_ties_go_to_the_older_parent() -> None:
    """All guesses of a level are equally likely: its nodes are the first row's children."""
    shape = Shape(4, 3, 1, 8, 8)
    levels = levels_for(shape, WAYS["greedy"])
    levels.begin(torch.tensor([ROOT, BASE]))
    for level in range(4):
        levels.advance(torch.zeros(len(rows_of(levels, level)), 8), WAYS["greedy"])
    assert read(levels, 4).tree.parents == [-1, 0, 0, 0, 1, 1, 1, 4, 4, 4, 7, 7, 7]


def test_scores_are_calibrated_probabilities_and_reach_is_the_newest_levels() -> None:
    shape = Shape(2, 3, 1, 3, 5)
    levels = levels_for(shape, WAYS["greedy"])
    levels.calibration.copy_(torch.tensor([0.5, math.log1p(-0.1)]))
    levels.begin(torch.tensor([ROOT, BASE]))
    logits = torch.tensor([[0.0, 2.0, 1.5, -1.0, 1.0]])
    levels.advance(logits, WAYS["greedy"])
    expected = 0.9 * torch.softmax(torch.tensor([2.0, 1.5, 1.0]) / 0.5, 0)
    torch.testing.assert_close(levels.reach, expected)
    scores = read(levels, 1).tree.scores
    assert [math.exp(score) for score in scores] == pytest.approx([1.0, *expected.tolist()])
    levels.advance(torch.full((3, 5), -math.inf), WAYS["greedy"])
    assert levels.reach.tolist() == [0, 0, 0]
    assert len(read(levels, 2).tree) == 4


def test_the_host_reads_what_each_forwarded_row_guessed() -> None:
    params, shape = WAYS["drawn"], Shape(3, 4, 1, 6, 12)
    levels, drafter = levels_for(shape, params), Drafter("random", 12)
    grown_on_device(levels, drafter, params, 3)
    found = read(levels, 3)
    inner = [node for node, depth in enumerate(found.tree.depths) if depth < 3]
    assert list(found.guesses) == inner
    logits = Drafter("random", 12)(found.tree.rows(inner))
    positions = [BASE + found.tree.depths[node] + 1 for node in inner]
    tokens, scores = Sampler(params, []).candidates(logits, positions, [[] for _ in inner], 6)
    assert [found.guesses[node].tokens for node in inner] == tokens.tolist()
    torch.testing.assert_close(torch.stack([found.guesses[node].scores for node in inner]), scores)


# --- in a sweep's gaps, and afterwards ----------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_a_sweep_writes_meanwhile_changes_no_shadowed_level(before: int) -> None:
    params, shape = WAYS["greedy"], Shape(5, 3, 16, 8, 10)
    undisturbed = levels_for(shape, params)
    grown_on_device(undisturbed, Drafter("random", 10), params, 5)
    levels, drafter = levels_for(shape, params), Drafter("random", 10)
    grown_on_device(levels, drafter, params, before)
    levels.shadow(before)
    newest = [0] if before == 0 else [1 + (before - 1) * 3 + i for i in range(3)]
    for level in range(before, 5):
        logits = drafter(rows_of(levels, level))
        if level == before:
            for node in newest:
                assert BASE + node not in drafter.cache  # its own slot is the sweep's
                drafter.cache[BASE + node] = (-1, -1)
            assert max(drafter.cache) == BASE + shape.nodes + len(newest) - 1 < BASE + shape.slots
        levels.advance(logits, params)
    assert nodes_of(read(levels, 5).tree) == nodes_of(read(undisturbed, 5).tree)
    sweep = levels.verify
    levels.select(16)
    assert sorted(sweep.slots.tolist()) == [
        BASE + i for i in range(16)
    ]  # exact entries, in slots of their own


@relaxed
@given(
    style=st.sampled_from(["random", "sure", "broken"]),
    width=st.integers(1, 5),
    depth=st.integers(1, 5),
    seed=st.integers(0, 1000),
    rng=st.randoms(use_true_random=False),
)
def test_a_planted_tree_is_the_subtree_and_grows_on(
    style: str, width: int, depth: int, seed: int, rng: random.Random
) -> None:
    params, vocabulary = WAYS["drawn"], 9
    shape = Shape(depth, width, 1, 6, vocabulary)
    levels, drafter = levels_for(shape, params), Drafter(style, vocabulary, seed)
    grown_on_device(levels, drafter, params, depth)
    old = read(levels, depth)
    top = rng.randrange(len(old.tree))
    base = BASE + old.tree.depths[top]
    plant = seedling(old, top, shape, base)
    below = old.tree.below(top)
    if plant is None:
        assert below == [top]
        return
    assert plant.nodes == below
    expected = old.tree.rerooted(below, base)
    moved = [drafter.cache.get(BASE + old.places[node]) for node in below]  # the newest level has none
    drafter.cache = {
        base + place: entry for place, entry in zip(plant.places, moved, strict=True) if entry is not None
    }
    garbage = levels_for(shape, params)  # whatever another tree left behind
    grown_on_device(garbage, Drafter("random", vocabulary, seed + 1), params, depth)
    garbage.plant(plant.packed)
    garbage.select(1)
    garbage.summarize(None)
    found = harvest(garbage.summary, shape, base, plant.levels, 1)
    assert nodes_of(found.tree) == nodes_of(expected)
    assert found.tree.scores == pytest.approx(expected.scores, abs=1e-5)
    assert found.places == plant.places
    for node, guess in found.guesses.items():
        assert guess.tokens == old.guesses[below[node]].tokens
        torch.testing.assert_close(guess.scores, old.guesses[below[node]].scores, equal_nan=True)
    last = [node for node, level in enumerate(expected.depths) if level == plant.levels]
    again = Drafter(style, vocabulary, seed)
    every = again(expected.rows(list(range(len(expected)))))
    for position in range(base, base + shape.positions):
        garbage.noise[position % shape.positions] = gumbel_noise(params.seed, position, vocabulary)
    torch.testing.assert_close(
        drafter(garbage.next)[: len(last)], every[last], equal_nan=True, rtol=0, atol=0
    )
    if plant.levels < depth:
        garbage.advance(drafter(garbage.next), params)
        garbage.summarize(None)
        more = harvest(garbage.summary, shape, base, plant.levels + 1, 1)
        assert nodes_of(more.tree)[: len(expected)] == nodes_of(expected)
        assert set(more.tree.parents[len(expected) :]) <= set(last)


# --- without the host ---------------------------------------------------------------------------------------


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation, to be run once more on the same memory: what a graph's capture does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        """Run them in order; what one of them made is made anew, all else is the memory of then."""
        made: dict[int, torch.Tensor] = {}

        def now(value: torch.Tensor) -> torch.Tensor:
            return made.get(id(value), value)

        for func, args, kwargs, then in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            outputs: list[torch.Tensor] = []
            tree_map_only(torch.Tensor, outputs.append, func(*args, **kwargs))
            olds: list[torch.Tensor] = []
            tree_map_only(torch.Tensor, olds.append, then)
            made.update({id(old): new for old, new in zip(olds, outputs, strict=True)})


def recorded(work: Callable[[], object]) -> Recording:
    recording = Recording()
    with recording:
        work()
    return recording


def state(levels: Levels) -> dict[str, torch.Tensor]:
    """All memory of the state."""
    found = {name: value for name, value in vars(levels).items() if isinstance(value, torch.Tensor)}
    for name in ("first", "next", "verify"):
        found |= {f"{name}.{part}": value for part, value in vars(getattr(levels, name)).items()}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_one_recorded_level_replayed_grows_every_level(way: str) -> None:
    params, shape = WAYS[way], Shape(6, 4, 12, 8, 20)
    eager = levels_for(shape, params)
    grown_on_device(eager, Drafter("random", 20), params, 6)
    levels = levels_for(shape, params)
    addresses = {name: value.data_ptr() for name, value in state(levels).items()}
    first, later = torch.zeros(1, 20), torch.zeros(4, 20)
    seed = torch.tensor([5, 3])  # of another tree, at another base
    begin = recorded(lambda: levels.begin(seed))
    root = recorded(lambda: levels.advance(first, params))
    level = recorded(lambda: levels.advance(later, params))
    select = recorded(lambda: levels.select(12))
    summarize = recorded(lambda: levels.summarize(None))
    drafter = Drafter("random", 20)
    seed.copy_(torch.tensor([ROOT, BASE]))
    begin.replay()
    first.copy_(drafter(levels.first))
    root.replay()
    for _ in range(5):
        later.copy_(drafter(levels.next))
        level.replay()
    select.replay()
    summarize.replay()
    found, expected = harvest(levels.summary, shape, BASE, 6, 12), read(eager, 6, 12)
    assert nodes_of(found.tree) == nodes_of(expected.tree)
    assert found.tree.scores == expected.tree.scores
    assert found.verified == expected.verified
    assert addresses == {name: value.data_ptr() for name, value in state(levels).items()}


def test_a_replay_would_show_what_the_host_had_baked_in() -> None:
    memory, count = torch.zeros(4), torch.zeros(1, dtype=torch.int64)
    recording = recorded(lambda: memory[int(count)].fill_(1.0))
    count += 2
    recording.replay()
    assert memory.tolist() == [1, 0, 0, 0]  # not [1, 0, 1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_reads_a_value_or_mixes_devices(way: str) -> None:
    """The meta device has no values to read or to make shapes of, and refuses the CPU's tensors."""
    params, meta = WAYS[way], torch.device("meta")
    shape = Shape(3, 4, 9, 8, 20)
    levels = Levels(shape, meta)
    levels.begin(torch.zeros(2, dtype=torch.int64, device=meta))
    levels.shadow(0)
    levels.advance(torch.zeros(1, 20, device=meta, dtype=torch.bfloat16), params)
    levels.advance(torch.zeros(4, 20, device=meta, dtype=torch.bfloat16), params)
    levels.shadow(2)
    levels.select(9)
    levels.summarize(torch.zeros(9, dtype=torch.int64, device=meta))
    tree = Harvest(DraftTree.rooted(ROOT, BASE), [0], [0], [0], {})
    tree.tree.add(2, 0, -1.0)
    tree.places.append(1)
    plant = seedling(tree, 0, shape, BASE)
    assert plant is not None
    levels.plant(plant.packed.to(meta))
    with pytest.raises((RuntimeError, NotImplementedError)):
        levels.reach.tolist()
