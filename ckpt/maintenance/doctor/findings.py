"""The doctor's findings about stores, and the advice that follows from them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckpt.errors import IntegrityError, UnavailableError, UsageError

Level = Literal["ok", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Latency:
    """The duration of one kind of small operation, over ``count`` of them."""

    median_s: float
    p95_s: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContent:
    """What a store holds already.

    ``kind``: ``empty``; ``store``: a ckpt store; ``headless``: a log without a readable
    ``ckpt.json``; ``foreign``: objects that are not ours; ``unknown``: it could not be read, see
    ``problem``.
    """

    kind: Literal["empty", "store", "headless", "foreign", "unknown"]
    job: str = ""
    store_id: str = ""
    log_id: str = ""
    snapshots: int = 0
    newest: str = ""
    next_seq: int = 0
    members: tuple[str, ...] = ()
    """The ids of the stores that its log names; empty for a log in one store."""
    write_quorum: int = 0
    hole: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFindings:
    """What using one store showed. Times are None if the operation was not tried or failed.

    ``failures``: the reason of each operation that failed. ``list_after_put``,
    ``list_after_delete``: whether a list showed the operation once it had returned;
    ``other_client``: whether another connection's list did. ``skew_s``: how far the store's clock
    is ahead of ours, give or take ``skew_unsure_s``. ``same_as``: other examined stores, by number,
    that are the same place. ``leftovers``: probe objects that could not be deleted.

    Over the limit of attributes: one attribute a fact of the report.
    """

    url: str
    folder: bool = False
    failures: Mapping[str, str] = field(default_factory=dict)
    create_only: bool | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    read_back_right: bool | None = None
    arrival_check: str = ""
    """How it is told that objects arrived as they were sent: ``etag`` or ``read back``; "" for a
    folder."""
    list_after_put: bool | None = None
    list_after_delete: bool | None = None
    other_client: bool | None = None
    skew_s: float | None = None
    skew_unsure_s: float = 0.0
    free_bytes: int | None = None
    content: StoreContent = StoreContent(kind="unknown")
    same_as: tuple[int, ...] = ()
    leftovers: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether the store answered at all."""
        return "reach" not in self.failures


@dataclass(frozen=True, slots=True)
class Advice:
    """One finding for the user: severity, a stable code, the store (None: all), text and remedy."""

    level: Level
    code: str
    store: int | None
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Assessment:
    """All advice, most severe first.

    ``exit_code``: 0 nothing is bad, 2 these stores cannot be used in this way, 11 some do not
    answer or deny access, 20 damage. ``answers_min``: stores needed to know what is newest.
    """

    advice: tuple[Advice, ...]
    write_quorum: int
    answers_min: int
    exit_code: int

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return self.exit_code == 0


SKEW_S_MAX = 3600.0
"""Sweeps use only the store's clock. A clock that is hours off still confuses people and breaks
expiring credentials."""
FREE_BYTES_MIN = 10 << 30
"""One snapshot of a small model needs about as much free space."""
SLOW_OPERATION_S = 2.0
"""A commit costs some three operations in a row on each store; at this median they take longer than
many steps do."""
SLOW_BYTES_PER_S = 20e6
"""Below this, a snapshot of a one-billion-parameter model with its optimizer takes ten minutes."""

_ORDER: dict[Level, int] = {"bad": 0, "warning": 1, "note": 2, "ok": 3}
_DAMAGE = frozenset({"log-hole", "read-back-wrong", "headless"})
_AWAY = frozenset({"unreachable", "denied"})


def assess(findings: Sequence[StoreFindings], write_quorum: int | None = None) -> Assessment:
    """What the stores can do for ckpt, each and together. ``write_quorum`` None: the majority."""
    count = len(findings)
    quorum = count // 2 + 1 if write_quorum is None else write_quorum
    advice = [entry for number, store in enumerate(findings) for entry in _of_store(number, store)]
    advice += _of_identity(findings)
    advice += _of_quorum(findings, quorum)
    advice.sort(key=lambda entry: (_ORDER[entry.level], -1 if entry.store is None else entry.store))
    return Assessment(tuple(advice), quorum, count - quorum + 1, _exit_code(advice))


