"""One process in a serving group: it reads the group's records, decides, and keeps its own alive.

Two threads: one waits for changes, reads all records in one transaction and writes the roles that
they ask for; the other renews the lease of a replica's record and writes the record when it
changes. A group is found by its name, in etcd or in a file of this machine.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from ckpt.cluster.membership.leases import (
    Lease,
    LeaseSilent,
    Renewed,
    apply_answer,
    call_timeout_s,
    granted_lease,
)
from ckpt.cluster.membership.open import open_keyspace
from ckpt.errors import (
    CkptError,
    ConflictError,
    IntegrityError,
    InternalError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.events import Emit, Event
from ckpt.ipc.runtime_dir import runtime_root
from ckpt.keyspace.address import EtcdOptions, parse_etcd_url
from ckpt.keyspace.base import Keys, Keyspace, Put, Transaction, Unchanged
from ckpt.serve.group.decide import decide_roles
from ckpt.serve.group.records import (
    ORDER,
    REPLICAS,
    ROLES,
    GroupView,
    OrderRecord,
    ReplicaRecord,
    RolesRecord,
    decode_order,
    decode_replica,
    decode_roles,
    encode,
)

LEASE_TTL_S = 3.0
"""After so long without a keepalive a replica is gone."""
LOOK_S = 0.25
"""How often suspicions are compared with those that were decided by."""
READ_S = 5.0
"""The longest time between two reads of the records: a change that was missed is found then."""
RETRY_S = 0.5
RACES_MAX = 16
"""How often a command is tried again because another write came in between."""
JOIN_S = 5.0

RANGES = (Keys(REPLICAS, REPLICAS[:-1] + chr(ord("/") + 1)), Keys(ROLES), Keys(ORDER))


def open_group(group: str, *, ttl_s: float = LEASE_TTL_S) -> Keyspace:
    """The keyspace of a group: ``NAME`` on this machine, or ``etcd://host:port,.../NAME?query``.

    The query is that of ``parse_etcd_url``. Connects at the first call. Raises UsageError for a
    name that cannot be one, and what ``open_keyspace`` raises.
    """
    location, name = parse_group(group)
    if isinstance(location, EtcdOptions):
        # One endpoint gets so little time that another can be asked before the lease expires.
        location = replace(location, call_s=min(location.call_s, call_timeout_s(ttl_s)))
    return open_keyspace(location, f"serve-{name}")


def parse_group(group: str) -> tuple[EtcdOptions | Path, str]:
    """Where a group's records are, and its name. Raises UsageError."""
    address, _, query = group.partition("?")
    hosts, _, name = address.rpartition("/")
    if not name or not all(char.isalnum() or char in "-_." for char in name) or name[0] == ".":
        raise UsageError(
            "a group is named by letters, digits and -_., alone or behind etcd://host:port/. "
            f"group={group!r}"
        )
    if not hosts:
        return runtime_root() / "serve" / f"{name}.db", name
    return parse_etcd_url(f"{hosts}?{query}" if query else hosts), name


def read_view(keyspace: Keyspace) -> tuple[GroupView, tuple[str, ...]]:
    """All records of a group at one revision, and what is wrong with those that cannot be read.

    A record that cannot be read counts as missing, so one broken replica stops no group. Raises
    UnavailableError.
    """
    result = keyspace.transact(Transaction(reads=RANGES))
    replicas, roles, order = result.found
    problems: list[str] = []
    read = [_read(problems, partial(decode_replica, entry.key, entry.value)) for entry in replicas]
    view = GroupView(
        result.revision,
        {replica.name: replica for replica in read if replica is not None},
        _read(problems, partial(decode_roles, roles[0].value)) if roles else None,
        roles[0].changed if roles else 0,
        _read(problems, partial(decode_order, order[0].value)) if order else None,
        order[0].changed if order else 0,
    )
    return view, tuple(problems)


T = TypeVar("T")


def _read(problems: list[str], decode: Callable[[], T]) -> T | None:
    try:
        return decode()
    except IntegrityError as error:
        problems.append(str(error))
        return None


R = TypeVar("R", RolesRecord, OrderRecord)


