"""The safe codec: the bytes of an object leaf, to and from plain values. Pure.

MessagePack with extension types for what MessagePack lacks (tuples, sets, big integers, arrays,
references to tensor leaves, ...). Bit-exact both ways, with the same bytes for equal values.
Nothing is ever imported, called or unpickled: an instance of a user's class is decoded as a *node*
that holds its type name and its fields.

The decoder's input may be hostile. It allocates nothing because of a length field alone: each
length is first compared with the bytes that are left, each value counts against a budget, and
nesting is bounded.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ckpt.errors import IntegrityError, UsageError

__all__ = [
    "BYTES_MAX",
    "DEPTH_MAX",
    "NODES_MAX",
    "DataclassNode",
    "EncodedValue",
    "EnumNode",
    "Named",
    "NamedTupleNode",
    "Ref",
    "StateNode",
    "decode_object",
    "encode_object",
]

# ---- values: limits, and nodes for what is no plain value

DEPTH_MAX = 64
"""How deep values may be nested."""

NODES_MAX = 4 << 20
"""How many values one object may hold, all levels together; larger data belongs in arrays or
tensors."""

BYTES_MAX = 1 << 30
"""How long one encoded object may be."""

ARRAY_KINDS = "biufcmMSU"
"""The numpy dtype kinds that are supported: all but objects and records."""


class Ext(IntEnum):
    """MessagePack extension codes. A code that was ever used keeps its meaning."""

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
    STATE = 18


@dataclass(frozen=True, slots=True)
class Ref:
    """Replaces a tensor: the name of its leaf.

    ``device`` is the kind of device it was on ("cpu", "cuda", ...; "" unknown). ``placements`` says
    how a distributed tensor was laid over its mesh: for each mesh dimension a short code, joined by
    ``,`` ("S0,R"); "" for a plain tensor.
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
class StateNode:
    """What an object with ``state_dict`` gave, and whose state it is: ``module:Class``, with the
    classes of schedulers inside a scheduler in brackets.
    """

    class_name: str
    state: object


@dataclass(frozen=True, slots=True)
class EncodedValue:
    """A value that ``encode_object`` encoded before; its bytes are inserted as they are."""

    data: bytes


_DTYPE = re.compile(rf"[<>|=][{ARRAY_KINDS}][0-9]{{1,9}}(\[[0-9]{{0,6}}[a-zA-Zμ]{{1,7}}\])?")

_DIMS_MAX = 64


def decode_object(data: bytes | bytearray | memoryview) -> object:
    """The value that ``encode_object`` was given, instances of user classes as nodes.

    Raises IntegrityError for bytes that ``encode_object`` cannot have made. O(bytes) time; memory
    is bounded by a constant times the bytes, and by the codec's limits on size, count and depth.
    """
    view = memoryview(data).cast("B")
    if len(view) > BYTES_MAX:
        raise IntegrityError(
            f"object is longer than allowed. bytes={len(view)} bytes_max={BYTES_MAX}"
        )
    reader = _ObjectReader(view, [NODES_MAX])
    value = reader.value(DEPTH_MAX)
    reader.expect_end()
    return value


