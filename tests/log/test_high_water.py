"""Stores that are rolled back to old data are not taken for the log."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from kit.logs.small import JOB, Disk, Store, commit, image_of

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.errors import IntegrityError, UnavailableError
from ckpt.log import high_water, sequencers
from ckpt.log.fold import empty
from ckpt.log.high_water import FILES, HighWaterMark, SeenRecord
from ckpt.log.journal import Journal
from ckpt.log.sequencers import STATE_VARIABLE
from ckpt.values import SnapshotId


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    # A busy disk may take longer than an opening waits for its mark.
    monkeypatch.setattr(high_water, "WAIT_S", WAIT_S)


WAIT_S = 20.0


def _saved(store: Backend, step: int) -> None:
    journal = Journal.open(store, job=JOB, create=True)
    epoch = journal.refresh().epoch or journal.open_epoch(resume=None)
    commit(journal, epoch, step)


@pytest.mark.parametrize("goes_on", [False, True], ids=["older", "another log"])
def test_a_lone_store_that_was_rolled_back_is_told_and_not_written_to(
    goes_on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Disk("a")
    _saved(store, 1)
    image = image_of(store)
    _saved(store, 2)
    if goes_on:  # another machine, which saw nothing, went on with the image
        monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "elsewhere"))
        for step in (3, 4, 5):
            _saved(image, step)
        monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    there = [stat.key for stat in image.list("")]
    journal = Journal.open(image)
    state = journal.refresh()
    assert "rolled back" in state.stale_reason, "a restore asks for permission"
    for write in (
        lambda: journal.open_epoch(resume=None),
        lambda: journal.tag("x", SnapshotId(1, 1)),
        lambda: journal.drop([SnapshotId(1, 1)]),
        journal.refresh_confirmed,
    ):
        with pytest.raises(IntegrityError, match="ckpt stores accept"):
            write()
    assert [stat.key for stat in image.list("")] == there
    # It is told again by each process, until the newer data is back or somebody accepts.
    assert not Journal.open(store).refresh().stale_reason
    assert Journal.open(image).refresh().stale_reason
    assert not journal.accept_rollback().stale_reason
    journal.tag("x", SnapshotId(1, 1))
    assert not Journal.open(image).refresh().stale_reason


def test_a_rollback_is_not_accepted_in_silence_where_that_cannot_be_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the command succeeds, and the job's next process refuses the log again."""
    store = Disk("a")
    _saved(store, 1)
    image = image_of(store)
    _saved(store, 2)
    journal = Journal.open(image)
    assert journal.refresh().stale_reason

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(high_water.tempfile, "mkstemp", full)
        with pytest.raises(UnavailableError, match=r"no space left.*local disk"):
            journal.accept_rollback()
    assert Journal.open(image).refresh().stale_reason
    Journal.open(image).accept_rollback()
    assert not Journal.open(image).refresh().stale_reason


def test_a_copy_at_another_address_is_a_log_of_its_own(tmp_path: Path) -> None:
    store = FileBackend(tmp_path / "a")
    _saved(store, 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _saved(store, 2)
    assert not Journal.open(FileBackend(tmp_path / "b")).refresh().stale_reason


def test_a_process_that_saw_more_meanwhile_makes_nobody_doubt() -> None:
    """What was seen is read before the stores are."""
    stores = [Store("one", inner=Disk("one"))]
    _saved(stores[0], 1)
    reader = Journal.open(stores[0])
    other = Journal.open(stores[0].inner)

    def meanwhile() -> None:
        stores[0].before = lambda: None
        other.tag("x", SnapshotId(1, 1))

    for at in range(1, 20):
        count = 0

        def step(at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                meanwhile()

        stores[0].before = step
        assert not reader.refresh().stale_reason
        stores[0].before = lambda: None
        reader = Journal.open(stores[0])


def test_a_state_folder_that_cannot_be_used_costs_nothing_but_the_protection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "file"))
    store = Disk("a")
    _saved(store, 1)
    _saved(store, 2)
    assert not Journal.open(store).refresh().stale_reason


def test_a_mark_that_is_damaged_is_as_good_as_none(tmp_path: Path) -> None:
    mark = HighWaterMark("disk:x", "0" * 32)
    mark.paths[0].parent.mkdir(parents=True)
    mark.paths[0].write_bytes(b"{")
    mark.look()
    assert mark.judge(empty("job")) == "" and mark.known


