"""Runs inside runs."""

from __future__ import annotations

import threading

import pytest

from ckpt.elastic.decorator import claimed_store
from ckpt.errors import UsageError


def test_same_store_inside_is_refused_and_free_again_afterwards() -> None:
    with (
        claimed_store("a"),
        pytest.raises(UsageError, match="store=a; give the inner one a store of its own"),
        claimed_store("a"),
    ):
        pass
    with claimed_store("a"):
        pass


def test_other_store_inside_is_allowed_but_none_of_those_around() -> None:
    with claimed_store("a"), claimed_store("b"):
        for url in ("a", "b"):
            with pytest.raises(UsageError), claimed_store(url):
                pass


def test_exception_inside_frees_the_store() -> None:
    with pytest.raises(ZeroDivisionError), claimed_store("a"):
        raise ZeroDivisionError
    with claimed_store("a"):
        pass


def test_thread_of_its_own_starts_with_no_run_around_it() -> None:
    met: list[str] = []

    def other() -> None:
        with claimed_store("a"):
            met.append("entered")

    with claimed_store("a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert met == ["entered"]
