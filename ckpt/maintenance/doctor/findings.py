"""What findings about stores mean for whoever wants to keep a job's state in them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckpt.errors import IntegrityError, UnavailableError, UsageError

# What an examination of stores found, and what is to be thought of it. Only facts.

Level = Literal["ok", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one kind of small operation took, over ``count`` of them."""

    median_s: float
    p95_s: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContent:
    """What lies in a store already.

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
    """The ids of the stores that its log names; none where it names none."""
    write_quorum: int = 0
    hole: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFindings:
    """What was found out about one store by using it. Times are None where the operation was not
    tried or failed.

    ``failures``: operation to why it failed. ``list_after_put``, ``list_after_delete``: whether a
    list that was begun after the operation's return told of it; ``other_client``: whether another
    connection's did. ``skew_s``: by how much the store's clock is ahead of ours, ``skew_unsure_s``
    how far that can be off. ``same_as``: other stores of the examination, by number, that turned
    out to be this very place. ``leftovers``: probe objects that could not be removed.
    """

    url: str
    folder: bool = False
    failures: Mapping[str, str] = field(default_factory=dict)
    create_only: bool | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    read_back_right: bool | None = None
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
        """Whether anything worked at all."""
        return "reach" not in self.failures


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to know: how grave, a stable word for programs, which store (None: all together),
    what is, what to do."""

    level: Level
    code: str
    store: int | None
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Assessment:
    """All advice, gravest first. ``exit_code``: 0 well (notes and warnings included), 2 these
    stores can't be used so, 11 some do not answer or deny, 20 damage."""

    advice: tuple[Advice, ...]
    write_quorum: int
    answers_min: int
    exit_code: int

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return self.exit_code == 0


SKEW_S_MAX = 3600.0
"""Sweeps go by the store's clock alone; a clock that is hours off confuses people, and expiring
credentials."""
FREE_BYTES_MIN = 10 << 30
"""Less free space than this is told: one snapshot of a small model needs about as much."""
SLOW_OPERATION_S = 2.0
"""A commit costs some three operations in a row on each store; at this median they take longer than
many steps do."""
SLOW_BYTES_PER_S = 20e6
"""Below this, a snapshot of a one-billion-parameter model with its optimizer takes ten minutes."""

_ORDER: dict[Level, int] = {"bad": 0, "warning": 1, "note": 2, "ok": 3}
_DAMAGE = frozenset({"log-hole", "read-back-wrong", "headless"})
_AWAY = frozenset({"unreachable", "denied"})


def assess(findings: Sequence[StoreFindings], write_quorum: int | None = None) -> Assessment:
    """What the stores will and won't do for ckpt, together and each. ``write_quorum`` None: the
    majority."""
    count = len(findings)
    quorum = count // 2 + 1 if write_quorum is None else write_quorum
    advice = [one for number, found in enumerate(findings) for one in _of_store(number, found)]
    advice += _of_identity(findings)
    advice += _of_quorum(findings, quorum)
    advice.sort(key=lambda one: (_ORDER[one.level], -1 if one.store is None else one.store))
    return Assessment(tuple(advice), quorum, count - quorum + 1, _exit_code(advice))


def writable(found: StoreFindings) -> bool:
    """Whether objects can be put into the store and read back rightly."""
    return (
        found.reached
        and not ({"put", "read"} & found.failures.keys())
        and found.read_back_right is not False
    )


def _of_store(number: int, found: StoreFindings) -> Iterator[Advice]:
    if not found.reached:
        yield Advice(
            "bad",
            "unreachable",
            number,
            f"it does not answer: {found.failures['reach']}",
            "check the address, the network and the credentials",
        )
        return
    yield from _of_permissions(number, found)
    if found.read_back_right is False:
        yield Advice(
            "bad",
            "read-back-wrong",
            number,
            "what was put came back with other bytes",
            "do not use this store: its disk, memory or a proxy in between changes data",
        )
    yield from _of_creation(number, found)
    yield from _of_consistency(number, found)
    yield from _of_speed(number, found)
    yield from _of_holdings(number, found.content)
    if found.leftovers:
        yield Advice(
            "note",
            "leftovers",
            number,
            f"probe objects could not be removed: {', '.join(found.leftovers)}",
            "delete what lies below probe/ there",
        )


