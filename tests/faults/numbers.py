"""Numbers that depend on their names only, so that one more request changes nobody else's luck."""

from __future__ import annotations

import zlib


def number(*names: object) -> float:
    """In [0, 1), the same for the same names, in every run and on every machine."""
    return zlib.crc32(repr(names).encode()) / 2**32
