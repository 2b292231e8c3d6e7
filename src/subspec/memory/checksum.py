"""CRC-32 of a run of bytes from the CRC-32s of its parts, so that parts can be summed wherever they pass.

A CRC is a remainder of polynomials over GF(2): appending n bytes multiplies the sum of what came before by
x^(8n), then adds the sum of what was appended.  Bits are in zlib's reflected order, x^0 the highest.
"""

from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_BYTE = _ONE >> 8  # x^8


def joined(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of parts put one after another: each is (its CRC-32, its bytes), in order."""
    total = 0
    for crc, n_bytes in parts:
        total = _product(total, _power(n_bytes)) ^ crc
    return total


def _power(n_bytes: int) -> int:
    """x^(8 n) modulo the polynomial."""
    result, square = _ONE, _BYTE
    while n_bytes:
        if n_bytes & 1:
            result = _product(result, square)
        square = _product(square, square)
        n_bytes >>= 1
    return result


def _product(a: int, b: int) -> int:
    """a·b modulo the polynomial."""
    total = 0
    for place in range(31, -1, -1):
        if a >> place & 1:
            total ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return total