def write_decision(keyspace: Keyspace, decide: Callable[[GroupView], R]) -> R:
    """Write what ``decide`` makes of the group's records, if they are still those that it saw.

    Decides again if another write came first. Raises what ``decide`` raises, UnavailableError (it
    may have been written), and ConflictError if others always come first.
    """
    for _ in range(RACES_MAX):
        view, _ = read_view(keyspace)
        record = decide(view)
        if record in (view.roles, view.order) or _write(keyspace, view, record):
            return record
    raise ConflictError("other writers always came first; try again")


def _write(keyspace: Keyspace, view: GroupView, record: RolesRecord | OrderRecord) -> bool:
    key, revision = (
        (ROLES, view.roles_revision)
        if isinstance(record, RolesRecord)
        else (ORDER, view.order_revision)
    )
    put = Transaction(when=(Unchanged(key, revision),), then=(Put(key, encode(record)),))
    return keyspace.transact(put).succeeded


def await_view(
    keyspace: Keyspace, reached: Callable[[GroupView], bool], *, timeout_s: float
) -> tuple[GroupView, bool]:
    """Read until ``reached`` accepts the records, or the time is over: the last ones read, and
    whether they were accepted. Raises UnavailableError."""
    until_s = time.monotonic() + timeout_s
    while True:
        view, _ = read_view(keyspace)
        left_s = until_s - time.monotonic()
        if reached(view) or left_s <= 0:
            return view, reached(view)
        keyspace.wait(RANGES, view.revision, timeout_s=min(left_s, READ_S))