def _of_permissions(number: int, found: StoreFindings) -> Iterator[Advice]:
    needed = {
        "put": ("it can't be written to", "grant permission to put objects, or make room"),
        "read": ("objects can't be read", "grant permission to get objects"),
        "list": ("it can't be listed", "grant permission to list the prefix"),
    }
    for operation, (text, remedy) in needed.items():
        if operation in found.failures:
            yield Advice("bad", "denied", number, f"{text}: {found.failures[operation]}", remedy)
    if "delete" in found.failures:
        yield Advice(
            "warning",
            "no-delete",
            number,
            f"objects can't be deleted, so nothing is ever swept: {found.failures['delete']}",
            "grant permission to delete objects, or clean up with the store's own means",
        )


def _of_creation(number: int, found: StoreFindings) -> Iterator[Advice]:
    if found.create_only:
        yield Advice(
            "ok", "creates-once", number, "can give out log places: yes, it creates a key only once"
        )
    elif found.create_only is False and "put" not in found.failures:
        yield Advice(
            "warning",
            "replica-only",
            number,
            "can give out log places: no, it overwrites keys; so it can be a replica, not a lone "
            "or the deciding store",
            "use a store with conditional puts beside it, or a sequencer of its own",
        )


def _of_consistency(number: int, found: StoreFindings) -> Iterator[Advice]:
    stale = [
        what
        for what, seen in (
            ("right after a put", found.list_after_put),
            ("right after a delete", found.list_after_delete),
            ("over a second connection", found.other_client),
        )
        if seen is False
    ]
    if stale:
        yield Advice(
            "bad",
            "stale-lists",
            number,
            f"its listings are old {' and '.join(stale)}, so a reader may miss the newest records",
            "turn off caching between here and the store (attribute caches of mounts, proxies), or "
            "use another store",
        )
    if found.skew_s is not None and abs(found.skew_s) - found.skew_unsure_s > SKEW_S_MAX:
        yield Advice(
            "warning",
            "clock-skew",
            number,
            f"its clock and this machine's differ by {found.skew_s:.0f} s",
            "set the clocks; sweeps count by the store's, and signatures of requests may be "
            "refused",
        )


def _of_speed(number: int, found: StoreFindings) -> Iterator[Advice]:
    slow = sorted(name for name, took in found.latency.items() if took.median_s > SLOW_OPERATION_S)
    if slow:
        yield Advice(
            "warning",
            "slow-operations",
            number,
            f"small operations take longer than {SLOW_OPERATION_S:g} s: {', '.join(slow)}",
            "use a store that is nearer; snapshots become durable later, training does not wait",
        )
    for way, speed in (("up", found.up_bytes_per_s), ("down", found.down_bytes_per_s)):
        if speed is not None and speed < SLOW_BYTES_PER_S:
            yield Advice(
                "note",
                f"slow-{way}",
                number,
                f"one stream {way} moves {speed / 1e6:.1f} MB/s",
                "ckpt uses several at once; expect snapshots to become durable slowly all the same",
            )
    if found.free_bytes is not None and found.free_bytes < FREE_BYTES_MIN:
        yield Advice(
            "warning",
            "little-space",
            number,
            f"{found.free_bytes / 2**30:.1f} GiB are free",
            "free space, drop snapshots and sweep with ckpt gc, or use another place",
        )


