"""Plain values to bytes of the safe codec."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

import numpy as np

from ckpt.errors import UsageError
from ckpt.format.objects_nodes import (
    ARRAY_KINDS,
    BYTES_MAX,
    DEPTH_MAX,
    NODES_MAX,
    DataclassNode,
    Encoded,
    EnumNode,
    Ext,
    Named,
    NamedTupleNode,
    Ref,
)


class _UnsupportedError(Exception):
    """Carries why, and the path from the offending value upwards."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path: list[str] = []


def encode_object(value: object) -> bytes:
    """The value's bytes. Equal values (order of dicts included, order of sets not) give equal bytes.

    Takes None, bool, int of any size, float, complex, str (lone surrogates too), bytes, bytearray, list, tuple, dict,
    OrderedDict, Counter, deque, set, frozenset, numpy scalars and arrays, and this module's nodes. Subclasses don't
    count: they would come back as something else. Raises UsageError that names the path of what can't be stored.
    About 0.5 us a value.
    """
    out = bytearray()
    budget = [NODES_MAX]
    try:
        _encode(value, out, DEPTH_MAX, budget)
    except _UnsupportedError as error:
        path = "/".join(reversed(error.path)) or "(top)"
        raise UsageError(f"{error}. path={path!r}") from None
    if len(out) > BYTES_MAX:
        raise UsageError(
            f"object is too large. bytes={len(out)} bytes_max={BYTES_MAX}; keep large data in tensors, as leaves of their own"
        )
    return bytes(out)


def _encode(value: object, out: bytearray, depth: int, budget: list[int]) -> None:
    if depth < 0:
        raise _UnsupportedError(f"value is nested deeper than levels_max={DEPTH_MAX}, or contains itself")
    budget[0] -= 1
    if budget[0] < 0:
        raise _UnsupportedError(
            f"object holds more than values_max={NODES_MAX}; keep large data in an array or a tensor"
        )
    kind = type(value)
    if (scalar := _SCALARS.get(kind)) is not None:
        scalar(value, out)
    elif (container := _CONTAINERS.get(kind)) is not None:
        container(value, out, depth - 1, budget)
    elif isinstance(value, np.generic):
        _put_ext(out, Ext.SCALAR, _array_payload(np.asarray(value)))
    else:
        raise _UnsupportedError(
            f"value of an unsupported type. type={kind.__module__}.{kind.__qualname__}; track a tensor or a plain value "
            f"instead, or give the object state_dict() and load_state_dict()"
        )


def _put_none(value: None, out: bytearray) -> None:
    out.append(0xC0)


def _put_bool(value: bool, out: bytearray) -> None:
    out.append(0xC3 if value else 0xC2)