class GroupMember:
    """A process of a group, from construction until ``close``, which closes ``keyspace`` too.

    ``replica``: its own record, if it is a replica; it lives under a lease of ``ttl_s``.
    ``wanted``: how many replicas are to serve, for a group that has no roles yet; None: this
    process only looks, and leaves decisions to others. ``suspects``: the replicas that this process
    gets no answer from. ``on_view`` gets each view, in a thread of the member's, and must be quick.

    While the keyspace does not answer, the last view holds and nothing is decided. A lease that ran
    out meanwhile is replaced by a new one.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        *,
        wanted: int | None,
        emit: Emit,
        replica: ReplicaRecord | None = None,
        ttl_s: float = LEASE_TTL_S,
        on_view: Callable[[GroupView], None] = lambda view: None,
        suspects: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._keyspace = keyspace
        self._wanted = wanted
        self._emit = emit
        self._on_view = on_view
        self._suspects = suspects
        self._closed = threading.Event()
        self._told = ""
        """Of what the group last said that it does not answer, or that records are broken."""
        self._record = _LeasedRecord(keyspace, replica, ttl_s) if replica is not None else None
        self._threads = [
            threading.Thread(target=self._watch, name="ckpt-group-watch", daemon=True),
            *(
                [threading.Thread(target=self._keep, name="ckpt-group-lease", daemon=True)]
                if replica is not None
                else []
            ),
        ]
        for thread in self._threads:
            thread.start()

    def update(self, **changes: object) -> None:
        """Change fields of this replica's record; written soon, in another thread."""
        assert self._record is not None, "only a replica has a record of its own"
        self._record.change(changes)

    def close(self) -> None:
        """Leave at once: the replica's record is deleted with its lease. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._record is not None:
            self._record.changed.set()
        for thread in self._threads:
            thread.join(JOIN_S)
        if self._record is not None:
            with suppress(CkptError):  # then it expires
                self._record.end()
        self._keyspace.close()

    # ---- the thread that watches and decides

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                view, problems = read_view(self._keyspace)
                self._say("group-unreadable" if problems else "", "; ".join(problems))
                self._on_view(view)
                suspects = self._suspects()
                self._settle(view, suspects)
                self._wait(view.revision, suspects)
            except UnavailableError as error:
                self._say("group-silent", f"the last roles hold meanwhile: {error}")
                self._closed.wait(RETRY_S)
            except Exception as error:  # noqa: BLE001  a thread's border: it must not end in silence
                text = str(InternalError(f"a defect in watching the group: {error!r}"))
                self._say("group-silent", text)
                self._closed.wait(RETRY_S)

    def _wait(self, revision: int, suspects: frozenset[str]) -> None:
        """Wait for a change of the records or of the suspicions."""
        until_s = time.monotonic() + READ_S
        while not self._closed.is_set() and time.monotonic() < until_s:
            if self._keyspace.wait(RANGES, revision, timeout_s=LOOK_S):
                return
            if self._suspects() != suspects:
                return

    def _settle(self, view: GroupView, suspects: frozenset[str]) -> None:
        if self._wanted is None:
            return
        roles = decide_roles(view, wanted=self._wanted, suspects=suspects)
        if roles is None or not _write(self._keyspace, view, roles):
            return  # another process came first; its write wakes this one
        before = view.roles.serving if view.roles is not None else ()
        for name in roles.serving:
            if name not in before:
                gone = [other for other in before if other not in roles.serving]
                instead = f" in the place of {', '.join(gone)}" if gone else ""
                text = f"{name} serves from now on{instead}"
                self._emit(Event("replica-promoted", text, {"replica": name}))
        # A group that is ended drains all of its replicas; that is nobody's loss.
        ended = view.replicas and all(one.state == "draining" for one in view.replicas.values())
        if before and not roles.serving and not ended:
            text = "no replica can serve; requests are refused until one can"
            self._emit(Event("group-empty", text, alarm=True))

    # ---- the thread that keeps the lease

    def _keep(self) -> None:
        assert self._record is not None, "only replicas have this thread"
        while not self._closed.is_set():
            try:
                wait_s = self._record.keep()
            except UnavailableError:  # the other thread says it
                wait_s = RETRY_S
            except Exception as error:  # noqa: BLE001  a thread's border: it must not end in silence
                text = f"a defect in keeping the replica's lease: {error!r}"
                self._emit(Event("group-silent", str(InternalError(text)), alarm=True))
                wait_s = RETRY_S
            self._record.changed.wait(wait_s)

    def _say(self, kind: str, why: str) -> None:
        """Say a problem when it begins, and that it is over."""
        if kind == self._told:
            return
        self._told = kind
        if kind:
            begins = {
                "group-silent": "the group's records can't be read or written",
                "group-unreadable": "a record of the group is broken and counts as missing",
            }[kind]
            self._emit(Event(kind, f"{begins}: {why}", alarm=True))
        else:
            self._emit(Event("group-well", "the group's records can be read again"))


class _LeasedRecord:
    """A replica's record under a lease of its own. ``keep`` is called by one thread."""

    def __init__(self, keyspace: Keyspace, replica: ReplicaRecord, ttl_s: float) -> None:
        self._keyspace = keyspace
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._wanted = replica
        self._written: ReplicaRecord | None = None
        self._lease: Lease | None = None
        self._lease_id = 0
        self.changed = threading.Event()

    def change(self, changes: dict[str, object]) -> None:
        with self._lock:
            self._wanted = msgspec.structs.replace(self._wanted, **changes)
        self.changed.set()

    def keep(self) -> float:
        """Do what is due: get a lease, renew it, write the record. Seconds until more is due.

        Raises UnavailableError.
        """
        self.changed.clear()
        now_s = time.monotonic()
        try:
            lease = self._lease or self._granted(now_s)
            if now_s >= lease.next_keepalive_s:
                lease = self._renewed(lease, now_s)
            with self._lock:
                wanted = self._wanted
            if wanted != self._written:
                key = REPLICAS + wanted.name
                put = Put(key, encode(wanted), lease_id=lease.lease_id)
                self._keyspace.transact(Transaction(then=(put,)))
                self._written = wanted
        except NotFoundError:  # the lease has expired, and the record with it
            self._lease, self._lease_id, self._written = None, 0, None
            return 0.0
        return max(0.0, lease.next_keepalive_s - time.monotonic())

    def _granted(self, now_s: float) -> Lease:
        # The same id after silence: a lease that was granted is not left behind.
        self._lease_id = self._lease_id or secrets.randbits(62) + 1
        ttl_s = self._keyspace.grant(self._lease_id, self._ttl_s).ttl_s
        self._lease = granted_lease(self._lease_id, ttl_s=ttl_s, margin_s=0.0, sent_s=now_s)
        return self._lease

    def _renewed(self, lease: Lease, now_s: float) -> Lease:
        try:
            left_s = self._keyspace.renew(lease.lease_id)
        except UnavailableError as error:
            self._lease = apply_answer(lease, LeaseSilent(now_s, str(error)))
            raise
        if left_s <= 0:
            raise NotFoundError("the lease has expired")
        self._lease = apply_answer(lease, Renewed(now_s, left_s))
        return self._lease

    def end(self) -> None:
        """Give the lease up, and with it the record. Raises UnavailableError."""
        if self._lease_id:
            self._keyspace.revoke(self._lease_id)
