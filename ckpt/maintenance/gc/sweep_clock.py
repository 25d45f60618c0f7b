"""What a store's own clock says: the age of an object is counted by the clock that stamped it, and by no other."""

from __future__ import annotations

import re
import secrets

from ckpt.backends.base import Backend
from ckpt.errors import UnavailableError

PROBES = "probes/"
LEFT_S = 3600.0
"""A probe that is older was left by a process that died."""

_PROBE_RE = re.compile(r"probes/[0-9a-f]{32}", re.ASCII)


def store_clock(store: Backend) -> float:
    """The store's time, in seconds since 1970: that of an object written just now, which is deleted again.

    Also removes what dead processes left of such. Raises UnavailableError, StoreDeniedError.
    """
    key = f"{PROBES}{secrets.token_hex(16)}"
    store.put(key, [b"ckpt"])
    try:
        stat = store.stat(key)
    finally:
        store.delete(key)
    if stat is None:
        raise UnavailableError(f"an object written just now isn't there. key={key} store={store.url} run this again")
    for left in list(store.list(PROBES)):
        if is_probe(left.key) and stat.modified_unix_s - left.modified_unix_s > LEFT_S:
            store.delete(left.key)
    return stat.modified_unix_s


def is_probe(key: str) -> bool:
    """Whether ``key`` is one that ``store_clock`` uses."""
    return _PROBE_RE.fullmatch(key) is not None
