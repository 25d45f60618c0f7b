"""The values of the safe codec that stand for what is no plain value, and the codec's limits. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

DEPTH_MAX = 64
"""How deep values may be nested."""

NODES_MAX = 4 << 20
"""How many values one object may hold, all levels together; larger data belongs into an array or a tensor."""

BYTES_MAX = 1 << 30
"""How long one encoded object may be."""

ARRAY_KINDS = "biufcmMSU"
"""The numpy dtype kinds that are kept: everything but objects and records."""


class Ext(IntEnum):
    """MessagePack extension codes. A code, once given out, keeps its meaning."""

    BIG_INT = 1
    COMPLEX = 2
    RAW_STR = 3
    TUPLE = 4
    SET = 5
    FROZENSET = 6
    ORDERED_DICT = 7
    SCALAR = 8
    ARRAY = 9
    REF = 10
    NAMED = 11
    DATACLASS = 12
    ENUM = 13
    NAMED_TUPLE = 14
    COUNTER = 15
    DEQUE = 16
    BYTEARRAY = 17


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands where a tensor was: the name of its leaf.

    ``device`` is the kind of device it lived on ("cpu", "cuda", ...; "" unknown). ``placements`` says how a distributed
    tensor was laid over its mesh, one short word per mesh dimension joined by ``,`` ("S0,R"); "" for a plain tensor.
    """

    leaf: str
    device: str = ""
    placements: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """A small constant of a library, by kind and text: ``Named("torch.dtype", "bfloat16")``."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class DataclassNode:
    """An instance of a dataclass: its qualified type name (``module.Class``) and its fields."""

    type_name: str
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class EnumNode:
    """A member of an enum: its qualified type name and the member's name."""

    type_name: str
    member: str


@dataclass(frozen=True, slots=True)
class NamedTupleNode:
    """An instance of a named tuple: its qualified type name, field names and values, in order."""

    type_name: str
    names: tuple[str, ...]
    values: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value that is encoded already; ``encode_object`` puts its bytes where it stands. Must come from ``encode_object``."""

    data: bytes