class _ObjectReader:
    """A cursor over a range of the bytes; all ranges of one object share their budget of values."""

    __slots__ = ("_at", "_budget", "_view")

    def __init__(self, view: memoryview, budget: list[int]) -> None:
        self._view = view
        self._at = 0
        self._budget = budget

    def expect_end(self) -> None:
        if self._at != len(self._view):
            raise IntegrityError(
                f"object has bytes after its end. at={self._at} bytes={len(self._view)}"
            )

    def take(self, length: int) -> memoryview:
        start = self._at
        if length > len(self._view) - start:
            raise IntegrityError(
                f"object ends early. at={start} needed={length} left={len(self._view) - start}"
            )
        self._at = start + length
        return self._view[start : self._at]

    def rest(self) -> memoryview:
        return self.take(len(self._view) - self._at)

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def value(self, depth: int) -> object:
        if depth < 0:
            raise IntegrityError(f"object is nested deeper than allowed. levels_max={DEPTH_MAX}")
        self._budget[0] -= 1
        if self._budget[0] < 0:
            raise IntegrityError(f"object holds more values than allowed. values_max={NODES_MAX}")
        tag = self.number("B")
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag < 0x90:
            return self.pairs(tag & 0x0F, depth - 1)
        if tag < 0xA0:
            return self.items(tag & 0x0F, depth - 1)
        if tag < 0xC0:
            return _text(self.take(tag & 0x1F), "strict")
        return self._tagged(tag, depth)

    def _tagged(self, tag: int, depth: int) -> object:
        match tag:
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return tag == 0xC3
            case 0xC6:
                return bytes(self.take(self.number(">I")))
            case 0xC9:
                length, code = self.number(">I"), self.number("B")
                return _extension(code, _ObjectReader(self.take(length), self._budget), depth - 1)
            case 0xCB:
                return struct.unpack(">d", self.take(8))[0]
            case 0xD3:
                return self.number(">q")
            case 0xDB:
                return _text(self.take(self.number(">I")), "strict")
            case 0xDD:
                return self.items(self.number(">I"), depth - 1)
            case 0xDF:
                return self.pairs(self.number(">I"), depth - 1)
        raise IntegrityError(f"object holds an unknown tag. tag=0x{tag:02x} at={self._at - 1}")

    def items(self, count: int, depth: int) -> list[object]:
        self._check_count(count)
        return [self.value(depth) for _ in range(count)]

    def pairs(self, count: int, depth: int) -> dict[object, object]:
        self._check_count(2 * count)
        pairs: dict[object, object] = {}
        for _ in range(count):
            key = self.value(depth)
            try:
                pairs[key] = self.value(depth)
            except TypeError:
                raise IntegrityError(
                    f"object has a key that can't be one. type={type(key).__name__}"
                ) from None
        if len(pairs) != count:
            raise IntegrityError(f"object has a key twice. keys={count} different={len(pairs)}")
        return pairs

    def text(self) -> str:
        # This text is part of a value that was counted already; so are the values of ``array`` and
        # ``mapping``.
        self._budget[0] += 1
        value = self.value(0)
        if type(value) is not str:
            raise IntegrityError(
                f"object has something else where text belongs. type={type(value).__name__}"
            )
        return value

    def array(self, depth: int) -> list[object]:
        self._budget[0] += 1
        value = self.value(depth)
        if type(value) is not list:
            raise IntegrityError(
                f"object has something else where a list belongs. type={type(value).__name__}"
            )
        return value

    def mapping(self, depth: int) -> dict[object, object]:
        self._budget[0] += 1
        value = self.value(depth)
        if type(value) is not dict:
            raise IntegrityError(
                f"object has something else where a dict belongs. type={type(value).__name__}"
            )
        return value

    def sizes(self) -> list[object]:
        """An array's shape. More dimensions than numpy supports are refused."""
        tag = self.number("B")
        count = self.number(">I") if tag == 0xDD else tag & 0x0F
        if not (0x90 <= tag < 0xA0 or tag == 0xDD) or count > _DIMS_MAX:
            raise IntegrityError(
                f"object holds an array of an impossible shape. tag=0x{tag:02x} dims={count}"
            )
        self._budget[0] += count
        return self.items(count, 0)

    def _check_count(self, count: int) -> None:
        if count > len(self._view) - self._at:
            raise IntegrityError(f"object counts more values than it has bytes. count={count}")


def _text(data: memoryview, errors: str) -> str:
    try:
        return str(data, "utf-8", errors)
    except UnicodeDecodeError as error:
        raise IntegrityError(f"object holds text that isn't UTF-8. {error}") from None


