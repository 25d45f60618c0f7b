"""The node of rank 0 is paused, or waits for its store, while another node takes over: what it
opens then harms nobody, and it is told no more than that its attempt is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckpt.errors import SupersededError, UnavailableError
from ckpt.format import keys
from ckpt.ipc.client import KeeperSpec
from ckpt.keeper.uploads.uploads import Uploads
from ckpt.values import MembershipEpoch, SnapshotId

WAIT_S = 60.0
LINE = "node-1"


class RootNode:
    """A keeper that has rank 0 in its membership epoch, with its own way to the shared store."""

    def __init__(self, world, store) -> None:
        self.world, self.store = world, store
        self.told: list = []
        self.fences: list[str] = []
        self.superseded: list[str] = []
        self.acts = True
        self.uploads = Uploads(
            KeeperSpec(job="job", store=str(world.root), compression="off"),
            ranks=1,
            post=world.calls.put,
            on_outcome=lambda *told: self.told.append(told),
            on_fenced_text=self.fences.append,
            emit=world.events.append,
            open_store=lambda: store,
            retry_first_s=0.01,
        )
        self.uploads.on_superseded = self.superseded.append

    def becomes_root(self, number: int) -> None:
        """Its membership epoch of that number begins, and it reads what can be restored."""
        self.uploads.new_generation(root=True)
        self.uploads.begin_attempt(MembershipEpoch(LINE, number), lambda: self.acts)
        self.world.result(self.uploads.choices(()))

    def open(self) -> int:
        return self.world.result(self.uploads.open_epoch(None))

    def save(self, snapshot: SnapshotId) -> None:
        self.uploads.persist(0, self.world.stage(0, snapshot), ())


@pytest.fixture
def roots(make_world):
    world = make_world(1)
    made = [RootNode(world, type(world.store)(world.root)) for _ in range(2)]
    yield made
    for node in made:
        node.store.go_on.set()
        node.uploads.close(WAIT_S)


def _holds(node: RootNode, key: str) -> Callable[[], None]:
    node.store.held = key

    def go_on() -> None:
        node.store.held = ""
        node.store.go_on.set()

    return go_on


@pytest.mark.parametrize("held", [keys.log_key(1), keys.LOG], ids=["at-its-claim", "reading"])
def test_root_that_wakes_up_at_its_open_does_not_fence_the_one_that_took_over(roots, held) -> None:
    zombie, living = roots
    world = zombie.world
    living.becomes_root(1)
    living.open()
    zombie.becomes_root(2)
    wake_up = _holds(zombie, held)
    late = zombie.uploads.open_epoch(None)
    world.until(zombie.store.waits.is_set)
    living.becomes_root(3)
    epoch = living.open()
    wake_up()
    world.until(late.done)
    assert isinstance(late.exception(), SupersededError)
    assert zombie.superseded and not zombie.fences
    for step in (1, 2):
        living.save(SnapshotId(epoch, step))
    world.until(lambda: len(living.told) == 2)
    assert world.codes(living.told) == [None, None], "its commits count"
    assert not living.fences and not living.superseded
    assert world.state().newest() == SnapshotId(epoch, 2)


def test_snapshot_of_a_replaced_root_ends_its_attempt_and_not_its_program(roots) -> None:
    zombie, living = roots
    world = zombie.world
    zombie.becomes_root(1)
    old = zombie.open()
    living.becomes_root(2)
    living.open()
    zombie.save(SnapshotId(old, 1))
    world.until(lambda: zombie.told)
    assert world.codes(zombie.told) == ["superseded"]
    assert len(zombie.superseded) == 1 and not zombie.fences


def test_open_that_waits_for_the_store_is_not_made_once_the_membership_has_changed(roots) -> None:
    root, _ = roots
    world = root.world
    root.becomes_root(1)
    wake_up = _holds(root, "log/")
    late = root.uploads.open_epoch(None)
    world.until(root.store.waits.is_set)
    root.uploads.new_generation(root=False)
    wake_up()
    world.until(late.done)
    assert late.exception() is not None
    world.until(lambda: root.uploads.idle)
    assert world.state().epoch == 0, "it ended before its claim"


def test_nothing_is_claimed_while_the_node_may_not_act(roots) -> None:
    root, _ = roots
    root.becomes_root(1)
    root.open()
    root.becomes_root(2)
    root.acts = False
    with pytest.raises(UnavailableError, match="may not act"):
        root.open()
    assert root.world.state().epoch == 1
    root.acts = True
    assert root.open() == 2
