"""Text from tokens: complete characters only, nothing taken back, stop strings found across tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from subspec.generation.text import TextStream

CORPUS = [
    "the quick brown fox",
    "Ärger über Öl",
    "日本語のテキスト",
    "naïve café 😀😃 family 👨‍👩‍👧",
    "a\nb\n\n###\n",
    "aaabaaab",
]
END = "<|end|>"
relaxed = settings(deadline=None, max_examples=150)


def byte_level() -> Tokenizer:
    """Bytes, and merges of a few texts, so that tokens hold parts of characters and of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Words with a mark for the space before them, and every byte: as sentencepiece models have it."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁fox", "a", "b", "é", "日"]
    tokenizer = Tokenizer(
        models.BPE(dict(zip(pieces, range(len(pieces)), strict=True)), [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


BYTES, PIECES = byte_level(), byte_fallback()


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def wrapped(tokenizer: Tokenizer) -> Any:
    """As a transformers tokenizer holds it."""
    return SimpleNamespace(backend_tokenizer=tokenizer)


def feed(
    ids: list[int], stop: tuple[str, ...] = (), tokenizer: Tokenizer = BYTES
) -> tuple[TextStream, list[str]]:
    """The stream after all tokens and its end, and the pieces; what is shown is never taken back."""
    stream, pieces = TextStream(wrapped(tokenizer), stop), []
    for token in ids:
        pieces.append(stream.feed(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    if not stream.stopped:
        pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return stream, pieces


texts = st.text(
    st.sampled_from([*"ab#\n é日語😀👨👩\u200d", "\u0301"])
    | st.characters(codec="utf-8", exclude_characters="\ufffd"),
    max_size=25,
)


@relaxed
@given(texts)
def test_the_pieces_are_the_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    stream, pieces = feed(ids)
    assert stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert not stream.stopped


@relaxed
@given(texts, st.integers(0, 40))
def test_a_text_cut_anywhere_is_whole_characters(text: str, cut: int) -> None:
    ids = BYTES.encode(text).ids[:cut]
    stream, _ = feed(ids)
    assert text.startswith(stream.text)
    assert "\ufffd" not in stream.text
    assert stream.text == BYTES.decode(ids).rstrip("\ufffd")


@relaxed
@given(texts, st.lists(st.text("ab#\n é日😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_a_stop_string_and_holds_none(text: str, stops: list[str]) -> None:
    stream, _ = feed(BYTES.encode(text).ids, tuple(stops))
    starts = {place for stop in stops for place in range(len(text)) if text.startswith(stop, place)}
    assert stream.stopped == bool(starts)
    if not starts:
        assert stream.text == text
        return
    assert not any(stop in stream.text for stop in stops)
    assert text.startswith(stream.text)
    assert len(stream.text) in starts


@relaxed
@given(texts, st.text("ab# é", min_size=1, max_size=4))
def test_one_stop_string_is_found_where_it_first_occurs(text: str, stop: str) -> None:
    stream, _ = feed(BYTES.encode(text).ids, (stop,))
    assert stream.text == text.split(stop)[0]


@relaxed
@given(texts, st.text("ab# é", min_size=1, max_size=5))
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stop: str) -> None:
    stream, ids = TextStream(wrapped(BYTES), (stop,)), BYTES.encode(text).ids
    for count, token in enumerate(ids, start=1):
        stream.feed(token)
        known = BYTES.decode(ids[:count])
        if stream.stopped:
            break
        if not known.endswith("\ufffd"):  # else the last token holds a part of a character, and waits whole
            held = known[len(stream.text) :]
            assert stop.startswith(held)
            assert held != stop


def test_a_stop_string_may_begin_again_inside_itself() -> None:
    ids = [token for letter in "xaaab" for token in BYTES.encode(letter).ids]
    assert feed(ids, ("aab",))[0].text == "xa"
    assert feed(ids, ("aac",))[0].text == "xaaab"


def test_after_a_stop_nothing_comes() -> None:
    stream, _ = feed(BYTES.encode("one two").ids, ("two",))
    assert stream.feed(BYTES.encode("x").ids[0]) == ""
    assert stream.finish() == ""
    assert stream.text == "one "


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    end, letter = token_id(tokenizer, END), token_id(tokenizer, "a")
    assert feed([letter, end, letter, end], tokenizer=tokenizer)[0].text == "aa"


def test_a_model_without_a_tokenizer_has_no_text() -> None:
    stream = TextStream(None, ())
    assert [stream.feed(token) for token in (1, 2, 3)] == ["", "", ""]
    assert stream.finish() == stream.text == ""


@relaxed
@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=12))
def test_any_tokens_at_all_give_some_text(ids: list[int]) -> None:
    """A model may emit bytes that are no UTF-8."""
    stream, _ = feed(ids, ("zz",))
    assert BYTES.decode(ids).startswith(stream.text)


@pytest.mark.parametrize("first", ["<0x0A>", "<0x61>"])
def test_broken_bytes_after_a_shown_one_do_not_end_the_text(first: str) -> None:
    ids = [token_id(PIECES, token) for token in ["a", first, "<0x80>", "▁fox", "b"]]
    assert feed(ids, tokenizer=PIECES)[0].text.endswith(" foxb")


@relaxed
@given(st.lists(st.sampled_from(["▁the", "▁fox", "a", "b", "é", "日", "▁"]), max_size=12))
def test_words_keep_their_spaces(pieces: list[str]) -> None:
    ids = [token_id(PIECES, piece) for piece in pieces]
    assert feed(ids, tokenizer=PIECES)[0].text == PIECES.decode(ids)