def _extension(code: int, body: _ObjectReader, depth: int) -> object:
    try:
        ext = Ext(code)
    except ValueError:
        raise IntegrityError(
            f"object holds an unknown extension. code={code}; a newer ckpt may read it"
        ) from None
    match ext:
        case Ext.BIG_INT:
            return int.from_bytes(body.rest(), "big", signed=True)
        case Ext.RAW_STR:
            return _text(body.rest(), "surrogatepass")
        case Ext.BYTEARRAY:
            return bytearray(body.rest())
        case Ext.ARRAY:
            return _array(body)
        case Ext.SCALAR:
            array = _array(body)
            if array.shape:
                raise IntegrityError(f"object holds a scalar with dimensions. shape={array.shape}")
            return array[()]
    value = _node(ext, body, depth)
    body.expect_end()
    return value


def _node(ext: Ext, body: _ObjectReader, depth: int) -> object:
    match ext:
        case Ext.COMPLEX:
            real, imaginary = struct.unpack(">dd", body.take(16))
            return complex(real, imaginary)
        case Ext.TUPLE:
            return tuple(body.array(depth + 1))
        case Ext.SET | Ext.FROZENSET:
            return _set(ext, body.array(depth + 1))
        case Ext.ORDERED_DICT:
            return OrderedDict(body.mapping(depth + 1))
        case Ext.COUNTER:
            # From a mapping, Counter keeps the counts as they are, whatever their type.
            return Counter(body.mapping(depth + 1))
        case Ext.DEQUE:
            return _deque(body.value(depth), body.array(depth + 1))
        case Ext.REF:
            return Ref(body.text(), body.text(), body.text())
        case Ext.NAMED:
            return Named(body.text(), body.text())
        case Ext.ENUM:
            return EnumNode(body.text(), body.text())
        case Ext.STATE:
            return StateNode(body.text(), body.value(depth))
        case Ext.DATACLASS:
            name, fields = body.text(), body.mapping(depth + 1)
            return DataclassNode(name, {_str(key): value for key, value in fields.items()})
        case Ext.NAMED_TUPLE:
            name, names, values = body.text(), body.array(depth + 1), body.array(depth + 1)
            if len(names) != len(values):
                raise IntegrityError(
                    f"named tuple's names and values differ in number. type={name!r}"
                )
            return NamedTupleNode(name, tuple(_str(field) for field in names), tuple(values))
        case _:
            raise AssertionError(ext)


def _str(value: object) -> str:
    if type(value) is not str:
        raise IntegrityError(
            f"object has something else where a name belongs. type={type(value).__name__}"
        )
    return value


def _set(ext: Ext, items: list[object]) -> set[object] | frozenset[object]:
    try:
        members = set(items)
    except TypeError as error:
        raise IntegrityError(f"object holds a set of what can't be in one. {error}") from None
    if len(members) != len(items):
        raise IntegrityError(f"object holds a set with an element twice. elements={len(items)}")
    return members if ext is Ext.SET else frozenset(members)


def _deque(maxlen: object, items: list[object]) -> deque[object]:
    if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen < 1 << 62):
        raise IntegrityError(
            f"object holds a deque of an impossible length. length={len(items)} maxlen={maxlen!r}"
        )
    return deque(items, maxlen if isinstance(maxlen, int) else None)


def _array(body: _ObjectReader) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    text = body.text()
    sizes = body.sizes()
    data = body.rest()
    if not _DTYPE.fullmatch(text):
        raise IntegrityError(f"object holds an array of an unknown dtype. dtype={text[:40]!r}")
    shape = tuple(size for size in sizes if type(size) is int and 0 <= size < 1 << 62)
    if len(shape) != len(sizes):
        raise IntegrityError("object holds an array of an impossible shape")
    try:
        dtype: np.dtype[np.generic] = np.dtype(text)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise IntegrityError(
                f"array's bytes don't match its shape. shape={shape} dtype={text} bytes={len(data)}"
            )
        array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.ndarray(
            shape, dtype, buffer=bytearray(data) or bytearray(1)
        )
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise IntegrityError(
            f"object holds an impossible array. shape={shape} dtype={text} error={error}"
        ) from None
    return array


# ---- encode


