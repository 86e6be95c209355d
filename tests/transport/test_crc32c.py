"""The checksum of what travels over links, by each of its ways."""

from __future__ import annotations

from random import Random

import pytest

from commlab.native.library import built
from commlab.transport.tcp import missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

TABLE, INSTRUCTION, FOLDING = range(3)
"""``Crc32cWay`` of kernels/links/crc32c.h."""


@pytest.mark.parametrize("way", [TABLE, INSTRUCTION, FOLDING])
def test_every_way_gives_crc32c(way: int) -> None:
    """The values of RFC 3720, appendix B.4, and the polynomial's own division, bit by bit; every length around what a
    way takes at a time, begun anywhere and continued."""
    assert built is not None
    if not built.has_crc32c(way):
        pytest.skip("the processor lacks it")
    for data, known in (
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ):
        assert built.crc32c_by(way, data, 0) == known
    random = Random(way)
    for length in (*range(0, 1100, 7), *range(250, 262), *range(510, 516), 4096, 12287, 12289, 50001):
        data, begun = random.randbytes(length), random.getrandbits(32)
        divided = by_division(data, begun)
        assert built.crc32c_by(way, data, begun) == divided, length
        cut = random.randrange(length + 1)
        assert built.crc32c_by(way, data[cut:], built.crc32c_by(way, data[:cut], begun)) == divided, (length, cut)
        assert built.crc32c(data, begun) == divided


def by_division(data: bytes, begun: int) -> int:
    crc = ~begun & 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return ~crc & 0xFFFFFFFF
