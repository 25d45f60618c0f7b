"""What one rank does alone must neither hang the others nor reach a snapshot."""

import threading
import time

import pytest
import torch

import ckpt
from ckpt.backends.memory import MemoryBackend
from ckpt.capture.leaves import TensorLeaf, World
from ckpt.save.receipts import Receipt, check_groups, merge_receipts, replica_groups
from ckpt.session.restoring import RestoreCandidate
from ckpt.session.staging import Stager, replicated_leaves
from ckpt.values import Box, Leaf, LeafKind, SnapshotId


class Broken:
    """An object whose state can't be read."""

    def state_dict(self) -> dict[str, object]:
        raise RuntimeError("device lost")

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise RuntimeError("device lost")


def items(value: float = 1.0) -> dict[str, object]:
    return {"m": {"w": torch.full((4,), value)}}


def test_an_outcome_stays_until_every_rank_has_read_it(job, monkeypatch) -> None:
    ranks = job.ranks(2)
    late = threading.Event()
    peek = ranks[1].channel.peek
    monkeypatch.setattr(
        ranks[1].channel,
        "peek",
        lambda key: peek(key) if key != "outcome/1" or late.is_set() else None,
    )
    pending = [rank.save(items(), 1) for rank in ranks]
    pending[0].durable(20)
    with pytest.raises(RuntimeError, match="device lost"):
        ranks[0].save({"b": Broken()}, 2)
    until = time.monotonic() + 0.3
    while time.monotonic() < until and peek("outcome/2") is None:
        pass
    late.set()
    assert pending[1].durable(20).step == 1


def test_a_rank_that_can_not_stage_fails_that_snapshot_alone(job) -> None:
    ranks = job.ranks(2)
    with pytest.raises(RuntimeError, match="device lost"):
        ranks[1].save({"b": Broken()}, 1)
    failed = ranks[0].save(items(), 1)
    after = [rank.save(items(), 2) for rank in ranks]
    with pytest.raises(ckpt.UnavailableError, match="device lost"):
        failed.durable(20)
    assert [one.durable(20).step for one in after] == [2, 2]


def test_an_unforeseen_error_of_the_commit_reaches_all_ranks(job, monkeypatch) -> None:
    ranks = job.ranks(2)

    def commit(*args: object) -> None:
        raise KeyError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(ranks[0].saving._persister, "_commit", commit)
        for one in [rank.save(items(), 1) for rank in ranks]:
            with pytest.raises(ckpt.InternalError, match="unforeseen"):
                one.durable(20)
    assert [one.durable(20).step for one in [rank.save(items(), 2) for rank in ranks]] == [2, 2]


def test_replicas_are_compared_again_only_when_their_set_changes() -> None:
    met: list[list[str]] = []
    stager = Stager(
        World(0, 2),
        slots=1,
        threads=1,
        compare_replicas=lambda leaves: met.append([one.leaf.name for one in leaves]),
    )

    def leaf(name: str, replicas: tuple[int, ...]) -> TensorLeaf:
        found = Leaf(
            name=name,
            kind=LeafKind.TENSOR,
            dtype="float32",
            shape=(2,),
            rank=None if replicas[1:] else 0,
        )
        return TensorLeaf(found, Box.whole((2,)), torch.ones(2), replicas)

    stager._compare([leaf("a", (0, 1)), leaf("mine", (0,))])
    stager._compare([leaf("a", (0, 1)), leaf("mine", (0,)), leaf("mine2", (0,))])
    stager._compare([leaf("a", (0, 1)), leaf("b", (0, 1))])
    stager.close()
    assert met == [["a"], ["a", "b"]]


def damage(store: MemoryBackend, value: float) -> None:
    """Flip a byte in the middle of the only run of ``value``."""
    wanted = torch.full((64,), value).numpy().tobytes()
    for stat in list(store.list("packs/")):
        data = bytearray(stat.size_bytes)
        store.read_into(stat.key, memoryview(data))
        at = data.find(wanted)
        if at >= 0:
            data[at + 100] ^= 0xFF
            store.put(stat.key, [bytes(data)])


