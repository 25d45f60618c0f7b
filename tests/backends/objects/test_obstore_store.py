"""Where a listing begins, for any prefix and any key that it starts behind."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.base import is_key
from ckpt.backends.objects.obstore_store import listing_start

LETTERS = st.text("ab/.-0~é\U0001f600", max_size=6)
KEYS = LETTERS.filter(is_key)
PREFIXES = LETTERS.filter(lambda text: not text or is_key(text + "x"))


@given(PREFIXES, st.text("ab/.-0~é\U0001f600", max_size=7), KEYS)
def test_no_wanted_key_comes_before_the_beginning(prefix: str, after: str, key: str) -> None:
    start = listing_start(prefix, after)
    for wanted in (key, prefix + key):
        if is_key(wanted) and wanted.startswith(prefix) and wanted > after:
            assert start is not None
            assert wanted > start


@given(PREFIXES, LETTERS)
def test_beginning_is_a_key_in_the_prefix_s_folder(prefix: str, after: str) -> None:
    start = listing_start(prefix, after)
    if start:
        assert is_key(start)
        assert start.startswith(prefix[: prefix.rfind("/") + 1])


def test_long_log_is_not_read_from_its_beginning() -> None:
    assert listing_start("log/", "log/0007.json") == "log/0007.json"
    assert listing_start("log/0012", "") == "log/0011~"
    assert listing_start("log/", "packs/a") is None
    assert listing_start("packs/", "log/9") == ""
