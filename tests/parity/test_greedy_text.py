"""Greedy text of a real model in fp32 is that of ``transformers.generate`` over the same weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from subspec import LLM, SamplingParams
from subspec.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
PROMPTS = (
    "Name three rivers and say where each of them ends.",
    "Why do cats sleep so much?",
    "Write two sentences about a clock that runs backwards.",
)


@pytest.fixture(scope="module")
def llm(demo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = tmp_path_factory.mktemp("demo")
    with LLM(demo_file, "4GiB", store=directory / "store", dtype="float32", context=256, depth=8) as opened:
        yield opened
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def theirs(demo_file: Path) -> Any:
    with open_checkpoint(demo_file, torch.float32) as checkpoint:
        config = AutoConfig.for_model(**checkpoint.config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32, attn_implementation="eager"
            )
        model.to_empty(device="cpu")
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    absent, surplus = model.load_state_dict(weights, strict=False)
    assert not surplus
    assert set(absent) <= {"lm_head.weight"}
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no weight: made anew
    model.generation_config.eos_token_id = None  # both go on after an end token
    model.eval()
    return model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text(llm: LLM, theirs: Any, prompt: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        whole = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    found = llm.generate(messages, SamplingParams(NEW_TOKENS, ignore_eos=True))
    assert found.token_ids == whole[0, len(ids) :].tolist()
