"""The copies of one log on several stores: reading what each holds, creating a record at many. No decisions live here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import islice

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.commit.gather import Held, Silent
from ckpt.commit.lanes import Lanes, ThreadLanes
from ckpt.commit.reader import RECORDS_AT_ONCE, read_all
from ckpt.commit.sequencer import Lost, Unknown, create_once
from ckpt.errors import (
    CkptError,
    IntegrityError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)
from ckpt.manifest import keys
from ckpt.manifest.job import JOB_BYTES_MAX, JobRecord
from ckpt.manifest.records import RECORD_BYTES_MAX, Record, decode_record

LATE = Silent("no answer yet")


class Copies:
    """The stores that hold one log, or shall, by number in the user's order."""

    def __init__(self, stores: Sequence[Backend], lanes: Lanes | None = None) -> None:
        self.stores = tuple(stores)
        self.urls = tuple(store.url for store in stores)
        self._lanes = lanes or ThreadLanes()
        self._creators: dict[int, bool] = {}

    def jobs(self) -> list[JobRecord | Silent | None]:
        """What each store's ``ckpt.json`` says; None where it has none. One that is damaged says nothing.

        A majority of answers is waited for, and a little longer for the others.
        """
        found = self._lanes.ask({n: partial(_job, store) for n, store in enumerate(self.stores)}, self._most)
        return [found.get(n, LATE) for n in range(len(self.stores))]

    def held(self, after: int, log_id: str) -> list[Held | Silent]:
        """What each store holds of a log behind place ``after``, 1,024 places at most; its id as it is afterwards.

        A majority of answers is waited for, and a little longer for the others.
        """
        calls = {n: partial(_held, store, after, log_id) for n, store in enumerate(self.stores)}
        found = self._lanes.ask(calls, self._most)
        return [found.get(n, LATE) for n in range(len(self.stores))]

    def create(self, key: str, data: bytes, at: Collection[int], quorum: int) -> dict[int, bytes | Silent]:
        """Create ``key`` at the stores of these numbers; what each holds there now, or that this is not known.

        A store that doesn't create only once is looked at first, and written to where nothing is there. Returns soon after
        ``quorum`` of them hold ``data``; the others get it behind.
        """
        once = self.creators(at)
        found: dict[int, bytes | Silent] = dict.fromkeys(at, LATE)
        calls = {n: partial(_create, self.stores[n], key, data, once=n in once) for n in sorted(at)}
        found.update(self._lanes.ask(calls, lambda answers: copies_of(data, answers) >= quorum))
        return found

    def make(self, number: int, record: JobRecord) -> JobRecord | Silent:
        """Write ``ckpt.json`` in a store that has none; what is there then."""
        if not self.creators([number]):
            try:
                self.stores[number].put(keys.JOB_KEY, [record.encode()])
            except (UnavailableError, StoreFullError, StoreDeniedError) as error:
                return Silent(str(error))
            found = _job(self.stores[number])
            return found if found is not None else Silent("what was written is not there")
        made = create_once(self.stores[number], keys.JOB_KEY, record.encode(), bytes_max=JOB_BYTES_MAX)
        if isinstance(made, Unknown):
            return Silent(made.why)
        return JobRecord.decode(made.data) if isinstance(made, Lost) else record

    def listed(self, prefix: str) -> set[str]:
        """The keys that any store which answers has below ``prefix``."""
        calls = {n: partial(_listed, store, prefix) for n, store in enumerate(self.stores)}
        return {
            key for found in self._lanes.ask(calls, self._most).values() if isinstance(found, list) for key in found
        }

    def read(self, key: str, *, bytes_max: int) -> list[bytes | Silent]:
        """What each store holds at ``key``, or that this is not known, or nothing."""
        calls = {n: partial(_read, store, key, bytes_max) for n, store in enumerate(self.stores)}
        found = self._lanes.ask(calls, self._most)
        return [found.get(n, LATE) for n in range(len(self.stores))]

    def creators(self, at: Collection[int]) -> frozenset[int]:
        """Those of the stores that create a key only once; one that can't be asked now counts as none."""
        unknown = {n: partial(_creates, self.stores[n]) for n in at if n not in self._creators}
        if unknown:
            answers = self._lanes.ask(unknown, lambda found: 2 * len(found) > len(unknown))
            self._creators.update({n: yes for n, yes in answers.items() if yes is not None})
        return frozenset(n for n in at if self._creators.get(n, False))

    def _most(self, answers: Mapping[int, object]) -> bool:
        return 2 * sum(not isinstance(one, Silent) for one in answers.values()) > len(self.stores)


