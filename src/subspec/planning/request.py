"""What a user asked for, checked, and filled in where nothing was said.

Knows nothing of sizes: what the answer costs is ``planning.parts``' business.
"""

from dataclasses import dataclass
from typing import Any

from subspec.errors import OptionError
from subspec.models.config import ModelConfig
from subspec.speculation.draft import TreeShape

DEFAULT_CONTEXT = 4096
PREFILL_ROWS = 256
DEFAULT_DRAFT_TEMPERATURE = 0.3


@dataclass(frozen=True)
class Request:
    """What a user asked for; ``None`` leaves the choice to the planner.

    Attributes:
        budget_bytes: bound on everything the engine holds in the fast tier: RAM, or a device's memory.
        context: tokens of prompt and text together.
        depth: levels of the draft tree; ``width``: nodes a level; ``nodes``: nodes verified in a sweep.
        min_reach: probability of reaching the last level below which no further one is drafted.
        draft_temperature: divisor of the draft's scores.  Any of these five pins a fixed tree.
        prefill_rows: prompt rows that go through a layer at once.
        host_bytes: behind a device, bound on what the engine pins in RAM; None: there is no device.
    """

    budget_bytes: int
    context: int | None = None
    depth: int | None = None
    width: int | None = None
    nodes: int | None = None
    min_reach: float | None = None
    draft_temperature: float | None = None
    prefill_rows: int | None = None
    host_bytes: int | None = None

    @property
    def pins_tree(self) -> bool:
        """Whether the tree is fixed."""
        pins = (self.depth, self.width, self.nodes, self.min_reach, self.draft_temperature)
        return any(pin is not None for pin in pins)


def filled_in(request: Request, config: ModelConfig, defaults: TreeShape) -> dict[str, Any]:
    """The request as ``Plan`` fields, with defaults where it leaves the choice.

    Raises:
        OptionError: a wish that cannot be met.
    """

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
    _require(context, depth, width, nodes, rows, temperature, reach)
    return {
        "context": context,
        "adaptive": not request.pins_tree,
        "depth": depth,
        "width": min(width, config.vocab_size),
        "nodes": nodes,
        "min_reach": reach,
        "min_score": defaults.min_score if request.nodes is None else 0.0,
        "prefill_rows": rows,
        "draft_temperature": temperature,
    }


def _require(
    context: int, depth: int, width: int, nodes: int, rows: int, temperature: float, reach: float
) -> None:
    """Raise an ``OptionError`` that names the first wish outside its range."""
    at_least = [
        (context, "--context", 2),
        (depth, "--depth", 1),
        (width, "--width", 1),
        (nodes, "--nodes", 2),
        (rows, "prefill_chunk", 1),
    ]
    for value, name, least in at_least:
        if value < least:
            raise OptionError(f"{name} is {value}: it must be at least {least}")
    if not 0 < temperature < float("inf"):
        raise OptionError(f"--draft-temperature is {temperature}: it must be above 0")
    if not 0 <= reach <= 1:
        raise OptionError(f"--min-reach is {reach}: it must be between 0 and 1")
