"""What followed the text's last tokens before, against a search by definition."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.speculation.ngram import LEAST_MATCH, MOST_MATCH, NgramGuesser, NgramRates

relaxed = settings(deadline=None, max_examples=200)


@relaxed
@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 9))
def test_a_guess_followed_the_same_ending_before(prompt: list[int], more: list[int], most: int) -> None:
    guesser = NgramGuesser(NgramRates(), prompt)
    guesser.extend(more)
    text = prompt + more
    tokens, chances = guesser.chain(most)
    ending = text[-LEAST_MATCH:]
    places = [
        i
        for i in range(LEAST_MATCH, len(text))
        if len(text) >= LEAST_MATCH and text[i - LEAST_MATCH : i] == ending
    ]
    if not places:
        assert tokens == []
        return
    assert any(text[place : place + most] == tokens for place in places)
    assert len(chances) == len(tokens) <= most
    assert all(0 < chance < 1 for chance in chances)
    if not more:
        assert chances == sorted(chances), "a longer match is no worse before anything was counted"


def test_rates_are_those_of_the_text() -> None:
    rates, chance = NgramRates(), random.Random(3)
    for _ in range(600):
        rates.observe(MOST_MATCH, chance.random() < 0.9)
        rates.observe(LEAST_MATCH, chance.random() < 0.1)
    assert 0.82 < rates(MOST_MATCH) < 0.97
    assert 0.04 < rates(LEAST_MATCH) < 0.2


def test_a_text_that_repeats_itself_is_guessed_ever_more_surely() -> None:
    rates = NgramRates()
    guesser = NgramGuesser(rates, [5, 6, 7, 8])
    before = rates(MOST_MATCH)
    guesser.extend([5, 6, 7, 8] * 20)
    assert guesser.chain(6)[0] == [5, 6, 7, 8, 5, 6][: len(guesser.chain(6)[0])]
    assert rates(MOST_MATCH) > before


def test_a_fresh_text_has_no_guesses() -> None:
    guesser = NgramGuesser(NgramRates(), list(range(50)))
    assert guesser.chain(5) == ([], [])
    guesser.extend([0, 1, 2])
    assert guesser.chain(2)[0] == [3, 4]
