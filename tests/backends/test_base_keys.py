from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.base import check_key, check_prefix, is_key
from ckpt.errors import UsageError
from ckpt.testing.contract import HOSTILE_KEYS, ODD_KEYS


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=ascii)
def test_hostile_key_is_refused_with_a_remedy(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(UsageError, match="use relative names"):
        check_key(key)


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_odd_key_is_taken_as_it_is(key: str) -> None:
    assert check_key(key) == key


def test_length_limits_are_exact() -> None:
    assert is_key("x" * 255)
    assert not is_key("x" * 256)
    assert is_key("/".join(["x" * 255, "y" * 254, "z"]))
    assert not is_key("/".join(["x" * 255, "y" * 254, "zz"]))
    assert not is_key("é" * 128)


@given(st.text(max_size=20))
def test_every_prefix_of_a_key_is_a_prefix(text: str) -> None:
    if is_key(text):
        for stop in range(len(text)):
            check_prefix(text[:stop])


@pytest.mark.parametrize("prefix", ["/", "../", "a//", "a/./", "\0", ".tmp/"])
def test_prefix_that_no_key_has_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError):
        check_prefix(prefix)
