"""A toy model: hashes stand for hidden states, keys, values and logits.

A layer makes a row's entry of its hash and of the bytes of a unit, and folds the entries of what the row
attends to, in position order, into the hash.  So a byte, an entry or a place that is wrong changes all that
comes after.  ``Truth`` is the model as a plain loop over a list of tokens; ``toy_steps`` has it over slots.
"""

import random
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint64]
VOCABULARY = 12
MASK, EVEN = (1 << 64) - 1, (1 << 64) - 2
TOKEN, POSITION, FACTOR = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9
_RANDOM = random.Random(7)
PLACES = [_RANDOM.getrandbits(64) | 1 for _ in range(64)]  # what a text's entries are multiplied by, in order
WORD_PLACES = np.array(PLACES, dtype=np.uint64)
_BITS = np.arange(VOCABULARY, dtype=np.uint64) * np.uint64(5)
_QUARTER = np.full(VOCABULARY, 0.25, dtype=np.float32)
_UNLIKE = np.arange(VOCABULARY, dtype=np.float32) * np.float32(1 / 64)  # no two logits are alike
DISAGREEMENT = 5  # of 16 hashes, those whose draft logits are others
EXACT, DRAFT = 0, 1  # the last bit of an entry


def mixed(words: Words) -> Words:
    """A hash of each word."""
    words = (words ^ (words >> np.uint64(29))) * np.uint64(FACTOR)
    return words ^ (words >> np.uint64(32))


def mixed_one(word: int) -> int:
    """``mixed`` of one."""
    word = ((word ^ (word >> 29)) * FACTOR) & MASK
    return word ^ (word >> 32)


def logits_of(words: Words, disagreement: int = 0) -> NDArray[np.float32]:
    """Logits (T, V) of hashes (T,); of so many sixteenths of them, others."""
    words = np.where(words % np.uint64(16) < np.uint64(disagreement), mixed(words), words)
    return ((words[:, None] >> _BITS) & np.uint64(31)).astype(np.float32) * _QUARTER + _UNLIKE


def words_of(tensor: torch.Tensor) -> Words:
    """An int64 or uint8 tensor's words: a view."""
    return cast(Words, tensor.numpy().view(np.uint64))


def digest(values: torch.Tensor) -> np.uint64:
    """Of a unit's bytes."""
    words = words_of(values)
    return cast(np.uint64, (words * WORD_PLACES[: len(words)]).sum())


class Truth:
    """The exact model without a cache: what a text's last hash is, and the entries on the way to it."""

    def __init__(self, digests: list[int]) -> None:
        self._digests = digests
        self._known: dict[tuple[int, ...], tuple[list[int], list[tuple[int, int]], int]] = {
            (): ([0] * len(digests), [], 0)
        }

    def _of(self, text: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]], int]:
        """By layer what is folded so far, and the last token's entry; its hash."""
        if text not in self._known:
            folded, _, _ = self._of(text[:-1])
            place, folds, entries = len(text) - 1, [], []
            word = mixed_one((text[-1] * TOKEN + place * POSITION + 1) & MASK)
            for fold, one in zip(folded, self._digests, strict=True):
                key = mixed_one(word ^ one) & EVEN
                value = mixed_one(key) & EVEN
                folds.append((fold + PLACES[place] * (3 * key + value)) & MASK)
                word = mixed_one((word + folds[-1]) & MASK)
                entries.append((key, value))
            self._known[text] = folds, entries, word
        return self._known[text]

    def logits(self, text: tuple[int, ...], disagreement: int = 0) -> torch.Tensor:
        """(V,) after a text."""
        return torch.from_numpy(logits_of(np.array([self._of(text)[2]], dtype=np.uint64), disagreement)[0])

    def entries(self, text: tuple[int, ...]) -> Words:
        """Keys and values of a text: (2, L, T)."""
        columns = [self._of(text[: place + 1])[1] for place in range(len(text))]
        return np.array(columns, dtype=np.uint64).reshape(len(text), len(self._digests), 2).transpose(2, 1, 0)
