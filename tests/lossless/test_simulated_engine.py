"""The whole engine in simulated orders: a text's tokens, keys and values whatever runs late.

Real models, layers, kernels, drafts and commits, on a backend that runs what was launched later, in random
order, with copies in pieces over poisoned slots, under the hazard checker and the ledger of exact entries.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, device_plan, least_device_budgets
from device_subjects import little_staging
from drafters import Run, _run, run_plain
from test_adaptive import ByChance
from test_lossless import SAMPLINGS
from tiny import write_tiny

from subspec import LLM
from subspec.engine import Engine
from subspec.memory.backend.simulated import SimulatedBackend
from subspec.memory.hazards import SWITCH, HazardError
from subspec.memory.schedule import Schedule
from subspec.memory.streamer import Streamer
from subspec.models.kv_ledger import InexactError
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import calibrations
from subspec.speculation.draft import TreeShape
from subspec.speculation.sampling import Sampler
from subspec.store.prepare import prepare
from subspec.store.reader import Store

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = list(range(10, 26))
BOUNDS: dict[str, Any] = {"context": 48, "depth": 4, "width": 3, "nodes": 9}
TOKENS, SEEDS = 7, 40


class Model:
    """A tiny model: its store, its plans, its plain texts."""

    def __init__(self, directory: Path) -> None:
        write_tiny(directory / "model", "qwen3", torch.bfloat16, num_hidden_layers=2)
        self.store = prepare(directory / "model", store=directory / "store")
        self._plain: dict[str, Run] = {}
        with little_staging():
            vram, ram, unit = least_device_budgets(self.store, **BOUNDS)
            self.plans = {
                "RAM": device_plan(self.store, vram, PLENTY, **BOUNDS),
                "RAM and disk": device_plan(self.store, vram, ram + unit, **BOUNDS),
                "disk": device_plan(self.store, vram, ram, **BOUNDS),
            }
        assert self.plans["RAM and disk"].host_layers
        assert self.plans["disk"].disk_bytes == self.plans["disk"].streamed_bytes > 0

    def plain(self, sampling: str) -> Run:
        if sampling not in self._plain:
            params = replace(SAMPLINGS[sampling], max_new_tokens=TOKENS)
            with LLM(self.store, "64MiB", **BOUNDS) as llm:
                self._plain[sampling] = run_plain(llm.engine, PROMPT, params)
        return self._plain[sampling]

    def run(self, placement: str, sampling: str, seed: int, *, chance: bool) -> Run:
        """A speculative text in the order that a seed gives."""
        shape = TreeShape(BOUNDS["depth"], BOUNDS["width"], BOUNDS["nodes"])
        params = replace(SAMPLINGS[sampling], max_new_tokens=TOKENS)
        engine = Engine(Store(self.store), self.plans[placement], backend=SimulatedBackend(seed))
        try:
            policy = ByChance(seed) if chance else None
            vocabulary = engine.config.vocab_size
            ahead = Ahead(shape, vocabulary, torch.device("cpu"), calibrations({}), policy)
            passes: Any = engine.on_host()
            found = _run(engine, passes, PROMPT, Sampler(params, PROMPT), ahead)  # type: ignore[arg-type]
            assert engine.checker is not None
            engine.checker.check()
            return found
        finally:
            if engine.checker is not None:
                engine.checker.hazards.clear()  # told already
            engine.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


@pytest.mark.parametrize("placement", ["RAM", "RAM and disk", "disk"])
def test_a_text_in_any_order(model: Model, placement: str) -> None:
    for seed in range(SEEDS):
        sampling = list(SAMPLINGS)[seed % len(SAMPLINGS)]
        assert model.run(placement, sampling, seed, chance=seed % 3 > 0).same(model.plain(sampling)), seed


def without_free(patch: pytest.MonkeyPatch) -> None:
    """A slot is given back without a record of its use."""

    def release(self: Streamer) -> None:
        load = self._loads.pop(self._next)
        assert load is not None
        ahead = self._next + len(self._slots)
        self._next += 1
        self._loads[ahead] = self._start(ahead)

    patch.setattr(Streamer, "release", release)


def without_copied(patch: pytest.MonkeyPatch) -> None:
    """The compute stream does not wait for the copies into a slot."""
    original = Streamer.acquire

    def acquire(self: Streamer) -> torch.Tensor:
        wait, self._backend.wait = self._backend.wait, lambda *_: None  # type: ignore[method-assign]
        try:
            return original(self)
        finally:
            self._backend.wait = wait  # type: ignore[method-assign]

    patch.setattr(Streamer, "acquire", acquire)


def reading_at_once(patch: pytest.MonkeyPatch) -> None:
    """The host takes the step's summary without waiting for it."""
    patch.setattr("subspec.memory.exchange.Exchange.take", lambda self, pending: pending.value.clone())


def drafting_between_launches(patch: pytest.MonkeyPatch) -> None:
    """A step's work is launched before its slot was acquired."""
    original = Schedule._launch
    held: list[Any] = []

    def launch(self: Schedule, step: Any, slot: torch.Tensor | None) -> None:
        held.append(partial(original, self, step, slot))
        if len(held) > 1:
            held.pop(0)()

    patch.setattr(Schedule, "_launch", launch)


@pytest.mark.parametrize("mutant", [without_free, without_copied, reading_at_once, drafting_between_launches])
def test_a_missing_edge_is_noticed(model: Model, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.plain("greedy")
    mutant(monkeypatch)
    noticed = 0
    for seed in range(4):
        try:
            noticed += not model.run("RAM", "greedy", seed, chance=False).same(plain)
        except (AssertionError, HazardError, InexactError, IndexError, KeyError, ValueError, RuntimeError):
            noticed += 1
    assert noticed == 4
