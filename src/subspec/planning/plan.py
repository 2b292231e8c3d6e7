"""Choose what a memory budget is spent on, and explain it.

The minimum is what every run needs: substitutes, norms and biases, KV cache, workspace, and two slots.
What is left keeps layers resident, spread evenly over the model, then chunks of the output head.  Where a
store keeps residuals, a resident unit may stay as it is streamed, and be rebuilt every sweep, or as plain
weights, twice as large: ``planning.cost`` tells which makes the shorter sweep.
"""

from dataclasses import asdict, dataclass
from typing import Any

from subspec.errors import BudgetError, OptionError
from subspec.memory.tiers import MIB, format_size, page_aligned
from subspec.models.config import ModelConfig
from subspec.models.kv_cache import cache_bytes
from subspec.planning.cost import Images, SweepCosts, choose_residents
from subspec.speculation.draft import TreeShape
from subspec.store.layout import head_chunks, layer_bytes
from subspec.substitute.layout import tile_bytes

DEFAULT_CONTEXT = 4096
SLOTS = 2
PREFILL_ROWS = 256
EMBEDDING_CACHE_BYTES = 8 * MIB
DEFAULT_DRAFT_TEMPERATURE = 0.7
NOISE_BYTES = 4  # a position's noise, per vocabulary entry
SAMPLING_BYTES = 48  # temporaries of one row's filters, per vocabulary entry


# How large a tree may become; of a tree that is pinned in part, the rest.  A sweep that streams costs as
# much as dozens of draft levels.  Raw, it hides the products of many rows behind the link; residuals are
# there in less than half the time, and a row must be worth its products.  A sweep over plain weights in
# memory costs a few levels.
STREAMED_TREE = TreeShape(depth=40, width=6, nodes=128, min_reach=0.05)
REBUILT_TREE = TreeShape(depth=40, width=6, nodes=64, min_reach=0.2, min_score=0.04)
RESIDENT_TREE = TreeShape(depth=12, width=4, nodes=24, min_reach=0.5)
MOSTLY_PLAIN = 0.9  # share of the weights above which neither streaming nor rebuilding decides a sweep's time


@dataclass(frozen=True)
class Request:
    """What a user asked for; ``None`` leaves the choice to the planner.

    Attributes:
        budget_bytes: bound on everything the engine holds.
        context: tokens of prompt and text together.
        depth: levels of the draft tree; ``width``: nodes a level; ``nodes``: nodes verified in a sweep.
        min_reach: probability of reaching the last level below which no further one is drafted.
        draft_temperature: divisor of the draft's scores.  Any of these five pins a fixed tree.
        prefill_rows: prompt rows that go through a layer at once.
    """

    budget_bytes: int
    context: int | None = None
    depth: int | None = None
    width: int | None = None
    nodes: int | None = None
    min_reach: float | None = None
    draft_temperature: float | None = None
    prefill_rows: int | None = None


def plain_images(config: ModelConfig, itemsize: int) -> Images:
    """The units of a store that keeps plain weights."""
    layer = page_aligned(layer_bytes(config, itemsize)[0])
    chunks = tuple(
        page_aligned((chunk.stop - chunk.start) * config.hidden_size * itemsize)
        for chunk in head_chunks(config, itemsize)
    )
    return Images((layer,) * config.layers, chunks, layer, chunks)