def test_chunks_that_a_restore_did_not_read_are_not_referred_to() -> None:
    store = MemoryBackend()
    a, b = {"w": torch.ones(1000)}, {"w": torch.full((1000,), 7.0)}
    with ckpt.Checkpointer(store) as c:
        c.save({"a": a, "b": b}, step=1)
    damage(store, 7.0)
    with ckpt.Checkpointer(store) as c:
        c.restore({"a": a})
        assert c.save({"a": a, "b": b}, step=2).new_bytes >= 4000
        assert not c.verify(step=2).damaged


def test_chunks_that_a_restore_read_are_referred_to() -> None:
    store = MemoryBackend()
    a = {"w": torch.ones(1000)}
    with ckpt.Checkpointer(store) as c:
        c.save({"a": a}, step=1)
    with ckpt.Checkpointer(store) as c:
        c.restore({"a": a})
        assert c.save({"a": a}, step=2).new_bytes == 0


def test_what_a_damaged_snapshot_half_filled_is_not_kept_as_live_value() -> None:
    store = MemoryBackend()
    m, e = {"w": torch.ones(1000)}, {"w": torch.full((1000,), 7.0)}
    with ckpt.Checkpointer(store) as c:
        c.save({"m": m}, step=1)
        c.save({"m": m, "e": e}, step=2)
    damage(store, 7.0)
    with ckpt.Checkpointer(store) as c:
        with pytest.raises(ckpt.IntegrityError, match="half overwritten"):
            c.restore({"m": m, "e": e}, missing="keep")
        extra = {"w": torch.zeros(3)}  # in neither snapshot: its live value is untouched
        assert c.restore({"m": m, "extra": extra}, missing="keep").step == 2
        assert not extra["w"].any()


def test_going_back_does_not_fence_what_is_in_flight_nor_what_comes() -> None:
    store = MemoryBackend()
    with ckpt.Checkpointer(store) as c:
        c.save(items(), step=1)
        flying = c.save_async(items(2.0), step=2)
        c.restore(items(), step=1)
        assert c.save(items(), step=2).epoch == 2
        assert flying.durable().id == SnapshotId(1, 2)


def test_a_fenced_checkpointer_goes_on_after_a_restore() -> None:
    store = MemoryBackend()
    old, new = ckpt.Checkpointer(store), ckpt.Checkpointer(store)
    old.save(items(), step=1)
    new.save(items(), step=2)
    with pytest.raises(ckpt.FencedError):
        old.save(items(), step=3)
    old.restore(items())
    assert [old.save(items(), step=step).step for step in (4, 5)] == [4, 5]
    old.close()


def test_a_users_error_in_loading_is_told_to_the_other_ranks(job, run_ranks) -> None:
    for one in [rank.save(items(), 1) for rank in job.ranks(2)]:
        one.durable(20)
    restorers, _ = job.restorers(2)
    choices = lambda: [RestoreCandidate(SnapshotId(1, 1))]  # noqa: E731
    run_ranks(2, lambda rank: restorers[rank].choose(choices))
    live = [items(0.0), {"m": Broken()}]

    def fill(rank: int) -> object:
        try:
            return restorers[rank].fill(live[rank], ckpt.session.restoring.FillRules())
        except RuntimeError as error:
            return error

    first, second = run_ranks(2, fill)
    assert isinstance(first, ckpt.UsageError)
    assert "device lost" in str(first)
    assert isinstance(second, RuntimeError)


def test_replicas_that_hold_different_leaves_make_no_snapshot() -> None:
    def sets(*names: str) -> dict[str, tuple[int, str]]:
        leaves = [
            Leaf(name=name, kind=LeafKind.TENSOR, dtype="float32", shape=(2,)) for name in names
        ]
        return replicated_leaves(
            [TensorLeaf(leaf, Box.whole((2,)), torch.ones(2), (0, 1)) for leaf in leaves]
        )

    def error_of(*held: dict[str, tuple[int, str]]) -> str:
        receipts = [
            Receipt(snapshot=SnapshotId(1, 1), rank=rank, shared=replica_groups(one))
            for rank, one in enumerate(held)
        ]
        error = check_groups(merge_receipts(receipts)).error
        return "" if error is None else error.text

    assert not error_of(sets("a", "b"), sets("a", "b"), {})
    for other in (sets("a"), sets("b", "a"), {}):
        for pair in ([sets("a", "b"), other], [other, sets("a", "b")]):
            assert "different leaves" in error_of(*pair)
