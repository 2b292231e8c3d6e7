"""What an ``LLM`` is made of: the plan for a request, the engine that runs it, and what drafts there."""

from collections.abc import Callable

from subspec.engine import Engine
from subspec.memory.backend.cuda import CudaBackend
from subspec.memory.backend.threads import ThreadBackend
from subspec.memory.exhausted import exhausted
from subspec.memory.tiers import MemoryBudget
from subspec.planning.hardware import measure_costs, stored_images
from subspec.planning.plan import Plan, Request, make_plan
from subspec.speculation.adaptive import Speculator
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import calibrations
from subspec.speculation.draft import TreeShape
from subspec.speculation.policy import Policy
from subspec.speculation.times import StepTimes
from subspec.store.reader import Store


def planned(store: Store, request: Request) -> Plan:
    """The plan for a store; what this machine can do is measured only where it decides something."""
    small_bytes = store.manifest.files["small.safetensors"].n_bytes
    sizes = store.config, store.dtype.itemsize, small_bytes, request, stored_images(store)
    plan = make_plan(*sizes)
    if plan.device_tier or store.manifest.codec == "raw" or plan.all_plain(store.config.layers):
        return plan  # the trial is of the CPU's kernels: it says nothing of a device's
    return make_plan(*sizes, measure_costs(store))


def built(
    store: Store,
    plan: Plan,
    device: str,
    progress: Callable[[str, int, int], None] | None,
    paranoid: bool,
) -> Engine:
    """The engine that runs a plan on a device; if it cannot be built, nothing stays open."""
    try:
        backend = CudaBackend() if device == "cuda" else ThreadBackend()
        with exhausted(MemoryBudget(plan.budget_bytes, "--vram")):
            return Engine(store, plan, progress, paranoid=paranoid, backend=backend)
    except BaseException:
        store.close()
        raise


def tree(plan: Plan, engine: Engine, learnt: dict[str, dict[str, float]]) -> TreeShape | Speculator | Ahead:
    """What drafts under a plan, from where earlier processes got to.

    Raises:
        DeviceMemoryError: the device has no memory for it; the engine is closed then.
    """
    policy = None
    if plan.adaptive:
        policy = Policy(StepTimes(), width=plan.width, nodes=plan.nodes, depth=plan.depth)
    if plan.device_tier:
        grown_on = engine.cache.keys.device
        try:
            with exhausted(engine.places.budget):
                ahead = Ahead(plan.tree, engine.config.vocab_size, grown_on, calibrations(learnt), policy)
                engine.settle()
        except BaseException:
            engine.close()
            raise
        return ahead
    return plan.tree if policy is None else Speculator(policy, calibrations(learnt), plan.tree_slots)