@dataclass(frozen=True)
class Plan:
    """Where everything goes.  All sizes in bytes.

    Attributes:
        budget_bytes: the bound.
        context: tokens of prompt and text together.
        adaptive: whether each tree is as large as pays; its bounds are those of a fixed one.
        depth: levels of the draft tree; ``width``: nodes a level; ``nodes``: nodes verified in a sweep.
        min_reach: probability of reaching the last level below which no further one is drafted.
        min_score: nodes less likely to be reached than this are not verified.
        draft_temperature: divisor of the draft's scores.
        prefill_rows: prompt rows that go through a layer at once.
        resident_layers: layers whose exact weights stay.
        resident_chunks: chunks of the output head that stay, from the first on.
        plain_layers: of the resident layers, those that stay as plain weights.
        plain_chunks: of the resident chunks, how many stay as plain weights, from the first on.
        streamed_bytes: what one sweep streams.
        slots: how many; 0 if nothing is streamed.
        slot_bytes: of one slot.
        cache_rows: embedding rows kept.
        parts: bytes by purpose; their sum is what the engine holds.
    """

    budget_bytes: int
    context: int
    adaptive: bool
    depth: int
    width: int
    nodes: int
    min_reach: float
    min_score: float
    draft_temperature: float
    prefill_rows: int
    resident_layers: tuple[int, ...]
    resident_chunks: int
    plain_layers: tuple[int, ...]
    plain_chunks: int
    streamed_bytes: int
    slots: int
    slot_bytes: int
    cache_rows: int
    parts: dict[str, int]

    @property
    def held_bytes(self) -> int:
        """Bytes the engine holds under this plan."""
        return sum(self.parts.values())

    @property
    def tree(self) -> TreeShape:
        """The draft tree."""
        return TreeShape(self.depth, self.width, self.nodes, self.min_reach, self.min_score)

    @property
    def tree_slots(self) -> int:
        """Slots of the KV cache that the tree may use, beside the context's."""
        return self.tree.drafted

    @property
    def cache_slots(self) -> int:
        """Slots of the KV cache: the context, and scratch for the tree."""
        return self.context + self.tree_slots

    def all_plain(self, layers: int) -> bool:
        """Whether all of a model's layers, and all of its head, stay as plain weights."""
        return (
            self.streamed_bytes == 0
            and len(self.plain_layers) == layers
            and (self.plain_chunks == self.resident_chunks)
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for result files."""
        return {**asdict(self), "held_bytes": self.held_bytes}

    def explain(self) -> str:
        """The plan in a few lines for people."""
        lines = [f"budget {format_size(self.budget_bytes)}, of which {format_size(self.held_bytes)} is used:"]
        lines += [
            f"  {name.replace('_', ' '):<18} {format_size(size):>11}"
            for name, size in self.parts.items()
            if size
        ]
        lines.append(
            f"resident: {len(self.resident_layers)} layers, {self.resident_chunks} head chunks "
            f"({len(self.plain_layers)} and {self.plain_chunks} as plain weights); "
            f"streamed a sweep: {format_size(self.streamed_bytes)} through {self.slots} slots"
        )
        lines.append(
            f"context {self.context}; tree: {'at most ' if self.adaptive else ''}depth {self.depth}, "
            f"width {self.width}, {self.nodes} nodes verified"
        )
        return "\n".join(lines)


def make_plan(
    config: ModelConfig,
    itemsize: int,
    small_bytes: int,
    request: Request,
    images: Images | None = None,
    costs: SweepCosts | None = None,
) -> Plan:
    """The plan for a model and a request.

    Args:
        config: the model.
        itemsize: bytes of an exact weight.
        small_bytes: norms, biases and checksums, always held.
        request: budget and wishes.
        images: the store's units; default: plain weights.
        costs: what a sweep's parts cost here; default: the link alone counts, and plain weights are fastest.

    Raises:
        BudgetError: the budget is below the minimum; the message says it.
        OptionError: a wish that cannot be met.
    """
    images = images or plain_images(config, itemsize)
    costs = costs or SweepCosts()
    # The tree that needs least decides the minimum.
    small = _spend(config, itemsize, small_bytes, request, RESIDENT_TREE, images, costs)
    plain = images.plain_bytes_of(len(small.plain_layers), small.plain_chunks)
    if plain >= MOSTLY_PLAIN * images.plain_bytes:
        return small
    tree = REBUILT_TREE if images.rebuilt else STREAMED_TREE
    try:
        return _spend(config, itemsize, small_bytes, request, tree, images, costs)
    except BudgetError:
        return small


def _spend(
    config: ModelConfig,
    itemsize: int,
    small_bytes: int,
    request: Request,
    defaults: TreeShape,
    images: Images,
    costs: SweepCosts,
) -> Plan:
    """The plan with a given kind of tree where the request leaves it open; raises as ``make_plan`` does."""
    wishes = _wishes(config, request, defaults)
    parts = _fixed_parts(config, itemsize, small_bytes, wishes)
    parts["workspace"] += images.scratch
    spare = request.budget_bytes - sum(parts.values())
    slot_bytes = max(*images.layers, *images.chunks)
    held = choose_residents(images, spare, SLOTS * slot_bytes, costs)
    if held is None:
        everything = sum(images.layers) + sum(images.chunks)
        raise _too_small(request.budget_bytes, {**parts, "slots": min(SLOTS * slot_bytes, everything)})
    slots, slot_bytes = (SLOTS, slot_bytes) if held.streamed_bytes(images) else (0, 0)
    return Plan(
        budget_bytes=request.budget_bytes,
        resident_layers=held.layers,
        resident_chunks=held.chunks,
        plain_layers=held.plain_layers,
        plain_chunks=held.plain_chunks,
        streamed_bytes=held.streamed_bytes(images),
        slots=slots,
        slot_bytes=slot_bytes,
        cache_rows=_cache_rows(config, itemsize),
        parts={**parts, "slots": slots * slot_bytes, "resident": held.held_bytes(images)},
        **wishes,
    )


def _wishes(config: ModelConfig, request: Request, defaults: TreeShape) -> dict[str, Any]:
    """The request with defaults filled in and checked."""

    def chosen(wish: Any, default: Any) -> Any:
        return default if wish is None else wish

    context = chosen(request.context, min(DEFAULT_CONTEXT, config.max_position))
    if context > config.max_position:
        raise OptionError(f"--context {context}: the model's limit is {config.max_position}")
    depth, width = chosen(request.depth, defaults.depth), chosen(request.width, defaults.width)
    nodes = chosen(request.nodes, min(defaults.nodes, 1 + depth * width))
    rows = chosen(request.prefill_rows, PREFILL_ROWS)
    temperature = chosen(request.draft_temperature, DEFAULT_DRAFT_TEMPERATURE)
    reach = chosen(request.min_reach, defaults.min_reach)
    at_least = [
        (context, "--context", 2),
        (depth, "--depth", 1),
        (width, "--width", 1),
        (nodes, "--nodes", 2),
    ]
    for value, name, least in [*at_least, (rows, "prefill_chunk", 1)]:
        if value < least:
            raise OptionError(f"{name} is {value}: it must be at least {least}")
    if not 0 < temperature < float("inf"):
        raise OptionError(f"--draft-temperature is {temperature}: it must be above 0")
    if not 0 <= reach <= 1:
        raise OptionError(f"--min-reach is {reach}: it must be between 0 and 1")
    pinned = (request.depth, request.width, request.nodes, request.min_reach, request.draft_temperature)
    return {
        "context": context,
        "adaptive": all(wish is None for wish in pinned),
        "depth": depth,
        "width": min(width, config.vocab_size),
        "nodes": nodes,
        "min_reach": reach,
        "min_score": defaults.min_score if request.nodes is None else 0.0,
        "prefill_rows": rows,
        "draft_temperature": temperature,
    }


def _fixed_parts(
    config: ModelConfig, itemsize: int, small_bytes: int, wishes: dict[str, Any]
) -> dict[str, int]:
    """What every run holds, whatever stays resident."""
    tree = TreeShape(wishes["depth"], wishes["width"], wishes["nodes"])
    cache_slots = wishes["context"] + tree.drafted
    substitutes = config.layers * page_aligned(layer_bytes(config, itemsize)[1])
    return {
        "substitutes": substitutes + page_aligned(tile_bytes(config.vocab_size, config.hidden_size)),
        "norms_biases": small_bytes,
        "kv_cache": page_aligned(cache_bytes(config, cache_slots, itemsize)),
        "embedding_cache": page_aligned(_cache_rows(config, itemsize) * config.hidden_size * itemsize),
        "workspace": _workspace(config, itemsize, wishes, tree),
    }


def _cache_rows(config: ModelConfig, itemsize: int) -> int:
    """Embedding rows that the cache holds."""
    return min(max(EMBEDDING_CACHE_BYTES // (config.hidden_size * itemsize), 16), config.vocab_size)


def _workspace(config: ModelConfig, itemsize: int, wishes: dict[str, Any], tree: TreeShape) -> int:
    """Largest sum of temporaries: activations of a chunk, logits, noise, rotary tables."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = (config.heads + 2 * config.kv_heads) * config.head_dim
    rows = max(wishes["prefill_rows"], min(tree.nodes, tree.drafted))
    activations = rows * (4 * hidden + 2 * attention + 3 * inner) * itemsize
    prompt = wishes["context"] * (hidden * itemsize + 64)
    logits = (tree.nodes + 2 * tree.width) * config.vocab_size * itemsize
    sampling = config.vocab_size * ((tree.depth + 1) * NOISE_BYTES + SAMPLING_BYTES)
    tables = (wishes["context"] + tree.drafted) * config.head_dim * 4
    return int(activations + prompt + logits + sampling + tables)


def _too_small(budget_bytes: int, parts: dict[str, int]) -> BudgetError:
    """The error that names the minimum."""
    needs = ", ".join(f"{name.replace('_', ' ')} {format_size(size)}" for name, size in parts.items() if size)
    minimum = -(-sum(parts.values()) // MIB)
    return BudgetError(
        f"the minimum is {minimum}MiB ({needs}); the budget is {format_size(budget_bytes)}: raise --memory "
        f"to at least {minimum}MiB, or lower --context"
    )
