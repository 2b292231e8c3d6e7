"""Run the modes in turn on every prompt, and record each run.

The mode ``raw`` is plain decoding that streams raw weights: what offloading does without any of this.  It
needs another store, and so another model object; one is open at a time, to have the machine to itself.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from subspec.bench.link import LinkMeter
from subspec.bench.prompts import Prompt
from subspec.errors import OptionError

if TYPE_CHECKING:
    from subspec.generation import LLM, Result

MODES = ("raw", "plain", "speculative")
DEFAULT_MODES = ("plain", "speculative")
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Settings:
    """What a bench runs.

    Attributes:
        plain_max_new_tokens: a lower limit for the plain modes, which need fewer tokens to time and take
            longer for each; ``None`` for the same limit.
    """

    modes: tuple[str, ...] = DEFAULT_MODES
    max_new_tokens: int = 128
    plain_max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0

    def limit(self, mode: str) -> int:
        """The most new tokens a run of ``mode`` may make."""
        shorter = self.plain_max_new_tokens if mode != "speculative" else None
        return shorter or self.max_new_tokens


class Models:
    """The models of a bench, one open at a time.

    Args:
        load: opens the model with the weights streamed as asked: ``raw``, or ``None`` for the default.

    Attributes:
        plans: every distinct plan that a model was opened with, by ``raw`` and ``default``: a plan rests on
            measurements, and a model opened anew may be planned anew.
    """

    def __init__(self, load: "Callable[[str | None], LLM]") -> None:
        self._load = load
        self._raw = False
        self._open: LLM | None = None
        self.plans: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, mode: str) -> "LLM":
        """The model that a mode runs on, opened if need be."""
        raw = mode == "raw"
        if self._open is None or raw != self._raw:
            self.close()
            self._open, self._raw = self._load("raw" if raw else None), raw
            known, plan = self.plans.setdefault("raw" if raw else "default", []), self._open.plan.as_dict()
            if plan not in known:
                known.append(plan)
        return self._open

    def close(self) -> None:
        """Close what is open, and free its memory before another model takes as much."""
        if self._open is not None:
            self._open.close()
            self._open = None
            gc.collect()


def parse_modes(text: str) -> tuple[str, ...]:
    """The modes named in a comma-separated list, each once.

    Raises:
        OptionError: a name is unknown, or there is none.
    """
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise OptionError(f"--modes {text!r}: a comma-separated list of {', '.join(MODES)}")
    return modes


def run_prompts(
    models: "Callable[[str], LLM]",
    prompts: Sequence[Prompt],
    settings: Settings,
    meter: LinkMeter,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Warm up, then run every mode on every prompt, mode after mode on the same prompt.

    The kept KV is forgotten before each run, so that each prefills its whole prompt.  ``models`` gives the
    model that a mode runs on.

    Returns:
        One record per run, in the order they ran.
    """
    short = replace(settings, max_new_tokens=WARM_UP_TOKENS, plain_max_new_tokens=None)
    warm = [_run(models(mode), prompts[0], short, mode) for mode in settings.modes]
    streams = any(result.statistics.streamed_bytes for result in warm)
    if streams:
        meter.measure_all()
    results: list[tuple[Prompt, str, Result]] = []
    total = len(prompts) * len(settings.modes)
    for prompt in prompts:
        for mode in settings.modes:
            progress("bench", len(results), total)
            results.append((prompt, mode, _run(models(mode), prompt, settings, mode)))
        if streams:
            meter.measure_lasting(1)
    if streams:
        meter.measure_all()
    progress("bench", total, total)
    speed = meter.lasting_bytes_per_s
    return [
        {**run_record(result, prompt_id=prompt.prompt_id, link_bytes_per_s=speed), "mode": mode}
        for prompt, mode, result in results
    ]


def run_record(
    result: "Result", *, prompt_id: str | int | None, link_bytes_per_s: float | None
) -> dict[str, Any]:
    """One run as result files hold it.

    ``link_utilization`` is bytes streamed ÷ (link speed × decoding time), both of the decoding alone;
    ``None`` where nothing was streamed or the link was not measured.
    """
    statistics = result.statistics.as_dict()
    lists = {name: list(statistics.pop(name)) for name in ("drafted", "verified", "accepted")}
    capacity_bytes = (link_bytes_per_s or 0.0) * result.statistics.decode_s
    used = result.statistics.streamed_bytes / capacity_bytes if capacity_bytes > 0 else None
    return {
        "mode": statistics.pop("mode"),
        "prompt_id": prompt_id,
        "prompt_tokens": result.prompt_tokens,
        **statistics,
        "link_utilization": used or None,
        "finish_reason": result.finish_reason,
        **lists,
        "token_ids": list(result.token_ids),
    }


def _run(llm: "LLM", prompt: Prompt, settings: Settings, mode: str) -> "Result":
    """One run from a cold cache of keys and values."""
    from subspec.speculation.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=settings.limit(mode),
        temperature=settings.temperature,
        seed=settings.seed,
    )
    llm.reset()
    own_mode = "speculative" if mode == "speculative" else "plain"
    return llm.generate([{"role": "user", "content": prompt.text}], params, mode=own_mode)
