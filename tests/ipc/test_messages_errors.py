"""Errors keep their kind, their words and their rank on the way."""

from __future__ import annotations

import pytest

from ckpt import errors
from ckpt.errors import CkptError, InternalError
from ckpt.ipc.messages import RemoteError, from_error, to_error

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_error_becomes_the_same_kind_again(kind: type[CkptError]) -> None:
    error = to_error(from_error(kind("a fact. key=1"), rank=3))
    assert type(error) is kind
    assert str(error) == "rank 3: a fact. key=1"


def test_error_of_another_rank_keeps_that_rank_when_it_is_handed_on() -> None:
    first = from_error(CkptError("a fact."), rank=3)
    assert from_error(to_error(first), rank=0) == first


def test_error_of_a_keeper_is_no_ranks() -> None:
    assert str(to_error(RemoteError("fenced", "a fact.", -1))) == "a fact."


def test_unknown_code_is_a_defect_of_ours() -> None:
    assert isinstance(to_error(RemoteError("of a newer release", "x", 0)), InternalError)
