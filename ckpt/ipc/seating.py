"""Where a node's ranks are in a job of several nodes, and where what they staged is."""

from __future__ import annotations

import msgspec

from ckpt.format.canonical import ready


class Seating(msgspec.Struct, frozen=True):
    """This node's ranks are the ones from ``first_rank`` on; rank 0 is at ``host``. ``node`` counts from 0."""

    host: str
    first_rank: int
    world_size: int
    node: int
    nodes: int


class Source(msgspec.Struct, frozen=True):
    """Where one rank's share of a staged pair is. ``local``: the local rank whose slot has it, -1 for none.

    ``slots`` and ``mirrors``: the addresses of nodes that lend it, out of a slot or as a mirror.
    """

    local: int = -1
    slots: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()


ready(Seating, Source)
