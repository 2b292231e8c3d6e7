"""A drafter behind a device: it stands where the engine stands in the steps of ``Ahead``.

Sweeps and commits are the engine's, guesses its own, as ``drafters`` has them; gaps come where chance says.
It knows of every entry of the cache which text it was written for, by a sweep or by a draft, and asserts what
tokens cannot show: that a pass attends to the entries of its own paths alone, a sweep to exact ones alone,
and that of an entry which is there twice, the exact one is kept.
"""

import random
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from drafters import Run, Temper, _run

from subspec.engine import Counters, Engine
from subspec.engine.host_view import HostView
from subspec.memory.schedule import Gap, Step
from subspec.models.decoder import Rows
from subspec.speculation.ahead import Ahead
from subspec.speculation.levels import EMPTY
from subspec.speculation.noise import gumbel_noise
from subspec.speculation.sampling import Sampler, SamplingParams


@contextmanager
def gaps_by_chance(engine: Engine, seed: int) -> Iterator[list[int]]:
    """Before each step of a sweep, some pieces of drafting; yields how many pieces there were in each gap."""
    schedule, chance, filled = engine.schedule, random.Random(seed), []
    sweep, launch = schedule.sweep, schedule._launch
    busy: list[Gap] = []

    def sweep_with_gaps(steps: Iterable[Step], gap: Gap | None = None) -> None:
        busy[:] = [] if gap is None else [gap]
        sweep(steps, None)

    def launch_after_a_gap(step: Step, slot: torch.Tensor | None) -> None:
        wanted = chance.choice((0, 0, 1, 2, 5, 9)) if busy else 0
        filled.append(sum(1 for _ in range(wanted) if busy[0]()))
        launch(step, slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "sweep", sweep_with_gaps)
        patch.setattr(schedule, "_launch", launch_after_a_gap)
        yield filled


class Texts:
    """Numbers for texts: 0 is the empty one, each other one a text and a token."""

    def __init__(self, seed: int) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self.before = [-1]  # of each text, the one without its last token
        self.keys = [zlib.crc32(str(seed).encode())]  # a random number for each

    def longer(self, text: int, token: int) -> int:
        """A text and a token."""
        if (text, token) not in self._numbers:
            self._numbers[text, token] = len(self.before)
            self.before.append(text)
            self.keys.append(zlib.crc32(str(token).encode(), self.keys[text]))
        return self._numbers[text, token]


@dataclass(frozen=True)
class Entry:
    """What a slot was written for: a text's last token; by a sweep, or by a draft."""

    text: int
    exact: bool


