"""The text depends on no budget, tree, prompt chunk or kept prefix, and ends where plain decoding ends."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import PLENTY, least_budget, least_device_budgets
from device_subjects import little_staging
from tiny import write_tiny
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from subspec import LLM, SamplingParams
from subspec.errors import OptionError
from subspec.planning.hardware import stored_images

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 800  # a head of several chunks
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 4}
SAMPLINGS = {
    "greedy": SamplingParams(30, ignore_eos=True),
    "sampled": SamplingParams(
        30,
        temperature=0.8,
        top_k=60,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=11,
        ignore_eos=True,
    ),
}


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


def add_tokenizer(directory: Path) -> None:
    """A word for each token, with a space before it: t0, t1, …"""
    backend = Tokenizer(WordLevel({f"Ġt{token}": token for token in range(VOCABULARY)}, unk_token="Ġt0"))
    backend.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Place:
    """A store, and what computes: ``cpu``, or ``emulated``, a device with little RAM and a disk behind it."""

    store: Path
    device: str

    def open(self, memory: str | int | None = None, **options: int) -> LLM:
        """A model; without a budget all is resident on a CPU, and all streams on a device."""
        settings = {"context": 160, "depth": 5, "width": 3, "nodes": 12} | options
        if self.device == "cpu":
            return LLM(self.store, memory or "64MiB", **settings)  # type: ignore[arg-type]
        wishes = {name.replace("prefill_chunk", "prefill_rows"): value for name, value in settings.items()}
        with little_staging():
            vram, ram, unit = least_device_budgets(self.store, **wishes)
            budgets = {"vram": memory or vram, "ram": ram + unit, "device": self.device}
            return LLM(self.store, **budgets, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["qwen2-bf16-cpu", "qwen3-fp32-cpu", "qwen2-bf16-emulated"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    family, dtype, device = request.param.split("-")
    directory = tmp_path_factory.mktemp(request.param)
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    write_tiny(directory / "model", family, torch_dtype, seed=2, **SHAPE)
    add_tokenizer(directory / "model")
    with LLM(directory / "model", "64MiB", store=directory / "store", context=32):
        return Place(directory / "store", device)


@pytest.fixture(scope="module")
def llm(place: Place) -> Iterator[LLM]:
    with place.open() as opened:
        assert (opened.plan.streamed_bytes > 0) == (place.device == "emulated")
        yield opened


@pytest.fixture(scope="module")
def plain(place: Place) -> dict[str, list[int]]:
    """Plain texts after a prompt of 70 tokens, on a CPU."""
    texts = {}
    with Place(place.store, "cpu").open() as llm:
        for name, params in SAMPLINGS.items():
            llm.reset()
            texts[name] = llm.generate(random_prompt(70), params, mode="plain").token_ids
            assert len(set(texts[name])) >= 20
    return texts


# --- memory, trees, chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_the_same_text_for_every_budget(place: Place, plain: dict[str, list[int]], mode: str) -> None:
    behind = {"host_bytes": PLENTY} if place.device == "emulated" else {}
    least, _ = least_budget(place.store, context=160, depth=5, width=3, nodes=12, **behind)
    with place.open("64MiB") as llm:
        needed, images = llm.plan.held_bytes, stored_images(llm.engine.store)
    streamed = []
    for budget in (least, *range(least + 20_000, needed, (needed - least) // 4), needed):
        with place.open(budget) as other:
            streamed.append(other.plan.streamed_bytes)
            for name, params in SAMPLINGS.items():
                other.reset()
                found = other.generate(random_prompt(70), params, mode=mode)
                assert found.token_ids == plain[name], (budget, name)
                assert (found.statistics.streamed_bytes > 0) == (streamed[-1] > 0)
    whole = sum(images.layers) + sum(images.chunks)
    assert streamed[0] == whole, "the least budget must stream everything"
    assert streamed[-1] == 0
    assert any(0 < size < whole for size in streamed)


@pytest.mark.parametrize(
    ("depth", "width", "nodes"), [(1, 1, 2), (1, 8, 9), (9, 1, 10), (6, 4, 25), (6, 4, 5), (7, 2, 3)]
)
def test_the_same_text_for_every_tree(
    place: Place, plain: dict[str, list[int]], depth: int, width: int, nodes: int
) -> None:
    with place.open(depth=depth, width=width, nodes=nodes) as other:
        for name, params in SAMPLINGS.items():
            other.reset()
            assert other.generate(random_prompt(70), params).token_ids == plain[name]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_same_text_for_every_prefill_chunk(place: Place, plain: dict[str, list[int]], chunk: int) -> None:
    with place.open(prefill_chunk=chunk) as other:
        for name, params in SAMPLINGS.items():
            other.reset()
            assert other.generate(random_prompt(70), params).token_ids == plain[name]


# --- kept prefixes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "speculative"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_kept_prefix_changes_nothing(llm: LLM, sampling: str, mode: str) -> None:
    params = SAMPLINGS[sampling]
    first = random_prompt(20, seed=1)
    answer = llm.generate(first, params, mode=mode).token_ids
    for second in (
        first + answer + random_prompt(9, seed=2),  # the next turn of a conversation
        first + answer[:12] + random_prompt(3, seed=3),  # the answer was edited
        first[:8] + random_prompt(30, seed=4),
        first[:1],  # shorter than what is kept
        first,
        first,
    ):
        reused = llm.generate(second, params, mode=mode)
        llm.reset()
        fresh = llm.generate(second, params, mode=mode)
        assert reused.token_ids == fresh.token_ids
        assert fresh.statistics.reused_tokens == 0
        assert reused.statistics.reused_tokens > 0 or len(second) == 1


@pytest.mark.parametrize(("left", "then"), list(itertools.product(["plain", "speculative"], repeat=2)))
def test_an_abandoned_text_changes_nothing(
    llm: LLM, plain: dict[str, list[int]], left: str, then: str
) -> None:
    params, prompt = SAMPLINGS["greedy"], random_prompt(70)
    for pieces in (1, 2, 4):
        llm.reset()
        unfinished = llm.stream(prompt, params, mode=left)
        seen = [token for piece in itertools.islice(unfinished, pieces) for token in piece.token_ids]
        assert seen == plain["greedy"][: len(seen)]
        resumed = llm.generate(prompt + seen + [5], params, mode=then)
        assert resumed.statistics.reused_tokens >= len(prompt) + len(seen) - 1
        llm.reset()
        assert llm.generate(prompt + seen + [5], params, mode=then).token_ids == resumed.token_ids
        assert llm.generate(prompt, params, mode=then).token_ids == plain["greedy"]
        with pytest.raises(OptionError, match="cannot go on"):
            next(unfinished)
        assert llm.generate(prompt, params, mode=then).token_ids == plain["greedy"]


# --- where a text ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_max_new_tokens_cuts_anywhere(llm: LLM, plain: dict[str, list[int]], sampling: str) -> None:
    params = SAMPLINGS[sampling]
    for count in (1, 2, 3, 5, 6, 7, 11, 12, 17, 23, 29):
        shorter = SamplingParams(**(vars(params) | {"max_new_tokens": count}))
        llm.reset()
        found = llm.generate(random_prompt(70), shorter)
        assert (found.token_ids, found.finish_reason) == (plain[sampling][:count], "length")


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_a_full_context(place: Place, plain: dict[str, list[int]], mode: str) -> None:
    for context in (71, 72, 75, 83):
        with place.open(context=context) as other:
            found = other.generate(random_prompt(70), SAMPLINGS["greedy"], mode=mode)
            assert (found.token_ids, found.finish_reason) == (plain["greedy"][: context - 70], "context")
            assert (
                other.generate(random_prompt(70), SAMPLINGS["sampled"], mode=mode).token_ids
                == (plain["sampled"][: context - 70])
            )


def first_places(tokens: list[int]) -> dict[int, int]:
    """Where each token occurs first."""
    return {token: tokens.index(token) for token in dict.fromkeys(tokens)}


@pytest.mark.parametrize("mode", ["plain", "speculative"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_stop_strings_end_a_text_inside_a_path(
    llm: LLM, plain: dict[str, list[int]], sampling: str, mode: str
) -> None:
    text, inside = plain[sampling], 0
    prompt = random_prompt(70)
    for place in range(1, len(text) - 1, 3):
        stop = f" t{text[place]} t{text[place + 1]}"
        params = SamplingParams(**(vars(SAMPLINGS[sampling]) | {"stop": ("never there", stop)}))
        llm.reset()
        found = llm.generate(prompt, params, mode=mode)
        written = "".join(f" t{token}" for token in text)
        assert found.text == written[: written.index(stop)]
        assert found.finish_reason == "stop"
        assert found.token_ids == text[: len(found.token_ids)]
        inside += sum(found.statistics.accepted) + found.statistics.steps + 1 > len(found.token_ids)
        after = prompt + found.token_ids + [9, 8]
        kept = llm.generate(after, SamplingParams(8, ignore_eos=True), mode=mode)
        assert kept.statistics.reused_tokens >= len(prompt) + len(found.token_ids) - 1
        llm.reset()
        assert (
            kept.token_ids == llm.generate(after, SamplingParams(8, ignore_eos=True), mode="plain").token_ids
        )
    assert (inside > 0) == (mode == "speculative")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_end_token_ends_a_text_inside_a_path(tmp_path: Path, sampling: str) -> None:
    params, prompt = SAMPLINGS[sampling], random_prompt(40)
    endless = SamplingParams(**(vars(params) | {"ignore_eos": True}))
    ending = SamplingParams(**(vars(params) | {"ignore_eos": False}))
    directory = write_tiny(tmp_path / "model", "mistral", torch.bfloat16, **SHAPE)
    with LLM(directory, "64MiB", store=tmp_path / "store", context=128) as llm:
        text = llm.generate(prompt, endless, mode="plain").token_ids
    places = first_places(text)
    inside = 0
    for number, ends in enumerate(itertools.pairwise(list(places)[3:18:2])):
        directory = write_tiny(
            tmp_path / f"model-{number}", "mistral", torch.bfloat16, **SHAPE, eos_token_id=list(ends)
        )
        with LLM(
            directory, "64MiB", store=tmp_path / f"store-{number}", context=128, depth=5, width=3
        ) as llm:
            assert llm.generate(prompt, endless).token_ids == text
            llm.reset()
            found = llm.generate(prompt, ending)
            assert (found.token_ids, found.finish_reason) == (text[: places[ends[0]] + 1], "eos")
            inside += sum(found.statistics.accepted) + found.statistics.steps + 1 > len(found.token_ids)
            follow = prompt + found.token_ids + [7, 6]
            kept = llm.generate(follow, endless)
            llm.reset()
            assert kept.token_ids == llm.generate(follow, endless, mode="plain").token_ids
    assert inside > 0, "no text ended inside an accepted path"
