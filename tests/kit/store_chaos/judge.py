"""What must be true when all faults are over: nothing is lost, nothing is there that nobody needs,
all copies are right."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone, stores_of
from ckpt.format import keys
from ckpt.format.canonical import digest_hex
from ckpt.format.manifest import Manifest
from ckpt.format.part import decode_part
from ckpt.log.journal import Journal
from ckpt.log.reader import read_new
from ckpt.log.state import LogState
from ckpt.maintenance.gc.drop import drop
from ckpt.values import ChunkLocation
from kit.store_chaos.bounds import OPERATION_S, closing, within
from kit.store_chaos.run import Run
from kit.store_chaos.upkeep import scrub_all, sweep_now

OBJECT_BYTES_MAX = 1 << 30
LEFT_OVER = (".probe/", "probes/", ".tmp/", keys.LOG, keys.FOLDS, keys.JOB_KEY)
"""Beside manifests, parts and packs: the log itself, and what those leave who die, or are cut off,
while they try a store."""

Copies = dict[str, bytes]


def judge(run: Run, dice: random.Random) -> None:
    """Mend, save once more, drop and sweep; then look at every store, and at what is left without
    any one of them."""
    run.go_direct()
    for name, work in (
        ("mend", run.mend),
        ("save", run.save),
        ("look", run.look),
        ("mend", run.mend),
        ("tidy", partial(_tidy, run)),
        ("stores", partial(_stores, run)),
        ("without one", partial(_without_one, run)),
    ):
        began_s = time.monotonic()
        told = within(OPERATION_S, partial(work, dice, True))
        print(f"at the end: {name} {time.monotonic() - began_s:.1f} s  {told}")
    run.leave()


def _tidy(run: Run, dice: random.Random, quiet: bool) -> str:
    """Delete all garbage, what died while it was uploaded included, and find nothing to mend."""
    run.leave()
    with closing(run.backend()) as backend:
        done, state = drop(backend, Journal.open(backend), None, now_unix_s=time.time())
        assert not done.drops
        report = sweep_now(backend, state, dice)
        assert report.ok, f"not swept: {report}"
        scrub_all(backend)  # the last record may be on its way to the third store
        scrubbed = scrub_all(backend, mend=False)
        assert scrubbed.ok, f"not right: {scrubbed}"
        assert not scrubbed.problems_total, f"not right: {scrubbed.problems}"
    return f"deleted {[one.deleted for one in report.stores]}"


def _stores(run: Run, dice: random.Random, quiet: bool) -> str:
    """Each store holds the whole log, and exactly the manifests, parts and packs that its snapshots
    need, all of them right."""
    with closing(run.backend()) as backend:
        state = Journal.open(backend).refresh()
        assert not state.stale_reason, state.stale_reason
        assert state.stores is not None
        world = run.truth.known()
        assert {one.snapshot for one in state.snapshots} == world.existing().keys()
        for number, store in enumerate(stores_of(backend)):
            alone = read_new(store, LogState(job=state.job))
            assert alone.hole is None, f"a hole in the log. store={number} {alone.hole}"
            assert (alone.head_digest, alone.snapshots) == (state.head_digest, state.snapshots), (
                f"store={number}"
            )
            _check_store(run, number, store, state)
    return (
        f"{len(state.snapshots)} snapshots, {state.next_seq} records, on {len(run.places)} stores"
    )


def _check_store(run: Run, number: int, store: Backend, state: LogState) -> None:
    needed: set[str] = set()
    chunks: dict[str, set[ChunkLocation]] = {}
    for entry in state.snapshots:
        key = keys.manifest_key(entry.snapshot, entry.manifest_digest)
        data = read_alone(store, key, bytes_max=OBJECT_BYTES_MAX)
        assert digest_hex(data) == entry.manifest_digest, f"store={number} {key}"
        needed.add(key)
        for ref in Manifest.decode(data).parts:
            body = read_alone(store, ref.key, bytes_max=OBJECT_BYTES_MAX)
            assert digest_hex(body) == ref.digest, f"store={number} {ref.key}"
            needed.add(ref.key)
            for location in (one for shard in decode_part(body).shards for one in shard.locations):
                chunks.setdefault(location.pack, set()).add(location)
    needed |= chunks.keys()
    there = [key for key in run.places[number].keys() if not key.startswith(LEFT_OVER)]  # noqa: SIM118  no mapping
    assert not needed - set(there), f"missing. store={number} {sorted(needed - set(there))}"
    assert not set(there) - needed, (
        f"LEAK: nobody needs it. store={number} {sorted(set(there) - needed)}"
    )
    for key, places in chunks.items():
        size = max(one.offset_bytes + one.stored_bytes for one in places)
        assert read_alone(store, key, bytes_max=OBJECT_BYTES_MAX)[:size]


def _without_one(run: Run, dice: random.Random, quiet: bool) -> str:
    """Whichever store is lost, the newest is known, and each snapshot is there to the last bit;
    with one left it is flagged."""
    world = run.truth.known()
    everybody = range(len(run.places))
    for gone in everybody:
        with closing(run.reader(dead=[gone])) as checkpointer:
            newest = checkpointer.latest()
            assert newest is not None
            assert (newest.id, newest.maybe_stale) == (world.line()[0], False), (
                f"without {gone}: {newest}"
            )
            for pair in _some(sorted(world.existing()), dice):
                assert not run.check_restored(checkpointer, pair).maybe_stale
    for left in everybody:
        with closing(run.reader(dead=[one for one in everybody if one != left])) as checkpointer:
            for pair in sorted(world.existing()):
                assert run.check_restored(checkpointer, pair).maybe_stale, (
                    f"only {left} answers, and it is not flagged"
                )
    return f"{len(world.existing())} snapshots"


def _some(pairs: Sequence[object], dice: random.Random) -> Sequence:  # type: ignore[type-arg]
    """The last, and up to two others: all are read of each store alone anyway."""
    return [*dice.sample(pairs[:-1], min(2, len(pairs) - 1)), pairs[-1]]
