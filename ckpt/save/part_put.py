"""The part of a node's ranks, written to a store. Still nothing is recorded."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.backends.base import Backend
from ckpt.errors import CkptError
from ckpt.format.digest import digest_hex
from ckpt.format.keys import part_key
from ckpt.format.manifest import PartRef
from ckpt.format.part import Part, encode_part
from ckpt.format.part_merge import merge_parts


def put_part(parts: Sequence[Part], *, backend: Backend, writer: str) -> PartRef:
    """Write one part for the ranks of ``parts``, which follow each other; ``writer`` never wrote one of this snapshot.

    Raises what the store raises, with snapshot and ranks named, and UsageError where they make no part. O(chunks).
    """
    part = merge_parts(parts, writer=writer)
    encoded = encode_part(part)
    key = part_key(part.snapshot, writer)
    try:
        backend.put(key, [encoded])
    except CkptError as error:
        raise type(error)(
            f"{error} [snapshot={part.snapshot} part of ranks {part.rank} to {part.rank + part.ranks - 1} "
            f"store={backend.url}: not recorded, older ones stand]"
        ) from error
    return PartRef(key=key, digest=digest_hex(encoded), size_bytes=len(encoded), rank=part.rank, ranks=part.ranks)
