"""A snapshot that may not be the newest is restored only if the caller allows it."""

from __future__ import annotations

import pytest

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.log.journal import Journal


def spoilt_record(store: MemoryBackend) -> None:
    """Damage both copies of the last record, behind which nothing can be known."""
    last = Journal.open(store).refresh().next_seq - 1
    for key in (keys.log_key(last), keys.copy_key(keys.log_key(last))):
        store.put(key, [b"rot"])


def test_older_snapshot_behind_a_hole_is_restored_only_if_allowed() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as checkpointer:
        for step in (1, 2):
            checkpointer.save({"state": {"x": step}}, step=step)
    state = {"x": 0}
    with ckpt.Checkpointer(store) as checkpointer:
        assert checkpointer.restore({"state": state}).step == 2
    spoilt_record(store)
    state = {"x": 0}
    with ckpt.Checkpointer(store) as checkpointer:
        with pytest.raises(ckpt.IntegrityError, match=r"may exist.*stale='allow'"):
            checkpointer.restore({"state": state})
        assert state == {"x": 0}, "nothing is changed"
        found = checkpointer.restore({"state": state}, stale="allow")
        assert (found.step, found.maybe_stale, state) == (1, True, {"x": 1})
    with ckpt.Checkpointer(store) as checkpointer:
        assert checkpointer.restore({"state": state}, step=1).step == 1, "it was named"
        with pytest.raises(ckpt.UsageError, match="stale is"):
            checkpointer.restore({"state": state}, stale="yes")  # type: ignore[arg-type]


def test_damaged_log_without_any_snapshot_left_is_no_fresh_start() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as checkpointer:
        checkpointer.save({"state": {"x": 1}}, step=1)
    spoilt_record(store)
    for stale in ("error", "allow"):
        with (
            ckpt.Checkpointer(store) as checkpointer,
            pytest.raises(ckpt.IntegrityError, match="the log is damaged"),
        ):
            checkpointer.restore({"state": {"x": 0}}, stale=stale)  # type: ignore[arg-type]
