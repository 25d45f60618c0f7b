"""What a caller hears where the log may hold more than it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckpt.errors import IntegrityError, NotFoundError, UnavailableError
from ckpt.format.records import Commit, Open, make_record
from ckpt.log.fold import empty, fold
from ckpt.log.select import require_known_newest, select
from ckpt.log.state import Hole, LogState
from ckpt.values import SnapshotId

HOLE = Hole(2, "record 2 is rot.")
SHORT = "two stores are silent."


def state() -> LogState:
    first = make_record(Open(1, None), job="run-a", seq=0, epoch=1, write_id="w0", prev="")
    second = make_record(
        Commit(SnapshotId(1, 10), "a" * 32, None),
        job="run-a",
        seq=1,
        epoch=1,
        write_id="w1",
        prev=first.digest,
    )
    return fold(empty("run-a"), [first, second])


def test_newest_that_is_known_needs_no_permission() -> None:
    require_known_newest(state())
    require_known_newest(empty("run-a"))


@pytest.mark.parametrize(
    ("hole", "short", "kind", "reason", "remedy"),
    [
        (HOLE, "", IntegrityError, HOLE.reason, "run ckpt scrub"),
        (HOLE, SHORT, IntegrityError, HOLE.reason, "run ckpt scrub"),
        (None, SHORT, UnavailableError, SHORT, "repeat when more stores answer"),
    ],
)
def test_newest_that_is_not_known_is_an_error_that_says_why_and_what_to_do(
    hole: Hole | None, short: str, kind: type[Exception], reason: str, remedy: str
) -> None:
    with pytest.raises(kind) as raised:
        require_known_newest(replace(state(), hole=hole, short=short))
    assert str(raised.value) == (
        f"a newer snapshot than epoch 1 step 10 may exist: {reason} {remedy}, name a step or tag, "
        "or allow it with stale='allow'"
    )


@pytest.mark.parametrize(
    ("hole", "short", "kind", "says"),
    [
        (None, "", NotFoundError, None),
        (HOLE, "", IntegrityError, f"as far as the log can be read: {HOLE.reason} run ckpt scrub"),
        (HOLE, SHORT, IntegrityError, f"can be read: {HOLE.reason} run ckpt scrub"),
        (None, SHORT, UnavailableError, f"is known: {SHORT} repeat when more stores answer"),
    ],
)
def test_what_is_not_found_is_absent_only_where_everything_was_read(
    hole: Hole | None, short: str, kind: type[Exception], says: str | None
) -> None:
    found = replace(state(), hole=hole, short=short)
    asked = [{"step": 9}, {"epoch": 7}, {"tag": "x"}]
    for raised in [_raised(found, **one) for one in asked] + [
        _raised(replace(empty("run-a"), hole=hole, short=short))
    ]:
        assert type(raised) is kind
        assert says is None or str(raised).endswith(says)
    assert select(found, step=10) == SnapshotId(1, 10), "what is there is there"


def _raised(
    found: LogState,
    *,
    step: int | None = None,
    epoch: int | None = None,
    tag: str | None = None,
) -> Exception:
    with pytest.raises(Exception, match="no s") as raised:
        select(found, step=step, epoch=epoch, tag=tag)
    return raised.value