def writable(store: StoreFindings) -> bool:
    """Whether objects can be put into the store and are read back with the same bytes."""
    return (
        store.reached
        and not ({"put", "read"} & store.failures.keys())
        and store.read_back_right is not False
    )


def _of_store(number: int, store: StoreFindings) -> Iterator[Advice]:
    if not store.reached:
        yield Advice(
            "bad",
            "unreachable",
            number,
            f"it does not answer: {store.failures['reach']}",
            "check the address, the network and the credentials",
        )
        return
    yield from _of_permissions(number, store)
    if store.read_back_right is False:
        yield Advice(
            "bad",
            "read-back-wrong",
            number,
            "an object was read back with other bytes than were put",
            "do not use this store: its disk, its memory or a proxy changes data",
        )
    yield from _of_arrival(number, store)
    yield from _of_creation(number, store)
    yield from _of_consistency(number, store)
    yield from _of_speed(number, store)
    yield from _of_content(number, store.content)
    if store.leftovers:
        yield Advice(
            "note",
            "leftovers",
            number,
            f"probe objects could not be deleted: {', '.join(store.leftovers)}",
            "delete the objects below probe/ there",
        )


def _of_permissions(number: int, store: StoreFindings) -> Iterator[Advice]:
    needed = {
        "put": ("it can't be written to", "grant permission to put objects, or make room"),
        "read": ("objects can't be read", "grant permission to get objects"),
        "list": ("it can't be listed", "grant permission to list the prefix"),
    }
    for operation, (text, remedy) in needed.items():
        if operation in store.failures:
            yield Advice("bad", "denied", number, f"{text}: {store.failures[operation]}", remedy)
    if "delete" in store.failures:
        yield Advice(
            "warning",
            "no-delete",
            number,
            f"objects can't be deleted, so nothing is ever swept: {store.failures['delete']}",
            "grant permission to delete objects, or clean up with the store's own means",
        )


def _of_arrival(number: int, store: StoreFindings) -> Iterator[Advice]:
    if store.arrival_check == "etag":
        yield Advice("ok", "etag-checked", number, "what arrives is compared with what was sent")
    elif store.arrival_check == "read back":
        yield Advice(
            "note",
            "read-back",
            number,
            "its ETags are no digests of what it holds, so each object is read back once it is put",
            "that doubles the traffic of a save; use encryption that keeps ETags (SSE-S3)",
        )


def _of_creation(number: int, store: StoreFindings) -> Iterator[Advice]:
    if store.create_only:
        yield Advice(
            "ok", "creates-once", number, "can be the sequencer: yes, it supports create-if-absent"
        )
    elif store.create_only is False and "put" not in store.failures:
        yield Advice(
            "warning",
            "replica-only",
            number,
            "can be the sequencer: no, it overwrites keys; so it can be a replica, not the only "
            "store",
            "use a store with conditional puts beside it, or a sequencer of its own",
        )


def _of_consistency(number: int, store: StoreFindings) -> Iterator[Advice]:
    stale = [
        moment
        for moment, is_listed in (
            ("right after a put", store.list_after_put),
            ("right after a delete", store.list_after_delete),
            ("over a second connection", store.other_client),
        )
        if is_listed is False
    ]
    if stale:
        yield Advice(
            "bad",
            "stale-lists",
            number,
            f"its lists are stale {' and '.join(stale)}, so a reader may miss the newest records",
            "turn off caching between here and the store (attribute caches of mounts, proxies), or "
            "use another store",
        )
    if store.skew_s is not None and abs(store.skew_s) - store.skew_unsure_s > SKEW_S_MAX:
        yield Advice(
            "warning",
            "clock-skew",
            number,
            f"its clock and this machine's differ by {store.skew_s:.0f} s",
            "set the clocks; sweeps count by the store's, and signatures of requests may be "
            "refused",
        )


