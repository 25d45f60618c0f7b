"""One rank's failure is every rank's failure of that one snapshot; the next one works. Ranks are
threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    CkptError,
    ConflictError,
    FencedError,
    IntegrityError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.log.catalog import load_index, snapshots
from ckpt.log.journal import Journal
from ckpt.session import saving
from ckpt.session.agreement import Skip, Take
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.values import SnapshotId


class GatedBackend(MemoryBackend):
    """A store whose packs wait until the gate opens."""

    def __init__(self) -> None:
        super().__init__("gated")
        self.gate = threading.Event()

    def put(self, key, data, *, create_only: bool = False) -> None:
        """See Backend."""
        if key.startswith("packs/"):
            assert self.gate.wait(30)
        super().put(key, data, create_only=create_only)


def _items(rank: int, step: int) -> dict[str, object]:
    return {"state": {"w": torch.arange(4.0) + 1000 * step + rank, "step": step}}


def _save_all(run_ranks, ranks, step: int, **more: object) -> list[object]:
    return run_ranks(len(ranks), lambda r: ranks[r].save(_items(r, step), step, **more).durable(20))


def _finish_all(run_ranks, ranks) -> list[object]:
    return run_ranks(len(ranks), lambda r: ranks[r].saving.finish())


def test_all_ranks_see_the_same_durable_snapshot(job, run_ranks) -> None:
    ranks = job.ranks(3)
    infos = _save_all(run_ranks, ranks, 7, tags=("best",), metadata={"loss": 0.5})
    assert infos[0] == infos[1] == infos[2]
    assert (infos[0].step, infos[0].world_size, infos[0].tags, infos[0].metadata) == (
        7,
        3,
        ("best",),
        {"loss": 0.5},
    )
    assert _finish_all(run_ranks, ranks) == [None] * 3
    state = Journal.open(job.store).refresh()
    assert state.tags == {"best": infos[0].id}
    assert load_index(job.store, state, infos[0].id).ranks == (0, 1, 2)


@pytest.mark.parametrize("harmed", [0, 1, 2])
@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (Harm.FULL, StoreFullError),
        (Harm.DENIED, StoreDeniedError),
        (Harm.LOST_REQUEST, UnavailableError),
    ],
)
def test_write_that_fails_on_one_rank_fails_the_snapshot_on_all_with_that_error(
    job, run_ranks, harmed: int, harm: Harm, kind: type[CkptError]
) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=harm, op="put", key="packs/")])
    ranks = job.ranks(3, backends={harmed: faulty})
    errors = _save_all(run_ranks, ranks, 1)
    assert all(type(error) is kind for error in errors), errors
    assert all(f"rank {harmed}: " in str(error) for error in errors)
    assert all(
        [event.kind for event in rank.events if event.alarm] == ["save-failed"] for rank in ranks
    )
    infos = _save_all(run_ranks, ranks, 2)
    assert infos[0] == infos[1] == infos[2]
    assert infos[0].step == 2
    assert _finish_all(run_ranks, ranks) == [None] * 3
    state = Journal.open(job.store).refresh()
    assert [info.step for info in snapshots(job.store, state)] == [2]


def test_part_that_can_not_be_written_fails_the_snapshot_on_all(job, run_ranks) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="parts/")])
    ranks = job.ranks(2, backends={1: faulty})
    assert all(isinstance(error, StoreFullError) for error in _save_all(run_ranks, ranks, 1))
    assert [info.step for info in _save_all(run_ranks, ranks, 2)] == [2, 2]
    _finish_all(run_ranks, ranks)


@pytest.mark.parametrize("key", ["manifests/", "log/"])
def test_commit_that_fails_on_rank_0_fails_on_all_and_the_next_one_works(
    job, run_ranks, key: str
) -> None:
    Journal.open(job.store, job="job", create=True)
    skip = 1 if key == "log/" else 0  # the epoch's own record goes through
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.DENIED, op="put", key=key, skip=skip)])
    ranks = job.ranks(2, backends={0: faulty})
    errors = _save_all(run_ranks, ranks, 1)
    assert all(isinstance(error, StoreDeniedError) for error in errors), errors
    assert [info.step for info in _save_all(run_ranks, ranks, 2)] == [2, 2]
    _finish_all(run_ranks, ranks)


def test_unforeseen_error_of_a_store_fails_on_all_ranks_instead_of_hanging_them(
    job, run_ranks
) -> None:
    class Broken(MemoryBackend):
        broken = True

        def put(self, key, data, *, create_only: bool = False) -> None:
            if self.broken and key.startswith("packs/"):
                raise ZeroDivisionError("a bug in a vendor's client")
            job.store.put(key, data, create_only=create_only)

        def read_into(self, key, out, *, offset_bytes: int = 0) -> None:
            job.store.read_into(key, out, offset_bytes=offset_bytes)

        def stat(self, key):
            return job.store.stat(key)

        def list(self, prefix, *, after: str = ""):
            return job.store.list(prefix, after=after)

    broken = Broken()
    ranks = job.ranks(2, backends={1: broken})
    errors = _save_all(run_ranks, ranks, 1)
    assert all("a bug in a vendor's client" in str(error) for error in errors)
    broken.broken = False
    assert [info.step for info in _save_all(run_ranks, ranks, 2)] == [2, 2]
    _finish_all(run_ranks, ranks)


@pytest.mark.parametrize("refusing", [0, 1])
def test_state_that_one_rank_can_not_capture_frees_the_other(job, run_ranks, refusing: int) -> None:
    ranks = job.ranks(2)

    def save(r: int) -> object:
        items = {"state": {"bad": object()}} if r == refusing else _items(r, 1)
        return ranks[r].save(items, 1).durable(20)

    errors = run_ranks(2, save)
    assert all(isinstance(error, UsageError) for error in errors), errors
    assert f"rank {refusing}: " in str(errors[1 - refusing])
    assert [info.step for info in _save_all(run_ranks, ranks, 2)] == [2, 2]
    _finish_all(run_ranks, ranks)


def test_ranks_that_save_different_steps_conflict_and_nothing_is_committed(job, run_ranks) -> None:
    ranks = job.ranks(2)
    errors = run_ranks(2, lambda r: ranks[r].save(_items(r, 5 + r), 5 + r).durable(20))
    assert all(isinstance(error, ConflictError) for error in errors), errors
    assert "step 5" in str(errors[0])
    assert "step 6" in str(errors[0])
    assert snapshots(job.store, Journal.open(job.store).refresh()) == ()
    assert [info.step for info in _save_all(run_ranks, ranks, 7)] == [7, 7]
    _finish_all(run_ranks, ranks)


def test_equal_chunks_of_the_last_snapshot_are_referred_to(job, run_ranks) -> None:
    counting = CountingBackend(job.store)
    ranks = job.ranks(2, backends={0: counting, 1: counting})
    frozen = torch.randn(50_000)
    for step in (1, 2):
        infos = run_ranks(
            2,
            lambda r, step=step: (
                ranks[r].save({"s": {"w": frozen, "step": step}}, step).durable(20)
            ),
        )
    assert infos[0].new_bytes < infos[0].size_bytes / 100
    _finish_all(run_ranks, ranks)


def test_after_a_conflict_the_next_snapshot_refers_to_nothing(job, run_ranks) -> None:
    ranks = job.ranks(2)
    frozen = torch.randn(50_000)

    def save(step: int) -> list[object]:
        return run_ranks(
            2, lambda r: ranks[r].save({"s": {"w": frozen, "step": step}}, step).durable(20)
        )

    save(1)
    errors = run_ranks(2, lambda r: ranks[r].save({"s": {"w": frozen}}, 5 + r).durable(20))
    assert all(isinstance(error, ConflictError) for error in errors), errors
    info = save(11)[0]
    assert info.new_bytes > frozen.nbytes / 2, "chunks were referred to that may have been dropped"
    assert load_index(job.store, Journal.open(job.store).refresh(), info.id).manifest.base is None
    again = save(12)[0]
    assert again.new_bytes < frozen.nbytes / 100
    _finish_all(run_ranks, ranks)


def test_newer_epoch_fences_every_rank_of_the_old_one(job, run_ranks) -> None:
    ranks = job.ranks(2)
    _save_all(run_ranks, ranks, 1)
    Journal.open(job.store).open_epoch(resume=SnapshotId(1, 1))
    errors = _save_all(run_ranks, ranks, 2)
    assert all(isinstance(error, FencedError) for error in errors), errors
    again = run_ranks(2, lambda r: ranks[r].save(_items(r, 3), 3))
    assert all(isinstance(error, FencedError) for error in again), again
    ended = _finish_all(run_ranks, ranks)
    assert all(isinstance(error, FencedError) for error in ended), ended


def test_in_flight_counts_what_is_ordered_and_not_settled(rank_over) -> None:
    store = GatedBackend()
    rank = rank_over(store)
    assert rank.saving.may_take(0) == Take()
    first = rank.save(_items(0, 1), 1)
    assert rank.saving.may_take(0) == Take()
    second = rank.save(_items(0, 2), 2)
    assert isinstance(rank.saving.may_take(0), Skip)
    assert not rank.saving.idle
    store.gate.set()
    assert (first.durable(20).step, second.durable(20).step) == (1, 2)
    assert rank.saving.idle
    _until(lambda: rank.saving.may_take(0) == Take())
    rank.saving.finish()


def test_failed_and_refused_snapshots_leave_nothing_in_flight(job, run_ranks) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="packs/", times=3)])
    rank = job.ranks(1, backends={0: faulty})[0]
    for step in (1, 2, 3):
        with pytest.raises(StoreFullError):
            rank.save(_items(0, step), step).durable(20)
    for step in (4, 5, 6):
        with pytest.raises(UsageError):
            rank.save({"bad": object()}, step)
    _until(lambda: rank.saving._persister.in_flight == 0)
    assert rank.saving.may_take(0) == Take()
    assert rank.save(_items(0, 7), 7).durable(20).step == 7
    rank.saving.finish()


def test_durable_with_a_time_limit_lets_the_save_go_on(rank_over) -> None:
    store = GatedBackend()
    rank = rank_over(store)
    pending = rank.save(_items(0, 3), 3)
    for _ in range(3):
        with pytest.raises(
            UnavailableError, match=r"the save continues\. epoch 1 step 3 waited_s=0.01"
        ):
            pending.durable(0.01)
    assert not pending.done()
    assert pending.failure() is None
    assert "in flight" in repr(pending)
    store.gate.set()
    assert pending.durable(20).step == 3
    assert pending.done()
    assert "durable" in repr(pending)
    assert (pending.step, pending.epoch) == (3, 1)
    rank.saving.finish()


def test_third_save_waits_for_one_of_two_slots(rank_over) -> None:
    store = GatedBackend()
    rank = rank_over(store)
    tensor = torch.zeros(8)
    pendings = []
    for step in (1, 2):
        tensor.fill_(step)
        pendings.append(rank.save({"t": tensor}, step))
    third = threading.Thread(target=lambda: pendings.append(rank.save({"t": tensor.fill_(3)}, 3)))
    third.start()
    third.join(0.05)
    assert third.is_alive(), "the third save took a slot that an upload holds"
    store.gate.set()
    third.join(20)
    assert [pending.durable(20).step for pending in pendings] == [1, 2, 3]
    rank.saving.finish()


def test_finish_raises_what_kept_the_last_snapshot_from_being_durable(job) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="packs/", skip=1)])
    rank = job.ranks(1, backends={0: faulty})[0]
    rank.save(_items(0, 1), 1)
    rank.save(_items(0, 2), 2)
    with pytest.raises(StoreFullError):
        rank.saving.finish()


def test_finish_forgives_an_older_failure_that_a_later_snapshot_made_good(job) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="packs/")])
    rank = job.ranks(1, backends={0: faulty})[0]
    rank.save(_items(0, 1), 1)
    rank.save(_items(0, 2), 2)
    rank.saving.finish()


def test_end_whose_reply_was_lost_is_durable_although_an_older_snapshot_failed(
    job, monkeypatch
) -> None:
    monkeypatch.setattr(saving, "END_PAUSES_S", (0.01,))
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="packs/")])
    rank = job.ranks(1, backends={0: faulty})[0]
    with pytest.raises(StoreFullError):
        rank.save(_items(0, 90), 90).durable(20)
    persister = rank.saving._persister
    submit = persister.submit

    answers = [UnavailableError("no reply"), ConflictError("it is in the log")]

    def lose_the_reply(staged, *, tags):
        if len(answers) == 2:
            submit(staged, tags=tags).result(20)
        answer: Future[object] = Future()
        answer.set_exception(answers.pop(0))
        return answer

    persister.submit = lose_the_reply
    rank.save(_items(0, 100), 100)

    def committed(snapshot: SnapshotId):
        state = Journal.open(job.store).refresh()
        return next(info for info in snapshots(job.store, state) if info.id == snapshot)

    rank.saving.retry_last(0.02, stop=threading.Event(), committed=committed)
    rank.saving.finish()
    assert rank.saving.last_info().step == 100


def test_older_failure_is_not_the_last_one_after_a_success(job) -> None:
    faulty = FaultyBackend(job.store, [Fault(harm=Harm.FULL, op="put", key="packs/")])
    rank = job.ranks(1, backends={0: faulty})[0]
    with pytest.raises(StoreFullError):
        rank.save(_items(0, 1), 1).durable(20)
    assert isinstance(rank.saving.last_failure, StoreFullError)
    for step in (2, 3, 4):
        rank.save(_items(0, step), step).durable(20)
        assert rank.saving.last_failure is None, step
    rank.saving.finish()


def test_abandon_lets_what_is_staged_become_durable(job) -> None:
    rank = job.ranks(1)[0]
    pending = rank.save(_items(0, 1), 1)
    rank.saving.abandon()
    assert pending.done()
    assert pending.durable().step == 1


def test_slot_that_changed_after_its_seal_is_never_committed(rank_over) -> None:
    store = GatedBackend()
    rank = rank_over(store)
    blocking = rank.save({"t": torch.zeros(1000)}, 1)
    changed = rank.save({"t": torch.ones(1000)}, 2)
    slots = [
        slot
        for slot in rank.saving._stager._pool._slots
        if bytes(slot.data[:4]) == b"\x00\x00\x80\x3f"
    ]
    slots[0].data[1] ^= 1
    store.gate.set()
    assert blocking.durable(20).step == 1
    with pytest.raises(IntegrityError):
        changed.durable(20)
    assert rank.save({"t": torch.ones(1000)}, 3).durable(20).step == 3
    rank.saving.finish()


def test_steps_that_do_not_grow_are_refused_with_the_remedy(job) -> None:
    rank = job.ranks(1)[0]
    rank.save(_items(0, 5), 5)
    for step in (5, 4):
        with pytest.raises(UsageError, match=rf"step={step} last_step=5; to go back, restore"):
            rank.save(_items(0, step), step)
    rank.saving.finish()


@pytest.mark.parametrize("seed", range(3))
def test_random_failures_on_random_ranks_leave_the_same_outcomes_everywhere(
    job, run_ranks, seed: int
) -> None:
    backends = {
        rank: FaultyBackend(
            job.store,
            [Fault(harm=Harm.LOST_REQUEST, op="put", key="packs/", times=None, chance=0.2)],
            seed=seed * 10 + rank,
        )
        for rank in range(3)
    }
    ranks = job.ranks(3, backends=backends)

    def save_many(r: int) -> list[str]:
        pendings = [ranks[r].save(_items(r, step), step) for step in range(1, 16)]
        return [_outcome(pending) for pending in pendings]

    outcomes = run_ranks(3, save_many)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert {"durable", "unavailable"} == set(outcomes[0])
    run_ranks(3, lambda r: ranks[r].saving.abandon())
    state = Journal.open(job.store).refresh()
    wanted = [
        step
        for step, outcome in zip(range(1, 16), outcomes[0], strict=True)
        if outcome == "durable"
    ]
    assert [info.step for info in snapshots(job.store, state)] == wanted


def _outcome(pending) -> str:
    try:
        pending.durable(20)
    except (UnavailableError, IntegrityError) as error:
        return error.code
    return "durable"


def _until(condition: Callable[[], bool], *, wait_s: float = 20.0) -> None:
    pause = threading.Event()
    began = 0.0
    while not condition():
        began += 0.002
        assert began < wait_s, "the condition did not come true in time"
        pause.wait(0.002)
