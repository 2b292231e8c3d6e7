"""Choose what a memory budget is spent on, and explain it.

The minimum is what every run needs: substitutes, norms and biases, KV cache, workspace, and the slots.
What is left keeps layers and chunks of the output head resident, spread evenly over a sweep.  Where a store
keeps residuals, a resident unit may stay as it is streamed, and be rebuilt every sweep, or as plain weights,
twice as large: ``planning.cost`` tells which makes the shorter sweep.

With a device there are three tiers, VRAM, RAM and disk, and two budgets: what does not stay in VRAM is
streamed, and as much of that as a second budget holds rests in RAM; the rest is read from disk every sweep.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from subspec.errors import BudgetError
from subspec.memory.tiers import MIB, format_size, page_aligned
from subspec.models.config import ModelConfig
from subspec.planning.cost import Images, Residents, SweepCosts, choose_residents, choose_resting
from subspec.planning.parts import STAGING_BYTES, cache_rows, fast_parts, host_parts, slot_count, tree_slots
from subspec.planning.request import Request, filled_in
from subspec.speculation.draft import TreeShape
from subspec.store.layout import head_chunks, layer_bytes

__all__ = ["Plan", "Request", "make_plan", "plain_images"]

# How large a tree may become; of a tree that is pinned in part, the rest.  A sweep that streams costs as
# much as dozens of draft levels.  Raw, it hides the products of many rows behind the link; residuals are
# there in less than half the time, and a row must be worth its products.  A sweep over plain weights in
# memory costs a few levels.
STREAMED_TREE = TreeShape(depth=40, width=6, nodes=128, min_reach=0.05)
REBUILT_TREE = TreeShape(depth=40, width=6, nodes=64, min_reach=0.2, min_score=0.04)
RESIDENT_TREE = TreeShape(depth=12, width=4, nodes=24, min_reach=0.5)
# Trees that grow as they pay, and in a sweep's gaps, are wider, and deeper where whole weights stream.
ROOMY_STREAMED_TREE = replace(STREAMED_TREE, depth=56, width=12)
ROOMY_REBUILT_TREE = replace(REBUILT_TREE, width=12)
MOSTLY_PLAIN = 0.9  # share of the weights above which neither streaming nor rebuilding decides a sweep's time


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
        budget_bytes: the bound on the fast tier: RAM, or a device's memory.
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
        streamed_bytes: what one sweep brings through the slots.
        slots: how many; 0 if nothing is streamed.
        slot_bytes: of one slot.
        cache_rows: embedding rows kept; none on a device, which gathers them from RAM.
        parts: bytes by purpose; their sum is what the engine holds in the fast tier.
        disk_bytes: of the streamed ones, those that a sweep reads from disk; without a device, all of them.
        host_budget_bytes: behind a device, the bound on what is pinned in RAM; None: there is no device.
        host_layers: streamed layers that rest in RAM; ``host_chunks``: streamed head chunks, by number.
        host_parts: like ``parts``, in RAM behind a device; ``staging`` is what units from disk pass through.
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
    disk_bytes: int
    host_budget_bytes: int | None = None
    host_layers: tuple[int, ...] = ()
    host_chunks: tuple[int, ...] = ()
    host_parts: dict[str, int] = field(default_factory=dict)

    @property
    def device_tier(self) -> bool:
        """Whether the fast tier is a device's memory, with RAM behind it."""
        return self.host_budget_bytes is not None

    @property
    def held_bytes(self) -> int:
        """Bytes the engine holds in the fast tier under this plan."""
        return sum(self.parts.values())

    @property
    def host_held_bytes(self) -> int:
        """Bytes the engine pins in RAM behind a device."""
        return sum(self.host_parts.values())

    @property
    def budgets(self) -> str:
        """The budget, or both of them, in a few words."""
        if self.host_budget_bytes is None:
            return format_size(self.budget_bytes)
        return f"{format_size(self.budget_bytes)} VRAM, {format_size(self.host_budget_bytes)} RAM"

    @property
    def copied_bytes(self) -> int:
        """What one sweep copies over the device's link: all that is streamed; 0 without a device."""
        return self.streamed_bytes if self.device_tier else 0

    @property
    def tree(self) -> TreeShape:
        """The draft tree."""
        return TreeShape(self.depth, self.width, self.nodes, self.min_reach, self.min_score)

    @property
    def tree_slots(self) -> int:
        """Slots of the KV cache that the tree may use, beside the context's; a device's shadows come last."""
        return tree_slots(self.tree, device=self.device_tier)

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
        derived = ("held_bytes", "host_held_bytes", "copied_bytes", "device_tier")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def explain(self) -> str:
        """The plan in a few lines for people."""
        if self.host_budget_bytes is None:
            lines = _spent("budget", self.budget_bytes, self.parts)
        else:
            lines = _spent("VRAM: budget", self.budget_bytes, self.parts)
            lines += _spent("RAM: budget", self.host_budget_bytes, self.host_parts)
        streamed = f"streamed a sweep: {format_size(self.streamed_bytes)} through {self.slots} slots"
        lines.append(
            f"resident: {len(self.resident_layers)} layers, {self.resident_chunks} head chunks "
            f"({len(self.plain_layers)} and {self.plain_chunks} as plain weights); {streamed}"
        )
        if self.device_tier:
            lines.append(
                f"in RAM: {len(self.host_layers)} layers, {len(self.host_chunks)} head chunks; "
                f"read from disk a sweep: {format_size(self.disk_bytes)}"
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
    if request.pins_tree:
        tree = REBUILT_TREE if images.rebuilt else STREAMED_TREE
    else:
        tree = ROOMY_REBUILT_TREE if images.rebuilt else ROOMY_STREAMED_TREE
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
    wishes, device = filled_in(request, config, defaults), request.host_bytes is not None
    parts = fast_parts(config, itemsize, small_bytes, wishes, images, device=device)
    host = host_parts(config, itemsize, wishes) if device else {}
    spare = request.budget_bytes - sum(parts.values())
    slot_bytes = max(*images.layers, *images.chunks)
    slots = slot_count(parts, slot_bytes, device=device)
    room = None if request.host_bytes is None else max(request.host_bytes - sum(host.values()), 0)
    held = choose_residents(images, spare, slots * slot_bytes, costs, room)
    if held is None:
        least = min(slots * slot_bytes, sum(images.layers) + sum(images.chunks))
        option = "--vram" if device else "--memory"
        needed = {**parts, "slots": least}
        helps = sum(needed.values()) - parts["kv_cache"] < request.budget_bytes
        raise _too_small(request.budget_bytes, needed, option, ", or lower --context" if helps else "")
    streamed = held.streamed_bytes(images)
    slots, slot_bytes = (slots, slot_bytes) if streamed else (0, 0)
    return Plan(
        budget_bytes=request.budget_bytes,
        resident_layers=held.layers,
        resident_chunks=held.chunks,
        plain_layers=held.plain_layers,
        plain_chunks=held.plain_chunks,
        streamed_bytes=streamed,
        slots=slots,
        slot_bytes=slot_bytes,
        cache_rows=0 if device else cache_rows(config, itemsize),
        parts={**parts, "slots": slots * slot_bytes, "resident": held.held_bytes(images)},
        **_behind(request.host_bytes, host, images, held),
        **wishes,
    )


def _behind(
    budget_bytes: int | None, parts: dict[str, int], images: Images, held: Residents
) -> dict[str, Any]:
    """The ``Plan`` fields of the tiers behind the fast one.

    Args:
        budget_bytes: of RAM; None: the fast tier is RAM.
        parts: what every run holds in it.
        images: the units.
        held: those that stay in VRAM.

    Raises:
        BudgetError: RAM has no room for the staging buffers, nor for all that is streamed.
    """
    streamed = held.streamed_bytes(images)
    if budget_bytes is None:
        return {"disk_bytes": streamed}
    room = budget_bytes - sum(parts.values())
    staging = 0 if streamed <= room else STAGING_BYTES
    if room < min(streamed, STAGING_BYTES):
        needed = {**parts, "staging": min(streamed, STAGING_BYTES)}
        otherwise = ", or raise --vram so that less is streamed" if streamed else ""
        raise _too_small(budget_bytes, needed, "--ram", otherwise)
    resting = choose_resting(images, held, room - staging)
    resting_bytes = resting.held_bytes(images)
    return {
        "disk_bytes": streamed - resting_bytes,
        "host_budget_bytes": budget_bytes,
        "host_layers": resting.layers,
        "host_chunks": resting.chunks,
        "host_parts": {**parts, "staging": staging, "images": resting_bytes},
    }


def _spent(title: str, budget_bytes: int, parts: dict[str, int]) -> list[str]:
    """A budget and what it is spent on, in lines for people."""
    used = sum(parts.values())
    lines = [f"{title} {format_size(budget_bytes)}, of which {format_size(used)} is used:"]
    return lines + [
        f"  {name.replace('_', ' '):<18} {format_size(size):>11}" for name, size in parts.items() if size
    ]


def _too_small(budget_bytes: int, parts: dict[str, int], option: str, otherwise: str = "") -> BudgetError:
    """The error that names the minimum, the option that raises the budget, and what else would help."""
    needs = ", ".join(f"{name.replace('_', ' ')} {format_size(size)}" for name, size in parts.items() if size)
    minimum = -(-sum(parts.values()) // MIB)
    return BudgetError(
        f"the minimum is {minimum}MiB ({needs}); the budget is {format_size(budget_bytes)}: raise {option} "
        f"to at least {minimum}MiB{otherwise}"
    )
