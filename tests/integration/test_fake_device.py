"""The whole decoding loop on a CUDA device without values: devices, dtypes, waits, copies, memory.

Everything but the numbers is as on a device: the engine, the streamer from pinned memory and from disk, the
levels, the steps.  What the host reads back is made up by the same tensor code on the CPU.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, device_plan, least_device_budgets
from fake_cuda import FakeCuda, HiddenSyncError
from tiny import write_tiny

from subspec.engine import Engine, places, weights
from subspec.engine.arithmetic import Arithmetic
from subspec.memory.exchange import Exchange, Pending
from subspec.memory.streamer import Streamer
from subspec.models.linear import ExactProduct
from subspec.planning import parts
from subspec.planning import plan as planning
from subspec.planning.plan import Plan
from subspec.speculation import ahead as ahead_module
from subspec.speculation.ahead import Ahead
from subspec.speculation.calibration import calibrations
from subspec.speculation.decode import Commit, decode
from subspec.speculation.levels import Levels, summary_size
from subspec.speculation.policy import Policy
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.times import StepTimes
from subspec.store.prepare import prepare
from subspec.store.reader import Store

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, STAGING = 96, 4 * 8192
PROMPT = list(range(10, 40))
TILED = ExactProduct("device, 16 rows a tile", tiled=True)
FIXED = ExactProduct("torch, 16 rows a call", rows_a_call=16)
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
FILTERED = SamplingParams(
    max_new_tokens=10,
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.02,
    repetition_penalty=1.2,
    ignore_eos=True,
)


class NoRegistrar:
    """There is no driver to lock pages."""

    def register(self, address: int, n_bytes: int) -> int:
        return 0

    def unregister(self, address: int) -> int:
        return 0

    def meaning(self, code: int) -> str:
        return ""


@pytest.fixture(scope="module", params=["residual", "raw"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    write_tiny(directory / "model", "qwen3", torch.bfloat16, num_hidden_layers=3, vocab_size=800)
    return prepare(directory / "model", store=directory / "store", stream=request.param)


@pytest.fixture(autouse=True)
def _small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parts, planning):
        monkeypatch.setattr(module, "STAGING_BYTES", STAGING)
    monkeypatch.setattr(places, "CudaRegistrar", NoRegistrar)


def plan_of(store: Path, placement: str, **wishes: int) -> Plan:
    """A plan that keeps everything, or streams from RAM, from RAM and disk, or from disk alone."""
    vram, ram, _ = least_device_budgets(store, context=CONTEXT, **wishes)
    half = device_plan(store, vram, PLENTY, context=CONTEXT, **wishes).streamed_bytes // 2
    budgets = {
        "resident": (PLENTY, PLENTY),
        "RAM": (vram, PLENTY),
        "RAM and disk": (vram, ram + half),
        "disk": (vram, ram),
    }
    found = device_plan(store, *budgets[placement], context=CONTEXT, **wishes)
    assert (found.disk_bytes > 0) == ("disk" in placement)
    assert bool(found.host_layers) == ("RAM" in placement)
    return found


class Eager(Policy):
    """Drafts two levels a step, and one more in each gap; there are no times to go by."""

    def widen(self, frontier: Sequence[float], scores: Sequence[float], drafting_s: float) -> int:
        return 1 if len(scores) < 2 + self.width else 0

    def widen_in_gap(self, frontier: Sequence[float]) -> int:
        return 1

    def verify(self, scores: Sequence[float], drafting_s: float) -> int:
        return self.nodes


class Device:
    """An engine on the device without values, and what goes over its link.

    Attributes:
        sent, read: bytes of each upload, and of each read; ``waits``: how many of these the host waited for.
    """

    def __init__(
        self, store: Path, plan: Plan, cuda: FakeCuda, product: ExactProduct, patch: pytest.MonkeyPatch
    ) -> None:
        self.cuda = cuda
        self.sent: list[int] = []
        self.read: list[int] = []
        cuda.read_back = self._value
        patch.setattr(weights, "choose_product", lambda *_: product)
        send, begin_read = Exchange.send, Exchange.begin_read

        def sending(exchange: Exchange, target: torch.Tensor, values: torch.Tensor) -> None:
            self.sent.append(values.nbytes)
            send(exchange, target, values)

        def reading(exchange: Exchange, source: torch.Tensor) -> Pending:
            self.read.append(source.nbytes)
            return begin_read(exchange, source)

        patch.setattr(Exchange, "send", sending)
        patch.setattr(Exchange, "begin_read", reading)
        self.engine = Engine(Store(store), plan, backend=cuda.backend)
        luck = random.Random(3)
        patch.setattr(Streamer, "ready", lambda _: luck.random() < 0.5)  # else nothing is ever late here
        self.steps: Any = None
        self.random = torch.Generator().manual_seed(5)
        original = ahead_module._Steps._read

        def noted(steps: Any, logits: torch.Tensor, count: int) -> Any:
            self.steps, self.count = steps, count
            return original(steps, logits, count)

        patch.setattr(ahead_module._Steps, "_read", noted)

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a device could have answered."""
        if self.steps is not None and tensor.shape == (summary_size(self.steps._levels.shape),):
            return self._summary()
        if tensor.dtype.is_floating_point:
            return torch.rand(tensor.shape, generator=self.random).to(tensor.dtype)
        raise AssertionError(f"the host reads {tuple(tensor.shape)} {tensor.dtype}")

    def _summary(self) -> torch.Tensor:
        """A tree of as many levels, grown by the same code on the CPU; the target agrees now and then."""
        steps = self.steps
        shape = steps._levels.shape
        levels = Levels(shape, torch.device("cpu"))
        levels.calibration.copy_(torch.tensor([1.0, 0.0]))
        levels.begin(torch.tensor([steps._root, steps._base]))
        for level in range(steps._drafted):
            rows = 1 if level == 0 else shape.width
            logits = 3 * torch.randn((rows, shape.vocabulary), generator=self.random)
            levels.advance(logits, SamplingParams())
        levels.select(self.count)
        targets = torch.randint(0, shape.vocabulary, (self.count,), generator=self.random)
        tokens = levels.verify.tokens[: self.count]
        targets[:-1] = torch.where(
            torch.rand(self.count - 1, generator=self.random) < 0.7, tokens[1:], targets[:-1]
        )
        levels.summarize(targets)
        return levels.summary

    def run(self, how: str, params: SamplingParams) -> list[Commit]:
        plan, policy = self.engine.plan, None
        if how == "plain":
            passes: Any = self.engine.on_host()
            return list(decode(passes, PROMPT, 0, Sampler(params, PROMPT), None, params.max_new_tokens))
        if how == "policy":
            policy = Eager(StepTimes(), width=plan.width, nodes=plan.nodes, depth=plan.depth)
        vocabulary = self.engine.config.vocab_size
        made = Ahead(plan.tree, vocabulary, self.cuda.backend.device, calibrations({}), policy)
        self.engine.settle()
        passes = self.engine.on_host()
        return list(decode(passes, PROMPT, 0, Sampler(params, PROMPT), made, params.max_new_tokens))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as made:
        yield made


