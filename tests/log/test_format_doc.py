from __future__ import annotations

from pathlib import Path

from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import Manifest
from ckpt.format.records import Commit, decode_record
from ckpt.format.store import JobRecord
from ckpt.log.fold import empty, fold
from ckpt.log.stored_fold import decode_fold

DOC = Path(__file__).parents[2] / "docs" / "format.md"


def test_the_examples_of_the_format_page_are_what_is_read_and_belong_together() -> None:
    lines = [
        line.encode()
        for line in DOC.read_text(encoding="utf-8").splitlines()
        if line.startswith("{")
    ]
    job, opened, committed, stored_fold, manifest = lines
    records = [decode_record(opened), decode_record(committed)]
    state = fold(empty(JobRecord.decode(job).job), records)
    assert decode_fold(stored_fold) == state
    assert isinstance(records[1].body, Commit)
    assert records[1].body.manifest_digest == digest_hex(manifest)
    assert Manifest.decode(manifest).snapshot == state.newest()
    for data in lines:
        at = (
            data.index(b'"digest":"')
            if not data.startswith(b'{"body"')
            else data.index(b',"digest":"') + 1
        )
        cut = data[:at] + data[at + len('"digest":"",') + 32 :]
        assert digest_hex(cut) == data[at + 10 : at + 42].decode(), (
            "the digest covers the text without itself"
        )
