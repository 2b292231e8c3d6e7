"""The public API: ``LLM(model, memory=…)``, then ``generate`` or ``stream``."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from subspec.engine import Engine
from subspec.errors import ContextError, OptionError
from subspec.generation import building
from subspec.generation.answer import Answer
from subspec.generation.clock import Clock
from subspec.generation.prompt import Prompt, encode, load_tokenizer
from subspec.generation.results import Piece, Result
from subspec.memory.exhausted import exhausted
from subspec.memory.timeline import Timeline, recorded
from subspec.planning.device import AUTO, budgets_here
from subspec.planning.plan import Plan, Request
from subspec.speculation.adaptive import Speculator
from subspec.speculation.ahead import Ahead
from subspec.speculation.decode import Commit, decode
from subspec.speculation.draft import TreeShape
from subspec.speculation.learner import Learner
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.store.calibration import load_calibration, save_calibration
from subspec.store.prepare import prepare
from subspec.store.reader import Store

MODES = ("speculative", "plain")


class LLM:
    """A model under a memory budget.

    Args:
        model: a Hugging Face directory, a GGUF file, a hub id, ``demo``, or a prepared store.
        memory: bound on everything the engine holds: ``"1.5GiB"``, bytes, or ``"auto"``; on a device the
            same as ``vram``.
        context: most tokens of prompt and text together; default 4096 or the model's limit.
        mode: ``speculative``, or ``plain``: the same engine with a one-node tree, and the same tokens.
        depth: levels of the draft tree; ``width``: nodes a level; ``nodes``: nodes verified in a sweep.
        min_reach: probability of reaching the last level below which no further one is drafted.
        draft_temperature: divisor of the draft's scores.  These five pin a fixed tree; without any of them
            each tree is as large as pays by what was measured.
        dtype: ``bfloat16``, ``float16`` or ``float32`` instead of the checkpoint's own.
        stream: how exact weights are kept and streamed: ``residual``, or ``raw``, twice as large; default:
            ``residual`` for weights of 16 bits, and ``raw`` for fp32, which has no residual form, and where
            there are no native kernels.
        paranoid: verify the checksum of every streamed image every time it is read, not only the first.
        store: where the prepared model lies or goes; default: under the user's cache directory.
        prefill_chunk: prompt rows that go through a layer at once.
        progress: called with (task, done, total) while preparing and loading.
        vram: bound on what is held in a CUDA device's memory; default: what is free, but for a reserve.
        ram: bound on what is pinned in RAM behind a device; default: 60 % of what is free at most.
        device: ``auto``: a CUDA device if there is one, else the CPU; ``cpu``; ``cuda``; or ``emulated``: the
            CPU with a part of RAM in the place of VRAM.

    Attributes:
        plan: what the budgets are spent on.
        device: ``cpu``, ``cuda`` or ``emulated``.
        tree: what drafts: a ``Speculator``, or the fixed tree that was asked for; on a device an ``Ahead``
            for either.  May be set to another one of its kind within the plan's bounds.
        config: the model's configuration.
        name: the model's short name.
        store_path: the prepared model.
        tokenizer: the transformers tokenizer, or None.

    Raises:
        SubspecError: the model, the store, the budget or an option cannot be used; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        memory: str | int = "auto",
        *,
        context: int | None = None,
        mode: str = "speculative",
        depth: int | None = None,
        width: int | None = None,
        nodes: int | None = None,
        min_reach: float | None = None,
        draft_temperature: float | None = None,
        dtype: str | None = None,
        stream: str | None = None,
        paranoid: bool = False,
        store: str | Path | None = None,
        prefill_chunk: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str = AUTO,
    ) -> None:
        self.mode = _checked_mode(mode)
        budgets = budgets_here(device, memory, vram, ram)
        budgets.require_dtype(dtype)
        self.device = budgets.device
        wishes = (context, depth, width, nodes, min_reach, draft_temperature, prefill_chunk)
        request = Request(budgets.fast_bytes, *wishes, budgets.host_bytes)
        place = Path(store) if store else None
        self.store_path = prepare(model, store=place, dtype=dtype, stream=stream, progress=progress)
        opened = Store(self.store_path)
        self.config, self.name = opened.config, opened.manifest.name
        budgets.require_dtype(opened.manifest.dtype)
        self.plan: Plan = building.planned(opened, request)
        self.engine = building.built(opened, self.plan, self.device, progress, paranoid)
        self.tree: TreeShape | Speculator | Ahead = building.tree(
            self.plan, self.engine, load_calibration(self.store_path)
        )
        self.tokenizer: Any = load_tokenizer(self.store_path / "tokenizer")
        self._cached: list[int] = []  # tokens whose keys and values are in the cache
        self._turn = 0
        self._closed = False

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        mode: str | None = None,
        raw: bool = False,
    ) -> Result:
        """The whole answer.

        Args:
            prompt: a user's message, a list of messages (``{"role": …, "content": …}``), or token ids.
            params: how to choose tokens and when to stop; default: greedy, 256 tokens.
            mode: overrides the model's.
            raw: take a string as it is, without the chat template.

        Raises:
            ContextError: the prompt does not fit the context.
            OptionError: a prompt or option that cannot be used.
        """
        *_, last = self.stream(prompt, params, mode=mode, raw=raw)
        assert last.result is not None
        return last.result

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        mode: str | None = None,
        raw: bool = False,
    ) -> Iterator[Piece]:
        """The answer in pieces, as tokens commit; arguments and errors are ``generate``'s.

        Abandoning the iterator leaves the model usable; a later text on the same model ends an unfinished
        one.
        """
        if self._closed:
            raise OptionError("this model is closed: build another LLM")
        params = params or SamplingParams()
        chosen = _checked_mode(mode or self.mode)
        if params.stop and self.tokenizer is None:
            raise OptionError("stop strings need a tokenizer, and this model has none")
        ids = encode(self.tokenizer, prompt, self.config.vocab_size, raw=raw)
        if len(ids) >= self.plan.context:
            limit = self.config.max_position
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context is {self.plan.context}: shorten it, or raise "
                f"--context to {min(len(ids) + params.max_new_tokens, limit)}, which holds it and up to "
                f"{params.max_new_tokens} new ones (the model's limit is {limit})"
            )
        return self._run(ids, params, chosen)

    def traced(self, path: str | Path | None = None) -> AbstractContextManager[Timeline]:
        """Record what happens within ``with llm.traced("trace.json"):``, then write it for a trace viewer.

        Args:
            path: a file, written when the block ends, also by an error; None: the ``Timeline`` that the block
                is given has ``export_chrome_trace(path)``.

        Raises:
            OptionError: the file cannot be written (found out before the block), or a trace is under way.
        """
        if self.engine.timeline is not None:
            raise OptionError("a trace is under way already: end it before another one is begun")
        return recorded(self.engine.trace, path)

    def reset(self) -> None:
        """Forget the kept keys and values."""
        self._cached = []

    def close(self) -> None:
        """Free what the model holds; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._turn += 1
            if isinstance(self.tree, Learner) and (learnt := self.tree.learnt()):
                save_calibration(self.store_path, learnt)
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What runs here, as plain data for result files."""
        config, manifest = self.config, self.engine.store.manifest
        return {
            "name": self.name,
            "family": config.family,
            "dtype": manifest.dtype,
            "parameters": config.parameters,
            "layers": config.layers,
            "resident_layers": len(self.plan.resident_layers),
            "plain_layers": len(self.plan.plain_layers),
            "store_version": manifest.version,
            "codec": manifest.codec,
            "device": self.device,
            "product": self.engine.weights.product.name,
            "draft_product": self.engine.weights.draft_product,
            "eager": self.engine.eager,
            "direct_reads": self.engine.store.direct,
            "hazard_checks": self.engine.checker is not None,
        }

    def speculation(self) -> dict[str, Any]:
        """What speculation has learnt here, as plain data for result files; empty for a fixed tree."""
        return self.tree.describe() if isinstance(self.tree, Learner) else {}

    def _run(self, ids: list[int], params: SamplingParams, mode: str) -> Iterator[Piece]:
        """Decode one text; keeps ``_cached`` true at every step."""
        self._turn += 1
        turn, plan = self._turn, self.plan
        reused = min(_common_prefix(self._cached, ids), len(ids) - 1)
        self._cached = ids[:reused]
        ends = () if params.ignore_eos else self.config.eos_token_ids
        sampler = Sampler(params, ids, plan.draft_temperature, ends=ends)
        shape = self.tree if mode == "speculative" else None
        limit = min(params.max_new_tokens, plan.context - len(ids))
        answer = Answer(self.tokenizer, ends, ids, params, limit)
        clock = Clock(self.engine, mode, reused)
        commits = decode(self.engine.on_host(), ids, reused, sampler, shape, limit, self.engine.timeline)
        for commit in _explained(commits, self.engine):
            known = ids + answer.token_ids + commit.tokens
            text, tokens = answer.take(commit.tokens)
            self._cached = known[:-1][: len(ids) + len(answer.token_ids)]
            clock.add(commit, len(tokens))
            if answer.finish_reason:
                text += answer.finish()
                yield Piece(text, tokens, answer.result(clock.statistics(len(answer.token_ids))))
                return
            yield Piece(text, tokens)
            clock.resume()
            if turn != self._turn:
                raise OptionError("this text cannot go on: another one was begun, or the model was closed")


def _explained(commits: Iterator[Commit], engine: Engine) -> Iterator[Commit]:
    """The commits; a device that runs out of memory meanwhile is explained."""
    while True:
        with exhausted(engine.places.budget):
            commit = next(commits, None)
        if commit is None:
            return
        yield commit


def _checked_mode(mode: str) -> str:
    """A known mode, or an error that names them."""
    if mode not in MODES:
        raise OptionError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    return mode


def _common_prefix(first: list[int], second: list[int]) -> int:
    """How many leading tokens two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
