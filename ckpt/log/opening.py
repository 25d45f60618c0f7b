"""Opening a log: which stores are meant, whether it is there, and its first record where it lies on several."""

from __future__ import annotations

import secrets

from ckpt.backends.base import Backend
from ckpt.backends.checked import Replicated
from ckpt.errors import FencedError, UnavailableError, UsageError
from ckpt.format.records import BY_STORES, Stores, make_record
from ckpt.log.access import LogAccess, OneStore
from ckpt.log.commit_quorum import stand_in
from ckpt.log.copies import Copies
from ckpt.log.giver import giver_beside
from ckpt.log.open import Place, open_places
from ckpt.log.place import open_store
from ckpt.log.replicated import SeveralStores
from ckpt.log.sequencer import Claimed, Lost, Unknown
from ckpt.log.state import LogState

FIRST_TRIES_MAX = 8
"""How often the first record is claimed anew after another process came first."""


def open_log(backend: Backend, *, job: str | None, create: bool) -> LogAccess:
    """See ``Journal.open``."""
    if not isinstance(backend, Replicated):
        return OneStore(backend, open_store(backend, job=job, create=create))
    copies = Copies(backend.stores)
    place = open_places(copies, write_quorum=backend.write_quorum, job=job, create=create)
    several = SeveralStores(backend, copies, job=place.job, log_id=place.log_id)
    if create:
        _begin(several, backend, place)
    return several


def _begin(log: SeveralStores, backend: Replicated, place: Place) -> None:
    """Write the first record, which says where the log lies. Nothing where it is written already.

    Stores that were not empty a moment ago may belong to a log of which those that answer have nothing: one that missed
    everything, and one that came back empty and is being filled.
    """
    for _ in range(FIRST_TRIES_MAX):
        state = log.read_on(log.start()[0])
        if state.next_seq > 0:
            require_known(state, backend)
        if state.next_seq == 1 and state.hole is None:
            match log.finish(state):  # nothing can follow before that, and it may come to nothing
                case Unknown(why):
                    raise UnavailableError(f"the log's first record is on too few stores yet. why={why} repeat later")
                case Lost():
                    continue
        if state.next_seq > 0:
            return
        if state.hole is not None:
            raise UnavailableError(
                f"the log's first record can't be read. stores={list(log.copies.urls)} why={state.hole.reason} repeat later"
            )
        if log.silent and not place.fresh:
            silent = [log.copies.urls[number] for number in sorted(log.silent)]
            raise UnavailableError(
                f"the log may have begun on stores that do not answer. stores={list(log.copies.urls)} silent={silent} "
                "repeat when all answer"
            )
        known = [now or then for now, then in zip(log.ids, place.ids, strict=True)]
        ids = tuple(store_id or stand_in(number) for number, store_id in enumerate(known))
        if sum(bool(store_id) for store_id in known) < backend.write_quorum:
            raise UnavailableError(
                f"too few stores answer to begin the log. stores={list(log.copies.urls)} repeat later"
            )
        body = Stores(ids, backend.write_quorum, _giver(log, backend.write_quorum))
        record = make_record(body, job=log.job, seq=0, epoch=0, write_id=secrets.token_hex(16), prev="")
        try:
            made = log.claim(state, record)
        except FencedError:
            continue  # another maker found that a file has to give out places, or that none has
        if isinstance(made, Claimed):
            return
        if isinstance(made, Unknown):
            raise UnavailableError(
                f"the log could not be begun. stores={list(log.copies.urls)} why={made.why} repeat later"
            )
    raise UnavailableError(f"other writers came first every time. stores={list(log.copies.urls)} repeat later")


def require_known(state: LogState, backend: Replicated) -> None:
    """Raises UsageError where the log does not say what the user says: on how many stores it lies, and on how many it must."""
    urls = [store.url for store in backend.stores]
    if state.stores is None:
        if state.next_seq > 0:
            raise UsageError(f"the log is in one store. stores={urls} add the others with `ckpt stores add` first")
        return
    known = (len(state.stores.ids), state.stores.write_quorum)
    if known != (len(urls), backend.write_quorum):
        raise UsageError(
            f"the log lies on {known[0]} stores with a write quorum of {known[1]}. given={len(urls)} "
            f"write_quorum={backend.write_quorum} stores={urls} name those, or change it with `ckpt stores`"
        )


def _giver(log: SeveralStores, write_quorum: int) -> str:
    """Who gives out the places: the stores together where all create a key only once, or else etcd or a file of this machine.

    One that doesn't would have a vote that nobody can know, so that a split could never be settled.
    """
    answering = [number for number, store_id in enumerate(log.ids) if store_id]
    able = log.copies.creators(answering)
    if log.copies.unable([number for number in answering if number not in able]):
        return giver_beside(log.log_id, start=0)
    if len(able) >= write_quorum:
        return BY_STORES
    # A log is bound to this machine for good only where that must be: not because a store can't be asked now.
    raise UnavailableError(
        f"it can't be learned whether the stores create a key only once. stores={list(log.copies.urls)} repeat later, or grant "
        "permission to write"
    )
