"""Checksums of parts, joined: the checksum of the whole."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from subspec.memory.checksum import joined


@given(st.lists(st.binary(max_size=300)))
def test_parts_join_to_the_whole(parts: list[bytes]) -> None:
    assert joined((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))


def test_order_and_length_matter() -> None:
    first, second = (zlib.crc32(b"first"), 5), (zlib.crc32(b"second"), 6)
    assert joined([first, second]) != joined([second, first])
    assert joined([first, (second[0], 7)]) != joined([first, second])