def _of_holdings(number: int, holds: StoreContent) -> Iterator[Advice]:
    match holds.kind:
        case "store" if holds.hole:
            text = f"the log of job {holds.job!r} has a hole: {holds.hole}"
            yield Advice(
                "bad", "log-hole", number, text, "mend it from the other stores with ckpt scrub"
            )
        case "store":
            what = f"newest {holds.newest}" if holds.newest else "no snapshot"
            yield Advice(
                "ok",
                "store",
                number,
                f"holds job {holds.job!r}: {holds.snapshots} snapshots, {what}",
            )
        case "headless":
            text = f"holds a log, but its ckpt.json can't be read: {holds.problem}"
            yield Advice(
                "bad",
                "headless",
                number,
                text,
                "mend it with ckpt scrub, together with the log's other stores",
            )
        case "foreign":
            text = "holds objects that are not ckpt's"
            yield Advice(
                "note",
                "foreign",
                number,
                text,
                "a prefix of its own keeps others' clean-up away from snapshots",
            )
        case "unknown":
            text = (
                f"what is there could not be found out: {holds.problem or 'it was not looked at'}"
            )
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
    for number, found in enumerate(findings):
        for other in found.same_as:
            if other > number:
                yield Advice(
                    "bad",
                    "same-place",
                    number,
                    f"stores {number + 1} and {other + 1} are one and the same place, so it is one "
                    "copy, not two",
                    "name each place once",
                )
    stores = [
        (number, found.content)
        for number, found in enumerate(findings)
        if found.content.kind in ("store", "headless")
    ]
    known = [(number, holds) for number, holds in stores if holds.kind == "store"]
    for number, holds in known[1:]:
        first = known[0][1]
        if holds.job != first.job:
            text = f"holds job {holds.job!r}, store {known[0][0] + 1} holds {first.job!r}"
            yield Advice("bad", "other-job", number, text, "name stores of one job")
        elif holds.log_id != first.log_id:
            text = f"holds another log of job {holds.job!r} than store {known[0][0] + 1}"
            yield Advice(
                "bad",
                "other-log",
                number,
                text,
                "keep one of them, and fill the other place anew with ckpt sync",
            )
        elif holds.store_id == first.store_id and number not in findings[known[0][0]].same_as:
            text = f"is a plain copy of store {known[0][0] + 1}: both have one id"
            yield Advice(
                "bad", "copied-store", number, text, "empty it, and fill it with ckpt sync"
            )
    yield from _of_members(findings, known)


def _of_members(
    findings: Sequence[StoreFindings], known: Sequence[tuple[int, StoreContent]]
) -> Iterator[Advice]:
    furthest = max((holds for _, holds in known), key=lambda holds: holds.next_seq, default=None)
    if furthest is None:
        return
    behind = [
        n
        for n, holds in known
        if holds.log_id == furthest.log_id and holds.next_seq < furthest.next_seq
    ]
    for number in behind:
        text = f"its log ends {furthest.next_seq - findings[number].content.next_seq} records before another store's"
        yield Advice(
            "warning", "behind", number, text, "bring it up to date with ckpt scrub or ckpt sync"
        )
    if not furthest.members:
        return
    given = {holds.store_id for _, holds in known}
    for number, holds in known:
        if holds.store_id not in furthest.members and holds.log_id == furthest.log_id:
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
        text = f"the log is on {len(furthest.members)} stores, of which {len(missing)} are not named here"
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
    creators = sum(writable(found) and found.create_only is True for found in findings)
    if count == 1:
        yield from _of_one(good, creators)
        return
    if good < quorum:
        text = f"{good} of {count} stores can be written to, {quorum} are needed: nothing would become durable"
        yield Advice("bad", "no-quorum", None, text, "mend what is said of each store above")
    else:
        spare = good - quorum
        text = f"{quorum} of {count} stores are needed for a snapshot, {count - quorum + 1} to know the newest; {good} are well"
        remedy = "" if spare else "one more failing stops commits: mend or add a store"
        yield Advice("ok" if spare else "warning", "quorum", None, text, remedy)
    if good >= quorum > creators:
        text = (
            f"{creators} of {count} stores create a key only once, {quorum} are needed to give out "
            "the log's places together; "
            "so a file of one machine will, and only that machine can write"
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
        text = "it does not create a key only once, so two writers could overwrite each other's records"
        remedy = "use a store that does (a folder, S3, GCS, Azure), or three stores together"
        yield Advice("bad", "no-sequencer", None, text, remedy)


def _places(findings: Sequence[StoreFindings]) -> list[set[int]]:
    """The stores' numbers by the place that they turned out to be."""
    places: list[set[int]] = []
    for number, found in enumerate(findings):
        mine = next((place for place in places if place & set(found.same_as)), None)
        if mine is None:
            places.append({number})
        else:
            mine.add(number)
    return places


def _exit_code(advice: Sequence[Advice]) -> int:
    bad = {one.code for one in advice if one.level == "bad"}
    if bad & _DAMAGE:
        return IntegrityError.exit_code
    if bad - _DAMAGE - _AWAY - {"no-quorum"}:
        return UsageError.exit_code
    return UnavailableError.exit_code if bad else 0
