"""An epoch's identity from the log to the slots and back: numbers alone are given out by several
keepers."""

from __future__ import annotations

from collections.abc import Callable

from kit.keepers.served import Served
from kit.keepers.slot_makers import MadeSlot

from ckpt.backends.file.store import FileBackend
from ckpt.ipc.board import Board
from ckpt.ipc.messages import Choices, GetChoices, Number, OpenEpoch
from ckpt.keeper.slots import SlotTable
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId


def test_trainers_are_told_the_id_of_the_record_that_opens_their_epoch(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    trainer = served.trainer()
    for expected in (1, 2):
        opened = trainer.calls.ask(OpenEpoch(resume=None), Number)
        assert opened.number == expected
        assert len(opened.origin) == 32
    state = Journal.open(FileBackend(served.spec.store)).refresh()
    assert trainer.calls.ask(GetChoices(), Choices).choices == ()
    assert state.write_id_at(state.opens[0].seq) != opened.origin
    trainer.leave()


def test_slots_of_two_openings_of_one_number_make_no_pair() -> None:
    pair, other = SnapshotId(2, 5), SnapshotId(2, 6)
    board = Board.create(2)
    table = SlotTable(board, lambda call: call(), dropped=lambda *_: None)
    made = []
    for rank, index, snapshot, origin in (
        (0, 0, pair, "x"),
        (1, 0, pair, "y"),
        (0, 1, other, "x"),
        (1, 1, other, "x"),
    ):
        made.append(MadeSlot())
        made[-1].seal(snapshot, rank=rank, origin=origin)
        table.add(rank, index, made[-1].given(), made[-1].size_bytes)
    assert table.snapshot_origins(2) == {other: "x"}
    assert table.complete_snapshots(2) == [other]
    table.close()
    board.close()
    for slot in made:
        slot.close()