def _put_int(value: int, out: bytearray) -> None:
    if -32 <= value < 128:
        out.append(value & 0xFF)
    elif -(1 << 63) <= value < 1 << 63:
        out += struct.pack(">Bq", 0xD3, value)
    else:
        _put_ext(out, Ext.BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _put_float(value: float, out: bytearray) -> None:
    out += struct.pack(">Bd", 0xCB, value)


def _put_complex(value: complex, out: bytearray) -> None:
    _put_ext(out, Ext.COMPLEX, struct.pack(">dd", value.real, value.imag))


def _put_str(value: str, out: bytearray) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        _put_ext(out, Ext.RAW_STR, value.encode("utf-8", "surrogatepass"))
        return
    length = len(data)
    if length < 32:
        out.append(0xA0 | length)
    else:
        out += struct.pack(">BI", 0xDB, length)
    out += data


def _put_bytes(value: bytes, out: bytearray) -> None:
    out += struct.pack(">BI", 0xC6, len(value))
    out += value


def _put_bytearray(value: bytearray, out: bytearray) -> None:
    _put_ext(out, Ext.BYTEARRAY, value)


def _put_ref(value: Ref, out: bytearray) -> None:
    payload = bytearray()
    for text in (value.leaf, value.device, value.placements):
        _put_str(text, payload)
    _put_ext(out, Ext.REF, payload)


def _put_named(value: Named, out: bytearray) -> None:
    payload = bytearray()
    _put_str(value.kind, payload)
    _put_str(value.text, payload)
    _put_ext(out, Ext.NAMED, payload)


def _put_enum(value: EnumNode, out: bytearray) -> None:
    payload = bytearray()
    _put_str(value.type_name, payload)
    _put_str(value.member, payload)
    _put_ext(out, Ext.ENUM, payload)


def _put_encoded(value: Encoded, out: bytearray) -> None:
    out += value.data


def _put_array(value: np.ndarray[tuple[int, ...], np.dtype[np.generic]], out: bytearray) -> None:
    _put_ext(out, Ext.ARRAY, _array_payload(value))


def _array_payload(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytearray:
    if array.dtype.kind not in ARRAY_KINDS:
        raise _UnsupportedError(
            f"array of an unsupported dtype. dtype={array.dtype}; keep numbers, booleans, times or fixed-length text"
        )
    payload = bytearray()
    _put_str(array.dtype.str, payload)
    _put_length(len(array.shape), payload, 0x90, 0xDD)
    for size in array.shape:
        _put_int(size, payload)
    payload += array.tobytes()
    return payload


def _put_length(length: int, out: bytearray, small: int, large: int) -> None:
    if length < 16:
        out.append(small | length)
    else:
        out += struct.pack(">BI", large, length)


def _put_ext(out: bytearray, code: Ext, payload: bytes | bytearray) -> None:
    if len(payload) >= 1 << 32:
        raise _UnsupportedError(f"value is too large. bytes={len(payload)} bytes_max={BYTES_MAX}")
    out += struct.pack(">BIB", 0xC9, len(payload), code)
    out += payload


def _items(values: Iterable[object], length: int, out: bytearray, depth: int, budget: list[int]) -> None:
    _put_length(length, out, 0x90, 0xDD)
    for index, item in enumerate(values):
        try:
            _encode(item, out, depth, budget)
        except _UnsupportedError as error:
            error.path.append(str(index))
            raise


def _put_list(value: list[object], out: bytearray, depth: int, budget: list[int]) -> None:
    _items(value, len(value), out, depth, budget)


def _put_dict(value: dict[object, object], out: bytearray, depth: int, budget: list[int]) -> None:
    _put_length(len(value), out, 0x80, 0xDF)
    for key, item in value.items():
        try:
            _encode(key, out, depth, budget)
            _encode(item, out, depth, budget)
        except _UnsupportedError as error:
            error.path.append(str(key))
            raise


def _wrapped(code: Ext, body: Callable[..., None]) -> Callable[[object, bytearray, int, list[int]], None]:
    def put(value: object, out: bytearray, depth: int, budget: list[int]) -> None:
        payload = bytearray()
        body(value, payload, depth, budget)
        _put_ext(out, code, payload)

    return put


def _set_body(value: set[object] | frozenset[object], out: bytearray, depth: int, budget: list[int]) -> None:
    encoded: list[bytes] = []
    for item in value:
        one = bytearray()
        try:
            _encode(item, one, depth, budget)
        except _UnsupportedError as error:
            error.path.append(str(item))
            raise
        encoded.append(bytes(one))
    _put_length(len(encoded), out, 0x90, 0xDD)
    for one_encoded in sorted(encoded):
        out += one_encoded


def _deque_body(value: deque[object], out: bytearray, depth: int, budget: list[int]) -> None:
    _encode(value.maxlen, out, depth, budget)
    _items(value, len(value), out, depth, budget)


def _dataclass_body(value: DataclassNode, out: bytearray, depth: int, budget: list[int]) -> None:
    _put_str(value.type_name, out)
    _put_dict(dict(value.fields.items()), out, depth, budget)


def _named_tuple_body(value: NamedTupleNode, out: bytearray, depth: int, budget: list[int]) -> None:
    _put_str(value.type_name, out)
    _items(value.names, len(value.names), out, depth, budget)
    _items(value.values, len(value.values), out, depth, budget)


_SCALARS: dict[type, Callable[..., None]] = {
    type(None): _put_none,
    bool: _put_bool,
    int: _put_int,
    float: _put_float,
    complex: _put_complex,
    str: _put_str,
    bytes: _put_bytes,
    bytearray: _put_bytearray,
    np.ndarray: _put_array,
    Ref: _put_ref,
    Named: _put_named,
    EnumNode: _put_enum,
    Encoded: _put_encoded,
}

_CONTAINERS: dict[type, Callable[..., None]] = {
    list: _put_list,
    dict: _put_dict,
    tuple: _wrapped(Ext.TUPLE, _put_list),
    set: _wrapped(Ext.SET, _set_body),
    frozenset: _wrapped(Ext.FROZENSET, _set_body),
    OrderedDict: _wrapped(Ext.ORDERED_DICT, _put_dict),
    Counter: _wrapped(Ext.COUNTER, _put_dict),
    deque: _wrapped(Ext.DEQUE, _deque_body),
    DataclassNode: _wrapped(Ext.DATACLASS, _dataclass_body),
    NamedTupleNode: _wrapped(Ext.NAMED_TUPLE, _named_tuple_body),
}
