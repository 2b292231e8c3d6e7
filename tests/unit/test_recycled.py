"""Guesses of what follows, against a search by definition."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspec.speculation.recycled import CONTEXT, Recycled


def silent(tokens: Sequence[int]) -> list[float]:
    """No noise."""
    return [0.0] * len(tokens)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=CONTEXT + 1))
def test_a_guess_is_what_last_followed_the_longest_known_context(text: list[int], context: list[int]) -> None:
    found = Recycled(text).guess(context, silent)
    for length in range(min(CONTEXT, len(context)), 0, -1):
        ends = [i for i in range(length, len(text)) if text[i - length : i] == context[-length:]]
        if ends:
            assert found is not None
            assert (found.token, found.kind) == (text[ends[-1]], CONTEXT - length)
            return
    assert found is None


def test_what_drafts_say_is_learnt_too_and_the_text_has_the_last_word() -> None:
    recycled = Recycled([1, 2, 3])
    recycled.learn([1, 2], [9], [0.0])
    assert recycled.guess([7, 2], silent) == recycled.guess([2], silent)
    found = recycled.guess([1, 2], silent)
    assert found is not None
    assert found.token == 9
    recycled.extend([1, 2, 5])
    found = recycled.guess([1, 2], silent)
    assert found is not None
    assert found.token == 5
    assert recycled.tail == [1, 2, 5]


def test_the_contexts_that_nothing_was_learnt_of_for_longest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subspec.speculation.recycled.MOST_CONTEXTS", 100)
    recycled = Recycled([1, 2])
    for token in range(1000):
        recycled.learn([token], [token + 1], [0.0])
        recycled.learn([7], [8], [0.0])
    assert len(recycled._after) == 100
    found = [token for token in range(1000) if recycled.guess([token], silent) is not None]
    assert found == [7, *range(901, 1000)]


def test_where_tokens_are_drawn_the_noise_of_the_place_chooses_among_the_candidates() -> None:
    recycled = Recycled([1, 2])
    recycled.learn([1, 2], [9, 8, 7], [3.0, 2.0, 0.0])

    def drawn(**noise: float) -> int:
        found = recycled.guess([1, 2], lambda tokens: [noise.get(f"of_{token}", 0.0) for token in tokens])
        assert found is not None
        return found.token

    assert (drawn(), drawn(of_8=1.5), drawn(of_7=3.5), drawn(of_7=2.5)) == (9, 8, 7, 9)
    recycled.extend([8])
    assert drawn() == 9, "the text took another candidate, by the noise of its place"
    recycled.extend([1, 2, 5])
    assert drawn(of_9=9.0) == 5, "the text took none of them"


def test_chances_are_those_that_drafts_gave() -> None:
    recycled = Recycled([1, 2, 3, 4])
    for _ in range(200):
        recycled.observe(0, 0.9)
        recycled.observe(2, 0.1)
    sure, unsure = recycled.guess([1, 2, 3], silent), recycled.guess([3], silent)
    assert sure is not None
    assert unsure is not None
    assert sure.chance == pytest.approx(0.9, abs=0.01)
    assert unsure.chance == pytest.approx(0.1, abs=0.01)