def _of_speed(number: int, store: StoreFindings) -> Iterator[Advice]:
    slow = sorted(
        name for name, latency in store.latency.items() if latency.median_s > SLOW_OPERATION_S
    )
    if slow:
        yield Advice(
            "warning",
            "slow-operations",
            number,
            f"small operations take longer than {SLOW_OPERATION_S:g} s: {', '.join(slow)}",
            "use a store that is nearer; snapshots become durable later, training does not wait",
        )
    for direction, speed in (("up", store.up_bytes_per_s), ("down", store.down_bytes_per_s)):
        if speed is not None and speed < SLOW_BYTES_PER_S:
            yield Advice(
                "note",
                f"slow-{direction}",
                number,
                f"one stream {direction} moves {speed / 1e6:.1f} MB/s",
                "ckpt uses several at once; expect snapshots to become durable slowly all the same",
            )
    if store.free_bytes is not None and store.free_bytes < FREE_BYTES_MIN:
        yield Advice(
            "warning",
            "little-space",
            number,
            f"{store.free_bytes / 2**30:.1f} GiB are free",
            "free space, drop snapshots and sweep with ckpt gc, or use another place",
        )


def _of_content(number: int, content: StoreContent) -> Iterator[Advice]:
    match content.kind:
        case "store" if content.hole:
            text = f"the log of job {content.job!r} has a hole: {content.hole}"
            yield Advice(
                "bad", "log-hole", number, text, "repair it from the other stores with ckpt scrub"
            )
        case "store":
            newest = f"newest {content.newest}" if content.newest else "no snapshot"
            yield Advice(
                "ok",
                "store",
                number,
                f"holds job {content.job!r}: {content.snapshots} snapshots, {newest}",
            )
        case "headless":
            text = f"holds a log, but its ckpt.json cannot be read: {content.problem}"
            yield Advice(
                "bad",
                "headless",
                number,
                text,
                "repair it with ckpt scrub, together with the log's other stores",
            )
        case "foreign":
            text = "holds objects that are not ckpt's"
            yield Advice(
                "note",
                "foreign",
                number,
                text,
                "use a prefix of its own, so that no other clean-up deletes snapshots",
            )
        case "unknown":
            text = f"what is there could not be determined: {content.problem or 'it was not read'}"
            yield Advice(
                "warning",
                "unknown-content",
                number,
                text,
                "look at the failures above, then repeat",
            )
        case "empty":
            yield Advice("ok", "empty", number, "is empty")


def _of_identity(findings: Sequence[StoreFindings]) -> Iterator[Advice]:
    for number, store in enumerate(findings):
        for other in store.same_as:
            if other > number:
                yield Advice(
                    "bad",
                    "same-place",
                    number,
                    f"stores {number + 1} and {other + 1} are one and the same place, so it is one "
                    "copy, not two",
                    "name each place once",
                )
    contents = [(number, store.content) for number, store in enumerate(findings)]
    with_record = [(number, content) for number, content in contents if content.kind == "store"]
    for number, content in with_record[1:]:
        first = with_record[0][1]
        if content.job != first.job:
            text = f"holds job {content.job!r}, store {with_record[0][0] + 1} holds {first.job!r}"
            yield Advice("bad", "other-job", number, text, "name stores of one job")
        elif content.log_id != first.log_id:
            text = f"holds another log of job {content.job!r} than store {with_record[0][0] + 1}"
            yield Advice(
                "bad",
                "other-log",
                number,
                text,
                "keep one of them, and fill the other place anew with ckpt sync",
            )
        elif (
            content.store_id == first.store_id and number not in findings[with_record[0][0]].same_as
        ):
            text = f"is a plain copy of store {with_record[0][0] + 1}: both have one id"
            yield Advice(
                "bad", "copied-store", number, text, "empty it, and fill it with ckpt sync"
            )
    yield from _of_members(findings, with_record)


