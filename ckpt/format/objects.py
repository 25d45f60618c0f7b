"""Object leaves read back: bytes of the safe codec to plain values. The bytes may be hostile.

Nothing is allocated on the word of a length field: each length is first compared with the bytes that are left, each value
counts against a budget, and nesting is bounded.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, OrderedDict, deque

import numpy as np

from ckpt.errors import IntegrityError
from ckpt.format.objects_nodes import (
    ARRAY_KINDS,
    BYTES_MAX,
    DEPTH_MAX,
    NODES_MAX,
    DataclassNode,
    EnumNode,
    Ext,
    Named,
    NamedTupleNode,
    Ref,
)

_DTYPE = re.compile(rf"[<>|=][{ARRAY_KINDS}][0-9]{{1,9}}(\[[0-9]{{0,6}}[a-zA-Zμ]{{1,7}}\])?")

_DIMS_MAX = 64


def decode_object(data: bytes | bytearray | memoryview) -> object:
    """The value that ``encode_object`` was given, user classes as nodes.

    Raises IntegrityError for bytes that ``encode_object`` can't have made. O(bytes) time; memory is bounded by a constant
    times the bytes, and by the codec's own limits on size, count and depth.
    """
    view = memoryview(data).cast("B")
    if len(view) > BYTES_MAX:
        raise IntegrityError(f"object is longer than allowed. bytes={len(view)} bytes_max={BYTES_MAX}")
    reader = _Reader(view, [NODES_MAX])
    value = reader.value(DEPTH_MAX)
    reader.expect_end()
    return value


class _Reader:
    """A cursor over one piece of the bytes; pieces of one object share their budget of values."""

    __slots__ = ("_at", "_budget", "_view")

    def __init__(self, view: memoryview, budget: list[int]) -> None:
        self._view = view
        self._at = 0
        self._budget = budget

    def expect_end(self) -> None:
        if self._at != len(self._view):
            raise IntegrityError(f"object has bytes after its end. at={self._at} bytes={len(self._view)}")

    def take(self, length: int) -> memoryview:
        start = self._at
        if length > len(self._view) - start:
            raise IntegrityError(f"object ends early. at={start} needed={length} left={len(self._view) - start}")
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
                return _extension(code, _Reader(self.take(length), self._budget), depth - 1)
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
        found: dict[object, object] = {}
        for _ in range(count):
            key = self.value(depth)
            try:
                found[key] = self.value(depth)
            except TypeError:
                raise IntegrityError(f"object has a key that can't be one. type={type(key).__name__}") from None
        if len(found) != count:
            raise IntegrityError(f"object has a key twice. keys={count} different={len(found)}")
        return found

    def text(self) -> str:
        self._budget[0] += 1  # part of a value that was counted already, here and below
        value = self.value(0)
        if type(value) is not str:
            raise IntegrityError(f"object has something else where text belongs. type={type(value).__name__}")
        return value

    def array(self, depth: int) -> list[object]:
        self._budget[0] += 1
        value = self.value(depth)
        if type(value) is not list:
            raise IntegrityError(f"object has something else where a list belongs. type={type(value).__name__}")
        return value

    def mapping(self, depth: int) -> dict[object, object]:
        self._budget[0] += 1
        value = self.value(depth)
        if type(value) is not dict:
            raise IntegrityError(f"object has something else where a dict belongs. type={type(value).__name__}")
        return value

    def sizes(self) -> list[object]:
        """An array's shape; more dimensions than numpy has are refused."""
        tag = self.number("B")
        count = self.number(">I") if tag == 0xDD else tag & 0x0F
        if not (0x90 <= tag < 0xA0 or tag == 0xDD) or count > _DIMS_MAX:
            raise IntegrityError(f"object holds an array of an impossible shape. tag=0x{tag:02x} dims={count}")
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


def _extension(code: int, body: _Reader, depth: int) -> object:
    try:
        ext = Ext(code)
    except ValueError:
        raise IntegrityError(f"object holds an unknown extension. code={code}; a newer ckpt may read it") from None
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


def _node(ext: Ext, body: _Reader, depth: int) -> object:
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
            # Counter(mapping) keeps the counts as they are, whatever their type.
            return Counter(body.mapping(depth + 1))
        case Ext.DEQUE:
            return _deque(body.value(depth), body.array(depth + 1))
        case Ext.REF:
            return Ref(body.text(), body.text(), body.text())
        case Ext.NAMED:
            return Named(body.text(), body.text())
        case Ext.ENUM:
            return EnumNode(body.text(), body.text())
        case Ext.DATACLASS:
            name, fields = body.text(), body.mapping(depth + 1)
            return DataclassNode(name, {_str(key): value for key, value in fields.items()})
        case Ext.NAMED_TUPLE:
            name, names, values = body.text(), body.array(depth + 1), body.array(depth + 1)
            if len(names) != len(values):
                raise IntegrityError(f"named tuple's names and values differ in number. type={name!r}")
            return NamedTupleNode(name, tuple(_str(one) for one in names), tuple(values))
        case _:
            raise AssertionError(ext)


def _str(value: object) -> str:
    if type(value) is not str:
        raise IntegrityError(f"object has something else where a name belongs. type={type(value).__name__}")
    return value


def _set(ext: Ext, items: list[object]) -> set[object] | frozenset[object]:
    try:
        found = set(items)
    except TypeError as error:
        raise IntegrityError(f"object holds a set of what can't be in one. {error}") from None
    if len(found) != len(items):
        raise IntegrityError(f"object holds a set with an element twice. elements={len(items)}")
    return found if ext is Ext.SET else frozenset(found)


def _deque(maxlen: object, items: list[object]) -> deque[object]:
    if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen < 1 << 62):
        raise IntegrityError(f"object holds a deque of an impossible length. length={len(items)} maxlen={maxlen!r}")
    return deque(items, maxlen if isinstance(maxlen, int) else None)


def _array(body: _Reader) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
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
            raise IntegrityError(f"array's bytes don't match its shape. shape={shape} dtype={text} bytes={len(data)}")
        found: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.ndarray(
            shape, dtype, buffer=bytearray(data) or bytearray(1)
        )
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        raise IntegrityError(f"object holds an impossible array. shape={shape} dtype={text} error={error}") from None
    return found
