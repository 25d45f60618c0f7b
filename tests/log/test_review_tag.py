"""Tags are fenced as commits are."""

import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import FencedError
from ckpt.format.keys import part_key, writer_name
from ckpt.format.manifest import Manifest, PartRef
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId


def commit(journal: Journal, epoch: int, step: int) -> SnapshotId:
    pair = SnapshotId(epoch, step)
    part = PartRef(
        key=part_key(pair, writer_name("n", f"{step:016x}")), digest="0" * 32, size_bytes=1, rank=0
    )
    manifest = Manifest(
        job="j",
        snapshot=pair,
        world_size=1,
        base=None,
        parts=(part,),
        size_bytes=1,
        new_bytes=1,
        created_unix_s=1.0,
        metadata={},
    )
    return journal.commit(manifest, epoch=epoch).id


def test_a_tag_of_a_closed_epoch_does_not_move_it() -> None:
    store = MemoryBackend("x")
    old = Journal.open(store, job="j", create=True)
    first = old.open_epoch(resume=None)
    mine = commit(old, first, 1)
    new = Journal.open(store)
    second = new.open_epoch(resume=mine)
    theirs = commit(new, second, 2)
    new.tag("best", theirs, epoch=second)
    with pytest.raises(FencedError):
        old.tag("best", mine, epoch=first)
    assert new.refresh().tags == {"best": theirs}
    old.tag("best", mine)  # people's tools act in whatever epoch is open
    assert new.refresh().tags == {"best": mine}
