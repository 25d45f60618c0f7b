"""What nodes said about one epoch after the other: whose trainers failed, whose ended. Not thread-safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt.cluster.membership.records import EpochRecord, View
from ckpt.cluster.mesh.messages import Ended, Failed


@dataclass(frozen=True, slots=True)
class Reported:
    """What is known of one epoch: failures by node, when each was heard, and the nodes all of whose ranks ended well."""

    failures: Mapping[str, Failed]
    heard_s: Mapping[str, float]
    ended: frozenset[str]


class Reports:
    """The newest word of each node. Words may be of an epoch that this node has not seen yet."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[Failed, float]] = {}
        self._ended: dict[str, int] = {}

    def take(self, node: str, word: Failed | Ended, now_s: float) -> None:
        """Note a word, unless it is known or older than what is."""
        match word:
            case Failed():
                known = self._failures.get(node)
                if known is None or _age(known[0]) < _age(word):
                    self._failures[node] = (word, now_s)
            case Ended():
                self._ended[node] = max(word.attempt, self._ended.get(node, 0))

    def of(self, record: EpochRecord) -> Reported:
        """Of an epoch's nodes. A node that can't go on said so once, and it holds in each epoch that still places it."""
        known = {
            node: self._failures[node] for node in record.ranks
            if node in self._failures and _concerns(self._failures[node][0], record.number)
        }  # fmt: skip
        return Reported(
            {node: word for node, (word, _) in known.items()},
            {node: at_s for node, (_, at_s) in known.items()},
            frozenset(node for node in record.ranks if self._ended.get(node) == record.number),
        )

    def forget(self, view: View) -> None:
        """Drop what says nothing about the view's epoch or a later one."""
        number = view.epoch.number if view.epoch is not None else 0
        self._failures = {
            node: (word, at_s) for node, (word, at_s) in self._failures.items()
            if word.attempt >= number or (word.final and node in view.by_node)
        }  # fmt: skip
        self._ended = {node: attempt for node, attempt in self._ended.items() if attempt >= number}


def _age(word: Failed) -> tuple[int, bool]:
    return word.attempt, word.final


def _concerns(word: Failed, number: int) -> bool:
    return word.attempt == number or (word.final and word.attempt < number)
