"""The keys of all objects in a store: builders, and strict parsers for what the builders give.
Pure.

A writer is one process start, ``<node>-<incarnation>``. The incarnation is random, so no key is
ever used for two contents.
"""

from __future__ import annotations

import re
from typing import NewType

from ckpt.errors import UsageError
from ckpt.values import SnapshotId

JOB_KEY = "ckpt.json"
PACKS = "packs/"
PARTS = "parts/"
MANIFESTS = "manifests/"
LOG = "log/"
FOLDS = "folds/"
SCRUBS = "scrubs/"
SCRUB_CURSOR_KEY = f"{SCRUBS}cursor.json"

COPIES = "copies/"
"""Second copies of small objects, on a store that holds a log alone: see ``copy_key``."""

EPOCH_MAX = 10**10 - 1
"""Largest epoch: ten digits of a key."""
STEP_MAX = 10**14 - 1
"""Largest step: fourteen digits of a key."""
SEQ_MAX = 2**63 - 1
"""Largest position in the log; keys have twenty digits."""
LOG_FOLDER_RECORDS = 1000
"""How many positions of the log one folder holds, from this position on.

Listing a folder costs a pass over all of its files, and every commit lists the log's end. The first
1,000 records have no folder of their own. A position's keys follow from the position alone, and key
order is still order of positions.
"""
ROUND_MAX = 99
"""The last round of a vote about one position of the log."""
PACKS_MAX = 10**8 - 1
"""Largest number of a pack within one process start."""

NODE_CHARS_MAX = 64

# Parsers match whole keys and ASCII digits only, so that a sweep never takes another program's
# object for one of ckpt's.
_ID = r"(\d{10})-(\d{14})"
_WRITER = rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{NODE_CHARS_MAX - 1}}}-[0-9a-f]{{16}}"
_WRITER_RE = re.compile(_WRITER, re.ASCII)
_BOOT_RE = re.compile(r"[0-9a-f]{16}", re.ASCII)
_PACK_RE = re.compile(rf"packs/{_ID}/({_WRITER})-(\d{{8}})\.pack", re.ASCII)
_PART_RE = re.compile(rf"parts/{_ID}/({_WRITER})\.mpk\.zst", re.ASCII)
_MANIFEST_RE = re.compile(rf"manifests/{_ID}-([0-9a-f]{{32}})\.json", re.ASCII)
_LOG_RE = re.compile(r"log/(?:(\d{17})/(?=\1))?(\d{20})\.json", re.ASCII)
_SETTLED_RE = re.compile(r"log/(?:(\d{17})/(?=\1))?(\d{20})\.settled\.json", re.ASCII)
_ROUND_RE = re.compile(r"log/(?:(\d{17})/(?=\1))?(\d{20})\.(vote|settled)-(\d{2})\.json", re.ASCII)
_FOLD_RE = re.compile(r"folds/(\d{20})\.json", re.ASCII)
_SCRUB_RE = re.compile(r"scrubs/(\d{20})\.json", re.ASCII)
_HEX_RE = re.compile(r"[0-9a-f]{32}", re.ASCII)


SharedKey = NewType("SharedKey", str)
"""A key whose object is the same in all stores, so that any right copy may replace any other."""


def shared_key(key: str) -> SharedKey | None:
    """``key`` as a shared one; None for ``ckpt.json`` and for keys of the log.

    There each store has an object of its own: its id, and its votes.
    """
    return None if key == JOB_KEY or key.startswith(LOG) else SharedKey(key)


def writer_name(node: str, incarnation: str) -> str:
    """The name of one process start, from ``node`` and ``incarnation``.

    Characters of ``node`` that a key cannot hold become ``_``. ``incarnation`` is 16 lower-case hex
    digits, drawn at random once per process. Raises UsageError otherwise.
    """
    if not _BOOT_RE.fullmatch(incarnation):
        raise UsageError(
            f"boot is not 16 lower-case hex digits. boot={incarnation!r} draw it with "
            "secrets.token_hex(8)"
        )
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", node)[:NODE_CHARS_MAX]
    if not clean or clean[0] in ".-":
        clean = ("_" + clean)[:NODE_CHARS_MAX]
    return f"{clean}-{incarnation}"


def is_writer(text: str) -> bool:
    """Whether ``text`` has the form that ``writer_name`` gives."""
    return _WRITER_RE.fullmatch(text) is not None


def is_digest_hex(text: str) -> bool:
    """Whether ``text`` is 32 lower-case hex digits."""
    return _HEX_RE.fullmatch(text) is not None


def is_snapshot_id(snapshot: SnapshotId) -> bool:
    """Whether both numbers fit their fixed-width key."""
    return 0 <= snapshot.epoch <= EPOCH_MAX and 0 <= snapshot.step <= STEP_MAX


def pack_key(snapshot: SnapshotId, writer: str, n: int) -> str:
    """The key of the ``n``-th pack of one process start, from 0, first written for ``snapshot``.

    The pair is in the name so that a sweep knows of any pack, whoever wrote it, whether a commit
    that refers to it may still come. Raises UsageError for a bad pair, writer or number.
    """
    return f"{PACKS}{_pair(snapshot)}/{_checked(writer)}-{_bounded('pack', n, PACKS_MAX):08d}.pack"


def part_key(snapshot: SnapshotId, writer: str) -> str:
    """The key of ``writer``'s part of ``snapshot``. Raises UsageError for a bad writer or pair."""
    return f"{PARTS}{_pair(snapshot)}/{_checked(writer)}.mpk.zst"


