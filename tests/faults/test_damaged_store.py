"""One flipped bit anywhere in a store: refused with the file's name when it is read, never used."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import least_budget
from safetensors.torch import load_file
from tiny import write_tiny
from tokenizers import Tokenizer, models

from subspec import LLM, SamplingParams
from subspec.errors import StoreError, SubspecError
from subspec.store.manifest import FILE_NAME, Manifest
from subspec.store.prepare import prepare

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [5, 9, 17]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
CONTEXT = 64


@pytest.fixture(scope="module", params=["tied", "untied"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("damage")
    model = write_tiny(
        directory / "model", "qwen3", torch.bfloat16, tie_word_embeddings=request.param == "tied"
    )
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(320)}, unk_token="w0"))
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    return prepare(model, store=directory / "store")


def budgets(store: Path) -> dict[str, int]:
    """One that streams every layer, one that streams some, one that keeps everything."""
    least, unit = least_budget(store, context=CONTEXT)
    return {"streamed": least, "mixed": least + unit, "resident": 1 << 30}


def answer(store: Path, memory: int) -> list[int]:
    with LLM(store, memory, context=CONTEXT) as llm:
        return llm.generate(PROMPT, PARAMS).token_ids


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x04
    path.write_bytes(content)


def names(store: Path) -> list[str]:
    return sorted(Manifest.read(store).files)


def needed(store: Path, name: str) -> tuple[int, int]:
    """Bytes of a file that an answer to ``PROMPT`` must read: all of it, but for the embedding."""
    if name == "embedding.exact":
        row = 64 * 2
        return PROMPT[1] * row, (PROMPT[1] + 1) * row
    return 0, (store / name).stat().st_size


@pytest.mark.parametrize("memory", ["streamed", "mixed", "resident"])
def test_every_file_is_checked_before_it_is_used(good: Path, tmp_path: Path, memory: str) -> None:
    budget = budgets(good)[memory]
    assert len(answer(good, budget)) == PARAMS.max_new_tokens
    rng, store = random.Random(memory), tmp_path / "store"
    shutil.copytree(good, store)
    for name in names(good):
        start, stop = needed(good, name)
        flip(store / name, rng.randrange(start, stop))
        with pytest.raises(StoreError, match=rf"{re.escape(name)}.* is damaged.*prepare the model again"):
            answer(store, budget)
        shutil.copyfile(good / name, store / name)
    assert answer(store, budget) == answer(good, budget)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer", "empty"])
def test_a_file_of_another_size_is_named_at_once(good: Path, tmp_path: Path, change: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(good, store)
    for name in names(good):
        content = (store / name).read_bytes()
        if change == "missing":
            (store / name).unlink()
        else:
            (store / name).write_bytes(
                {"shorter": content[:-1], "longer": content + b"x", "empty": b""}[change]
            )
        with pytest.raises(StoreError, match=rf"{re.escape(name)} (is missing|has \d+ bytes)"):
            LLM(store, "16MiB", context=CONTEXT)
        (store / name).write_bytes(content)


def test_a_flipped_bit_of_the_manifest_never_changes_what_runs(good: Path, tmp_path: Path) -> None:
    store, intact = tmp_path / "store", Manifest.read(good)
    store.mkdir()
    path = store / FILE_NAME
    content = (good / FILE_NAME).read_bytes()
    changed = []
    for offset in range(0, len(content), 7):
        path.write_bytes(content)
        flip(path, offset)
        try:
            found = Manifest.read(store)
        except SubspecError:
            continue
        if (found.config, found.files, found.dtype) != (intact.config, intact.files, intact.dtype):
            changed.append(offset)
    assert not changed


def test_damage_in_the_middle_of_a_text_ends_it_and_the_next_one_may_work(good: Path, tmp_path: Path) -> None:
    """A sweep that fails after some tokens is an error; once the disk is well, the text is right again."""
    store = tmp_path / "store"
    shutil.copytree(good, store)
    budget = budgets(good)["streamed"]
    expected = answer(good, budget)
    with LLM(store, budget, context=CONTEXT) as llm:
        texts = llm.stream(PROMPT, PARAMS, mode="plain")
        for _ in range(4):
            next(texts)
        content = (store / "layer-0001.residual").read_bytes()
        with (store / "layer-0001.residual").open("r+b") as file:
            file.truncate(0)
        with pytest.raises(StoreError, match=r"layer-0001\.residual ends at byte 0"):
            list(texts)
        with pytest.raises(StoreError, match=r"layer-0001\.residual ends at byte 0"):
            llm.generate(PROMPT, PARAMS)
        with (store / "layer-0001.residual").open("r+b") as file:
            file.write(content)
        for mode in ("plain", "speculative"):
            assert llm.generate(PROMPT, PARAMS, mode=mode).token_ids == expected


def test_a_failing_device_is_an_error_of_ours(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    real = os.preadv
    with LLM(good, budgets(good)["streamed"], context=CONTEXT) as llm:
        expected = llm.generate(PROMPT, PARAMS).token_ids

        def failing(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(StoreError, match="Input/output error"):
            llm.generate([5, 200, 201], PARAMS)
        monkeypatch.setattr(os, "preadv", real)
        assert llm.generate(PROMPT, PARAMS).token_ids == expected


def test_the_embedding_of_the_checkpoint_and_of_the_store_agree(good: Path) -> None:
    """What the damage tests rely on: the prompt's rows are where ``needed`` looks for them."""
    weight = load_file(good.parent / "model" / "model.safetensors")["model.embed_tokens.weight"]
    row = weight[PROMPT[1]].view(torch.uint8).numpy().tobytes()
    if (good / "embedding.exact").exists():
        start, stop = needed(good, "embedding.exact")
        assert (good / "embedding.exact").read_bytes()[start:stop] == row
