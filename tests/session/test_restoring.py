"""One snapshot for all ranks and items, an older one where any rank meets damage. Ranks are
threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit.damage import without_second_copies
from torch import nn

from ckpt.backends.base import Backend
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.log.journal import Journal
from ckpt.save.persister import SUSPECT_KEY
from ckpt.session.restoring import FillRules, RestoreCandidate, Restoring
from ckpt.testing.faults import Fault, FaultyBackend, Harm
from ckpt.values import SnapshotId

STEPS = (10, 20, 30)


def _write(job, run_ranks, size: int, *, steps: tuple[int, ...] = STEPS) -> int:
    """Saves each step on all ranks: two items, each value tells its step and rank. Returns the
    epoch."""
    ranks = job.ranks(size)
    for step in steps:
        run_ranks(size, lambda r, step=step: ranks[r].save(_stored(r, step), step).durable(20))
    run_ranks(size, lambda r: ranks[r].saving.finish())
    return ranks[0].epoch


def _stored(rank: int, step: int) -> dict[str, object]:
    return {
        "a": {"w": torch.full((1000,), float(step * 100 + rank)), "step": step, "rank": rank},
        "b": {"w": torch.full((7,), float(-step * 100 - rank)), "step": step},
    }


def _blank() -> dict[str, object]:
    return {
        "a": {"w": torch.zeros(1000), "step": 0, "rank": -1},
        "b": {"w": torch.zeros(7), "step": 0},
    }


def _is(items: dict[str, object], rank: int, step: int) -> bool:
    stored = _stored(rank, step)
    return all(
        torch.equal(items[name][key], value)
        if isinstance(value, torch.Tensor)
        else items[name][key] == value
        for name in items
        for key, value in stored[name].items()
    )


def _newest(job) -> list[SnapshotId]:
    return list(Journal.open(job.store).refresh().lineage)


def _candidates(snapshots: list[SnapshotId]) -> list[RestoreCandidate]:
    return [RestoreCandidate(snapshot) for snapshot in snapshots]


def _restore(
    job,
    run_ranks,
    size: int,
    *,
    backends: dict[int, Backend] | None = None,
    choices: list[SnapshotId] | None = None,
    at_once: bool = False,
):
    """Each rank's items after a restore of "a", then "b" (or both at once), or its error; and what
    rank 0 told."""
    restorers, told = job.restorers(size, backends=backends)

    def call(rank: int) -> tuple[dict[str, object], SnapshotId | None]:
        restoring = restorers[rank]
        restoring.choose(lambda: _candidates(choices if choices is not None else _newest(job)))
        items = _blank()
        for share in [items] if at_once else [{name: item} for name, item in items.items()]:
            restoring.fill(share, FillRules())
        return items, restoring.chosen

    return run_ranks(size, call), told[0]


def _packs_of(job, step: int, rank: int, epoch: int = 1) -> set[str]:
    from_index = _index(job, epoch, step).parts[rank]
    return {place.pack for shard in from_index.shards for place in shard.locations}


def _index(job, epoch: int, step: int):
    restorers, _ = job.restorers(1)
    restorers[0].choose(lambda: _candidates([SnapshotId(epoch, step)]))
    return restorers[0].index()


def _damage(job, step: int, rank: int, *, leaf: str = "a/w", epoch: int = 1) -> None:
    """Flip one stored bit of that leaf."""
    for shard in _index(job, epoch, step).parts[rank].shards:
        if shard.leaf.name == leaf:
            place = shard.locations[0]
            body, when = job.store._objects[place.pack]
            changed = bytearray(body)
            changed[place.offset_bytes + place.stored_bytes // 2] ^= 0x40
            job.store._objects[place.pack] = (bytes(changed), when)
            return
    raise AssertionError(f"no such leaf: {leaf}")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at_once", [True, False])
def test_every_rank_gets_its_own_leaves_of_the_newest(
    job, run_ranks, size: int, at_once: bool
) -> None:
    _write(job, run_ranks, size)
    outcomes, told = _restore(job, run_ranks, size, at_once=at_once)
    assert all(_is(items, rank, 30) for rank, (items, _) in enumerate(outcomes))
    assert all(chosen == SnapshotId(1, 30) for _, chosen in outcomes)
    assert told == []


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_damage_that_one_rank_alone_meets_sends_all_ranks_to_the_same_older_snapshot(
    job, run_ranks, damaged: int
) -> None:
    _write(job, run_ranks, 3)
    _damage(job, 30, damaged)
    outcomes, told = _restore(job, run_ranks, 3)
    assert all(_is(items, rank, 20) for rank, (items, _) in enumerate(outcomes)), outcomes
    assert [event.kind for event in told] == ["fallback"]
    assert "epoch 1 step 30" in told[0].text
    assert "epoch 1 step 20" in told[0].text


def test_damage_met_in_the_second_item_fills_the_first_again_on_all_ranks(job, run_ranks) -> None:
    _write(job, run_ranks, 2)
    _damage(job, 30, 1, leaf="b/w")
    outcomes, _ = _restore(job, run_ranks, 2)
    assert all(_is(items, rank, 20) for rank, (items, _) in enumerate(outcomes)), outcomes
    assert all(chosen == SnapshotId(1, 20) for _, chosen in outcomes)


def test_damage_of_the_second_newest_too_falls_back_further(job, run_ranks) -> None:
    _write(job, run_ranks, 2)
    _damage(job, 30, 0)
    _damage(job, 20, 1)
    outcomes, told = _restore(job, run_ranks, 2)
    assert all(_is(items, rank, 10) for rank, (items, _) in enumerate(outcomes)), outcomes
    assert [event.kind for event in told] == ["fallback", "fallback"]


@pytest.mark.parametrize("gone", ["manifests/", "parts/", "packs/"])
def test_records_that_are_gone_count_as_damage(job, run_ranks, gone: str) -> None:
    _write(job, run_ranks, 2)
    keys = (
        _packs_of(job, 30, 1)
        if gone == "packs/"
        else {key for key in job.store._objects if key.startswith(f"{gone}{SnapshotId(1, 30).key}")}
    )
    assert keys
    without_second_copies(job.store)  # they would be taken instead
    for key in keys:
        job.store.delete(key)
    outcomes, _ = _restore(job, run_ranks, 2)
    assert all(_is(items, rank, 20) for rank, (items, _) in enumerate(outcomes)), outcomes


@pytest.mark.parametrize("size", [1, 2])
def test_only_snapshot_that_is_dropped_for_a_newer_one_after_it_was_chosen_is_no_loss(
    job, run_ranks, size: int
) -> None:
    _write(job, run_ranks, size)
    restorers, told = job.restorers(size)
    dropped = [RestoreCandidate(SnapshotId(1, 5))]

    def call(rank: int) -> tuple[dict[str, object], SnapshotId | None]:
        lists = iter([dropped, _candidates(_newest(job)[:1])])
        restorers[rank].choose(lambda: next(lists))
        items = _blank()
        restorers[rank].fill(items, FillRules())
        return items, restorers[rank].chosen

    for rank, (items, chosen) in enumerate(run_ranks(size, call)):
        assert chosen == SnapshotId(1, 30)
        assert _is(items, rank, 30)
    assert [event.kind for event in told[0]] == ["chosen-anew"], (
        "it is no damage, and no older one is restored"
    )


def test_explicit_choice_that_is_damaged_is_an_error_on_all_ranks_without_fallback(
    job, run_ranks
) -> None:
    _write(job, run_ranks, 2)
    _damage(job, 30, 1)
    outcomes, told = _restore(job, run_ranks, 2, choices=[SnapshotId(1, 30)])
    assert all(isinstance(error, IntegrityError) for error in outcomes), outcomes
    assert all("rank 1: " in str(error) for error in outcomes)
    assert told == []


def test_no_snapshot_that_can_be_read_is_an_error_on_all_ranks(job, run_ranks) -> None:
    _write(job, run_ranks, 2)
    for n, step in enumerate(STEPS):
        _damage(job, step, n % 2)
    outcomes, told = _restore(job, run_ranks, 2)
    assert all(isinstance(error, IntegrityError) for error in outcomes), outcomes
    assert [event.kind for event in told] == ["fallback", "fallback"]


def test_silent_store_of_one_rank_is_told_to_all_and_is_no_damage(job, run_ranks) -> None:
    _write(job, run_ranks, 2)
    faulty = FaultyBackend(
        job.store, [Fault(harm=Harm.LOST_REQUEST, op="read_into", key="packs/", times=None)]
    )
    outcomes, told = _restore(job, run_ranks, 2, backends={1: faulty})
    assert all(isinstance(error, UnavailableError) for error in outcomes), outcomes
    assert told == []


def test_state_that_does_not_fit_on_one_rank_is_an_error_on_all_and_no_damage(
    job, run_ranks
) -> None:
    _write(job, run_ranks, 2)
    restorers, told = job.restorers(2)

    def call(rank: int) -> object:
        restorers[rank].choose(lambda: _candidates(_newest(job)))
        return restorers[rank].fill(
            {"a": {"w": torch.zeros(1000 + rank), "step": 0, "rank": 0}}, FillRules()
        )

    outcomes = run_ranks(2, call)
    assert all(isinstance(error, UsageError) for error in outcomes), outcomes
    assert all("rank 1: " in str(error) for error in outcomes)
    assert told[0] == []


@pytest.mark.slow
def test_bit_that_flips_while_one_rank_reads_never_becomes_state(job, run_ranks) -> None:
    _write(job, run_ranks, 2)
    for seed in range(5):
        faulty = FaultyBackend(
            job.store, [Fault(harm=Harm.FLIPPED, op="read_into", key="packs/")], seed=seed
        )
        outcomes, _ = _restore(job, run_ranks, 2, backends={1: faulty})
        assert all(not isinstance(outcome, CkptError) for outcome in outcomes), outcomes
        steps = {chosen.step for _, chosen in outcomes}
        assert len(steps) == 1
        assert all(_is(items, rank, steps.copy().pop()) for rank, (items, _) in enumerate(outcomes))


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2), (2, 3), (3, 2), (2, 5)])
def test_world_of_another_size_takes_per_rank_leaves_by_rank_modulo_the_old_size(
    job, run_ranks, old: int, new: int
) -> None:
    _write(job, run_ranks, old)
    outcomes, _ = _restore(job, run_ranks, new)
    assert all(_is(items, rank % old, 30) for rank, (items, _) in enumerate(outcomes)), outcomes


@pytest.mark.slow
def test_chain_of_worlds_keeps_every_rank_right(job, run_ranks) -> None:
    for n, size in enumerate((2, 1, 3, 2), start=1):
        epoch = _write(job, run_ranks, size, steps=(n * 10,))
        assert epoch == n
        outcomes, _ = _restore(job, run_ranks, 4)
        assert all(_is(items, rank % size, n * 10) for rank, (items, _) in enumerate(outcomes)), (
            outcomes
        )


def test_missing_keys_are_named_and_nothing_is_changed(job, run_ranks) -> None:
    _write(job, run_ranks, 1)
    restoring = _chosen(job)
    items = {"a": {"w": torch.zeros(1000), "step": 0, "rank": -1, "extra": torch.ones(3)}}
    with pytest.raises(UsageError, match="a/extra"):
        restoring.fill(items, FillRules())
    assert torch.equal(items["a"]["w"], torch.zeros(1000))
    restoring.fill(items, FillRules(missing="keep"))
    assert torch.equal(items["a"]["extra"], torch.ones(3))
    assert torch.equal(items["a"]["w"], torch.full((1000,), 3000.0))


def test_missing_item_is_named(job, run_ranks) -> None:
    _write(job, run_ranks, 1)
    restoring = _chosen(job)
    with pytest.raises(UsageError, match="newcomer"):
        restoring.fill({"newcomer": {"x": 1}}, FillRules())
    kept = {"newcomer": {"x": 1}}
    restoring.fill(kept, FillRules(missing="keep"))
    assert kept == {"newcomer": {"x": 1}}


def test_only_fills_what_it_names(job, run_ranks) -> None:
    _write(job, run_ranks, 1)
    items = _blank()
    _chosen(job).fill(items, FillRules(only=("a/w", "b/step")))
    assert torch.equal(items["a"]["w"], torch.full((1000,), 3000.0))
    assert items["a"]["step"] == 0
    assert items["b"]["step"] == 30
    assert torch.equal(items["b"]["w"], torch.zeros(7))


def test_empty_store_has_no_choice(job, run_ranks) -> None:
    Journal.open(job.store, job="job", create=True)
    restorers, _ = job.restorers(2)
    assert run_ranks(2, lambda r: restorers[r].choose(lambda: [])) == [None, None]


def test_error_of_choosing_reaches_every_rank(job, run_ranks) -> None:
    Journal.open(job.store, job="job", create=True)
    restorers, _ = job.restorers(2)

    def nothing() -> list[SnapshotId]:
        raise NotFoundError("no such tag. tag='x' tags=none")

    outcomes = run_ranks(2, lambda r: restorers[r].choose(nothing))
    assert all(isinstance(error, NotFoundError) for error in outcomes)


def test_second_choice_forgets_what_the_first_filled(job, run_ranks) -> None:
    _write(job, run_ranks, 1)
    restoring = _chosen(job)
    first = {"a": _blank()["a"]}
    restoring.fill(first, FillRules())
    restoring.choose(lambda: _candidates([SnapshotId(1, 10)]))
    second = {"b": _blank()["b"]}
    restoring.fill(second, FillRules())
    assert _is(first, 0, 30)
    assert _is(second, 0, 10)


def test_modules_keep_their_parameters_identity_through_a_fallback(job, run_ranks) -> None:
    ranks = job.ranks(1)
    model = nn.Linear(30, 20)
    wanted = {}
    for step in (1, 2):
        with torch.no_grad():
            model.weight.fill_(step)
        wanted[step] = model.weight.detach().clone()
        ranks[0].save({"model": model, "x": {"v": np.full(5, step)}}, step).durable(20)
    ranks[0].saving.finish()
    _damage(job, 2, 0, leaf="model/weight")
    restorers, _ = job.restorers(1)
    restorers[0].choose(lambda: _candidates(_newest(job)))
    fresh = nn.Linear(30, 20)
    weight = fresh.weight
    info = restorers[0].fill({"model": fresh}, FillRules())
    assert info.step == 1
    assert fresh.weight is weight
    assert torch.equal(weight, wanted[1])


def _chosen(job) -> Restoring:
    restorers, _ = job.restorers(1)
    restorers[0].choose(lambda: _candidates(_newest(job)))
    return restorers[0]


def _write_twice(job, run_ranks, *, first: int = 1) -> None:
    """The same state in snapshots of two runs, each in packs of its own."""
    for epoch in (first, first + 1):
        assert _write(job, run_ranks, 2, steps=(10,)) == epoch


@pytest.mark.parametrize("damaged", [(0,), (0, 1)])
def test_damaged_chunk_is_read_from_another_place_before_an_older_snapshot_is_taken(
    job, run_ranks, damaged: tuple[int, ...]
) -> None:
    _write_twice(job, run_ranks)
    for rank in damaged:
        _damage(job, 10, rank, epoch=2)
    restorers, told = job.restorers(2)
    choices = _candidates([SnapshotId(2, 10), SnapshotId(1, 10)])

    def call(rank: int) -> tuple[dict[str, object], SnapshotId | None]:
        restorers[rank].choose(lambda: choices)
        items = _blank()
        restorers[rank].fill(items, FillRules())
        return items, restorers[rank].chosen

    for rank, (items, chosen) in enumerate(run_ranks(2, call)):
        assert chosen == SnapshotId(2, 10)
        assert _is(items, rank, 10)
        assert [event.kind for event in told[rank]] == ["read-elsewhere"] * (rank in damaged)
        # The next save may not refer to the damaged chunk, nor to a pack that its base lacks.
        packs = {place.pack for place in restorers[rank].verified.values()}
        assert all(pack.startswith(f"packs/{SnapshotId(2, 10).key}/") for pack in packs)
        own = _digest_of(job, 2, 10, rank)
        assert (own in restorers[rank].verified) == (rank not in damaged)


def _digest_of(job, epoch: int, step: int, rank: int) -> bytes:
    shards = _index(job, epoch, step).parts[rank].shards
    return next(shard.digests[0] for shard in shards if shard.leaf.name == "a/w")


def test_chunk_damaged_at_all_its_places_still_sends_all_to_an_older_snapshot(
    job, run_ranks
) -> None:
    _write(job, run_ranks, 2, steps=(5,))
    _write_twice(job, run_ranks, first=2)
    for epoch in (2, 3):
        _damage(job, 10, 0, epoch=epoch)
    outcomes, told = _restore(
        job, run_ranks, 2, choices=[SnapshotId(3, 10), SnapshotId(1, 5)], at_once=True
    )
    assert all(_is(items, rank, 5) for rank, (items, _) in enumerate(outcomes)), outcomes
    assert [event.kind for event in told] == ["fallback"]


def _write_marked(job, run_ranks, suspect: tuple[int, ...]) -> None:
    ranks = job.ranks(2)
    for step in STEPS:
        marked = {SUSPECT_KEY: "a/w (ranks 0 and 1)"} if step in suspect else {}
        run_ranks(
            2,
            lambda r, step=step, marked=marked: (
                ranks[r].save(_stored(r, step), step, metadata=marked).durable(20)
            ),
        )
    run_ranks(2, lambda r: ranks[r].saving.finish())


def test_snapshot_marked_suspect_is_restored_with_one_alarm(job, run_ranks) -> None:
    _write_marked(job, run_ranks, (30,))
    outcomes, told = _restore(job, run_ranks, 2)
    assert all(_is(items, rank, 30) for rank, (items, _) in enumerate(outcomes)), outcomes
    assert [event.kind for event in told] == ["suspect-restored"], "once, for two items"
    assert told[0].alarm
    assert "a/w (ranks 0 and 1)" in told[0].text


@pytest.mark.parametrize(("suspect", "taken"), [((20,), 10), ((10, 20), 20)])
def test_fallback_prefers_a_snapshot_that_is_not_suspect(
    job, run_ranks, suspect: tuple[int, ...], taken: int
) -> None:
    _write_marked(job, run_ranks, suspect)
    _damage(job, 30, 1)
    outcomes, told = _restore(job, run_ranks, 2)
    assert all(_is(items, rank, taken) for rank, (items, _) in enumerate(outcomes)), outcomes
    kinds = [event.kind for event in told]
    assert kinds == ["fallback"] + ["suspect-restored"] * (taken in suspect)
