"""What the membership's history says: who was in which epoch, where; and whether it contradicts
itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt.cluster.membership import transactions as names
from ckpt.cluster.membership.records import EpochRecord, decode_epoch, decode_node
from kit.nemesis.history import Change


@dataclass(frozen=True, slots=True)
class Published:
    """An epoch, when it was seen to hold, and on which machine each of its ranks was."""

    record: EpochRecord
    revision: int
    machines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Members:
    """The membership's history, read once: epochs in order, each node's machine, and what is wrong
    with it."""

    epochs: tuple[Published, ...]
    machines: Mapping[str, str]
    wrong: tuple[str, ...]

    def epoch(self, number: int) -> Published | None:
        """The epoch of that number; None: there was none."""
        return next((one for one in self.epochs if one.record.number == number), None)


def read_members(changes: Sequence[Change]) -> Members:
    """Follow all changes in order of their revisions."""
    reader = _Reader()
    for revision in _by_revision(changes):
        reader.take(revision)
    return Members(tuple(reader.epochs), reader.machines, tuple(reader.wrong))


class _Reader:
    def __init__(self) -> None:
        self.epochs: list[Published] = []
        self.wrong: list[str] = []
        self.machines: dict[str, str] = {}
        """Of each node that ever was."""
        self._members: set[str] = set()
        self._ended: dict[str, int] = {}
        """At which revision the membership of a node ended."""
        self._leader = ""
        self._contents: dict[int, bytes] = {}

    def take(self, revision: Sequence[Change]) -> None:
        """All changes of one transaction: an epoch in it counts as of the members before it."""
        epoch = next((one for one in revision if one.key == names.EPOCH), None)
        if epoch is not None:
            self._take_epoch(epoch)
        for change in revision:
            if change.key.startswith(names.NODES):
                self._take_node(change)
            elif change.key == names.LEADER:
                self._leader = "" if change.value is None else change.value.decode()

    def _take_epoch(self, change: Change) -> None:
        if change.value is None:
            self.wrong.append(f"the epoch was deleted. revision={change.revision}")
            return
        record = decode_epoch(change.value)
        number = record.number
        if self._contents.setdefault(number, change.value) != change.value:
            self.wrong.append(f"two epochs of one number with different content. epoch={number}")
        newest = self.epochs[-1].record.number if self.epochs else 0
        if number <= newest:
            self.wrong.append(
                f"an epoch follows one that is no smaller. epoch={number} newest={newest}"
            )
        if record.leader != self._leader:
            self.wrong.append(
                f"an epoch is not its leader's. epoch={number} by={record.leader} "
                f"leader={self._leader}"
            )
        # Its leader looked after the epoch before: who was a member since then may be lost
        # meanwhile, and the next one says so.
        looked = self.epochs[-1].revision if self.epochs else 0
        strangers = [
            node
            for node in record.ranks
            if node not in self._members and self._ended.get(node, 0) <= looked
        ]
        if strangers:
            self.wrong.append(f"an epoch places who is no member. epoch={number} nodes={strangers}")
        machines = tuple(
            self.machines.get(node, "") for node, ranks in record.ranks.items() for _ in ranks
        )
        if len(set(machines)) != len(machines):
            self.wrong.append(
                f"an epoch places two ranks on one machine of one slot. epoch={number} {machines}"
            )
        self.epochs.append(Published(record, change.revision, machines))

    def _take_node(self, change: Change) -> None:
        node = change.key.removeprefix(names.NODES)
        if change.value is None:
            self._members.discard(node)
            self._ended[node] = change.revision
            return
        if node in self.machines and node not in self._members:
            self.wrong.append(f"a node came back under an id that was over. node={node}")
        self.machines[node] = decode_node(change.value).domain
        self._members.add(node)


def _by_revision(changes: Sequence[Change]) -> Iterator[list[Change]]:
    batch: list[Change] = []
    for change in sorted(changes, key=lambda one: one.revision):
        if batch and batch[0].revision != change.revision:
            yield batch
            batch = []
        batch.append(change)
    if batch:
        yield batch