@pytest.mark.parametrize("records", [0, 1])
def test_what_was_accepted_stays_accepted(records: int, tmp_path: Path) -> None:
    """Also an empty log, which has no last record."""
    store = Disk("a")
    journal = Journal.open(store, job=JOB, create=True)
    if records:
        journal.open_epoch(resume=None)
    image = image_of(store)
    _saved(store, 1)
    rolled_back = Journal.open(image)
    assert rolled_back.refresh().stale_reason
    assert rolled_back.accept_rollback().next_seq == records
    assert not Journal.open(image).refresh().stale_reason


def test_stores_are_the_same_in_whatever_order_they_are_named() -> None:
    """Else who names them otherwise than the job does would accept for nobody."""
    log_id = "0" * 32
    marks = [HighWaterMark(url, log_id) for url in ("/a + /b", "/b + /a", "/a + /c")]
    assert marks[0].paths == marks[1].paths != marks[2].paths


def test_a_folder_whose_name_is_no_text_is_remembered_too(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    _saved(FileBackend(folder), 1)
    assert Journal.open(FileBackend(folder)).refresh().next_seq == 2
    assert FILES.settle(WAIT_S)
    assert len(list((tmp_path / "state" / "seen").iterdir())) == 1


def test_before_the_log_is_read_nothing_is_called_older() -> None:
    """Of a lone store a look before objects are written reads ``ckpt.json`` alone."""
    store = Disk("a")
    _saved(store, 1)
    journal = Journal.open(store)
    journal.look_at_stores()
    assert journal.mark is not None and not journal.mark.older


def test_a_folder_of_marks_that_hangs_holds_up_no_record_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The opening of a pipe waits for its other end, as a file of a server that is gone does."""
    monkeypatch.setattr(high_water, "WAIT_S", 0.05)
    store = Disk("a")
    _saved(store, 1)
    image = image_of(store)
    assert FILES.settle(WAIT_S)
    [mark] = (Path(os.environ[STATE_VARIABLE]) / "seen").iterdir()
    journal = Journal.open(store)
    journal.refresh()
    mark.unlink()
    os.mkfifo(mark)
    for _ in range(10):
        journal.tag("x", SnapshotId(1, 1))
        journal.untag("x")
    seq = journal.refresh().next_seq - 1
    assert not FILES.settle(0)
    deadline_s = time.monotonic() + WAIT_S
    while not (why := FILES.trouble()):
        assert time.monotonic() < deadline_s
    assert "does not answer" in why
    with mark.open("wb"):  # the server is back
        pass
    assert FILES.settle(WAIT_S) and not FILES.trouble()
    assert msgspec.json.decode(mark.read_bytes(), type=SeenRecord).seq == seq
    assert Journal.open(image).refresh().stale_reason


def test_a_mark_that_hangs_is_taken_once_its_folder_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(high_water, "WAIT_S", 0.05)
    store = Disk("a")
    _saved(store, 1)
    image = image_of(store)
    _saved(store, 2)
    assert FILES.settle(WAIT_S)
    [mark] = (Path(os.environ[STATE_VARIABLE]) / "seen").iterdir()
    data = mark.read_bytes()
    mark.unlink()
    os.mkfifo(mark)
    journal = Journal.open(image)
    assert not journal.refresh().stale_reason, "not known"
    with mark.open("wb") as pipe:
        pipe.write(data)
    assert journal.mark is not None and journal.mark._reading is not None
    journal.mark._reading.result(WAIT_S)
    assert journal.refresh().stale_reason


def test_folders_at_one_path_of_two_machines_that_share_a_home_are_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = tmp_path / "machine-id"
    monkeypatch.setattr(sequencers, "MACHINE_ID", machine)
    path, others = tmp_path / "store", tmp_path / "of another machine"
    _saved(FileBackend(path), 1)  # by a release that did not tell machines apart
    shutil.copytree(path, others)
    machine.write_text("one")
    mark = HighWaterMark(str(path), Journal.open(FileBackend(path)).log_id)
    mark.look()
    assert mark.seen is not None, "an older release's mark is read"
    _saved(FileBackend(path), 2)
    path.rename(tmp_path / "of one")
    others.rename(path)
    machine.write_text("two")
    assert not Journal.open(FileBackend(path)).refresh().stale_reason
    machine.write_text("one")
    assert Journal.open(FileBackend(path)).refresh().stale_reason


def test_an_object_store_is_one_from_every_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = tmp_path / "machine-id"
    monkeypatch.setattr(sequencers, "MACHINE_ID", machine)
    paths = []
    for name in ("one", "two"):
        machine.write_text(name)
        paths.append(HighWaterMark("s3://bucket/run", "0" * 32).paths)
    assert paths[0] == paths[1]
