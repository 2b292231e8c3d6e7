"""The public API on tiny models: what it takes, refuses and keeps, and what it says of itself."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import least_budget
from tiny import FAMILIES, write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from subspec import LLM, SamplingParams
from subspec.errors import BudgetError, ContextError, OptionError, StoreError
from subspec.generation import building
from subspec.memory import arena
from subspec.planning.cost import SweepCosts
from subspec.store.manifest import Manifest
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 96
PROMPT = [5, 9, 17, 30]
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def add_tokenizer(model: Path, template: str | None) -> None:
    """Bytes and a few words, all ids below 320."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["one two three four five six seven eight nine ten"] * 2, trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "TokenizersBackend"}
    if template is not None:
        settings["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def build(
    directory: Path, template: str | None = TEMPLATE, *, family: str = "qwen2", tokenizer: bool = True
) -> Path:
    model = write_tiny(directory / "model", family, torch.bfloat16, num_hidden_layers=4)
    if tokenizer:
        add_tokenizer(model, template)
    return prepare(model, store=directory / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(store: Path) -> Iterator[LLM]:
    with LLM(store, streaming_budget(store), context=CONTEXT) as opened:
        yield opened


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """Every test starts without kept keys."""
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").reset()


def streaming_budget(store: Path, resident: int = 0) -> int:
    """A budget for ``resident`` layers beside the minimum."""
    least, unit = least_budget(store, context=CONTEXT)
    return least + resident * unit


# Texts


def test_a_stream_is_the_whole_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPT, TEN)
    llm.reset()
    *pieces, last = llm.stream(PROMPT, TEN)
    assert all(piece.result is None for piece in pieces)
    assert last.result is not None
    assert last.result.token_ids == whole.token_ids
    assert [token for piece in [*pieces, last] for token in piece.token_ids] == whole.token_ids
    assert "".join(piece.text for piece in [*pieces, last]) == whole.text == last.result.text
    assert whole.text
    assert llm.tokenizer.decode(whole.token_ids, skip_special_tokens=True).startswith(whole.text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_no_token_more_than_asked_for(llm: LLM, mode: str, count: int) -> None:
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    result = llm.generate(PROMPT, params, mode=mode)
    assert len(result.token_ids) == count
    assert result.finish_reason == "length"
    assert result.prompt_tokens == len(PROMPT)
    figures = result.statistics
    assert (figures.mode, figures.new_tokens) == (mode, count)
    assert sum(figures.accepted) + figures.steps + 1 >= count
    assert figures.sweeps == 1 + figures.steps == 1 + len(figures.accepted) == 1 + len(figures.drafted)
    if mode == "plain":
        assert figures.steps == count - 1
        assert figures.acceptance_length == (1.0 if count > 1 else 0.0)


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_the_context_ends_a_text(llm: LLM, mode: str) -> None:
    prompt = [7] * (CONTEXT - 5)
    result = llm.generate(prompt, SamplingParams(max_new_tokens=50, ignore_eos=True), mode=mode)
    assert result.finish_reason == "context"
    assert len(result.token_ids) == 5
    exact = llm.generate(prompt, SamplingParams(max_new_tokens=5, ignore_eos=True), mode=mode)
    assert (exact.finish_reason, exact.token_ids) == ("length", result.token_ids)
    longest = llm.generate([7] * (CONTEXT - 1), SamplingParams(max_new_tokens=50, ignore_eos=True), mode=mode)
    assert (longest.finish_reason, len(longest.token_ids)) == ("context", 1)


def test_an_end_token_ends_a_text_also_inside_an_accepted_path(store: Path, tmp_path: Path) -> None:
    """Every token of a text in turn is made the model's end token."""
    with LLM(store, "16MiB", context=CONTEXT) as llm:
        tokens = llm.generate(PROMPT, SamplingParams(max_new_tokens=20, ignore_eos=True)).token_ids
    place = tmp_path / "store"
    shutil.copytree(store, place)
    manifest = Manifest.read(store)
    for end in sorted(set(tokens), key=tokens.index)[2:6]:
        replace(manifest, config={**manifest.config, "eos_token_id": [319, end]}).write(place)
        with LLM(place, "16MiB", context=CONTEXT) as llm:
            for mode in ("plain", "speculative"):
                result = llm.generate(PROMPT, SamplingParams(max_new_tokens=20), mode=mode)
                cut = next((i for i, token in enumerate(tokens) if token in (319, end)), None)
                assert cut is not None
                assert result.token_ids == tokens[: cut + 1]
                assert result.finish_reason == "eos"
                longer = llm.generate([*PROMPT, *result.token_ids, 3], TEN, mode=mode)
                llm.reset()
                assert longer.token_ids == llm.generate([*PROMPT, *result.token_ids, 3], TEN).token_ids


def test_a_stop_string_ends_a_text(llm: LLM) -> None:
    text = llm.generate(PROMPT, SamplingParams(max_new_tokens=30, ignore_eos=True)).text
    stop = text[len(text) // 2 :][:2]
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=(stop,))
    for mode in ("plain", "speculative"):
        result = llm.generate(PROMPT, params, mode=mode)
        assert result.finish_reason == "stop"
        assert result.text == text.split(stop)[0]
        assert len(result.token_ids) < 30


def test_messages_text_and_ids_mean_the_same(llm: LLM) -> None:
    by_ids = llm.generate(llm.tokenizer("<one two>:")["input_ids"], TEN).token_ids
    assert llm.generate([{"role": "user", "content": "one two"}], TEN).token_ids == by_ids
    assert llm.generate("one two", TEN).token_ids == by_ids
    assert llm.generate("<one two>:", TEN, raw=True).token_ids == by_ids
    assert llm.generate("one two", TEN, raw=True).prompt_tokens == len(llm.tokenizer("one two")["input_ids"])


# What is refused


def test_prompts_that_cannot_be_used_are_named(llm: LLM) -> None:
    long = list(range(CONTEXT))
    for prompt, kind, message in [
        ([], OptionError, "the prompt is empty"),
        ([5, 320], OptionError, "token id 320 is out of range: the vocabulary has 320 tokens"),
        ([-1], OptionError, "token id -1 is out of range"),
        (
            long,
            ContextError,
            f"the prompt has {CONTEXT} tokens, the context is {CONTEXT}: shorten it, or raise --context",
        ),
    ]:
        with pytest.raises(kind, match=message):
            llm.stream(prompt, TEN)
    with pytest.raises(OptionError, match="the prompt is empty"):
        llm.generate("", TEN, raw=True)
    with pytest.raises(OptionError, match="mode is 'fast': choose one of speculative, plain"):
        llm.generate(PROMPT, TEN, mode="fast")


@pytest.mark.parametrize(
    "prompt", [[5, 6.5], [5, {"role": "user", "content": "four"}], [torch.tensor(3), "four"]]
)
def test_mixed_prompts_are_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(OptionError):
        llm.stream(prompt, TEN)


def test_options_that_cannot_be_used_are_named(store: Path) -> None:
    for wrong, message in [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"context": 513}, "--context 513: the model's limit is 512"),
        ({"depth": 0}, "--depth is 0"),
        ({"dtype": "float32"}, "was prepared in bfloat16"),
    ]:
        with pytest.raises(OptionError, match=message):
            LLM(store, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"the minimum is \d+MiB"):
        LLM(store, "10KiB")


