"""Prompts in, token ids out: chat templates, raw text, or ids as they are."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from subspec.errors import OptionError

Prompt = str | Sequence[dict[str, str]] | Sequence[int]


def load_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer in a directory; None if it holds no tokenizer."""
    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def encode(tokenizer: Any, prompt: Prompt, vocabulary: int, *, raw: bool) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: a transformers tokenizer or None.
        prompt: a user's message (or plain text with ``raw``), a list of messages, or token ids.
        vocabulary: V; ids must be below.
        raw: take a string as it is, without the chat template.

    Raises:
        OptionError: an empty prompt, ids out of range, or no tokenizer or template for what is given.
    """
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt, raw=raw)
    else:
        items = list(prompt)
        messages = [dict(item) for item in items if isinstance(item, Mapping)]
        ids = [int(item) for item in items if isinstance(item, Integral)]
        if max(len(messages), len(ids)) < len(items):
            raise OptionError(
                "a prompt is a string, a list of messages, or a list of token ids, not a mixture"
            )
        if messages:
            ids = _apply_template(tokenizer, messages)
    if not ids:
        raise OptionError("the prompt is empty: give at least one token")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise OptionError(f"token id {wrong} is out of range: the vocabulary has {vocabulary} tokens")
    return ids


def _encode_text(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    """Ids of a string: through the chat template if there is one and ``raw`` is False."""
    if tokenizer is None:
        raise OptionError("this model has no tokenizer: give token ids instead of text")
    if raw or not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    return _apply_template(tokenizer, [{"role": "user", "content": text}])


def _apply_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, ready for the assistant's answer."""
    if tokenizer is None or not tokenizer.chat_template:
        raise OptionError("this model has no chat template: give plain text (raw=True, --raw) or token ids")
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except (TemplateError, KeyError, TypeError) as error:
        raise OptionError(f"the model's chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])
