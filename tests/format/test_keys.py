from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.backends.base import check_key
from ckpt.errors import UsageError
from ckpt.format import keys
from ckpt.format.canonical import digest, digest_hex
from ckpt.values import SnapshotId

BOOT = "0123456789abcdef"
PACKS = "packs/0000000001-00000000000001"


def test_the_digest_is_xxh3_128_big_endian() -> None:
    assert digest_hex(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest(memoryview(b"ckpt")).hex() == digest_hex(bytearray(b"ckpt"))


@given(
    st.text(max_size=200),
    st.integers(0, 10**8 - 1),
    st.integers(0, 10**10 - 1),
    st.integers(0, 10**14 - 1),
)
def test_every_key_is_one_that_backends_take_and_parses_back(
    node: str, n: int, epoch: int, step: int
) -> None:
    writer = keys.writer_name(node, BOOT)
    pair = SnapshotId(epoch, step)
    made = {
        keys.pack_key(pair, writer, n): keys.parse_pack_key,
        keys.part_key(pair, writer): keys.parse_part_key,
        keys.manifest_key(pair, "0" * 32): keys.parse_manifest_key,
        keys.log_key(step): keys.parse_log_key,
        keys.fold_key(step): keys.parse_fold_key,
    }
    for key in made:
        check_key(key)
    found = [parse(key) for key, parse in made.items()]
    assert found == [(pair, writer, n), (pair, writer), (pair, "0" * 32), step, step]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "packs/",
        "packs/../x",
        f"{PACKS}/a-{BOOT}-00000001.pack\n",
        f"/{PACKS}/a-{BOOT}-00000001.pack",
        f"{PACKS}/../a-{BOOT}-00000001.pack",
        f"{PACKS}/.a-{BOOT}-00000001.pack",
        f"{PACKS}/a-{BOOT}-1.pack",
        f"{PACKS}/a-{BOOT.upper()}-00000001.pack",
        f"{PACKS}/a-{BOOT}-٠٠٠٠٠٠٠١.pack",
        f"packs/a-{BOOT}-00000001.pack",
        f"packs/1-2/a-{BOOT}-00000001.pack",
        "log/1.json",
        "log/99999999999999999999.json",
        "log/00000000000000000/00000000000000000999.json",
        "log/00000000000000002/00000000000000001000.json",
        "log/00000000000000001/00000000000000001000.json.tmp",
        "log/0000000000000000000a.json",
        "folds/00000000000000000001.json.tmp",
        f"parts/0000000001-00000000000001/../a-{BOOT}.mpk.zst",
        "manifests/0000000001-00000000000001.json",
    ],
)
def test_a_key_that_is_not_exactly_ours_parses_to_nothing(key: str) -> None:
    parsers = (
        keys.parse_pack_key,
        keys.parse_part_key,
        keys.parse_manifest_key,
        keys.parse_log_key,
        keys.parse_fold_key,
    )
    assert [parse(key) for parse in parsers] == [None] * 5


def test_numbers_and_names_that_no_key_holds_are_refused() -> None:
    for make in (
        lambda: keys.pack_key(SnapshotId(1, 1), "../x", 0),
        lambda: keys.pack_key(SnapshotId(1, 1), keys.writer_name("a", BOOT), -1),
        lambda: keys.part_key(SnapshotId(-1, 0), keys.writer_name("a", BOOT)),
        lambda: keys.manifest_key(SnapshotId(0, 10**14), "0" * 32),
        lambda: keys.manifest_key(SnapshotId(0, 0), "../x"),
        lambda: keys.log_key(2**63),
        lambda: keys.writer_name("a", "xyz"),
    ):
        with pytest.raises(UsageError):
            make()


def test_the_keys_of_a_round_parse_back_and_stand_beside_their_position() -> None:
    assert keys.round_keys(7, 0) == (keys.log_key(7), keys.settled_key(7))
    vote, settled = keys.round_keys(7, 3)
    assert keys.parse_round_key(vote) == (7, 3, False)
    assert keys.parse_round_key(settled) == (7, 3, True)
    assert keys.log_key(7) < settled < vote < keys.log_key(8)
    for key in (keys.log_key(7), keys.settled_key(7), vote.replace("-03", "-00"), f"{vote}.tmp"):
        assert keys.parse_round_key(key) is None
    with pytest.raises(UsageError):
        keys.round_keys(7, keys.ROUND_MAX + 1)


def test_keys_sort_as_what_they_name() -> None:
    assert sorted(map(keys.log_key, [10, 9, 100])) == [keys.log_key(n) for n in (9, 10, 100)]
    seqs = [0, 1, 9, 999, 1000, 1001, 1999, 2000, 9_999, 10_000, 999_999, 1_000_000, 2**63 - 1]
    made = [key for seq in seqs for key in (keys.log_key(seq), keys.settled_key(seq))]
    assert sorted(made) == made
    assert [keys.parse_log_key(keys.log_key(seq)) for seq in seqs] == seqs
    assert [keys.parse_settled_key(keys.settled_key(seq)) for seq in seqs] == seqs
    assert keys.log_key(123_456) == "log/00000000000000123/00000000000000123456.json"
    pairs = [SnapshotId(2, 1), SnapshotId(10, 0), SnapshotId(1, 99)]
    assert sorted(pair.key for pair in pairs) == [pair.key for pair in sorted(pairs)]