def _of_members(
    findings: Sequence[StoreFindings], with_record: Sequence[tuple[int, StoreContent]]
) -> Iterator[Advice]:
    furthest = max(
        (content for _, content in with_record), key=lambda content: content.next_seq, default=None
    )
    if furthest is None:
        return
    behind = [
        n
        for n, content in with_record
        if content.log_id == furthest.log_id and content.next_seq < furthest.next_seq
    ]
    for number in behind:
        missing_records = furthest.next_seq - findings[number].content.next_seq
        text = f"its log ends {missing_records} records before another store's"
        yield Advice(
            "warning", "behind", number, text, "bring it up to date with ckpt scrub or ckpt sync"
        )
    if not furthest.members:
        return
    given = {content.store_id for _, content in with_record}
    for number, content in with_record:
        if content.store_id not in furthest.members and content.log_id == furthest.log_id:
            text = "the log does not count it among its stores"
            yield Advice(
                "note",
                "no-member",
                number,
                text,
                "it is used once a job runs with it among its stores",
            )
    missing = set(furthest.members) - given
    if missing:
        text = (
            f"the log is on {len(furthest.members)} stores, of which {len(missing)} are not named "
            "here"
        )
        yield Advice(
            "note",
            "members-missing",
            None,
            text,
            "name all stores of the job to examine all of them",
        )


def _of_quorum(findings: Sequence[StoreFindings], quorum: int) -> Iterator[Advice]:
    count = len(findings)
    if not count < 2 * quorum <= 2 * count:
        text = f"a write quorum of {quorum} does not fit {count} stores"
        yield Advice("bad", "quorum", None, text, f"use one from {count // 2 + 1} to {count}")
        return
    places = _places(findings)
    good = sum(any(writable(findings[number]) for number in place) for place in places)
    creators = sum(writable(store) and store.create_only is True for store in findings)
    if count == 1:
        yield from _of_one(good, creators)
        return
    if good < quorum:
        text = (
            f"{good} of {count} stores can be written to, {quorum} are needed: nothing would "
            "become durable"
        )
        yield Advice("bad", "no-quorum", None, text, "fix the problems of each store above")
    else:
        spare = good - quorum
        text = (
            f"{quorum} of {count} stores are needed for a snapshot, {count - quorum + 1} to know "
            f"the newest; {good} are well"
        )
        remedy = "" if spare else "one more failure stops commits: repair or add a store"
        yield Advice("ok" if spare else "warning", "quorum", None, text, remedy)
    if good >= quorum > creators:
        text = (
            f"{creators} of {count} stores support create-if-absent, {quorum} are needed to be the "
            "log's sequencer together; so a file of one machine is the sequencer, and only that "
            "machine can write"
        )
        yield Advice(
            "warning",
            "one-machine",
            None,
            text,
            "for jobs over several machines, use more stores that do",
        )


def _of_one(good: int, creators: int) -> Iterator[Advice]:
    if good:
        remedy = "name two more for a replica each"
        yield Advice("note", "one-store", None, "one store: what it loses is lost", remedy)
    if good and not creators:
        text = (
            "it does not support create-if-absent, so two writers could overwrite each other's "
            "records"
        )
        remedy = "use a store that does (a folder, S3, GCS, Azure), or three stores together"
        yield Advice("bad", "no-sequencer", None, text, remedy)


def _places(findings: Sequence[StoreFindings]) -> list[set[int]]:
    """The stores' numbers, grouped by the place that they turned out to be."""
    places: list[set[int]] = []
    for number, store in enumerate(findings):
        place = next((place for place in places if place & set(store.same_as)), None)
        if place is None:
            places.append({number})
        else:
            place.add(number)
    return places


def _exit_code(advice: Sequence[Advice]) -> int:
    bad = {entry.code for entry in advice if entry.level == "bad"}
    # Damage first: it needs a repair even if other stores are away.
    if bad & _DAMAGE:
        return IntegrityError.exit_code
    if bad - _DAMAGE - _AWAY - {"no-quorum"}:
        return UsageError.exit_code
    return UnavailableError.exit_code if bad else 0
