"""Whether a store creates once is asked of it, and nothing else that a store does is taken for a
yes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckpt.backends.probe import CreateOnceProbe, creates_once, interpret_outcomes
from ckpt.errors import (
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)


def caused(cause: Exception) -> UnavailableError:
    error = UnavailableError("cannot ask")
    error.__cause__ = cause
    return error


def acts(*outcomes: Exception | None) -> Callable[[], None]:
    left = list(outcomes)

    def act() -> None:
        outcome = left.pop(0)
        if outcome is not None:
            raise outcome

    return act


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((None, KeyExistsError("412")), True),
        ((None, None), False),
        ((UsageError("no such parameter"),), False),
        ((caused(NotImplementedError()),), False),
        ((caused(TypeError()),), False),
        ((UnavailableError("the store failed. error=NotImplemented status=501"),), False),
        ((None, NotFoundError("404")), None),
        ((NotFoundError("no bucket"),), None),
        ((KeyExistsError("its own repetition"),), None),
    ],
    ids=repr,
)
def test_only_a_refusal_because_the_key_is_taken_means_yes(
    outcomes: tuple[Exception | None, ...], expected: bool | None
) -> None:
    removed: list[int] = []
    assert creates_once(acts(*outcomes), lambda: removed.append(1)) is expected
    assert removed == [1]


@pytest.mark.parametrize("before", [(), (None,)], ids=["first", "second"])
@pytest.mark.parametrize(
    "error", [StoreDeniedError("403"), StoreFullError("507"), UnavailableError("503")], ids=repr
)
def test_a_store_that_could_not_tell_says_why(
    before: tuple[None, ...], error: UnavailableError
) -> None:
    def ask() -> bool | None:
        return creates_once(acts(*before, error), lambda: None)

    with pytest.raises(type(error)):
        ask()
    creates = CreateOnceProbe(ask, "s3://b")
    assert not creates()
    with pytest.raises(UsageError, match="s3://b") as raised:
        creates.require()
    assert isinstance(raised.value.__cause__, type(error))


@pytest.mark.parametrize(
    "error", [StoreDeniedError("403"), UnavailableError("503"), NotFoundError("404")], ids=repr
)
def test_store_that_deletes_nothing_still_tells(error: Exception) -> None:
    assert creates_once(acts(None, KeyExistsError("412")), acts(error)) is True


def test_error_of_ours_is_not_taken_for_an_answer() -> None:
    with pytest.raises(ZeroDivisionError):
        creates_once(acts(ZeroDivisionError()), lambda: None)


def test_verdict_needs_a_first_creation() -> None:
    assert interpret_outcomes("unknown", None) is None
    assert interpret_outcomes("created", "impossible") is None


def test_answer_is_remembered_and_silence_is_not() -> None:
    answers: list[bool | None] = [None, None, True]
    creates = CreateOnceProbe(lambda: answers.pop(0), "s3://b")
    assert [creates(), creates()] == [False, False]
    with pytest.raises(UsageError, match="s3://b"):
        CreateOnceProbe(lambda: False, "s3://b").require()
    creates.require()
    assert creates()
    assert answers == []