def expected_loads(device: Device) -> tuple[int, int]:
    """How many copies, and of how many bytes, the stream has begun since the engine was built."""
    streamer = device.engine.schedule.streamer
    if streamer is None:
        return 0, 0
    loads = range(streamer._next + len(streamer._slots))
    units = [streamer.units[load % len(streamer.units)] for load in loads]
    requests = [1 if unit.image is not None else -(-unit.n_bytes // (STAGING // 4)) for unit in units]
    return sum(requests), sum(unit.n_bytes for unit in units)


def check_text(device: Device, how: str, params: SamplingParams) -> None:
    """Run a text; devices, dtypes and hidden waits are seen to by the harness, the rest is compared here."""
    plan, streamer, exchange = device.engine.plan, device.engine.schedule.streamer, device.engine.exchange
    assert exchange is not None
    counted = device.cuda.copies.copies
    loaded = len(counted)
    steps = len(device.run(how, params))
    during = [one for one in counted[loaded:] if one.direction != "d2d"]

    # The host waits for one value a step; whatever else it reads comes without stopping anything.
    assert exchange.blocking_reads == steps
    assert all(not one.blocking for one in counted[loaded:])

    # Exactly the expected copies: the stream's units, what is sent and read, and nothing else.
    sent = [one.n_bytes for one in during if one.direction == "h2d" and "exchange" in one.site]
    read = [one.n_bytes for one in during if one.direction == "d2h"]
    assert sent == [n_bytes for n_bytes in device.sent if n_bytes]
    assert read == device.read
    assert len(during) == len(sent) + len(read) + sum("streamer" in one.site for one in during)
    streamed = [one.n_bytes for one in counted if one.direction == "h2d" and "streamer" in one.site]
    assert (len(streamed), sum(streamed)) == expected_loads(device)
    if streamer is not None:
        assert streamer._next == len(streamer.units) * steps
        assert sum(unit.n_bytes for unit in streamer.units) == plan.copied_bytes
        assert streamer.read_bytes == sum(
            streamer.units[load % len(streamer.units)].n_bytes
            for load in range(streamer._next + len(streamer._slots))
            if streamer.units[load % len(streamer.units)].image is None
        )

    # Memory within the plan.
    assert device.cuda.peak_bytes <= plan.held_bytes


@pytest.mark.parametrize(
    ("placement", "how", "params"),
    [
        ("resident", "policy", GREEDY),
        ("RAM", "policy", GREEDY),
        ("RAM and disk", "policy", FILTERED),
        ("disk", "policy", GREEDY),
        ("RAM and disk", "pinned", GREEDY),
        ("RAM", "pinned", FILTERED),
        ("RAM and disk", "plain", GREEDY),
    ],
)
def test_a_text(
    store: Path,
    cuda: FakeCuda,
    placement: str,
    how: str,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(store, placement, depth=4, width=3, nodes=9)
    device = Device(store, plan, cuda, TILED if placement == "RAM" else FIXED, monkeypatch)
    check_text(device, how, params)
    streams = device.engine.schedule.streamer is not None
    assert (device.engine.schedule.gap_s > 0) == (how == "policy" and streams)
    device.engine.close()


def a_hidden_wait(patch: pytest.MonkeyPatch) -> None:
    original = Levels.advance

    def advance(levels: Levels, logits: torch.Tensor, params: SamplingParams) -> None:
        original(levels, logits, params)
        float(levels.reach.sum())

    patch.setattr(Levels, "advance", advance)


def indices_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_uploaded", lambda _, values: values)


def an_unasked_copy(patch: pytest.MonkeyPatch) -> None:
    original = Levels.select

    def select(levels: Levels, count: int) -> None:
        original(levels, count)
        levels.reach.copy_(torch.zeros(levels.reach.shape), non_blocking=True)

    patch.setattr(Levels, "select", select)


def a_second_wait(patch: pytest.MonkeyPatch) -> None:
    original = Exchange.read

    def read(exchange: Exchange, source: torch.Tensor) -> torch.Tensor:
        original(exchange, source)
        return original(exchange, source)

    patch.setattr(Exchange, "read", read)


def memory_beyond_the_plan(patch: pytest.MonkeyPatch) -> None:
    original = Arithmetic.logits

    def logits(arithmetic: Arithmetic, rows: int) -> torch.Tensor:
        return original(arithmetic, rows + 1000)[:rows]

    patch.setattr(Arithmetic, "logits", logits)


def a_unit_streamed_twice(patch: pytest.MonkeyPatch) -> None:
    original = Streamer._start

    def start(streamer: Streamer, number: int) -> object:
        original(streamer, number)
        return original(streamer, number)

    patch.setattr(Streamer, "_start", start)


@pytest.mark.parametrize(
    "mutant",
    [
        a_hidden_wait,
        indices_on_the_host,
        an_unasked_copy,
        a_second_wait,
        memory_beyond_the_plan,
        a_unit_streamed_twice,
    ],
)
def test_what_goes_wrong_is_noticed(
    store: Path, cuda: FakeCuda, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.parent.name.startswith("raw"):
        pytest.skip("once is enough")
    device = Device(
        store, plan_of(store, "RAM and disk", depth=4, width=3, nodes=9), cuda, FIXED, monkeypatch
    )
    check_text(device, "policy", SamplingParams(max_new_tokens=2, ignore_eos=True))
    mutant(monkeypatch)
    with pytest.raises((AssertionError, HiddenSyncError, NotImplementedError, RuntimeError, ValueError)):
        check_text(device, "policy", SamplingParams(max_new_tokens=4, ignore_eos=True))
    device.engine.close()