class _UnsupportedError(Exception):
    """Why a value cannot be encoded, and the path from it upwards."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[str] = []


def encode_object(value: object) -> bytes:
    """The value's bytes. Equal values (with equal order of dicts, any order of sets) give equal
    bytes.

    Takes None, bool, int of any size, float, complex, str (lone surrogates too), bytes, bytearray,
    list, tuple, dict, OrderedDict, Counter, deque, set, frozenset, numpy scalars and arrays, and
    this module's nodes. Subclasses are refused, because they would be decoded as something else.
    Raises UsageError that names the path of what cannot be stored. About 0.5 us a value.
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
            f"object is too large. bytes={len(out)} bytes_max={BYTES_MAX}; keep large data in "
            "tensors, as leaves of their own"
        )
    return bytes(out)


def _encode(value: object, out: bytearray, depth: int, budget: list[int]) -> None:
    if depth < 0:
        raise _UnsupportedError(
            f"value is nested deeper than levels_max={DEPTH_MAX}, or contains itself"
        )
    budget[0] -= 1
    if budget[0] < 0:
        raise _UnsupportedError(
            f"object holds more than values_max={NODES_MAX}; keep large data in an array or a "
            "tensor"
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
            f"value of an unsupported type. type={kind.__module__}.{kind.__qualname__}; track a "
            "tensor or a plain value "
            f"instead, or give the object state_dict() and load_state_dict()"
        )


def _put_none(value: None, out: bytearray) -> None:
    out.append(0xC0)


def _put_bool(value: bool, out: bytearray) -> None:
    out.append(0xC3 if value else 0xC2)


def _put_int(value: int, out: bytearray) -> None:
    # MessagePack has more integer forms. Only these are used, so that each value has one spelling.
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


def _put_encoded(value: EncodedValue, out: bytearray) -> None:
    out += value.data


def _put_array(value: np.ndarray[tuple[int, ...], np.dtype[np.generic]], out: bytearray) -> None:
    _put_ext(out, Ext.ARRAY, _array_payload(value))


def _array_payload(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytearray:
    if array.dtype.kind not in ARRAY_KINDS:
        raise _UnsupportedError(
            f"array of an unsupported dtype. dtype={array.dtype}; keep numbers, booleans, times or "
            "fixed-length text"
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


def _items(
    values: Iterable[object], length: int, out: bytearray, depth: int, budget: list[int]
) -> None:
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


def _wrapped(
    code: Ext, body: Callable[..., None]
) -> Callable[[object, bytearray, int, list[int]], None]:
    def put(value: object, out: bytearray, depth: int, budget: list[int]) -> None:
        payload = bytearray()
        body(value, payload, depth, budget)
        _put_ext(out, code, payload)

    return put


def _set_body(
    value: set[object] | frozenset[object], out: bytearray, depth: int, budget: list[int]
) -> None:
    encoded: list[bytes] = []
    for item in value:
        element = bytearray()
        try:
            _encode(item, element, depth, budget)
        except _UnsupportedError as error:
            error.path.append(str(item))
            raise
        encoded.append(bytes(element))
    _put_length(len(encoded), out, 0x90, 0xDD)
    for element_bytes in sorted(encoded):  # a set has no order, but equal values give equal bytes
        out += element_bytes


def _deque_body(value: deque[object], out: bytearray, depth: int, budget: list[int]) -> None:
    _encode(value.maxlen, out, depth, budget)
    _items(value, len(value), out, depth, budget)


def _dataclass_body(value: DataclassNode, out: bytearray, depth: int, budget: list[int]) -> None:
    _put_str(value.type_name, out)
    _put_dict(dict(value.fields.items()), out, depth, budget)


def _state_body(value: StateNode, out: bytearray, depth: int, budget: list[int]) -> None:
    _put_str(value.class_name, out)
    _encode(value.state, out, depth, budget)


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
    EncodedValue: _put_encoded,
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
    StateNode: _wrapped(Ext.STATE, _state_body),
}
