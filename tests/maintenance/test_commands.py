"""scrub, sync, doctor and verify --all-replicas, as the program runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.damage import faults_of, flip, objects_of, record_of

from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.cli.commands import scrub
from ckpt.cli.main import run
from ckpt.format import keys
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.testing.sample import write_sample_store

Command = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> Done:
        capsys.readouterr()
        code = run([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return command


def urls(stores: list[FileBackend]) -> list[str]:
    return [store.url for store in stores]


def a_pack(store: FileBackend) -> str:
    return next(iter(objects_of(store, keys.PACKS)))


def test_scrub_mends_exits_0_and_says_what_it_found(ckpt: Command, trio: list[FileBackend]) -> None:
    flip(trio[1].url, a_pack(trio[1]), 0)
    looked = ckpt("scrub", *urls(trio), "--no-mend", "--json")
    assert looked.code == 20
    assert looked.json["unmended"] == 1
    done = ckpt("scrub", *urls(trio), "--json")
    assert done.code == 0
    [trouble] = done.json["troubles"]
    assert (trouble["key"], trouble["store"], trouble["what"]) == (a_pack(trio[0]), 1, "damaged")
    assert (trouble["offsets"], trouble["mended"], trouble["lost"]) == ([0], True, False)
    assert done.json["stores"][1]["mended"] == 1
    text = ckpt("scrub", *urls(trio))
    assert text.code == 0
    assert "ok: 3 snapshots, 6 records; found 0" in text.out
    assert faults_of(trio[1], trio[0]) == []


def test_scrub_of_lost_damage_exits_20_and_names_it(ckpt: Command, trio: list[FileBackend]) -> None:
    for store in trio:
        flip(store.url, a_pack(store), 0)
    done = ckpt("scrub", *urls(trio))
    assert done.code == 20
    assert f"LOST     {a_pack(trio[0])} at 0" in done.out
    assert "NOT WELL" in done.out


def test_scrub_leaves_an_empty_store_alone_and_fills_it_when_told(
    ckpt: Command, trio: list[FileBackend]
) -> None:
    shutil.rmtree(trio[2].url)
    done = ckpt("scrub", *urls(trio), "--json")
    assert done.code == 11
    assert done.json["stores"][2]["role"] == "empty"
    assert not Path(trio[2].url).exists()
    assert ckpt("scrub", *urls(trio), "--fill-empty").code == 0
    assert faults_of(trio[2], trio[0]) == []


def test_scrub_only_warns_if_no_store_takes_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryBackend()
    write_sample_store(store)
    denied = FaultyBackend(store, [Fault(harm=Harm.READ_ONLY, times=None)])
    scrub._record((denied,), ())
    assert "no store took the record of this scrub" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "fast", "-5M"])
def test_rate_that_is_none_is_refused(ckpt: Command, trio: list[FileBackend], rate: str) -> None:
    assert ckpt("scrub", *urls(trio), f"--rate={rate}").code == 2


def test_rate_is_taken_in_the_usual_spellings(ckpt: Command, trio: list[FileBackend]) -> None:
    for rate in ("1GiB", "500M", "800MiB/s", "1.5gb"):
        assert ckpt("scrub", *urls(trio), "--rate", rate).code == 0


def test_scrub_of_what_is_no_store_exits_10_and_of_one_store_twice_2(
    ckpt: Command, trio: list[FileBackend], tmp_path: Path
) -> None:
    assert ckpt("scrub", tmp_path / "nothing").code == 10
    assert ckpt("scrub", trio[0].url, trio[0].url).code == 2
    assert ckpt("scrub").code == 2


@pytest.mark.slow
def test_verify_all_replicas_tells_of_each_store_and_writes_nothing(
    ckpt: Command, trio: list[FileBackend]
) -> None:
    names = [trio[0].url, "--replica", trio[1].url, "--replica", trio[2].url]
    done = ckpt("verify", *names, "--all-replicas", "--json")
    assert done.code == 0
    assert done.json["snapshots"] == 1
    assert [one["ok"] for one in done.json["stores"]] == [
        one["objects"] for one in done.json["stores"]
    ]
    key = next(key for key in objects_of(trio[1], keys.PARTS) if "0030/" in key)
    old = next(key for key in objects_of(trio[2], keys.PARTS) if "0010/" in key)
    flip(trio[1].url, key, 9)
    flip(trio[2].url, old, 9)
    newest = ckpt("verify", *names, "--all-replicas", "--json")
    assert newest.code == 20
    assert [(one["key"], one["store"]) for one in newest.json["troubles"]] == [(key, 1)]
    everything = ckpt("verify", *names, "--all-replicas", "--all")
    assert everything.code == 20
    assert key in everything.out
    assert old in everything.out
    again = ckpt("verify", *names, "--all-replicas", "--all", "--json")
    assert again.json["troubles_total"] == 2


def test_verify_of_one_store_with_all_replicas_is_of_that_store(ckpt: Command, lone: Path) -> None:
    assert ckpt("verify", lone, "--all-replicas", "--all").code == 0


def test_sync_makes_a_replica_and_says_what_it_copied(
    ckpt: Command, lone: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new"
    done = ckpt("sync", lone, target, "--json")
    assert done.code == 0
    assert (done.json["ok"], done.json["next_seq"], done.json["damaged"]) == (True, 5, [])
    assert record_of(FileBackend(target)).store_id == done.json["store_id"]
    text = ckpt("sync", lone, target, "--deep")
    assert text.code == 0
    assert "copied 0 objects" in text.out
    assert ckpt("ls", target, "--json").json["snapshots"][0]["step"] == 30


@pytest.mark.slow
def test_sync_of_a_damaged_source_exits_20_or_reads_another_store(
    ckpt: Command, trio: list[FileBackend], tmp_path: Path
) -> None:
    pack = a_pack(trio[0])
    flip(trio[0].url, pack, 0)
    alone = ckpt("sync", trio[0].url, tmp_path / "one", "--json")
    assert alone.code == 20
    assert [one["key"] for one in alone.json["damaged"]] == [pack]
    assert f"DAMAGED  {pack}" in ckpt("sync", trio[0].url, tmp_path / "one").out
    others = ("--replica", trio[1].url, "--replica", trio[2].url)
    assert ckpt("sync", trio[0].url, tmp_path / "two", *others).code == 0
    assert faults_of(FileBackend(tmp_path / "two"), trio[1]) == []


def test_sync_refuses_another_job_with_2_and_another_log_with_12(
    ckpt: Command, lone: Path, tmp_path: Path
) -> None:
    other = FileBackend(tmp_path / "other")
    write_sample_store(other)
    assert ckpt("sync", lone, other.url).code == 12
    assert ckpt("sync", tmp_path / "nothing", tmp_path / "new").code == 10


@pytest.mark.slow
def test_encrypted_store_is_not_taken_for_damage(
    ckpt: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "job.key"
    assert ckpt("key", "new", key).code == 0
    where = f"file:{key}"
    store = FileBackend(tmp_path / "store")
    write_sample_store(encrypted(store, load_keys(where)))
    assert ckpt("scrub", store.url).code == 2
    assert ckpt("scrub", store.url, "--encryption-key", where).code == 0
    assert ckpt("sync", store.url, tmp_path / "copy").code == 2
    assert ckpt("sync", store.url, tmp_path / "copy", "--encryption-key", where).code == 0
    assert ckpt("scrub", store.url, tmp_path / "copy", "--encryption-key", where).code == 0
    monkeypatch.setenv("CKPT_ENCRYPTION_KEY", where)
    assert ckpt("scrub", store.url, tmp_path / "copy").code == 0


@pytest.mark.slow
def test_doctor_of_folders_says_what_will_do(
    ckpt: Command, trio: list[FileBackend], tmp_path: Path
) -> None:
    done = ckpt("doctor", *urls(trio), "--size", "1", "--json")
    assert done.code == 0
    assert done.json["write_quorum"] == done.json["answers_min"] == 2
    assert [one["holds"]["snapshots"] for one in done.json["stores"]] == [3, 3, 3]
    text = ckpt("doctor", tmp_path / "new", "--size", "1")
    assert text.code == 0
    assert "can be the sequencer: yes" in text.out
    assert ckpt("doctor", trio[0].url, trio[0].url, "--size", "1").code == 2
    assert ckpt("doctor", trio[0].url, "--encryption-key", "env:X").code == 2
