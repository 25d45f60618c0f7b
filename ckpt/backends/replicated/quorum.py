"""On how many stores an object must be, and how many must miss it before it is known to be nowhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckpt.errors import CkptError, UnavailableError, UsageError


@dataclass(frozen=True, slots=True)
class Quorum:
    """``write`` of ``stores`` hold what was acknowledged; only those at ``counting`` places are believed to be complete.

    ``silent``: places that counted, and did not answer when it was last looked. What they take counts; what they lack doesn't,
    since they may have been emptied meanwhile.
    """

    stores: int
    write: int
    counting: frozenset[int]
    silent: frozenset[int] = frozenset()

    @property
    def takers(self) -> frozenset[int]:
        """The places whose acknowledgement counts."""
        return self.counting | self.silent

    def acknowledged(self, places: AbstractSet[int]) -> bool:
        """Whether an object that lies on ``places`` is durable; or, of the places that may still take it, whether it can be."""
        return len(self.takers & places) >= self.write

    def absent(self, places: AbstractSet[int]) -> bool:
        """Whether an object that ``places`` do not have was never acknowledged: too few others are left to hold it."""
        return self.answered(places)

    def answered(self, places: AbstractSet[int]) -> bool:
        """Whether at least one of ``places`` holds any object that was acknowledged."""
        return len(self.counting & places) >= self.stores - self.write + 1


def quorum_of(stores: int, write: int | None) -> Quorum:
    """The quorum of that many stores, all counting; ``write`` None means the majority.

    Raises UsageError unless 1 <= write <= stores < 2 * write: two quorums must share a store.
    """
    if stores < 1:
        raise UsageError("a replicated store needs stores. stores=0; name at least one")
    write = stores // 2 + 1 if write is None else write
    if not 1 <= write <= stores:
        raise UsageError(
            f"a write quorum lies between 1 and the number of stores. write_quorum={write} stores={stores}"
        )
    if 2 * write <= stores:
        raise UsageError(
            f"two write quorums would share no store. write_quorum={write} stores={stores}; "
            f"use {stores // 2 + 1} or more, or leave it out"
        )
    return Quorum(stores, write, frozenset(range(stores)))


def counting_only(quorum: Quorum, full: Iterable[int], silent: Iterable[int] = ()) -> Quorum:
    """The same quorum in which only ``full`` count, and ``silent`` for what they take. Raises UsageError for other places."""
    counting = frozenset(full)
    late = frozenset(silent) - counting
    if bad := sorted((counting | late) - frozenset(range(quorum.stores))):
        raise UsageError(f"no store has this place. places={bad} stores={quorum.stores}; places count from 0")
    return Quorum(quorum.stores, quorum.write, counting, late)


def commonest(errors: Sequence[CkptError]) -> type[CkptError]:
    """The type that most of ``errors`` have, the earliest of equals; UnavailableError where there is none."""
    kinds = [type(error) for error in errors]
    return max(kinds, key=kinds.count, default=UnavailableError)
