"""Create an object once over several stores: whoever creates it in the first of them goes on to the others.

Were all asked at once, two writers might each win in some stores and none in enough. Only the winner in the first store that
answers writes to the rest; where two writers differ about which store that is, at most one reaches the quorum.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.backends.base import Buffer
from ckpt.backends.replicated.group import Group
from ckpt.backends.replicated.loans import immutable
from ckpt.backends.replicated.member import Member
from ckpt.backends.replicated.put import Put
from ckpt.backends.replicated.replicate_ledger import Proof
from ckpt.errors import CkptError, KeyExistsError
from ckpt.format.digest import digest


def create(group: Group, key: str, data: Sequence[Buffer]) -> None:
    """Store ``data`` at ``key`` in a quorum of stores where the key is new. Copies what could change: meant for records.

    Raises KeyExistsError where another object came first, and what ``Put.run`` raises; after that the object may lie in some
    stores, and the key stays taken.
    """
    body = tuple(data) if immutable(data) else (b"".join(data),)
    failed: dict[int, CkptError] = {}
    winner: frozenset[int] = frozenset()
    usable = {member.place for member in group.members if member.writing.circuit.usable}
    for place in sorted(group.quorum.takers, key=lambda at: (at in group.quorum.silent, at not in usable, at)):
        answer = group.ask([place], lambda member: _create(member, key, body), side=lambda m: m.writing, key=key)[place]
        if isinstance(answer, KeyExistsError):
            raise answer
        if not isinstance(answer, CkptError):
            winner = frozenset({place})
            break
        failed[place] = answer
    joined = b"".join(body)
    proof = Proof(0, len(joined), digest(joined), whole=True)
    Put(group, key, body, how=_create_or_same, proof=proof).run(holders=winner, failed=failed)


def _create(member: Member, key: str, data: Sequence[Buffer]) -> bool:
    member.write(sum(len(one) for one in data), lambda: member.store.put(key, data, create_only=True))
    return True


def _create_or_same(member: Member, key: str, data: Sequence[Buffer]) -> None:
    """As a create; but bytes that are there already and the same are as good as created."""
    try:
        member.store.put(key, data, create_only=True)
    except KeyExistsError:
        body = b"".join(data)
        found = member.store.stat(key)
        if found is None or found.size_bytes != len(body):
            raise
        there = bytearray(len(body))
        member.store.read_into(key, memoryview(there))
        if there != body:
            raise
