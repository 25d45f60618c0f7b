from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.backends.file.syscalls import RealOps
from ckpt.errors import (
    CkptError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.testing.contract import buffer, keys, read
from ckpt.testing.crashes import FailingOps, RecordingOps

MIB = 1 << 20


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def mount_tmpfs(folder: Path, size: str) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(
            "there is no mount command here; the limit and injection tests beside this one cover "
            "the same errors"
        )
    if done.returncode:
        pytest.skip(
            f"mounting is not allowed here ({done.stderr.strip()}); the tests beside this one "
            "cover the same errors"
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    folder = tmp_path / "small"
    mount_tmpfs(folder, "8m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def calls_of_put(folder: Path, body: memoryview, *, create_only: bool) -> list[str]:
    """The names of a first put's calls, in order."""
    ops = RecordingOps()
    FileBackend(folder, ops=ops).put("packs/a", [body], create_only=create_only)
    return [call.name for call in ops.calls]


@pytest.mark.slow
@pytest.mark.parametrize("create_only", [False, True])
@pytest.mark.parametrize(
    ("number", "error", "effect"),
    [
        (errno.ENOSPC, StoreFullError, False),
        (errno.EACCES, StoreDeniedError, False),
        (errno.EIO, UnavailableError, False),
        (errno.EIO, UnavailableError, True),
    ],
)
def test_put_that_fails_at_any_call_leaves_no_garbage_and_the_next_works(
    tmp_path: Path, create_only: bool, number: int, error: type[CkptError], effect: bool
) -> None:
    body = buffer(MIB + 5, aligned=True, seed=1)
    names = calls_of_put(tmp_path / "count", body, create_only=create_only)
    for at in range(len(names)):
        root = tmp_path / f"at-{at}"
        ops = FailingOps(number, at=at, effect=effect)
        store = FileBackend(root, ops=ops)
        try:
            store.put("packs/a", [body], create_only=create_only)
        except CkptError as caught:
            assert type(caught) is error, f"at={at}"
            assert isinstance(caught.__cause__, OSError)
            assert str(root) in str(caught)
        assert ops.failed == 1
        if names[at] not in ("unlink", "open"):
            # A name that cannot be removed, or whose making was not known of, waits for the next
            # writer's sweep.
            assert set(files(root)) <= {"packs/a"}, f"at={at}"
        if (root / "packs/a").exists():
            assert read(store, "packs/a") == bytes(body)
        store.put("packs/a", [body])
        FileBackend(root).put("packs/b", [b"x"])
        assert files(root) == ["packs/a", "packs/b"], f"at={at}"
        assert read(store, "packs/a") == bytes(body)


def test_full_disk_is_store_full_and_leaves_no_garbage(small_disk: Path) -> None:
    store = FileBackend(small_disk / "store")
    store.put("packs/a", [buffer(3 * MIB, aligned=True, seed=1)])
    for direct in (True, False):
        full = FileBackend(small_disk / "store", direct_io=direct)
        with pytest.raises(StoreFullError, match="free space"):
            full.put("packs/b", [buffer(6 * MIB, aligned=True, seed=2)])
        assert files(small_disk / "store") == ["packs/a"]
    store.put("packs/b", [buffer(2 * MIB, aligned=True, seed=2)])
    assert keys(store) == ["packs/a", "packs/b"]


def test_file_size_limit_is_store_full_and_leaves_no_garbage(tmp_path: Path) -> None:
    store = FileBackend(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (3 * MIB, MIB - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, hard))
        try:
            with pytest.raises(StoreFullError):
                store.put("packs/a", [buffer(size, aligned=True)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(tmp_path / "store") == []
    store.put("packs/a", [buffer(3 * MIB, aligned=True)])


def test_read_only_mount_is_denied_and_still_reads(small_disk: Path) -> None:
    FileBackend(small_disk / "store").put("a", [b"x"])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = FileBackend(small_disk / "store")
    for act in (
        lambda: store.put("b", [b"x"]),
        lambda: store.put("b", [b"x"], create_only=True),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreDeniedError, match="mount it writable"):
            act()
    assert not store.capabilities().create_only
    assert read(store, "a") == b"x"
    assert keys(store) == ["a"]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert store.capabilities().create_only
    store.put("b", [b"x"], create_only=True)


def test_store_that_may_not_be_written_is_denied(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        store = FileBackend(tmp_path / "store", ops=FailingOps(errno.EACCES))
    else:
        (tmp_path / "store").mkdir(mode=0o555)
        store = FileBackend(tmp_path / "store")
    with pytest.raises(StoreDeniedError, match="grant permission"):
        store.put("a", [b"x"])
    assert not store.capabilities().create_only


def test_tmpfs_takes_large_objects_whatever_it_makes_of_direct_io(small_disk: Path) -> None:
    store = FileBackend(small_disk)
    data = [buffer(2 * MIB, aligned=True, seed=1), buffer(MIB + 3, aligned=False, seed=2)]
    store.put("a", data)
    assert read(store, "a") == b"".join(data)


def test_missing_root_reads_as_empty_and_is_made_by_the_first_put(tmp_path: Path) -> None:
    store = FileBackend(tmp_path / "not/yet")
    assert keys(store) == []
    assert store.stat("a") is None
    assert store.capabilities().create_only
    store.delete("a")
    with pytest.raises(NotFoundError):
        store.read_into("a", memoryview(bytearray(1)))
    assert not (tmp_path / "not").exists()
    store.put("a", [b"x"])
    assert keys(store) == ["a"]


def test_root_that_vanishes_is_made_again(tmp_path: Path) -> None:
    store = FileBackend(tmp_path / "store")
    store.put("a", [b"x"])
    (tmp_path / "store").rename(tmp_path / "moved")
    assert keys(store) == []
    store.put("b", [b"y"], create_only=True)
    assert keys(store) == ["b"]


def test_folder_that_vanishes_during_a_list_ends_it_quietly(tmp_path: Path) -> None:
    store = FileBackend(tmp_path / "store")
    for key in ("a/1", "b/1", "c"):
        store.put(key, [b"x"])
    listing = store.list("")
    assert next(listing).key == "a/1"
    (tmp_path / "store/b").rename(tmp_path / "elsewhere")
    assert [entry.key for entry in listing] == ["c"]


def test_folder_pruned_while_a_put_names_its_object_is_made_again(tmp_path: Path) -> None:
    class Pruning(RealOps):
        pruned = 0

        def mkdir(self, path: str) -> None:
            super().mkdir(path)
            if path.endswith("/packs") and self.pruned < 3:
                self.pruned += 1
                self.rmdir(path)

    for create_only in (False, True):
        ops = Pruning()
        store = FileBackend(tmp_path / str(create_only), ops=ops)
        store.put("packs/deep/a", [b"x"], create_only=create_only)
        assert ops.pruned == 3
        assert keys(store) == ["packs/deep/a"]


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="already a file"):
        FileBackend(tmp_path / "file").put("a", [b"x"])


def test_key_through_an_object_or_at_a_folder_is_refused(tmp_path: Path) -> None:
    store = FileBackend(tmp_path)
    store.put("a/b", [b"x"])
    for create_only in (False, True):
        with pytest.raises(UsageError, match="already a folder"):
            store.put("a", [b"y"], create_only=create_only)
        with pytest.raises(UsageError, match="already a file"):
            store.put("a/b/c", [b"y"], create_only=create_only)
    assert store.stat("a/b/c") is None
    store.delete("a/b/c")
    with pytest.raises(NotFoundError):
        store.read_into("a/b/c", memoryview(bytearray(1)))
    assert files(tmp_path) == ["a/b"]


def test_symbolic_links_below_the_root_are_refused_and_not_listed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = FileBackend(tmp_path / "store")
    store.put("a", [b"x"])
    (tmp_path / "store/out").symlink_to(outside)
    (tmp_path / "store/link").symlink_to(outside / "secret")
    for key in ("out/secret", "out/new", "out/deep/new"):
        for act in (
            lambda key=key: store.put(key, [b"y"]),
            lambda key=key: store.stat(key),
            lambda key=key: store.delete(key),
        ):
            with pytest.raises(UsageError, match="symbolic link"):
                act()
    with pytest.raises(UsageError, match="symbolic link"):
        store.read_into("link", memoryview(bytearray(1)))
    assert store.stat("link") is None
    assert keys(store) == ["a"]
    assert files(outside) == ["secret"]


def test_root_that_is_a_symbolic_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = FileBackend(tmp_path / "link")
    store.put("a/b", [b"x"], create_only=True)
    assert read(store, "a/b") == b"x"
    assert keys(store) == ["a/b"]


def test_relative_root_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = FileBackend("runs/a")
    monkeypatch.chdir("/")
    store.put("a", [b"x"])
    assert (tmp_path / "runs/a/a").read_bytes() == b"x"


def test_foreign_files_are_not_listed(tmp_path: Path) -> None:
    store = FileBackend(tmp_path)
    store.put("a", [b"x"])
    (tmp_path / ".tmp" / "unfinished").write_bytes(b"x")
    (tmp_path / "back\\slash").write_bytes(b"x")
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    assert keys(store) == ["a"]
    with pytest.raises(NotFoundError):
        store.read_into("pipe", memoryview(bytearray(1)))


def test_link_whose_reply_was_lost_counts_as_done(tmp_path: Path) -> None:
    class Retrying(RealOps):
        def link(self, source: str, target: str) -> None:
            super().link(source, target)
            if target.endswith("log/1"):
                super().link(source, target)

    store = FileBackend(tmp_path, ops=Retrying())
    store.put("log/1", [b"x"], create_only=True)
    with pytest.raises(KeyExistsError):
        store.put("log/1", [b"x"], create_only=True)


def test_taken_key_is_on_disk_before_anyone_is_told(tmp_path: Path) -> None:
    FileBackend(tmp_path).put("log/1", [b"x"])
    ops = RecordingOps()
    with pytest.raises(KeyExistsError):
        FileBackend(tmp_path, ops=ops).put("log/1", [b"x"], create_only=True)
    synced = [call.path for call in ops.calls if call.name == "fsync_directory"]
    assert synced[-2:] == [str(tmp_path / "log"), str(tmp_path)]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_system_without_links_creates_by_renaming(tmp_path: Path, number: int) -> None:
    ops = FailingOps(number, op="link")
    store = FileBackend(tmp_path / "store", ops=ops)
    assert store.capabilities().create_only
    store.put("a", [b"x"], create_only=True)
    with pytest.raises(KeyExistsError):
        store.put("a", [b"y"], create_only=True)
    assert read(store, "a") == b"x"
    assert files(tmp_path / "store") == ["a"]


def test_file_system_that_can_only_replace_refuses_to_create(tmp_path: Path) -> None:
    class Replacing(RealOps):
        def link(self, source: str, target: str) -> None:
            raise OSError(errno.EPERM, "no links")

        def rename_new(self, source: str, target: str) -> None:
            raise OSError(errno.EINVAL, "no such flag")

    store = FileBackend(tmp_path, ops=Replacing())
    assert not store.capabilities().create_only
    with pytest.raises(UsageError, match="use another store"):
        store.put("a", [b"x"], create_only=True)
    store.put("a", [b"x"])
    assert keys(store) == ["a"]


def test_object_is_synced_before_it_has_a_name_and_its_folders_after(tmp_path: Path) -> None:
    ops = RecordingOps()
    store = FileBackend(tmp_path, ops=ops)
    store.put("warm", [b"x"], create_only=True)
    for create_only in (False, True):
        ops.calls.clear()
        key = f"p/{create_only}/a"
        store.put(key, [b"x"], create_only=create_only)
        names = [call.name for call in ops.calls]
        give = "link" if create_only else "rename"
        assert names.index("write") < names.index("fsync") < names.index(give)
        synced = [
            call.path for call in ops.calls[names.index(give) :] if call.name == "fsync_directory"
        ]
        assert synced == [str((tmp_path / key).parent), str(tmp_path / "p"), str(tmp_path)]


def test_object_that_became_a_link_loop_is_refused(tmp_path: Path) -> None:
    store = FileBackend(tmp_path)
    store.put("a", [b"x"])
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(UsageError):
        store.read_into("a", memoryview(bytearray(1)))


def test_reads_and_puts_leave_no_open_files(tmp_path: Path) -> None:
    store = FileBackend(tmp_path)
    store.put("a", [b"x"], create_only=True)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        store.put("b", [b"x"])
        read(store, "b")
        for act in (
            lambda: store.put("a", [b"x"], create_only=True),
            lambda: store.read_into("none", memoryview(bytearray(1))),
            lambda: store.read_into("a", memoryview(bytearray(2))),
        ):
            with pytest.raises((KeyExistsError, NotFoundError, IntegrityError)):
                act()
        next(store.list(""))
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