def test_a_model_without_a_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    with LLM(build(tmp_path, tokenizer=False), "16MiB", context=CONTEXT) as llm:
        assert llm.tokenizer is None
        result = llm.generate(PROMPT, TEN)
        assert (result.text, len(result.token_ids)) == ("", 10)
        with pytest.raises(OptionError, match="no tokenizer: give token ids"):
            llm.generate("hello", TEN)
        with pytest.raises(OptionError, match="no chat template"):
            llm.generate([{"role": "user", "content": "hello"}], TEN)
        with pytest.raises(OptionError, match="stop strings need a tokenizer"):
            llm.generate(PROMPT, SamplingParams(stop=("a",)))


def test_a_model_without_a_template_takes_text_but_no_messages(tmp_path: Path) -> None:
    with LLM(build(tmp_path, template=None), "16MiB", context=CONTEXT) as llm:
        ids = llm.tokenizer("one two")["input_ids"]
        assert llm.generate("one two", TEN).token_ids == llm.generate(ids, TEN).token_ids
        with pytest.raises(OptionError, match="no chat template: give plain text"):
            llm.generate([{"role": "user", "content": "four"}], TEN)


def test_a_template_that_refuses_is_an_error_of_ours(tmp_path: Path) -> None:
    store = build(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    with (
        LLM(store, "16MiB", context=CONTEXT) as llm,
        pytest.raises(OptionError, match="chat template refuses .*roles must alternate"),
    ):
        llm.generate("four", TEN)


# What is kept


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_a_kept_prefix_is_reused_and_changes_nothing(llm: LLM, mode: str) -> None:
    first = llm.generate(PROMPT, TEN, mode=mode)
    assert first.statistics.reused_tokens == 0
    known = PROMPT + first.token_ids
    for prompt, reused in [
        ([*known, 3, 4], len(known) - 1),  # the last committed token has no keys yet
        (PROMPT, len(PROMPT) - 1),  # one row must be computed
        ([*PROMPT[:2], 99, 98], 2),
        ([200, 201], 0),
    ]:
        result = llm.generate(prompt, TEN, mode=mode)
        assert result.statistics.reused_tokens == reused
        llm.reset()
        again = llm.generate(prompt, TEN, mode=mode)
        assert again.statistics.reused_tokens == 0
        assert again.token_ids == result.token_ids
        llm.reset()
        llm.generate(PROMPT, TEN, mode=mode)


@pytest.mark.parametrize("taken", range(4))
@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_an_abandoned_text_leaves_the_model_usable(llm: LLM, mode: str, taken: int) -> None:
    expected = llm.generate(PROMPT, TEN).token_ids
    llm.reset()
    texts = llm.stream(PROMPT, TEN, mode=mode)
    tokens = [token for _ in range(taken) for token in next(texts).token_ids]
    texts.close()  # type: ignore[attr-defined]
    result = llm.generate(PROMPT, TEN, mode=mode)
    assert result.token_ids == expected
    assert result.statistics.reused_tokens == (len(PROMPT) - 1 if taken else 0)
    longer = [*PROMPT, *tokens, 7]
    result = llm.generate(longer, TEN)
    llm.reset()
    assert result.token_ids == llm.generate(longer, TEN).token_ids


def test_a_second_text_ends_the_first(llm: LLM) -> None:
    expected = llm.generate([8, 8], TEN).token_ids
    first, second = llm.stream(PROMPT, TEN), llm.stream([8, 8], TEN)
    next(first)
    tokens = list(next(second).token_ids)
    with pytest.raises(OptionError, match="this text cannot go on: another one was begun"):
        next(first)
    for piece in second:
        tokens += piece.token_ids
    assert tokens == expected


def test_a_closed_model_says_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(store, streaming_budget(store), context=CONTEXT)
    llm.close()
    llm.close()
    with pytest.raises(
        (OptionError, StoreError)
    ):  # two new embedding rows: the pool is asked before the ring
        llm.generate([100, 101, 102], TEN)


# What it says of itself


@pytest.mark.parametrize("resident", [0, 1, 3, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, resident: int | None
) -> None:
    store = build(tmp_path, family=family, tokenizer=False)
    mapped: list[int] = []
    real = arena.place_bytes

    def counted(n_bytes: int, device: torch.device) -> torch.Tensor:
        mapped.append(n_bytes)
        return real(n_bytes, device)

    monkeypatch.setattr(arena, "place_bytes", counted)
    monkeypatch.setattr(building, "measure_costs", lambda _: SweepCosts())  # keep as many as fit
    memory = 1 << 30 if resident is None else streaming_budget(store, resident)
    with LLM(store, memory, context=CONTEXT) as llm:
        held, parts = llm.engine.places.budget.held, llm.plan.parts
        assert held == {name: size for name, size in parts.items() if size}
        assert llm.engine.places.budget.held_bytes == llm.plan.held_bytes <= memory
        assert sum(mapped) == llm.plan.held_bytes - parts["workspace"] - parts["norms_biases"]
        small = sum(tensor.nbytes for tensor in llm.engine._small.values())
        assert small <= parts["norms_biases"]
        result = llm.generate(PROMPT, TEN, mode="plain")
        assert sum(mapped) == llm.plan.held_bytes - parts["workspace"] - parts["norms_biases"]
        assert bool(result.statistics.streamed_bytes) == bool(llm.plan.streamed_bytes)
        if resident is not None:
            assert len(llm.plan.resident_layers) >= resident
            steps, ahead = result.statistics.steps, llm.plan.slots * llm.plan.slot_bytes
            expected = steps * llm.plan.streamed_bytes
            assert abs(result.statistics.streamed_bytes - expected) <= ahead


def test_the_tokens_do_not_depend_on_the_memory_or_the_tree(store: Path) -> None:
    texts = set()
    for memory in (streaming_budget(store, 1), 1 << 30):
        for shape in ({}, {"depth": 2, "width": 1, "nodes": 2}, {"depth": 5, "width": 3, "nodes": 9}):
            for chunk in (None, 3):
                with LLM(store, memory, context=CONTEXT, prefill_chunk=chunk, **shape) as llm:  # type: ignore[arg-type]
                    texts.add(tuple(llm.generate(list(range(10, 30)), TEN).token_ids))
    assert len(texts) == 1


def test_the_description_is_plain_data(llm: LLM) -> None:
    described = llm.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["family"] == "qwen2"
    assert described["dtype"] == "bfloat16"
    assert described["layers"] == 4
    json.dumps(llm.plan.as_dict())
    json.dumps(llm.generate(PROMPT, TEN).statistics.as_dict())
