"""What a budget is spent on: within it, monotone, and with a minimum that is one."""

import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config

from subspec.errors import BudgetError, OptionError
from subspec.memory.tiers import MIB, page_aligned
from subspec.models.config import ModelConfig
from subspec.planning.plan import Plan, Request, make_plan
from subspec.store.layout import head_chunks, layer_bytes, layer_matrices
from subspec.substitute.layout import tile_bytes

SMALL_BYTES = 5000
HUGE = 1 << 50
relaxed = settings(deadline=None, max_examples=60)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config("qwen2", **changes))


BIG = config(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.sampled_from([2, 4, 6]))
    sizes = {
        "hidden_size": 16 * draw(st.integers(2, 40)),
        "intermediate_size": 16 * draw(st.integers(2, 80)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads])),
        "head_dim": draw(st.sampled_from([16, 32, 64])),
        "vocab_size": draw(st.integers(20, 40000)),
        "max_position_embeddings": draw(st.integers(32, 8192)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    assume(heads % sizes["num_key_value_heads"] == 0)
    return ModelConfig.from_dict(tiny_config(draw(st.sampled_from(FAMILIES)), **sizes))


def plan(model: ModelConfig, budget: int = HUGE, itemsize: int = 2, **wishes: Any) -> Plan:
    return make_plan(model, itemsize, SMALL_BYTES, Request(budget, **wishes))


def minimum_mib(model: ModelConfig, itemsize: int = 2, **wishes: Any) -> int:
    """What the error of a hopeless budget says."""
    with pytest.raises(BudgetError, match="raise --memory to at least") as caught:
        plan(model, 1, itemsize, **wishes)
    found = re.findall(r"(\d+)MiB", str(caught.value).rpartition("at least")[2])
    return int(found[0])


def exact_bytes(model: ModelConfig, itemsize: int) -> int:
    layers = model.layers * page_aligned(layer_bytes(model, itemsize)[0])
    return layers + sum(chunk_bytes(model, itemsize))


def chunk_bytes(model: ModelConfig, itemsize: int) -> list[int]:
    chunks = head_chunks(model, itemsize)
    return [page_aligned((chunk.stop - chunk.start) * model.hidden_size * itemsize) for chunk in chunks]


@relaxed
@given(models(), st.sampled_from([2, 4]), st.integers(0, 200))
def test_the_sum_of_the_parts_never_exceeds_the_budget(
    model: ModelConfig, itemsize: int, percent: int
) -> None:
    least, whole = minimum_mib(model, itemsize) * MIB, plan(model, itemsize=itemsize).held_bytes
    made = plan(model, least + (max(whole - least, 0) * percent) // 100, itemsize)
    assert made.held_bytes == sum(made.parts.values()) <= made.budget_bytes
    assert all(size >= 0 for size in made.parts.values())
    assert made.streamed_bytes + made.parts["resident"] == exact_bytes(model, itemsize)
    assert len(set(made.resident_layers)) == len(made.resident_layers)
    assert all(0 <= index < model.layers for index in made.resident_layers)
    assert 0 <= made.resident_chunks <= len(head_chunks(model, itemsize))
    if made.streamed_bytes:
        assert made.slots >= 2
        assert made.slot_bytes >= max(layer_bytes(model, itemsize)[0], *chunk_bytes(model, itemsize))
    else:
        assert made.slots == made.slot_bytes == made.parts["slots"] == 0
    held = (made.slots * made.slot_bytes, made.parts["resident"])
    assert held == (made.parts["slots"], exact_bytes(model, itemsize) - made.streamed_bytes)


@relaxed
@given(models(), st.lists(st.integers(0, 150), min_size=2, max_size=12))
def test_more_memory_never_streams_more(model: ModelConfig, percents: list[int]) -> None:
    tree = {"depth": 4, "width": 2, "nodes": 5}  # the tree chosen by itself may grow with the budget
    least, whole = minimum_mib(model, **tree) * MIB, plan(model, **tree).held_bytes
    budgets = sorted(least + max(whole - least, 0) * percent // 100 for percent in percents)
    streamed = [plan(model, budget, **tree).streamed_bytes for budget in budgets]
    assert streamed == sorted(streamed, reverse=True)


def test_more_memory_never_streams_more_byte_for_byte_around_every_change() -> None:
    model, tree = config(num_hidden_layers=3), {"depth": 4, "width": 2, "nodes": 5}
    whole = plan(model, **tree).held_bytes
    streamed, budget = [], whole + 3
    while True:
        try:
            streamed.append(plan(model, budget, **tree).streamed_bytes)
        except BudgetError:
            break
        budget -= 499
    assert streamed[0] == 0
    assert streamed[-1] > 0
    assert streamed == sorted(streamed)


@relaxed
@given(models(), st.sampled_from([2, 4]))
def test_the_minimum_in_the_error_works_and_less_does_not(model: ModelConfig, itemsize: int) -> None:
    layer, chunks = page_aligned(layer_bytes(model, itemsize)[0]), chunk_bytes(model, itemsize)
    assume(exact_bytes(model, itemsize) >= 2 * max(layer, *chunks))
    least = minimum_mib(model, itemsize)
    plan(model, least * MIB, itemsize)
    with pytest.raises(BudgetError, match=f"at least {least}MiB"):
        plan(model, (least - 1) * MIB, itemsize)


def test_the_minimum_of_a_model_below_two_slots_is_the_model() -> None:
    model = config(
        num_hidden_layers=1, hidden_size=1024, intermediate_size=4096, vocab_size=1024, head_dim=64
    )
    assert exact_bytes(model, 2) < 2 * layer_bytes(model, 2)[0]
    with pytest.raises(BudgetError):
        plan(model, (minimum_mib(model) - 1) * MIB)


def test_the_minimum_of_a_real_model_is_what_its_parts_say() -> None:
    least = minimum_mib(BIG)
    made = plan(BIG, least * MIB)
    assert made.resident_layers == ()
    assert made.streamed_bytes == exact_bytes(BIG, 2)
    assert least * MIB - made.held_bytes < MIB
    substitutes = BIG.layers * sum(tile_bytes(matrix.n, matrix.k) for matrix in layer_matrices(BIG))
    substitutes += tile_bytes(BIG.vocab_size, BIG.hidden_size)
    assert made.parts["substitutes"] >= substitutes
    assert made.parts["substitutes"] - substitutes <= (BIG.layers + 1) * 4096
    assert minimum_mib(BIG, context=1024) < least < minimum_mib(BIG, context=16384)


def test_a_budget_for_everything_streams_nothing() -> None:
    tree = {"depth": 4, "width": 2, "nodes": 5}
    made = plan(BIG, **tree)
    assert made.streamed_bytes == made.slots == 0
    assert made.resident_layers == tuple(range(BIG.layers))
    assert plan(BIG, made.held_bytes, **tree).streamed_bytes == 0
    assert plan(BIG, made.held_bytes - 1, **tree).streamed_bytes > 0


def test_what_is_held_without_streaming_is_budget_enough_for_it() -> None:
    assert plan(BIG, plan(BIG).held_bytes).streamed_bytes == 0


def test_what_is_resident_is_spread_over_the_sweep_and_leaves_no_room() -> None:
    tree = {"depth": 4, "width": 2, "nodes": 5}
    least = minimum_mib(BIG, **tree) * MIB
    layer, chunks = page_aligned(layer_bytes(BIG, 2)[0]), chunk_bytes(BIG, 2)
    for count in (1, 2, 7, 14, 20, 27):
        made = plan(BIG, least + count * layer, **tree)
        gaps = [b - a for a, b in zip(made.resident_layers, made.resident_layers[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert made.budget_bytes - made.held_bytes < min(layer, *chunks)
        share = len(made.resident_layers) / BIG.layers
        assert abs(share - made.resident_chunks / len(chunks)) < 2 / len(chunks)


@relaxed
@given(
    st.integers(2, 2048), st.integers(1, 64), st.integers(1, 16), st.integers(2, 200), st.integers(1, 2048)
)
def test_wishes_are_met_and_their_cost_is_in_the_plan(
    context: int, depth: int, width: int, nodes: int, rows: int
) -> None:
    model = config(max_position_embeddings=2048)
    made = plan(model, context=context, depth=depth, width=width, nodes=nodes, prefill_rows=rows)
    assert (made.context, made.depth, made.width) == (context, depth, width)
    assert (made.nodes, made.prefill_rows) == (nodes, rows)
    assert made.cache_slots >= context + 1 + depth * width
    cache = 2 * model.layers * model.kv_heads * model.head_dim * 2 * made.cache_slots
    assert made.parts["kv_cache"] >= cache
    more = plan(model, context=context, depth=depth + 1, width=width, nodes=nodes + 1, prefill_rows=rows + 1)
    assert more.held_bytes >= made.held_bytes


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"context": 513}, "--context 513: the model's limit is 512"),
        ({"context": 1}, "--context is 1: it must be at least 2"),
        ({"context": -5}, "--context is -5: it must be at least 2"),
        ({"depth": 0}, "--depth is 0: it must be at least 1"),
        ({"width": 0}, "--width is 0: it must be at least 1"),
        ({"nodes": 1}, "--nodes is 1: it must be at least 2"),
        ({"prefill_rows": -1}, "is -1: it must be at least 1"),
        ({"draft_temperature": 0.0}, "--draft-temperature is 0.0: it must be above 0"),
        ({"draft_temperature": -1.0}, "--draft-temperature is -1.0: it must be above 0"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        plan(config(), **wishes)


@pytest.mark.parametrize(
    "wishes",
    [{"context": 0}, {"prefill_rows": 0}, {"draft_temperature": float("nan")}],
    ids=["context", "rows", "temperature"],
)
def test_nought_is_no_default(wishes: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        plan(config(), **wishes)


def test_nodes_that_a_tree_cannot_have_cost_nothing() -> None:
    most = plan(BIG, depth=4, width=8, nodes=33)
    assert plan(BIG, depth=4, width=8, nodes=1000).parts == most.parts
    assert plan(BIG, depth=4, width=8, nodes=32).parts["workspace"] < most.parts["workspace"]


def test_defaults_follow_the_model() -> None:
    assert plan(config()).context == 512
    assert plan(BIG).context == 4096
    assert plan(config(vocab_size=3, eos_token_id=2), width=8).width == 3
    assert plan(config(), depth=1, width=2).nodes == 3


def test_the_plan_explains_itself_in_numbers() -> None:
    least = minimum_mib(BIG)
    made = plan(BIG, (least + 100) * MIB)
    text = made.explain()
    assert f"{len(made.resident_layers)} layers" in text
    assert f"depth {made.depth}, width {made.width}, {made.nodes} nodes" in text
    assert "substitutes" in text
    plain = made.as_dict()
    assert plain["held_bytes"] == made.held_bytes
    assert plain["parts"] == made.parts


def test_the_error_names_the_parts_and_the_remedies() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(BIG, 100 * MIB)
    for word in ("substitutes", "kv cache", "slots", "workspace", "100.00MiB", "--memory"):
        assert word in str(caught.value)
    assert "--context" not in str(caught.value), "no context is short enough"
    with pytest.raises(BudgetError, match="or lower --context"):
        plan(BIG, 1150 * MIB)