def copies_of(data: bytes, found: Mapping[int, bytes | Silent]) -> int:
    """How many of the stores hold ``data``."""
    return sum(held == data for held in found.values())


def _job(store: Backend) -> JobRecord | Silent | None:
    try:
        return JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return None
    except (UnavailableError, StoreDeniedError, IntegrityError) as error:
        return Silent(str(error))


def _held(store: Backend, after: int, log_id: str) -> Held | Silent:
    try:
        records, settled, damaged = _records(store, after)
    except (UnavailableError, StoreDeniedError) as error:
        return Silent(str(error))
    found = _job(store)  # last: a store that was swapped meanwhile holds nothing that counts
    if isinstance(found, Silent):
        return found
    if found is not None and found.log_id != log_id:
        return Held("")
    return Held(found.store_id if found is not None else "", records, settled, damaged)


def _records(store: Backend, after: int) -> tuple[dict[int, Record], dict[int, Record], frozenset[int]]:
    start = keys.log_key(after) if after >= 0 else ""
    listed = [stat.key for stat in islice(store.list(keys.LOG, after=start), 2 * RECORDS_AT_ONCE)]
    places = [(key, seq, False) for key in listed if (seq := keys.parse_log_key(key)) is not None]
    places += [(key, seq, True) for key in listed if (seq := keys.parse_settled_key(key)) is not None and seq > after]
    found = read_all(places, lambda place: _record(store, place[0], place[1]))
    records: dict[int, Record] = {}
    settled: dict[int, Record] = {}
    damaged = set()
    for (_, seq, second), record in zip(places, found, strict=True):
        if record is None:
            damaged.add(seq)
        else:
            (settled if second else records)[seq] = record
    return records, settled, frozenset(damaged)


def _record(store: Backend, key: str, seq: int) -> Record | None:
    try:
        record = decode_record(read_alone(store, key, bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, NotFoundError):
        return None
    return record if record.seq == seq else None


def _listed(store: Backend, prefix: str) -> list[str] | Silent:
    try:
        return [stat.key for stat in store.list(prefix)]
    except (UnavailableError, StoreDeniedError) as error:
        return Silent(str(error))


def _read(store: Backend, key: str, bytes_max: int) -> bytes | Silent:
    try:
        return read_alone(store, key, bytes_max=bytes_max)
    except (UnavailableError, StoreDeniedError, NotFoundError, IntegrityError) as error:
        return Silent(str(error))


def _creates(store: Backend) -> bool | None:
    try:
        return store.capabilities().create_only
    except CkptError:
        return None


def _create(store: Backend, key: str, data: bytes, *, once: bool) -> bytes | Silent:
    """Create the key and say what is there. Refused or unanswered it isn't known: the put may have landed, or land yet."""
    try:
        if once:
            made = create_once(store, key, data, bytes_max=RECORD_BYTES_MAX)
            if isinstance(made, Unknown):
                return Silent(made.why)
            return made.data if isinstance(made, Lost) else data
        if store.stat(key) is not None:
            return read_alone(store, key, bytes_max=RECORD_BYTES_MAX)
        store.put(key, [data])
    except (UnavailableError, StoreFullError, StoreDeniedError, NotFoundError, IntegrityError) as error:
        return Silent(str(error))
    return data
