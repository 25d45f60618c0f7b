"""A rate as people write it: ``50MiB`` is so much in a second. Pure."""

from __future__ import annotations

import re

from ckpt.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def rate_of(text: str) -> float:
    """Bytes a second. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"not a rate. rate={text}; write 50MiB, for so much in a second")
    return float(found[1]) * 2.0 ** _POWERS[found[2].upper()]
