"""The safe codec for plain values: what an object leaf's bytes are.

MessagePack with extension types for what MessagePack can't say (tuples, sets, big integers, arrays, references to tensor
leaves, ...). Bit-exact both ways, the same bytes for equal values, and nothing is ever imported, called or unpickled:
a class of the user's comes back as a *node* that carries its name and its fields.
"""

from ckpt.format.objects import decode_object
from ckpt.format.objects_encode import encode_object
from ckpt.format.objects_nodes import (
    BYTES_MAX,
    DEPTH_MAX,
    NODES_MAX,
    DataclassNode,
    Encoded,
    EnumNode,
    Named,
    NamedTupleNode,
    Ref,
)

__all__ = [
    "BYTES_MAX",
    "DEPTH_MAX",
    "NODES_MAX",
    "DataclassNode",
    "Encoded",
    "EnumNode",
    "Named",
    "NamedTupleNode",
    "Ref",
    "decode_object",
    "encode_object",
]
