"""The decoding loop: prefill, then draft, verify and commit until something stops it.

Plain decoding is this loop with a one-node tree: the same target pass, the same choice of tokens.  So is a
step whose tree is fixed beforehand, one that is as large as it pays (``adaptive``), and one on a device
(``ahead``).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, cast

import torch

from subspec.memory.timeline import Timeline
from subspec.models.decoder import Rows, prefix_rows
from subspec.speculation.adaptive import Speculator
from subspec.speculation.ahead import Ahead
from subspec.speculation.commit import Commit, record_step
from subspec.speculation.device_passes import DevicePasses
from subspec.speculation.draft import TreeShape, grow
from subspec.speculation.passes import AdaptivePasses
from subspec.speculation.sampling import Sampler
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import row_numbers, walk

__all__ = ["Commit", "Passes", "decode"]


class Passes(Protocol):
    """The model as the method sees it: two passes over one KV cache."""

    def target(self, rows: Rows, *, last_only: bool) -> torch.Tensor:
        """One sweep of the exact model: logits (T, V), or (1, V) of the last row."""
        ...

    def draft(self, rows: Rows) -> torch.Tensor:
        """One pass over substitutes: logits (T, V)."""
        ...

    def move(self, sources: list[int], start: int) -> None:
        """Move cache slots ``sources`` to ``start`` and on."""
        ...


class OnHost(Passes, Protocol):
    """A model on a device, as the host sees it.

    Attributes:
        device: the same model, for steps whose trees grow on the device.
    """

    device: DevicePasses


def decode(
    passes: Passes,
    prompt: list[int],
    cached: int,
    sampler: Sampler,
    shape: TreeShape | Speculator | Ahead | None,
    max_new_tokens: int,
    timeline: Timeline | None = None,
) -> Iterator[Commit]:
    """Generate up to ``max_new_tokens`` tokens, a step at a time.

    Args:
        passes: the model, ``AdaptivePasses`` for a Speculator, ``OnHost`` for one on a device.  Its cache
            holds the first ``cached`` tokens of the prompt.
        prompt: token ids, at least one more than ``cached``.
        cached: length of the prefix that need not be computed.
        sampler: chooses the target's tokens and ranks the draft's guesses.
        shape: a fixed tree, or what finds out how much of one pays; None decodes plainly.
        max_new_tokens: where to stop; end tokens are the caller's business.
        timeline: where the steps' parts are recorded.

    Yields:
        One ``Commit`` a step, the prefill's first.  The caller may stop at any of them.  After a commit the
        cache holds the prompt and every committed token but the last.
    """
    rows = prefix_rows(prompt[cached:], cached)
    speculation = None
    start = time.perf_counter()
    if isinstance(shape, Speculator):
        speculation = shape.begin(cast(AdaptivePasses, passes), sampler, prompt)
        logits = speculation.prefill(rows, max_new_tokens)
    else:
        logits = passes.target(rows, last_only=True)
    root, base = sampler.choose(logits[0], len(prompt)), len(prompt)
    if speculation is not None:
        speculation.prefilled(root)
    sampler.observe([root], base)
    end = time.perf_counter()
    if timeline is not None:
        timeline.span("steps", "prefill", start, end, rows=len(prompt) - cached)
    yield Commit([root], True, 0, 0, 0.0, end - start)
    remaining = max_new_tokens - 1
    if isinstance(shape, Ahead):
        device = cast(OnHost, passes).device
        yield from shape.commits(device, sampler, [*prompt, root], remaining, timeline)
        return
    if speculation is not None:
        yield from speculation.commits(remaining, timeline)
        return
    assert not isinstance(shape, Speculator)
    while remaining > 0:
        commit = _step(passes, root, base, sampler, shape, remaining, timeline)
        root, base = commit.tokens[-1], base + len(commit.tokens)
        remaining -= len(commit.tokens)
        yield commit


def _step(
    passes: Passes,
    root: int,
    base: int,
    sampler: Sampler,
    shape: TreeShape | None,
    remaining: int,
    timeline: Timeline | None,
) -> Commit:
    """Draft, verify and commit once; no more than ``remaining`` tokens."""
    start = time.perf_counter()
    tree = DraftTree.rooted(root, base)
    nodes = [0]
    if shape is not None and remaining > 1:
        depth = min(shape.depth, remaining - 1)  # a path of this depth, and its bonus token
        grow(tree, passes.draft, sampler, replace(shape, depth=depth))
        nodes = tree.best(shape.nodes, shape.min_score)
    drafted = time.perf_counter()
    logits = passes.target(tree.rows(nodes), last_only=False)  # (N, V)
    result = walk(tree, row_numbers(nodes), sampler.chooser(logits))
    walked = time.perf_counter()
    passes.move([tree.slot(node) for node in result.nodes], base)
    sampler.observe(result.tokens, base + len(result.tokens))
    end = time.perf_counter()
    commit = Commit(result.tokens, False, len(tree), len(nodes), drafted - start, end - drafted)
    if timeline is not None:
        record_step(timeline, commit, start, walked, end)
    return commit