def manifest_key(snapshot: SnapshotId, digest: str) -> str:
    """The key of the manifest of ``snapshot`` whose bytes have ``digest`` (32 hex digits).

    The digest is in the name so that two writers, one of which may be dead, never need one key for
    two contents; the log says which manifest counts. Raises UsageError for a bad pair or digest.
    """
    if not is_digest_hex(digest):
        raise UsageError(f"not a digest of 32 lower-case hex digits. digest={digest!r}")
    return f"{MANIFESTS}{_pair(snapshot)}-{digest}.json"


def log_key(seq: int) -> str:
    """The key of the log record ``seq``, from 0."""
    return f"{_log_stem(seq)}.json"


def settled_key(seq: int) -> str:
    """The second key of record ``seq``: for the winner, if writers split the stores over its
    position."""
    return f"{_log_stem(seq)}.settled.json"


def flat_log_key(seq: int, *, settled: bool) -> str:
    """The key of a position in the log of a store from before logs had folders."""
    return f"{LOG}{_bounded('seq', seq, SEQ_MAX):020d}{'.settled' if settled else ''}.json"


def round_keys(seq: int, number: int) -> tuple[str, str]:
    """The keys of one round of the vote about position ``seq``: for votes, and for what they
    settle.

    Round 0 uses ``log_key`` and ``settled_key``.
    """
    if number == 0:
        return log_key(seq), settled_key(seq)
    stem = _log_stem(seq)
    suffix = f"{_bounded('round', number, ROUND_MAX):02d}.json"
    return f"{stem}.vote-{suffix}", f"{stem}.settled-{suffix}"


def fold_key(seq: int) -> str:
    """The key of the fold of all records up to and including ``seq``."""
    return f"{FOLDS}{_bounded('seq', seq, SEQ_MAX):020d}.json"


def scrub_key(unix_ms: int) -> str:
    """The key of the record of a scrub that ended then, in milliseconds since 1970."""
    return f"{SCRUBS}{_bounded('unix_ms', unix_ms, SEQ_MAX):020d}.json"


def copy_key(key: str) -> str:
    """The key of the second copy of the object ``key``.

    It is below another prefix than the object, so that no listing of the log, and no vote, ever
    meets it.
    """
    return COPIES + key


def parse_pack_key(key: str) -> tuple[SnapshotId, str, int] | None:
    """``(snapshot, writer, n)``, or None if ``key`` is not exactly what ``pack_key`` gives."""
    match = _PACK_RE.fullmatch(key)
    return (SnapshotId(int(match[1]), int(match[2])), match[3], int(match[4])) if match else None


def parse_part_key(key: str) -> tuple[SnapshotId, str] | None:
    """``(snapshot, writer)``, or None if ``key`` is not exactly what ``part_key`` gives."""
    match = _PART_RE.fullmatch(key)
    return (SnapshotId(int(match[1]), int(match[2])), match[3]) if match else None


def parse_manifest_key(key: str) -> tuple[SnapshotId, str] | None:
    """``(snapshot, digest)``, or None if ``key`` is not exactly what ``manifest_key`` gives."""
    match = _MANIFEST_RE.fullmatch(key)
    return (SnapshotId(int(match[1]), int(match[2])), match[3]) if match else None


def parse_log_key(key: str) -> int | None:
    """The seq, or None if ``key`` is not exactly what ``log_key`` or ``flat_log_key`` gives."""
    return _parse_log(_LOG_RE, key)


def parse_settled_key(key: str) -> int | None:
    """The seq, or None if ``key`` is not exactly what ``settled_key`` or ``flat_log_key`` gives."""
    return _parse_log(_SETTLED_RE, key)


def parse_round_key(key: str) -> tuple[int, int, bool] | None:
    """``(seq, round, settled)``, or None if ``key`` is not one that ``round_keys`` gives for a
    round from 1 on."""
    match = _ROUND_RE.fullmatch(key)
    if not match or int(match[4]) == 0:
        return None
    seq = int(match[2])
    if seq > SEQ_MAX or (match[1] is None) != (seq < LOG_FOLDER_RECORDS):
        return None
    return seq, int(match[4]), match[3] == "settled"


def parse_fold_key(key: str) -> int | None:
    """The seq, or None if ``key`` is not exactly what ``fold_key`` gives."""
    return _parse_seq(_FOLD_RE, key)


def parse_scrub_key(key: str) -> int | None:
    """The milliseconds since 1970, or None if ``key`` is not exactly what ``scrub_key`` gives."""
    return _parse_seq(_SCRUB_RE, key)


def _log_stem(seq: int) -> str:
    name = f"{_bounded('seq', seq, SEQ_MAX):020d}"
    return f"{LOG}{name}" if seq < LOG_FOLDER_RECORDS else f"{LOG}{name[:17]}/{name}"


def _parse_log(pattern: re.Pattern[str], key: str) -> int | None:
    match = pattern.fullmatch(key)
    if not match:
        return None
    seq = int(match[2])
    if seq > SEQ_MAX or (match[1] is not None and seq < LOG_FOLDER_RECORDS):
        return None
    return seq


def _parse_seq(pattern: re.Pattern[str], key: str) -> int | None:
    match = pattern.fullmatch(key)
    if not match:
        return None
    seq = int(match[1])
    return seq if seq <= SEQ_MAX else None


def _checked(writer: str) -> str:
    if not is_writer(writer):
        raise UsageError(
            f"not a writer's name. writer={writer!r} make it with writer_name(node, boot)"
        )
    return writer


def _pair(snapshot: SnapshotId) -> str:
    if not is_snapshot_id(snapshot):
        raise UsageError(
            f"epoch or step out of range. epoch={snapshot.epoch} (0..{EPOCH_MAX}) "
            f"step={snapshot.step} (0..{STEP_MAX})"
        )
    return snapshot.key


def _bounded(name: str, value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise UsageError(f"{name} out of range. {name}={value} (0..{most})")
    return value
