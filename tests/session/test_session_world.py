"""A session belongs to the ranks that it connected with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.errors import UsageError
from ckpt.session.options import SessionOptions, check_store
from ckpt.session.session import Session


@contextmanager
def group(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(check_store(str(tmp_path / "run")), SessionOptions())
    made.join()
    yield made
    made.abandon()


def test_group_of_more_ranks_than_the_session_is_refused_with_what_to_do(session: Session) -> None:
    with group(0, 2), pytest.raises(UsageError, match=r"group_ranks=2.*start it with torchrun"):
        session.open_run()
    assert not session.opened


def test_group_of_this_rank_alone_is_no_other_world(session: Session) -> None:
    with group(0, 1):
        session.open_run()
    assert session.opened


def test_group_that_comes_after_the_run_has_begun_is_refused_too(session: Session) -> None:
    session.open_run()
    with group(1, 2), pytest.raises(UsageError, match="group_rank=1"):
        session.open_run()
