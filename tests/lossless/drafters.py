"""Drafters of every temper, and runs of the decoding loop that leave nothing old to lean on.

A drafter stands where the engine stands in the loop: sweeps and commits are the engine's, guesses its own.
It knows the plain text, so that it can agree or disagree at will, and leaves NaN in the keys and values of
every node that it drafts: whatever a sweep or a commit fails to overwrite shows.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from subspec.engine import Engine
from subspec.models.decoder import Rows
from subspec.speculation.decode import Commit, Passes, decode
from subspec.speculation.draft import TreeShape
from subspec.speculation.sampling import Sampler, SamplingParams

CERTAIN = 60.0  # a logit that no noise overtakes
Temper = Callable[[torch.Tensor, int | None, int], torch.Tensor]


def always(logits: torch.Tensor, right: int | None, key: int) -> torch.Tensor:
    """Certain of the plain text's token."""
    return logits if right is None else logits.index_fill(0, torch.tensor([right]), CERTAIN)


def never(logits: torch.Tensor, right: int | None, key: int) -> torch.Tensor:
    """Sure that the plain text's token cannot come."""
    return logits if right is None else logits.index_fill(0, torch.tensor([right]), -torch.inf)


def sometimes(logits: torch.Tensor, right: int | None, key: int) -> torch.Tensor:
    """Puts the plain text's token first in six cases of ten, else somewhere among or behind its guesses."""
    if right is None:
        return logits
    luck = key % 1000 / 1000
    value = CERTAIN if luck < 0.6 else float(logits.sort(descending=True).values[key % 6])
    return logits.index_fill(0, torch.tensor([right]), value)


class Drafter:
    """An engine whose drafts come from elsewhere.

    Args:
        engine: sweeps and commits.
        text: the prompt and the tokens that plain decoding gave.
        temper: (random logits (V,), the text's next token or None off its path, a number) → logits (V,).
        seed: of the random logits and numbers.
    """

    def __init__(self, engine: Engine, text: Sequence[int], temper: Temper, seed: int = 0) -> None:
        self._engine, self._text, self._temper, self._seed = engine, list(text), temper, seed
        self._token_in: dict[int, int] = {}

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        return self._engine.target(rows, last_only=last_only)

    def move(self, sources: list[int], start: int) -> None:
        self._engine.move(sources, start)

    def draft(self, rows: Rows) -> torch.Tensor:
        slots = rows.slots.long()
        self._token_in.update(zip(slots.tolist(), rows.tokens.tolist(), strict=True))
        for part in (self._engine.cache.keys, self._engine.cache.values):
            part[:, :, slots] = torch.nan
        return torch.stack([self._row(rows, index) for index in range(len(rows))])  # (T, V)

    def _row(self, rows: Rows, index: int) -> torch.Tensor:
        prefix, length = int(rows.prefix[index]), int(rows.path_lens[index])
        path = [self._token_in[slot] for slot in rows.paths[index, :length].tolist()]
        end = prefix + length
        right = self._text[end] if path == self._text[prefix:end] and end < len(self._text) else None
        key = zlib.crc32(repr((self._seed, prefix, path)).encode())
        logits = torch.randn(self._engine.config.vocab_size, generator=torch.Generator().manual_seed(key))
        return self._temper(2 * logits, right, key).to(self._engine.store.dtype)


class Silent(Sampler):
    """Chooses as ever, and has no guesses."""

    def guess(
        self, logits: torch.Tensor, position: int, paths: Sequence[Sequence[int]], width: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        return [[] for _ in paths], [[] for _ in paths]


@dataclass(frozen=True)
class Run:
    """What a run of the loop left.

    Attributes:
        tokens: the text.
        accepted: accepted tokens of each step.
        keys: (L, Hkv, n, D) bits of the committed prefix's keys; ``values`` alike.
    """

    tokens: list[int]
    accepted: list[int]
    keys: torch.Tensor
    values: torch.Tensor

    def same(self, other: "Run") -> bool:
        """Same tokens, and the same bits in the committed prefix."""
        if self.tokens != other.tokens:
            return False
        return torch.equal(self.keys, other.keys) and torch.equal(self.values, other.values)


DRAFTERS = ("always", "never", "sometimes", "nothing", "substitutes")
_TEMPERS = {"always": always, "never": never, "sometimes": sometimes}


def run_plain(engine: Engine, prompt: list[int], params: SamplingParams) -> Run:
    """A plain text."""
    return _run(engine, engine, prompt, Sampler(params, prompt), None)


def run_drafter(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    shape: TreeShape,
    drafter: str,
    plain: Run,
    seed: int = 0,
) -> Run:
    """A speculative text by one of ``DRAFTERS``, which may know ``plain``."""
    sampler = (Silent if drafter == "nothing" else Sampler)(params, prompt)
    passes: Passes = engine
    if drafter in _TEMPERS:
        passes = Drafter(engine, prompt + plain.tokens, _TEMPERS[drafter], seed)
    return _run(engine, passes, prompt, sampler, shape)


def _run(engine: Engine, passes: Passes, prompt: list[int], sampler: Sampler, shape: TreeShape | None) -> Run:
    """Decode in a cache of which every entry is NaN at first."""
    cache, wanted = engine.cache, sampler.params.max_new_tokens
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    commits: list[Commit] = list(decode(passes, prompt, 0, sampler, shape, wanted))
    tokens = [token for commit in commits for token in commit.tokens]
    engine.settle()
    held = len(prompt) + len(tokens) - 1
    bits = torch.int32 if cache.keys.dtype == torch.float32 else torch.int16
    keys, values = (part[:, :, :held].clone().view(bits) for part in (cache.keys, cache.values))
    accepted = [len(commit.tokens) - 1 for commit in commits if not commit.prefill]
    return Run(tokens, accepted, keys, values)