class DeviceDrafter:
    """An engine behind a device whose drafts come from elsewhere.

    Args:
        engine: sweeps and commits.
        ahead: whose steps it stands in.
        text: the prompt and the tokens that plain decoding gave.
        temper: (random logits (V,), the text's next token or None off its path, a number) → logits (V,).
        params: what tokens are chosen with.
        seed: of the random logits and numbers.

    Attributes:
        passes: of each sweep, draft passes begun since the last one, those in its gaps left out.
    """

    def __init__(
        self,
        engine: Engine,
        ahead: Ahead,
        text: Sequence[int],
        temper: Temper,
        params: SamplingParams,
        seed: int,
    ) -> None:
        self._engine, self._levels, self._temper, self._params = engine, ahead.levels, temper, params
        self.exchange = engine.exchange
        self._captured: dict[object, tuple[Rows, Callable[[torch.Tensor], object]]] = {}
        self._texts = Texts(seed)
        self._right: dict[int, int] = {}
        self._entries: dict[int, Entry] = {}
        self._swept: set[int] = set()
        self.passes: list[int] = []
        self._begun, self._text = 0, list(text)
        known = 0
        for token in text:
            self._right[known] = token
            known = self._texts.longer(known, token)

    # --- what the engine does ---

    def upload(self, rows: Rows) -> Rows:
        return self._engine.upload(rows)

    def run(self, work: Callable[[], object], note: str) -> None:
        self._engine.run(work, note)

    def counters(self) -> Counters:
        return self._engine.counters()

    def draft(self, rows: Rows) -> torch.Tensor:
        raise AssertionError("drafts are passes over levels")

    def move(self, sources: list[int], start: int, drafts: int = 0) -> None:
        self.relocate(sources, list(range(start, start + len(sources))), drafts)

    def target(self, rows: Rows, *, last_only: bool, gap: Gap | None = None) -> torch.Tensor:
        self.passes.append(self._begun)
        self.run(partial(self._enter_sweep, rows), "enter")
        logits = self._engine.target(rows, last_only=last_only, gap=gap)
        self._begun = 0
        return logits

    def relocate(self, sources: list[int], targets: list[int], drafts: int = 0) -> None:
        self.run(partial(self._enter_moves, sources, targets, len(sources) - drafts), "enter")
        self._engine.relocate(sources, targets, drafts)

    # --- drafts ---

    def capture_level(self, rows: Rows, then: Callable[[torch.Tensor], object], key: object) -> None:
        known = self._captured.setdefault(key, (rows, then))
        assert known[0] is rows, "captured for other rows"

    def draft_level(self, key: object) -> None:
        self._begun += 1
        rows, then = self._captured[key]

        def work() -> None:
            for layer in range(len(self._engine.cache.keys)):
                self._spoil(rows, layer)
            then(self._logits(rows))

        self.run(work, "draft")

    def draft_steps(self, rows: Rows) -> Generator[None, None, torch.Tensor]:
        self._begun += 1
        logits = torch.empty((len(rows), self._engine.config.vocab_size), dtype=self._engine.store.dtype)
        for layer in range(len(self._engine.cache.keys)):
            self.run(partial(self._spoil, rows, layer), "draft layer")
            yield
        self.run(lambda: logits.copy_(self._logits(rows)), "draft head")
        return logits  # (T, V)

    def _spoil(self, rows: Rows, layer: int) -> None:
        """Leave NaN where a draft's layer writes, and say so."""
        for part in (self._engine.cache.keys, self._engine.cache.values):
            part[layer][:, rows.slots.long()] = torch.nan
        if self._engine.ledger is not None:
            self._engine.ledger.drafted(layer, rows.slots.tolist())

    def _logits(self, rows: Rows) -> torch.Tensor:
        """What the draft says of rows; of nodes that are missing, NaN."""
        nodes = self._levels._newest()[: len(rows)]
        there = (self._levels._score.index_select(0, nodes) > EMPTY).tolist()
        texts = [self._text_of(rows, row, exact=False) if known else None for row, known in enumerate(there)]
        for slot, text in zip(rows.slots.tolist(), texts, strict=True):
            self._entries.pop(slot, None)
            if text is not None:
                self._entries[slot] = Entry(text, exact=False)
        if self._params.samples:
            self._require_noise(int(rows.positions[0]) + 1)
        if self._params.repetition_penalty != 1.0:
            seen = self._levels.seen.nonzero()[:, 0].tolist()
            assert seen == sorted(set(self._text[: int(rows.prefix[0]) + 1])), "seen in another text"
        return torch.stack([self._row(text) for text in texts]).to(self._engine.store.dtype)

    def _require_noise(self, position: int) -> None:
        """The noise of a position is on the device."""
        row = self._levels.noise[position % len(self._levels.noise)]
        assert torch.equal(row, gumbel_noise(self._params.seed, position, len(row))), (
            "another position's noise"
        )

    def _row(self, text: int | None) -> torch.Tensor:
        """Logits (V,) after a text."""
        size = self._engine.config.vocab_size
        if text is None:
            return torch.full((size,), torch.nan)
        key = self._texts.keys[text]
        logits = torch.randn(size, generator=torch.Generator().manual_seed(key))
        return self._temper(2 * logits, self._right.get(text), key)

    # --- what entries are for ---

    def _text_of(self, rows: Rows, row: int, *, exact: bool) -> int:
        """The text that ends with a row, by the entries that it attends to."""
        prefix, path = int(rows.prefix[row]), rows.paths[row, : int(rows.path_lens[row])].tolist()
        if not path:  # a prompt's row: a part of the prefix it attends to
            prefix, path = prefix - 1, [prefix - 1]
        assert path[-1] == int(rows.slots[row]), "a row's path ends elsewhere"
        text = 0
        if prefix:
            assert self._entries[prefix - 1].exact, "the prefix is a draft's"
            text = self._entries[prefix - 1].text
        for slot in path[:-1]:
            entry = self._entries.get(slot)
            assert entry is not None, "a pass attends to what nobody wrote"
            assert self._texts.before[entry.text] == text, "a pass attends to another path's entry"
            assert entry.exact or not exact, "a sweep attends to a draft's entry"
            text = entry.text
        return self._texts.longer(text, int(rows.tokens[row]))

    def _enter_sweep(self, rows: Rows) -> None:
        """A sweep writes its rows' entries, parents before children."""
        self._swept = set()
        for row, slot in enumerate(rows.slots.tolist()):
            text = self._text_of(rows, row, exact=True)
            self._entries[slot] = Entry(text, exact=True)
            self._swept.add(text)

    def _enter_moves(self, sources: list[int], targets: list[int], exact: int) -> None:
        """A commit keeps entries, the first ``exact`` of them for good, and all others are forgotten."""
        moved = [self._entries.get(source) for source in sources]
        assert all(entry is not None and entry.exact for entry in moved[:exact]), "a draft's is kept"
        for entry in moved[exact:]:
            assert entry is None or entry.exact or entry.text not in self._swept, "the exact entry is lost"
        kept = {slot: entry for slot, entry in self._entries.items() if slot < targets[0]}
        new = {slot: entry for slot, entry in zip(targets, moved, strict=True) if entry is not None}
        self._entries = kept | new


@dataclass(frozen=True)
class DeviceRun:
    """What a run on a device left.

    Attributes:
        run: the text, and the committed keys and values.
        reads: values that the host waited for.
        filled: pieces of drafting in gaps.
    """

    run: Run
    reads: int
    filled: int

    @property
    def accepted(self) -> list[int]:
        """Of each step."""
        return self.run.accepted


def forget_accesses(engine: Engine) -> None:
    """Begin a page for the next text: comparing with all earlier texts' accesses takes time."""
    if engine.checker is not None:
        engine.checker.check()
        engine.checker._accesses.clear()


def run_device(
    engine: Engine,
    passes: DeviceDrafter | None,
    ahead: Ahead,
    prompt: list[int],
    params: SamplingParams,
    seed: int,
) -> DeviceRun:
    """A text whose steps are ``ahead``'s, gaps by chance; without passes, drafts are the engine's."""
    assert engine.exchange is not None
    forget_accesses(engine)
    before = engine.exchange.blocking_reads
    view = HostView(engine if passes is None else passes)
    with gaps_by_chance(engine, seed) as filled:
        found = _run(engine, view, prompt, Sampler(params, prompt), ahead)  # type: ignore[arg-type]
    return DeviceRun(found, engine.exchange.blocking_reads - before, sum(filled))
