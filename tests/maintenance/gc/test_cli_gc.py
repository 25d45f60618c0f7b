"""``ckpt gc``: what it shows, asks, drops and deletes, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.damage import without_second_copies

from ckpt.backends.file.store import FileBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.cli.main import run
from ckpt.errors import CommitUnknownError, UnavailableError
from ckpt.format import keys
from ckpt.format.records import Drop, make_record
from ckpt.log.journal import Journal
from ckpt.maintenance.gc.plan import PREFIXES
from ckpt.maintenance.gc.sweep import sweep
from ckpt.testing.sample import damage, write_sample_store
from ckpt.values import SnapshotId


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def command(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(one) for one in arguments])
        return Done(code, *capsys.readouterr())

    return command


@pytest.fixture
def store(tmp_path: Path) -> FileBackend:
    """Steps 10, 20 (tagged best), 30 and 40; the loss falls."""
    backend = FileBackend(tmp_path / "store")
    write_sample_store(backend, steps=(10, 20, 30, 40))
    return backend


def steps(store: FileBackend) -> list[int]:
    return [entry.snapshot.step for entry in Journal.open(store).refresh().snapshots]


def objects(store: FileBackend) -> set[str]:
    return {stat.key for prefix in PREFIXES for stat in store.list(prefix)}


def everything(store: FileBackend) -> set[str]:
    return {stat.key for stat in store.list("")}


@pytest.mark.slow
def test_dry_run_shows_why_each_stays_and_changes_nothing(ckpt, store) -> None:
    before = everything(store)
    done = ckpt("gc", store.url, "--keep", "best=loss:2,last=1", "--dry-run")
    assert done.code == 0
    assert "newest; last=1; best=loss:2" in done.out
    assert "tagged best" in done.out
    assert "would drop 1 of 4 snapshots" in done.out
    assert everything(store) == before
    found = ckpt("gc", store.url, "--keep", "best=loss:2,last=1", "--dry-run", "--json").json
    assert found["dropped"] == [{"epoch": 1, "step": 10}]
    assert [(one["step"], one["kept_by"]) for one in found["snapshots"]] == [
        (40, ["newest", "last=1", "best=loss:2"]),
        (30, ["best=loss:2"]),
        (20, ["tagged best"]),
        (10, []),
    ]
    assert found["stores"][0]["size_bytes"]["grace"] > 0
    assert found["stores"][0]["deleted"] == 0
    assert everything(store) == before


@pytest.mark.slow
def test_drop_comes_first_and_bytes_go_when_the_grace_is_over(ckpt, store) -> None:
    before = objects(store)
    done = ckpt("gc", store.url, "--keep", "last=1", "--yes")
    assert done.code == 0
    assert "dropped 2 of 4 snapshots" in done.out
    assert "go when the grace of 15m is over" in done.out
    assert steps(store) == [20, 40]
    assert objects(store) == before
    promised = ckpt("gc", store.url, "--grace", "0", "--dry-run", "--json").json["stores"][0][
        "objects"
    ]["garbage"]
    done = ckpt("gc", store.url, "--grace", "0", "--json")
    assert done.json["stores"][0]["deleted"] == promised == len(before - objects(store)) > 0
    assert done.json["dropped"] == []
    assert ckpt("verify", store.url, "--all").code == 0


@pytest.mark.slow
def test_dry_run_foretells_what_the_run_does(ckpt, store) -> None:
    arguments = ("gc", store.url, "--keep", "every=20", "--grace", "0", "--json")
    foretold = ckpt(*arguments, "--dry-run").json
    found = ckpt(*arguments, "--yes").json
    assert (
        foretold["dropped"]
        == found["dropped"]
        == [{"epoch": 1, "step": 10}, {"epoch": 1, "step": 30}]
    )
    assert foretold["stores"][0]["objects"] == found["stores"][0]["objects"]
    assert found["stores"][0]["deleted"] == found["stores"][0]["objects"]["garbage"]


@pytest.mark.slow
def test_without_a_policy_nothing_is_dropped(ckpt, store) -> None:
    done = ckpt("gc", store.url, "--json")
    assert done.code == 0
    assert done.json["policy"] is None
    assert done.json["dropped"] == []
    assert steps(store) == [10, 20, 30, 40]


@pytest.mark.slow
def test_nobody_is_asked_in_json_and_no_is_no(ckpt, store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ckpt("gc", store.url, "--keep", "last=1", "--json").code == 2
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "n")
    assert ckpt("gc", store.url, "--keep", "last=1").code == 130
    assert steps(store) == [10, 20, 30, 40]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--keep", "newest"], ["--keep", ""], ["--grace", "1y"], ["--keep", "last=0"]]
)
def test_what_is_no_policy_or_time_exits_2(ckpt, store, arguments: list[str]) -> None:
    assert ckpt("gc", store.url, *arguments).code == 2


def test_no_store_exits_10(ckpt, tmp_path: Path) -> None:
    assert ckpt("gc", tmp_path / "nothing", "--keep", "last=1").code == 10


@pytest.mark.slow
def test_damaged_part_exits_20_and_says_so(ckpt, store) -> None:
    part = next(
        key for key in sorted(objects(store)) if key.startswith(keys.PARTS) and "0030/" in key
    )
    damage(store, part, 20)
    done = ckpt("gc", store.url, "--grace", "0", "--json")
    assert done.code == 20
    assert [(one["epoch"], one["step"]) for one in done.json["held"]] == [(1, 30)]
    assert "no pack is deleted" in ckpt("gc", store.url, "--grace", "0").err


def test_hole_exits_20(ckpt, store) -> None:
    without_second_copies(store)
    damage(store, keys.log_key(2), 20)
    before = everything(store)
    assert ckpt("gc", store.url, "--keep", "last=1", "--yes", "--grace", "0").code == 20
    assert everything(store) == before


@pytest.mark.slow
def test_several_stores_are_swept_and_one_that_is_gone_exits_11(ckpt, tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in "abc"]
    backend = open_stores(urls, emit=lambda _: None)
    write_sample_store(backend)
    assert backend.await_caught_up(20.0)
    backend.close()
    done = ckpt("gc", *urls, "--keep", "tagged", "--yes", "--grace", "0", "--json")
    assert done.code == 0, done.err
    assert done.json["dropped"] == [{"epoch": 1, "step": 10}]
    assert [one["deleted"] > 0 for one in done.json["stores"]] == [True] * 3
    (tmp_path / "c").rename(tmp_path / "moved")
    done = ckpt("gc", *urls, "--grace", "0", "--json")
    assert done.code == 11
    assert [bool(one["problem"]) for one in done.json["stores"]] == [False, False, True]
    assert not (tmp_path / "c" / "probes").exists()


def test_off_the_line_is_marked(ckpt, store) -> None:
    writer = Journal.open(store)
    writer.open_epoch(resume=SnapshotId(1, 20))
    done = ckpt("gc", store.url, "--dry-run")
    assert [line.split()[0] for line in done.out.splitlines()[1:3]] == ["-", "-"]


@pytest.mark.parametrize("grace", ["0s", "1m"])
def test_one_store_of_several_never_deletes_what_a_drop_on_it_alone_names(
    ckpt, tmp_path: Path, grace: str
) -> None:
    """Both stores must hold a record, so each has all that was told. A drop of a dead writer is on
    one of them; the other's record has its place."""
    urls = [str(tmp_path / name) for name in ("a", "b")]
    stores = open_stores(urls, write_quorum=2, emit=lambda event: None)
    write_sample_store(stores, steps=(10, 20, 30, 40))
    journal = Journal.open(stores)
    state = journal.refresh()
    drop = make_record(
        Drop((SnapshotId(1, 10), SnapshotId(1, 30)), None),
        job=state.job,
        seq=state.next_seq,
        epoch=1,
        write_id="dead",
        prev=state.head_digest,
    )
    one = FileBackend(urls[0])
    one.put(keys.log_key(drop.seq), [drop.encode()], create_only=True)
    before = everything(one)
    done = ckpt("gc", urls[0], "--yes", "--grace", grace, "--keep", "last=4")
    assert done.code != 0 and "2 stores was asked" in done.err
    assert everything(one) == before
    with pytest.raises(CommitUnknownError, match="name the others too"):
        Journal.open(one).refresh_confirmed()
    with pytest.raises(UnavailableError, match="nothing is deleted"):
        sweep(one, Journal.open(one).refresh(), grace_s=0.0)
    stores.close()


