"""Tiny models on the emulated device, beside the same models on the CPU alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, least_budget, least_device_budgets
from device_drafters import DeviceDrafter, DeviceRun, run_device
from drafters import Run, always, never, run_plain, sometimes
from test_adaptive import DEPTH, NODES, WIDTH, ByChance
from test_lossless import SAMPLINGS, TREES
from tiny import write_tiny

from subspec import LLM
from subspec.memory.hazards import SWITCH
from subspec.planning import parts, plan
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import calibrations
from subspec.speculation.draft import TreeShape
from subspec.store.prepare import prepare

TEMPERS = {"always": always, "never": never, "sometimes": sometimes}
BOUNDS: dict[str, Any] = {"context": 128, "depth": 10, "width": 4, "nodes": 41}
CHANCE = TreeShape(DEPTH, WIDTH, NODES)
STAGING_BYTES = 4 * 8192  # so that units of tiny models come in several parts


@contextmanager
def little_staging() -> Iterator[pytest.MonkeyPatch]:
    """Staging buffers for tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (parts, plan):
            patch.setattr(module, "STAGING_BYTES", STAGING_BYTES)
        yield patch


def open_device(
    store: Path, vram: int = PLENTY, ram: int = PLENTY, *, checked: bool = True, **options: Any
) -> LLM:
    """A model on the emulated device; if checked, every access to what streams and the host share."""
    with little_staging() as patch:
        patch.setenv(SWITCH, "1" if checked else "0")
        return LLM(store, vram=vram, ram=ram, device="emulated", **(BOUNDS | options))


class Subject:
    """A tiny model on the emulated device, and its plain texts on the CPU alone.

    Args:
        directory: where it goes.
        family: of the model.
        stream: what its store keeps.
        changes: of its sizes.
    """

    def __init__(self, directory: Path, family: str, stream: str = "residual", **changes: int) -> None:
        self.family = family
        write_tiny(directory / "model", family, torch.bfloat16, **changes)
        self.store = prepare(directory / "model", store=directory / "store", stream=stream)
        self.cpu = LLM(self.store, least_budget(self.store, **BOUNDS)[0], **BOUNDS)
        with little_staging():
            self.vram, self.ram, self.unit = least_device_budgets(self.store, **BOUNDS)
        self.prompt = [random.Random(place).randrange(self.cpu.config.vocab_size) for place in range(50)]
        self._plain: dict[tuple[str, int], Run] = {}
        self._aheads: dict[tuple[TreeShape, bool], Ahead] = {}

    def plain(self, sampling: str, tokens: int = 26) -> Run:
        if (sampling, tokens) not in self._plain:
            params = replace(SAMPLINGS[sampling], max_new_tokens=tokens)
            self._plain[sampling, tokens] = run_plain(self.cpu.engine, self.prompt, params)
        return self._plain[sampling, tokens]

    def ahead(self, tree: str | None, seed: int) -> Ahead:
        """One of a pinned tree, or of trees by chance."""
        shape, policy = (TREES[tree], None) if tree else (CHANCE, ByChance(seed))
        key = shape, policy is None
        if key not in self._aheads:
            size = self.cpu.config.vocab_size
            self._aheads[key] = Ahead(shape, size, torch.device("cpu"), calibrations({}), policy)
        self._aheads[key].policy = policy
        return self._aheads[key]

    def forget_trees(self) -> None:
        """Make trees anew."""
        self._aheads = {}

    def run(
        self,
        llm: LLM,
        sampling: str,
        temper: str | None,
        seed: int,
        tree: str | None = None,
        most: int = 26,
    ) -> tuple[DeviceRun, DeviceDrafter | None]:
        """A text by a drafter, or by the engine's own drafts; a short one where each step brings a token."""
        tokens = 9 if temper == "never" else most
        ahead, params = self.ahead(tree, seed), replace(SAMPLINGS[sampling], max_new_tokens=tokens)
        passes = None
        if temper is not None:
            text = self.prompt + self.plain(sampling, tokens).tokens
            passes = DeviceDrafter(llm.engine, ahead, text, TEMPERS[temper], params, seed)
        return run_device(llm.engine, passes, ahead, self.prompt, params, seed), passes

    def check(
        self,
        llm: LLM,
        sampling: str,
        temper: str | None,
        seed: int,
        tree: str | None = None,
        most: int = 26,
    ) -> tuple[DeviceRun, list[int]]:
        """A run that must equal plain, with one wait a step, and no access out of order.

        Returns what it left, and how many passes were drafted before each step's sweep.
        """
        found, passes = self.run(llm, sampling, temper, seed, tree, most)
        plain, case = self.plain(sampling, 9 if temper == "never" else most), (sampling, seed)
        assert found.run.tokens == plain.tokens, case
        assert found.run.same(plain), f"{case}: same tokens, other keys or values"
        assert found.reads == 1 + len(found.accepted), case
        if llm.engine.checker is not None:
            llm.engine.checker.check()
        return found, [] if passes is None else passes.passes[1:]
