"""The seconds of a text, and what the engine did in them."""

import time

from subspec.engine import Engine
from subspec.generation.results import Statistics
from subspec.speculation.commit import Commit


class Clock:
    """Times a text from inside: seconds that a consumer spends between pieces do not count."""

    def __init__(self, engine: Engine, mode: str, reused: int) -> None:
        self._engine, self._mode, self._reused = engine, mode, reused
        self._first = self._origin = engine.counters()
        self._commits: list[Commit] = []
        self._kept: list[int] = []
        self._prefill_s = self._decode_s = 0.0
        self._start = time.perf_counter()

    def add(self, commit: Commit, kept: int) -> None:
        """A step ended, of whose tokens ``kept`` belong to the text."""
        elapsed_s = time.perf_counter() - self._start
        if commit.prefill:
            self._prefill_s = elapsed_s
            self._first = self._engine.counters()
        else:
            self._decode_s += elapsed_s
            self._commits.append(commit)
            self._kept.append(kept)

    def resume(self) -> None:
        """The consumer asked for more."""
        self._start = time.perf_counter()

    def statistics(self, new_tokens: int) -> Statistics:
        """The account of the finished text."""
        last, steps = self._engine.counters(), len(self._commits)
        wasted = [commit.wasted_s for commit in self._commits]
        return Statistics(
            mode=self._mode,
            new_tokens=new_tokens,
            reused_tokens=self._reused,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            tok_s=(new_tokens - 1) / self._decode_s if self._decode_s else 0.0,
            acceptance_length=sum(self._kept) / steps if steps else 0.0,
            steps=steps,
            sweeps=last.sweeps - self._origin.sweeps,
            streamed_bytes=last.streamed_bytes - self._first.streamed_bytes,
            draft_s=sum(commit.draft_s for commit in self._commits),
            gap_s=sum(commit.gap_s for commit in self._commits),
            wasted_s=None if None in wasted else sum(filter(None, wasted)),
            verify_s=sum(commit.verify_s for commit in self._commits),
            wait_s=last.wait_s - self._first.wait_s,
            link_s=last.link_s - self._first.link_s,
            accepted=[len(commit.tokens) - 1 for commit in self._commits],
            drafted=[commit.drafted for commit in self._commits],
            verified=[commit.verified for commit in self._commits],
        )