def test_metric_that_no_snapshot_has_is_told_before_anything_is_dropped(ckpt, store) -> None:
    rehearsed = ckpt("gc", store.url, "--keep", "best=accuracy:1", "--dry-run")
    assert rehearsed.code == 0 and "metrics='loss'" in rehearsed.err
    done = ckpt("--json", "gc", store.url, "--keep", "best=accuracy:1", "--yes")
    assert done.code == 0 and done.json["dropped"] == [] and steps(store) == [10, 20, 30, 40]
    assert "metric='accuracy'" in done.json["problems"][0]
    assert ckpt("gc", store.url, "--keep", "best=loss:1", "--yes").code == 0
    assert steps(store) == [20, 40]


def test_what_was_dropped_can_be_restored_until_its_bytes_are_gone(
    ckpt, store, tmp_path: Path
) -> None:
    assert ckpt("gc", store.url, "--keep", "last=1", "--yes").code == 0
    assert steps(store) == [20, 40]
    restore = ("--json", "restore", store.url, "--format", "safetensors", "--step", "30")
    assert ckpt(*restore, "--to", tmp_path / "no").code == 10, "dropped: only if that is meant"
    done = ckpt(*restore, "--to", tmp_path / "undo", "--dropped")
    assert done.code == 0 and done.json["snapshot"] == {"epoch": 1, "step": 30}
    assert (tmp_path / "undo" / "model.safetensors").exists()
    assert ckpt("restore", store.url, "--to", tmp_path / "x", "--dropped").code == 2
    exists = ckpt(*restore[:-1], "40", "--to", tmp_path / "x", "--dropped")
    assert exists.code == 10, "it was not dropped"
    assert ckpt("gc", store.url, "--grace", "0", "--yes").code == 0
    gone = ckpt(*restore, "--to", tmp_path / "gone", "--dropped")
    assert gone.code == 10 and "deleted" in gone.err
