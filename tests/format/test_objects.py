"""The safe codec: bit-exact both ways, and hostile bytes give IntegrityError only."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckpt.errors import IntegrityError, UsageError
from ckpt.format.objects import (
    DEPTH_MAX,
    DataclassNode,
    EncodedValue,
    EnumNode,
    Named,
    NamedTupleNode,
    Ref,
    StateNode,
    decode_object,
    encode_object,
)

any_text = st.text(st.characters(), max_size=40)
text_with_surrogates = st.text(st.characters(codec=None, categories=None), max_size=20)
numbers = st.one_of(
    st.integers(-(1 << 200), 1 << 200),
    st.integers(-40, 200),
    st.floats(),
    st.complex_numbers(allow_nan=True),
)
hashable = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        text_with_surrogates,
        st.binary(max_size=40),
        st.builds(Named, any_text, any_text),
    ),
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
arrays = hnp.arrays(
    st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(),
        hnp.unsigned_integer_dtypes(),
        hnp.floating_dtypes(),
        hnp.complex_number_dtypes(),
        hnp.datetime64_dtypes(),
        hnp.unicode_string_dtypes(),
        hnp.byte_string_dtypes(),
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
values = st.recursive(
    st.one_of(
        hashable,
        arrays,
        st.builds(Ref, any_text, any_text, any_text),
        st.builds(EnumNode, any_text, any_text),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashable, inner, max_size=4),
        st.dictionaries(hashable, inner, max_size=4).map(OrderedDict),
        st.lists(inner, max_size=3).map(lambda found: deque(found, 5)),
        st.sets(hashable, max_size=4),
        st.builds(StateNode, any_text, inner),
        st.builds(DataclassNode, any_text, st.dictionaries(any_text, inner, max_size=3)),
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equality by type and by bits."""
    if type(a) is not type(b):
        return False
    match a, b:
        case float(), float():
            return struct.pack("d", a) == struct.pack("d", b)
        case complex(), complex():
            return struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
        case (np.ndarray(), np.ndarray()) | (np.generic(), np.generic()):
            return a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes()
        case dict(), dict():
            return len(a) == len(b) and all(
                same(k, m) and same(v, n)
                for (k, v), (m, n) in zip(a.items(), b.items(), strict=True)
            )
        case (set() | frozenset(), _):
            return sorted(map(encode_object, a)) == sorted(map(encode_object, b))
        case (list() | tuple() | deque(), _):
            extra = a.maxlen == b.maxlen if isinstance(a, deque) else True
            return extra and len(a) == len(b) and all(map(same, a, b))
        case DataclassNode(), DataclassNode():
            return a.type_name == b.type_name and same(a.fields, b.fields)
        case StateNode(), StateNode():
            return a.class_name == b.class_name and same(a.state, b.state)
        case _:
            return a == b


@pytest.mark.slow
@given(values)
@settings(max_examples=150, deadline=None)
def test_any_value_comes_back_bit_exactly(value: object) -> None:
    data = encode_object(value)
    back = decode_object(data)
    assert same(value, back)
    assert encode_object(back) == data


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_decode_or_give_integrity_error(data: bytes) -> None:
    with contextlib.suppress(IntegrityError):
        decode_object(data)


@pytest.mark.slow
@given(values, st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_decode_or_give_integrity_error(value: object, data: st.DataObject) -> None:
    good = bytearray(encode_object(value))
    for _ in range(3):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for cut in (good, good[: len(good) // 2], good + b"\x00"):
        with contextlib.suppress(IntegrityError):
            decode_object(bytes(cut))


@pytest.mark.parametrize(
    "bits",
    [
        0x7FF8000000000001,
        0xFFF8000000000000,
        0x7FF0000000000000,
        0x8000000000000000,
        1,
        0x7FF0000000000001,
    ],
)
def test_float_bits_are_kept(bits: int) -> None:
    (value,) = struct.unpack(">d", bits.to_bytes(8, "big"))
    assert encode_object(value) == b"\xcb" + struct.pack(">d", value)
    assert struct.pack(">d", decode_object(encode_object(value))) == struct.pack(">d", value)


def test_nodes_counter_and_named_tuple_come_back() -> None:
    value = {
        "counter": Counter({"a": 2, "b": -1}),
        "named": NamedTupleNode("pkg.Pair", ("a", "b"), (1, (2, 3))),
        ("tuple", 1): Named("torch.dtype", "bfloat16"),
        "bytes": bytearray(b"xy"),
        "scalar": np.float16(1.5),
    }
    back = decode_object(encode_object(value))
    assert same(value, back)
    assert type(back["counter"]) is Counter  # type: ignore[index]


def test_encoded_value_stands_for_what_it_was_made_of() -> None:
    inner = {"a": Ref("x")}
    assert encode_object({"k": EncodedValue(encode_object(inner))}) == encode_object({"k": inner})


def test_unsupported_value_is_named_by_path_and_type() -> None:
    with pytest.raises(UsageError, match=r"type=builtins\.object.*path='a/1/b'"):
        encode_object({"a": [0, {"b": object()}]})


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize(
    "value",
    [
        Pair(1),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "f4")]),
        type("Sub", (dict,), {})(),
        lambda: 0,
    ],
)
def test_what_would_come_back_as_something_else_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        encode_object(value)


def test_value_that_contains_itself_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="contains itself"):
        encode_object(loop)


def test_deepest_allowed_value_comes_back() -> None:
    value: object = 1
    for level in range(DEPTH_MAX - 1):
        value = (value,) if level % 2 else [value]
    assert same(decode_object(encode_object(value)), value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x09",
        b"\x91" * 100_000,
        b"\xc9"
        + struct.pack(">IB", 12, 9)
        + b"\xa3<f8\x91\xd3\x0f\xff\xff\xff\xff\xff\xff\xff"[:12],
        b"\xc9" + struct.pack(">IB", 6, 9) + b"\xa3|O8\x90\x00",
        b"\xc1",
        b"\x82\x01\x01\x01\x02",
        b"\x81\x90\x01",
        b"\xc9" + struct.pack(">IB", 0, 99),
        b"\xa1\xff",
        b"",
    ],
)
def test_hostile_bytes_are_refused_without_allocating(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            decode_object(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
